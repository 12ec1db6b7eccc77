"""A small kernel of the default guest's source, with `sign`: it refuses what is not signed for it.

Compiler, `sign-file`, kernel and machine are real; the guest is one program in an initrd.
"""

from __future__ import annotations

import dataclasses
import io
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
import zstandard
from msgspec.structs import replace

from katagpu import guest, modsig, newc
from katagpu.check import kernelconfig
from katagpu.check.signed import trusted
from katagpu.context import Context
from katagpu.plan import Plan
from katagpu.schema import Sign
from katagpu.tree import EPOCH
from tests.signers import Signer, needs_openssl, openssl_verifies, sign, signer

pytestmark = [needs_openssl, pytest.mark.slow, pytest.mark.timeout(1800), pytest.mark.skipif(
    shutil.which("gcc") is None, reason="needs gcc")]
SMALL = """CONFIG_LOCALVERSION="-signed"
CONFIG_MODULES=y
CONFIG_PRINTK=y
CONFIG_BINFMT_ELF=y
CONFIG_BLK_DEV_INITRD=y
CONFIG_TTY=y
CONFIG_SERIAL_8250=y
CONFIG_SERIAL_8250_CONSOLE=y
CONFIG_PROC_FS=y
CONFIG_SYSFS=y
CONFIG_CRC7=m
CONFIG_CRC4=m
"""
INIT = r"""
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/syscall.h>
#include <unistd.h>

int main(void)
{
    const char *names[] = {"unsigned", "stranger", "changed", "signed", 0};
    char text[64], enforce = '?';

    mount("sysfs", "/sys", "sysfs", 0, "");
    int file = open("/sys/module/module/parameters/sig_enforce", O_RDONLY);
    read(file, &enforce, 1);
    printf("guest: enforce %c\n", enforce);
    for (int i = 0; names[i]; i++) {
        snprintf(text, sizeof text, "/%s.ko", names[i]);
        long status = syscall(SYS_finit_module, open(text, O_RDONLY), "", 0);
        printf("guest: %s %s\n", names[i], status ? strerrorname_np(errno) : "loaded");
    }
    fflush(stdout);
    return 0; /* the kernel panics, and the machine ends */
}
"""


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    """A signer."""
    return signer(tmp_path_factory.mktemp("signer"))


@pytest.fixture(scope="module")
def plan(context: Context, mine: Signer, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """The stages of the default recipe with `sign`, and another configuration."""
    top = tmp_path_factory.mktemp("plan")
    (top / "small.conf").write_text(SMALL)
    recipe = replace(context.recipe, sign=Sign(key=str(mine.key), cert=str(mine.cert), force=True))
    locked = context.locked()
    assert locked is not None, "the default guest is not built: ./doitw build_image"
    stages = guest.stages(recipe, locked, context.root)
    config = stages["kernel_config"]
    files = {name: path for name, path in config.files.items()
             if not name.startswith(("kernel-configs/base/", "kernel-configs/features/"))}
    signing = [name for name in files if name.startswith("kernel-configs/signing/")]
    stages["kernel_config"] = dataclasses.replace(
        config, options={"fragments": ["small.conf", *signing]},
        files={**files, "small.conf": top / "small.conf"})
    return Plan(stages, context.store, top / "logs")


def modules(plan: Plan, stage: str, target: Path) -> dict[str, Path]:
    """The modules of a stage, unpacked, by name."""
    blob = plan.store.blob(plan.ensure(stage).outputs["modules"].blob)
    with blob.open("rb") as stream, zstandard.ZstdDecompressor().stream_reader(stream) as plain, \
            tarfile.open(fileobj=plain, mode="r|") as tar:
        tar.extractall(target, filter="data")
    return {path.name: path for path in target.rglob("*.ko")}


def initrd(target: Path, files: dict[str, bytes]) -> Path:
    """An initrd with programs and modules at its top."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        directory = tarfile.TarInfo("sys")
        directory.type, directory.mode = tarfile.DIRTYPE, 0o755
        tar.addfile(directory)
        for name, data in sorted(files.items()):
            member = tarfile.TarInfo(name)
            member.mode, member.size = 0o755, len(data)
            tar.addfile(member, io.BytesIO(data))
    with target.open("wb") as stream:
        newc.write(lambda: io.BytesIO(packed.getvalue()), stream, time=EPOCH)
    return target


def test_what_a_kernel_with_force_takes(
    context: Context, plan: Plan, mine: Signer, tmp_path: Path,
) -> None:
    with context.store.lease():
        kernel = plan.ensure("kernel")
        config = kernelconfig.read(plan.store.blob(
            plan.ensure("kernel_config").outputs["config"].blob))
        assert config["MODULE_SIG_FORCE"] == "y" and "MODULE_SIG_ALL" not in config
        assert trusted(plan.store.blob(kernel.outputs["vmlinux"].blob)) == mine.certificate.der
        plain = modules(plan, "kernel", tmp_path / "plain")
        signed = modules(plan, "signed_kernel", tmp_path / "signed")
    assert set(plain) == set(signed) == {"crc4.ko", "crc7.ko"}
    for name, path in signed.items():
        assert openssl_verifies(path, mine, tmp_path)
        assert modsig.verify(path.read_bytes(), mine.certificate) == "sha512"
        assert modsig.split(path.read_bytes())[0] == plain[name].read_bytes()
    shutil.copy(plain["crc7.ko"], tmp_path / "stranger.ko")
    sign(tmp_path / "stranger.ko", signer(tmp_path, "stranger"))
    changed = bytearray(signed["crc7.ko"].read_bytes())
    changed[changed.index(b"crc7")] ^= 1
    (tmp_path / "init.c").write_text(INIT)
    subprocess.run(["gcc", "-static", "-D_GNU_SOURCE", "-o", tmp_path / "init",
                    tmp_path / "init.c"], check=True)
    root = initrd(tmp_path / "initrd", {
        "init": (tmp_path / "init").read_bytes(), "unsigned.ko": plain["crc7.ko"].read_bytes(),
        "stranger.ko": (tmp_path / "stranger.ko").read_bytes(), "changed.ko": bytes(changed),
        "signed.ko": signed["crc7.ko"].read_bytes()})
    said = boot(context, plan.store.blob(kernel.outputs["vmlinuz"].blob), root)
    lines = [line for line in said if line.startswith("guest: ")]
    assert lines[:4] == ["guest: enforce Y", "guest: unsigned EKEYREJECTED",
                         "guest: stranger EKEYREJECTED", "guest: changed EKEYREJECTED"], said
    # All that verification finds wrong is EKEYREJECTED to a program. That kernel may lack what else
    # a module needs to start; modules that do are the boot check's matter.
    assert lines[4].startswith("guest: signed ") and "KEY" not in lines[4], said
    assert any("Loading of module with unavailable key is rejected" in line for line in said)
    assert any("Loaded X.509 cert 'Toys: signer:" in line for line in said)


def boot(context: Context, kernel: Path, root: Path) -> list[str]:
    """The lines of a machine's console."""
    with context.store.lease():
        qemu = context.booting.qemu
        done = subprocess.run(
            [*qemu.argv, "-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot",
             "-m", "512", "-cpu", "max", "-kernel", kernel, "-initrd", root,
             "-append", "console=ttyS0 panic=-1"],
            env={"PATH": "/usr/bin", **qemu.env}, capture_output=True, text=True, timeout=600,
            stdin=subprocess.DEVNULL)
    return [*done.stdout.splitlines(), *done.stderr.splitlines()]
