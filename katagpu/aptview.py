"""What a second apt repository may add to a guest: named packages at one version, and nothing else.

A repository beside the distribution's could bring a newer libc6 than the base has. Pins by origin
do not keep it away: apt knows origins by host or by fields of the Release file, and a company's
mirror has both repositories on one host. So apt never sees the repository itself here, but a view
of it: the paragraphs of its verified index whose packages the recipe takes from there.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from urllib.parse import quote

import msgspec

from katagpu.errors import UserError
from katagpu.store import writing

AROUND = 3
"""How many versions below and above a missing one are named."""


class Pin(msgspec.Struct, frozen=True, kw_only=True):
    """Packages that come from one repository, all at one version.

    `packages` are shell patterns; `leader` is the one whose versions there are to choose from, and
    `version` a pattern for it, None for the newest.
    """

    leader: str
    packages: tuple[str, ...]
    version: str | None = None

    def has(self, package: str) -> bool:
        """Is this package pinned here?"""
        return any(fnmatchcase(package, pattern) for pattern in self.packages)


@dataclass(frozen=True, kw_only=True)
class View:
    """A repository as apt sees it: an index at `place`, of packages whose files are below `uri`.

    `versions` are those of each package, oldest first.
    """

    place: Path
    uri: str
    versions: dict[str, tuple[str, ...]]

    @property
    def source(self) -> str:
        """The address that apt is given."""
        return f"file:{quote(str(self.place))}"

    def url(self, said: str) -> str:
        """Where a package is that apt found in the view; other addresses as they are."""
        if not said.startswith(f"{self.source}/"):
            return said
        return f"{self.uri.rstrip('/')}/{said.removeprefix(f'{self.source}/').removeprefix('./')}"

    def choose(self, pin: Pin) -> str:
        """The version of a pin. Raises `UserError` with the nearest where there is none."""
        known = self.versions.get(pin.leader)
        if known is None:
            near = get_close_matches(pin.leader, self.versions, n=1)
            raise UserError(f"{self.uri} has no package {pin.leader}", hint=(
                f"it has {near[0]}" if near else
                "is it the repository of the guest's distribution and architecture?"))
        fitting = [version for version in known if fnmatchcase(version, pin.version or "*")]
        if not fitting:
            wanted = (pin.version or "").removesuffix("*").removesuffix("-")
            raise UserError(f"{self.uri} has no {pin.leader} {wanted}",
                            hint=f"nearest: {', '.join(nearest(wanted, known))}")
        return fitting[-1]

    def preferences(self, pins: Iterable[Pin]) -> str:
        """The text of apt_preferences(5) that leaves one version of each pinned package."""
        return "".join(
            f"Package: {' '.join(pin.packages)}\nPin: version {version}\n"
            f"Pin-Priority: {priority}\n\n"
            for pin in pins for version, priority in ((self.choose(pin), 1001), ("*", -1)))


def nearest(wanted: str, known: Sequence[str]) -> list[str]:
    """The versions around a missing one; `known` is in ascending order."""
    from debian.debian_support import Version

    at = bisect_left([Version(version) for version in known], Version(wanted))
    return list(known[max(0, at - AROUND):at + AROUND])


def lay(indexes: Iterable[str], pins: Iterable[Pin], uri: str, place: Path) -> View:
    """Write the view of a repository whose verified indexes (texts of `Packages`) are these."""
    from debian.debian_support import Version

    pins = tuple(pins)
    found: dict[str, set[str]] = {}
    kept = []
    for paragraph in (part for index in indexes for part in re.split(r"\n\s*\n", index)):
        package = _field("Package", paragraph)
        version = _field("Version", paragraph)
        if package is None or version is None or not any(pin.has(package) for pin in pins):
            continue
        if _field("SHA256", paragraph) is None:
            raise UserError(f"the index of {uri} has no SHA256 of {package} {version}",
                            hint="ask who runs the repository to make its index with SHA256")
        found.setdefault(package, set()).add(version)
        kept.append(paragraph.strip("\n"))
    with writing(place):
        place.mkdir(parents=True, exist_ok=True)
        (place / "Packages").write_text("\n\n".join(kept) + "\n")
    return View(place=place, uri=uri, versions={
        package: tuple(sorted(versions, key=Version)) for package, versions in found.items()})


def _field(name: str, paragraph: str) -> str | None:
    match = re.search(rf"^{name}:[ \t]*(\S+)", paragraph, re.MULTILINE)
    return match[1] if match else None
