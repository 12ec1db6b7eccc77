"""Where the kernel's source comes from: a suite's source package, or a release of kernel.org."""

from __future__ import annotations

from pathlib import Path

from katagpu import kernelorg
from katagpu.errors import StepError
from katagpu.keys import digest
from katagpu.lock import Lock
from katagpu.run import run
from katagpu.schema import KernelSource, Recipe
from katagpu.stages.api import Build, Stage
from katagpu.store import Kind, writing

MODULE = "stages.source"
KEYS = "keys/kernel.org"


def source(recipe: Recipe, lock: Lock, root: Path) -> Stage:
    """The verified tarball."""
    kernel = recipe.kernel
    if kernel.source is KernelSource.DEBIAN:
        return Stage(name="kernel_source", title="kernel source", module=MODULE,
                     make=from_package, outputs={"tarball": Kind.FILE},
                     options={"package": kernel.package},
                     packages={"packages": lock.group("kernel_source")})
    keys = {path.name: path for path in sorted((root / KEYS).iterdir()) if path.is_file()}
    return Stage(name="kernel_source", title=f"kernel {kernel.version} of kernel.org",
                 module=MODULE, make=from_release, outputs={"tarball": Kind.FILE}, network=True,
                 options={"version": kernel.version,
                          "releases": kernel.releases or kernelorg.RELEASES}, files=keys)


def from_package(build: Build) -> None:
    """Take the tarball out of the source package, which the lock names by digest."""
    (deb,) = build.debs("packages")
    content = build.directory("deb")
    run(["dpkg-deb", "--extract", deb, content], log=build.log)
    name = build.options["package"]
    found = sorted((content / "usr/src").glob(f"{name}.tar.*"))
    if len(found) != 1:
        raise StepError(f"{name} does not contain one tarball usr/src/{name}.tar.*")
    build.put_file("tarball", found[0])


def from_release(build: Build) -> None:
    """Fetch a release, and verify its signature with the keys that the repository pins.

    Until it is whole it grows in the store, where the next run goes on with it.
    """
    keys = build.directory("keys")
    for name, path in build.stage.files.items():
        (keys / name).write_bytes(path.read_bytes())
    version, releases = build.options["version"], build.options["releases"]
    place = build.store.root / "partial" / f"linux-{version}-{digest(releases)[:12]}"
    with build.store.lock(place.name), writing(build.store.root):
        try:
            release = kernelorg.release(version, place, keys, releases=releases)
            build.facts["signed_by"] = release.signed_by
            build.put_file("tarball", release.tarball)
        finally:
            for url in kernelorg.urls(version, releases):  # what is whole, and was judged
                (place / url.rpartition("/")[2]).unlink(missing_ok=True)
