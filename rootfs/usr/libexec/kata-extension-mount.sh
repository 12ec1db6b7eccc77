#!/bin/sh
# Mount an extension, read-only: kata-extension-mount.sh NAME
#
# Its disk is the one whose serial is extension-NAME. How it was built and what the kernel's command
# line says have to agree; only a disk that never had a hash tree is mounted as it is:
#
#   partition with hashes | parameters on the command line
#   yes                   | yes: opened with dm-verity
#   yes                   | no:  refused, the parameters were taken away
#   no                    | yes: refused, there is nothing to verify with
#   no                    | no:  mounted raw, the whole disk or its one partition
#
# KATAGPU_GUEST_ROOT: a directory to work in instead of /, for tests.
set -eu
PATH=${KATAGPU_GUEST_ROOT+$KATAGPU_GUEST_ROOT/bin:}/usr/sbin:/usr/bin
root=${KATAGPU_GUEST_ROOT-}
name=$1
place=$root/run/kata-extensions/$name
device=extension-$name

refuse() {
    echo "kata-extension-mount: $name: $*; the sandbox ends" >&2
    exit 1
}

# disk: the name of the block device with our serial, which nothing else may have
disk() {
    found=
    for serial in "$root"/sys/block/*/serial; do
        [ -r "$serial" ] || continue
        read -r text <"$serial" || [ -n "$text" ] || continue
        [ "$text" = "$device" ] || continue
        [ -z "$found" ] || refuse "two disks have the serial $device"
        found=${serial%/serial}
        found=${found##*/}
    done
    echo "$found"
}

# The last one counts, as for the kernel.
parameters() {
    value=
    set -f
    # shellcheck disable=SC2013 # words are what the kernel takes, too
    for word in $(cat "$root/proc/cmdline"); do
        case $word in
        "kata.extension.$name.verity_params="*) value=${word#*=} ;;
        "kata.extension.$name.verity_params") value= ;;
        esac
    done
    echo "$value"
}

# field KEY LINE: the value in "…,KEY=VALUE,…"
field() {
    rest=,$2,
    case $rest in
    *",$1="*) ;;
    *) refuse "the parameters have no $1" ;;
    esac
    rest=${rest#*",$1="}
    rest=${rest%%,*}
    case $rest in
    '' | *[!0-9a-f]*) refuse "the parameters have no valid $1" ;;
    esac
    echo "$rest"
}

case $name in
'' | *[!a-zA-Z0-9_-]*) refuse 'this cannot be the name of an extension' ;;
esac

# The kernel finds its disks before it starts us, but it does not promise that.
tries=50
while disk=$(disk) && [ -z "$disk" ]; do
    [ "$tries" -gt 0 ] || refuse "no disk has the serial $device"
    tries=$((tries - 1))
    sleep 0.1
done
[ -n "$disk" ] || exit 1

# Partitions of vda are vda1 and vda2, those of nvme0n1 have a p between.
case $disk in
*[0-9]) separator=p ;;
*) separator= ;;
esac
data=$root/dev/$disk${separator}1
hashes=$root/dev/$disk${separator}2
[ -e "$root/sys/block/$disk/$disk${separator}1" ] || data=$root/dev/$disk
line=$(parameters)

if [ -e "$root/sys/block/$disk/$disk${separator}2" ]; then
    [ -n "$line" ] || refuse 'the disk has hashes, and the kernel was given no parameters for them'
    # One after the other: a refusal in a command substitution ends only an assignment of its own.
    root_hash=$(field root_hash "$line")
    salt=$(field salt "$line")
    blocks=$(field data_blocks "$line")
    data_block_size=$(field data_block_size "$line")
    hash_block_size=$(field hash_block_size "$line")
    veritysetup open --no-superblock --hash=sha256 --salt="$salt" --data-blocks="$blocks" \
        --data-block-size="$data_block_size" --hash-block-size="$hash_block_size" \
        "$data" "$device" "$hashes" "$root_hash" || refuse 'its hashes do not fit'
    data=$root/dev/mapper/$device
elif [ -n "$line" ]; then
    refuse 'there are parameters for hashes, and the disk has none'
fi

mkdir -p "$place"
mount -t erofs -o ro,nodev,nosuid "$data" "$place" || refuse 'it cannot be mounted'
