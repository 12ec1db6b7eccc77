"""Whole command lines, on a copy of the repository with toy stages."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from katagpu import parameters
from tests import toybuild
from tests.toyrepo import ToyRepository

ALL = ["driver_modules", "driver_user", "image", "kata_config", "kernel", "kernel_config",
       "manifest", "rootfs", "sbom", "toolkit"]
RESULTS = {
    "vmlinuz-6.1-toy", "vmlinuz-nvidia-gpu.container", "vmlinux-6.1-toy",
    "vmlinux-nvidia-gpu.container", "System.map-6.1-toy", "config-6.1-toy",
    "linux-headers-6.1-toy.deb", "checks.txt", "sizes.json", "files.mtree",
    "50-katagpu.toml", "50-katagpu-runtime-rs.toml", "manifest.json", "sbom.spdx.json",
    "sbom.cdx.json", "licences.txt",
    "kata-debian-trixie-nvidia-gpu-550.163.01.image", "kata-containers-nvidia-gpu.img"}


@pytest.fixture
def toy(tmp_path: Path) -> ToyRepository:
    """The copy."""
    return ToyRepository(tmp_path)


@pytest.fixture
def built(toy: ToyRepository) -> ToyRepository:
    """The copy with everything built."""
    status, _out, err = toy.run("build_image")
    assert status == 0, err
    assert sorted(toy.made()) == ALL
    return toy


def results(toy: ToyRepository) -> set[str]:
    """The names of what a build left."""
    return {path.name for path in toy.out.iterdir() if path.name[0] != "."} - {
        "lock.json", "logs", "build-record.json"}


def test_commands_of_doit_for_a_state_that_is_not_kept(toy: ToyRepository) -> None:
    shown = toy.run("help")[1]
    for word in ("dumpdb", "forget", "ignore", "reset-dep", "strace", "clean", "info"):
        status, out, err = toy.run(word, "build_image")
        assert (status, out) == (1, "")
        assert err.splitlines()[0] == f"error: there is no task {word!r}"
        assert "Traceback" not in err
        assert f"./doitw {word} " not in shown


def test_list_explains_each_task_in_one_line(toy: ToyRepository) -> None:
    status, out, err = toy.run("list")
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert (status, err) == (0, "")
    assert {"setup", "lock", "fetch", "build_image", "build_kernel", "build_headers",
            "build_rootfs", "install_driver", "install_toolkit", "build_initrd", "test", "lint",
            "fmt", "bench", "why", "diff", "cache:list", "cache:verify", "cache:gc"} <= set(lines)
    assert all(len(line) < 100 for line in out.splitlines())
    assert not any(name.startswith("_") for name in lines)


@pytest.mark.parametrize(("argv", "said"), [
    (["help"], "./doitw help TASK "), (["-h"], "./doitw help TASK "), (["--help"], "EXTRA_PKGS="),
    (["help", "run"], "-n NUMBER "), (["list", "-h"], "--private"), (["help", "help"], "[TASK]"),
    (["help", "build_image"], "everything: kernel, headers, image"),
    (["recipe=debian-trixie", "build_image", "--help"], "  driver=VERSION "),
    (["help", "release"], "  signer=\"COMMAND\" "), (["help", "publish"], "  licensed=1 "),
    (["help", "install"], "  --rollback "), (["help", "lock"], "  --update=PART "),
    (["help", "reproduce"], "  place=DIRECTORY "), (["help", "diff"], "[parameters] diff A B\n"),
    (["help", "host"], "usage: ./doitw host"), (["help", "cache:gc"], "./doitw cache:gc\n"),
])
def test_help(toy: ToyRepository, argv: list[str], said: str) -> None:
    status, out, err = toy.run(*argv)
    assert (status, err) == (0, "")
    assert said in out and "config:" not in out


def test_each_public_task_is_in_the_table_of_parameters(toy: ToyRepository) -> None:
    assert set(toy.run("list", "--quiet")[1].split()) == set(parameters.TASKS)


def test_the_host_s_commands_are_no_tasks(toy: ToyRepository) -> None:
    status, _out, err = toy.run("recipe=debian-trixie", "host", "check", "--json")
    assert status == 1
    assert "hint: ./doitw host check" in err


def test_doit_itself_works_without_the_wrapper(toy: ToyRepository) -> None:
    for word, status in (("list", 0), ("build_kernel", 0), ("nonsense", 3)):
        found = subprocess.run([sys.executable, "-m", "doit", word], cwd=toy.root, text=True,
                               env=toy.environment(), capture_output=True)
        assert found.returncode == status, found.stderr
        assert "Traceback" not in found.stderr
    assert (toy.out / "vmlinuz-6.1-toy").exists()
    assert not list(toy.root.glob(".doit*"))
    assert not (toy.root / ":memory:").exists()


def test_no_arguments_build_the_image(toy: ToyRepository) -> None:
    status, _out, err = toy.run()
    assert status == 0
    assert results(toy) == RESULTS
    assert "in out/debian-trixie/550.163.01/" in err
    assert "To use it with Kata Containers" in err
    assert "no kata-agent in this image" in err


def test_nothing_to_do(built: ToyRepository) -> None:
    for argv in ([], ["build_image"], ["-n1", "build_image"], ["build_kernel"],
                 ["build_kernel"]):
        status, out, err = built.run(*argv)
        name = argv[-1] if argv else "build_image"
        assert (status, out) == (0, "")
        assert err == f"{name}: up to date in out/debian-trixie/550.163.01/\n"
    assert built.made() == []


def test_nothing_to_do_loads_neither_doit_nor_stages(built: ToyRepository) -> None:
    code = ("import sys; from katagpu.__main__ import main; main(['build_image']); "
            "print([name for name in ('doit', 'msgspec', 'katagpu.plan') if name in sys.modules])")
    found = subprocess.run([sys.executable, "-c", code], cwd=built.root, text=True, check=True,
                           env=built.environment(), capture_output=True)
    assert found.stdout == "[]\n"


def test_a_changed_file_rebuilds_what_reads_it(built: ToyRepository) -> None:
    (built.root / "rootfs/word").write_text("other")
    status, _out, _err = built.run()
    assert (status, built.made()) == (0, ["rootfs", "image", "sbom", "manifest"])
    (built.root / "rootfs/word").write_text("word")
    assert built.run()[0] == 0
    assert built.made() == []
    assert b" word " in (built.out / "checks.txt").read_bytes()


def test_results_deleted_or_altered_come_back(built: ToyRepository) -> None:
    shutil.rmtree(built.out / "logs")
    for path in (built.out / "vmlinuz-6.1-toy", built.out / "kata-containers-nvidia-gpu.img"):
        path.unlink()
    (built.out / "manifest.json").write_text("altered")
    assert built.run()[0] == 0
    assert results(built) == RESULTS
    assert (built.out / "manifest.json").read_text().startswith("manifest manifest")
    saved = (built.out / "lock.json").read_bytes()
    shutil.rmtree(built.root / "out")
    built.out.mkdir(parents=True)
    (built.out / "lock.json").write_bytes(saved)
    assert built.run()[0] == 0
    assert results(built) == RESULTS
    assert built.made() == []


def test_corrupted_blobs_are_found_dropped_and_made_again(built: ToyRepository) -> None:
    results = [built.out / "kata-debian-trixie-nvidia-gpu-550.163.01.image",
               built.out / "vmlinux-6.1-toy", built.out / "50-katagpu.toml"]
    before = [path.read_bytes() for path in results]
    for blob in (built.store / "blobs/sha256").iterdir():
        if (data := blob.read_bytes()) in before:
            blob.chmod(0o644)
            blob.write_bytes(data[:-1] + b"?")
    for path in results:
        path.unlink()
    status, _out, err = built.run()
    assert status == 0, err
    assert "is damaged" in err
    assert [path.read_bytes() for path in results] == before
    assert sorted(built.made()) == ["image", "kata_config", "kernel"]
    assert built.run("cache:verify")[0] == 0


def test_the_build_record_has_hits_and_misses(built: ToyRepository) -> None:
    path = built.out / "build-record.json"
    steps = {step["stage"]: step for step in json.loads(path.read_bytes())["steps"]}
    assert sorted(steps) == ALL
    assert not any(step["hit"] for step in steps.values())
    (built.root / "rootfs/word").write_text("other")
    built.run()
    record = json.loads(path.read_bytes())
    steps = {step["stage"]: step for step in record["steps"]}
    assert (record["task"], record["recipe"]) == ("build_image", "debian-trixie")
    assert [name for name in ALL if not steps[name]["hit"]] == [
        "image", "manifest", "rootfs", "sbom"]
    assert steps["rootfs"]["reason"].startswith("files.word: ")


def test_a_run_that_changes_no_result_leaves_its_record_too(built: ToyRepository) -> None:
    recipe = built.root / "recipes/debian-trixie.yaml"
    recipe.write_text(recipe.read_text().replace("kernel_module: open", "kernel_module: closed"))
    lock = built.out / "lock.json"
    before = built.lock.request
    lock.write_text(lock.read_text().replace(before, built.identity()))
    assert built.run()[2].endswith("build_image: up to date in out/debian-trixie/550.163.01/\n")
    assert built.made() == ["driver_modules"]  # toys: its output is the same
    steps = json.loads((built.out / "build-record.json").read_bytes())["steps"]
    assert [step["stage"] for step in steps if not step["hit"]] == ["driver_modules"]


def test_why(built: ToyRepository) -> None:
    assert built.run("why", "image")[1].splitlines()[-2:] == ["rootfs: hit", "image: hit"]
    (built.root / "rootfs/word").write_text("other")
    status, out, err = built.run("why", "build_image")
    lines = dict(line.split(": ", 1) for line in out.splitlines())
    assert (status, err) == (0, "")
    assert sorted(lines) == ALL
    assert lines["kernel"] == "hit"
    assert lines["rootfs"].startswith("miss: files.word: ")
    assert lines["image"] == "miss: waits for rootfs"
    assert built.run("why")[1] == out


def test_why_of_a_fresh_clone(toy: ToyRepository) -> None:
    """What would run, though nothing was resolved yet."""
    (toy.out / "lock.json").unlink()
    status, out, err = toy.run("why", "build_image")
    lines = dict(line.split(": ", 1) for line in out.splitlines())
    assert (status, err) == (0, "")
    assert lines.pop("lock") == "miss: not made yet; it comes before all else"
    assert lines == dict.fromkeys(ALL, "miss: there is no lock yet")
    assert out.splitlines()[0].startswith("lock") and toy.made() == []


def test_why_without_a_lock_knows_what_takes_no_packages(built: ToyRepository) -> None:
    (built.out / "lock.json").unlink()
    status, out, _err = built.run("why", "kernel")
    assert status == 0 and "kernel: hit" in out.splitlines()


def test_diff(toy: ToyRepository) -> None:
    toybuild.write(toy.out)
    toybuild.write(toy.out.parent / "535.1", driver="535.1", config=["CONFIG_SMP=y"])
    started = time.monotonic()
    status, out, err = toy.run("diff", "550.163.01", "535.1")
    assert (status, err) == (0, "")
    assert time.monotonic() - started < 10  # doit's start; the machine may be busy
    assert out.splitlines()[0] == "debian-trixie/550.163.01 → debian-trixie/535.1"
    assert "  driver.version: 550.163.01 → 535.1" in out
    assert "CONFIG_NR_CPUS: 8 → not set" in out
    assert "libcuda.so.1" not in out
    assert "libcuda.so.1" in toy.run("diff", "550.163.01", "535.1", "all=1")[1]
    status, out, err = toy.run("diff", "550.163.01", "out/debian-trixie/535.1", "json=1")
    assert (status, err, json.loads(out)["same"]) == (0, "", False)
    assert toy.run("diff", "550.163.01", "550.163.01")[1].endswith("Nothing differs.\n")
    assert toy.made() == []


@pytest.mark.parametrize(("argv", "said"), [
    ([], "error: diff: two builds are compared, and here are 0"),
    (["550.163.01"], "builds below out/: debian-trixie/550.163.01"),
    (["550.163.01"] * 3, "here are 3"),
    (["550.163.01", "535"], "there is no build '535'"),
    (["550.163.01", "recipes"], "recipes is no build: it has no manifest.json"),
    (["550.163.01", "dodo.py"], "dodo.py is not a manifest"),
])
def test_diff_of_what_is_no_build(toy: ToyRepository, argv: list[str], said: str) -> None:
    toybuild.write(toy.out)
    status, out, err = toy.run("diff", *argv)
    assert (status, out) == (1, "")
    assert said in err and "hint: " in err and "Traceback" not in err


# statuses


@pytest.mark.parametrize(("kind", "status", "said"), [
    ("user", 1, "error: rootfs: the user can mend it\n  hint: like this\n"),
    ("step", 2, "error: rootfs: the step broke\n"),
])
def test_failures_have_their_status_and_no_traceback(
    toy: ToyRepository, kind: str, status: int, said: str,
) -> None:
    for processes in ("-n0", "-n3"):
        found, _out, err = toy.run(processes, "build_image", TOY_FAIL=f"{kind}:rootfs")
        assert found == status
        assert said in err
        assert "Traceback" not in err
        assert err.count("error: ") == 1
    assert results(toy) == set()
    assert toy.run()[0] == 0


def test_a_fault_of_ours_says_so(toy: ToyRepository) -> None:
    status, _out, err = toy.run(TOY_FAIL="bug:rootfs")
    assert status == 2
    assert "error: rootfs: a fault in katagpu, please report it" in err
    assert "ValueError: oops" in err


def test_independent_stages_run_side_by_side_and_lines_stay_whole(toy: ToyRepository) -> None:
    _status, _out, err = toy.run(TOY_PAUSE="0.3")
    events = toy.said.read_text().splitlines()
    assert [event[0] for event in events[:3]] == ["+", "+", "+"]
    for line in err.splitlines():
        assert line.startswith(("> ", "+ ", "! ", "in ", "  ", "To use")), line
    assert sum(line.startswith("> ") for line in err.splitlines()) == len(ALL)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_a_build_which_then_goes_on(
    toy: ToyRepository, number: signal.Signals, status: int,
) -> None:
    process = toy.start(["build_image"], TOY_PAUSE="1")
    deadline = time.monotonic() + 60
    while not (toy.said.exists() and "+kernel\n" in toy.said.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    _out, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert "run the same command again to go on" in err
    assert "Traceback" not in err
    before = toy.made()
    assert toy.run()[0] == 0
    assert sorted(before + toy.made()) == ALL
    assert list((toy.store / "staging").iterdir()) == []


def test_two_builds_at_once_do_the_work_once(toy: ToyRepository) -> None:
    processes = [toy.start(["build_image"], TOY_PAUSE="0.2") for _ in range(2)]
    for process in processes:
        process.communicate(timeout=60)
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted(toy.made()) == ALL
    assert results(toy) == RESULTS
    assert toy.run()[2].startswith("build_image: up to date")


def test_two_tasks_at_once_restore_the_same_files(toy: ToyRepository) -> None:
    status, _out, err = toy.run("build_kernel", "build_headers", "build_image", "build_initrd")
    assert status == 0, err
    assert results(toy) >= RESULTS


def test_an_initrd_of_a_guest_whose_driver_has_a_disk_is_refused(built: ToyRepository) -> None:
    path = built.root / "recipes" / "debian-trixie.yaml"
    path.write_text(path.read_text().replace("\nimage:\n", "\nimage:\n  model: extension\n"))
    for argv in (["build_initrd"], ["driver=all", "build_initrd"]):
        status, _out, err = built.run(*argv)
        assert status == 1, err
        assert err.count("error: ") == 1 and "Traceback" not in err
        assert ": with `image: {model: extension}` the driver is on a disk of its own" in err
        assert "build_initrd: build_initrd" not in err
        assert "hint: ./doitw build_image, or `image: {model: single}`" in err
    assert built.made() == []
    assert "build_initrd" in built.run("list")[1]
    place = built.out / "lock.json"
    place.write_text(place.read_text().replace(built.lock.request, built.identity()))
    status, out, _err = built.run("why", "build_initrd", "kernel")
    assert status == 0 and out.splitlines()[-1] == "kernel: hit"


# care of the store


def test_cache_alone_changes_nothing(built: ToyRepository) -> None:
    status, out, err = built.run("cache", KATAGPU_STORE_SIZE="0")
    assert (status, err) == (0, "")
    listed = built.run("cache:list", KATAGPU_STORE_SIZE="0")[1]
    assert out.splitlines()[-1] == listed.splitlines()[-1]
    assert built.run()[0] == 0
    assert built.made() == []


def test_a_store_that_cannot_be_looked_into(toy: ToyRepository) -> None:
    for task, said in (("cache:list", "cannot list the store"), ("cache:gc", "no store at")):
        status, _out, err = toy.run(task, KATAGPU_STORE=f"/tmp/{'long' * 100}")
        assert (status, "Traceback" in err) == (1, False)
        assert said in err and "File name too long\n  hint: set KATAGPU_STORE" in err


def test_cache_tasks(built: ToyRepository) -> None:
    status, out, _err = built.run("cache:list")
    assert status == 0
    lines = out.splitlines()
    assert len(lines) == len(ALL) + 6
    assert "unpacked copies; cache:gc drops them" in lines[-5]
    assert "ccache; not counted below, it keeps each compiler's part under 2GB" in lines[-2]
    assert f" in {built.store}; cache:gc makes that at most 20.0 GB" in lines[-1]
    assert built.run("cache:verify")[:2] == (0, "every blob is what its name says\n")
    blob = next((built.store / "blobs/sha256").iterdir())
    blob.chmod(0o644)
    blob.write_text("x")
    status, _out, err = built.run("cache:verify")
    assert status == 2
    assert f"1 damaged blobs were dropped: {blob.name[:12]}" in err
    status, out, _err = built.run("cache:gc", KATAGPU_STORE_SIZE="0")
    assert (status, out.endswith(" freed\n")) == (0, True)
    assert built.run("-n2", "build_image")[0] == 0
    assert sorted(built.made()) == ALL
    status, _out, err = built.run("cache:gc", KATAGPU_STORE_SIZE="much")
    assert status == 1
    assert "not a number of bytes" in err and "KATAGPU_STORE_SIZE=20000000000" in err


def test_a_task_without_results_asks_the_store(toy: ToyRepository) -> None:
    made = ["driver_modules", "driver_user", "kernel", "kernel_config"]
    for expected in (made, [], []):
        assert toy.run("install_driver")[0] == 0
        assert sorted(toy.made()) == expected
    assert toy.run("cache:gc", KATAGPU_STORE_SIZE="0")[0] == 0
    assert toy.run("install_driver")[0] == 0
    assert sorted(toy.made()) == made


def test_gc_does_not_run_beside_a_build(toy: ToyRepository) -> None:
    process = toy.start(["build_image"], TOY_PAUSE="1")
    while not toy.said.exists():
        time.sleep(0.02)
    status, _out, err = toy.run("cache:gc")
    process.kill()
    process.communicate()
    assert status == 1
    assert "a build is using the store" in err


def test_a_run_writes_nothing_but_out_and_store(built: ToyRepository) -> None:
    assert not list(built.root.glob("*.db"))
    assert {path.name for path in (built.root / "out").iterdir()} == {"debian-trixie", ".receipts"}
