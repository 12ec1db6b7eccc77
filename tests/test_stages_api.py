"""What a stage gets: fetched packages, and sources unpacked once."""

from __future__ import annotations

import os
import threading
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from katagpu import run
from katagpu.errors import UserError
from katagpu.lock import Deb
from katagpu.stages.api import Build, Stage, jobs
from katagpu.store import Store


def make_build(tmp_path: Path, store: Store, name: str, debs: tuple[Deb, ...]) -> Build:
    stage = Stage(name=name, title=name, module="stages.api", make=lambda build: None, outputs={},
                  packages={"packages": debs})
    scratch = tmp_path / name
    scratch.mkdir()
    return Build(stage, store, {}, scratch, tmp_path / "log")


def make_debs(directory: Path, count: int) -> tuple[Deb, ...]:
    directory.mkdir()
    debs = []
    for number in range(count):
        path = directory / f"toy{number}.deb"
        path.write_bytes(f"package {number}".encode())
        debs.append(Deb(package=f"toy{number}", version="1", architecture="all",
                        url=path.as_uri(), size=path.stat().st_size,
                        sha256=sha256(path.read_bytes()).hexdigest()))
    return tuple(debs)


def test_stages_side_by_side_fetch_the_same_packages(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    store.prepare()
    debs = make_debs(tmp_path / "mirror", 40)
    builds = [make_build(tmp_path, store, f"stage{number}", debs) for number in range(6)]
    found: list[list[Path]] = []
    threads = [threading.Thread(target=lambda build=build: found.append(build.debs("packages")))
               for build in builds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = [store.blob(deb.sha256) for deb in debs]
    assert found == [expected] * len(builds)
    assert all(path.read_bytes().startswith(b"package") for path in expected)


def test_packages_come_through_apt_s_own_proxy(
    site: Any, page: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is that of apt.conf, which the environment knows nothing of; the site is the proxy."""
    config = tmp_path / "apt.conf"
    config.write_text(f'Dir::Etc::parts "/dev/null"; Acquire::http::Proxy "{site.base}";\n')
    monkeypatch.setattr(run, "CLEAN", {**run.CLEAN, "APT_CONFIG": str(config)})
    store = Store(tmp_path / "store")
    store.prepare()
    content = b"package"
    url = "http://mirror.invalid/toy.deb"
    site.pages[url] = page(body=content)
    deb = Deb(package="toy", version="1", architecture="all", url=url, size=len(content),
              sha256=sha256(content).hexdigest())
    (found,) = make_build(tmp_path, store, "stage", (deb,)).debs("packages")
    assert found.read_bytes() == content
    assert [path for path, *_ in site.asked] == [url]


def test_a_source_is_unpacked_once(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    store.prepare()
    build = make_build(tmp_path, store, "stage", ())
    unpacked: list[Path] = []

    def unpack(target: Path) -> None:
        unpacked.append(target)
        target.mkdir()
        (target / "Makefile").touch()

    first, second = (build.unpacked("source-x", unpack) for _ in range(2))
    assert first == second and (first / "Makefile").exists()
    assert len(unpacked) == 1


LOG = """# a.c
cache_miss
direct_cache_miss
preprocessed_cache_miss
# a.c
direct_cache_hit
local_storage_hit
# b.c
preprocessed_cache_hit
# a.o
called_for_link
"""


def test_what_ccache_answered_is_in_the_record(tmp_path: Path) -> None:
    build = make_build(tmp_path, Store(tmp_path / "store"), "stage", ())
    assert not {"ccache", "compiler_cache"} & build.finish({}, {}).record.keys()
    binds, env = build.compiler_cache("kernel", "0" * 64)
    # an old one, which writes no log
    assert build.finish({}, {}).record == {"compiler_cache": True}
    place = next(bind for bind in binds if env["CCACHE_STATSLOG"].startswith(f"{bind.target}/log"))
    assert place.writable
    (place.source / "log").write_text(LOG)
    assert build.finish({}, {"cpu": 1.0}).record == {
        "cpu": 1.0, "compiler_cache": True, "ccache": {"hits": 2, "misses": 1}}


def test_without_ccache_nothing_came_from_it(tmp_path: Path) -> None:
    build = make_build(tmp_path, Store(tmp_path / "store"), "stage", ())
    build.ccache = False
    assert build.compiler_cache("kernel", "0" * 64) == ([], {"CCACHE_DISABLE": "1"})
    assert build.finish({}, {}).record == {"compiler_cache": False,
                                           "ccache": {"hits": 0, "misses": 0}}


@pytest.mark.parametrize(("given", "found"), [("3", 3), ("12", 12), ("", None)])
def test_how_many_compilers_run_at_once(
    monkeypatch: pytest.MonkeyPatch, given: str, found: int | None,
) -> None:
    monkeypatch.setenv("KATAGPU_JOBS", given)
    assert jobs() == (found or len(os.sched_getaffinity(0)))


@pytest.mark.parametrize("given", ["0", "-1", "many", "2.5"])
def test_what_is_no_number_of_compilers(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("KATAGPU_JOBS", given)
    with pytest.raises(UserError, match=f"KATAGPU_JOBS={given} is no number"):
        jobs()
