"""Kernel modules: each seeded mismatch is found."""

from __future__ import annotations

import lzma
from dataclasses import replace
from pathlib import Path

import pytest
import zstandard

from katagpu import provenance
from katagpu.check import Finding, Severity
from katagpu.check.elf import Damaged
from katagpu.check.kmod import SIGNATURE, index_keys, read_module

from .toys import MODULES, NVIDIA, RELEASE, UVM, Toy, depmod, index, module

MODULE = f"{MODULES}/updates/nvidia.ko"


def about(toy: Toy, check: str) -> list[Finding]:
    return [finding for finding in toy.find() if finding.check == check]


@pytest.mark.parametrize("vermagic", [
    "6.12.2-toy SMP preempt mod_unload modversions ", f"{RELEASE} SMP mod_unload modversions ", ""])
def test_vermagic(toy: Toy, vermagic: str) -> None:
    toy.module(replace(NVIDIA, vermagic=vermagic))
    [finding] = about(toy, "module-vermagic")
    assert finding.where == f"/{MODULE}"


def test_vermagic_with_another_layout_seed(toy: Toy) -> None:
    toy.module(replace(NVIDIA, vermagic=f"{NVIDIA.vermagic}RANDSTRUCT_aa"))
    assert toy.ids() == {"module-vermagic"}
    toy.module(replace(UVM, vermagic=f"{UVM.vermagic}RANDSTRUCT_aa"))
    assert toy.ids() == set()


@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize("symbol", ["module_layout", "_printk"])
def test_a_crc_of_another_kernel(toy: Toy, extended: bool, symbol: str) -> None:
    toy.module(replace(NVIDIA, extended=extended))
    assert toy.ids() == set()
    versions = {**(NVIDIA.versions or {}), symbol: 0xBAD}
    toy.module(replace(NVIDIA, extended=extended, versions=versions))
    [finding] = about(toy, "module-crc")
    assert symbol in finding.what


def test_a_crc_of_another_build_of_the_sibling(toy: Toy) -> None:
    toy.module(replace(UVM, versions={**(UVM.versions or {}), "nv_open": 0xBAD}))
    [finding] = about(toy, "module-crc")
    assert "nv_open" in finding.what


def test_no_versions_at_all_and_one_missing(toy: Toy) -> None:
    toy.module(replace(NVIDIA, versions=None))
    assert "module-crc" in toy.ids()
    toy.module(replace(NVIDIA, versions={"module_layout": 0x11111111}))
    [finding] = about(toy, "module-crc")
    assert "_printk" in finding.what


def without_modversions(toy: Toy) -> None:
    """Take MODVERSIONS out of the kernel and out of the modules."""
    config = toy.facts.kernel_config
    config.write_text(config.read_text().replace("CONFIG_MODVERSIONS=y\n", ""))
    for toy_module in (NVIDIA, UVM):
        plain = toy_module.vermagic.replace("modversions ", "")
        toy.module(replace(toy_module, vermagic=plain, versions=None))


def record_headers(toy: Toy) -> Path:
    """The record of this kernel's headers, beside the driver's modules."""
    place = toy.root / MODULES / "driver-headers"
    place.write_text(provenance.of(toy.facts.kernel_config, toy.facts.symvers))
    return place


def test_without_modversions_the_build_id_binds(toy: Toy) -> None:
    without_modversions(toy)
    record_headers(toy)
    assert toy.ids(kernel_build_id="ab12") == {"module-build-id"}
    record = toy.root / MODULES / "kernel-build-id"
    record.write_text("ab12\n")
    assert toy.ids(kernel_build_id="ab12") == set()
    assert toy.ids(kernel_build_id="cd34") == {"module-build-id"}


def test_a_driver_compiled_for_another_configuration_of_the_same_release(toy: Toy) -> None:
    without_modversions(toy)
    (toy.root / MODULES / "kernel-build-id").write_text("ab12\n")
    own = {"kernel_build_id": "ab12"}
    assert toy.ids(**own) == {"module-headers"}  # nothing is recorded
    record = record_headers(toy)
    assert toy.ids(**own) == set()
    record.write_text("of another form\n")
    assert toy.ids(**own) == {"module-headers"}
    record_headers(toy)
    toy.configure("CONFIG_NUMA=y")  # the image's kernel is another one
    [finding] = toy.find(**own)
    assert finding.check == "module-headers" and "another configuration" in finding.what
    assert finding.where == f"/lib/modules/{RELEASE}/driver-headers"


def test_a_driver_compiled_for_a_kernel_with_other_exports(toy: Toy) -> None:
    record_headers(toy)
    assert toy.ids() == set()
    with toy.facts.symvers.open("a") as stream:
        stream.write("0x00000001\tmore\tvmlinux\tEXPORT_SYMBOL\t\n")
    [finding] = toy.find()
    assert finding.check == "module-headers" and "another Module.symvers" in finding.what


def test_a_guest_without_driver_needs_no_record_of_one(toy: Toy) -> None:
    without_modversions(toy)
    (toy.root / MODULES / "kernel-build-id").write_text("ab12\n")
    for path in (toy.root / MODULES / "updates").iterdir():
        path.unlink()
    assert "module-headers" not in toy.ids(kernel_build_id="ab12", driver=None)


def test_a_symbol_that_nothing_exports(toy: Toy) -> None:
    toy.module(replace(NVIDIA, uses=("_printk", "gone"), versions={
        **(NVIDIA.versions or {}), "gone": 1}))
    [finding] = about(toy, "module-symbols")
    assert "gone" in finding.what


def test_a_symbol_of_a_module_that_was_left_out(toy: Toy) -> None:
    with toy.facts.symvers.open("a") as stream:
        stream.write("0x00000001\tgone\tdrivers/x/left-out\tEXPORT_SYMBOL\t\n")
    toy.module(replace(NVIDIA, uses=("_printk", "gone"), versions={
        **(NVIDIA.versions or {}), "gone": 1}))
    [finding] = about(toy, "module-symbols")
    assert "left_out" in finding.cure


def test_a_closed_module_that_uses_a_gpl_symbol(toy: Toy) -> None:
    uses = {"uses": ("_printk", "gpl_thing"),
            "versions": {**(NVIDIA.versions or {}), "gpl_thing": 0x33333333}}
    toy.module(replace(NVIDIA, **uses))  # type: ignore[arg-type]
    assert toy.ids() == set()
    toy.module(replace(NVIDIA, license="NVIDIA", **uses))  # type: ignore[arg-type]
    assert "module-symbols" in toy.ids()


def test_names(toy: Toy) -> None:
    toy.module(replace(NVIDIA, own_name="nvidia_current"))
    assert "module-name" in toy.ids()
    toy.module(NVIDIA)
    module(toy.root / MODULES / "kernel/nvidia.ko", NVIDIA)
    depmod(toy.root)
    assert "module-name" in toy.ids()


def test_what_is_no_module(toy: Toy) -> None:
    (toy.root / MODULE).write_bytes((toy.root / "usr/bin/kmod").read_bytes())
    [finding] = about(toy, "module-readable")
    assert "ET_DYN" in finding.what
    (toy.root / MODULE).write_bytes(b"")
    assert "module-readable" in toy.ids()


def test_compressed_modules(toy: Toy) -> None:
    path = toy.root / MODULE
    data = path.read_bytes()
    path.unlink()
    for suffix, packed in ((".xz", lzma.compress(data)), (".zst", zstandard.compress(data))):
        file = path.with_name(f"nvidia.ko{suffix}")
        file.write_bytes(packed)
        depmod(toy.root)
        assert "module-readable" not in toy.ids()
        assert read_module(file, "/nvidia.ko").fact("version") == NVIDIA.version
        file.write_bytes(packed[:-20])
        assert "module-readable" in toy.ids()
        file.unlink()


def test_signatures(toy: Toy) -> None:
    toy.configure("CONFIG_MODULE_SIG_FORCE=y")
    assert toy.ids() == {"module-signature"}
    for name in ("nvidia", "nvidia-uvm"):
        with (toy.root / MODULES / f"updates/{name}.ko").open("ab") as stream:
            stream.write(b"signature" + SIGNATURE)
    assert toy.ids() == set()


def test_modules_of_another_kernel(toy: Toy) -> None:
    (toy.root / "usr/lib/modules/6.1.0-other").mkdir()
    [finding] = about(toy, "module-other-kernel")
    assert finding.severity is Severity.WARNING


def test_modules_dep_is_complete(toy: Toy) -> None:
    module(toy.root / MODULES / "kernel/extra.ko", replace(NVIDIA, name="extra", exports={}))
    assert "depmod-complete" in toy.ids()
    depmod(toy.root)
    assert toy.ids() == set()
    (toy.root / MODULES / "kernel/extra.ko").unlink()
    assert "depmod-complete" in toy.ids()
    (toy.root / MODULES / "modules.dep").unlink()
    assert "depmod-complete" in toy.ids()


def test_modules_builtin_is_there(toy: Toy) -> None:
    (toy.root / MODULES / "modules.builtin").unlink()
    assert toy.ids() == {"depmod-complete"}


def test_the_closure_is_what_modules_say(toy: Toy) -> None:
    dep = toy.root / MODULES / "modules.dep"
    dep.write_text(dep.read_text().replace("uvm.ko: updates/nvidia.ko", "uvm.ko:"))
    [finding] = about(toy, "depmod-closure")
    assert "lacks nvidia" in finding.what


@pytest.mark.parametrize("name", ["modules.dep.bin", "modules.alias.bin"])
def test_a_stale_index(toy: Toy, name: str) -> None:
    path = toy.root / MODULES / name
    path.write_bytes(index({"other": "x"}))
    assert toy.ids() == {"depmod-index"}
    path.write_bytes(b"nonsense nonsense")
    assert toy.ids() == {"depmod-index"}
    path.unlink()
    assert toy.ids() == {"depmod-index"}


def test_an_alias_that_depmod_has_not_seen(toy: Toy) -> None:
    toy.module(replace(NVIDIA, aliases=("pci:v000010DEd*sv*sd*bc03sc00i00*", *NVIDIA.aliases)))
    assert toy.ids() == {"depmod-alias"}


@pytest.mark.parametrize(("line", "found"), [
    ("alias nvidia nvidia-current", True), ("blacklist nvidia", True),
    ("install nvidia-uvm /bin/true", True), ("alias nvidia nvidia", False),
    ("# alias nvidia off", False), ("blacklist nouveau", False), ("blacklist nvidia_drm", False),
    ("options nvidia NVreg_X=1", False)])
def test_modprobe_configuration(toy: Toy, line: str, found: bool) -> None:
    directory = toy.root / "usr/lib/modprobe.d"
    directory.mkdir()
    (directory / "nvidia.conf").write_text(f"{line}\n")
    assert ("modprobe-nvidia" in toy.ids()) is found
    (toy.root / "etc/modprobe.d").mkdir()
    (toy.root / "etc/modprobe.d/nvidia.conf").write_text("# hides the other\n")
    assert toy.ids() == set()


def test_modprobe_without_the_module(toy: Toy) -> None:
    (toy.root / MODULES / "updates/nvidia-uvm.ko").unlink()
    depmod(toy.root)
    assert toy.ids() == {"modprobe-nvidia"}


def test_an_index_written_by_depmod() -> None:
    # kmod 34.2: depmod's modules.dep.bin for the toy's two modules
    data = bytes.fromhex(REAL_INDEX)
    assert index_keys(data) == {"nvidia", "nvidia_uvm"}
    for size in range(len(data)):
        with pytest.raises(Damaged):
            index_keys(data[:size])


REAL_INDEX = (
    "b007f457000200012000000c6e6ee00000127669646961005f5fc00000390000000100000001757064617465"
    "732f6e76696469612e6b6f3a0075766d000000000100000000757064617465732f6e76696469612d75766d2e"
    "6b6f3a20757064617465732f6e76696469612e6b6f00")


def test_read_module_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(Damaged):
        read_module(tmp_path / "none.ko", "/none.ko")
