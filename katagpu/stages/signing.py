"""Signed kernel modules, for recipes that say `sign`: the certificate is in the kernel, and each
module is signed after it was made.

Kernel and modules are made without the key, so that anybody gets their bytes again. What is signed
is known by the modules, the certificate and the kernel's own `sign-file`: the private key is needed
where the store does not have that, and is in no key, record, or log. Other recipes read none of
this.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from katagpu import modsig, signingkey
from katagpu.check.kmod import SUFFIXES
from katagpu.errors import StepError, UserError
from katagpu.sandbox import Bind
from katagpu.schema import DriverSource, Recipe
from katagpu.stages import certified, layers
from katagpu.stages.api import Build, Ref, Stage
from katagpu.stages.certified import CERTIFICATE
from katagpu.stages.kbuild import TOOLCHAIN, roots
from katagpu.store import Kind

MODULE = "stages.signing"
HASH = "sha512"  # kernel-configs/signing/sign.conf
PLACE = "/katagpu/signing"
MODULES = f"{PLACE}/modules"
FRAGMENTS = "kernel-configs/signing"
# The passphrase, or an empty line, comes on stdin: it is in no file and no command line.
SCRIPT = """\
read -r KBUILD_SIGN_PIN
export KBUILD_SIGN_PIN
program=$1 hash=$2 key=$3 certificate=$4
shift 4
for module; do
    "$program" "$hash" "$key" "$certificate" "$module" </dev/null || exit
done
"""


def signed(found: Sequence[Stage], recipe: Recipe, root: Path) -> list[Stage]:
    """The stages of a recipe that says `sign`; those of others are as they were."""
    if recipe.sign is None:
        return list(found)
    path = root / recipe.sign.cert
    signer = modsig.certificate(path)
    key = Path(recipe.sign.key)
    plain = {"signed_kernel": Ref(stage="kernel", output="modules")}
    if recipe.driver.source is not DriverSource.NONE:
        plain["signed_driver"] = layers.driver_modules(recipe)
    instead = {ref: Ref(stage=name, output="modules") for name, ref in plain.items()}
    made: list[Stage] = []
    for stage in found:
        inputs = {role: instead.get(ref, ref) for role, ref in stage.inputs.items()}
        made.append(_changed(dataclasses.replace(stage, inputs=inputs), recipe, root, path, signer))
        made += [_signing(name, ref, path, key) for name, ref in plain.items()
                 if ref.stage == stage.name]
    return made


def _changed(stage: Stage, recipe: Recipe, root: Path, path: Path,
             signer: modsig.Certificate) -> Stage:
    """A stage that reads the certificate, or speaks of it."""
    assert recipe.sign is not None
    if stage.name == "kernel_config":
        wanted = ["sign.conf", *(["force.conf"] if recipe.sign.force else [])]
        names = {f"{FRAGMENTS}/{name}": root / FRAGMENTS / name for name in wanted}
        fragments = [*stage.options["fragments"], *names]
        return dataclasses.replace(stage, files={**stage.files, **names},
                                   options={**stage.options, "fragments": fragments})
    files = {**stage.files, CERTIFICATE: path}
    if stage.name == "kernel":
        return dataclasses.replace(stage, module=certified.MODULE, files=files,
                                   make=certified.make_kernel,
                                   outputs={**stage.outputs, "sign_file": Kind.FILE})
    if stage.name in ("rootfs", "extension_root"):
        return dataclasses.replace(stage, files=files)
    if stage.name == "manifest":
        about = {"subject": signer.subject, "certificate_sha256": signer.fingerprint,
                 "hash": HASH, "force": recipe.sign.force}
        return dataclasses.replace(stage, options={**stage.options, "module_signing": about})
    return stage


def _signing(name: str, modules: Ref, path: Path, key: Path) -> Stage:
    what = "kernel's" if name == "signed_kernel" else "driver's"
    return Stage(name=name, title=f"the {what} modules, signed", module=MODULE, make=Signing(key),
                 outputs={"modules": Kind.TREE}, options={"hash": HASH},
                 inputs={"modules": modules, "toolchain": TOOLCHAIN,
                         "sign_file": Ref(stage="kernel", output="sign_file")},
                 files={CERTIFICATE: path})


@dataclass(frozen=True)
class Signing:
    """Signs modules with the key in a file, which is no part of any key."""

    key: Path

    def __call__(self, build: Build) -> None:
        """Sign a copy of the modules, and verify each."""
        path = build.file(CERTIFICATE)
        signer = modsig.certificate(path)
        passphrase = signingkey.usable(self.key, signer)
        out = build.directory("out") / "modules"
        shutil.copytree(build.tree("modules"), out, symlinks=True)
        modules = sorted(file for file in out.rglob("*") if file.name.endswith(SUFFIXES)
                         and not file.is_symlink())
        packed = [file.name for file in modules if file.suffix != ".ko"]
        if packed:
            raise StepError(f"{packed[0]} is compressed: a module is signed before that")
        program = build.directory("program") / "sign-file"
        shutil.copy(build.blob("sign_file"), program)
        program.chmod(0o755)
        pem = build.directory("program") / "certificate.pem"
        pem.write_bytes(signer.pem())
        build.enter(
            ["sh", "-c", SCRIPT, "sh", f"{PLACE}/program/{program.name}", build.options["hash"],
             f"{PLACE}/key.pem", f"{PLACE}/program/{pem.name}",
             *(f"{MODULES}/{file.relative_to(out)}" for file in modules)],
            roots(build), stdin=(passphrase or b"") + b"\n",
            binds=[Bind(source=out, target=MODULES, writable=True),
                   Bind(source=program.parent, target=f"{PLACE}/program"),
                   Bind(source=self.key.resolve(), target=f"{PLACE}/key.pem")])
        for file in modules:
            try:
                modsig.verify(file.read_bytes(), signer)
            except modsig.Unsigned as why:
                raise StepError(f"{file.relative_to(out)} {why}, just after it was signed; "
                                f"log: {build.log}") from None
        build.facts.update({"signed": len(modules), "signer": signer.fingerprint})
        build.put_tree("modules", out)


def lacks_key(stages: Sequence[Stage]) -> str | None:
    """Why the key of these stages, which are to be made, cannot be used; None where it can."""
    for stage in stages:
        if isinstance(stage.make, Signing):
            try:
                signingkey.usable(stage.make.key, modsig.certificate(stage.files[CERTIFICATE]))
            except UserError as why:
                return str(why)
    return None
