"""What `host smoke` runs in a container, and what its answers mean."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from katagpu.host import pci

MARK = "@@katagpu"
# Plain sh, and nothing that a small image may lack: lspci is used where it is, sysfs else.
SCRIPT = f"""\
echo '{MARK} kernel'; uname -r
echo '{MARK} functions'
for d in /sys/bus/pci/devices/*; do
  read -r v < "$d/vendor"; read -r i < "$d/device"; read -r c < "$d/class"
  echo "${{d##*/}} $v $i $c"
  while read -r line; do echo "  $line"; done < "$d/resource"
done
echo '{MARK} lspci'; if command -v lspci > /dev/null; then lspci -nn; fi
echo '{MARK} nvidia-smi'; nvidia-smi 2>&1; echo "{MARK} status $?"
"""
# What the runtime says when no container comes to be, and what to do about it.
REASONS: Sequence[tuple[str, str]] = (
    (r"GetPodResources|cold plug: |Pod Resources CDI", "Kata asks the kubelet for a pod's GPUs, "
     "and this container is in none: smoke --with ctr runs it with a configuration whose "
     "pod_resource_api_sock is empty (katagpu host snippets ctr)"),
    (r"vhost-vsock|host system doesn't support vsock", "modprobe vhost-vsock"),
    (r"group \d+ is not viable", "bind the whole IOMMU group to vfio-pci: katagpu host bind BDF"),
    (r"/dev/kvm|KVM kernel module", "KVM is not there: virtualisation has to be on in the BIOS; "
                                    "modprobe kvm_intel, or kvm_amd"),
    (r"cannot allocate memory|VFIO_MAP_DMA|memlock|RLIMIT", "QEMU may not lock the guest's memory: "
     "LimitMEMLOCK=infinity for containerd, or less default_memory"),
    (r"key \S+ not found|error applying key", "a drop-in has a key that this Kata does not know: "
     "katagpu host configure --check"),
    (r"Root Ports? exce+d|no more (free )?(root|pcie) ports?|no free .*port",
     "more functions than ports: katagpu host configure"),
    (r"dial.*timed? ?out|timed out connecting to vsock|agent.*not respond|CheckRequest",
     "the guest did not start, or its agent did not: journalctl -t kata; is the kernel that of the "
     "image? katagpu host configure --check"),
    (r"no such file or directory.*(vmlinu|\.img|\.image|initrd)|(vmlinu|\.img|\.image|initrd).*no "
     r"such file", "a file of the guest is not there: katagpu-install.pyz status"),
    (r"shim.*(not found|no such file)|runtime.*not (found|installed|supported)|executable file not "
     r"found", "containerd does not find Kata's shim: katagpu host snippets containerd"),
    (r"failed to resolve|pull access denied|not found.*manifest|image.*not found",
     "the container's image cannot be pulled: --image with one that can"),
    (r"permission denied|must be root|connect: permission", "run it as root: sudo"),
    (r"containerd\.sock.*(no such file|refused)|cannot access containerd", "containerd does not "
     "run: systemctl start containerd"),
)
SMI: Sequence[tuple[str, str]] = (
    (r"not found", "the toolkit in the guest did not put it into the container: with CDI, is "
     "/var/run/cdi in the guest complete? With the hook, is guest_hook_path set? katagpu host "
     "configure --check"),
    (r"couldn't communicate|No devices were found", "the driver in the guest has not taken the "
     "GPU: does it support this one? katagpu host check; the guest's dmesg says more (journalctl "
     "-t kata)"),
    (r"version mismatch", "modules and libraries in the guest are of two drivers: install the "
     "release again"),
)


@dataclass(frozen=True)
class Step:
    """A step of the guide, and whether it succeeded; `reason` where it did not."""

    name: str
    passed: bool
    said: str
    reason: str = ""

    @property
    def lines(self) -> list[str]:
        """For people."""
        head = f"{'pass' if self.passed else 'FAIL'}  {self.name}: {self.said}"
        return [head, f"      {self.reason}"] if self.reason else [head]


def why(said: str, reasons: Sequence[tuple[str, str]] = REASONS) -> str:
    """The cure for what a program said; none where it is not known."""
    return next((cure for pattern, cure in reasons if re.search(pattern, said, re.I)), "")


def sections(out: str) -> dict[str, list[str]]:
    """The parts of what the script said."""
    found: dict[str, list[str]] = {}
    name = ""
    for line in out.replace("\r", "").splitlines():
        if line.startswith(MARK):
            name, _, rest = line[len(MARK):].strip().partition(" ")
            found[name] = [rest] if rest else []
        elif name:
            found[name].append(line)
    return found


def functions(lines: Sequence[str]) -> dict[str, tuple[str, str, list[pci.Bar]]]:
    """The functions in the guest: ids, class and BARs by address."""
    found: dict[str, tuple[str, str, list[pci.Bar]]] = {}
    resources: dict[str, list[str]] = {}
    address = ""
    for line in lines:
        words = line.split()
        if not line.startswith(" ") and len(words) == 4:
            address = words[0]
            found[address] = (f"{words[1][2:]}:{words[2][2:]}", words[3][2:].rjust(6, "0"), [])
            resources[address] = []
        elif address:
            resources[address].append(line.strip())
    return {name: (ids, kind, pci.bars("\n".join(resources[name])))
            for name, (ids, kind, _) in found.items()}


def judge(out: str, ids: Sequence[str], release: str | None) -> Iterator[Step]:
    """The guide's steps, from what the script said.

    `ids` are those of the functions that were given away; `release` is the kernel's, where known.
    """
    parts = sections(out)
    kernel = "".join(parts.get("kernel", [])).strip()
    yield Step("uname -r", bool(kernel) and release in (None, kernel), kernel or "nothing",
               "" if release in (None, kernel) else
               f"this guest's kernel is {release}: Kata boots another one; katagpu host configure "
               "--check")
    there = functions(parts.get("functions", []))
    for wanted in ids:
        mine = {address: bars for address, (found, _, bars) in there.items() if found == wanted}
        if not mine:
            others = ", ".join(sorted(found for found, _, _ in there.values())) or "no function"
            yield Step(f"lspci -nn: {wanted}", False, f"it is not there, but {others}",
                       "the GPU was not plugged in: cold_plug_vfio and pcie_root_port; katagpu "
                       "host configure --check")
            continue
        yield Step(f"lspci -nn: {wanted}", True, _lspci(parts.get("lspci", []), wanted, mine))
        for address, bars in mine.items():
            yield _regions(address, bars)
    yield _smi(parts)


def _lspci(lines: Sequence[str], ids: str, mine: dict[str, list[pci.Bar]]) -> str:
    return next((line.strip() for line in lines if f"[{ids}]" in line), ", ".join(mine))


def _regions(address: str, bars: Sequence[pci.Bar]) -> Step:
    lacking = [bar for bar in bars if not bar.assigned]
    shown = ", ".join(f"Region {bar.number}: {pci.amount(bar.size)} at {bar.start:x}"
                      for bar in bars if bar.assigned)
    if bars and not lacking:
        return Step(f"Region of {address}", True, shown)
    what = ", ".join(f"Region {bar.number} ({pci.amount(bar.size)})" for bar in lacking)
    return Step(f"Region of {address}", False, f"{what or 'no BAR'} has no address",
                "the guest has no room for it: a large BAR wants a root port, pci=realloc and "
                "enough address bits (katagpu host check); katagpu host configure --check")


def _smi(parts: dict[str, list[str]]) -> Step:
    text = "\n".join(parts.get("nvidia-smi", []))
    status = " ".join(parts.get("status", []))
    table = re.search(r"NVIDIA-SMI\s+([\d.]+).*?Driver Version:\s*([\d.]+)", text, re.S)
    if status == "0" and table:
        names = re.findall(r"^\|\s+\d+\s+(\S.*?)\s{2,}", text, re.M)
        return Step("nvidia-smi", True, ", ".join([f"driver {table[2]}", *names]))
    last = (text.strip().splitlines() or ["it said nothing"])[-1]
    return Step("nvidia-smi", False, f"status {status or '?'}: {last}",
                why(text, SMI) or "journalctl -t kata has the guest's messages")
