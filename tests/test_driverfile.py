"""The pin of a driver's file of which the recipe gives no digest."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from katagpu import driverfile, lock, recipe, request, resolve
from katagpu.committed import Committed
from katagpu.driverfile import addresses, pin
from katagpu.errors import UserError
from katagpu.fetch import Gone
from katagpu.keys import PACKAGE
from katagpu.lock import Lock, Request
from katagpu.locks import Locks
from katagpu.schema import Driver, DriverSource, Recipe

VERSION = "550.163.01"
OLD, NEW = (sha256(data).hexdigest() for data in (b"old", b"new"))


def wanted(**driver: Any) -> Recipe:
    """The default guest with a driver from a `.run` file."""
    section = Driver(source=DriverSource.RUNFILE, version=VERSION, **driver)
    return replace(recipe.load("debian-trixie", PACKAGE.parent), driver=section)


def test_what_is_pinned() -> None:
    assert addresses(recipe.load("debian-trixie", PACKAGE.parent)) == ()
    assert addresses(wanted(file="a.run")) == ()
    assert addresses(wanted(url="https://x.example/a", sha256=OLD)) == ()
    assert addresses(wanted(url="https://x.example/{version}")) == (f"https://x.example/{VERSION}",)
    both = addresses(wanted(sha256=OLD))
    assert len(both) == 2 and all(VERSION in url for url in both)


def test_the_first_that_came_is_pinned(tmp_path: Path, site: Any) -> None:
    url = site.add("a.run", b"old")
    asked = wanted(url=url)
    known = pin(asked, {}, tmp_path)
    assert known == {url: OLD}
    assert (tmp_path / OLD).read_bytes() == b"old"
    site.add("a.run", b"new")
    assert pin(asked, known, tmp_path) == known and len(site.asked) == 1
    assert pin(asked, {}, tmp_path) == {url: NEW}
    assert pin(wanted(file="a.run"), known, tmp_path) == {}


def test_the_second_address_and_a_digest_without_one(
    tmp_path: Path, site: Any, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(driverfile, "DOWNLOADS", tuple(
        f"{site.base}/{area}/{{version}}.run" for area in ("workstations", "data-centres")))
    with pytest.raises(Gone) as caught:
        pin(wanted(), {}, tmp_path)
    said = str(caught.value)
    assert f"{site.base}/workstations/{VERSION}.run: status 404" in said
    assert f"{site.base}/data-centres/{VERSION}.run: status 404" in said
    assert "mend driver.version" in said
    url = site.add(f"data-centres/{VERSION}.run", b"old")
    known = pin(wanted(sha256=OLD), {}, tmp_path)
    assert known == {url: OLD}
    with pytest.raises(UserError, match="is not what was asked for"):
        pin(wanted(sha256=NEW), known, tmp_path)


def test_a_lock_without_the_pin_is_none(
    tmp_path: Path, site: Any, monkeypatch: pytest.MonkeyPatch,
) -> None:
    def nothing(asked: Request, _directory: Path, _known: object) -> Lock:
        return Lock(recipe=asked.recipe, request=asked.identity, groups={})

    monkeypatch.setattr(request, "host_archive", lambda _distribution: {})
    monkeypatch.setattr(request, "must_have_keyrings", lambda _archives: None)
    monkeypatch.setattr(resolve, "resolve", nothing)
    url = site.add("a.run", b"old")
    locks = Locks(wanted(url=url), PACKAGE.parent, tmp_path / "out" / VERSION, [],
                  Committed(wanted(url=url), PACKAGE.parent))
    locks.make(tmp_path / "apt", anew=False)
    found = locks.find()
    assert found is not None and found.downloads == {url: OLD}
    site.add("a.run", b"new")
    locks.make(tmp_path / "apt", anew=False)
    assert locks.find() == found, "another run with this lock gets the same"
    locks.make(tmp_path / "apt", anew=True)
    assert lock.read(locks.path) == replace(found, downloads={url: NEW})
    lock.write(replace(found, downloads={}), locks.path)
    assert locks.find() is None
