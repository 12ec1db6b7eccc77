"""Makes `.run` files from Debian's packages of NVIDIA's driver.

    python -m tests.nvrun.maker bookworm --cache DIR --out DIR [--graphics] [--compat32]
                                [--installer FILE] [--compression zstd]

The installer is a parameter: a program that is put in as `nvidia-installer`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tests.nvrun import debian
from tests.nvrun.archive import HERE, Name, pack, tree
from tests.nvrun.lines import MODULES, NO_INSTALLER, lines, manifest, member, modes

INSTALLER = HERE / "nvidia-installer"


def build(suite: debian.Suite, cache: Path, out: Path, *, installer: Path | None = None,
          compression: str = "zstd", graphics: bool = False, compat32: bool = False) -> Path:
    """A `.run` of Debian's driver in `out`, by NVIDIA's name. `cache` keeps what is fetched.

    Without `installer` it has one that only fails. Raises `UserError` when a package can't be had.
    """
    packages = debian.packages(suite, cache, graphics=graphics, compat32=compat32)
    name = Name(version=debian.version(packages["amd64"]))
    content = debian.unpack(packages["amd64"], cache / "unpacked")
    files: dict[str, Path] = {}
    entries = lines(name.version)
    for line in entries:
        file = line.split()[0]
        if line.split()[1] != "0000" and Path(file).name in content.files:
            files[file] = content.files[Path(file).name]
    if compat32:
        for base, path in debian.unpack(packages["i386"], cache / "unpacked").files.items():
            if base in files and ".so." in base:
                files[f"32/{base}"] = path
    for top, source in content.sources.items():
        files |= {f"{top}/{path.relative_to(source)}": path
                  for path in sorted(source.rglob("*")) if path.is_file()}
    known = {**modes(entries), "nvidia-installer": 0o755}
    members = {file: member(file, path, known) for file, path in files.items()}
    members["nvidia-installer"] = member(
        "nvidia-installer", installer.read_bytes() if installer else NO_INSTALLER, known)
    modules = [module for module in MODULES if (content.sources["kernel"] / module).is_dir()]
    text = manifest(name, members, entries, modules=modules)
    members[".manifest"] = member(".manifest", text.encode(), known)
    out.mkdir(parents=True, exist_ok=True)
    return pack(out / f"{name.directory}.run", name, tree(members), compression=compression)


def main() -> None:
    """The command."""
    suites = {suite.name: suite for suite in (debian.TRIXIE, debian.BOOKWORM)}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suite", choices=suites)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--installer", type=Path)
    parser.add_argument("--compression", choices=("gzip", "xz", "zstd"), default="zstd")
    parser.add_argument("--graphics", action="store_true")
    parser.add_argument("--compat32", action="store_true")
    given = vars(parser.parse_args())
    given["suite"] = suites[given["suite"]]
    print(build(**given))


if __name__ == "__main__":
    main()
