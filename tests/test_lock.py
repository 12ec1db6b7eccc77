"""The lock, against a signed apt archive on the loopback.

Needs apt-get, dpkg-deb, gpgv (every build host has them) and gpg of the host; skipped without gpg.
"""

from __future__ import annotations

import contextlib
import hashlib
import subprocess
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from msgspec.structs import replace

from katagpu import apt, lock, resolve, run
from katagpu.errors import UserError
from katagpu.lock import Group, LocalDeb
from tests.toyarchive import ToyArchive, missing, served, signing_keys

pytestmark = pytest.mark.skipif(bool(missing()), reason=f"needs {missing()} of the host")


@pytest.fixture(scope="module")
def keys() -> Iterator[Path]:
    """Keys, made once."""
    with signing_keys() as place:
        yield place


@pytest.fixture
def toy(keys: Path, tmp_path: Path) -> Iterator[ToyArchive]:
    """An archive with an application on a library, two drivers, and a package with an epoch."""
    root = tmp_path / "archive"
    root.mkdir()
    toy = ToyArchive(root, keys)
    toy.add("core", "1", Essential="yes")
    toy.add("app", "1.0-1", Depends="lib (>= 1)", Recommends="extra")
    toy.add("lib", "1.5-1", Depends="core")
    toy.add("extra", "1")
    toy.add("source", "6.12-1", Depends="app")
    toy.add("epoch", "1:2.0~rc1+dfsg-1", Depends="lib")
    toy.add("driver", "550.1-1", Depends="lib")
    toy.add("driver", "550.2-1", Depends="lib")
    toy.publish()

    with served(toy):
        yield toy


def names(found: lock.Lock, group: str) -> list[str]:
    """`package=version` of a group."""
    return [f"{deb.package}={deb.version}" for deb in found.group(group)]


def test_a_group_has_all_that_its_packages_depend_on(toy: ToyArchive, tmp_path: Path) -> None:
    found = resolve.resolve(toy.request({
        "all": Group(packages=("app",)), "essential": Group(packages=("?essential",)),
        "above": Group(packages=("epoch",), on="all"),
        "top": Group(packages=("driver=550.1*",), on="above"),
        "alone": Group(packages=("source", "extra"), alone=True)}), tmp_path / "apt")
    assert names(found, "all") == ["app=1.0-1", "core=1", "lib=1.5-1"]  # and not what it recommends
    assert names(found, "essential") == ["core=1"]
    assert names(found, "above") == ["epoch=1:2.0~rc1+dfsg-1"]
    assert names(found, "top") == ["driver=550.1-1"]
    assert names(found, "alone") == ["extra=1", "source=6.12-1"]
    assert names(found, "nothing") == []


def test_each_set_of_archives_is_asked_by_itself(
    toy: ToyArchive, keys: Path, tmp_path: Path,
) -> None:
    """Two distributions have a package of one name, and other dependencies."""
    (tmp_path / "other").mkdir()
    other = ToyArchive(tmp_path / "other", keys, suite="noble")
    other.add("app", "2.0ubuntu1", Depends="core")
    other.add("core", "7ubuntu1")
    other.add("lib", "9-1")
    other.publish()
    with served(other):
        first = toy.request({"tools": Group(packages=("app",)),
                             "tools2": Group(packages=("extra",))})
        groups = {"guest": Group(packages=("app",)),
                  "more": Group(packages=("lib",), on="guest"),
                  **{name: replace(group, archives="tools")
                     for name, group in first.groups.items()}}
        groups = {name: groups[name] for name in ("tools", "tools2", "guest", "more")}
        second = other.request(groups)
        archives = {"guest": second.archives["guest"], "tools": first.archives["guest"]}
        found = resolve.resolve(replace(second, archives=archives), tmp_path / "apt")
    assert names(found, "tools") == ["app=1.0-1", "core=1", "lib=1.5-1"]
    assert names(found, "guest") == ["app=2.0ubuntu1", "core=7ubuntu1"]
    assert names(found, "more") == ["lib=9-1"]
    assert all(deb.url.startswith(toy.base) for deb in found.group("tools"))
    assert all(deb.url.startswith(other.base) for deb in found.group("guest"))


def test_each_package_has_its_digest_size_and_address(toy: ToyArchive, tmp_path: Path) -> None:
    found = resolve.resolve(toy.request({"one": Group(packages=("epoch",), alone=True)}),
                         tmp_path / "apt")
    (deb,) = found.group("one")
    content = (toy.root / "pool" / "epoch_1_2.0~rc1+dfsg-1_amd64.deb").read_bytes()
    assert (deb.sha256, deb.size) == (hashlib.sha256(content).hexdigest(), len(content))
    assert deb.architecture == "amd64"
    assert deb.url.startswith(f"{toy.base}/pool/epoch_1")
    assert found.version("one", "epoch") == "1:2.0~rc1+dfsg-1"


def test_the_same_archive_gives_the_same_lock(toy: ToyArchive, tmp_path: Path) -> None:
    request = toy.request({"all": Group(packages=("app", "epoch"))})
    first = resolve.resolve(request, tmp_path / "apt")
    assert resolve.resolve(request, tmp_path / "apt") == first
    assert resolve.resolve(request, tmp_path / "other") == first
    lock.write(first, tmp_path / "deep/lock.json")
    assert lock.read(tmp_path / "deep/lock.json") == first
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["lock.json"]


def test_a_new_version_is_taken(toy: ToyArchive, tmp_path: Path) -> None:
    request = toy.request({"all": Group(packages=("driver",))})
    assert "driver=550.2-1" in names(resolve.resolve(request, tmp_path / "apt"), "all")
    toy.add("driver", "550.3-1", Depends="lib")
    toy.publish()
    assert "driver=550.3-1" in names(resolve.resolve(request, tmp_path / "apt"), "all")


def test_a_package_at_hand_is_not_locked_but_its_needs_are(toy: ToyArchive, tmp_path: Path) -> None:
    control = tmp_path / "deb/DEBIAN/control"
    control.parent.mkdir(parents=True)
    control.write_text("Package: local\nVersion: 1\nArchitecture: amd64\nMaintainer: t <t@t>\n"
                       "Depends: lib\nDescription: local\n")
    subprocess.run(["dpkg-deb", "--build", "--root-owner-group", tmp_path / "deb",
                    tmp_path / "local.deb"], check=True, capture_output=True)
    local = LocalDeb(path=str(tmp_path / "local.deb"), sha256="")
    found = resolve.resolve(toy.request({
        "base": Group(packages=("core",)), "local": Group(files=(local,), on="base"),
        "above": Group(packages=("app",), on="local")}), tmp_path / "apt")
    assert names(found, "local") == ["lib=1.5-1"]
    assert names(found, "above") == ["app=1.0-1"]


@pytest.mark.parametrize(("group", "said", "cure"), [
    (Group(packages=("driver=999.1*",)), "999.1", "driver in: 550.2-1, 550.1-1"),
    (Group(packages=("driver=999.1*",), alone=True), "999.1", "driver in: 550.2-1, 550.1-1"),
    (Group(packages=("drivr",)), "drivr", "did you mean driver?"),
    (Group(packages=("zzz",), alone=True), "zzz", "is the name right"),
])
def test_what_the_archive_does_not_have(
    toy: ToyArchive, tmp_path: Path, group: Group, said: str, cure: str,
) -> None:
    with pytest.raises(UserError, match=said) as failure:
        resolve.resolve(toy.request({"group": group}), tmp_path / "apt")
    assert cure in str(failure.value)


def test_packages_that_cannot_be_installed_together(toy: ToyArchive, tmp_path: Path) -> None:
    toy.add("broken", "1", Depends="missing (>= 2)")
    toy.publish()
    with pytest.raises(UserError, match=r"broken : Depends: missing"):
        resolve.resolve(toy.request({"group": Group(packages=("broken",))}), tmp_path / "apt")


def fails(toy: ToyArchive, tmp_path: Path, **more: str) -> str:
    """Resolving fails: with which words."""
    with pytest.raises(UserError) as failure:
        resolve.resolve(toy.request({"all": Group(packages=("app",))}, **more), tmp_path / "apt")
    return str(failure.value)


def test_a_wrong_signature(toy: ToyArchive, tmp_path: Path) -> None:
    toy.publish(key="other")
    assert "the recipe's keyring does not sign this archive" in fails(toy, tmp_path)


def test_a_wrong_signature_after_a_right_one(toy: ToyArchive, tmp_path: Path) -> None:
    """What was fetched before is not silently used on."""
    resolve.resolve(toy.request({"all": Group(packages=("app",))}), tmp_path / "apt")
    toy.add("app", "6.6.6")
    toy.publish(key="other")
    assert "the recipe's keyring does not sign this archive" in fails(toy, tmp_path)


def test_no_signature_and_altered_content(toy: ToyArchive, tmp_path: Path) -> None:
    (toy.root / "dists/toy/InRelease").unlink()
    assert "is not signed" in fails(toy, tmp_path)
    toy.publish()
    index = toy.root / "dists/toy/main/binary-amd64/Packages"
    index.write_bytes(index.read_bytes().replace(b"1.5-1", b"6.6-6"))
    said = fails(toy, tmp_path)
    assert "Hash Sum mismatch" in said
    assert "the mirror is being updated" in said


def test_an_archive_that_is_out_of_date(toy: ToyArchive, tmp_path: Path) -> None:
    toy.publish(valid=timedelta(days=-1))
    assert "out of date" in fails(toy, tmp_path)


def test_no_server(toy: ToyArchive, tmp_path: Path) -> None:
    said = fails(toy, tmp_path, uri="http://127.0.0.1:9/")
    assert "could not be fetched" in said
    assert "is the network there?" in said


def test_the_host_s_own_apt_configuration_does_not_matter(
    toy: ToyArchive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """apt's cache is written, so that each call after the first is quick; the host may forbid it
    for itself (containers do), and its default release and pins are not ours."""
    hostile = tmp_path / "apt.conf"
    hostile.write_text('Dir::Cache::pkgcache ""; APT::Install-Recommends "true";\n'
                       'APT::Default-Release "other";\n')
    monkeypatch.setenv("APT_CONFIG", str(hostile))
    found = resolve.resolve(toy.request({"all": Group(packages=("app",))}), tmp_path / "apt")
    assert "extra=1" not in names(found, "all")
    assert (tmp_path / "apt/guest/cache/pkgcache.bin").stat().st_size > 0


# files


def test_a_lock_that_is_not_there_or_of_another_format(tmp_path: Path) -> None:
    path = tmp_path / "lock.json"
    assert lock.read(path) is None
    lock.write(lock.Lock(recipe="toy", request="x", groups={}, format=lock.FORMAT + 1), path)
    assert lock.read(path) is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"recipe": 1}', "<html>"])
def test_a_lock_that_is_not_one(tmp_path: Path, text: str) -> None:
    path = tmp_path / "lock.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"lock\.json is not a lock") as failure:
        lock.read(path)
    assert "./doitw lock" in str(failure.value)


def test_a_full_disk_keeps_the_old_lock(tmp_path: Path, tiny: object) -> None:
    place = tiny(64 * 1024)  # type: ignore[operator]
    old = lock.Lock(recipe="toy", request="x", groups={})
    lock.write(old, place / "lock.json")
    deb = lock.Deb(package="a", version="1", architecture="all", url="u" * 100, size=1, sha256="0")
    with contextlib.suppress(OSError):
        lock.write(lock.Lock(recipe="toy", request="y", groups={"g": (deb,) * 1000}),
                   place / "lock.json")
    assert lock.read(place / "lock.json") == old


# the host's own archive


class Host:
    """An apt of the host with other sources, and lists or none of them."""

    def __init__(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        release = dict(line.split("=", 1) for line in
                       Path("/etc/os-release").read_text().splitlines() if "=" in line)
        self.id = release["ID"].strip('"')
        self.suite = release.get("VERSION_CODENAME", "").strip('"')
        if not self.suite:
            pytest.skip("the host has no code name")
        self.mirrors = place / "mirrors/debian.list"
        self.mirrors.parent.mkdir()
        self.sources = place / "sources.list.d"
        self.sources.mkdir()
        (place / "state/lists/partial").mkdir(parents=True)
        config = place / "apt.conf"
        config.write_text(f'Dir::Etc::sourcelist "/dev/null"; Dir::State "{place}/state";\n'
                          f'Dir::Etc::sourceparts "{self.sources}";\n')
        monkeypatch.setattr(run, "CLEAN", {**run.CLEAN, "APT_CONFIG": str(config)})

    def has(self, *uris: str) -> None:
        """One stanza for each address, of the suite and its updates; the last is security's."""
        (self.sources / "host.sources").write_text("\n".join(
            f"Types: deb deb-src\nURIs: {uri}\nSuites: {suites}\nComponents: main\n"
            for uri in uris for suites in (
                f"{self.suite}-security" if "security" in uri
                else f"{self.suite} {self.suite}-updates",)))


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    """The host's apt without any lists."""
    return Host(tmp_path, monkeypatch)


def test_the_host_s_archive_is_its_own_distribution_s(host: Host) -> None:
    host.has("http://near.invalid/debian")
    assert apt.host_archive("no-such-distribution") == {}


def test_the_host_s_archive_is_known_without_lists(
    host: Host, capfd: pytest.CaptureFixture[str],
) -> None:
    """A container has none."""
    host.has("http://near.invalid/debian", "http://near.invalid/security/")
    (host.sources / "more.list").write_text(f"deb http://far.invalid/debian {host.suite} main\n")
    assert apt.host_archive(host.id) == {
        "": "http://near.invalid/debian", "-updates": "http://near.invalid/debian",
        "-security": "http://near.invalid/security"}
    assert capfd.readouterr().err == ""


def test_a_mirror_list_is_its_first_address(
    host: Host, capfd: pytest.CaptureFixture[str],
) -> None:
    """As Debian's and Ubuntu's images for clouds have it."""
    host.has(f"mirror+file://{host.mirrors}")
    host.mirrors.write_text("# a comment\n\nfile:/srv/debian\nhttps://one.invalid/debian/\n"
                            "http://two.invalid/debian\n")
    assert apt.host_archive(host.id)[""] == "https://one.invalid/debian"
    host.mirrors.write_text("http://late.invalid/debian\n"
                            "http://part.invalid/debian\tpriority:1 arch:arm64\n"
                            "http://two.invalid/debian\tpriority:2\n")
    assert apt.host_archive(host.id)[""] == "http://two.invalid/debian"
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("content", [None, "", "mirror+http://x.invalid/list\n", "http\n"])
def test_a_mirror_list_without_an_address(
    host: Host, capfd: pytest.CaptureFixture[str], content: str | None,
) -> None:
    host.has(f"mirror+file:{host.mirrors}")
    if content is not None:
        host.mirrors.write_text(content)
    assert apt.host_archive(host.id) == {}
    assert f"at mirror+file:{host.mirrors}, which gives no address" in capfd.readouterr().err


def test_sources_from_which_nothing_can_be_fetched(
    host: Host, capfd: pytest.CaptureFixture[str],
) -> None:
    host.has("cdrom:[Debian_12]/", "mirror+http://list.invalid/security.list",
             "http://near.invalid/debian")
    assert apt.host_archive(host.id) == {"": "http://near.invalid/debian",
                                         "-updates": "http://near.invalid/debian"}
    said = capfd.readouterr().err
    assert "cdrom" not in said  # another source has what it has
    assert f"{host.suite}-security at mirror+http://list.invalid/security.list" in said


def test_sources_that_apt_cannot_read(host: Host, capfd: pytest.CaptureFixture[str]) -> None:
    (host.sources / "host.list").write_text("this is no source\n")
    assert apt.host_archive(host.id) == {}
    assert "the host's apt sources: E: Type 'this' is not known" in capfd.readouterr().err


def test_the_proxies_of_the_host_s_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "apt.conf"
    monkeypatch.setattr(run, "CLEAN", {**run.CLEAN, "APT_CONFIG": str(config)})
    config.write_text('Acquire::http::Proxy ""; Dir::Etc::parts "/dev/null";\n')
    assert apt.proxies() == {}
    config.write_text('Dir::Etc::parts "/dev/null"; acquire::HTTP::proxy "http://near:3128";\n'
                      'Acquire { http::Proxy { mirror.invalid DIRECT; }; https::Proxy false; };\n')
    assert apt.proxies() == {
        "http": "http://near:3128", "http://mirror.invalid": "",
        "https": "", "https://mirror.invalid": ""}
    config.write_text('Dir::Etc::parts "/dev/null"; Acquire::http::Proxy "http://near:3128";\n')
    assert apt.proxies() == {"http": "http://near:3128", "https": "http://near:3128"}
