"""What is laid into the guest: `rootfs/` and `hooks/` of the repository, rendered for one recipe.

`rootfs/` mirrors the guest's `/`; `rootfs/layout.yaml` holds what a tree of plain files cannot say:
mode bits, links, removals, and on which recipes an entry depends.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from katagpu.errors import StepError, UserError

if TYPE_CHECKING:
    from jinja2 import Environment

REPOSITORY = Path(__file__).resolve().parent.parent
LAYOUT = "rootfs/layout.yaml"
# Directory of the repository → the guest's directory that it mirrors.
TREES: Mapping[str, str] = {"rootfs": "/", "hooks": "/usr/share/oci/hooks"}
TEMPLATE = ".j2"
UNITS = "/etc/systemd/system"
GENERATORS = "/etc/systemd/system-generators"
MAX_LINKS = 40  # as the kernel's limit on nested symbolic links

_FIELDS: Mapping[str, frozenset[str]] = {
    "modes": frozenset({"path", "mode", "reason"}),
    "only": frozenset({"path", "when", "reason"}),
    "directories": frozenset({"path", "mode", "when", "reason"}),
    "empty": frozenset({"path", "mode", "when", "reason"}),
    "symlinks": frozenset({"path", "target", "when", "reason"}),
    "remove": frozenset({"path", "when", "reason"}),
    "masks": frozenset({"unit", "when", "reason"}),
    "generators": frozenset({"generator", "when", "reason"}),
}
_OPTIONAL = frozenset({"when", "mode"})


class Kind(StrEnum):
    """What an entry makes of its path."""

    REMOVE = "remove"
    DIRECTORY = "directory"
    FILE = "file"
    SYMLINK = "symlink"


# The order in which entries are laid: room first, then what needs a parent, then links.
_ORDER = (Kind.REMOVE, Kind.DIRECTORY, Kind.FILE, Kind.SYMLINK)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One path of the guest. Its owner is root.

    `mode` counts for files and directories, `content` for files, `target` for symbolic links.
    """

    path: str
    kind: Kind
    mode: int = 0o755
    content: bytes = b""
    target: str = ""


Row = Mapping[str, str]
Layout = Mapping[str, list[Row]]


def digest_files(repository: Path = REPOSITORY) -> list[Path]:
    """All files that `render` reads, sorted: what a cache key has to cover."""
    return sorted(
        path
        for tree in TREES
        for path in (repository / tree).rglob("*")
        if path.is_file() or path.is_symlink()
    )


def render(variables: Mapping[str, object], repository: Path = REPOSITORY) -> list[Entry]:
    """The entries for these variables, in the order in which `lay` makes them.

    The templates read `toolkit_mode` ("cdi", "hook" or "none"), `services` (a list of "dcgm" and
    "fabricmanager"), `drm` (bool: the kernel has DRM),
    `hook_binary` (the toolkit's prestart program), `driver_layout` ("debian": Debian's packages,
    "plain": everything in the library directory), `driver_root` (where a disk with the driver is
    mounted, or ""), `driver_version`, `multiarch` and `vgpu` (the licence client's settings by the
    recipe's names, or None). A variable that is used and not given is an error.
    """
    environment = _environment()
    layout = _load_layout(repository / LAYOUT)

    def wanted(row: Row) -> bool:
        return "when" not in row or _holds(environment, row["when"], variables)

    dropped = {row["path"] for row in layout["only"] if not wanted(row)}
    files = [
        Entry(path=path, kind=Kind.FILE, mode=_mode_of(path, layout), content=text)
        for path, text in _tree_files(environment, variables, repository, dropped)
    ]
    _check_rows_match(layout, {entry.path for entry in files} | dropped)
    entries = [
        *files,
        *_from_layout(layout, wanted),
        *_links(environment, variables, layout, wanted),
    ]
    _check_unique(entries)
    return sorted(entries, key=lambda entry: (_ORDER.index(entry.kind), entry.path))


def lay(entries: Iterable[Entry], root: Path) -> None:
    """Make the entries in an unpacked root file system, in the order given.

    Links in the root are followed as the guest would, so that /lib leads to usr/lib: an absolute
    one starts again at `root`, and `..` stops there. Nothing outside of `root` is touched.
    """
    made: dict[Kind, Callable[[Entry, Path], None]] = {
        Kind.REMOVE: _lay_removal,
        Kind.DIRECTORY: _lay_directory,
        Kind.FILE: _lay_file,
        Kind.SYMLINK: _lay_symlink,
    }
    for entry in entries:
        made[entry.kind](entry, root)


def resolve(root: Path, path: str, *, last: bool = False) -> Path:
    """Where `path` of the guest lies below `root`; `last` follows a link in the last part too.

    Parts that do not exist are taken as they are. A loop of links is a `StepError`.
    """
    waiting = _parts(path)
    done: list[str] = []
    links = 0
    while waiting:
        part = waiting.pop(0)
        if part == "..":
            done = done[:-1]
            continue
        here = root.joinpath(*done, part)
        if here.is_symlink() and (waiting or last):
            links += 1
            if links > MAX_LINKS:
                raise StepError(f"{path}: too many symbolic links in {root}")
            target = str(here.readlink())
            done = [] if target.startswith("/") else done
            waiting = [*_parts(target), *waiting]
        else:
            done.append(part)
    return root.joinpath(*done)


def _parts(path: str) -> list[str]:
    return [part for part in PurePosixPath(path).parts if part not in ("/", "//", ".")]


def _environment() -> Environment:
    import jinja2

    return jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )


def _load_layout(path: Path) -> Layout:
    import yaml

    raw: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(raw, dict) or set(raw) != set(_FIELDS):
        raise UserError(f"{path}: the sections have to be {', '.join(_FIELDS)}")
    for section, rows in raw.items():
        for row in rows:
            found = set(row)
            if not (_FIELDS[section] - _OPTIONAL <= found <= _FIELDS[section]):
                raise UserError(
                    f"{path}: {section}: {row}",
                    hint=f"the fields are {', '.join(sorted(_FIELDS[section]))}",
                )
            if not all(isinstance(value, str) for value in row.values()):
                raise UserError(f"{path}: {section}: {row}", hint='a mode is text: "0755"')
    layout: Layout = raw
    return layout


def _holds(environment: Environment, expression: str, variables: Mapping[str, object]) -> bool:
    import jinja2

    try:
        test = environment.compile_expression(expression, undefined_to_none=False)
        return bool(test(**variables))
    except jinja2.TemplateError as error:
        raise UserError(f"{LAYOUT}: when: {expression}: {error}") from error


def _tree_files(
    environment: Environment,
    variables: Mapping[str, object],
    repository: Path,
    dropped: set[str],
) -> Iterator[tuple[str, bytes]]:
    for tree, guest in TREES.items():
        for source in digest_files(repository):
            if not source.is_relative_to(repository / tree) or source == repository / LAYOUT:
                continue
            relative = source.relative_to(repository / tree).as_posix()
            path = str(PurePosixPath(guest) / relative.removesuffix(TEMPLATE))
            if path in dropped:
                continue
            if not relative.endswith(TEMPLATE):
                yield path, source.read_bytes()
                continue
            text = source.read_text(encoding="utf-8")
            yield path, _rendered(environment, text, variables, source).encode()


def _mode_of(path: str, layout: Layout) -> int:
    for row in layout["modes"]:
        if fnmatchcase(path, row["path"]):
            return int(row["mode"], 8)
    return 0o644


def _from_layout(layout: Layout, wanted: Callable[[Row], bool]) -> Iterator[Entry]:
    for row in filter(wanted, layout["directories"]):
        mode = int(row.get("mode", "0755"), 8)
        yield Entry(path=row["path"], kind=Kind.DIRECTORY, mode=mode)
    for row in filter(wanted, layout["empty"]):
        yield Entry(path=row["path"], kind=Kind.FILE, mode=int(row.get("mode", "0644"), 8))
    for row in filter(wanted, layout["masks"]):
        yield Entry(path=f"{UNITS}/{row['unit']}", kind=Kind.SYMLINK, target="/dev/null")
    for row in filter(wanted, layout["generators"]):
        path = f"{GENERATORS}/{row['generator']}"
        yield Entry(path=path, kind=Kind.SYMLINK, target="/dev/null")
    for row in filter(wanted, layout["remove"]):
        yield Entry(path=row["path"], kind=Kind.REMOVE)


def _links(
    environment: Environment,
    variables: Mapping[str, object],
    layout: Layout,
    wanted: Callable[[Row], bool],
) -> Iterator[Entry]:
    for row in filter(wanted, layout["symlinks"]):
        path, target = (
            _rendered(environment, row[field], variables, LAYOUT) for field in ("path", "target")
        )
        yield Entry(path=path, kind=Kind.SYMLINK, target=target)


def _rendered(
    environment: Environment, text: str, variables: Mapping[str, object], source: object
) -> str:
    import jinja2

    try:
        result: str = environment.from_string(text).render(variables)
        return result
    except jinja2.TemplateError as error:
        raise UserError(f"{source}: {error}") from error


def _check_rows_match(layout: Layout, files: set[str]) -> None:
    for section in ("modes", "only"):
        for row in layout[section]:
            if not any(fnmatchcase(path, row["path"]) for path in files):
                raise UserError(
                    f"{LAYOUT}: {section}: no file {row['path']}",
                    hint="remove the entry, or mend its path",
                )


def _check_unique(entries: Iterable[Entry]) -> None:
    seen: set[str] = set()
    for entry in entries:
        if entry.kind is Kind.REMOVE:
            continue
        if entry.path in seen:
            raise UserError(f"{LAYOUT}: {entry.path} is made twice")
        seen.add(entry.path)


def _own(path: Path) -> None:
    # Without root (tests on an unpacked tree) files stay their maker's; the build runs as root or
    # as root of a user namespace.
    if os.geteuid() == 0:
        os.chown(path, 0, 0, follow_symlinks=False)


def _make_parents(root: Path, path: str) -> Path:
    """The resolved place of `path`, whose parent directories are there now."""
    missing: list[Path] = []
    place = resolve(root, str(PurePosixPath(path).parent), last=True)
    parent = place
    while parent != root and not parent.exists():
        missing.append(parent)
        parent = parent.parent
    for directory in reversed(missing):
        directory.mkdir()
        directory.chmod(0o755)
        _own(directory)
    if not place.is_dir():
        raise StepError(f"{path}: {place} is not a directory")
    return place / PurePosixPath(path).name


def _lay_removal(entry: Entry, root: Path) -> None:
    place = resolve(root, entry.path)
    if place.is_symlink() or place.is_file():
        place.unlink()
    elif place.is_dir():
        shutil.rmtree(place)


def _lay_directory(entry: Entry, root: Path) -> None:
    _make_parents(root, entry.path)
    place = resolve(root, entry.path, last=True)
    if not place.exists():
        place.mkdir()
        _own(place)
    if not place.is_dir():
        raise StepError(f"{entry.path} is there, and not a directory")
    place.chmod(entry.mode)


def _lay_file(entry: Entry, root: Path) -> None:
    place = _make_parents(root, entry.path)
    _refuse_directory(entry, place)
    # A new inode: the old one may be a link, or a hard link into a cache.
    place.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    with os.fdopen(os.open(place, flags, stat.S_IRUSR | stat.S_IWUSR), "wb") as file:
        file.write(entry.content)
    _own(place)
    place.chmod(entry.mode)


def _lay_symlink(entry: Entry, root: Path) -> None:
    place = _make_parents(root, entry.path)
    _refuse_directory(entry, place)
    place.unlink(missing_ok=True)
    place.symlink_to(entry.target)
    _own(place)


def _refuse_directory(entry: Entry, place: Path) -> None:
    if place.is_dir() and not place.is_symlink():
        raise StepError(
            f"{entry.path} is a directory in the root file system and should become a {entry.kind}",
            hint=f"add it to `remove` in {LAYOUT} if its content may go",
        )
