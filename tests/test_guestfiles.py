"""The guest's files: rendering, laying them into a root, and the programs among them."""

from __future__ import annotations

import os
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from katagpu import guestfiles
from katagpu.errors import StepError, UserError
from katagpu.guestfiles import Entry, Kind, digest_files, lay, render, resolve

VARIABLES: dict[str, object] = {
    "toolkit_mode": "cdi",
    "services": [],
    "drm": False,
    "hook_binary": "/usr/bin/nvidia-container-runtime-hook",
    "driver_layout": "debian",
    "driver_root": "",
    "driver_version": "550.163.01",
    "multiarch": "x86_64-linux-gnu",
    "vgpu": None,
}
UNITS = "/usr/lib/systemd/system"
WANTS = "/etc/systemd/system/kata-containers.target.wants"
HOOK = "/usr/share/oci/hooks/prestart/nvidia-container-toolkit.sh"
GUEST = "/usr/libexec/katagpu/nvidia-guest"


def rendered(**changes: object) -> dict[str, Entry]:
    return {
        entry.path: entry
        for entry in render({**VARIABLES, **changes})
        if entry.kind is not Kind.REMOVE
    }


def text(entries: dict[str, Entry], path: str) -> str:
    return entries[path].content.decode()


# --- rendering -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["cdi", "hook", "none"])
def test_every_mode_renders_without_template_marks(mode: str) -> None:
    for path, entry in rendered(toolkit_mode=mode).items():
        assert path.startswith("/")
        for mark in (b"{{", b"{%"):
            assert mark not in entry.content, path


def test_modes_differ_in_what_serves_containers() -> None:
    cdi, hook, none = (rendered(toolkit_mode=mode) for mode in ("cdi", "hook", "none"))
    assert HOOK not in cdi and HOOK in hook and HOOK not in none
    assert f"{WANTS}/nvidia-cdi.service" in cdi
    assert f"{WANTS}/nvidia-cdi.service" not in none
    assert f"{UNITS}/nvidia-cdi.service" not in none
    config = "/etc/nvidia-container-runtime/config.toml"
    assert tomllib.loads(text(hook, config))["nvidia-container-runtime"]["mode"] == "legacy"
    runtime = tomllib.loads(text(cdi, config))["nvidia-container-runtime"]
    assert runtime["mode"] == "cdi"
    assert runtime["modes"]["cdi"]["spec-dirs"] == ["/var/run/cdi"]
    assert config not in none
    refresh = f"{UNITS}/nvidia-refresh.service"
    assert "nvidia-cdi.service\n" in text(cdi, refresh)
    assert "nvidia-cdi" not in text(none, refresh).split("ExecStart=")[1]


def test_kata_names_and_paths_are_there() -> None:
    entries = rendered()
    for name in ("kata-agent.service", "kata-containers.target", "chronyd.service"):
        assert f"{UNITS}/{name}" in entries
    assert entries["/etc/resolv.conf"].kind is Kind.FILE
    assert entries["/etc/resolv.conf"].content == b""
    assert entries["/etc/machine-id"].content == b""
    assert entries["/var/run"].target == "/run"
    assert entries["/var/tmp"].target == "../tmp"
    assert entries["/tmp"].mode == 0o1777
    removed = {entry.path for entry in render(VARIABLES) if entry.kind is Kind.REMOVE}
    assert "/etc/hostname" in removed


# Messages of Kata's AgentService, 3.x and 4.1; the agent asks for a rule of this name at each call.
REQUESTS = (
    "AddARPNeighborsRequest AddSwapRequest CloseStdinRequest CopyFileRequest "
    "CreateContainerRequest CreateSandboxRequest DestroySandboxRequest ExecProcessRequest "
    "GetIPTablesRequest GetMetricsRequest GetOOMEventRequest GuestDetailsRequest "
    "ListInterfacesRequest ListRoutesRequest MemHotplugByProbeRequest OnlineCPUMemRequest "
    "PauseContainerRequest ReadStreamRequest RemoveContainerRequest "
    "RemoveStaleVirtiofsShareMountsRequest ReseedRandomDevRequest ResizeVolumeRequest "
    "ResumeContainerRequest SetGuestDateTimeRequest SetIPTablesRequest SetPolicyRequest "
    "SignalProcessRequest StartContainerRequest StatsContainerRequest TtyWinResizeRequest "
    "UpdateContainerRequest UpdateEphemeralMountsRequest UpdateInterfaceRequest "
    "UpdateRoutesRequest VolumeStatsRequest WaitProcessRequest WriteStreamRequest")


def test_the_agent_s_policy_allows_every_call() -> None:
    entries = rendered()
    assert entries["/etc/kata-opa/default-policy.rego"].target == "allow-all.rego"
    lines = [line for line in text(entries, "/etc/kata-opa/allow-all.rego").splitlines()
             if line and not line.startswith("#")]
    assert lines[0] == "package agent_policy"
    rules = [line.removeprefix("default ").removesuffix(" := true") for line in lines[1:]]
    assert all(line == f"default {rule} := true"
               for line, rule in zip(lines[1:], rules, strict=True))
    assert len(set(rules)) == len(rules)
    assert set(REQUESTS.split()) <= set(rules)


def test_gpu_units_are_ordered_before_the_agent() -> None:
    entries = rendered()
    chain = ["nvidia-modules", "nvidia-devices", "nvidia-persistenced", "nvidia-cdi"]
    for earlier, later in zip([*chain], [*chain[1:], "kata-agent"], strict=True):
        path = f"{UNITS}/{earlier}.service"
        unit = text(entries, path if path in entries else f"/etc/systemd/system/{earlier}.service")
        assert "Before=kata-agent.service" in unit
        # A burst of GPUs must not use up a unit's starts.
        assert "StartLimitIntervalSec=0" in unit
        if later != "kata-agent":
            after = f"{UNITS}/{later}.service"
            after = after if after in entries else f"/etc/systemd/system/{later}.service"
            assert f"{earlier}.service" in text(entries, after)
        assert f"{WANTS}/{earlier}.service" in entries


SERVICES = {"fabricmanager": "nv-fabricmanager", "dcgm": "nv-hostengine"}


@pytest.mark.parametrize("asked", [[], ["fabricmanager"], ["dcgm"], ["dcgm", "fabricmanager"]])
def test_services_are_there_when_the_recipe_asks(asked: list[str]) -> None:
    entries = rendered(services=asked)
    refresh = text(entries, f"{UNITS}/nvidia-refresh.service")
    for service, program in SERVICES.items():
        unit = f"/etc/systemd/system/nvidia-{service}.service"
        wanted = f"{WANTS}/nvidia-{service}.service"
        assert (unit in entries) == (wanted in entries) == (service in asked)
        assert (f"nvidia-{service}.service" in refresh) == (service in asked)
        if service in asked:
            assert f"ExecStart=/usr/bin/{program} " in text(entries, unit)
            assert "After=nvidia-devices.service" in text(entries, unit)
            assert entries[wanted].target == f"../nvidia-{service}.service"


def test_the_fabric_manager_runs_before_containers_and_only_on_switches() -> None:
    unit = text(rendered(services=["fabricmanager"]),
                "/etc/systemd/system/nvidia-fabricmanager.service")
    assert "Before=kata-agent.service" in unit
    assert "ConditionPathExistsGlob=/proc/driver/nvidia-nvswitch/devices/*" in unit
    refresh = text(rendered(services=["fabricmanager"]), f"{UNITS}/nvidia-refresh.service")
    assert "systemctl start nvidia-fabricmanager.service" in refresh  # its end aborts CUDA jobs


def test_the_toolkit_s_own_cdi_units_are_off(root: Path) -> None:
    """Its packages put them into /etc and enable them."""
    units = root / "etc/systemd/system"
    units.mkdir(parents=True)
    for name in ("nvidia-cdi-refresh.service", "nvidia-cdi-refresh.path"):
        (units / name).write_text("[Service]\nExecStart=/usr/bin/nvidia-ctk cdi generate\n")
    lay(render(VARIABLES), root)
    for name in ("nvidia-cdi-refresh.service", "nvidia-cdi-refresh.path"):
        assert (units / name).readlink() == Path("/dev/null")


def test_programs_are_executable_and_nothing_else() -> None:
    entries = rendered(toolkit_mode="hook")
    programs = {
        path for path, entry in entries.items() if entry.kind is Kind.FILE and entry.mode & 0o111
    }
    assert programs == {GUEST, HOOK, "/usr/sbin/ip6tables-save"}
    for path in programs:
        assert entries[path].content.startswith(b"#!/")


def test_modprobe_options_follow_drm() -> None:
    path = "/usr/lib/modprobe.d/katagpu-nvidia.conf"
    assert "blacklist nvidia_drm" in text(rendered(), path)
    assert "nvidia_drm" not in text(rendered(drm=True), path)
    assert "blacklist nouveau" in text(rendered(drm=True), path)


def test_debian_layout_gets_the_pkcs11_link() -> None:
    links = [path for path in rendered() if "pkcs11" in path]
    assert links == [
        "/usr/lib/x86_64-linux-gnu/nvidia/current/libnvidia-pkcs11-openssl3.so.550.163.01"
    ]
    assert not [path for path in rendered(driver_layout="plain") if "pkcs11" in path]


def test_missing_variable_is_an_error_that_names_it() -> None:
    for name in VARIABLES:
        less = {key: value for key, value in VARIABLES.items() if key != name}
        with pytest.raises(UserError, match=name):
            render({**less, "toolkit_mode": "hook"} if name != "toolkit_mode" else less)


def test_entries_come_in_laying_order_and_the_same_each_time() -> None:
    entries = render(VARIABLES)
    kinds = [entry.kind for entry in entries]
    assert kinds == sorted(kinds, key=list(Kind).index)
    assert entries == render(VARIABLES)


def test_digest_files_are_all_files_of_both_trees() -> None:
    names = {path.relative_to(guestfiles.REPOSITORY).as_posix() for path in digest_files()}
    assert guestfiles.LAYOUT in names
    assert "hooks/prestart/nvidia-container-toolkit.sh.j2" in names
    assert all(name.startswith(("rootfs/", "hooks/")) for name in names)


EMPTY = "\n".join(f"{section}: []" for section in guestfiles._FIELDS)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("{}", "sections"),
        (EMPTY.replace("masks: []", "masks: [{unit: a.service}]"), "fields are"),
        (EMPTY.replace("remove: []", "remove: [{path: /x, why: y, reason: z}]"), "fields are"),
        (EMPTY.replace("empty: []", "empty: [{path: /x, mode: 0644, reason: z}]"), "mode is text"),
        (EMPTY.replace("modes: []", 'modes: [{path: /no, mode: "0755", reason: z}]'), "no file"),
        (EMPTY.replace("empty: []", "empty: [{path: /a, reason: z}]"), "made twice"),
        (EMPTY.replace("empty: []", "empty: [{path: /b, when: nope, reason: z}]"), "nope"),
    ],
)
def test_bad_layout_is_refused(tmp_path: Path, layout: str, message: str) -> None:
    (tmp_path / "rootfs").mkdir()
    (tmp_path / "hooks").mkdir()
    (tmp_path / "rootfs" / "a").write_text("")
    (tmp_path / "rootfs" / "layout.yaml").write_text(layout)
    with pytest.raises(UserError) as caught:
        render(VARIABLES, tmp_path)
    assert message in str(caught.value)


# --- laying --------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An unpacked root with merged /usr, and beside it what must not be touched."""
    root = tmp_path / "root"
    for name in ("usr/lib", "usr/sbin", "etc", "var/tmp"):
        (root / name).mkdir(parents=True)
    (root / "lib").symlink_to("usr/lib")
    (root / "sbin").symlink_to("/usr/sbin")
    (tmp_path / "outside").mkdir()
    return root


def file(path: str, content: bytes = b"x", mode: int = 0o644) -> Entry:
    return Entry(path=path, kind=Kind.FILE, content=content, mode=mode)


def test_lay_the_whole_guest_twice(root: Path) -> None:
    (root / "etc/resolv.conf").symlink_to("/run/systemd/resolve/stub-resolv.conf")
    (root / "etc/hostname").write_text("builder")
    entries = render(VARIABLES)
    lay(entries, root)
    lay(entries, root)
    assert (root / "etc/resolv.conf").is_file() and not (root / "etc/resolv.conf").is_symlink()
    assert not (root / "etc/hostname").exists()
    assert (root / "var/tmp").readlink() == Path("../tmp")
    assert (root / "tmp").stat().st_mode & 0o7777 == 0o1777
    assert (root / "usr/lib/modules").is_dir()
    assert (root / "etc/systemd/system/systemd-logind.service").readlink() == Path("/dev/null")
    assert (root / GUEST[1:]).stat().st_mode & 0o777 == 0o755


def test_links_lead_where_the_guest_would_go(root: Path, tmp_path: Path) -> None:
    (root / "etc/a").symlink_to("/../../../../usr/lib")
    (root / "etc/b").symlink_to(tmp_path / "outside")
    lay([file("/lib/one"), file("/sbin/two"), file("/etc/a/three"), file("/etc/b/four")], root)
    assert (root / "usr/lib/one").is_file()
    assert (root / "usr/sbin/two").is_file()
    assert (root / "usr/lib/three").is_file()
    assert not list((tmp_path / "outside").iterdir())
    assert resolve(root, "/etc/b/four").is_relative_to(root)


def test_a_file_replaces_a_link_and_not_its_target(root: Path, tmp_path: Path) -> None:
    victim = tmp_path / "outside/victim"
    victim.write_text("mine")
    (root / "etc/x").symlink_to(victim)
    other = tmp_path / "outside/hard"
    other.write_text("mine")
    os.link(other, root / "etc/y")
    lay([file("/etc/x"), file("/etc/y")], root)
    assert victim.read_text() == other.read_text() == "mine"
    assert (root / "etc/x").read_bytes() == b"x"


def test_removal_takes_links_as_links(root: Path, tmp_path: Path) -> None:
    (tmp_path / "outside/keep").write_text("")
    (root / "etc/gone").symlink_to(tmp_path / "outside")
    (root / "etc/tree/deep").mkdir(parents=True)
    (root / "etc/tree/link").symlink_to(tmp_path / "outside")
    paths = ("/etc/gone", "/etc/tree", "/etc/never-there", "/no/parent")
    lay([Entry(path=path, kind=Kind.REMOVE) for path in paths], root)
    assert not (root / "etc/gone").is_symlink() and not (root / "etc/tree").exists()
    assert (tmp_path / "outside/keep").exists()


def test_what_cannot_be_laid_is_said(root: Path) -> None:
    (root / "etc/loop").symlink_to("loop")
    (root / "etc/plain").write_text("")
    with pytest.raises(StepError, match="too many symbolic links"):
        lay([file("/etc/loop/x")], root)
    with pytest.raises(StepError, match="is a directory"):
        lay([file("/usr/lib")], root)
    with pytest.raises(StepError, match="not a directory"):
        lay([file("/etc/plain/x")], root)
    with pytest.raises(StepError, match="not a directory"):
        lay([Entry(path="/etc/plain", kind=Kind.DIRECTORY)], root)


def test_modes_do_not_depend_on_the_umask(root: Path) -> None:
    old = os.umask(0o077)
    try:
        lay([file("/opt/a/b", mode=0o644)], root)
    finally:
        os.umask(old)
    assert (root / "opt/a").stat().st_mode & 0o777 == 0o755
    assert (root / "opt/a/b").stat().st_mode & 0o777 == 0o644


# --- the guest's program -------------------------------------------------------------------------


class Guest:
    """A fake guest: nvidia-guest with a directory for "/" and a fake nvidia-ctk."""

    def __init__(self, root: Path, mode: str, services: tuple[str, ...] = ()) -> None:
        self.root = root
        # The program sets PATH itself: the fake takes the toolkit's place by name.
        self.ctk = root / "nvidia-ctk"
        program = text(rendered(toolkit_mode=mode, services=services), GUEST)
        self.program = root / "nvidia-guest"
        self.program.write_text(program.replace("    nvidia-ctk ", f"    {self.ctk} "))
        for name in ("sys/bus/pci/devices", "sys/bus/pci/drivers/nvidia", "run/cdi", "dev"):
            (root / name).mkdir(parents=True)
        self.toolkit('printf "kind: nvidia.com/gpu\\n" >"$out"')

    def toolkit(self, body: str) -> None:
        find = 'for a in "$@"; do case $a in --output=*) out=${a#--output=};; esac; done\n'
        self.ctk.write_text(f'#!/bin/sh\necho "$@" >{self.root}/argv\n{find}{body}\n')
        self.ctk.chmod(0o755)

    def gpu(self, slot: str, *, bound: bool = True, ids: str = "0x10de 0x030200") -> None:
        vendor, kind = ids.split()
        device = self.root / "sys/bus/pci/devices" / slot
        device.mkdir(exist_ok=True)
        (device / "vendor").write_text(f"{vendor}\n")
        (device / "class").write_text(f"{kind}\n")
        if bound:
            (self.root / "sys/bus/pci/drivers/nvidia" / slot).symlink_to(device)

    def serve(self) -> None:
        """What `devices` notes, without the nodes, which need root."""
        shutil.copy(self.program, self.root / "note")
        note = self.root / "note"
        note.write_text(note.read_text().replace('case "${1-}" in', 'bound >"$state/gpus"; exit'))
        (self.root / "run/katagpu").mkdir(exist_ok=True)
        assert self.run("", program=note) == 0

    def run(self, verb: str, program: Path | None = None) -> int:
        command = ["sh", str(program or self.program), verb]
        return subprocess.run(
            command, env={"KATAGPU_GUEST_ROOT": str(self.root)}, capture_output=True, check=False
        ).returncode


@pytest.fixture
def guest(tmp_path: Path) -> Guest:
    return Guest(tmp_path, "cdi")


@pytest.mark.parametrize(
    ("ids", "status"),
    [
        ("0x10de 0x030200", 0),
        ("0x10de 0x030000", 0),
        ("0x10de 0x040300", 1),  # a GPU's sound function
        ("0x10de 0x068000", 1),  # NVSwitch
        ("0x1af4 0x030000", 1),
    ],
)
def test_present_knows_gpus(guest: Guest, ids: str, status: int) -> None:
    assert guest.run("present") == 1
    guest.gpu("0000:01:00.0", ids=ids, bound=False)
    assert guest.run("present") == status


def test_changed_takes_the_mark_and_compares(guest: Guest) -> None:
    mark = guest.root / "run/katagpu/gpus-changed"
    spec = guest.root / "run/cdi/nvidia.yaml"
    assert guest.run("mark") == 0 and mark.exists()
    assert guest.run("changed") == 1 and not mark.exists()
    guest.gpu("0000:01:00.0")
    assert guest.run("changed") == 0
    guest.serve()
    spec.write_text("old")
    guest.run("mark")
    assert guest.run("changed") == 1 and spec.exists()
    guest.gpu("0000:02:00.0")
    assert guest.run("changed") == 0
    # An agent that finds the kind without the device would give up.
    assert not spec.exists()


def test_changed_sees_another_gpu_in_the_same_slot(guest: Guest) -> None:
    guest.gpu("0000:01:00.0")
    guest.serve()
    place = guest.root / "sys/bus/pci/devices/0000:01:00.0"
    place.rename(place.with_name("old"))  # its inode stays in use, as sysfs never reuses one
    guest.gpu("0000:01:00.0", bound=False)
    assert guest.run("changed") == 0


def test_cdi_is_written_elsewhere_and_renamed(guest: Guest) -> None:
    assert guest.run("cdi") == 0
    assert (guest.root / "run/cdi/nvidia.yaml").read_text() == "kind: nvidia.com/gpu\n"
    assert [path.name for path in (guest.root / "run/cdi").iterdir()] == ["nvidia.yaml"]
    argv = (guest.root / "argv").read_text().split()
    for flag in (
        "--mode=nvml",
        "--device-name-strategy=index",
        "--driver-root=/",
        "--dev-root=/",
        "--nvidia-cdi-hook-path=/usr/bin/nvidia-cdi-hook",
        "--format=yaml",
        f"--output={guest.root}/run/katagpu/nvidia.yaml",
    ):
        assert flag in argv


@pytest.mark.parametrize("body", ["exit 1", 'echo "kind: other.com/gpu" >"$out"', ':>"$out"'])
def test_cdi_that_failed_replaces_nothing(guest: Guest, body: str) -> None:
    spec = guest.root / "run/cdi/nvidia.yaml"
    spec.write_text("good")
    guest.toolkit(body)
    assert guest.run("cdi") != 0
    assert spec.read_text() == "good"


def test_hook_mode_writes_devices_without_hooks(tmp_path: Path) -> None:
    import yaml

    guest = Guest(tmp_path, "hook")
    guest.gpu("0000:02:00.0")
    guest.gpu("0000:01:00.0")
    assert guest.run("cdi") == 0
    spec = yaml.safe_load((tmp_path / "run/cdi/nvidia.yaml").read_text())
    assert spec["kind"] == "nvidia.com/gpu"
    assert [device["name"] for device in spec["devices"]] == ["0", "1"]
    assert [device["containerEdits"] for device in spec["devices"]] == [
        {"env": ["KATA_GPU_0=0000:01:00.0"]},
        {"env": ["KATA_GPU_1=0000:02:00.0"]},
    ]


def test_unknown_word_is_refused(guest: Guest) -> None:
    assert guest.run("bound") == 2
    assert guest.run("") == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="device nodes need root")
def test_devices_makes_the_nodes(guest: Guest) -> None:
    guest.gpu("0000:01:00.0")
    proc = guest.root / "proc"
    for minor, slot in enumerate(("0000:01:00.0", "0000:02:00.0")):
        place = proc / "driver/nvidia/gpus" / slot
        place.mkdir(parents=True)
        (place / "information").write_text(f"Model: \t\t A30\nDevice Minor: \t {minor}\n")
    rights = proc / "driver/nvidia/capabilities/mig"
    rights.mkdir(parents=True)
    (rights / "config").write_text("DeviceFileMinor: 1\nDeviceFileMode: 256\n")
    (proc / "devices").write_text("195 nvidia\n510 nvidia-uvm\n511 nvidia-caps\n")
    if guest.run("devices") != 0:
        pytest.skip("no right to make device nodes here")
    made = {
        path.relative_to(guest.root / "dev").as_posix(): path.stat()
        for path in (guest.root / "dev").rglob("*")
        if path.is_char_device() and not path.is_symlink()
    }
    assert {name: (os.major(s.st_rdev), os.minor(s.st_rdev)) for name, s in made.items()} == {
        "nvidiactl": (195, 255),
        "nvidia0": (195, 0),
        "nvidia1": (195, 1),
        "nvidia-uvm": (510, 0),
        "nvidia-uvm-tools": (510, 1),
        "nvidia-caps/nvidia-cap1": (511, 1),
    }
    assert made["nvidia0"].st_mode & 0o777 == 0o666
    assert made["nvidia-caps/nvidia-cap1"].st_mode & 0o777 == 0o400
    assert (guest.root / "dev/char/195:0").readlink() == Path("../nvidia0")
    assert guest.run("devices") == 0
    assert guest.run("changed") == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="device nodes need root")
@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("switches", [0, 2])
def test_devices_makes_the_switches_nodes(tmp_path: Path, asked: bool, switches: int) -> None:
    guest = Guest(tmp_path, "cdi", ("fabricmanager",) if asked else ())
    proc = guest.root / "proc"
    place = proc / "driver/nvidia-nvswitch/devices"
    place.mkdir(parents=True)
    for number in range(switches):
        (place / f"0000:0{number}:00.0").mkdir()
    rights = proc / "driver/nvidia-nvlink/capabilities"
    rights.mkdir(parents=True)
    (rights / "fabric-mgmt").write_text("DeviceFileMinor: 3\nDeviceFileMode: 256\n")
    (proc / "devices").write_text("195 nvidia\n509 nvidia-nvswitch\n508 nvidia-nvlink\n"
                                  "510 nvidia-uvm\n511 nvidia-caps\n")
    if guest.run("devices") != 0:
        pytest.skip("no right to make device nodes here")
    made = {path.name: path.stat().st_rdev for path in (guest.root / "dev").rglob("nvidia-*")
            if path.is_char_device() and not path.is_symlink()}
    assert made["nvidia-cap3"] == os.makedev(511, 3)
    found = {name: node for name, node in made.items() if "switch" in name or "nvlink" in name}
    assert found == ({
        "nvidia-nvswitchctl": os.makedev(509, 255), "nvidia-nvswitch0": os.makedev(509, 0),
        "nvidia-nvswitch1": os.makedev(509, 1), "nvidia-nvlink": os.makedev(508, 0),
    } if asked and switches else {})


# --- the prestart hook ---------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("timeout") is None, reason="needs timeout(1)")
@pytest.mark.parametrize("status", [0, 3])
def test_hook_passes_arguments_and_state_without_an_environment(
    tmp_path: Path, status: int
) -> None:
    program = tmp_path / "hook-binary"
    program.write_text(
        f'#!/bin/sh\ncat >{tmp_path}/state\necho "$@" >{tmp_path}/argv\nexit {status}'
    )
    program.chmod(0o755)
    script = text(rendered(toolkit_mode="hook", hook_binary=str(program)), HOOK)
    hook = tmp_path / "nvidia-container-toolkit.sh"
    hook.write_text(script.replace("/dev/kmsg", str(tmp_path / "kmsg")))
    hook.chmod(0o755)
    done = subprocess.run([hook, "prestart"], env={}, input=b'{"id": "1"}', check=False)
    assert done.returncode == status
    assert (tmp_path / "state").read_text() == '{"id": "1"}'
    assert (tmp_path / "argv").read_text().split() == [
        "-config",
        "/etc/nvidia-container-runtime/config.toml",
        "prestart",
    ]
    assert (tmp_path / "kmsg").exists() == (status != 0)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
def test_programs_pass_shellcheck(tmp_path: Path) -> None:
    for mode in ("cdi", "hook", "none"):
        entries = rendered(toolkit_mode=mode, services=["fabricmanager", "dcgm"])
        for path in (GUEST, HOOK, "/usr/sbin/ip6tables-save"):
            if path in entries:
                program = tmp_path / f"{mode}-{Path(path).name}"
                program.write_bytes(entries[path].content)
                subprocess.run(["shellcheck", program], check=True)
