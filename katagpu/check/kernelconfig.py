"""A kernel's configuration, and whether such a kernel mounts what a root is packed as."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from katagpu.check.facts import Fault, RootFormat

COMPRESSORS = {
    RootFormat.EROFS: {"lz4": "EROFS_FS_ZIP", "lz4hc": "EROFS_FS_ZIP", "lzma": "EROFS_FS_ZIP_LZMA",
                       "deflate": "EROFS_FS_ZIP_DEFLATE", "zstd": "EROFS_FS_ZIP_ZSTD"},
    RootFormat.INITRD: {"gzip": "RD_GZIP", "bzip2": "RD_BZIP2", "lzma": "RD_LZMA", "xz": "RD_XZ",
                        "lzo": "RD_LZO", "lz4": "RD_LZ4", "zstd": "RD_ZSTD"},
    RootFormat.EXT4: {},
}
FORMATS = {RootFormat.EROFS: "EROFS_FS", RootFormat.INITRD: "BLK_DEV_INITRD",
           RootFormat.EXT4: "EXT4_FS"}
# Without initramfs the kernel makes the device from its command line (dm-init.rst). DM_VERITY
# selects no hash by itself.
VERITY = ("BLK_DEV_DM", "DM_INIT", "DM_VERITY", "CRYPTO_SHA256")


def read(path: Path) -> Mapping[str, str]:
    """A kernel's .config: symbol without CONFIG_ to value; what is not set is not there."""
    pairs = (line.partition("=") for line in path.read_text().splitlines()
             if line.startswith("CONFIG_"))
    return {name.removeprefix("CONFIG_"): value for name, _, value in pairs}


def unreadable(config: Mapping[str, str], root_format: RootFormat,
               compressor: str | None) -> Iterator[Fault]:
    """What keeps this kernel from mounting such a root: its file system, its decompressor.

    A module would not do, since no initramfs could load it.
    """
    symbols = [FORMATS[root_format]]
    known = COMPRESSORS[root_format]
    if compressor is not None and compressor not in known:
        yield Fault(what=f"no kernel reads {root_format} compressed with {compressor}",
                    where="kernel config", cure=f"choose {', '.join(known) or 'no compressor'}")
    elif compressor is not None:
        symbols.append(known[compressor])
        if root_format is RootFormat.EROFS and "EROFS_FS_ZIP" not in symbols:
            symbols.append("EROFS_FS_ZIP")
    for symbol in symbols:
        if config.get(symbol) != "y":
            yield Fault(what=f"the image is {root_format} ({compressor or 'plain'}), and "
                             f"CONFIG_{symbol} is {config.get(symbol, 'not set')}: the root cannot "
                             "be mounted", where="kernel config",
                        cure=f"ask for CONFIG_{symbol}=y in a fragment, or choose another "
                             "compressor")


def unverifiable(config: Mapping[str, str]) -> Iterator[Fault]:
    """What keeps this kernel from verifying its root with dm-verity."""
    for symbol in VERITY:
        if config.get(symbol) != "y":
            yield Fault(what=f"the image has a hash tree, and CONFIG_{symbol} is "
                             f"{config.get(symbol, 'not set')}: its root cannot be verified",
                        where="kernel config",
                        cure=f"ask for CONFIG_{symbol}=y in a fragment, or say `image: {{verity: "
                             "false}` in the recipe")
