"""A program in the place of nvidia-smi, with the words and tables of the real one, and a memory.

Its state is a JSON file below the host's root. `fail` has what it says, and its status, by the
option that it refuses; `late` has the same for one that it does first, and `hangs` options that
never end after that; `slow` makes a mode wait for a reset; `prefix` is put before all tables.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

STATE = "nvidia-smi.json"
PROFILES = [("1g.10gb", 19, 7, 9.50, 1), ("1g.10gb+me", 20, 1, 9.50, 1),
            ("2g.20gb", 14, 3, 19.50, 2), ("3g.40gb", 9, 2, 39.25, 4),
            ("4g.40gb", 5, 1, 39.25, 4), ("7g.80gb", 0, 1, 78.75, 8)]
SLICES = 8


def write(root: Path, gpu: str, **changes: Any) -> None:
    """Its state: one GPU, whose MIG is off."""
    (root / STATE).write_text(json.dumps({
        "address": gpu, "current": "Disabled", "pending": "Disabled", "instances": [],
        "processes": [], "mode": "None", "slow": False, "fail": {}, "late": {},
        "hangs": [], "log": [], **changes}))


def read(root: Path) -> Any:
    """What it has become."""
    return json.loads((root / STATE).read_text())


def script() -> str:
    """What starts it."""
    return f'exec {sys.executable} {__file__} "$@"'


class Smi:
    """One call."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state = json.loads(path.read_text())

    def run(self, words: list[str]) -> int:
        """Its status."""
        status = self.answer(words)
        for option, (text, late) in self.state["late"].items():
            if option in words:
                print(text)
                return int(late)
        if set(self.state["hangs"]) & set(words):
            time.sleep(60)
        return status

    def answer(self, words: list[str]) -> int:
        """Do what is asked."""
        self.state["log"].append(words)
        self.path.write_text(json.dumps(self.state))
        assert os.environ["LC_ALL"] == "C"
        for option, (text, status) in self.state["fail"].items():
            if option in words:
                print(text)
                return int(status)
        if words == ["-q", "-x"]:
            print(self.xml())
        elif words[0].startswith("--query-gpu"):
            print(f"0000{self.state['address']}, {self.state['current']}")
        elif words[0] == "mig":
            assert words[1:3] == ["-i", self.state["address"]]
            return self.mig(words[3:])
        else:
            assert words[:2] == ["-i", self.state["address"]]
            self.mode(words[2:])
        self.path.write_text(json.dumps(self.state))
        return 0

    def xml(self) -> str:
        """`-q -x`, the parts that are read."""
        devices = "".join(f"<mig_device><index>{number}</index><gpu_instance_id>{one['id']}"
                          f"</gpu_instance_id><compute_instance_id>{ci}</compute_instance_id>"
                          "</mig_device>" for number, one in enumerate(self.state["instances"])
                          for ci in one["compute"]) or "None"
        processes = "".join(f"<process_info><pid>{pid}</pid><process_name>{name}</process_name>"
                            "</process_info>" for pid, name in self.state["processes"])
        return (f"""<?xml version="1.0" ?>
<!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v12.dtd">
<nvidia_smi_log><driver_version>550.54.16</driver_version><gpu id="0000{self.state['address']}">
<product_name>NVIDIA A100 80GB PCIe</product_name><mig_mode>
<current_mig>{self.state['current']}</current_mig><pending_mig>{self.state['pending']}"""
                f"</pending_mig></mig_mode><mig_devices>{devices}</mig_devices>"
                "<gpu_virtualization_mode><virtualization_mode>"
                f"{self.state['mode']}</virtualization_mode></gpu_virtualization_mode>"
                f"<processes>{processes}</processes></gpu></nvidia_smi_log>")

    def mode(self, words: list[str]) -> None:
        """`-mig`, `--gpu-reset`"""
        name = f"0000{self.state['address']}"
        if words == ["--gpu-reset"]:
            self.state["current"] = self.state["pending"]
            print(f"GPU {name} was successfully reset.\nAll done.")
            return
        word = {"0": "Disabled", "1": "Enabled"}[words[1]]
        self.state["pending"] = word
        if self.state["slow"]:
            print(f"Warning: MIG mode is in pending {word[:-1].lower()} state for GPU {name}:Not "
                  "Supported\nReboot the system or try nvidia-smi --gpu-reset to make MIG mode "
                  f"effective on GPU {name}\nAll done.")
        else:
            self.state["current"] = word
            print(f"{word} MIG Mode for GPU {name}\nAll done.")

    def mig(self, words: list[str]) -> int:
        """`mig …`"""
        instances = self.state["instances"]
        if words[0] == "-lgip":
            self.profiles()
        elif self.state["current"] != "Enabled":
            print("No MIG-enabled devices found.")
            return 6 if words[0] not in ("-lgi", "-lci") else 0
        elif words[0] == "-lgi":
            self.table(" GPU   Name             Profile  Instance   Placement", [
                f"|   0  MIG {one['name']:<14}{one['profile']:>4}{one['id']:>9}"
                f"{one['start']:>11}:{one['size']}     |" for one in instances], "GPU instances")
        elif words[0] == "-lci":
            self.table(" GPU     GPU       Name             Profile   Instance   Placement", [
                f"|   0{one['id']:>7}       MIG {one['name']:<15}{0:>4}{ci:>10}          0:1     |"
                for one in instances for ci in one["compute"]], "compute instances")
        else:
            return self.change(words)
        return 0 if instances or words[0] == "-lgip" else 6

    def profiles(self) -> None:
        """`-lgip`"""
        used = sum(one["size"] for one in self.state["instances"])
        rows = []
        for name, number, total, memory, size in PROFILES:
            free = min(total, (SLICES - used) // size)
            rows += [f"|   0  MIG {name:<14}{number:>4}{free:>6}/{total}        {memory:.2f}      "
                     "No     14     1     0   |",
                     f"|{'1     1     0   ':>77}|"]
        self.table(" GPU   Name             ID    Instances   Memory     P2P    SM    DEC   ENC",
                   rows, "GPU instance profiles")

    def table(self, head: str, rows: list[str], title: str) -> None:
        """A table, or that there is none."""
        if not rows:
            print(f"No {title} found: Not Found")
            return
        rule = "+" + "-" * 77 + "+"
        print("\n".join([rule, f"| {title}:", f"|{head}", "|" + "=" * 77 + "|", *rows, rule]))

    def change(self, words: list[str]) -> int:
        """Make and destroy instances."""
        instances = self.state["instances"]
        if "-cgi" in words:
            number, _, start = words[words.index("-cgi") + 1].partition(":")
            name, profile, _, _, size = next(one for one in PROFILES if str(one[1]) == number)
            taken = {slot for one in instances
                     for slot in range(one["start"], one["start"] + one["size"])}
            place = int(start) if start else next(
                slot for slot in range(0, SLICES, size) if slot not in taken)
            made = {"id": place + 7, "name": name, "profile": profile, "start": place,
                    "size": size, "compute": []}
            instances.append(made)
            print(f"Successfully created GPU instance ID {made['id']:>2} on GPU  0 using profile "
                  f"MIG {name} (ID {profile:>2})")
        else:
            wanted = words[words.index("-gi") + 1]
            one = next(one for one in instances if str(one["id"]) == wanted)
            if "-cci" in words:
                one["compute"].append(len(one["compute"]))
            elif "-dci" in words:
                one["compute"] = []
            elif one["compute"]:
                print(f"Unable to destroy GPU instance ID {one['id']}: In use by another client")
                return 19
            else:
                instances.remove(one)
        self.path.write_text(json.dumps(self.state))
        return 0


if __name__ == "__main__":
    sys.exit(Smi(Path(os.environ["KATAGPU_HOST_ROOT"]) / STATE).run(sys.argv[1:]))
