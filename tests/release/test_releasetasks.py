"""Whole command lines on a toy repository: release, publish, install, and what they refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from katagpu import lockfile, lockparts, recipe
from katagpu.lockfile import LockedPart, LockFile
from tests.release.conftest import Keys, Starter
from tests.release.test_preflight import git
from tests.test_statement import URI
from tests.toyrepo import RECIPE, ToyRepository

MORE = '''

# For releases: a manifest that is one, drop-ins that are some, and a boot check.

import json, types
from katagpu import filelist, kataconfig, materials
from katagpu.stages import final

plain, make_plain = stages, make
materials.of = lambda *_where: []  # toys are made from nothing that real stages name

def make_real(build):
    name, parts = build.stage.name, {}
    if name in ("kata_config", "kernel_config", "boot_check"):
        if name == "boot_check" and "TOY_SICK" in os.environ:
            raise StepError("the guest did not pass its boot check")
        if name == "boot_check" and "TOY_EDITS" in os.environ:
            open(os.environ["TOY_EDITS"], "a").write("edited while it was built")
        for output in build.stage.outputs:
            text = "CONFIG_TOY=y\\n"
            if output.startswith("config") and name == "kata_config":
                text = kataconfig.render_drop_in(kataconfig.KataSettings(
                    kernel=f"{final.PLACE}/{final.KERNEL}", image=f"{final.PLACE}/{final.IMAGE}"))
            build.put_bytes(output, text.encode())
    elif name in ("manifest", "checked_manifest"):
        parts = {part: {"sha256": found.identity, "size": found.size}
                 for part, found in build.inputs.items()}
        content = {"schema": 1, "kernel_release": "6.1-toy", "recipe": "toy", "packages": {},
                   "parts": parts}
        if name == "checked_manifest":
            content = {**json.loads(build.blob("manifest").read_bytes()), "boot_check": {"a": 1}}
        build.put_bytes("manifest", json.dumps(content).encode())
    elif name == "image":
        build.put_bytes("image", build.blob("rootfs").read_bytes())
        build.put_bytes("sizes", b"{}")
        build.put_bytes("files", filelist.render([]))
    else:
        if name == "kernel":
            build.compiler_cache("kernel", "of no compiler")
        make_plain(build)
        return
    build.facts["release"] = "6.1-toy"

def stages(recipe, lock, root):
    from msgspec.structs import replace
    found = {name: change(stage, make=make_real) for name, stage in
             plain(recipe, lock, root).items()}
    found["manifest"] = change(found["manifest"], inputs=dict(final.PARTS))
    return found

def change(stage, **fields):
    import dataclasses
    return dataclasses.replace(stage, **fields)

def boot_stages(recipe, emulator, qemu, *, lesser):
    from katagpu import booting
    booting.Booting.qemu = types.SimpleNamespace(vfio_user=True)
    one = Stage(name="boot_check", title="toy boot check", module="errors", make=make_real,
                outputs={name: Kind.FILE for name in ("report", "junit", "log")},
                inputs={"image": Ref(stage="image", output="image")})
    two = Stage(name="checked_manifest", title="toy manifest", module="errors", make=make_real,
                outputs={"manifest": Kind.FILE},
                inputs={"manifest": Ref(stage="manifest", output="manifest"),
                        "report": Ref(stage="boot_check", output="report")})
    return {"boot_check": one, "checked_manifest": two}
'''


@pytest.fixture
def toy(tmp_path: Path) -> ToyRepository:
    """A toy repository under git, with a committed lock."""
    return repository(tmp_path)


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> ToyRepository:
    """One that no test changes."""
    return repository(tmp_path_factory.mktemp("untouched"))


def repository(top: Path) -> ToyRepository:
    """Make one."""
    found = ToyRepository(top)
    with (found.root / "katagpu/guest.py").open("a") as stream:
        stream.write(MORE)
    (found.root / ".gitignore").write_text("/out/\n__pycache__/\n")
    asked = lockparts.asked(recipe.load(RECIPE, found.root), found.root)
    parts = {str(part): LockedPart(asked=what) for part, what in asked.items()}  # without packages
    lockfile.write(LockFile(recipe=RECIPE, archives={}, parts=parts),
                   found.root / f"recipes/{RECIPE}.lock")
    git(found.root, "init", "-q")
    git(found.root, "add", "-A")
    git(found.root, "commit", "-qm", "all")
    return found


def place(toy: ToyRepository, version: str) -> Path:
    """Where a release is."""
    return toy.root / f"out/release/{RECIPE}-{version}"


def test_a_release_its_publication_and_installation(
    toy: ToyRepository, keys: Keys, start_registry: Starter, tmp_path: Path,
) -> None:
    words = ["release", "no_agent=1", f"key={keys.private}"]
    status, _out, err = toy.run(*words, "version=1.0.0")
    assert status == 0, err
    first = {path.name: path.read_bytes() for path in place(toy, "1.0.0").iterdir()}
    assert "boot-check-1.0.0.json" in first
    status, _out, err = toy.run(*words, "version=1.0.0")
    assert status == 0, err
    assert "made already, with the same bytes" in err
    (toy.root / "rootfs/word").write_text("another word")
    git(toy.root, "commit", "-qam", "another word")
    status, _out, err = toy.run(*words, "version=1.0.0")
    assert status == 1
    assert "released already, with other content" in err
    status, _out, err = toy.run(*words, "version=1.1.0")
    assert status == 0, err
    assert "Changes since 1.0.0" in (place(toy, "1.1.0") / "RELEASE-NOTES.md").read_text()
    names = [f"release/{place(toy, version).name}" for version in ("1.0.0", "1.1.0")]
    status, out, err = toy.run("diff", *names)
    assert status == 0, err
    assert f"{names[0]} → {names[1]}" in out
    to = f"oci://{start_registry().host}/guests/toy"
    status, _out, err = toy.run("publish", f"to={to}")  # the latest
    assert status == 0, err
    assert f"{to}:1.1.0" in err
    prefix = f"prefix={tmp_path}/host"
    (tmp_path / "host").mkdir()
    for origin in (place(toy, "1.0.0"), f"{to}:1.1.0"):
        status, _out, err = toy.run("install", f"from={origin}", f"key={keys.public}", prefix)
        assert status == 0, err
    status, out, err = toy.run("install", "--status", prefix)
    assert f"current: {RECIPE}-1.1.0 (intact)" in out, err
    assert toy.run("install", "--rollback", prefix)[0] == 0
    assert f"current: {RECIPE}-1.0.0 (intact)" in toy.run("install", "--status", prefix)[1]
    assert toy.run("uninstall", prefix)[0] == 0
    assert not [path for path in (tmp_path / "host").rglob("*") if not path.is_dir()]


def test_a_guest_that_fails_its_boot_check(toy: ToyRepository) -> None:
    status, _out, err = toy.run("release", "no_agent=1", "unsigned=1", "version=1.0.0",
                                TOY_SICK="1")
    assert status == 2
    assert "did not pass its boot check" in err
    assert not place(toy, "1.0.0").exists()


def test_a_repository_that_changes_while_it_is_built(toy: ToyRepository) -> None:
    words = ["release", "no_agent=1", "unsigned=1", "version=1.0.0"]
    status, _out, err = toy.run(*words, TOY_EDITS=str(toy.root / "rootfs/word"))
    assert status == 1
    assert "not committed: rootfs/word" in err
    assert not place(toy, "1.0.0").exists()


def test_the_statement_of_a_release(toy: ToyRepository) -> None:
    """Every URI in it is one."""
    git(toy.root, "remote", "add", "origin", "https://somebody:word@git.example/guests.git")
    status, _out, err = toy.run("release", "no_agent=1", "unsigned=1", "version=1.0.0")
    assert status == 0, err
    made = json.loads((place(toy, "1.0.0") / "provenance-1.0.0.json").read_bytes())
    definition = made["predicate"]["buildDefinition"]
    dependencies = definition["resolvedDependencies"]
    assert [each for each in dependencies if each.get("name") == "repository"] == [
        {"name": "repository", "uri": "git+https://git.example/guests",
         "digest": {"gitCommit": git(toy.root, "rev-parse", "HEAD").strip()}}]
    for uri in (made["_type"], made["predicateType"], definition["buildType"],
                made["predicate"]["runDetails"]["builder"]["id"],
                *(each["uri"] for each in dependencies)):
        assert URI.fullmatch(uri), uri
    assert "word" not in str(dependencies)
    assert "startedOn" not in made["predicate"]["runDetails"]["metadata"]


@pytest.mark.parametrize(("words", "said"), [
    (["release", "unsigned=1", "no_agent=1"], "version= is not given"),
    (["release", "unsigned=1", "no_agent=1", "version=1"], "no version of a release"),
    (["release", "no_agent=1", "version=1.0.0"], "who signs this release?"),
    (["release", "unsigned=1", "version=1.0.0"], "no kata-agent"),
    (["release", "unsigned=1", "no_agent=1", "version=1.0.0", "driver=550.163.01"],
     "driver= is set"),
    (["publish"], "to= is not given"), (["publish", "to=oci://localhost/a:b"], "no release of"),
    (["publish", "to=oci://localhost/a:b", "version=1.0.0"], "there is no release"),
    (["install"], "from= is not given"), (["install", "from=out"], "No public key is given"),
    (["install", "from=none", "unverified=1", "prefix=out"], "there is no release"),
    (["install", "from=none", "unverified=1", "key=a.pem"], "only one can be meant"),
    (["install", "from=none", "unverified=no"], "unverified=no: this is neither 0 nor 1"),
    (["install", "--rollback", "prefix=out/none"], "nothing is installed")])
def test_what_is_refused_builds_nothing(
    untouched: ToyRepository, words: list[str], said: str,
) -> None:
    status, _out, err = untouched.run(*words)
    assert status == 1
    assert said in err
    assert "hint: " in err or "nothing is installed" in err
    assert untouched.made() == []
    assert "Traceback" not in err


def test_a_repository_that_is_no_clone(toy: ToyRepository) -> None:
    shutil.rmtree(toy.root / ".git")
    status, _out, err = toy.run("release", "unsigned=1", "no_agent=1", "version=1.0.0")
    assert status == 1
    assert "a release is of a commit" in err


def test_list_has_them(untouched: ToyRepository) -> None:
    out = untouched.run("list")[1]
    for name in ("release", "publish", "install", "uninstall"):
        assert f"\n{name} " in f"\n{out}"


def test_what_went_through_ccache_is_compiled_again_for_a_release(toy: ToyRepository) -> None:
    assert toy.run("build_image")[0] == 0
    assert "kernel" in toy.made()
    words = ["no_agent=1", "unsigned=1", "release"]
    status, _, said = toy.run("version=1.0.0", *words)
    assert status == 0, said
    # The same bytes came out, so that nothing above the kernel was made again.
    assert toy.made() == ["kernel"]
    assert toy.run("version=1.0.1", *words)[0] == 0
    assert toy.made() == []
    # What reproduce made without ccache will do too.
    shutil.rmtree(toy.store)
    assert toy.run("build_image")[0] == 0
    assert toy.run("reproduce")[0] == 0
    toy.made()
    assert toy.run("version=1.0.2", *words)[0] == 0
    assert toy.made() == []
