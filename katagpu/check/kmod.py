"""What the checks read from kernel modules, Module.symvers and kmod's indexes.

Layouts: struct modversion_info and the extended sections from include/linux/module.h and
kernel/module/version.c, the binary indexes from kmod's libkmod/libkmod-index.c.
"""

from __future__ import annotations

import gzip
import io
import lzma
import struct
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import zstandard
from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import Section

from katagpu.check.elf import MACHINE, Damaged, text

SUFFIXES = (".ko", ".ko.gz", ".ko.xz", ".ko.zst")
SIGNATURE = b"~Module signature appended~\n"
SYMBOL = struct.Struct("<IBBHQQ")
VERSION = struct.Struct("<Q56s")
GLOBAL = 1
UNDEFINED, ABSOLUTE = 0, 0xFFF1
# What kernel/module/main.c lets pass although nothing exports it.
NEVER_EXPORTED = "_GLOBAL_OFFSET_TABLE_"
INDEX_MAGIC, INDEX_VERSION = 0xB007F457, 0x00020001
INDEX_PREFIX, INDEX_VALUES, INDEX_CHILDREN, INDEX_OFFSET = 1 << 31, 1 << 30, 1 << 29, (1 << 28) - 1


@dataclass(frozen=True, kw_only=True)
class Export:
    """A symbol that modules may use. `crc` is None where the file does not tell it."""

    crc: int | None
    owner: str
    gpl_only: bool


@dataclass(frozen=True, kw_only=True)
class Module:
    """A kernel module. `versions` is None for one without symbol versions."""

    path: str
    name: str
    info: Mapping[str, tuple[str, ...]]
    versions: Mapping[str, int] | None
    undefined: frozenset[str]
    exports: Mapping[str, Export]
    signed: bool

    def fact(self, key: str) -> str:
        """The first modinfo value of a key, or the empty string."""
        return next(iter(self.info.get(key, ())), "")

    @property
    def depends(self) -> frozenset[str]:
        """The modules that must be loaded first."""
        return frozenset(canonical(name) for name in self.fact("depends").split(",") if name)


def canonical(name: str) -> str:
    """A module's name as the kernel has it: with underscores, without suffix."""
    return name.rpartition("/")[2].partition(".ko")[0].replace("-", "_")


def read_module(host: Path, path: str) -> Module:
    """Read a module, compressed or not. Raises `Damaged` where it is no module for x86-64."""
    try:
        with opened(host) as stream:
            elf = ELFFile(stream)
            if elf["e_type"] != "ET_REL" or elf["e_machine"] != MACHINE or elf.elfclass != 64:
                raise Damaged(f"it is {elf['e_type']} for {elf['e_machine']}, not a relocatable "
                              "object for 64-bit x86")
            return _module(elf, stream, path)
    except (ELFError, struct.error, ValueError, EOFError, OSError, lzma.LZMAError,
            zstandard.ZstdError) as broken:
        raise Damaged(str(broken) or type(broken).__name__) from broken


def opened(host: Path) -> IO[bytes]:
    """A module's file, as it is before it is compressed."""
    if host.suffix == ".xz":
        return io.BytesIO(lzma.decompress(host.read_bytes()))
    if host.suffix == ".gz":
        return io.BytesIO(gzip.decompress(host.read_bytes()))
    if host.suffix == ".zst":
        with zstandard.ZstdDecompressor().stream_reader(host.read_bytes()) as reader:
            return io.BytesIO(reader.read())
    return host.open("rb")


def _module(elf: ELFFile, stream: IO[bytes], path: str) -> Module:
    sections = list(elf.iter_sections())
    data = {name: section.data() for section in sections
            if (name := section.name) in (".modinfo", "__versions", "__version_ext_crcs",
                                          "__version_ext_names", ".strtab", ".symtab")}
    if ".modinfo" not in data:
        raise Damaged("it has no .modinfo section, so it is not a kernel module")
    info: defaultdict[str, list[str]] = defaultdict(list)
    for entry in data[".modinfo"].split(b"\0"):
        key, sign, value = entry.decode(errors="replace").partition("=")
        if sign:
            info[key].append(value)
    undefined, exports = _symbols(data, sections, path)
    stream.seek(0, io.SEEK_END)
    stream.seek(-min(len(SIGNATURE), stream.tell()), io.SEEK_END)
    return Module(path=path, name=canonical(path), undefined=undefined, exports=exports,
                  info={key: tuple(values) for key, values in info.items()},
                  versions=_versions(data), signed=stream.read() == SIGNATURE)


def _versions(data: Mapping[str, bytes]) -> Mapping[str, int] | None:
    """Symbol versions in the classic and the extended form; a module may have both."""
    if "__versions" not in data and "__version_ext_crcs" not in data:
        return None
    found: dict[str, int] = {}
    for crc, name in VERSION.iter_unpack(data.get("__versions", b"")):
        found[name.partition(b"\0")[0].decode(errors="replace")] = crc & 0xFFFFFFFF
    crcs = data.get("__version_ext_crcs", b"")
    names = data.get("__version_ext_names", b"").split(b"\0")
    for (crc,), name in zip(struct.iter_unpack("<I", crcs), names, strict=False):
        found[name.decode(errors="replace")] = crc
    return found


def _symbols(
    data: Mapping[str, bytes], sections: list[Section], path: str,
) -> tuple[frozenset[str], Mapping[str, Export]]:
    strings = data.get(".strtab", b"")
    undefined: set[str] = set()
    gpl_only: dict[str, bool] = {}
    crcs: dict[str, int] = {}
    for name, kind, _, section, value, _ in SYMBOL.iter_unpack(data.get(".symtab", b"")):
        if section == UNDEFINED:
            if name and kind >> 4 == GLOBAL:
                undefined.add(text(strings, name))
        elif strings.startswith(b"__ksymtab_", name) and section < len(sections):
            gpl_only[text(strings, name)[10:]] = sections[section].name.startswith("__ksymtab_gpl")
        elif strings.startswith(b"__crc_", name):
            # Up to Linux 5.18 the CRC is the symbol's value; later it lies in __kcrctab.
            crcs[text(strings, name)[6:]] = value if section == ABSOLUTE else struct.unpack_from(
                "<I", sections[section].data(), value)[0]
    exports = {name: Export(crc=crcs.get(name), owner=canonical(path), gpl_only=gpl)
               for name, gpl in gpl_only.items()}
    return frozenset(undefined - {NEVER_EXPORTED}), exports


def read_symvers(path: Path) -> Mapping[str, Export]:
    """Module.symvers: what vmlinux and the kernel's own modules export."""
    exports: dict[str, Export] = {}
    for line in path.read_text().splitlines():
        crc, name, owner, kind, *_ = [*line.split("\t"), "", "", "", ""]
        owner = owner if owner == "vmlinux" else canonical(owner)
        exports[name] = Export(crc=int(crc, 16), owner=owner, gpl_only=kind.endswith("_GPL"))
    return exports


def index_keys(data: bytes) -> frozenset[str]:
    """Every key of a binary index (modules.dep.bin and the like). Raises `Damaged`."""
    try:
        magic, version, root = struct.unpack_from(">III", data)
        if (magic, version) != (INDEX_MAGIC, INDEX_VERSION):
            raise Damaged("it is not an index of kmod")
        return frozenset(_index_node(data, root, b""))
    except (struct.error, RecursionError) as broken:
        raise Damaged(f"the index is cut short or damaged: {broken}") from broken


def _index_node(data: bytes, node: int, prefix: bytes) -> Iterator[str]:
    offset = node & INDEX_OFFSET
    if node & INDEX_PREFIX:
        end = data.find(b"\0", offset)
        if end < 0:
            raise Damaged("the index is cut short")
        prefix += data[offset:end]
        offset = end + 1
    children: list[tuple[int, int]] = []
    if node & INDEX_CHILDREN:
        first, last = struct.unpack_from(">BB", data, offset)
        offset += 2
        for character in range(first, last + 1):
            children.append((character, struct.unpack_from(">I", data, offset)[0]))
            offset += 4
    if node & INDEX_VALUES:
        count = struct.unpack_from(">I", data, offset)[0]
        offset += 4
        for _ in range(count):
            # A priority of four bytes, then the value; only its end matters here.
            offset = data.find(b"\0", offset + 4) + 1
            if not offset:
                raise Damaged("the index is cut short")
        yield prefix.decode(errors="replace")
    for character, child in children:
        if child:
            yield from _index_node(data, child, prefix + bytes((character,)))
