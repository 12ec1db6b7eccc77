"""What a run of NVIDIA's installer came to: one test for each class of outcome.

Logs come from the program that stands for the installer, run on a toy package in the product's
sandbox; where it cannot produce one, they are excerpts in the real one's words.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from katagpu import nvoutcome, sandbox
from katagpu.errors import StepError, UserError
from katagpu.nvcauses import CAUSES, Kind
from katagpu.nvoutcome import Outcome, Verdict, judge, judge_modules, lines
from katagpu.sandbox import Bind
from katagpu.schema import KernelModule
from tests.nvrun.machine import RELEASE, Machine

OPEN, CLOSED = KernelModule.OPEN, KernelModule.CLOSED
BASE = ("--silent", f"--kernel-name={RELEASE}", "--no-systemd")
WITHOUT = (*BASE, "--no-kernel-modules")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """A package and a root."""
    yield Machine(place=tmp_path / "machine")
    sandbox.remove(tmp_path)


def run(machine: Machine, *options: str, **more: Any) -> Verdict:
    """The verdict on a run."""
    return judge(machine.run(*(options or BASE), **more))


def said(log: str = "", *, status: int | None = 1, output: str = "", version: str = "550.163.01",
         release: str = "6.12.117", flavour: KernelModule = CLOSED) -> Outcome:
    """An outcome made of an excerpt."""
    return Outcome(status=status, log=log, said=output, version=version, release=release,
                   flavour=flavour, seconds=1800)


# success


def test_success_is_status_0_with_both_marks_and_no_error(machine: Machine) -> None:
    outcome = machine.run(*BASE)
    assert judge(outcome) == Verdict(
        kind=Kind.INSTALLED, sentence=f"driver 550.163.01 is installed for {RELEASE}")
    for mark in nvoutcome.MARKS:
        less = replace(outcome, log=outcome.log.replace(mark, ""))
        assert judge(less).kind is Kind.UNPROVEN
    assert judge(replace(outcome, log=f"{outcome.log}ERROR: anything\n")).kind is Kind.ERRORS
    assert judge(replace(outcome, said="ERROR: anything\n")).kind is Kind.ERRORS


def test_without_proc_it_installs_too(machine: Machine) -> None:
    assert run(machine, *WITHOUT, "--proc-mount-point=/nowhere").ok


def test_modules_must_be_there_and_be_for_the_kernel() -> None:
    good = {"nvidia": f"{RELEASE} SMP mod_unload", "nvidia-uvm": f"{RELEASE} SMP mod_unload"}
    assert judge_modules(["nvidia", "nvidia-uvm"], good, RELEASE).ok
    assert "left no kernel modules" in judge_modules(["nvidia"], {}, RELEASE).sentence
    assert "left no nvidia-uvm" in judge_modules(
        ["nvidia", "nvidia-uvm"], {"nvidia": RELEASE}, RELEASE).sentence
    foreign = judge_modules(["nvidia"], {"nvidia": "6.1.0-toy2 SMP"}, RELEASE)
    assert foreign.lines == ("nvidia: 6.1.0-toy2 SMP",) and not foreign.ok


# status 0 that is none


def test_0_with_errors(machine: Machine) -> None:
    (machine.package / "misbehave").write_text("errors\n")
    outcome = machine.run(*WITHOUT)
    assert outcome.status == 0
    assert all(mark in outcome.log for mark in nvoutcome.MARKS)
    verdict = judge(outcome)
    assert verdict.kind is Kind.ERRORS
    assert verdict.sentence == ("the installer ended with status 0 in spite of errors: Failed to "
                                "execute `/sbin/ldconfig`: Aborted")
    assert any("(Answer: Continue installation)" in line for line in verdict.lines)


def test_0_without_marks(machine: Machine) -> None:
    (machine.package / "misbehave").write_text("no-markers\n")
    verdict = run(machine, *WITHOUT)
    assert verdict.kind is Kind.UNPROVEN and "its log breaks off" in verdict.sentence
    assert verdict.lines[-1] == "-> Driver file installation is complete."


def test_0_and_nothing_was_installed(machine: Machine) -> None:
    (machine.package / "misbehave").write_text("nothing\n")
    assert run(machine).kind is Kind.UNPROVEN
    assert machine.written() == set()


def test_0_with_marks_and_nothing_was_installed(machine: Machine) -> None:
    (machine.package / "misbehave").write_text("markers-only\n")
    assert run(machine).ok, "the log alone cannot tell"
    assert not judge_modules(["nvidia"], machine.built(), RELEASE).ok


def test_0_without_a_log(machine: Machine) -> None:
    outcome = machine.run(*WITHOUT, "--log-file-name=/no/such/directory/log")
    assert outcome.status == 0 and outcome.log == ""
    assert "Error opening log file" in outcome.said
    verdict = judge(outcome)
    assert verdict.kind is Kind.UNPROVEN and "wrote no log" in verdict.sentence


def test_0_and_a_file_of_the_package_is_missing(machine: Machine) -> None:
    (machine.package / "firmware/gsp_ga10x.bin").unlink()
    outcome = machine.run(*WITHOUT)
    assert outcome.status == 0 and "is now complete." in outcome.log
    verdict = judge(outcome)
    assert verdict.kind is Kind.PACKAGE
    assert "the package lacks firmware/gsp_ga10x.bin" in verdict.sentence


def test_0_and_a_directory_was_read_only(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "firmware").mkdir()
    machine.binds.append(Bind(source=tmp_path / "firmware", target="/usr/lib/firmware"))
    outcome = machine.run(*WITHOUT)
    assert outcome.status == 0
    assert "ERROR: Unable to create '/lib/firmware/nvidia/" in outcome.log
    verdict = judge(outcome)
    assert verdict.kind is Kind.READ_ONLY and "Read-only file system" in "".join(verdict.lines)


def test_0_and_systemd_could_not_be_told(machine: Machine) -> None:
    machine.program("systemctl", "echo 'System has not been booted with systemd'; exit 1")
    options = [word for word in WITHOUT if word != "--no-systemd"]
    outcome = machine.run(*options)
    assert outcome.status == 0 and "is now complete." in outcome.log
    assert judge(outcome).kind is Kind.SYSTEMD
    assert "/usr/lib/systemd/system/nvidia-suspend.service" in machine.written()


# status 1, by what a user can mend


def test_an_unknown_option(machine: Machine) -> None:
    (machine.package / "installer-generation").write_text("535.216.01")
    outcome = machine.run(*BASE, "--kernel-module-type=open")
    assert outcome.status == 1 and outcome.log == ""
    verdict = judge(outcome)
    assert verdict.kind is Kind.OPTION
    assert verdict.sentence == \
        "the installer does not know the option --kernel-module-type=open"


@pytest.mark.parametrize(("tool", "package"), [("cc", "gcc"), ("make", "make"),
                                               ("ld", "binutils")])
def test_a_tool_for_the_build_is_missing(machine: Machine, tool: str, package: str) -> None:
    machine.hide(tool)
    verdict = run(machine)
    assert verdict.kind is Kind.TOOL and verdict.mends
    assert f"the program {tool} is not in the root" in verdict.sentence
    assert f"add {package} to rootfs.extra_packages" in str(verdict.cure)
    assert f'EXTRA_PKGS="{package}"' in str(verdict.cure)
    assert run(machine, *WITHOUT).ok, "it is not needed where katagpu builds the modules"


@pytest.mark.parametrize("tool", ["modprobe", "depmod"])
def test_kmod_is_missing(machine: Machine, tool: str) -> None:
    machine.hide(tool)
    verdict = run(machine, *WITHOUT)
    assert verdict.kind is Kind.TOOL and "kmod" in str(verdict.cure)


def test_a_system_tool_is_missing(machine: Machine) -> None:
    machine.hide("dmesg")
    verdict = run(machine, *WITHOUT)
    assert verdict.kind is Kind.TOOL and "util-linux" in str(verdict.cure)


def test_headers_of_the_c_library_are_missing() -> None:
    verdict = judge(said("ERROR: You do not appear to have libc header files installed on your "
                         "system.  Please install your distribution's libc development package."))
    assert verdict.kind is Kind.TOOL and "libc6-dev" in str(verdict.cure)


def test_another_kernel_than_the_headers_are_for(machine: Machine) -> None:
    verdict = run(machine, "--silent", "--kernel-name=6.2.0-wrong", "--no-systemd")
    assert verdict.kind is Kind.HEADERS
    assert f"there are no headers of kernel {RELEASE}" in verdict.sentence
    assert any("currently running kernel" in line for line in verdict.lines)


def test_headers_are_half_there(machine: Machine) -> None:
    (machine.headers / "include/linux/kernel.h").unlink()
    verdict = run(machine)
    assert verdict.kind is Kind.HEADERS and "are incomplete" in verdict.sentence
    assert f"/lib/modules/{RELEASE}/build/include/linux/kernel.h" in verdict.sentence


def test_headers_that_were_never_configured(machine: Machine) -> None:
    (machine.headers / "include/linux/version.h").unlink()
    verdict = run(machine)
    assert verdict.kind is Kind.HEADERS and "was never configured" in verdict.sentence


def test_a_headers_directory_that_is_not_there(machine: Machine) -> None:
    verdict = run(machine, *BASE, "--kernel-source-path=/usr/src/nowhere")
    assert verdict.kind is Kind.HEADERS and "/usr/src/nowhere" in verdict.sentence


def test_the_package_lacks_the_directory_of_the_modules(machine: Machine) -> None:
    verdict = run(machine, *BASE, "--kernel-module-build-directory=kernel-none")
    assert verdict.kind is Kind.TOOLCHAIN and "is not in the package" in verdict.sentence


def test_the_package_lacks_the_flavour(machine: Machine) -> None:
    (machine.package / "installer-generation").write_text("570.207")
    sandbox.remove(machine.package / "kernel-open")
    verdict = run(machine, *BASE, "--kernel-module-type=open", flavour=OPEN)
    assert verdict.kind is Kind.FLAVOUR
    assert "has no open kernel modules" in verdict.sentence


def test_the_compiler_does_not_work(machine: Machine) -> None:
    verdict = run(machine, *BASE, env={"CC": "gcc-none"})
    assert verdict.kind is Kind.TOOLCHAIN and "the compiler in the root" in verdict.sentence


def test_a_kernel_that_the_driver_refuses(machine: Machine) -> None:
    (machine.headers / "include/config/PREEMPT_RT").write_text("")
    verdict = run(machine)
    assert verdict.kind is Kind.CONFIG and "(PREEMPT_RT)" in verdict.sentence


def test_the_kernel_has_another_api(machine: Machine) -> None:
    (machine.headers / "include/linux/kernel.h").write_text("int toy_resize(int, int, int);\n")
    verdict = run(machine)
    assert verdict.kind is Kind.KERNEL and not verdict.mends
    assert verdict.sentence.startswith(
        f"driver 550.163.01 does not compile against kernel {RELEASE}: nvidia/nv.c:")
    assert "too few arguments to function" in verdict.sentence
    assert "patches/driver-closed" in str(verdict.cure)
    assert not [line for line in verdict.lines if "naked return" in line]
    assert any("was not created" in line for line in verdict.lines)


def test_pci_resize_resource_is_the_known_one() -> None:
    verdict = judge(said("   /package/kernel-open/nvidia/nv-pci.c:237:9: error: too few arguments "
                         "to function 'pci_resize_resource'\n"
                         "ERROR: The nvidia kernel module was not created.\n", flavour=OPEN))
    assert verdict.kind is Kind.KERNEL
    assert "is too old for kernel 6.12.117: pci_resize_resource()" in verdict.sentence
    assert "patches/driver-open" in str(verdict.cure)


def test_a_known_limit_is_named() -> None:
    verdict = judge(said("   nv.c:1:2: error: implicit declaration of function 'page_pgmap'\n",
                         release="6.15.2"))
    assert "known: as far as 550.163.01 the branch fails on 6.15" in verdict.sentence


def test_the_first_compiler_error_decides() -> None:
    verdict = judge(said("   a.c:1:10: fatal error: drm/drm_gone.h: No such file or directory\n"
                         "   b.c:2:2: error: implicit declaration of function 'f'\n"))
    assert verdict.kind is Kind.HEADERS and "drm/drm_gone.h" in verdict.sentence


def test_another_error_of_the_compiler(machine: Machine) -> None:
    machine.source("#error This is no kernel for us\n")
    verdict = run(machine)
    assert verdict.kind is Kind.COMPILE
    assert "#error This is no kernel for us" in verdict.sentence


def test_a_module_that_was_not_built_for_no_known_reason(machine: Machine) -> None:
    (machine.package / "kernel/Makefile").write_text("modules clean:\n\t@true\n")
    verdict = run(machine)
    assert verdict.kind is Kind.COMPILE
    assert "nvidia was not built, and no compiler error says why" in verdict.sentence


def test_no_space_in_tmp_while_building() -> None:
    verdict = judge(said("   nv.c:9:1: fatal error: error writing to /tmp/ccX1.s: No space left on "
                         "device\nERROR: The nvidia kernel module was not created.\n"))
    assert verdict.kind is Kind.SPACE and verdict.mends


def test_no_memory_while_building() -> None:
    verdict = judge(said("   gcc: fatal error: Killed signal terminated program cc1\n"))
    assert verdict.kind is Kind.MEMORY


def test_a_symbol_for_gpl_modules_only() -> None:
    verdict = judge(said("   ERROR: modpost: GPL-incompatible module nvidia.ko uses GPL-only "
                         "symbol 'rcu_read_unlock'\n"))
    assert verdict.kind is Kind.KERNEL
    assert "take driver.kernel_module: open" in str(verdict.cure)


def test_a_symbol_that_the_kernel_does_not_export() -> None:
    verdict = judge(said('   ERROR: modpost: "drm_open" [/package/kernel/nvidia-drm.ko] '
                         'undefined!\n'))
    assert verdict.kind is Kind.CONFIG and "does not export drm_open" in verdict.sentence


def test_another_compiler_than_the_kernels() -> None:
    verdict = judge(said("   gcc: error: unrecognized command-line option '-fmin-function-alignment"
                         "=16'; did you mean '-x'?\n"))
    assert verdict.kind is Kind.TOOLCHAIN
    assert "-fmin-function-alignment=16" in verdict.sentence


def test_dev_null_is_a_file() -> None:
    verdict = judge(said("   conftest.h:1:5: error: missing binary operator before token \"(\"\n"
                         "ERROR: The nvidia kernel module was not created.\n"))
    assert verdict.kind is Kind.TOOLCHAIN and "/dev/null" in verdict.sentence


def test_a_module_is_loaded_in_the_build_host(machine: Machine) -> None:
    machine.program("lsmod", "echo 'nvidia_uvm  4096  0'")
    machine.program("rmmod", 'echo "$@" >> /rmmod-was-called')
    verdict = run(machine)
    assert verdict.kind is Kind.LOADED and "nvidia-uvm loaded" in verdict.sentence
    assert machine.file("/rmmod-was-called").read_text() == "nvidia-uvm\n"
    assert run(machine, *WITHOUT).ok, "not looked at where katagpu builds the modules"
    assert machine.file("/rmmod-was-called").read_text() == "nvidia-uvm\n"


FAKE_GPU = """mount -t tmpfs none /sys/bus/pci 2>/dev/null || exit 99
mkdir -p /sys/bus/pci/devices/0000:01:00.0 /sys/bus/pci/drivers/nouveau
cd /sys/bus/pci/devices/0000:01:00.0
echo 0x10de > vendor; echo 0x030200 > class; ln -s ../../drivers/nouveau driver; cd /package"""


def test_nouveau_has_a_gpu_of_the_build_host(machine: Machine) -> None:
    outcome = machine.run(*BASE, setup=FAKE_GPU)
    if outcome.status == 99:
        pytest.skip("no /sys/bus/pci here")
    assert judge(outcome).kind is Kind.NOUVEAU
    assert "/etc/modprobe.d/nvidia-installer-disable-nouveau.conf" in machine.written()
    assert run(machine, *BASE, "--no-nouveau-check", setup=FAKE_GPU).ok


def test_an_x_server_runs(machine: Machine) -> None:
    lock = "echo 1 > /tmp/.X0-lock"
    verdict = run(machine, *WITHOUT, setup=lock)
    assert verdict.kind is Kind.X_SERVER
    assert run(machine, *WITHOUT, "--no-x-check", setup=lock).ok
    assert run(machine, *WITHOUT, setup="echo 99999 > /tmp/.X0-lock").ok, "that process is gone"


def test_another_driver_is_in_the_root(machine: Machine) -> None:
    (machine.layers[1] / "lib/nvidia").mkdir(parents=True)
    (machine.layers[1] / "lib/nvidia/alternate-install-present").touch()
    verdict = run(machine, *WITHOUT)
    assert verdict.kind is Kind.ALTERNATE and "alternate-install-present" in verdict.sentence
    assert run(machine, *WITHOUT, "--no-check-for-alternate-installs").ok


def test_the_hosts_modprobe_path() -> None:
    verdict = judge(said("ERROR: The path to the `modprobe` utility reported by "
                         "'/proc/sys/kernel/modprobe', `/run/current-system/sw/bin/modprobe`, "
                         "differs from the path determined by `nvidia-installer`, "
                         "`/usr/bin/kmod`, and does not appear to point to a valid `modprobe` "
                         "binary.  Please correct the path in '/proc/sys/kernel/modprobe'.\n"))
    assert verdict.kind is Kind.MODPROBE and "kernel.modprobe=" in str(verdict.cure)


def test_modules_of_the_hosts_own_release(machine: Machine) -> None:
    (machine.package / "installer-generation").write_text("510.54")
    machine.program("uname", f'[ "$1" != -r ] || {{ echo {RELEASE}; exit; }}; exec /bin/uname "$@"')
    machine.program("insmod", "exit 1")
    verdict = run(machine)
    assert verdict.kind is Kind.LOAD and "nvidia.ko" in verdict.sentence
    (machine.package / "installer-generation").write_text("550.144.03")
    assert run(machine, *BASE, "--skip-module-load").ok


def test_a_part_of_libglvnd() -> None:
    verdict = judge(said("-> An incomplete installation of libglvnd was found. Do you want to "
                         "install a full copy of libglvnd? This will overwrite any existing "
                         "libglvnd libraries. (Answer: Abort installation.)\n"))
    assert verdict.kind is Kind.GLVND


def test_dkms_has_it_already() -> None:
    verdict = judge(said("ERROR: DKMS kernel modules with version 550.163.01 are already installed "
                         "for the 6.12.117 kernel.\n"))
    assert verdict.kind is Kind.DKMS


def test_the_package_has_no_manifest(machine: Machine) -> None:
    (machine.package / ".manifest").unlink()
    verdict = run(machine)
    assert verdict.kind is Kind.PACKAGE and "no .manifest" in verdict.sentence


def test_a_manifest_that_its_installer_does_not_know(machine: Machine) -> None:
    machine.manifest("libnew.so 0755 NEW_KIND_OF_LIB NATIVE")
    verdict = run(machine)
    assert verdict.kind is Kind.PACKAGE
    assert verdict.sentence.startswith("line 29 of the package's .manifest")


def test_without_root() -> None:
    assert judge(said("ERROR: nvidia-installer must be run as root\n")).kind is Kind.PRIVILEGE


def test_a_question_of_which_nothing_is_known() -> None:
    verdict = judge(said("-> Is it full moon? (Answer: Abort installation)\n"
                         "ERROR: Installation has failed.  Please see the file '/var/log/x'\n"))
    assert verdict.kind is Kind.ABORTED and "Is it full moon?" in verdict.sentence


def test_an_error_of_which_nothing_is_known() -> None:
    verdict = judge(said("ERROR: Something new.\nERROR: Installation has failed.  Please\n"))
    assert verdict.kind is Kind.UNKNOWN
    assert verdict.sentence == "the installer failed: Something new."


def test_it_says_nothing_at_all() -> None:
    assert judge(said("-> last words\n")).lines == ("-> last words",)


# other statuses


def test_2_is_a_damaged_archive() -> None:
    verdict = judge(said(status=2, output="Error in checksums 123 456"))
    assert verdict.kind is Kind.ARCHIVE and verdict.mends
    assert verdict.lines == ("Error in checksums 123 456",)


def test_15_is_an_archive_that_was_not_unpacked() -> None:
    assert judge(said(status=15)).kind is Kind.UNPACK


@needs_root
def test_135_is_a_full_disk(machine: Machine) -> None:
    (machine.package / "firmware/gsp_ga10x.bin").write_bytes(b"1" * 3_000_000)
    outcome = machine.run(*WITHOUT, setup="mkdir -p /usr/lib/firmware; mount -t tmpfs -o size=1m "
                                          "none /usr/lib/firmware || exit 99")
    assert outcome.status == 135
    assert "ERROR" not in outcome.log and "Received signal SIGBUS; aborting." in outcome.said
    verdict = judge(outcome)
    assert verdict.kind is Kind.SPACE and verdict.mends


def test_135_in_the_middle_of_the_files(machine: Machine) -> None:
    (machine.package / "misbehave").write_text("sigbus\n")
    assert run(machine, *WITHOUT).kind is Kind.SPACE
    assert machine.written(), "half installed"


def test_143_is_sigterm(machine: Machine) -> None:
    (machine.package / "misbehave").write_text("sigterm\n")
    outcome = machine.run(*WITHOUT)
    assert outcome.status == 143
    assert judge(outcome).kind is Kind.UNPACK
    assert judge(replace(outcome, status=-15)).sentence == judge(outcome).sentence


def test_137_is_memory_and_other_signals_have_their_names() -> None:
    assert judge(said(status=137)).kind is Kind.MEMORY
    verdict = judge(said(status=139))
    assert verdict.kind is Kind.SIGNAL and "SIGSEGV" in verdict.sentence


def test_127_is_an_installer_that_cannot_be_started(machine: Machine) -> None:
    (machine.package / "nvidia-installer").unlink()
    assert run(machine).kind is Kind.START


def test_a_status_that_it_never_has() -> None:
    assert judge(said(status=77)).kind is Kind.UNKNOWN


def test_a_hang(machine: Machine) -> None:
    (machine.package / "misbehave").write_text("hang\n")
    verdict = run(machine, *WITHOUT, timeout=3)
    assert verdict.kind is Kind.HANG and "did not end within 3 s" in verdict.sentence
    assert verdict.lines[-1] == "-> Searching for conflicting files:"


# what is shown


def test_tens_of_thousands_of_lines_are_not_shown() -> None:
    noise = "   nvidia.o: warning: objtool: _nv1+0x1: 'naked return' found in RETHUNK build\n"
    text = noise * 40_000 + "   a.c:1:1: error: first\n" + "".join(
        f"   a.c:{number}:1: error: later\n" for number in range(100)) + "ERROR: The end\n"
    found = lines(text)
    assert len(found) == nvoutcome.SHOWN + 1
    assert found[0] == "a.c:1:1: error: first" and found[-1] == "ERROR: The end"
    assert "… 90 more …" in found
    assert all(len(line) <= nvoutcome.WIDTH for line in lines("ERROR: " + "x" * 5000))


def test_an_error_has_sentence_lines_and_cure() -> None:
    verdict = judge(said("ERROR: Unable to find the development tool `cc` in your path;\n"))
    error = verdict.error()
    assert isinstance(error, UserError)
    assert str(error).splitlines() == [
        "the program cc is not in the root in which the driver is installed",
        "    ERROR: Unable to find the development tool `cc` in your path;",
        '  hint: add gcc to rootfs.extra_packages in the recipe, or build with EXTRA_PKGS="gcc"']
    assert isinstance(judge(said("   a.c:1:1: error: #error no\n")).error(), StepError)


def test_every_class_is_tested(repository: Path) -> None:
    text = (repository / "tests/test_nvoutcome.py").read_text()
    missing = [kind.name for kind in {cause.kind for cause in CAUSES}
               if f"Kind.{kind.name}" not in text]
    assert not missing


def test_the_documentation_has_every_class(repository: Path) -> None:
    text = (repository / "docs" / "driver.md").read_text()
    assert not [str(kind) for kind in Kind if f"| {kind} |" not in text]
