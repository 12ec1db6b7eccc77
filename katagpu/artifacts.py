"""What a build leaves under `out/`: which outputs, under which names, restored from the store.

Names are Kata's: the file carries its version, and a link without one is what configurations name.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from katagpu import log
from katagpu.errors import UserError
from katagpu.plan import Plan
from katagpu.schema import DriverSource, Headers, ImageFormat, Recipe
from katagpu.stages import final, layers
from katagpu.store import Output, writing

STATE = ".restored.json"


class Artifact(msgspec.Struct, frozen=True, kw_only=True):
    """An output with its name in `out/`; `{release}` in it is the kernel's release."""

    stage: str
    output: str
    name: str
    link: str | None = None


BOOT_CHECK = (
    Artifact(stage="boot_check", output="report", name="boot-check.json"),
    Artifact(stage="boot_check", output="junit", name="boot-check.xml"),
    Artifact(stage="boot_check", output="log", name="boot-check.txt"))
CHECKED = Artifact(stage="checked_manifest", output="manifest", name="manifest.json")
"""The manifest once the guest has passed its boot check."""


class Restored(msgspec.Struct, frozen=True, kw_only=True):
    """A restored file as it was left: the artifact's name, content, bytes, inode and time (ns)."""

    artifact: str = ""
    identity: str
    size: int
    inode: int
    mtime: int


RESTORED = msgspec.json.Decoder(dict[str, Restored])  # before there are threads, as `store.ACTION`


def refusal(recipe: Recipe, task: str) -> UserError | None:
    """Why a recipe cannot have the results of a public task; None where it can."""
    if task != "build_initrd" or not layers.split(recipe):
        return None
    return UserError(
        "with `image: {model: extension}` the driver is on a disk of its own: an "
        "initrd of the base would have none, and no Kata configuration fits it",
        hint="./doitw build_image, or `image: {model: single}` in the recipe")


def of(recipe: Recipe, task: str) -> tuple[Artifact, ...]:
    """The artifacts of a public task; none where `refusal` has a reason."""
    if refusal(recipe, task) is not None:
        return ()
    base, split = final.image_file(recipe), layers.split(recipe)
    kernel = (
        Artifact(stage="kernel", output="vmlinuz", name="vmlinuz-{release}",
                 link=final.KERNEL),
        Artifact(stage="kernel", output="vmlinux", name="vmlinux-{release}",
                 link="vmlinux-nvidia-gpu.container"),
        Artifact(stage="kernel", output="system_map", name="System.map-{release}"),
        Artifact(stage="kernel_config", output="config", name="config-{release}"),
    )
    rpm = recipe.kernel.headers is Headers.RPM
    headers = (Artifact(stage="kernel", output="headers_rpm" if rpm else "headers",
                        name=f"linux-headers-{{release}}.{recipe.kernel.headers}"),)
    report = (Artifact(stage="rootfs", output="report", name="checks.txt"),)
    initrd = (Artifact(stage="initrd", output="image", name=f"{base}.initrd",
                       link=final.INITRD),)
    drop_ins = (Artifact(stage="initrd_config", output="config", name="50-katagpu-initrd.toml"),
                Artifact(stage="initrd_config", output="config_rs",
                         name="50-katagpu-initrd-runtime-rs.toml"))
    image: tuple[Artifact, ...] = (
        Artifact(stage="image", output="image", name=f"{base}.image",
                 link=final.BASE_IMAGE if split else final.IMAGE),)
    if recipe.image.format is ImageFormat.INITRD:
        image = (msgspec.structs.replace(initrd[0], stage="image"),)
    about: tuple[Artifact, ...] = (
        Artifact(stage="image", output="sizes", name="sizes.json"),
        Artifact(stage="image", output="files", name="files.mtree"),
        Artifact(stage="kata_config", output="config", name="50-katagpu.toml"),
        Artifact(stage="kata_config", output="config_rs", name="50-katagpu-runtime-rs.toml"),
        Artifact(stage="sbom", output="spdx", name="sbom.spdx.json"),
        Artifact(stage="sbom", output="cyclonedx", name="sbom.cdx.json"),
        Artifact(stage="sbom", output="licences", name="licences.txt"),
        Artifact(stage="manifest", output="manifest", name="manifest.json"))
    if recipe.image.verity:
        variant = "nvidia" if split else "nvidia-gpu"  # Kata's names of the two images
        about += (Artifact(stage="image", output="verity", name=f"root_hash_{variant}.txt"),)
    if split:
        image += _extension(recipe)
    if recipe.driver.source is DriverSource.RUNFILE:
        about += (Artifact(stage="driver_user", output="parts", name="driver-parts.json"),)
    return {
        "build_kernel": kernel, "build_headers": headers, "build_rootfs": report,
        "install_driver": (), "install_toolkit": (),
        "build_initrd": (*kernel, *initrd, *drop_ins),
        "boot_check": (*BOOT_CHECK, CHECKED),
        "build_image": (*kernel, *headers, *report, *image, *about),
    }[task]


def _extension(recipe: Recipe) -> tuple[Artifact, ...]:
    """The driver's disk, with its hash under Kata's name for it."""
    return (Artifact(stage="extension", output="image", name=final.extension_file(recipe),
                     link=final.EXTENSION_IMAGE),
            Artifact(stage="extension", output="verity",
                     name="root_hash_nvidia-gpu-extension.txt"),
            Artifact(stage="extension", output="sizes", name="sizes-extension.json"),
            Artifact(stage="extension", output="files", name="files-extension.mtree"),
            Artifact(stage="extension_root", output="report", name="checks-extension.txt"))


class Outcome:
    """The directory of one guest's results."""

    def __init__(self, directory: Path, plan: Plan) -> None:
        self.directory = directory
        self.plan = plan
        self._restoring = threading.Lock()

    def _state(self) -> dict[str, Restored]:
        try:
            return RESTORED.decode((self.directory / STATE).read_bytes())
        except (OSError, msgspec.DecodeError):
            return {}

    def _wanted(self, artifacts: Sequence[Artifact]) -> dict[str, tuple[Artifact, Output]] | None:
        """Name → artifact and output; None while a stage is not made."""
        wanted = {}
        for artifact in artifacts:
            action = self.plan.action(artifact.stage)
            kernel = self.plan.action("kernel")
            if action is None or kernel is None:
                return None
            name = artifact.name.format(release=kernel.record["release"])
            wanted[name] = (artifact, action.outputs[artifact.output])
        return wanted

    def _intact(self, name: str, output: Output, state: dict[str, Restored]) -> bool:
        known = state.get(name)
        return (known is not None and known.identity == output.identity
                and self._unchanged(name, known))

    def restored(self, name: str) -> bool:
        """Is the file of this name as it was restored from the store, whenever that was?"""
        known = self._state().get(name)
        return known is not None and self._unchanged(name, known)

    def _unchanged(self, name: str, known: Restored) -> bool:
        try:
            found = (self.directory / name).stat(follow_symlinks=False)
        except OSError:
            return False
        return (found.st_size, found.st_ino, found.st_mtime_ns) == (
            known.size, known.inode, known.mtime)

    def _linked(self, name: str, artifact: Artifact) -> bool:
        if artifact.link is None:
            return True
        link = self.directory / artifact.link
        return link.is_symlink() and str(link.readlink()) == name

    def complete(self, artifacts: Sequence[Artifact]) -> bool:
        """Are all artifacts there, as they were left? Reads no content."""
        wanted = self._wanted(artifacts)
        if wanted is None:
            return False
        state = self._state()
        return all(self._intact(name, output, state) and self._linked(name, artifact)
                   for name, (artifact, output) in wanted.items())

    def files(self, artifacts: Sequence[Artifact]) -> list[Path]:
        """The paths of artifacts and their links; none while a stage is not made."""
        names: list[str] = []
        for name, (artifact, _output) in (self._wanted(artifacts) or {}).items():
            names += [name, artifact.link] if artifact.link else [name]
        return [self.directory / name for name in names]

    def restore(self, artifacts: Sequence[Artifact]) -> None:
        """Put the artifacts there, from the store; what is intact stays.

        Raises `CorruptBlob` when a blob is damaged; it is dropped then.
        """
        wanted = self._wanted(artifacts)
        assert wanted is not None, "the stages were made before"
        with self._restoring, writing(self.directory):
            state = self._state()
            self.directory.mkdir(parents=True, exist_ok=True)
            stale = {name: item for name, item in wanted.items()
                     if not self._intact(name, item[1], state)}
            largest = sorted(stale.items(), key=lambda item: -item[1][1].size)
            from concurrent.futures import ThreadPoolExecutor

            with ThreadPoolExecutor(max_workers=2) as pool:
                for done in [pool.submit(self.plan.store.copy_out, output.blob,
                                         self.directory / name)
                             for name, (_artifact, output) in largest]:
                    done.result()
            for name, (artifact, output) in wanted.items():
                if not self._linked(name, artifact) and artifact.link is not None:
                    part = self.directory / f".{artifact.link}.{os.getpid()}.part"
                    part.unlink(missing_ok=True)
                    part.symlink_to(name)
                    part.replace(self.directory / artifact.link)
                found = (self.directory / name).stat()
                state[name] = Restored(
                    artifact=artifact.name, identity=output.identity, size=found.st_size,
                    inode=found.st_ino, mtime=found.st_mtime_ns)
            self._drop_superseded(state, wanted)
            part = self.directory / f"{STATE}.{os.getpid()}.part"
            part.write_bytes(msgspec.json.encode(state))
            part.replace(self.directory / STATE)

    def _drop_superseded(self, state: dict[str, Restored],
                         wanted: Mapping[str, tuple[Artifact, Output]]) -> None:
        """Take away what an earlier run restored under another release's name."""
        kinds = {artifact.name for artifact, _output in wanted.values()}
        for name in sorted(set(state) - set(wanted)):
            if state[name].artifact in kinds:
                (self.directory / name).unlink(missing_ok=True)
                del state[name]

    def announce(self, artifacts: Sequence[Artifact]) -> None:
        """Say where each artifact is, and its size."""
        wanted = self._wanted(artifacts) or {}
        shown = os.path.relpath(self.directory)
        log.say(f"in {shown}/")
        for name, (artifact, _output) in wanted.items():
            link = f"  ({artifact.link})" if artifact.link else ""
            size = (self.directory / name).stat().st_size
            log.say(f"  {log.size(size):>9}  {name}{link}")
