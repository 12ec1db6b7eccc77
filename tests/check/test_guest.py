"""What the agent, the toolkit and the image format need, and what must not be left over."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from katagpu.check import RootFormat, Severity, Toolkit

from .toys import LIB, MODULES, Toy

UNITS = "usr/lib/systemd/system"
HOOK = "usr/share/oci/hooks/prestart/nvidia-container-toolkit.sh"


@pytest.mark.parametrize(("facts", "symbol"), [
    ({}, "EROFS_FS"), ({}, "EROFS_FS_ZIP"), ({}, "EROFS_FS_ZIP_ZSTD"),
    ({"compressor": "lz4hc"}, "EROFS_FS_ZIP"),
    ({"root_format": RootFormat.INITRD}, "RD_ZSTD"),
    ({"root_format": RootFormat.INITRD}, "BLK_DEV_INITRD"),
    ({"root_format": RootFormat.EXT4, "compressor": None}, "EXT4_FS")])
def test_the_kernel_reads_the_image(toy: Toy, facts: dict[str, object], symbol: str) -> None:
    assert toy.ids(**facts) == set()
    config = toy.facts.kernel_config
    config.write_text(config.read_text().replace(f"CONFIG_{symbol}=y", f"CONFIG_{symbol}=m"))
    assert toy.ids(**facts) == {"image-format"}


@pytest.mark.parametrize("symbol", ["BLK_DEV_DM", "DM_INIT", "DM_VERITY", "CRYPTO_SHA256"])
def test_the_kernel_verifies_the_image(toy: Toy, symbol: str) -> None:
    config = toy.facts.kernel_config
    symbols = {"BLK_DEV_DM", "DM_INIT", "DM_VERITY", "CRYPTO_SHA256"}
    with config.open("a") as stream:
        stream.writelines(f"CONFIG_{name}=y\n" for name in sorted(symbols))
    assert toy.ids(verity=True) == set()
    config.write_text(config.read_text().replace(f"CONFIG_{symbol}=y", f"CONFIG_{symbol}=m"))
    assert "image-verity" in toy.ids(verity=True)
    assert "image-verity" not in toy.ids()


def test_a_compressor_that_no_kernel_has(toy: Toy) -> None:
    assert toy.ids(compressor="brotli") == {"image-format"}
    assert toy.ids(compressor="lzma") == {"image-format"}
    assert toy.ids(root_format=RootFormat.EXT4) == {"image-format"}


@pytest.mark.parametrize("path", ["usr/sbin/init", "etc/resolv.conf", "var/run"])
def test_layout_of_files(toy: Toy, path: str) -> None:
    (toy.root / path).unlink()
    assert "guest-layout" in toy.ids()


def test_layout_of_links_and_directories(toy: Toy) -> None:
    resolv = toy.root / "etc/resolv.conf"
    resolv.unlink()
    resolv.symlink_to("/etc/ld.so.conf")
    (toy.root / "sys").rmdir()
    assert [finding.where for finding in toy.find() if finding.check == "guest-layout"] == [
        "/sys", "/etc/resolv.conf"]


@pytest.mark.parametrize("path", ["usr/sbin/mkfs.ext4", "usr/sbin/modprobe", "usr/bin/kmod",
                                  "usr/sbin/ip6tables-restore"])
def test_programs_of_the_agent(toy: Toy, path: str) -> None:
    (toy.root / path).unlink()
    assert "guest-programs" in toy.ids()


@pytest.mark.parametrize("path", [
    "usr/bin/kata-agent", f"{UNITS}/kata-agent.service", f"{UNITS}/kata-containers.target",
    f"{UNITS}/tmp.mount", "etc/systemd/system/basic.target.wants/kata-containers.target",
    "etc/kata-opa/default-policy.rego"])
def test_agent(toy: Toy, path: str) -> None:
    (toy.root / path).unlink()
    assert "guest-agent" in toy.ids()
    assert toy.ids(agent=False) == set()


def test_a_policy_of_another_package(toy: Toy) -> None:
    policy = toy.root / "etc/kata-opa/default-policy.rego"
    policy.rename(policy.with_name("allow-all.rego"))
    policy.symlink_to("allow-all.rego")
    assert toy.ids() == set()
    policy.write_text("# package agent_policy\npackage policy\n")
    assert toy.ids() == {"guest-agent"}


def test_a_unit_that_starts_nothing(toy: Toy) -> None:
    unit = toy.root / UNITS / "nvidia-x.service"
    unit.write_text("[Service]\nExecStartPre=-/usr/bin/gone\nExecStart=/usr/bin/nvidia-smi -L\n")
    assert toy.ids() == set()
    unit.write_text("[Service]\nExecStart=/usr/bin/nvidia-x --all\n")
    assert toy.ids() == {"guest-units"}


def test_a_regular_file_in_dev(toy: Toy) -> None:
    (toy.root / "dev/null").write_text("lost output")
    assert toy.ids() == {"guest-dev"}


def test_cdi(toy: Toy) -> None:
    (toy.root / UNITS / "nvidia-cdi.service").unlink()
    assert toy.ids() == {"toolkit-cdi"}
    script = toy.root / "usr/libexec/refresh"
    script.parent.mkdir()
    script.write_text("#!/bin/sh\nnvidia-ctk --quiet cdi generate --output=/run/cdi/x.yaml\n")
    script.chmod(0o755)
    (toy.root / UNITS / "nvidia-cdi.service").write_text(
        "[Service]\nExecStart=/usr/libexec/refresh\n")
    assert toy.ids() == set()
    (toy.root / "usr/bin/nvidia-cdi-hook").unlink()
    assert toy.ids() == {"toolkit-cdi"}
    assert "toolkit-one-mode" in toy.ids(toolkit=Toolkit.NONE)


def make_hook(toy: Toy) -> Path:
    (toy.root / UNITS / "nvidia-cdi.service").unlink()
    hook = toy.root / HOOK
    hook.parent.mkdir(parents=True)
    hook.write_text("#!/bin/sh\n# not /usr/bin/this\n"
                    "export PATH=/usr/sbin:/usr/bin:/sbin:/bin\n"
                    "/usr/bin/nvidia-container-runtime-hook -config /etc/x \"$@\"\n")
    hook.chmod(0o755)
    for name in ("sh", "nvidia-container-runtime-hook", "nvidia-container-cli"):
        shutil.copy(toy.root / "usr/bin/kmod", toy.root / "usr/bin" / name)
    config = toy.root / "etc/nvidia-container-runtime/config.toml"
    config.parent.mkdir()
    config.write_text('[nvidia-container-runtime]\nmode = "legacy"\n')
    return hook


def test_hook(toy: Toy) -> None:
    hook = make_hook(toy)
    assert toy.ids(toolkit=Toolkit.HOOK) == set()
    assert toy.ids(toolkit=Toolkit.NONE) == {"toolkit-one-mode"}
    hook.chmod(0o644)
    assert toy.ids(toolkit=Toolkit.HOOK) == {"toolkit-hook"}
    hook.rename(hook.with_name("real"))
    assert toy.ids(toolkit=Toolkit.HOOK) == {"toolkit-hook"}
    (hook.with_name("real")).chmod(0o755)
    hook.symlink_to("real")
    assert toy.ids(toolkit=Toolkit.HOOK) == {"toolkit-hook"}


@pytest.mark.parametrize("text", [None, "no = [toml", '[nvidia-container-runtime]\nmode = "cdi"\n',
                                  "nvidia-container-runtime = 1\n"])
def test_the_hook_works_in_mode_legacy_only(toy: Toy, text: str | None) -> None:
    make_hook(toy)
    config = toy.root / "etc/nvidia-container-runtime/config.toml"
    config.unlink()
    if text is not None:
        config.write_text(text)
    assert toy.ids(toolkit=Toolkit.HOOK) == {"toolkit-hook"}


@pytest.mark.parametrize("name", ["sh", "nvidia-container-runtime-hook", "nvidia-container-cli"])
def test_the_hook_has_its_programs(toy: Toy, name: str) -> None:
    make_hook(toy)
    (toy.root / "usr/bin" / name).unlink()
    assert toy.ids(toolkit=Toolkit.HOOK) == {"toolkit-hook"}


def test_both_modes_at_once(toy: Toy) -> None:
    unit = (toy.root / UNITS / "nvidia-cdi.service").read_text()
    make_hook(toy)
    (toy.root / UNITS / "nvidia-cdi.service").write_text(unit)
    assert toy.ids(toolkit=Toolkit.HOOK) == {"toolkit-one-mode"}
    assert toy.ids(toolkit=Toolkit.CDI) == {"toolkit-one-mode"}


def test_dangling_libraries(toy: Toy) -> None:
    (toy.root / LIB / "libdev.so").symlink_to("gone")
    [finding] = toy.find()
    assert (finding.check, finding.severity) == ("left-links", Severity.WARNING)
    (toy.root / LIB / "librun.so.1").symlink_to("gone")
    assert Severity.ERROR in {finding.severity for finding in toy.find()}


@pytest.mark.parametrize(("path", "target", "found"), [
    (f"{MODULES}/build", "/build/linux", True), (f"{MODULES}/source", "../../src/x", True),
    ("etc/x", "/builddir/x", True), ("etc/x", "/home/me/x", True),
    ("etc/mtab", "/proc/mounts", False), ("etc/x", "/usr/bin/kmod", False)])
def test_links_into_the_build(toy: Toy, path: str, target: str, found: bool) -> None:
    (toy.root / path).symlink_to(target)
    assert ("left-build-links" in toy.ids()) is found


def test_caches(toy: Toy) -> None:
    archive = toy.root / "var/cache/apt/archives/x.deb"
    archive.parent.mkdir(parents=True)
    archive.write_bytes(b"x" * 10)
    assert toy.ids() == set()
    archive.write_bytes(b"x" * 2_000_000)
    assert toy.ids() == {"left-caches"}
