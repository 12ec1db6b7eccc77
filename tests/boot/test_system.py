"""Checks of the booted system, on a guest of words."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from typing import Any

import pytest

from katagpu.boot import system
from katagpu.boot.facts import Failed, Skipped
from katagpu.boot.session import Session

from .fakeguest import Said
from .scripted import RELEASE, Scripted

Make = Callable[..., Scripted]
MOUNT = "24 1 254:0 / / ro,relatime - erofs /dev/root ro,user_xattr\n"
PLACE = "/run/kata-extensions/gpu"
VERITY = "extension-gpu\nCRYPT-VERITY-1-extension-gpu\n"


def failed(check: Callable[[Session], list[str]], session: Session, words: str) -> Failed:
    """What a check says, which must have cause and cure."""
    with pytest.raises(Failed, match=words) as found:
        check(session)
    assert found.value.cause and found.value.cure
    assert all(isinstance(line, str) for line in found.value.lines)
    return found.value


def test_ready(scripted: Make) -> None:
    with_target = scripted()
    answers = iter(["ActiveState=activating\nActiveEnterTimestampMonotonic=0\n",
                    "ActiveState=active\nActiveEnterTimestampMonotonic=12340123\n"])
    with_target.tables.programs["systemctl show"] = lambda _asked: (0, next(answers), "")
    assert system.ready(with_target.session) == [
        "kata-containers.target reached 12.3 s after the kernel's start"]
    assert with_target.session.ready_at == 12.340123


def test_a_target_that_is_never_reached(scripted: Make) -> None:
    found = scripted()
    found.tables.programs |= {"systemctl show": "ActiveState=inactive\n",
                              "list-jobs": "42 dev-vdz.device start running\n"}
    refusal = failed(system.ready, found.session, "was not reached within 0 s")
    assert refusal.lines == ["42 dev-vdz.device start running"]


def test_release(scripted: Make) -> None:
    found = scripted()
    found.tables.programs["uname -r"] = f"{RELEASE}\n"
    assert system.release(found.session) == [RELEASE]
    found.tables.programs["uname -r"] = "6.1.0-13-amd64\n"
    failed(system.release, found.session, f"6.1.0-13-amd64, the build's is {RELEASE}")


def test_build_id(scripted: Make) -> None:
    found = scripted()
    note = b"\4\0\0\0\x14\0\0\0\3\0\0\0GNU\0"
    found.tables.files["/sys/kernel/notes"] = note + bytes.fromhex("ab" * 20)
    assert system.build_id(found.session) == ["ab" * 20]
    found.tables.files["/sys/kernel/notes"] = note + bytes.fromhex("ac" * 20)
    assert failed(system.build_id, found.session, "another build id").lines


def test_no_build_id(scripted: Make) -> None:
    with pytest.raises(Skipped):
        system.build_id(scripted(build_id=None).session)


@pytest.mark.parametrize(("shown", "differs"), [
    ("CONFIG_A=y\nCONFIG_B=m\n# CONFIG_C is not set\n", None),
    ("CONFIG_A=y\nCONFIG_B=y\n", "B: y running, m built"),
    ("CONFIG_A=y\n", "B: None running, m built"),
    ("CONFIG_A=y\nCONFIG_B=m\nCONFIG_D=y\n", "D: y running, None built")])
def test_config(scripted: Make, shown: str, differs: str | None) -> None:
    found = scripted()
    found.tables.files["/proc/config.gz"] = gzip.compress(shown.encode())
    if differs is None:
        assert system.config(found.session) == ["2 symbols, all equal"]
    else:
        assert differs in failed(system.config, found.session, "1 symbols").lines[0]


@pytest.mark.parametrize(("enforced", "status", "fine"), [
    ("Y\n", 77, True), ("N\n", 77, False), ("Y\n", 4, False), ("Y\n", 3, False)])
def test_signatures(scripted: Make, enforced: str, status: int, fine: bool) -> None:
    found = scripted()
    found.facts.config.write_text("CONFIG_MODULE_SIG_FORCE=y\n")
    found.tables.files["/sys/module/module/parameters/sig_enforce"] = enforced
    asked: list[str] = []

    def insmod(words: Any) -> tuple[int, str, str]:
        asked.append(str(words))
        return status, "insmod: ERROR: Key was rejected by service\n", ""

    found.tables.programs["insmod"] = insmod
    if fine:
        assert system.signatures(found.session)[1] == "insmod: ERROR: Key was rejected by service"
        assert f"/lib/modules/{RELEASE}" in asked[0]
    else:
        failed(system.signatures, found.session, "takes a module that is not signed")


def test_modules_need_no_signature(scripted: Make) -> None:
    with pytest.raises(Skipped, match="without a signature"):
        system.signatures(scripted().session)


def test_a_kernel_that_does_not_show_its_configuration(scripted: Make) -> None:
    with pytest.raises(Skipped, match="IKCONFIG"):
        system.config(scripted().session)


@pytest.mark.parametrize(("mount", "passes"), [
    (MOUNT, True), (MOUNT.replace("erofs", "ext4"), False), (MOUNT.replace("root ro", "root rw"),
                                                             False)])
def test_root(scripted: Make, mount: str, passes: bool) -> None:
    found = scripted()
    before = "25 24 0:22 / /proc rw - proc proc rw\n"
    found.tables.files["/proc/self/mountinfo"] = before + mount
    if passes:
        assert system.root(found.session) == [mount.strip()]
    else:
        assert failed(system.root, found.session, "not mounted as it should").lines


@pytest.mark.parametrize(("names", "status", "passes"), [
    (VERITY, "/sys/block/dm-0 1\n", True),
    (VERITY, "/sys/block/dm-0 0\n", False),
    ("other\nLVM-x\n", "/sys/block/dm-0 1\n", False),
    ((1, "", "cat: '/sys/block/dm-*/dm/name': No such file or directory\n"),
     "/sys/block/dm-*\n", False)])
def test_verity(scripted: Make, names: Said | str, status: str, passes: bool) -> None:
    found = scripted(verity=True)
    found.tables.programs |= {"cat /sys/block/dm-": names, "for dm in": status}
    if passes:
        assert system.verity(found.session) == [*VERITY.splitlines(), "/sys/block/dm-0 1"]
    else:
        assert failed(system.verity, found.session, "no device of dm-verity").lines


@pytest.mark.parametrize(("names", "devices", "passes"), [
    ("dm-verity\n", "253:0\n", True),
    ("dm-verity\n", "253:1\n", False),
    ("extension-gpu\nCRYPT-VERITY-1-extension-gpu\n", "253:0\n", False)])
def test_verity_of_the_root(scripted: Make, names: str, devices: str, passes: bool) -> None:
    """The kernel's own device has Kata's name and no UUID, and is what is mounted on /."""
    found = scripted(measured=True)
    found.tables.files["/proc/self/mountinfo"] = MOUNT.replace("254:0", "253:0")
    found.tables.programs |= {"dm/name": names, "for dm in": "/sys/block/dm-0 1\n",
                              r"/dev$": devices}
    if passes:
        assert system.verity(found.session)[-1] == "/ is 253:0 of 253:0"
    else:
        assert failed(system.verity, found.session, "no device of dm-verity").lines


def test_extension(scripted: Make) -> None:
    found = scripted(extension=PLACE)
    row = f"60 24 253:0 / {PLACE} ro - erofs /dev/mapper/extension-gpu ro"
    found.tables.files["/proc/self/mountinfo"] = f"{MOUNT}{row}\n"
    assert system.extension(found.session) == [row]
    found.tables.files["/proc/self/mountinfo"] = MOUNT
    found.tables.programs["journalctl"] = "no such device\n"
    found.says("device-mapper: verity: 254:16: data block 1 is corrupted")
    lines = failed(system.extension, found.session, f"nothing is mounted on {PLACE}").lines
    assert lines[0] == "no such device" and "corrupted" in lines[1]


@pytest.mark.parametrize(("facts", "check"), [
    ({}, system.verity), ({}, system.extension), ({"root_format": "initrd"}, system.root)])
def test_what_a_guest_has_not(
    scripted: Make, facts: dict[str, Any], check: Callable[[Session], list[str]],
) -> None:
    with pytest.raises(Skipped):
        check(scripted(**facts).session)


def test_units(scripted: Make) -> None:
    found = scripted()
    found.tables.programs["--failed"] = ""
    assert system.units(found.session) == ["no unit failed"]
    cdi = "nvidia-cdi.service loaded failed failed Describe this guest's GPUs\n"
    found.tables.programs["--failed"] = cdi
    assert "nvidia-cdi.service" in system.units(found.session)[0]
    found.tables.programs["--failed"] = f"{cdi}chrony.service loaded failed failed chrony\n"
    found.tables.programs["journalctl.*chrony"] = "chronyd: not found\n"
    refusal = failed(system.units, found.session, r"failed: chrony.service$")
    assert refusal.lines == ["chronyd: not found"]


LACKS = ("/usr/bin/a: error while loading shared libraries: libx.so.1: cannot open shared object "
         "file: No such file or directory")
VERSION = "/usr/bin/b: /lib/liby.so: version `V2' not found (required by /usr/bin/b)"
ALONE = LACKS.replace("bin/a", "lib/liba.so")
PRIVATE = ALONE.replace("libx.so.1", "libprivate.so")


@pytest.mark.parametrize(("said", "words", "lines"), [
    ("count 431 560\n", None, []),
    (f"{LACKS}\n{VERSION}\ncount 3 2\n", "do not find", [LACKS, VERSION, ALONE]),
    ("count 0 0\n", "no program", ["count 0 0"]), ("", "no program", [])])
def test_libraries(scripted: Make, said: str, words: str | None, lines: list[str]) -> None:
    found = scripted(extension=PLACE)
    found.tables.programs |= {"grep 'cannot open": f"{PRIVATE}\n{ALONE}\n",
                              "ld-linux-x86-64.so.2 --list": said}
    if words is None:
        assert system.libraries(found.session) == [
            "431 lists of the loader, 560 libraries in them, all resolved"]
    else:
        assert failed(system.libraries, found.session, words).lines == lines
    script = found.guest.ran()[0]
    assert f"find / {PLACE} -xdev" in script and f"LD_LIBRARY_PATH={PLACE}/usr/lib" in script


TROUBLE = (
    "BUG: kernel NULL pointer dereference, address: 0000000000000000",
    "Oops: 0000 [#1] PREEMPT SMP PTI",
    "WARNING: CPU: 0 PID: 1 at kernel/workqueue.c:1234 foo+0x1/0x2",
    "Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000100",
    "nvidia_uvm: Unknown symbol nvUvmInterfaceRegisterGpu (err -2)",
    "nvidia: disagrees about version of symbol module_layout",
    "nvidia: version magic '6.1.0 SMP' should be '6.12.117-nvidia-gpu SMP'",
    "rcu: INFO: rcu_sched detected stalls on CPUs/tasks:",
    "watchdog: BUG: soft lockup - CPU#0 stuck for 26s! [modprobe:99]",
    "INFO: task systemd:1 blocked for more than 120 seconds.",
    "Out of memory: Killed process 123 (nvidia-ctk)",
    "nvidia-smi[300]: segfault at 0 ip 00007f sp 00007f error 4 in libc.so.6",
    "I/O error, dev vda, sector 2048 op 0x0:(READ)",
    "device-mapper: verity: 254:1: metadata block 1 is corrupted",
    "device-mapper: verity: 254:1: data block 77 is corrupted",
    "erofs: (device vda1): z_erofs_lz4_decompress_mem: failed to decompress -22 in[4096, 0]",
    "erofs (device dm-0): read error -5 @ 4 of nid 36",
    "EXT4-fs error (device vda1): ext4_lookup:1855: inode #2: comm init",
)
HARMLESS = (
    "Linux version 6.12.117-nvidia-gpu (katagpu@katagpu) (gcc 14.2.0) #1 SMP PREEMPT_DYNAMIC",
    "nvidia: loading out-of-tree module taints kernel.",
    "nvidia: module verification failed: signature and/or required key missing - tainting kernel",
    "NVRM: loading NVIDIA UNIX Open Kernel Module for x86_64  550.163.01",
    "NVRM: GPU 0000:01:00.0: RmInitAdapter failed! (0x62:0x25:1792)",
    "nvidia 0000:01:00.0: enabling device (0000 -> 0002)",
    "pci 0000:00:02.0: bridge window [io  size 0x1000]: can't assign; no space",
    "erofs: (device vda1): mounted with root inode @ nid 36.",
    "erofs (device dm-0): mounted with root inode @ nid 36.",
    "ACPI: PCI: Interrupt link LNKA configured for IRQ 10",
    "Debugging: this is no bug",
)


@pytest.mark.parametrize("text", TROUBLE)
def test_a_kernel_in_trouble(scripted: Make, text: str) -> None:
    found = scripted()
    found.says(*HARMLESS, text)
    lines = failed(system.kernel_log, found.session, "1 lines of trouble").lines
    assert lines[1].endswith(text)


def test_a_kernel_without(scripted: Make) -> None:
    """A program may write what it likes; only the kernel's own lines count."""
    found = scripted()
    found.says(*HARMLESS)
    found.says(*TROUBLE, kernel=False)
    assert system.kernel_log(found.session) == [f"{len(HARMLESS) + len(TROUBLE)} lines"]
