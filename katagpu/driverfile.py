"""The driver's `.run` file of a recipe that gives no digest or no address of it: the lock's pin.

The first bytes that came are those of every build with the same lock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from katagpu import keys, log
from katagpu.fetch import Gone, Job, fetch_all
from katagpu.schema import Driver, DriverSource, Recipe

# Where NVIDIA keeps drivers by version: for workstations, and for data centres.
DOWNLOADS = tuple(
    f"https://us.download.nvidia.com/{area}/{{version}}/NVIDIA-Linux-x86_64-{{version}}.run"
    for area in ("XFree86/Linux-x86_64", "tesla"))


def addresses(recipe: Recipe) -> tuple[str, ...]:
    """Where a file may be that the lock pins, in the order of trying; none where it pins none."""
    driver = recipe.driver
    complete = driver.url is not None and driver.sha256 is not None
    if driver.source is not DriverSource.RUNFILE or driver.file is not None or complete:
        return ()
    patterns = DOWNLOADS if driver.url is None else (driver.url,)
    return tuple(pattern.replace("{version}", driver.version or "") for pattern in patterns)


def pinned(recipe: Recipe, known: Mapping[str, str]) -> dict[str, str]:
    """The digest of the file by its address, where it is `known` and what the recipe asks for."""
    return {url: known[url] for url in addresses(recipe)
            if url in known and recipe.driver.sha256 in {None, known[url]}}


def pin(recipe: Recipe, known: Mapping[str, str], directory: Path) -> dict[str, str]:
    """The digest of the file by its address: a `known` one, else it is fetched for it.

    It is kept in `directory` under its digest, where a build looks before it fetches. Raises
    `Gone`, naming all addresses, where none has it.
    """
    wanted, found = addresses(recipe), pinned(recipe, known)
    if found or not wanted:
        return found
    url, path = _fetch(wanted, recipe.driver, directory)
    digest = keys.file_digest(path)
    path.replace(directory / digest)
    if recipe.driver.sha256 is None:
        log.note(f"lock: no sha256 in the recipe; {url} has {digest}, and is asked for with it")
    return {url: digest}


def _fetch(wanted: Sequence[str], driver: Driver, directory: Path) -> tuple[str, Path]:
    """Fetch from the first address that has the file."""
    what = f"NVIDIA driver {driver.version}"
    gone: list[Gone] = []
    for url in wanted:
        path = directory / keys.digest(url)
        try:
            fetch_all([(Job(url=url, what=what, sha256=driver.sha256), path)])
        except Gone as refusal:
            gone.append(refusal)
            continue
        return url, path
    raise Gone("\n".join(each.what for each in gone),
               hint="mend driver.version, or say where the file is: driver.url, driver.file")
