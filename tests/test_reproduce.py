"""Reproduction by whole command lines: toys that are the same, and each thing that may leak in."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from katagpu import reproduce
from katagpu.plan import Plan
from katagpu.stages.api import Build, Ref, Stage
from katagpu.store import Kind, Store
from tests import toykernelguest
from tests.lockedrepo import LockedRepository, locked_repository
from tests.signers import needs_openssl, signer
from tests.test_toykernel import PROGRAMS
from tests.toyarchive import missing, signing_keys
from tests.toyrepo import RECIPE, REPOSITORY, ToyRepository

needs_programs = pytest.mark.skipif(any(shutil.which(name) is None for name in PROGRAMS),
                                    reason=f"needs {', '.join(PROGRAMS)}")
DIFFOSCOPE = shutil.which("diffoscope")


@pytest.fixture
def toy(tmp_path: Path) -> ToyRepository:
    """The toy repository."""
    return ToyRepository(tmp_path)


def result(toy: ToyRepository) -> dict[str, Any]:
    """The result's file."""
    found: dict[str, Any] = json.loads(
        (toy.root / "out/reproduce" / RECIPE / "result.json").read_bytes())
    return found


def leak(toy: ToyRepository, **expressions: str) -> None:
    """Let what stages make depend on something."""
    path = toy.root / "katagpu/guest.py"
    text = path.read_text()
    for name, expression in expressions.items():
        text = text.replace("    build.facts[", f'    if name == "{name}":\n'
                            f"        word += str({expression})\n    build.facts[", 1)
    path.write_text(text.replace("import os, time", "import os, platform, time\n"
                                 "from katagpu.stages.api import jobs", 1))


def test_what_is_the_same_in_both(toy: ToyRepository) -> None:
    status, _, said = toy.run("reproduce")
    assert status == 0, said
    assert "identical: 21 of 21 outputs (100 %)" in said
    made = toy.made()
    assert made.count("kernel") == 2 and made.count("initrd_config") == 2
    found = result(toy)
    assert found["share"] == 1.0 and found["compared"] == found["identical"] == 21
    assert {"directory", "time zone", "umask", "ccache", "locale", "environment",
            "jobs"} <= set(found["varied"])
    assert set(found["varied"]) | set(found["not_varied"]) == {
        "directory", "time zone", "umask", "ccache", "locale", "environment", "jobs", "host name",
        "uptime", "user", "processors"}
    (image,) = [each for each in found["outputs"] if (each["stage"], each["output"]) == (
        "image", "image")]
    assert image["identical"] and image["file"].endswith("-550.163.01.image")
    assert image["first"] == image["second"]
    assert not list((toy.store / "staging").iterdir()), "nothing is left of the builds"
    # What was the same in both is in the store now.
    assert toy.run("build_image")[0] == 0
    assert toy.made() == []


# Stages that read no other: what differs in one is no matter of another's.
ALONE = ("kernel_config", "toolkit", "driver_user", "kata_config", "initrd_config")
LEAKS = ({
    "the directory": "build.store.root",
    "the repository's directory": "__file__",
    "modes of the repository's files": "oct(os.stat(__file__).st_mode)",
    "the time": "time.time_ns()",
    "the time zone": "time.localtime().tm_hour"}, {
    "the day by this clock": "time.strftime('%d')",
    "the locale": "os.environ.get('LC_ALL')",
    "a variable": "os.environ.get('CFLAGS')",
    "the number of jobs": "jobs()",
    "the home": "os.path.expanduser('~')"}, {
    "the order of a set": "[*{'a', 'b', 'c', 'd', 'e', 'f', 'g'}]",
    **({} if os.geteuid() else {
        "the host's name": "platform.node()",
        "the uptime": "time.monotonic() > 300 * 24 * 3600"})})


@pytest.mark.parametrize("leaks", LEAKS, ids=lambda leaks: ", ".join(leaks))
def test_what_leaks_in_is_found(toy: ToyRepository, leaks: dict[str, str]) -> None:
    chosen = dict(zip(ALONE, leaks.values(), strict=False))
    leak(toy, **chosen)
    status, _, said = toy.run("reproduce", "diffoscope=false")
    assert status == 2, said
    found = result(toy)
    assert 0 < found["share"] < 1
    assert {each["stage"] for each in found["outputs"] if each["began_here"]} == set(chosen)
    for name in chosen:
        assert f"error: {name} {'config' if 'config' in name else 'layer'} differs\n" in said
    assert "from byte" in said
    assert "error: manifest manifest differs; what it is made from differs already" in said
    place = toy.root / "out/reproduce" / RECIPE
    one, other = (next((place / side).glob("manifest.*")).read_bytes()
                  for side in ("first", "second"))
    assert one != other and one.startswith(b"manifest manifest ")
    # What differed is not kept as good, what did not is.
    toy.made()
    toy.run("build_image", "build_initrd")
    made = set(toy.made())
    assert set(chosen) <= made and not set(ALONE) - set(chosen) & made


def test_the_umask_reaches_no_stage_and_a_stamp_of_the_day_is_told(toy: ToyRepository) -> None:
    leak(toy, toolkit="oct(os.umask(0o022))", kernel="time.strftime('%Y-%m-%d', time.gmtime())")
    status, _, said = toy.run("reproduce")
    assert result(toy)["varied"]["umask"] == ["022", "077"]
    assert status == 0, "if this ran at midnight UTC, run it again"
    # A stamp of the day is the same in both, whatever the time zones are; so it is looked for.
    assert "! kernel vmlinuz: has the day of this build in it: 20" in said
    assert "toolkit layer: has the day" not in said


def test_without_diffoscope_it_says_how_to_look(toy: ToyRepository, tmp_path: Path) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    for directory in os.environ["PATH"].split(":"):
        for path in Path(directory).glob("*"):
            if path.name != "diffoscope" and not (programs / path.name).is_symlink():
                (programs / path.name).symlink_to(path)
    leak(toy, toolkit="time.time_ns()")
    _, _, said = toy.run("reproduce", PATH=str(programs))
    assert "diffoscope is not installed" in said
    assert "diffoscope out/reproduce/debian-trixie/first/toolkit.layer out/" in said
    status, _, said = toy.run("reproduce", "diffoscope=/nowhere/diffoscope")
    assert status == 1 and "diffoscope=/nowhere/diffoscope: there is no such program" in said


def test_a_program_in_the_place_of_diffoscope(toy: ToyRepository, tmp_path: Path) -> None:
    """How it is called, and that its report is kept and shown: diff speaks the same language."""
    program = tmp_path / "program"
    program.write_text('#!/bin/sh\ndiff "$4" "$5" >"$2"\n')
    program.chmod(0o755)
    leak(toy, toolkit="time.time_ns()")
    status, _, said = toy.run("reproduce", f"diffoscope={program}")
    assert status == 2 and "  < toolkit layer " in said
    report = toy.root / "out/reproduce" / RECIPE / "toolkit.layer.diff.txt"
    assert "> toolkit layer " in report.read_text()
    program.write_text("#!/bin/sh\necho no memory >&2\nexit 2\n")
    status, _, said = toy.run("reproduce", f"diffoscope={program}")
    assert status == 2 and "ended with status 2" in said and "no memory" in said


def test_a_build_that_fails_keeps_its_logs(toy: ToyRepository) -> None:
    status, _, said = toy.run("reproduce", TOY_FAIL="step:kernel")
    assert status == 2, said
    assert "the first build ended with status 2" in said
    assert (toy.root / "out/reproduce" / RECIPE / "logs-first/kernel.log").exists()
    assert not list((toy.store / "staging").iterdir())
    status, _, said = toy.run("reproduce", TOY_FAIL="user:kernel")
    assert status == 1, said


def test_in_another_place(toy: ToyRepository, tmp_path: Path) -> None:
    status, _, said = toy.run("reproduce", f"place={tmp_path}/place")
    assert status == 0, said
    assert f"in {tmp_path}/place/staging/" in said
    assert not list((tmp_path / "place/staging").iterdir())
    assert "one guest" in toy.run("reproduce", "driver=all")[2]


@pytest.mark.skipif(bool(missing()), reason=f"needs {missing()} of the host")
def test_nothing_is_fetched_twice(tmp_path: Path, site: Any) -> None:
    with signing_keys() as keys, locked_repository(tmp_path, site, keys) as repo:
        _once(repo)


def _once(repo: LockedRepository) -> None:
    repo.done("lock")
    shutil.rmtree(repo.toy.store)
    repo.site.asked.clear()
    said = repo.done("reproduce")
    assert "fetched once" in said
    kernel = [path for path, *_ in repo.site.asked if "linux-6.12.3.tar" in path]
    assert kernel and len(kernel) == len(set(kernel))
    outputs = {each["stage"]: each for each in result(repo.toy)["outputs"]}
    assert {stage for stage, each in outputs.items() if each["fetched"]} == {"toolkit_source"}


def test_what_was_fetched_is_found_without_what_fetched_it(tmp_path: Path) -> None:
    """A store that was cleaned may have the download of a tool that it has no more."""
    def make(build: Build) -> None:
        build.put_bytes("out", build.stage.name.encode())

    def plan(name: str, version: str = "1") -> Plan:
        stages = [Stage(name="tools", title="", module="errors", make=make,
                        outputs={"out": Kind.FILE}),
                  Stage(name="source", title="", module="errors", make=make, network=True,
                        outputs={"out": Kind.FILE}, options={"version": version},
                        inputs={"tools": Ref(stage="tools", output="out")})]
        return Plan({stage.name: stage for stage in stages}, Store(tmp_path / name),
                    tmp_path / "logs")

    plan("main", "0").ensure("source")
    main = plan("main")
    main.ensure("source")
    digest = main.digest("tools")
    assert digest is not None
    main.store.forget(digest)
    target = Store(tmp_path / "target")
    target.prepare()
    reproduce.seed([plan("main")], target)
    assert [action.stage for _digest, _used, action in target.actions()] == ["source"]
    assert plan("target").reason("tools") == "never made in this store"
    plan("target").ensure("tools")
    assert plan("target").reason("source") == "hit"


# real stages on toys


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[ToyRepository]:
    """The repository with a toy kernel and real stages."""
    yield toykernelguest.repository(tmp_path)


@needs_programs
def test_kernel_modules_headers_and_initrd_are_the_same(kernel: ToyRepository) -> None:
    status, _, said = kernel.run("reproduce", PYTHONPATH=str(REPOSITORY))
    assert status == 0, said
    found = result(kernel)
    kinds = {(each["stage"], each["output"]) for each in found["outputs"] if each["identical"]}
    assert {("kernel", "vmlinuz"), ("kernel", "vmlinux"), ("kernel", "headers"),
            ("kernel", "modules"), ("driver_modules", "modules"), ("kernel_config", "config"),
            ("image", "image"), ("image", "files"), ("base", "root")} <= kinds
    assert found["share"] == 1.0
    ccache = {name: each["kernel"] for name, each in found["ccache"].items()}
    assert ccache["first"] == {"hits": 0, "misses": 0}


@needs_programs
def test_a_kernel_with_a_stamp_is_shown(kernel: ToyRepository) -> None:
    """The build's time in vmlinux, by the very mistake that kbuild's stamps prevent."""
    makefile = kernel.root / "toykernel/Makefile"
    makefile.write_text(makefile.read_text().replace("$(KBUILD_BUILD_TIMESTAMP)",
                                                     "$(shell date +%s.%N)"))
    status, _, said = kernel.run("reproduce", PYTHONPATH=str(REPOSITORY))
    assert status == 2, said
    assert "error: kernel vmlinux differs\n" in said
    assert "error: image image differs; what it is made from" in said  # by the build id
    assert "/usr/lib/modules/9.9.1-toy-nvidia-gpu/kernel-build-id: content" in said
    began = {each["stage"] for each in result(kernel)["outputs"] if each["began_here"]}
    assert began == {"kernel"}
    if DIFFOSCOPE is not None:
        report = kernel.root / "out/reproduce" / RECIPE / "kernel.vmlinux.diff.txt"
        assert "Toy version" in report.read_text()


def sign(toy: ToyRepository, key: Path, cert: Path) -> None:
    """Let the recipe sign its modules."""
    path = toy.root / "recipes" / f"{RECIPE}.yaml"
    path.write_text(path.read_text() + f"\nsign: {{key: {key}, cert: {cert}, force: true}}\n")


@needs_programs
@needs_openssl
def test_signed_modules_are_the_same_too(kernel: ToyRepository, tmp_path: Path) -> None:
    mine = signer(tmp_path)
    sign(kernel, mine.key, mine.cert)
    status, _, said = kernel.run("reproduce", PYTHONPATH=str(REPOSITORY))
    assert status == 0, said
    same = {each["stage"] for each in result(kernel)["outputs"] if each["identical"]}
    assert {"kernel", "signed_kernel", "driver_modules", "signed_driver", "image"} <= same


@needs_programs
@needs_openssl
def test_without_the_key_it_is_said_first_and_nothing_is_left_unsigned(
    kernel: ToyRepository, tmp_path: Path,
) -> None:
    mine = signer(tmp_path)
    sign(kernel, tmp_path / "away.key", mine.cert)
    status, _, said = kernel.run("_stage:image", PYTHONPATH=str(REPOSITORY))
    assert status == 1
    warning = said.index("modules will not be signed: the key that signs modules, "
                         f"{tmp_path}/away.key: No such file")
    assert warning < said.index("> kernel: ")
    assert "> image" not in said
    assert kernel.run("build_kernel", PYTHONPATH=str(REPOSITORY))[0] == 0
