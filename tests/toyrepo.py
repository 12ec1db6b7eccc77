"""A copy of the repository whose stages are toys, to run whole command lines in a second.

Everything is the real thing but `guest.py`, which names the stages, and the check of the host.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from katagpu import lock, recipe, request

REPOSITORY = Path(__file__).parent.parent
RECIPE = "debian-trixie"
OUT = Path("out") / RECIPE / "550.163.01"
COPIED = ("dodo.py", "katagpu", "recipes", "kernel-configs", "rootfs", "patches", "pyproject.toml")

GUEST = '''
"""Toy stages under the real names. TOY_FAIL=KIND:STAGE fails one (several with commas between
them), STAGE@VERSION only that of a driver; TOY_PAUSE are seconds. TOY_LACKS is a package that the
host lacks, TOY_ABSENT a driver that the archive lacks; with it, all else resolves to nothing."""

import os, time
from katagpu import hostsetup, lock as locking, sandbox, resolve as resolving
from katagpu.errors import StepError, UserError
from katagpu.stages.api import Ref, Stage
from katagpu.store import Kind

if "TOY_LACKS" in os.environ:
    hostsetup.PROGRAMS = {"no-such-program": os.environ["TOY_LACKS"]}
else:
    hostsetup.ensure_host = lambda: None
sandbox.probe = lambda: None

def resolve(request, _directory, known):
    for group in request.groups.values():
        if any(os.environ["TOY_ABSENT"] in package for package in group.packages):
            raise UserError(f"the archive lacks {os.environ['TOY_ABSENT']}", hint="another one")
    known.update({digest: locking.Known(debs=()) for digest in request.digests.values()})
    return locking.Lock(recipe=request.recipe, request=request.identity, groups={})

if "TOY_ABSENT" in os.environ:
    resolving.resolve = resolve
OUTPUTS = {
    "kernel_config": ["config"],
    "kernel": ["vmlinuz", "vmlinux", "system_map", "headers"],
    "driver_modules": ["modules"], "driver_user": ["layer"], "toolkit": ["layer"],
    "rootfs": ["report"], "image": ["image", "sizes", "files"], "initrd": ["image"],
    "kata_config": ["config", "config_rs"], "initrd_config": ["config", "config_rs"],
    "sbom": ["spdx", "cyclonedx", "licences"], "manifest": ["manifest"],
}
NEEDS = {
    "kernel": ["kernel_config"], "driver_modules": ["kernel"], "image": ["rootfs"],
    "initrd": ["rootfs"], "rootfs": ["driver_modules", "driver_user", "toolkit"],
    "sbom": ["image"], "manifest": ["image", "kata_config", "sbom"],
}

def make(build):
    name = build.stage.name
    with open(os.environ.get("TOY_SAID", "/dev/null"), "a") as said:
        said.write(f"+{name}\\n")
    time.sleep(float(os.environ.get("TOY_PAUSE", "0")))
    fails = [word.split(":") for word in os.environ.get("TOY_FAIL", "").split(",") if word]
    version = build.options.get("version", "")
    for kind in [kind for kind, stage in fails if stage in (name, f"{name}@{version}")]:
        raise {"user": UserError("the user can mend it", hint="like this"),
               "step": StepError("the step broke"), "bug": ValueError("oops")}[kind]
    word = build.file("word").read_text() if "word" in build.stage.files else ""
    build.facts["release"] = "6.1-toy"
    for output in build.stage.outputs:
        below = " ".join(found.identity[:8] for found in build.inputs.values())
        line = f"{name} {output} {word}{version} {below}\\n"
        data = b"{}" if output == "sizes" else line.encode() * 3000
        build.put_bytes(output, data)
    with open(os.environ.get("TOY_SAID", "/dev/null"), "a") as said:
        said.write(f"-{name}\\n")

def stages(recipe, lock, root):
    return {name: Stage(
        name=name, title=f"toy {name}", module="errors", make=make,
        outputs={output: Kind.FILE for output in outputs},
        options={"driver_modules": {"flavour": str(recipe.driver.kernel_module),
                                    "version": recipe.driver.version},
                 "driver_user": {"version": recipe.driver.version}}.get(name, {}),
        files={"word": root / "rootfs/word"} if name == "rootfs" else {},
        inputs={need: Ref(stage=need, output=OUTPUTS[need][0]) for need in NEEDS.get(name, [])},
    ) for name, outputs in OUTPUTS.items()}
'''


class ToyRepository:
    """The copy at `root`, with a store beside it and a lock that answers the default recipe."""

    def __init__(self, top: Path) -> None:
        self.root = top / "repository"
        self.store = top / "store"
        self.said = top / "said"
        self.root.mkdir()
        for name in COPIED:
            source = REPOSITORY / name
            if source.is_dir():
                shutil.copytree(source, self.root / name,
                                ignore=shutil.ignore_patterns("__pycache__", ".*"))
            else:
                shutil.copy(source, self.root / name)
        (self.root / "katagpu/guest.py").write_text(GUEST)
        (self.root / "rootfs/word").write_text("word")
        self.lock = lock.Lock(recipe=RECIPE, request=self.identity(), groups={})
        lock.write(self.lock, self.root / OUT / "lock.json")

    def identity(self, driver: str | None = None) -> str:
        """What the recipe asks for as it is now."""
        return request.identity(recipe.load(RECIPE, self.root, driver=driver), self.root)

    def list_driver(self, version: str) -> Path:
        """Add a driver to the recipe, with its lock; where the guest's results will be."""
        path = self.root / "recipes" / f"{RECIPE}.yaml"
        text = path.read_text()
        if "other_drivers:" not in text:
            text += "\nother_drivers:\n"
        path.write_text(f'{text}  - {{source: debian, version: "{version}"}}\n')
        place = self.root / OUT.parent / version
        lock.write(lock.Lock(recipe=RECIPE, request=self.identity(version), groups={}),
                   place / "lock.json")
        return place

    @property
    def out(self) -> Path:
        """Where the results of the default recipe are."""
        return self.root / OUT

    def environment(self, **more: str) -> dict[str, str]:
        """The environment of a run."""
        return {"PATH": os.environ["PATH"], "HOME": str(self.root.parent), "LANG": "C.UTF-8",
                "KATAGPU_STORE": str(self.store), "TOY_SAID": str(self.said), **more}

    def start(self, argv: Sequence[str], **environment: str) -> subprocess.Popen[str]:
        """Start `python -m katagpu` with these words."""
        return subprocess.Popen([sys.executable, "-m", "katagpu", *argv], cwd=self.root, text=True,
                                env=self.environment(**environment), stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE)

    def run(self, *argv: str, **environment: str) -> tuple[int, str, str]:
        """Run it to its end: status, stdout, stderr."""
        process = self.start(argv, **environment)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    def made(self) -> list[str]:
        """The stages that were made since the last call, in the order in which they ended."""
        lines = self.said.read_text().splitlines() if self.said.exists() else []
        self.said.unlink(missing_ok=True)
        return [line[1:] for line in lines if line.startswith("-")]
