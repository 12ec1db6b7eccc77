"""Which options NVIDIA's installer is given, for each generation of it, and what they achieve."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from katagpu import nvoutcome, sandbox
from katagpu.errors import StepError, UserError
from katagpu.nvcauses import Kind
from katagpu.nvinstaller import HELP, WANTED, Request, command, left_out, supported
from katagpu.schema import KernelModule
from tests import fakehost
from tests.nvrun.machine import LOG, MODULES, RELEASE, VERSION, Machine

OPEN, CLOSED = KernelModule.OPEN, KernelModule.CLOSED
BOTH = frozenset({"open", "closed"})
# Lines of NVIDIA's option tables at these tags, as `--advanced-options` prints them.
TABLES = Path(__file__).parent / "data" / "nvidia-installer"
VERSIONS = sorted(path.stem for path in TABLES.glob("*.txt"))


def help_text(version: str, width: int | None = None) -> str:
    """What the installer of a version prints; broken at `width` as it does on a terminal."""
    rows = ["", f"nvidia-installer:  version {version}", "",
            "  The NVIDIA Software Installer for Unix/Linux.", "", "./nvidia-installer [options]",
            ""]
    for row in (TABLES / f"{version}.txt").read_text().splitlines():
        if width:
            row = "  " + re.sub(rf"(.{{1,{width}}})(?: |$)", r"\1\n  ", row.strip()).rstrip()
        rows += [row, "      Something like '--no-such-option' or", "      --another-one is meant.",
                 ""]
    return "\n".join(rows)


def request(version: str, **more: Any) -> Request:
    """A headless guest whose modules are built by katagpu."""
    values: dict[str, Any] = {"version": version, "release": RELEASE, "flavour": CLOSED,
                              "flavours": BOTH, **more}
    return Request(**values)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_list_is_read_as_it_is_printed(version: str) -> None:
    found = supported(help_text(version))
    assert {"-k", "--kernel-name", "-s", "--silent", "--no-backup", "--log-file-name",
            "--install-compat32-libs", "--no-install-compat32-libs", "--ui"} <= found
    assert "--no-such-option" not in found and "--another-one" not in found
    words = re.findall(r"--[a-z0-9-]+", (TABLES / f"{version}.txt").read_text())
    assert {each for each in found if each.startswith("--")} == set(words)


@pytest.mark.parametrize("width", [40, 60, 75, 100])
def test_a_terminals_line_breaks_change_nothing(width: int) -> None:
    assert supported(help_text("550.144.03", width)) == supported(help_text("550.144.03"))


def test_no_options_at_all_is_an_error() -> None:
    with pytest.raises(StepError, match=r"listed no options.*cannot execute"):
        supported("sh: cannot execute binary file")


def test_options_of_each_generation() -> None:
    found = {version: supported(help_text(version)) for version in VERSIONS}

    def since(option: str) -> str:
        return min(version for version in VERSIONS if option in found[version])

    assert since("--no-kernel-modules") == "525.147.05"
    assert max(v for v in VERSIONS if "--no-kernel-module" in found[v]) == "510.54"
    assert since("--no-dkms") == "525.147.05" and since("--no-peermem") == "510.54"
    assert since("--skip-module-load") == since("--no-rebuild-initramfs") == "550.144.03"
    assert since("--kernel-module-type") == "555.42.02"


HEADLESS = """./nvidia-installer --silent --kernel-name=6.1.0-toy \
--log-file-name=/var/log/nvidia-installer.log {modules}--no-opengl-files --no-wine-files \
--no-install-compat32-libs --no-install-libglvnd --no-x-check --no-nouveau-check \
--no-check-for-alternate-installs --no-distro-scripts --force-selinux=no --no-backup --no-rpms \
{late}--no-nvidia-modprobe --no-kernel-module-source --skip-depmod"""


@pytest.mark.parametrize(("version", "modules", "late"), [
    ("510.54", "--no-kernel-module ", "--no-systemd "),
    ("535.216.01", "--no-kernel-modules ", "--no-dkms --no-systemd "),
    ("550.144.03", "--no-kernel-modules ", "--no-dkms --no-systemd --no-rebuild-initramfs "),
    ("570.207", "--no-kernel-modules --kernel-module-type=proprietary ",
     "--no-dkms --no-systemd --no-rebuild-initramfs "),
    ("590.48.01", "--no-kernel-modules --kernel-module-type=proprietary ",
     "--no-dkms --no-systemd --no-rebuild-initramfs "),
])
def test_the_command_when_katagpu_builds_the_modules(
    version: str, modules: str, late: str,
) -> None:
    assert command(supported(help_text(version)), request(version)) \
        == HEADLESS.format(modules=modules, late=late).split()


@pytest.mark.parametrize(("version", "build"), [
    ("510.54", "--concurrency-level=3 --no-drm --no-peermem"),
    ("535.216.01", "--concurrency-level=3 --no-drm --no-peermem"),
    ("550.144.03", "--concurrency-level=3 --skip-module-load --no-drm --no-peermem"),
    ("580", "--kernel-module-type=proprietary --concurrency-level=3 --skip-module-load --no-drm "
            "--no-peermem"),
])
def test_the_command_when_the_installer_builds_them(version: str, build: str) -> None:
    text = help_text("590.48.01" if version == "580" else version)
    argv = command(supported(text), request(version, builds=True, jobs=3))
    start = argv.index(f"--log-file-name={LOG}") + 1
    assert argv[start:argv.index("--no-opengl-files")] == build.split()
    assert not [word for word in argv if "kernel-install-path" in word or ("no-kernel-mod" in word
                and word != "--no-kernel-module-source")]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("builds", [False, True])
@pytest.mark.parametrize("flavour", [OPEN, CLOSED])
@pytest.mark.parametrize("everything", [False, True])
def test_nothing_that_is_not_listed_is_ever_passed(
    version: str, builds: bool, flavour: KernelModule, everything: bool,
) -> None:
    listed = supported(help_text(version))
    wish = request(version, builds=builds, flavour=flavour, drm=everything, opengl=everything,
                   wine=everything, compat32=everything)
    words = {word.partition("=")[0] for word in command(listed, wish)[1:]}
    assert words <= listed
    assert {"--silent", "--kernel-name", "--log-file-name"} <= words
    assert ("--no-opengl-files" in words) is not everything
    assert ("--install-compat32-libs" in words) is everything
    assert ("--compat32-libdir" in words) is everything


@pytest.mark.parametrize(("version", "spelling"), [
    ("525.147.05", "--kernel-module-build-directory=kernel-open"),
    ("550.144.03", "--kernel-module-build-directory=kernel-open"),
    ("555.42.02", "--kernel-module-type=open"), ("590.48.01", "--kernel-module-type=open")])
def test_open_modules_are_always_named(version: str, spelling: str) -> None:
    wish = request(version, builds=True, flavour=OPEN)
    assert spelling in command(supported(help_text(version)), wish)


def test_a_flavour_that_is_not_there() -> None:
    text = supported(help_text("510.54"))
    with pytest.raises(UserError, match=r"driver 510.54 has no open kernel modules.*since branch "
                                        r"515\n  hint: .*kernel_module: closed"):
        command(text, request("510.54", flavour=OPEN, flavours=frozenset({"closed"})))
    with pytest.raises(UserError, match=r"has no closed kernel modules \(it has: open\)"):
        command(supported(help_text("590.48.01")),
                request("595.10", flavours=frozenset({"open"})))


def test_something_essential_that_is_not_listed_is_refused() -> None:
    listed = supported(help_text("550.144.03")) - {"--no-kernel-modules"}
    with pytest.raises(UserError, match="does not list --no-kernel-modules or --no-kernel-module"):
        command(listed, request("550.144.03"))


def test_what_is_left_out_is_said() -> None:
    said = left_out(supported(help_text("510.54")), request("510.54", builds=True))
    assert said == [
        "--kernel-module-type is not listed: before 555 the flavour matters only where it builds "
        "modules, and closed is its default",
        "--skip-module-load is not listed: a kernel name other than the running one means the same",
        "--no-dkms is not listed: before 520 it does so only when told to",
        "--no-rebuild-initramfs is not listed: before 545 it never touches it"]
    assert left_out(supported(help_text("590.48.01")), request("590.48.01", builds=True)) == []


def test_an_old_installer_must_not_load_modules_into_a_host_of_the_same_release() -> None:
    wish = request("535.216.01", builds=True, host_release=RELEASE)
    with pytest.raises(UserError, match="into the build host's kernel, which has the same release"):
        command(supported(help_text("535.216.01")), wish)
    command(supported(help_text("550.144.03")), replace(wish, version="550.144.03"))
    command(supported(help_text("535.216.01")), replace(wish, builds=False))


def test_every_wish_says_why() -> None:
    for want in WANTED:
        assert want.reason and want.since and want.spellings
        assert all(spelling.startswith("--") for spelling in want.spellings)


def test_the_documentation_has_every_option(repository: Path) -> None:
    text = (repository / "docs" / "driver.md").read_text()
    missing = [spelling for want in WANTED for spelling in want.spellings
               if f"`{spelling.partition('=')[0]}" not in text]
    assert not missing


# with the program that stands for the installer


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """A package and a root."""
    yield Machine(place=tmp_path / "machine")
    sandbox.remove(tmp_path)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_program_of_the_tests_has_the_real_ones_options(
    machine: Machine, version: str,
) -> None:
    (machine.package / "installer-generation").write_text(f"{version}\n")
    said = machine.run(*HELP[1:]).said
    assert supported(said) == supported(help_text(version))
    assert machine.run("--no-such-option").status == 1


@pytest.mark.parametrize("version", ["510.54", "535.216.01", "550.163.01", "570.207", "590.48.01"])
def test_the_command_installs_and_leaves_no_error(tmp_path: Path, version: str) -> None:
    machine = Machine(place=tmp_path / "machine", version=version)
    listed = supported(machine.run(*HELP[1:]).said)
    machine.program("systemctl", "echo 'System has not been booted with systemd'; exit 1")
    machine.program("dkms", "echo called >> /dkms-was-called")
    outcome = machine.run(*command(listed, request(version))[1:])
    verdict = nvoutcome.judge(outcome)
    assert verdict.ok, verdict
    assert machine.written() == {
        "/etc/OpenCL/vendors/nvidia.icd", "/usr/bin/nvidia-installer", "/usr/bin/nvidia-smi",
        "/usr/bin/nvidia-uninstall", f"/usr/lib/firmware/nvidia/{version}/gsp_ga10x.bin",
        f"/usr/lib/firmware/nvidia/{version}/gsp_tu10x.bin",
        *(f"/usr/lib/x86_64-linux-gnu/{name}" for name in (
            "libcuda.so.1", f"libcuda.so.{version}", "libnvidia-ml.so.1",
            f"libnvidia-ml.so.{version}")),
        "/usr/share/doc/NVIDIA_GLX-1.0/LICENSE", "/var/lib/nvidia/dirs", "/var/lib/nvidia/log"}
    sandbox.remove(tmp_path)


@pytest.mark.parametrize("version", ["510.54", "535.216.01", "550.163.01", "570.207"])
def test_the_installer_builds_the_modules(tmp_path: Path, version: str) -> None:
    machine = Machine(place=tmp_path / "machine", version=version)
    wish = request(version, builds=True, flavour=CLOSED if version == "510.54" else OPEN,
                   host_release="another")
    listed = supported(machine.run(*HELP[1:]).said)
    outcome = machine.run(*command(listed, wish)[1:], flavour=wish.flavour)
    assert nvoutcome.judge(outcome).ok, nvoutcome.judge(outcome)
    wanted = [name for name in MODULES if name not in ("nvidia-drm", "nvidia-peermem")]
    assert nvoutcome.judge_modules(wanted, machine.built(), RELEASE).ok
    assert set(machine.built()) == set(wanted)
    assert ("cd kernel-open;" in outcome.log) is (wish.flavour is OPEN)
    sandbox.remove(tmp_path)


def test_a_package_with_open_modules_only(tmp_path: Path) -> None:
    machine = Machine(place=tmp_path / "machine", version="590.48.01")
    sandbox.remove(machine.package / "kernel")
    wish = request("590.48.01", flavour=OPEN, flavours=frozenset({"open"}))
    listed = supported(machine.run(*HELP[1:]).said)
    assert nvoutcome.judge(machine.run(*command(listed, wish)[1:])).ok
    unnamed = [word for word in command(listed, wish)[1:] if "module-type" not in word]
    assert nvoutcome.judge(machine.run(*unnamed)).kind is Kind.FLAVOUR
    sandbox.remove(tmp_path)


def test_graphics_and_32_bit_files_come_when_they_are_asked_for(machine: Machine) -> None:
    wish = request(VERSION, opengl=True, wine=True, compat32=True)
    outcome = machine.run(*command(supported(machine.run(*HELP[1:]).said), wish)[1:])
    assert nvoutcome.judge(outcome).ok
    assert {f"/usr/lib/x86_64-linux-gnu/libnvidia-glcore.so.{VERSION}",
            "/usr/lib/x86_64-linux-gnu/nvidia/wine/nvngx.dll"} <= machine.written()
    assert f"/usr/lib/i386-linux-gnu/libcuda.so.{VERSION}" in machine.written()


def test_a_root_without_a_directory_of_32_bit_libraries_needs_one_named(machine: Machine) -> None:
    """As `get_compat32_path` of the real one's files.c: asking for them is not enough."""
    if Path("/usr/lib/i386-linux-gnu").is_dir() or Path("/usr/lib32").is_dir():
        pytest.skip("the build host's /usr has such a directory")
    listed = supported(machine.run(*HELP[1:]).said)
    argv = command(listed, request(VERSION, compat32=True))[1:]
    unnamed = [word for word in argv if not word.startswith("--compat32-libdir")]
    outcome = machine.run(*unnamed)
    assert nvoutcome.judge(outcome).ok
    assert "Unable to find a suitable destination to install 32-bit" in outcome.log
    assert not [path for path in machine.written() if "i386" in path or "lib32" in path]
    assert nvoutcome.judge(machine.run(*argv)).ok
    assert f"/usr/lib/i386-linux-gnu/libcuda.so.{VERSION}" in machine.written()


def test_what_it_installed_can_be_named_checked_and_removed(machine: Machine) -> None:
    argv = command(supported(machine.run(*HELP[1:]).said), request(VERSION))[1:]
    assert nvoutcome.judge(machine.run(*argv)).ok
    state = machine.file("/var/lib/nvidia/log")
    assert state.stat().st_mode & 0o777 == 0o600
    rows = state.read_text().splitlines()
    assert rows[:2] == [VERSION, "NVIDIA Accelerated Graphics Driver for Linux-x86_64"]
    at = rows.index("0: /usr/lib/x86_64-linux-gnu/./libcuda.so.1")
    assert rows[at + 1] == f"libcuda.so.{VERSION}"
    assert f"(version: {VERSION})." in machine.run("-i").said
    assert machine.run("--sanity", "--silent").status == 0
    again = machine.run(*argv)
    assert nvoutcome.judge(again).ok
    assert "There appears to already be a driver installed" in again.log
    machine.file("/usr/bin/nvidia-smi").write_text("altered")
    assert machine.run("--sanity", "--silent").status == 1
    assert machine.run("--silent", program="nvidia-uninstall").status == 0
    assert machine.written() == {"/usr/bin/nvidia-smi"}, "a file that was altered stays"


# on a build host that has a GPU, a driver and an X server of its own


def result(place: Path, builds: bool) -> dict[str, bytes]:
    """What the installer leaves behind, as the pipeline calls it."""
    machine = Machine(place=place)
    machine.program("lsmod", "cat /proc/modules 2> /dev/null; true")
    wish = request(VERSION, builds=builds, flavour=OPEN, drm=True)
    outcome = machine.run(*command(supported(machine.run(*HELP[1:]).said), wish)[1:],
                          flavour=OPEN)
    assert nvoutcome.judge(outcome).ok, nvoutcome.judge(outcome)
    return {path: machine.file(path).read_bytes() for path in machine.written()
            if machine.file(path).is_file() and not path.startswith("/tmp/")}


@pytest.mark.parametrize("builds", [False, True])
def test_a_build_host_with_a_driver_gives_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, builds: bool,
) -> None:
    plain = result(tmp_path / "plain", builds)
    monkeypatch.setattr(sandbox, "ENTER", fakehost.program(tmp_path))
    assert result(tmp_path / "faked", builds) == plain
    assert any(path.endswith(".ko") for path in plain) is builds
    monkeypatch.undo()
    sandbox.remove(tmp_path)


@pytest.mark.parametrize(("fake", "kind"), [
    ("modules", Kind.LOADED), ("modprobe", Kind.MODPROBE), ("nouveau", Kind.NOUVEAU),
    ("x", Kind.X_SERVER)])
def test_what_would_come_of_such_a_host_if_it_were_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake: str, kind: Kind,
) -> None:
    machine = Machine(place=tmp_path / "machine")
    machine.program("lsmod", "cat /proc/modules 2> /dev/null; true")
    options = ("--silent", f"--kernel-name={RELEASE}", "--no-systemd")
    monkeypatch.setattr(sandbox, "ENTER", fakehost.program(tmp_path, hiding=False, fakes=[fake]))
    assert nvoutcome.judge(machine.run(*options)).kind is kind
    monkeypatch.setattr(sandbox, "ENTER", fakehost.program(tmp_path, fakes=[fake]))
    assert nvoutcome.judge(machine.run(*options)).ok
    monkeypatch.undo()
    sandbox.remove(tmp_path)
