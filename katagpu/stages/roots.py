"""The roots made of packages: `stage0`, the build roots, and the guest's base.

The host's mmdebstrap makes `stage0` only; the pinned one inside it makes all others, so that what
ships does not depend on the host's version. The network is not there: all come from locked debs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from katagpu import sandbox
from katagpu.lock import Lock
from katagpu.sandbox import Bind, Root
from katagpu.stages import repository
from katagpu.stages.api import Build, Ref, Stage
from katagpu.store import Kind

MODULE = "stages.roots"
OUTPUT = {"root": Kind.TREE}
TARGET = "/katagpu/target"
PLACE = "/katagpu/apt"
CACHE = "/katagpu-apt-cache"

# The guest is read by machines: documentation stays out, licences stay in (dpkg(1), path-exclude).
SLIM = ("path-exclude=/usr/share/doc/*", "path-include=/usr/share/doc/*/copyright",
        "path-exclude=/usr/share/man/*", "path-exclude=/usr/share/info/*",
        "path-exclude=/usr/share/locale/*", "path-exclude=/usr/share/lintian/*",
        "path-exclude=/usr/share/bug/*", "path-exclude=/usr/share/bash-completion/*",
        "path-exclude=/usr/share/zoneinfo/*", "path-include=/usr/share/zoneinfo/Etc/UTC")

# Every guest has /bin, /sbin and /lib as links into /usr. Newer suites' base-files brings them
# (Debian 13, Ubuntu 24.10); in older ones the installer makes them before anything is unpacked.
MERGED = ('for name in bin sbin lib lib64; do mkdir -p "$1/usr/$name"; '
          'ln -s "usr/$name" "$1/$name"; done')
# dash up to 0.5.10 (Ubuntu 20.04) cannot be configured without a directory for manuals.
MANUALS = ('mkdir -p "$1/usr/share/man/man1"',
           'rmdir --ignore-fail-on-non-empty "$1/usr/share/man/man1"')


def stage0(lock: Lock) -> Stage:
    """A root with the pinned mmdebstrap, made by the host's."""
    return Stage(name="stage0", title="bootstrap root with the pinned mmdebstrap", module=MODULE,
                 make=make_stage0, outputs=OUTPUT, packages={"packages": lock.group("stage0")})


def root(lock: Lock, name: str, title: str, *, slim: bool = False) -> Stage:
    """A root made of the locked group of the same name."""
    return Stage(name=name, title=title, module=MODULE, make=make_root, outputs=OUTPUT,
                 options={"dpkg": list(SLIM) if slim else []},
                 inputs={"stage0": Ref(stage="stage0", output="root")},
                 packages={"packages": lock.group(name)})


def layer(lock: Lock, name: str, title: str, on: Sequence[Ref], *, slim: bool = False,
          files: Sequence[Path] = ()) -> Stage:
    """A group of packages installed on top of a chain of trees (lowest first): what it adds.

    `files` are packages given as files, installed beside the group.
    """
    inputs = {f"below{index}": ref for index, ref in enumerate(on)}
    return Stage(name=name, title=title, module=MODULE, make=make_layer,
                 outputs={"layer": Kind.TREE}, options={"dpkg": list(SLIM) if slim else []},
                 inputs={"stage0": Ref(stage="stage0", output="root"), **inputs},
                 files={f"deb/{path.name}": path for path in files},
                 packages={"packages": lock.group(name)})


def _mmdebstrap(names: Sequence[str], dpkg: Sequence[str], target: str, source: str) -> list[str]:
    options = [f"--dpkgopt={option}" for option in dpkg]
    hooks = [f"--setup-hook={MERGED}"]
    if dpkg:
        hooks += [f"--setup-hook={MANUALS[0]}", f"--customize-hook={MANUALS[1]}"]
    return ["mmdebstrap", "--mode=root", "--format=directory", "--variant=custom",
            f"--include={','.join(names)}", "--aptopt=Acquire::Languages none",
            "--aptopt=APT::Install-Recommends false", "--aptopt=APT::Sandbox::User root",
            "--dpkgopt=force-unsafe-io", *hooks,
            "--skip=check/qemu,output/mknod", *options, "", target, source]


def make_stage0(build: Build) -> None:
    """Run the host's mmdebstrap in namespaces of our own."""
    target = build.directory("target")
    names = [deb.package for deb in build.stage.packages["packages"]]
    source = f"deb [trusted=yes] copy:{build.repository('packages')} ./"
    build.enter(_mmdebstrap(names, (), str(target), source), [], cwd=str(build.scratch))
    build.put_tree("root", target)
    sandbox.remove(target)


def make_root(build: Build) -> None:
    """Run stage 0's mmdebstrap on the local repository."""
    target, empty = build.directory("target"), build.directory("empty")
    names = [deb.package for deb in build.stage.packages["packages"]]
    build.enter(_mmdebstrap(names, build.options["dpkg"], TARGET, repository.SOURCE),
                [Root(lower=(build.tree("stage0"),), upper=build.directory("upper")),
                 Root(lower=(empty,), upper=target, target=TARGET, special=False)],
                binds=[Bind(source=build.repository("packages"), target=repository.PLACE)])
    build.put_tree("root", target, overlay=True)
    sandbox.remove(target)


def make_layer(build: Build) -> None:
    """Install packages into an overlay over the chain, with stage 0's apt from outside."""
    upper = build.directory("upper")
    below = sorted(name for name in build.inputs if name.startswith("below"))
    chain = tuple(build.tree(name) for name in reversed(below))
    install(build, chain, upper, build.options["dpkg"])
    build.put_tree("layer", upper, overlay=True)


def install(build: Build, chain: tuple[Path, ...], upper: Path,
            dpkg: Sequence[str]) -> None:
    """apt-get install of the stage's packages into the overlay (`chain` topmost first)."""
    names = [f"{deb.package}={deb.version}" for deb in build.stage.packages["packages"]]
    given = [path for name, path in build.stage.files.items() if name.startswith("deb/")]
    names += [repository.name_of(path) for path in given]
    if not names:
        return
    state = build.directory("apt")
    settings = [
        f'Dir::State "{PLACE}/state";', f'Dir::State::status "{TARGET}/var/lib/dpkg/status";',
        f'Dir::Cache "{TARGET}{CACHE}";', f'Dir::Etc::sourcelist "{PLACE}/sources.list";',
        'Dir::Etc::sourceparts "-";', f'DPkg::Chroot-Directory "{TARGET}";',
        'APT::Install-Recommends "false";', 'APT::Sandbox::User "root";',
        'Acquire::Languages "none";', 'Debug::NoLocking "true";',
        *(f'DPkg::Options:: "--{option}";' for option in dpkg),
    ]
    (state / "state/lists/partial").mkdir(parents=True, exist_ok=True)
    (state / "sources.list").write_text(repository.SOURCE + "\n")
    (state / "apt.conf").write_text("\n".join(settings) + "\n")
    script = (f"set -e; mkdir -p {TARGET}{CACHE}/archives/partial; apt-get update -q; "
              f"apt-get install -y -q --no-install-recommends \"$@\"; rm -rf {TARGET}{CACHE}"
              )
    build.enter(["sh", "-c", script, "install", *names],
                [Root(lower=(build.tree("stage0"),), upper=build.directory("tools")),
                 Root(lower=chain, upper=upper, target=TARGET)],
                binds=[Bind(source=state, target=PLACE, writable=True),
                       Bind(source=build.repository("packages", given),
                            target=repository.PLACE)],
                env={"APT_CONFIG": f"{PLACE}/apt.conf", "DEBIAN_FRONTEND": "noninteractive"})

