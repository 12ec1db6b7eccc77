"""What a release is: a directory of files under versioned names, and `release.json` about them.

`SHA256SUMS` has the digest of every other file, and its signature is that of the release. Names and
digests are checked when they are read: a release may come from anywhere.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from katagpu.errors import UserError

RELEASE = "release.json"
SUMS = "SHA256SUMS"
SIGNATURE = "SHA256SUMS.sig"
NOTES = "RELEASE-NOTES.md"
INSTALLER = "katagpu-install.pyz"
HOST = "katagpu-host.pyz"
MANIFEST = "manifest.json"
SCHEMA = 1
LARGEST = 4 << 20  # bytes of a file that is read as a whole
LARGEST_FILE = 1 << 40  # bytes of any file of a release
VERSION = re.compile(r"\d+\.\d+\.\d+(-[0-9A-Za-z]+(\.[0-9A-Za-z]+)*)?")
TYPE = "application/vnd.katagpu"
# The first that fits a file's own name, the one that it has below out/.
MEDIA_TYPES = (
    (r"vmlinuz-.*", f"{TYPE}.kernel.bzimage"),
    (r"vmlinux-.*", f"{TYPE}.kernel.elf"),
    (r"System\.map-.*", f"{TYPE}.kernel.symbols"),
    (r"config-.*", f"{TYPE}.kernel.config"),
    (r"linux-headers-.*\.deb", "application/vnd.debian.binary-package"),
    (r"linux-headers-.*\.rpm", "application/x-rpm"),
    (r".*-extension-.*\.image", f"{TYPE}.extension.disk"),
    (r".*\.image", f"{TYPE}.image.disk"),
    (r".*\.initrd", f"{TYPE}.initrd.cpio"),
    (r"50-.*\.toml", f"{TYPE}.kata-config.v1+toml"),
    (r"manifest\.json", f"{TYPE}.manifest.v1+json"),
    (r"release\.json", f"{TYPE}.release.v1+json"),
    (r"SHA256SUMS", f"{TYPE}.checksums.v1"),
    (r"SHA256SUMS\.sig", f"{TYPE}.signature.v1"),
    (r".*\.intoto\.jsonl", "application/vnd.dsse.envelope.v1+json"),
    (r"provenance.*\.json", "application/vnd.in-toto+json"),
    (r".*spdx.*\.json", "application/spdx+json"),
    (r".*(cdx|cyclonedx).*\.json", "application/vnd.cyclonedx+json"),
    (r".*\.mtree", f"{TYPE}.files.mtree"),
    (r"katagpu-host\.pyz", f"{TYPE}.host.pyz"),
    (r".*\.pyz", f"{TYPE}.installer.pyz"),
    (r".*\.md", "text/markdown"),
    (r".*\.json", "application/json"),
    (r".*\.xml", "application/xml"),
    (r".*\.txt", "text/plain"),
)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+~-]{0,200}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def media_type(name: str) -> str:
    """The media type of a file by the name that it has below out/."""
    return next((kind for pattern, kind in MEDIA_TYPES if re.fullmatch(pattern, name)),
                "application/octet-stream")


def plain_name(name: object) -> str:
    """A file name that stays in its directory. Raises `UserError` for any other."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UserError(f"{name!r} cannot be the name of a file of a release")
    return name


def sha256(value: object) -> str:
    """A SHA-256 in hexadecimal digits. Raises `UserError` for what is none."""
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise UserError(f"{value!r} is no SHA-256")
    return value


def version(text: str) -> str:
    """A release's version. Raises `UserError` for what is none."""
    if not VERSION.fullmatch(text):
        raise UserError(f"{text!r} is no version of a release", hint="version=X.Y.Z, for example "
                        "1.2.0, or 1.2.0-rc.1")
    return text


def order(text: str) -> tuple[Any, ...]:
    """A key that sorts versions as semver.org does."""
    core, _, early = text.partition("-")
    parts = [(0, int(part), "") if part.isdigit() else (1, 0, part)
             for part in early.split(".") if part]
    return (tuple(int(part) for part in core.split(".")), not early, parts)


@dataclass(frozen=True)
class File:
    """A file of a guest. `name` is its name in the release, `source` that below out/.

    `link` is Kata's name for it. `part` is its name among the manifest's parts.
    """

    name: str
    source: str
    sha256: str
    size: int
    media_type: str
    link: str | None = None
    part: str | None = None


@dataclass(frozen=True)
class Release:
    """What `release.json` says. `licensed`: it has parts of NVIDIA's vGPU software in it."""

    recipe: str
    version: str
    files: tuple[File, ...]
    previous: str | None = None
    licensed: bool = False

    @property
    def id(self) -> str:
        """The name of its directory."""
        return f"{self.recipe}-{self.version}"

    def file(self, source: str) -> File | None:
        """The file that has this name below out/."""
        return next((file for file in self.files if file.source == source), None)


def render(release: Release) -> bytes:
    """The text of `release.json`."""
    return (json.dumps({"schema": SCHEMA, **asdict(release)}, indent=1) + "\n").encode()


def parse(data: bytes, where: str) -> Release:
    """What a `release.json` says; `where` it is from. Raises `UserError`."""
    try:
        found = json.loads(data)
        if found["schema"] != SCHEMA:
            raise UserError(f"{where} is a release of schema {found['schema']}, and here is "
                            f"{SCHEMA}", hint="take the katagpu-install.pyz of that release")
        files = tuple(_file(entry) for entry in found["files"])
        previous = found["previous"]
        return Release(recipe=plain_name(found["recipe"]), version=version(found["version"]),
                       files=files, licensed=bool(found["licensed"]),
                       previous=None if previous is None else version(previous))
    except (ValueError, KeyError, TypeError) as bad:
        raise UserError(f"{where}: its {RELEASE} is damaged ({bad!r})") from None


def _file(entry: Any) -> File:
    link, size = entry["link"], entry["size"]
    if type(size) is not int or not 0 <= size < LARGEST_FILE:
        raise ValueError(f"size {size!r}")
    return File(name=plain_name(entry["name"]), source=plain_name(entry["source"]),
                sha256=sha256(entry["sha256"]), size=size, media_type=str(entry["media_type"]),
                link=None if link is None else plain_name(link),
                part=None if entry["part"] is None else str(entry["part"]))


def render_sums(digests: Mapping[str, str]) -> bytes:
    """The text of `SHA256SUMS`, as sha256sum(1) writes and reads it."""
    return "".join(f"{digests[name]}  {name}\n" for name in sorted(digests)).encode()


def parse_sums(data: bytes, where: str) -> dict[str, str]:
    """Digests by name. Raises `UserError`."""
    found = {}
    for line in data.decode("utf-8", "replace").splitlines():
        digest, gap, name = line.partition("  ")
        if not gap:
            raise UserError(f"{where}: a line of {SUMS} is damaged: {line[:80]!r}")
        found[plain_name(name)] = sha256(digest)
    return found


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    found = hashlib.sha256()
    with path.open("rb") as stream:
        while True:
            block = stream.read(1 << 20)
            if not block:
                return found.hexdigest()
            found.update(block)
