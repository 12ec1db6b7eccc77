"""What the checks read from ELF files: dynamic section, symbol versions, notes, sections.

pyelftools reads the headers; tables are unpacked in bulk, since it makes an object per entry and
the symbol table of nvidia.ko alone would take seconds. Layouts: elf(5), the gABI, and for symbol
versions the LSB core specification, section 10.7.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile

MAGIC = b"\x7fELF"
MACHINE = "EM_X86_64"
PT_LOAD, PT_DYNAMIC, PT_INTERP = 1, 2, 3
DT_NEEDED, DT_STRTAB, DT_STRSZ, DT_SONAME, DT_RPATH, DT_RUNPATH = 1, 5, 10, 14, 15, 29
DT_VERDEF, DT_VERDEFNUM = 0x6FFFFFFC, 0x6FFFFFFD
DT_VERNEED, DT_VERNEEDNUM = 0x6FFFFFFE, 0x6FFFFFFF
VER_FLG_WEAK = 2
MAX_TABLE = 1 << 24
PROGRAM_HEADER = struct.Struct("<IIQQQQQQ")


@dataclass(frozen=True, kw_only=True)
class Binary:
    """A program or shared library. Only x86-64 files have anything but `path` and `machine`.

    `versions` maps a needed library to the symbol versions that must be defined there, `defines`
    are the versions that this file defines.
    """

    path: str
    machine: str
    executable: bool = False
    interpreter: str | None = None
    soname: str | None = None
    needed: tuple[str, ...] = ()
    rpath: tuple[str, ...] = ()
    runpath: tuple[str, ...] = ()
    versions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    defines: frozenset[str] = frozenset()


class Damaged(Exception):
    """An ELF file whose headers or tables point outside of it."""


def read_binary(stream: IO[bytes], path: str) -> Binary | None:
    """The dynamic part of a program or library; None for objects, cores and kernel modules.

    Raises `Damaged` for a file that begins as ELF and cannot be read.
    """
    try:
        elf = ELFFile(stream)
        if elf["e_type"] not in ("ET_EXEC", "ET_DYN"):
            return None
        machine = str(elf["e_machine"])
        if elf.elfclass != 64 or machine != MACHINE:
            return Binary(path=path, machine=machine)
        stream.seek(elf["e_phoff"])
        length = elf["e_phnum"] * PROGRAM_HEADER.size
        headers = stream.read(length)
        if len(headers) != length:
            raise ValueError("it ends within its program headers")
        return _read_dynamic(_Image(stream, list(PROGRAM_HEADER.iter_unpack(headers))), path)
    except (ELFError, struct.error, ValueError, OverflowError, OSError) as broken:
        raise Damaged(str(broken)) from broken


class _Image:
    """The file as its program headers map it."""

    def __init__(self, stream: IO[bytes], headers: list[tuple[int, ...]]) -> None:
        self.stream = stream
        self.loads = [(vaddr, offset, filesz)
                      for kind, _, offset, vaddr, _, filesz, _, _ in headers if kind == PT_LOAD]
        size = stream.seek(0, io.SEEK_END)
        if any(offset + filesz > size for _, offset, filesz in self.loads):
            raise ValueError(f"its segments reach beyond its end ({size} bytes)")
        self.segments = {kind: (offset, filesz)
                         for kind, _, offset, _, _, filesz, _, _ in headers if kind != PT_LOAD}

    def bytes_of(self, kind: int) -> bytes | None:
        """A segment's bytes, or None where the file has no such segment."""
        if kind not in self.segments:
            return None
        offset, length = self.segments[kind]
        return self._read(offset, length)

    def at(self, address: int, length: int) -> bytes:
        """`length` bytes (fewer at a segment's end) from a virtual address."""
        for vaddr, offset, filesz in self.loads:
            if vaddr <= address < vaddr + filesz:
                return self._read(offset + address - vaddr, min(length, vaddr + filesz - address))
        raise ValueError(f"address {address:#x} is in no segment of the file")

    def _read(self, offset: int, length: int) -> bytes:
        if length > MAX_TABLE:
            raise ValueError(f"a table of {length} bytes")
        self.stream.seek(offset)
        return self.stream.read(length)


def _read_dynamic(image: _Image, path: str) -> Binary:
    interpreter = image.bytes_of(PT_INTERP)
    dynamic = image.bytes_of(PT_DYNAMIC) or b""
    entries = list(struct.iter_unpack("<qQ", dynamic[:len(dynamic) // 16 * 16]))
    tags = {tag: value for tag, value in reversed(entries) if tag}
    strings = image.at(tags[DT_STRTAB], tags.get(DT_STRSZ, 0)) if DT_STRTAB in tags else b""

    def paths(tag: int) -> tuple[str, ...]:
        return tuple(part for part in text(strings, tags[tag]).split(":") if part) \
            if tag in tags else ()

    return Binary(
        path=path, machine=MACHINE, executable=interpreter is not None,
        interpreter=None if interpreter is None else text(interpreter, 0),
        soname=text(strings, tags[DT_SONAME]) if DT_SONAME in tags else None,
        needed=tuple(text(strings, value) for tag, value in entries if tag == DT_NEEDED),
        rpath=paths(DT_RPATH), runpath=paths(DT_RUNPATH),
        versions=dict(_versions_needed(image, tags, strings)),
        defines=frozenset(_versions_defined(image, tags, strings)))


def text(table: bytes, offset: int) -> str:
    """The NUL-terminated string at an offset."""
    return table[offset:table.find(b"\0", offset)].decode(errors="replace")


def _versions_needed(
    image: _Image, tags: Mapping[int, int], strings: bytes,
) -> Iterator[tuple[str, tuple[str, ...]]]:
    address = tags.get(DT_VERNEED, 0)
    for _ in range(tags.get(DT_VERNEEDNUM, 0)):
        _, count, file, aux, following = struct.unpack("<HHIII", image.at(address, 16))
        names: list[str] = []
        entry = address + aux
        for _ in range(count):
            _, flags, _, name, step = struct.unpack("<IHHII", image.at(entry, 16))
            if not flags & VER_FLG_WEAK:
                names.append(text(strings, name))
            if not step:
                break
            entry += step
        yield text(strings, file), tuple(names)
        if not following:
            break
        address += following


def _versions_defined(image: _Image, tags: Mapping[int, int], strings: bytes) -> Iterator[str]:
    address = tags.get(DT_VERDEF, 0)
    for _ in range(tags.get(DT_VERDEFNUM, 0)):
        _, _, _, _, _, aux, following = struct.unpack("<HHHHIII", image.at(address, 20))
        name, _ = struct.unpack("<II", image.at(address + aux, 8))
        yield text(strings, name)
        if not following:
            break
        address += following


def read_build_id(path: Path) -> str | None:
    """The GNU build id of an ELF file (vmlinux, a module) as hex digits, or None.

    Raises `Damaged` where it is not a readable ELF file.
    """
    try:
        with path.open("rb") as stream:
            # vmlinux has it in .notes together with others, a module in .note.gnu.build-id.
            for section in ELFFile(stream).iter_sections(type="SHT_NOTE"):
                found = _build_id(section.data())
                if found is not None:
                    return found
    except (ELFError, struct.error, OSError) as broken:
        raise Damaged(f"{path}: {broken}") from broken
    return None


def _build_id(notes: bytes) -> str | None:
    offset = 0
    while offset + 12 <= len(notes):
        name_size, size, kind = struct.unpack_from("<III", notes, offset)
        name = notes[offset + 12:offset + 12 + name_size]
        start = offset + 12 + (name_size + 3) // 4 * 4
        if kind == 3 and name == b"GNU\0":
            return notes[start:start + size].hex()
        offset = start + (size + 3) // 4 * 4
    return None
