"""Checks of what containers get, on a guest of words."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from katagpu.boot import toolkit
from katagpu.boot.channel import Gone
from katagpu.boot.facts import Skipped
from katagpu.boot.session import Session, lesser

from .fakeguest import Request, Said
from .scripted import SPEC, Scripted
from .test_system import failed

Make = Callable[..., Scripted]
HOOK = "/usr/share/oci/hooks/prestart/nvidia-container-toolkit.sh"
NODES = ("/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools")
LIBRARY = "/usr/lib/x86_64-linux-gnu/libcuda.so.550.163.01"
SMI = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n"


def opened(asked: Request) -> str:
    """The program that opens libraries finds all."""
    return "".join(f"{name} ok /usr/lib/{name}\n" for name in asked["argv"][1:])


def spec(*gpus: str, **other: Any) -> str:
    """A CDI specification, as nvidia-ctk writes it."""
    return yaml.safe_dump({
        "cdiVersion": "0.5.0", "kind": "nvidia.com/gpu",
        "devices": [{"name": name, "containerEdits": {"deviceNodes": [{"path": path}
                     for path in ([f"/dev/nvidia{name}"] if name != "all" else [])]}}
                    for name in (*gpus, "all")],
        "containerEdits": {
            "deviceNodes": [{"path": path} for path in NODES],
            "mounts": [{"hostPath": LIBRARY, "containerPath": LIBRARY}],
            "hooks": [{"hookName": "createContainer", "path": "/usr/bin/nvidia-cdi-hook"}]},
        **other})


@pytest.fixture
def made(scripted: Make) -> Scripted:
    """A guest with a GPU, and all files that its specification names."""
    found = scripted()
    found.cold()
    found.tables.exists |= {*NODES, "/dev/nvidia0", "/dev/nvidia1", LIBRARY,
                            "/usr/bin/nvidia-cdi-hook"}
    found.tables.programs |= {"readlink -f": f"{LIBRARY}\n", "^mount --bind": "", "^umount": "",
                              "^mkdir -p": "", "^systemctl": "", "^journalctl": "no NVML\n"}
    return found


def test_driver_libraries(scripted: Make) -> None:
    found = scripted()
    found.tables.programs |= {"^mkdir": "", "^/run/katagpu-check/load": opened}
    lines = toolkit.driver_libraries(found.session)
    names = {line.split()[0] for line in lines}
    assert {"libcuda.so.1", "libnvidia-nvvm.so.4", "libnvidia-ml.so.1",
            "libnvidia-pkcs11-openssl3.so.550.163.01"} <= names
    assert not {name for name in names if "GLX" in name or "cfg" in name}
    written = next(asked for asked in found.guest.asked if asked["do"] == "write")
    assert (written["path"], written["mode"], base64.b64decode(written["data"])) == (
        "/run/katagpu-check/load", 0o755, b"program")


@pytest.mark.parametrize("said", [
    (1, "libcuda.so.1 ok /x\nlibnvidia-nvvm.so.4 failed libz.so.1: cannot open\n", ""),
    (127, "", "cannot execute\n")])
def test_driver_libraries_that_do_not_load(scripted: Make, said: Said) -> None:
    found = scripted(extension="/run/x")
    found.tables.programs |= {"^mkdir": "", "^/run/katagpu-check/load": said}
    lines = failed(toolkit.driver_libraries, found.session, "do not load").lines
    assert lines in (["libnvidia-nvvm.so.4 failed libz.so.1: cannot open"], ["cannot execute"])
    env = found.guest.asked[-1]["env"]
    assert "LD_LIBRARY_PATH=/run/x/usr/lib/x86_64-linux-gnu" in env


@pytest.mark.parametrize(("said", "words"), [
    ((9, SMI, ""), None), ((6, "No devices were found\n", ""), None),
    ((127, "", "libnvidia-ml.so.1: cannot open shared object file\n"), "ended with status 127"),
    ((12, "NVIDIA-SMI couldn't find libnvidia-ml.so library in your system.\n", ""), "status 12"),
    ((18, "Failed to initialize NVML: Driver/library version mismatch\n", ""),
     "different drivers")])
def test_nvml(scripted: Make, said: Said, words: str | None) -> None:
    found = scripted()
    found.tables.programs["^nvidia-smi"] = said
    if words is None:
        assert toolkit.nvml(found.session) == [f"status {said[0]}", said[1].strip()]
    else:
        assert failed(toolkit.nvml, found.session, words).lines


def test_no_nvml(scripted: Make) -> None:
    with pytest.raises(Skipped, match="no nvidia-smi"):
        toolkit.nvml(scripted(capabilities=("compute",)).session)


@pytest.mark.parametrize(("mode", "count"), [("cdi", 2), ("hook", 4)])
def test_programs(scripted: Make, mode: str, count: int) -> None:
    found = scripted(toolkit=mode)
    found.tables.programs["--version"] = "version 1.17.8\ncommit: abc\n"
    assert toolkit.programs(found.session) == ["version 1.17.8"] * count
    found.tables.programs = {"nvidia-cdi-hook": (127, "", "libc.so.6: no GLIBC_2.38\n"),
                             **found.tables.programs}
    assert failed(toolkit.programs, found.session, "nvidia-cdi-hook --version ended").lines


def test_the_hook(scripted: Make) -> None:
    """It is called as the agent does: no environment, the state on stdin."""
    found = scripted(hook=HOOK, toolkit="hook")
    found.tables.programs |= {f"^stat .*{HOOK}": f"81ed '{HOOK}'\n", f"^{HOOK} prestart$": "",
                              "mkdir -p": ""}
    assert toolkit.hook(found.session) == [f"81ed '{HOOK}'", "status 0 in 0.01 s"]
    asked = found.guest.asked[-1]
    assert asked["env"] == [] and asked["seconds"] == 10
    state = json.loads(base64.b64decode(asked["stdin"]))
    assert set(state) == {"ociVersion", "id", "status", "pid", "bundle", "annotations"}
    assert f"{state['bundle']}/config.json" in found.tables.files
    found.tables.programs[f"^{HOOK} prestart$"] = (1, "", "unbound variable: HOME\n")
    assert failed(toolkit.hook, found.session, "ended with status 1").lines


@pytest.mark.parametrize("said", [
    (0, f"a1ff '{HOOK}' -> '/usr/bin/hook'\n", ""), (0, f"81a4 '{HOOK}'\n", ""),
    (0, f"41ed '{HOOK}'\n", ""), (1, "", "stat: cannot statx: No such file or directory\n")],
    ids=["link", "not executable", "directory", "missing"])
def test_a_hook_that_the_agent_does_not_take(scripted: Make, said: Said) -> None:
    found = scripted(hook=HOOK, toolkit="hook")
    found.tables.programs["^stat"] = said
    assert failed(toolkit.hook, found.session, "would not run the hook").lines
    assert not any(line.endswith("prestart") for line in found.guest.ran())


@pytest.mark.parametrize("check", [
    toolkit.programs, toolkit.cdi_cold, toolkit.cdi_hot, toolkit.cdi_again, toolkit.hook])
def test_no_toolkit(scripted: Make, check: Callable[[Session], list[str]]) -> None:
    with pytest.raises(Skipped):
        check(scripted(toolkit="none").session)


def test_the_lesser_check_has_no_driver_to_ask(made: Scripted) -> None:
    made.session.gpu = lesser(1 << 35)
    for check in (toolkit.nvml, toolkit.driver_libraries, toolkit.cdi_cold):
        with pytest.raises(Skipped, match="lesser check"):
            check(made.session)


def test_cdi_of_a_cold_gpu(made: Scripted) -> None:
    """The mock lies over the real NVML only as long as the specification is written."""
    def write(_asked: Request) -> str:
        made.tables.files[SPEC] = spec("0")
        return ""

    made.tables.programs["^systemctl"] = write
    said = toolkit.cdi_cold(made.session)
    assert said[0] == "kind nvidia.com/gpu, GPUs 0" and said[2] == "1 files, 1 hooks"
    assert "/dev/nvidia-uvm" in said[1]
    ran = made.guest.ran()
    covered = ran.index(f"mount --bind /run/katagpu-check/libnvidia-ml.so.1 {LIBRARY}")
    restarted = ran.index("systemctl restart --no-block nvidia-cdi.service")
    assert covered < restarted < ran.index(f"umount {LIBRARY}")


def test_cdi_that_is_not_written(made: Scripted) -> None:
    refusal = failed(toolkit.cdi_cold, made.session, f"there is no {SPEC}")
    assert refusal.lines == ["no NVML"]
    assert made.guest.ran()[-1] == f"umount {LIBRARY}", "the image is as it was"
    for text in ("", "{half: ", "just words"):
        made.tables.files[SPEC] = text
        failed(toolkit.cdi_cold, made.session, f"there is no {SPEC}")


@pytest.mark.parametrize("state", ["masked", "not-found"])
def test_cdi_of_a_unit_that_never_starts(made: Scripted, state: str) -> None:
    """It is said at once, and nothing is put over the driver."""
    made.tables.programs["^systemctl"] = f"{state}\n"
    made.session.patience = 3600
    refusal = failed(toolkit.cdi_cold, made.session, f"nvidia-cdi.service is {state}")
    assert "did not run" in refusal.cause
    assert not [line for line in made.guest.ran() if "mount" in line]


def test_no_nvml_to_cover(made: Scripted) -> None:
    made.tables.programs["^mount --bind"] = (32, "", "mount point does not exist\n")
    assert failed(toolkit.cdi_cold, made.session, "cannot be covered").lines


def test_cdi_after_hot_plug_and_again(made: Scripted) -> None:
    made.tables.files[SPEC] = spec("0")
    assert "GPUs 0" in toolkit.cdi_hot(made.session)[0]
    with pytest.raises(Skipped, match="1 GPUs are in the guest"):
        toolkit.cdi_again(made.session)
    made.plugs("0000:02:00.0")
    made.session.plug_gpu()
    assert failed(toolkit.cdi_again, made.session, "has 1 GPUs, and 2 are plugged in").lines
    made.tables.files[SPEC] = spec("0", "1")
    assert "GPUs 0, 1" in toolkit.cdi_again(made.session)[0]
    assert f"umount {LIBRARY}" not in made.guest.ran()
    made.session.close()
    assert made.guest.ran()[-1] == f"umount {LIBRARY}"


def test_a_session_ends_where_the_guest_is_gone(made: Scripted) -> None:
    made.tables.files[SPEC] = spec("0")
    toolkit.cdi_hot(made.session)
    made.guest.hang_up()
    with pytest.raises(Gone):
        toolkit.cdi_hot(made.session)
    made.session.close()


@pytest.mark.parametrize(("change", "words"), [
    ({"kind": "nvidia.com/mig"}, "is of kind nvidia.com/mig"),
    ({"containerEdits": {"deviceNodes": [{"path": "/dev/nvidiactl"}]}}, "lacks /dev/nvidia-uvm"),
    ({"containerEdits": {"deviceNodes": [{"path": path} for path in NODES],
                         "mounts": [{"hostPath": "/driver/libx.so"}]}}, "are not in the guest")])
def test_a_specification_of_no_use(made: Scripted, change: dict[str, Any], words: str) -> None:
    made.tables.files[SPEC] = spec("0", **change)
    assert failed(toolkit.cdi_hot, made.session, words).lines


def test_hook_mode_needs_no_nodes_in_the_specification(scripted: Make) -> None:
    found = scripted(toolkit="hook")
    found.cold()
    found.tables.programs |= {"readlink": f"{LIBRARY}\n", "mount": "", "mkdir": "", "system": ""}
    found.tables.files[SPEC] = spec("0", containerEdits={})
    found.tables.exists.add("/dev/nvidia0")
    assert toolkit.cdi_hot(found.session)
