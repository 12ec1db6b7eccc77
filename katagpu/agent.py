"""Where `kata-agent` comes from: a file, a Kata release tarball, or an installed guest image.

The bytes decide which of these a path is, not its name. Nothing is mounted and nothing of the agent
is run: file systems are read by debugfs(8) and dump.erofs(1) through a `Tool`, archives here.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import lzma
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path, PurePosixPath
from typing import IO, Any, Protocol, cast

from katagpu import disk, newc
from katagpu.errors import KatagpuError, UserError
from katagpu.run import run

# The agent as a service; and where osbuilder moves it when it is PID 1 (AGENT_INIT=yes).
SERVICE = "usr/bin/kata-agent"
INITS = ("usr/sbin/init", "sbin/init")
NAME = b"kata-agent"

# VERSION_COMMIT of the agent's build, `<version>-<git commit>`. Rust's strings have no end marker
# and the one before may end in digits; Kata's major version has one.
VERSION = re.compile(rb"(\d\.\d+\.\d+(?:-(?:alpha|beta|rc)\.?\d+)?-[0-9a-f]{40}(?:-dirty)?)")

HINT = "`agent:` takes a kata-agent binary, a kata-static release tarball, or a Kata guest image"


class Tool(Protocol):
    """Runs debugfs or dump.erofs wherever it is installed.

    `source` must be readable and `scratch` writable under these same paths there. Returns stdout;
    raises `KatagpuError` when the program is missing or fails.
    """

    def __call__(self, argv: Sequence[str], *, source: Path, scratch: Path) -> bytes: ...


class Kind(StrEnum):
    """What a source turned out to be."""

    BINARY = "binary"
    TARBALL = "release tarball"
    IMAGE = "disk image"
    INITRD = "initrd"


@dataclass(frozen=True, kw_only=True)
class Agent:
    """An agent that was taken out: its file, where it was, and what it needs in the guest.

    `version` is `<version>-<commit>`, None where the binary does not say it; `needed` are its
    shared libraries, `interpreter` the dynamic loader (None for a static one).
    """

    path: Path
    origin: str
    version: str | None
    needed: tuple[str, ...]
    interpreter: str | None


def host_tool(argv: Sequence[str], *, source: Path, scratch: Path) -> bytes:
    """The `Tool` of a host that has the programs itself."""
    del source, scratch
    return run(argv, capture=True).stdout


def provide(source: Path, target: Path, *, scratch: Path, tool: Tool = host_tool) -> Agent:
    """Take the agent out of `source` and put it to `target`, executable.

    `scratch` is an empty directory that may be filled; the caller removes it. Raises `UserError`
    when `source` is none of the kinds, holds no agent, or holds one for another machine.
    """
    if not source.is_file():
        raise UserError(f"{source}: no such file", hint=HINT)
    part = target.with_name(target.name + ".part")
    try:
        inside = _take(source, part, scratch, tool)
        version, needed, interpreter = _inspect(part, inside or str(source))
        part.chmod(0o755)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    return Agent(path=target, origin=f"{source}: {inside}" if inside else str(source),
                 version=version, needed=needed, interpreter=interpreter)


def kind(source: Path) -> Kind:
    """What a file is, by its content. Raises `UserError` when it is nothing that has an agent."""
    with source.open("rb") as stream:
        start = stream.read(512)
    if start.startswith(b"\x7fELF"):
        return Kind.BINARY
    with _readable(source) as stream:
        inner = stream.read(512)
        if start and not inner:
            raise EOFError("nothing comes out of it")
    if inner.startswith(newc.MAGICS):
        return Kind.INITRD
    if inner[257:262] == b"ustar":
        return Kind.TARBALL
    if inner == start and (start[510:] == b"\x55\xaa" or disk.fs_type(source) is not None):
        return Kind.IMAGE
    raise UserError(f"{source}: neither an ELF file, an archive nor a disk image", hint=HINT)


def _take(source: Path, target: Path, scratch: Path, tool: Tool) -> str:
    """Put the agent to `target`; its path inside `source`, empty if it is `source`."""
    match kind(source):
        case Kind.BINARY:
            shutil.copyfile(source, target)
            return ""
        case Kind.TARBALL:
            return _from_tarball(source, target, scratch, tool)
        case Kind.IMAGE:
            return _from_image(source, target, scratch, tool)
        case Kind.INITRD:
            return _from_initrd(source, target)


def _no_agent(source: Path, looked: str) -> UserError:
    return UserError(f"{source}: no kata-agent inside ({looked})", hint=HINT)


def _decompressed(source: Path) -> IO[bytes]:
    """The file's content, decompressed if it is gzip, xz or zstd."""
    with source.open("rb") as stream:
        magic = stream.read(6)
    if magic.startswith(b"\x1f\x8b"):
        return cast(IO[bytes], gzip.open(source))
    if magic == b"\xfd7zXZ\0":
        return lzma.open(source)
    if magic.startswith(b"\x28\xb5\x2f\xfd"):
        import zstandard

        # Releases are made with `zstd --long`, whose window is larger than the default limit.
        unpack = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        return io.BufferedReader(unpack.stream_reader(
            source.open("rb"), read_across_frames=True, closefd=True), 1 << 20)
    return source.open("rb")


@contextlib.contextmanager
def _readable(source: Path) -> Iterator[IO[bytes]]:
    """The decompressed content; what is damaged in it becomes a `UserError`."""
    import zstandard

    try:
        with _decompressed(source) as stream:
            yield stream
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zstandard.ZstdError,
            tarfile.TarError) as failure:
        raise UserError(f"{source}: damaged or truncated ({failure})",
                        hint="take the file anew from where it came") from None


def _preference(name: str) -> int | None:
    """How good a tarball's member is as a source, 0 is best; None if it is none."""
    path = PurePosixPath(name)
    if path.name == NAME.decode():
        return 0
    if path.parent.name != "kata-containers":
        return None
    if path.name in ("kata-containers.img", "kata-containers-initrd.img"):
        return 1 + path.name.count("initrd")
    if path.suffix in (".img", ".image", ".initrd"):
        # Their agents are built with other features than the plain guest's.
        return 4 if "confidential" in path.name else 3
    return None


def _from_tarball(source: Path, target: Path, scratch: Path, tool: Tool) -> str:
    with _readable(source) as raw, tarfile.open(fileobj=raw, mode="r|") as tar:
        members = {_member(info.name): info for info in tar}
    ranked = sorted((rank, name) for name in members
                    if (rank := _preference(name)) is not None)
    problems = []
    for rank, name in ranked:
        final = _resolve(members, name)
        if final is None:
            continue
        unpacked = target if rank == 0 else scratch / "guest-image"
        _extract(source, final, unpacked)
        if rank == 0:
            return final
        try:
            return f"{final}: {_take(unpacked, target, scratch, tool)}"
        except UserError as problem:
            problems.append(f"{final}: {problem.what}")
    looked = "; ".join(problems) or "and no guest image"
    raise _no_agent(source, looked)


def _member(name: str) -> str:
    return name.removeprefix("./").rstrip("/")


def _resolve(members: dict[str, tarfile.TarInfo], name: str) -> str | None:
    """The regular file that a member is, or is a link to."""
    for _ in range(8):
        info = members.get(name)
        if info is None or info.isreg():
            return name if info is not None else None
        if not info.issym() and not info.islnk():
            return None
        base = PurePosixPath(name).parent if info.issym() else PurePosixPath()
        name = os.path.normpath(base / info.linkname).lstrip("/")
    return None


def _extract(source: Path, name: str, target: Path) -> None:
    with _readable(source) as raw, tarfile.open(fileobj=raw, mode="r|") as tar:
        for info in tar:
            if _member(info.name) == name and info.isreg():
                content = tar.extractfile(info)
                assert content is not None
                with target.open("wb") as out:
                    shutil.copyfileobj(content, out, 1 << 20)
                return


def _from_initrd(source: Path, target: Path) -> str:
    with _readable(source) as raw:
        try:
            for name, data in newc.read(raw, (SERVICE, *INITS)):
                if name == SERVICE or _is_agent(data):
                    target.write_bytes(data)
                    return name
        except UserError as problem:
            raise UserError(f"{source}: {problem.what}", hint=problem.hint) from None
    raise _no_agent(source, f"looked for {SERVICE} and {', '.join(INITS)}")


def _is_agent(data: bytes) -> bool:
    """Whether an init is the agent: that one knows its own name, systemd and NVRC are no agents."""
    return data.startswith(b"\x7fELF") and NAME in data and VERSION.search(data) is not None


Reader = Callable[[Path, int, str, Path, Tool], bytes | None]


def _from_image(source: Path, target: Path, scratch: Path, tool: Tool) -> str:
    source = source.resolve()
    offset = 0
    if disk.fs_type(source) is None:
        found = disk.partitions(source)
        if not found:
            raise UserError(f"{source}: its partition table is empty", hint=HINT)
        offset = found[0].offset
    filesystem = disk.fs_type(source, offset)
    readers: dict[disk.FsType | None, Reader] = {
        disk.FsType.EXT4: _read_ext4, disk.FsType.EROFS: _read_erofs}
    reader = readers.get(filesystem)
    if reader is None:
        raise UserError(f"{source}: its root file system is {filesystem or 'of an unknown type'}, "
                        "which cannot be read without mounting it",
                        hint="mount it, and give `agent:` the file usr/bin/kata-agent in it")
    for name in (SERVICE, *INITS):
        data = reader(source, offset, name, scratch, tool)
        if data and (name == SERVICE or _is_agent(data)):
            target.write_bytes(data)
            return name
    raise _no_agent(source, f"looked for {SERVICE} and {', '.join(INITS)} in its {filesystem}")


def _read_ext4(image: Path, offset: int, name: str, scratch: Path, tool: Tool) -> bytes | None:
    """One file by debugfs, which ends with status 0 also when there is no such file."""
    out = scratch / "dumped"
    out.unlink(missing_ok=True)
    for path in (image, out):
        if any(letter in str(path) for letter in '"?\n'):
            raise UserError(f"debugfs cannot take the path {str(path)!r}",
                            hint="use a path without quotes and question marks")
    tool(["debugfs", "-R", f'dump /{name} "{out}"', f"{image}?offset={offset}"],
         source=image, scratch=scratch)
    return out.read_bytes() if out.is_file() else None


def _read_erofs(image: Path, offset: int, name: str, scratch: Path, tool: Tool) -> bytes | None:
    """One file by dump.erofs (1.8 or newer); a missing one and a damaged image fail alike."""
    argv = ["dump.erofs", f"--offset={offset}", f"--path=/{name}", "--cat", str(image)]
    try:
        return tool(argv, source=image, scratch=scratch)
    except KatagpuError as failure:
        if isinstance(failure, UserError) or not _erofs_is_sound(image, offset, scratch, tool):
            raise
        return None


def _erofs_is_sound(image: Path, offset: int, scratch: Path, tool: Tool) -> bool:
    """Whether dump.erofs works here at all: an old one, or a damaged image, has no root."""
    argv = ["dump.erofs", f"--offset={offset}", "--path=/", "--ls", str(image)]
    try:
        tool(argv, source=image, scratch=scratch)
    except KatagpuError:
        return False
    return True


def version(path: Path) -> str | None:
    """The version in an agent that was taken out, None where the binary does not say it."""
    found = VERSION.search(path.read_bytes())
    return found.group(1).decode() if found else None


def _inspect(path: Path, what: str) -> tuple[str | None, tuple[str, ...], str | None]:
    """Version, NEEDED and interpreter of an agent. Raises `UserError` if it cannot run here."""
    from elftools.common.exceptions import ELFError
    from elftools.elf.dynamic import DynamicSegment
    from elftools.elf.elffile import ELFFile
    from elftools.elf.segments import InterpSegment

    data = path.read_bytes()
    try:
        elf = ELFFile(io.BytesIO(data))
        if elf["e_machine"] != "EM_X86_64" or elf["e_type"] not in ("ET_EXEC", "ET_DYN"):
            raise UserError(f"{what}: not a program for x86-64 "
                            f"({elf['e_machine']}, {elf['e_type']})",
                            hint="take the amd64 release of Kata Containers")
        segments = list(elf.iter_segments())
        tags: list[Any] = [tag for segment in segments if isinstance(segment, DynamicSegment)
                           for tag in segment.iter_tags("DT_NEEDED")]
        needed = tuple(str(tag.needed) for tag in tags)
        loaders = [str(segment.get_interp_name()) for segment in segments
                   if isinstance(segment, InterpSegment)]
    except ELFError as failure:
        raise UserError(f"{what}: not a whole ELF file ({failure})", hint=HINT) from None
    return version(path), needed, loaders[0] if loaders else None
