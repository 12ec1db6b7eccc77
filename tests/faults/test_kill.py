"""Kills at random moments, two runs at once, and damaged blobs, on a toy chain of stages.

Run as a script, this file is the toy build: `test_kill.py STORE BASE`, which prints what it made.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

if __name__ == "__main__":
    sys.path.insert(0, os.environ["REPOSITORY"])

from katagpu.plan import Plan
from katagpu.sandbox import Bind, Root
from katagpu.stages.api import Build, Ref, Stage
from katagpu.store import Kind, Store

USR = Bind(source=Path("/usr"), target="/usr")
LAYER = """
set -e
for number in $(seq 40); do echo "$number" > "/etc/$number"; done
rm -r /data
mkdir /data
sleep 0.1
chown 33:33 /etc/7
"""


def note(build: Build) -> None:
    """Count the work: one line for each time that a stage is really made."""
    with (build.store.root.parent / "made").open("a") as stream:
        stream.write(f"{build.stage.name}\n")


def make_file(build: Build) -> None:
    """Plain bytes."""
    note(build)
    time.sleep(0.05)
    build.put_bytes("file", random.Random(1).randbytes(300_000))


def make_layer(build: Build) -> None:
    """A layer made by a program in a sandbox."""
    note(build)
    upper = build.directory("upper")
    build.enter(["sh", "-c", LAYER], [Root(lower=(build.file("base"),), upper=upper)], binds=[USR])
    build.put_tree("layer", upper, overlay=True)


def make_result(build: Build) -> None:
    """A file made from the layer and the bytes, by a program in a sandbox."""
    note(build)
    root = Root(lower=(build.tree("layer"), build.file("base")), upper=build.directory("upper"))
    binds = [USR, Bind(source=build.blob("file"), target="/file")]
    said = build.enter(["sh", "-c", "sha256sum /file /etc/*; ls -la --time-style=+ /data"], [root],
                       binds=binds, capture=True)
    build.put_bytes("result", said.stdout)


def stages(base: Path) -> dict[str, Stage]:
    """The chain. Its base is given as a path that no key knows."""

    class Files(dict[str, Path]):
        """Files that are not in the key: the base is a directory."""

        def items(self) -> Any:
            """None of them."""
            return {}.items()

    files = Files(base=base)
    return {
        "file": Stage(name="file", title="bytes", module="errors", make=make_file,
                      outputs={"file": Kind.FILE}),
        "layer": Stage(name="layer", title="a layer", module="errors", make=make_layer,
                       outputs={"layer": Kind.TREE}, files=files),
        "result": Stage(name="result", title="the result", module="errors", make=make_result,
                        inputs={"layer": Ref(stage="layer", output="layer"),
                                "file": Ref(stage="file", output="file")},
                        outputs={"result": Kind.FILE}, files=files),
    }


def plan(store: Store, base: Path) -> Plan:
    """The plan of the toy build."""
    return Plan(stages(base), store, store.root.parent / "logs")


def build(root: Path, base: Path) -> None:
    """Build it, and print what each stage put out."""
    store = Store(root)
    store.prepare()
    with store.lease():
        toy = plan(store, base)
        toy.ensure("result")
        found = {name: {output: made.identity for output, made in action.outputs.items()}
                 for name in toy.stages for action in [toy.action(name)] if action is not None}
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    from katagpu.run import die_cleanly_on_signals

    die_cleanly_on_signals()
    build(Path(sys.argv[1]), Path(sys.argv[2]))
    sys.exit(0)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A root file system that has its programs from the host's /usr."""
    path = tmp_path / "base"
    for name in ("etc", "usr", "data/deep"):
        (path / name).mkdir(parents=True)
    for name in ("bin", "sbin", "lib", "lib64"):
        (path / name).symlink_to(f"usr/{name}")
    return path


def start(root: Path, base: Path, repository: Path) -> subprocess.Popen[str]:
    """Start the toy build."""
    root.parent.mkdir(exist_ok=True)
    return subprocess.Popen([sys.executable, __file__, str(root), str(base)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, "REPOSITORY": str(repository)})


def finish(process: subprocess.Popen[str]) -> Any:
    """What the toy build printed."""
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    return json.loads(out)


def made(root: Path) -> list[str]:
    """The stages that were made, in order."""
    return (root.parent / "made").read_text().split()


def sound(root: Path) -> None:
    """Nothing of a run is left, and every blob is what its name says."""
    assert list((root / "staging").iterdir()) == []
    assert str(root) not in Path("/proc/self/mountinfo").read_text()
    assert not [path for path in root.rglob("*.part") if path.stat().st_size == 0]
    assert Store(root).verify() == []


def processes(root: Path) -> list[str]:
    """Command lines of processes that work on a store."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if f"{root}/" in words:
            found.append(words)
    return found


@pytest.mark.parametrize("rounds", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_any_moment_the_same_command_goes_on(
    tmp_path: Path, base: Path, repository: Path, rounds: int,
) -> None:
    duration = 60.0
    for name in ("reference", "again"):
        reference = tmp_path / name / "store"
        started = time.monotonic()
        expected = finish(start(reference, base, repository))
        duration = min(duration, time.monotonic() - started)
        sound(reference)
    chance = random.Random(20_250_101 + rounds)
    killed = 0
    for number in range(rounds):
        root = tmp_path / f"round{number}" / "store"
        for _ in range(chance.choice((1, 1, 2))):
            with start(root, base, repository) as process:
                time.sleep(chance.uniform(0.1, 0.9) * duration)
                process.kill()
                process.communicate()
                killed += process.returncode == -signal.SIGKILL
        assert finish(start(root, base, repository)) == expected
        sound(root)
        assert processes(root) == []
    assert killed >= rounds / 4, "many kills met a running build"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_ends_with_its_status_and_goes_on(
    tmp_path: Path, base: Path, repository: Path, number: signal.Signals,
) -> None:
    root = tmp_path / "one" / "store"
    process = start(root, base, repository)
    while not processes(root):  # a sandbox is running
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(number)
    _out, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "run the same command again to go on" in error and "Traceback" not in error
    end = time.monotonic() + 20
    while processes(root) and time.monotonic() < end:
        time.sleep(0.02)
    assert processes(root) == []
    finish(start(root, base, repository))
    sound(root)


def test_two_runs_at_once_do_the_work_once(tmp_path: Path, base: Path, repository: Path) -> None:
    root = tmp_path / "both" / "store"
    runs = [start(root, base, repository) for _ in range(3)]
    found = [finish(process) for process in runs]
    assert found[0] == found[1] == found[2]
    assert sorted(made(root)) == ["file", "layer", "result"]
    sound(root)


@pytest.fixture
def done(tmp_path: Path, base: Path, repository: Path) -> tuple[Path, Any]:
    """A store with the finished toy build, and what it made."""
    root = tmp_path / "done" / "store"
    return root, finish(start(root, base, repository))


def damage(root: Path, base: Path, stage: str) -> None:
    """Flip a bit in a stage's blob, and forget the result that was made from it."""
    store = Store(root)
    toy = plan(store, base)
    action, result = toy.action(stage), toy.action("result")
    assert action is not None and result is not None
    path = store.blob(next(iter(action.outputs.values())).blob)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.chmod(0o644)
    path.write_bytes(data)
    for digest, _used, known in list(store.actions()):
        if known.stage == "result":
            store.forget(digest)


@pytest.mark.parametrize("stage", ["file", "layer"])
def test_a_damaged_blob_in_the_chain_is_dropped_and_made_again(
    done: tuple[Path, Any], base: Path, repository: Path, stage: str,
) -> None:
    root, expected = done
    damage(root, base, stage)
    for unpacked in (root / "unpacked").iterdir():
        from katagpu import sandbox

        sandbox.remove(unpacked)
    assert finish(start(root, base, repository)) == expected
    counts = {name: made(root).count(name) for name in ("file", "layer", "result")}
    assert counts[stage] == 2 and counts["result"] >= 2
    assert counts[{"file": "layer", "layer": "file"}[stage]] == 1, "the other is not touched"
    sound(root)


def test_nothing_to_do_makes_nothing(done: tuple[Path, Any], base: Path, repository: Path) -> None:
    root, expected = done
    before = made(root)
    assert finish(start(root, base, repository)) == expected
    assert made(root) == before
