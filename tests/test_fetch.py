"""Downloads, against a real server on the loopback."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import socket
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from katagpu.errors import UserError
from katagpu.fetch import SUPERSEDED, Fetched, Gone, Job, fetch, fetch_all

BODY = random.Random(1).randbytes(1_000_000)
SHA = hashlib.sha256(BODY).hexdigest()
QUICK = (0.0, 0.0)


def names(directory: Path) -> list[str]:
    """The files of a directory."""
    return sorted(path.name for path in directory.iterdir())


def job(url: str, **more: Any) -> Job:
    """A job for BODY, unless told otherwise."""
    return Job(url=url, what="toy", **{"sha256": SHA, **more})


def test_a_file_is_placed_with_its_digest_and_size(site: Any, tmp_path: Path) -> None:
    dest = tmp_path / "deep/er/file"
    assert fetch(job(site.add("f", BODY), size=len(BODY)), dest) == Fetched(
        sha256=SHA, size=len(BODY))
    assert dest.read_bytes() == BODY
    assert names(dest.parent) == ["file"]


def test_digest_and_size_need_not_be_known(site: Any, tmp_path: Path) -> None:
    assert fetch(job(site.add("f", BODY), sha256=None), tmp_path / "f").sha256 == SHA


def test_what_is_there_is_not_fetched_again(site: Any, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(BODY)
    fetch(job(site.add("f", BODY)), tmp_path / "f")
    assert site.asked == []


def test_a_wrong_file_at_the_destination_is_replaced(site: Any, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"old")
    fetch(job(site.add("f", BODY)), tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == BODY


def test_a_broken_connection_goes_on_where_it_broke(site: Any, page: Any, tmp_path: Path) -> None:
    url = site.add("f", page(body=BODY, cuts=3, cut_at=300_000))
    fetch(job(url), tmp_path / "f", pauses=QUICK)
    assert (tmp_path / "f").read_bytes() == BODY
    assert site.ranges() == [None, "bytes=300000-", "bytes=600000-", "bytes=900000-"]


def test_without_digest_and_validator_a_broken_file_starts_again(
        site: Any, page: Any, tmp_path: Path) -> None:
    url = site.add("f", page(body=BODY, cuts=1, cut_at=300_000, etag=None))
    fetch(job(url, sha256=None), tmp_path / "f", pauses=QUICK)
    assert site.ranges() == [None, None]
    assert (tmp_path / "f").read_bytes() == BODY


def test_an_interrupted_download_is_resumed_by_the_next_run(
        site: Any, page: Any, tmp_path: Path) -> None:
    url = site.add("f", page(body=BODY, cuts=1, cut_at=400_000))
    with pytest.raises(UserError, match="broke off"):
        fetch(job(url, sha256=None), tmp_path / "f", pauses=())
    assert names(tmp_path) == ["f.part", "f.part.tag"]
    fetch(job(url, sha256=None), tmp_path / "f")
    assert site.asked[-1][1:] == ("bytes=400000-", '"1"', 206)
    assert (tmp_path / "f").read_bytes() == BODY
    assert names(tmp_path) == ["f"]


def test_a_file_that_changed_meanwhile_starts_again(site: Any, page: Any, tmp_path: Path) -> None:
    url = site.add("f", page(body=b"x" * 1_000_000, cuts=1, cut_at=400_000, etag='"old"'))
    with pytest.raises(UserError):
        fetch(job(url, sha256=None), tmp_path / "f", pauses=())
    site.add("f", page(body=BODY, etag='"new"'))
    assert fetch(job(url, sha256=None), tmp_path / "f").sha256 == SHA


def test_a_server_without_ranges_sends_all_again(site: Any, page: Any, tmp_path: Path) -> None:
    url = site.add("f", page(body=BODY, cuts=1, cut_at=400_000, ranges=False))
    fetch(job(url), tmp_path / "f", pauses=QUICK)
    assert [status for *_, status in site.asked] == [200, 200]
    assert (tmp_path / "f").read_bytes() == BODY


@pytest.mark.parametrize("rest", [b"y" * 400_000, b"y" * 2_000_000], ids=["short", "too long"])
def test_a_damaged_part_is_fetched_anew(site: Any, tmp_path: Path, rest: bytes) -> None:
    (tmp_path / "f.part").write_bytes(rest)
    fetch(job(site.add("f", BODY)), tmp_path / "f", pauses=QUICK)
    assert (tmp_path / "f").read_bytes() == BODY


def test_a_whole_part_needs_no_request(site: Any, tmp_path: Path) -> None:
    (tmp_path / "f.part").write_bytes(BODY)
    fetch(job(site.add("f", BODY)), tmp_path / "f")
    assert site.asked == []


def test_transient_statuses_are_tried_again(site: Any, page: Any, tmp_path: Path) -> None:
    url = site.add("f", page(body=BODY, fails=[503, 429]))
    fetch(job(url), tmp_path / "f", pauses=QUICK)
    assert [status for *_, status in site.asked] == [503, 429, 200]


def test_a_server_that_stays_broken_is_named(site: Any, page: Any, tmp_path: Path) -> None:
    url = site.add("f", page(status=502))
    with pytest.raises(UserError, match="answered 502"):
        fetch(job(url), tmp_path / "f", pauses=QUICK)
    assert len(site.asked) == 3


def test_404_names_the_file_and_the_cure_of_its_kind(site: Any, tmp_path: Path) -> None:
    with pytest.raises(Gone) as caught:
        fetch(job(f"{site.base}/gone.deb"), tmp_path / "f")
    said = str(caught.value)
    assert "toy" in said and "/gone.deb" in said and "404" in said
    assert "is the address right" in said and "lock" not in said
    assert caught.value.status == 1
    assert len(site.asked) == 1
    assert not (tmp_path / "f").exists()
    packaged = job(f"{site.base}/gone.deb", cure=SUPERSEDED)
    with pytest.raises(Gone, match=r"supersedes it: .*; `\./doitw lock` takes the newer one"):
        fetch(packaged, tmp_path / "f")


@pytest.mark.parametrize("status", [401, 403, 418])
def test_other_refusals_are_not_tried_again(
        site: Any, page: Any, tmp_path: Path, status: int) -> None:
    with pytest.raises(UserError, match=str(status)):
        fetch(job(site.add("f", page(status=status))), tmp_path / "f")
    assert len(site.asked) == 1


@pytest.mark.parametrize("sha", [None, SHA])
def test_a_login_page_is_not_the_file(
        site: Any, page: Any, tmp_path: Path, sha: str | None) -> None:
    login = site.add("login", b"\n<!DOCTYPE html><html><body>Sign in</body></html>")
    url = site.add("f", page(status=302, headers={"Location": login}))
    with pytest.raises(UserError, match=r"web page instead of the file.*redirected to .*/login"):
        fetch(job(url, sha256=sha), tmp_path / "f")
    assert not (tmp_path / "f").exists()


def test_a_redirect_is_followed(site: Any, page: Any, tmp_path: Path) -> None:
    url = site.add("f", page(status=302, headers={"Location": site.add("real", BODY)}))
    assert fetch(job(url), tmp_path / "f").size == len(BODY)


def test_a_wrong_digest_leaves_nothing(site: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not what was asked for") as caught:
        fetch(job(site.add("f", b"other")), tmp_path / "f")
    assert SHA in str(caught.value)
    assert names(tmp_path) == []


def test_a_wrong_size_is_refused_before_the_body(site: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has 1000000 bytes, expected 5"):
        fetch(job(site.add("f", BODY), size=5), tmp_path / "f")
    assert not (tmp_path / "f").exists()


def test_a_slow_server_is_waited_for(site: Any, page: Any, tmp_path: Path) -> None:
    assert fetch(job(site.add("f", page(body=BODY, pause=0.02))), tmp_path / "f").sha256 == SHA


def test_a_silent_server_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("katagpu.download.TIMEOUT", (0.2, 0.2))
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/f"
        with pytest.raises(UserError, match="did not answer in time"):
            fetch(job(url), tmp_path / "f", pauses=QUICK)


def test_a_refused_connection_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(UserError, match="refused the connection") as caught:
        fetch(job(f"http://127.0.0.1:{port}/f"), tmp_path / "f", pauses=QUICK)
    assert "\n" not in caught.value.what


def test_an_unknown_host_is_no_network(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no network: the name of the server cannot be resolved"):
        fetch(job("http://no-such-host.invalid/f"), tmp_path / "f", pauses=())


def test_a_dead_proxy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.getsockname()[1]}")
    with pytest.raises(UserError, match="proxy"):
        fetch(job("http://example.invalid/f"), tmp_path / "f", pauses=())


def test_a_proxy_from_the_environment_is_used(
        site: Any, page: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site.pages["http://example.invalid/f"] = page(body=BODY)
    monkeypatch.setenv("http_proxy", site.base)
    assert fetch(job("http://example.invalid/f"), tmp_path / "f").sha256 == SHA


@pytest.mark.parametrize("url", ["ftp://example.invalid/f", "nonsense", "http://"])
def test_other_addresses_are_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(UserError, match="cannot be fetched"):
        fetch(job(url), tmp_path / "f", pauses=())


def test_file_urls(tmp_path: Path) -> None:
    (tmp_path / "a b").write_bytes(BODY)
    assert fetch(job((tmp_path / "a b").as_uri()), tmp_path / "f").sha256 == SHA
    with pytest.raises(Gone, match=r"cannot read .*/none"):
        fetch(job((tmp_path / "none").as_uri()), tmp_path / "g")


def test_a_full_disk_names_the_file_system(
        site: Any, tiny: Callable[[int], Path], tmp_path: Path) -> None:
    place = tiny(500_000)
    with pytest.raises(UserError, match=f"no space left on {place}"):
        fetch(job(site.add("f", BODY)), place / "f")
    assert not (place / "f").exists() and not (place / "f.part").exists()


def test_a_place_that_cannot_be_written_is_one_line(site: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*/file/f.part: "):
        fetch(job(site.add("f", BODY)), tmp_path / "file" / "f")


def test_many_files_come_in_order(site: Any, tmp_path: Path) -> None:
    bodies = [bytes([number]) * 1000 for number in range(40)]
    jobs = [(job(site.add(f"f{number}", body), sha256=hashlib.sha256(body).hexdigest()),
             tmp_path / f"f{number}") for number, body in enumerate(bodies)]
    assert [one.sha256 for one in fetch_all(jobs)] == [one.sha256 for one, _ in jobs]
    assert len(names(tmp_path)) == 40
    assert fetch_all([]) == []


def test_one_failure_stops_the_rest(site: Any, page: Any, tmp_path: Path) -> None:
    slow = [(job(site.add(f"s{number}", page(body=BODY, pause=0.1))), tmp_path / f"s{number}")
            for number in range(6)]
    with pytest.raises(Gone, match="/none"):
        fetch_all([(job(f"{site.base}/none"), tmp_path / "none"), *slow], workers=3)
    assert not [name for name in names(tmp_path) if not name.endswith((".part", ".tag"))]


def _fetch(url: str, dest: str) -> None:
    fetch(job(url), Path(dest))


def test_two_processes_fetch_one_file_once(site: Any, page: Any, tmp_path: Path) -> None:
    url = site.add("f", page(body=BODY, pause=0.02))
    fork = multiprocessing.get_context("spawn")
    both = [fork.Process(target=_fetch, args=(url, str(tmp_path / "f"))) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert len(site.asked) == 1
    assert names(tmp_path) == ["f"]


def test_killed_in_the_middle_it_is_resumed(site: Any, page: Any, tmp_path: Path) -> None:
    url = site.add("f", page(body=BODY, pause=0.05))
    process = multiprocessing.get_context("spawn").Process(
        target=_fetch, args=(url, str(tmp_path / "f")))
    process.start()
    part = tmp_path / "f.part"
    while not part.exists() or part.stat().st_size < 100_000:
        assert process.is_alive()
    process.kill()
    process.join()
    assert not (tmp_path / "f").exists()
    site.pages["/f"].pause = 0.0
    fetch(job(url), tmp_path / "f")
    assert site.asked[-1][3] == 206
    assert (tmp_path / "f").read_bytes() == BODY


def test_no_bar_where_there_is_no_terminal(
        site: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fetch(job(site.add("f", BODY)), tmp_path / "f")
    assert capfd.readouterr() == ("", "")


def test_a_bar_on_a_terminal(site: Any, tmp_path: Path) -> None:
    leader, follower = os.openpty()
    termios.tcsetwinsize(follower, (25, 80))
    code = ("import sys; from pathlib import Path; from katagpu.fetch import Job, fetch;"
            "fetch(Job(url=sys.argv[1], what='toy'), Path(sys.argv[2]))")
    subprocess.run([sys.executable, "-c", code, site.add("f", BODY), str(tmp_path / "f")],
                   stderr=follower, check=True, timeout=30)
    assert b"toy" in os.read(leader, 65536)
    os.close(follower)
    os.close(leader)


def test_importing_it_is_cheap() -> None:
    code = "import sys, katagpu.fetch; print({'requests', 'tqdm', 'urllib3'} & set(sys.modules))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "set()"


def test_a_caller_s_proxies_go_before_the_environment_s(
    site: Any, page: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The site is the proxy, and is asked for whole addresses."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    url = "http://mirror.invalid/f"
    site.pages[url] = page(body=BODY)
    fetch_all([(job(url), tmp_path / "f")], pauses=(), proxies={"http": site.base})
    assert [path for path, *_ in site.asked] == [url]
    # its own host without one, though the environment and `http` have one
    fetch_all([(job(site.add("g", BODY)), tmp_path / "g")], pauses=(),
              proxies={"http": "http://127.0.0.1:9", "http://127.0.0.1": ""})
    # and what no_proxy names has none
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    fetch_all([(job(site.add("h", BODY)), tmp_path / "h")], pauses=(),
              proxies={"http": "http://127.0.0.1:9"})
    assert (tmp_path / "g").read_bytes() == (tmp_path / "h").read_bytes() == BODY


def test_a_redirected_request_has_the_proxy_of_its_host(
    site: Any, page: Any, tmp_path: Path,
) -> None:
    there = "http://mirror.invalid/f"
    site.pages[there] = page(body=BODY)
    url = site.add("f", page(status=302, headers={"Location": there}))
    fetch_all([(job(url), tmp_path / "f")], pauses=(),
              proxies={"http": site.base, "http://127.0.0.1": ""})
    assert [path for path, *_ in site.asked] == ["/f", there]
