"""The toy repository with everything that a lock has: packages of a signed archive, a release of a
toy kernel.org, Go modules, an agent's release, and QEMU of backports. All are served on the
loopback.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import lzma
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import toyrepo
from tests.toyarchive import ToyArchive, served
from tests.toyrepo import RECIPE, ToyRepository

MODULE = "github.com/NVIDIA/toy"

GUEST = toyrepo.GUEST + '''

import dataclasses
import hashlib
from pathlib import Path
from katagpu import request
from katagpu.fetch import Job, fetch
from katagpu.lock import Group
from katagpu.stages import locked, source, toolkit

def groups(recipe, root):
    version = recipe.driver.version
    extra = recipe.rootfs.extra_packages
    found = {"stage0": Group(packages=("app",)), "imagetools": Group(packages=("go",)),
             "toolchain": Group(packages=("cc",)), "base": Group(packages=("app",)),
             "driver_user": Group(packages=(f"driver={version}*",), on="base")}
    if extra:
        found["build_layer"] = Group(packages=extra, on="toolchain")
    return found

def make_source(build):
    """As the real one leaves it: a file system proxy."""
    place = build.directory("proxy") / "github.com/!n!v!i!d!i!a/toy/@v"
    place.mkdir(parents=True)
    fetch(Job(url=f"{os.environ['TOY_PROXY']}/v1.mod", what="Go module"), place / "v1.mod",
          pauses=())
    (place / "v1.ziphash").write_text("h1:" + (place / "v1.mod").read_text())
    build.put_tree("modules", build.directory("proxy"))

request.groups = groups
toolkit.make_source = make_source
toys = stages

def make_all(build):
    for group in build.stage.packages:
        for path in build.debs(group):
            assert path.read_bytes().startswith(b"not really ")
    for name in build.stage.downloads:
        assert build.download(name).read_bytes()
    if build.stage.outputs:
        make(build)

def stages(recipe, lock, root):
    found = toys(recipe, lock, root)
    found["rootfs"] = dataclasses.replace(found["rootfs"], make=make_all, packages={
        "base": lock.group("base"), "tools": lock.group("stage0")})
    found["driver_user"] = dataclasses.replace(found["driver_user"], make=make_all, packages={
        "packages": lock.group("driver_user")})
    found["kernel_config"] = dataclasses.replace(found["kernel_config"], inputs={
        "source": Ref(stage="kernel_source", output="tarball")})
    found["toolkit"] = dataclasses.replace(found["toolkit"], inputs={
        "modules": Ref(stage="toolkit_source", output="modules")})
    first = [source.source(recipe, lock, root),
             Stage(name="toolkit_source", title="Go modules", module="errors", make=make_source,
                   outputs={"modules": Kind.TREE}, network=True),
             Stage(name="agent", title="agent", module="errors", make=make_all,
                   outputs={"agent": Kind.FILE},
                   downloads={"source": (recipe.agent.release, recipe.agent.sha256)})]
    found["image"] = dataclasses.replace(found["image"], inputs={
        **found["image"].inputs, "agent": Ref(stage="agent", output="agent")})
    all = locked.pinned([*first, *found.values()], lock, root)
    return {stage.name: stage for stage in all}

def boot_stages(recipe, emulator, qemu, *, lesser):
    return {} if emulator is None else {"emulator": Stage(
        name="emulator", title="QEMU", module="errors", make=make_all,
        outputs={"root": Kind.FILE}, packages={"packages": emulator.group("emulator")})}
'''


@dataclass
class LockedRepository:
    """The toy, its archive with backports, and the site with all else."""

    toy: ToyRepository
    archive: ToyArchive
    backports: ToyArchive
    site: Any

    @property
    def path(self) -> Path:
        """The committed lock."""
        return self.toy.root / "recipes" / f"{RECIPE}.lock"

    @property
    def lock(self) -> dict[str, Any]:
        """What it says."""
        found: dict[str, Any] = json.loads(self.path.read_bytes())
        return found

    def run(self, *argv: str, **environment: str) -> tuple[int, str, str]:
        """Run a command line to its end: status, stdout, stderr."""
        return self.toy.run(*argv, TOY_PROXY=f"{self.site.base}/proxy", **environment)

    def done(self, *argv: str, **environment: str) -> str:
        """What a command line says that succeeds."""
        status, _out, err = self.run(*argv, **environment)
        assert status == 0, err
        return err

    def refused(self, *argv: str, **environment: str) -> str:
        """What a command line says that ends with status 1: one plain error."""
        status, _out, err = self.run(*argv, **environment)
        assert status == 1, err
        assert "Traceback" not in err and "fault in katagpu" not in err
        assert err.count("error: ") == 1, err
        return err

    def versions(self, part: str, group: str) -> list[str]:
        """`package=version` of a group of the lock."""
        return [f"{deb['package']}={deb['version']}"
                for deb in self.lock["parts"][part]["packages"][group]]

    def edit(self, before: str, after: str) -> None:
        """Edit the recipe."""
        path = self.toy.root / "recipes" / f"{RECIPE}.yaml"
        text = path.read_text()
        assert before in text
        path.write_text(text.replace(before, after))

    def publish(self) -> None:
        """Sign the archive anew."""
        self.archive.publish()
        self.backports.publish()

    def drop(self, name: str) -> None:
        """Let the archive have no version of a package, nor its files."""
        for file in [file for file in self.archive.packages if file.startswith(f"{name}_")]:
            (self.archive.root / self.archive.packages.pop(file)["Filename"]).unlink()

    def moves_on(self) -> None:
        """Let the archive have newer versions of all but the driver, and QEMU, as mirrors do."""
        for name in ("lib", "app", "cc", "go"):
            self.drop(name)
        self.archive.add("lib", "1.1-1")
        self.archive.add("app", "1.1-1", Depends="lib", Essential="yes")
        self.archive.add("cc", "13-1")
        self.archive.add("go", "1.25-1")
        self.publish()


def _archives(root: Path, keys: Path) -> tuple[ToyArchive, ToyArchive]:
    root.mkdir()
    stable = ToyArchive(root, keys, suite="trixie")
    backports = ToyArchive(root, keys, suite="trixie-backports")
    stable.add("lib", "1.0-1")
    stable.add("app", "1.0-1", Depends="lib", Essential="yes")
    stable.add("cc", "12-1")
    stable.add("make", "4-1", Depends="cc")
    stable.add("go", "1.24-1")
    for version in ("550.163.01", "535.216.01"):
        stable.add("driver", f"{version}-1", Depends="lib (>= 1)")
    stable.add("qemu-system-x86", "1:10.0-1")
    backports.add("qemu-system-x86", "1:11.1-1")
    return stable, backports


def _kernel(site: Any, archive: ToyArchive, place: Path) -> None:
    """A release with its signature, and the key that is pinned."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("linux-6.12.3/Makefile"))
    (archive.home / "linux.tar").write_bytes(out.getvalue())
    (archive.home / "linux.tar.sign").unlink(missing_ok=True)
    archive.gpg("--local-user", "test", "--armor", "--output", archive.home / "linux.tar.sign",
                "--detach-sign", archive.home / "linux.tar")
    site.add("v6.x/linux-6.12.3.tar.xz", lzma.compress(out.getvalue()))
    site.add("v6.x/linux-6.12.3.tar.sign", (archive.home / "linux.tar.sign").read_bytes())
    place.mkdir(parents=True)
    (place / "toy.asc").write_text(archive.gpg("--armor", "--export", "test"))
    (place / "fingerprints").write_text(f"{archive.fingerprint()}  toy\n")


def _recipe(toy: ToyRepository, archive: ToyArchive, site: Any) -> None:
    agent = b"an agent's release"
    site.add("kata-static.tar", agent)
    path = toy.root / "recipes" / f"{RECIPE}.yaml"
    lines = []
    for line in path.read_text().splitlines():
        word = line.strip().split(":")[0]
        new = {"mirror": archive.base, "security_mirror": "null",
               "keyring": archive.home / "test.gpg"}.get(word)
        lines.append(f"  {word}: {new}" if new else line)
    path.write_text("\n".join(lines).replace("  source: debian\n  package: linux-source-6.12\n", (
        f'  source: kernel.org\n  version: "6.12.3"\n  releases: {site.base}\n'), 1).replace(
            "agent: null", f"agent: {{release: {site.base}/kata-static.tar, "
            f"sha256: {hashlib.sha256(agent).hexdigest()}}}") + "\n")


def module_sums(content: bytes) -> dict[str, str]:
    """The sums of the toy's Go module whose go.mod this is."""
    line = f"{hashlib.sha256(content).hexdigest()}  go.mod\n".encode()
    return {f"{MODULE} v1": f"h1:{content.decode()}",
            f"{MODULE} v1/go.mod": "h1:" + base64.b64encode(
                hashlib.sha256(line).digest()).decode()}


@contextlib.contextmanager
def locked_repository(top: Path, site: Any, keys: Path) -> Iterator[LockedRepository]:
    """The repository, all servers running; nothing is locked. `keys` are toys' signing keys."""
    stable, backports = _archives(top / "archive", keys)
    with served(stable):
        toy = ToyRepository(top)
        (toy.root / "katagpu/guest.py").write_text(GUEST)
        (toy.out / "lock.json").unlink()
        _kernel(site, stable, toy.root / "keys/kernel.org")
        _recipe(toy, stable, site)
        site.add("proxy/v1.mod", b"toy")
        found = LockedRepository(toy, stable, backports, site)
        found.publish()
        yield found
