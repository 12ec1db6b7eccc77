"""Where the dynamic linker looks for a library inside a guest root, by the rules of ld.so(8)."""

from __future__ import annotations

import fnmatch
import struct
from collections.abc import Iterator, Mapping
from functools import cached_property

from katagpu.check.elf import MACHINE, MAGIC, Binary, Damaged, read_binary, text
from katagpu.check.root import Root

# Built into glibc: slibdir and libdir, which Debian and Ubuntu set to the multiarch directories.
DEFAULT_DIRECTORIES = ("/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu",
                       "/lib64", "/usr/lib64", "/lib", "/usr/lib")
CACHE = "/etc/ld.so.cache"
CACHE_MAGIC = b"glibc-ld.so.cache1.1"
# dl-cache.h: FLAG_ELF_LIBC6 is 3, the architecture is in the second byte.
FLAG_X86_64 = 0x0303


class Linker:
    """Finds libraries as the guest's ld.so would.

    `extension` is where a disk with the driver is mounted: its programs are started with its
    library directory in LD_LIBRARY_PATH, and nothing else is.
    """

    def __init__(self, root: Root, extension: str | None = None) -> None:
        self.root = root
        self.extension = extension
        self.damaged: dict[str, str] = {}
        self._shared: dict[str, Binary | None] = {}

    @cached_property
    def binaries(self) -> Mapping[str, Binary]:
        """Every program and shared library of the root, by its real path."""
        found: dict[str, Binary] = {}
        for path in self.root.files:
            # Firmware is for other processors, and modules are read by `kmod`.
            if "/lib/firmware/" in path or ".ko" in path[-7:]:
                continue
            try:
                with self.root.host(path).open("rb") as stream:
                    if stream.read(4) != MAGIC:
                        continue
                    stream.seek(0)
                    binary = read_binary(stream, path)
            except (Damaged, OSError) as broken:
                self.damaged[path] = str(broken)
                continue
            if binary is not None:
                found[path] = binary
        return found

    @cached_property
    def cache(self) -> Mapping[str, str]:
        """ld.so.cache: library name to guest path (x86-64 entries; the first one counts)."""
        data = self.root.read(CACHE) or b""
        start = data.find(CACHE_MAGIC)
        if start < 0 or len(data) < start + 48:
            return {}
        count = struct.unpack_from("<I", data, start + len(CACHE_MAGIC))[0]
        entries: dict[str, str] = {}
        for index in range(count):
            offset = start + 48 + 24 * index
            if offset + 24 > len(data):
                break
            flags, key, value, _, hwcaps = struct.unpack_from("<iIIIQ", data, offset)
            if flags == FLAG_X86_64 and hwcaps == 0:
                entries.setdefault(text(data, start + key), text(data, start + value))
        return entries

    @cached_property
    def configured(self) -> tuple[str, ...]:
        """The directories of /etc/ld.so.conf, from which ldconfig makes the cache."""
        return tuple(dict.fromkeys(self._configuration("/etc/ld.so.conf", depth=0)))

    def _configuration(self, path: str, depth: int) -> Iterator[str]:
        for line in self.root.text(path).splitlines():
            words = line.partition("#")[0].split()
            if not words or depth > 8:
                continue
            if words[0] == "include":
                for pattern in words[1:]:
                    directory, _, names = pattern.rpartition("/")
                    directory = directory if pattern.startswith("/") else f"/etc/{directory}"
                    for name in fnmatch.filter(self.root.names(directory), names):
                        yield from self._configuration(f"{directory}/{name}", depth + 1)
            elif words[0].startswith("/"):
                yield words[0].rstrip("/")

    def library(self, path: str) -> Binary | None:
        """The library at a guest path, behind links; None where none of ours is there."""
        real = self.root.resolve(path)
        binary = None if real is None else self.binaries.get(real)
        return binary if binary is not None and binary.machine == MACHINE else None

    def find(self, name: str, chain: tuple[Binary, ...] = ()) -> Binary | None:
        """The library that ld.so loads for `name`.

        `chain` is who asks, first the file that needs it, then its loaders up to the program.
        """
        if "/" in name:
            return self.library(name)
        for directory in (*self._inherited(chain), *self.library_path(chain), *_own(chain)):
            found = self.library(f"{directory}/{name}")
            if found is not None:
                return found
        if name not in self._shared:
            places = [f"{directory}/{name}" for directory in DEFAULT_DIRECTORIES]
            if name in self.cache:
                places.insert(0, self.cache[name])
            self._shared[name] = next(filter(None, map(self.library, places)), None)
        return self._shared[name]

    @staticmethod
    def _inherited(chain: tuple[Binary, ...]) -> Iterator[str]:
        # A file with RUNPATH ignores every RPATH; RUNPATH is not inherited, RPATH is.
        holders = chain if chain and not chain[0].runpath else ()
        for holder in holders:
            if not holder.runpath:
                yield from (_origin(entry, holder) for entry in holder.rpath)

    def library_path(self, chain: tuple[Binary, ...] = ()) -> tuple[str, ...]:
        """LD_LIBRARY_PATH of the program at the chain's end; without one, of the extension's."""
        if self.extension is None or (
                chain and not chain[-1].path.startswith(f"{self.extension}/")):
            return ()
        return (f"{self.extension}/usr/lib/x86_64-linux-gnu",)

    def uncached(self, name: str) -> str | None:
        """A configured directory that has the library although the cache does not list it."""
        return next((directory for directory in self.configured
                     if self.library(f"{directory}/{name}") is not None), None)


def _own(chain: tuple[Binary, ...]) -> tuple[str, ...]:
    return tuple(_origin(entry, chain[0]) for entry in chain[0].runpath) if chain else ()


def _origin(entry: str, binary: Binary) -> str:
    directory = binary.path.rpartition("/")[0]
    entry = entry.replace("${ORIGIN}", "$ORIGIN").replace("$ORIGIN", directory)
    return entry.replace("${LIB}", "$LIB").replace("$LIB", "lib/x86_64-linux-gnu").rstrip("/")
