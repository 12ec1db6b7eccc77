
#
# @LABEL@
# The head of a test archive in the form of NVIDIA's driver packages. Its lines are counted.
#

uncompress="@UNCOMPRESS@"

usage() {
    echo
    echo "$0 [options]"
    echo
    echo "  --info                print what this archive is"
    echo "  --list                list its files"
    echo "  --check               verify its checksums"
    echo "  -x, --extract-only    unpack it, do not run the installer"
    echo "  --target DIRECTORY    unpack it there, and keep it"
    echo "  --keep                keep the unpacked files"
    echo "  --tmpdir DIRECTORY    for temporary files"
    echo "  --label --version-string --pkg-version --target-os --target-arch"
    echo "  --target-directory --script --lsm --pkg-history --extract-decompress"
    echo
    echo "All else is handed to $script."
    echo
}

decompressor() {
    if [ "$size_decompress" = 0 ]; then
        echo "No decompressor embedded in this archive" >&2
        return 1
    fi
    tail -n +$skip_decompress "$0" | head -n $size_decompress
}

payload() {
    (cd "$location" && tail -n +$skip "$0") | $uncompress
}

crc() {
    tail -n +4 "$0" | cksum | cut -d ' ' -f 1
}

md5() {
    tail -n +4 "$0" | md5sum | cut -b -32
}

location=$(pwd)

if ! command -v ${uncompress%% *} > /dev/null 2>&1 && [ "$size_decompress" != 0 ]; then
    toolbox=$(mktemp -d "$TMPROOT/makeself.XXXXXXXX" 2> /dev/null)
    decompressor > "$toolbox/${uncompress%% *}"
    chmod +x "$toolbox/${uncompress%% *}"
    PATH="$toolbox:$PATH"
    trap 'rm -rf "$toolbox"' EXIT
fi

case "$1" in
    -h|--help|-A|--advanced-options) usage; exit 0 ;;
    --lsm) echo "no LSM"; exit 0 ;;
    --pkg-history) echo; exit 0 ;;
    --label) echo "$label"; exit 0 ;;
    --version-string) echo "$version_string"; exit 0 ;;
    --pkg-version) echo "$pkg_version"; exit 0 ;;
    --target-os) echo "$TARGET_OS"; exit 0 ;;
    --target-arch) echo "$TARGET_ARCH"; exit 0 ;;
    --target-directory) echo "$targetdir"; exit 0 ;;
    --script) echo "$script $scriptargs"; exit 0 ;;
    --info)
        echo
        echo "  Identification    : $label"
        echo "  Target directory  : $targetdir"
        echo "  Uncompressed size : @KILOBYTES@ KB"
        echo "  Compression       : ${uncompress%% *}"
        echo "  Date of packaging : @DATE@"
        echo "  Application run after extraction : $script $scriptargs"
        echo
        exit 0
        ;;
    --list)
        echo "Target directory: $targetdir"
        payload | tar tvf - 2> /dev/null
        exit 0
        ;;
    --extract-decompress) decompressor; exit ;;
    --check)
        found=$(crc)
        if [ "$found" != "$CRCsum" ]; then
            echo "Error in checksums $found $CRCsum"
            exit 2
        fi
        found=$(md5)
        if [ "$found" != "$MD5" ]; then
            echo "Error in md5 sums $found $MD5"
            exit 2
        fi
        echo "check sums and md5 sums are ok"
        exit 0
        ;;
esac

run=y
while [ "$1" ]; do
    case "$1" in
        -x|--extract-only) run=n; keep=y ;;
        --keep) keep=y ;;
        --target)
            if [ -z "$2" ]; then
                echo "ERROR: --target: no target directory specified."
                exit 1
            fi
            targetdir=$2; keep=y; shift
            ;;
        --tmpdir)
            if [ -z "$2" ]; then
                echo "ERROR: --tmpdir: no temporary directory specified."
                exit 1
            fi
            scriptargs="$scriptargs $1 $2"; TMPROOT=$2; shift
            ;;
        *) scriptargs="$scriptargs $1" ;;
    esac
    shift
done

case "$TMPROOT" in /*) ;; *) TMPROOT="$location/$TMPROOT" ;; esac
if ! mkdir -p "$TMPROOT"; then
    echo "Unable to create temp directory $TMPROOT"
    exit 1
fi
TMPDIR=$TMPROOT
export TMPDIR
probe=$(mktemp "$TMPROOT/makeself.XXXXXXXX" 2> /dev/null)
if [ -z "$probe" ]; then
    echo "Unable to create temporary file in $TMPROOT"
    exit 1
fi
chmod +x "$probe"
if ! "$probe" > /dev/null 2>&1; then
    echo "ERROR: Temporary directory $TMPROOT is not executable"
    rm "$probe"
    exit 1
fi
rm "$probe"

if [ $run = y ] && [ "$(uname)-$(uname -m)" != "$TARGET_OS-$TARGET_ARCH" ]; then
    echo "ERROR: this .run file is intended for the $TARGET_OS-$TARGET_ARCH platform."
    exit 1
fi

if [ "$keep" = y ]; then
    echo "Creating directory $targetdir"
    place=$targetdir
else
    work="$TMPROOT/selfgz$$"
    place="$work/$targetdir"
    rm -rf "$place"
fi
if [ -d "$place" ] || [ -f "$place" ]; then
    echo "The directory '$place' already exists."
    exit 1
fi
if ! mkdir -p "$place"; then
    echo "Unable to create the target directory '$place'."
    exit 1
fi

printf 'Verifying archive integrity... '
if [ "$SETUP_NOCHECK" != 1 ]; then
    found=$(crc)
    if [ "$found" != "$CRCsum" ]; then
        echo "Error in check sums $found $CRCsum"
        exit 2
    fi
    echo OK
fi
found=$(md5)
if [ "$found" != "$MD5" ]; then
    echo "Error in md5 sums $found $MD5"
    exit 2
fi

# Where the files are not kept, a signal cleans up and exits with 15; else it simply kills (143).
if [ "$keep" != y ]; then
    trap 'cd "$TMPROOT"; rm -rf "$place"; exit 15' 1 2 15
fi

unpack() {
    tar xf - 2> /dev/null || { { echo "Extraction failed." > /dev/tty; } 2> /dev/null; kill -15 $$; }
}

printf '%s' "Uncompressing $label"
cd "$place" || exit 1
payload | unpack
echo
chown -Rf "$(id -u):$(id -g)" .
result=0
if [ $run = y ]; then
    $script $scriptargs
    result=$?
fi
if [ "$keep" != y ]; then
    cd "$TMPROOT" || exit 1
    rm -rf "$work"
fi
exit $result
