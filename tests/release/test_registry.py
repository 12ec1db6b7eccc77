"""Blobs, manifests, referrers: with Debian's registry, and with one that breaks."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from katagpu.errors import UserError
from katagpu.release import artifact, registry
from katagpu.release.reference import reference
from katagpu.release.registry import Registry, Upload
from tests.release.conftest import Server, Starter, certificate, docker_config, free_port
from tests.release.faulty import Fault, Proxy, before

PAUSES = (0.01, 0.01)


@pytest.fixture
def server(start_registry: Starter) -> Server:
    """A registry that lets everybody in."""
    return start_registry()


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    """A proxy before it."""
    with before(server.host) as found:
        yield found


def client(host: str, *, chunk: int = 1000, timeout: float = 10) -> Registry:
    """A client without patience."""
    return Registry(reference(f"oci://{host}/some/thing:1"), pauses=PAUSES, chunk=chunk,
                    timeout=timeout)


@pytest.fixture
def blob(tmp_path: Path) -> Path:
    """A file of 4500 bytes."""
    path = tmp_path / "blob"
    path.write_bytes(os.urandom(4500))
    return path


def digest(path: Path) -> str:
    """Its digest."""
    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


def pulled(one: Registry, path: Path) -> bytes:
    """What the registry gives for a file."""
    sink = io.BytesIO()
    one.pull_blob(digest(path), path.stat().st_size, sink, "it")
    return sink.getvalue()


# references


@pytest.mark.parametrize(("text", "parts"), [
    ("oci://localhost:5000/a/b-c:1.0", ("localhost:5000", "a/b-c", "1.0", None)),
    ("oci://reg.example/a", ("reg.example", "a", None, None)),
    (f"oci://[::1]:5000/a:t@sha256:{'0' * 64}", ("[::1]:5000", "a", "t", f"sha256:{'0' * 64}"))])
def test_references(text: str, parts: tuple[str | None, ...]) -> None:
    found = reference(text)
    assert (found.registry, found.repository, found.tag, found.digest) == parts


@pytest.mark.parametrize("text", [
    "oci://", "oci://host", "oci://host/Name", "oci://host/../a", "docker://host/a", "oci:/host/a",
    "oci://localhost:99999/a:1", "oci://[:::::]/a", "oci://host/a:",
    "oci://user@host/a", "oci://host/a@sha256:12", "oci://host/a?b"])
def test_what_is_no_reference(text: str) -> None:
    with pytest.raises(UserError, match="no reference"):
        reference(text)


# blobs


def test_push_and_pull(server: Server, blob: Path) -> None:
    one = client(server.host)
    assert one.push_blob(blob, digest(blob), "it")
    assert not one.push_blob(blob, digest(blob), "it")
    assert pulled(one, blob) == blob.read_bytes()
    assert server.get(f"some/thing/blobs/{digest(blob)}") == blob.read_bytes()


@pytest.mark.parametrize("size", [0, 1, 2, 999, 1000, 1001])
def test_sizes_around_a_chunk(server: Server, tmp_path: Path, size: int) -> None:
    path = tmp_path / "it"
    path.write_bytes(os.urandom(size))
    one = client(server.host)
    one.push_blob(path, digest(path), "it")
    assert pulled(one, path) == path.read_bytes()


@pytest.mark.parametrize("fault", [
    Fault("PATCH", "/", cut=300), Fault("PATCH", "/", times=2, lose=True),
    Fault("PATCH", "/", status=500), Fault("PATCH", "/", status=404),
    Fault("PATCH", "/", status=429), Fault("POST", "/", status=503), Fault("POST", "/", lose=True),
    Fault("PUT", "/", status=502), Fault("PUT", "/", lose=True), Fault("HEAD", "/", status=503),
    Fault("PUT", "/", status=404)], ids=lambda fault: f"{fault.method}-{fault.status or 'broken'}")
def test_an_upload_goes_on(proxy: Proxy, blob: Path, fault: Fault) -> None:
    proxy.faults = [fault]
    one = client(proxy.host)
    assert one.push_blob(blob, digest(blob), "it")
    assert fault.times == 0
    assert pulled(one, blob) == blob.read_bytes()


def test_an_upload_goes_on_where_it_was(proxy: Proxy, blob: Path) -> None:
    one = client(proxy.host)
    with blob.open("rb") as stream:
        upload = Upload(one, stream, digest(blob), 4500, "it")
        for _ in range(3):
            upload.step()
        assert upload.offset == 2000
        proxy.faults = [Fault("PATCH", "/", status=503)]
        upload.run()
    assert proxy.sent == 5500  # one chunk twice
    assert proxy.count("POST") == 1
    assert pulled(one, blob) == blob.read_bytes()


def test_a_registry_that_is_down(server: Server, blob: Path) -> None:
    server.stop()
    with pytest.raises(UserError, match=r"Connection refused[\s\S]*goes on where this one stopped"):
        client(server.host).push_blob(blob, digest(blob), "it")


def test_a_registry_that_goes_down_mid_push(server: Server, blob: Path) -> None:
    one = client(server.host)
    with blob.open("rb") as stream:
        upload = Upload(one, stream, digest(blob), 4500, "it")
        for _ in range(3):
            upload.step()
        server.stop()
        with pytest.raises(UserError, match="push it"):
            upload.run()
    server.start()
    assert one.push_blob(blob, digest(blob), "it")
    assert pulled(one, blob) == blob.read_bytes()


def test_a_registry_that_stays_broken(proxy: Proxy, blob: Path) -> None:
    proxy.faults = [Fault("PATCH", "/", times=99, status=500)]
    with pytest.raises(UserError, match="answered 500"):
        client(proxy.host).push_blob(blob, digest(blob), "it")
    proxy.faults = [Fault("PATCH", "/", times=99, status=400)]
    with pytest.raises(UserError, match="does not take it: status 400"):
        client(proxy.host).push_blob(blob, digest(blob), "it")


def test_a_slow_registry(proxy: Proxy, blob: Path) -> None:
    proxy.faults = [Fault("PATCH", "/", pause=0.8)]
    assert client(proxy.host, timeout=0.4).push_blob(blob, digest(blob), "it")
    proxy.faults = [Fault("HEAD", "/", pause=0.8, times=99)]
    with pytest.raises(UserError, match="did not answer in time"):
        client(proxy.host, timeout=0.4).push_blob(blob, digest(blob), "it")


def test_wrong_digests(proxy: Proxy, blob: Path) -> None:
    one = client(proxy.host)
    wrong = f"sha256:{'0' * 64}"
    proxy.faults = [Fault("PUT", "blobs", headers={"Docker-Content-Digest": wrong})]
    with pytest.raises(UserError, match=f"took it as {wrong}"):
        one.push_blob(blob, digest(blob), "it")
    proxy.faults = [Fault("GET", "blobs", answer=lambda data: data[:-1] + b"?")]
    with pytest.raises(UserError, match="gives other bytes for it"):
        pulled(one, blob)
    proxy.faults = [Fault("GET", "blobs", answer=lambda data: data + b"?")]
    with pytest.raises(UserError, match="gives more than the 4500 bytes"):
        pulled(one, blob)
    with pytest.raises(UserError, match="does not take it"):
        one.push_blob(blob, wrong, "it")  # Debian's registry hashes too
    with pytest.raises(UserError, match="does not give it"):
        one.pull_blob(wrong, 4500, io.BytesIO(), "it")


def test_a_pull_goes_on_where_it_was(proxy: Proxy, blob: Path) -> None:
    one = client(proxy.host)
    one.push_blob(blob, digest(blob), "it")
    proxy.faults = [Fault("GET", "blobs", short=1000), Fault("GET", "blobs", short=500)]
    assert pulled(one, blob) == blob.read_bytes()
    assert proxy.count("GET", "blobs/sha256") == 3
    proxy.faults = [Fault("GET", "blobs", short=0, times=9)]
    with pytest.raises(UserError, match="ended early"):
        pulled(one, blob)


class Full(io.BytesIO):
    """A file on a full disk."""

    def write(self, _data: object) -> int:
        """Refuse."""
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_not_the_registry_s_fault(proxy: Proxy, blob: Path) -> None:
    one = client(proxy.host)
    one.push_blob(blob, digest(blob), "it")
    with pytest.raises(OSError, match="No space left"):
        one.pull_blob(digest(blob), 4500, Full(), "it")
    assert proxy.count("GET", "blobs/sha256") == 1


@pytest.mark.parametrize("faults", [
    [Fault("PUT", "uploads", times=99, status=404), Fault("GET", "uploads", times=99, status=404)],
    [Fault("PUT", "uploads", times=99, status=500)], [Fault("PUT", "uploads", times=99, lose=True),
                                                     Fault("HEAD", "blobs", times=99, status=404)],
], ids=["lost", "broken", "unheard"])
def test_an_upload_whose_end_always_fails_comes_to_an_end(
    proxy: Proxy, blob: Path, faults: list[Fault],
) -> None:
    proxy.faults = [replace(fault) for fault in faults]
    with pytest.raises(UserError, match="push it"):
        client(proxy.host).push_blob(blob, digest(blob), "it")
    assert proxy.count("PUT") == len(PAUSES) + 1


@pytest.mark.parametrize("chunked", [False, True])
def test_a_registry_that_breaks_off_its_refusal(proxy: Proxy, blob: Path, chunked: bool) -> None:
    proxy.faults = [Fault("POST", "uploads", status=403, chunked=chunked, short=9,
                          body=b"ff\r\n" + b"?" * 99)]
    with pytest.raises(UserError, match=r"refuses to push to some/thing \(status 403\)"):
        client(proxy.host).push_blob(blob, digest(blob), "it")


@pytest.mark.parametrize("chunked", [False, True])
def test_a_token_that_breaks_off(proxy: Proxy, blob: Path, chunked: bool) -> None:
    challenge = {"WWW-Authenticate": f'Bearer realm="http://{proxy.host}/token",service="toy"'}
    proxy.faults = [Fault("POST", "uploads", status=401, headers=challenge, times=9),
                    Fault("GET", "/token", status=200, times=9, chunked=chunked, short=9,
                          body=b'ff\r\n{"token": "x"}')]
    with pytest.raises(UserError, match="the answer ended early"):
        client(proxy.host).push_blob(blob, digest(blob), "it")


# where a registry sends us


@pytest.mark.parametrize("status", [302, 307, 308])
def test_a_redirected_question_stays_one(server: Server, blob: Path, status: int) -> None:
    """Storage may know an address that is signed for HEAD alone."""
    client(server.host).push_blob(blob, digest(blob), "it")
    with before(server.host) as one, before(server.host) as storage:
        one.faults = [Fault("HEAD", "blobs", status=status, headers={
            "Location": f"http://{storage.host}/v2/some/thing/blobs/{digest(blob)}"})]
        assert not client(one.host).push_blob(blob, digest(blob), "it")
        assert [method for method, _path in storage.asked] == ["HEAD"]


def test_an_upload_goes_on_elsewhere(server: Server, blob: Path) -> None:
    with before(server.host) as one, before(server.host) as storage:
        location = client(server.host).wire.ask("POST", f"http://{server.host}/v2/some/thing/blobs/"
                                                "uploads/", body=b"", push=True).headers["location"]
        one.faults = [Fault("POST", "uploads", status=202, headers={
            "Location": location.replace(server.host, storage.host)})]
        assert client(one.host, chunk=9999).push_blob(blob, digest(blob), "it")
        assert storage.count("PATCH") == 1
    assert pulled(client(server.host), blob) == blob.read_bytes()


@pytest.mark.parametrize("way", ["redirect", "upload"])
def test_who_we_are_is_told_to_the_registry_alone(
    server: Server, blob: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str,
) -> None:
    """Storage that asks for a password, or names who asks for it, gets none."""
    with before(server.host) as one, before(server.host) as storage:
        monkeypatch.setenv("REGISTRY_AUTH_FILE",
                           str(docker_config(tmp_path / "auth.json", one.host)))
        storage.token = "toy-token"
        target = f"http://{storage.host}/v2/some/thing/blobs/{digest(blob)}"
        one.faults = [Fault("GET", "blobs", status=307, headers={"Location": target}),
                      Fault("POST", "uploads", status=202, headers={"Location": target})]
        with pytest.raises(UserError, match=f"{storage.host}, to which {one.host} sends us"):
            if way == "upload":
                client(one.host).push_blob(blob, digest(blob), "it")
            else:
                pulled(client(one.host), blob)
        assert len(storage.asked) == 1, "nobody asks there for a token"
        assert set(one.authorizations + storage.authorizations) == {None}


def test_tls_is_kept(server: Server, blob: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                     ) -> None:
    tls = certificate(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(tls[0]))
    with before(server.host, tls) as one, before(server.host) as plain:
        client(one.host).push_blob(blob, digest(blob), "it")
        target = {"Location": f"http://{plain.host}/v2/some/thing/blobs/{digest(blob)}"}
        one.faults = [Fault("GET", "blobs", status=307, headers=target)]
        with pytest.raises(UserError, match=r"redirects to http.*without TLS"):
            pulled(client(one.host), blob)
        one.faults = [Fault("HEAD", "blobs", status=404),
                      Fault("POST", "uploads", status=202, headers=target)]
        with pytest.raises(UserError, match=r"sends us to http.*without TLS"):
            client(one.host).push_blob(blob, digest(blob), "it")
        assert plain.asked == []


@pytest.mark.parametrize("location", ["http://[", "http://localhost:99999/", "http://a..b/",
                                      "file:///etc/passwd", "/\u00e9"])
def test_an_address_that_is_none(proxy: Proxy, blob: Path, location: str) -> None:
    proxy.faults = [Fault("POST", "uploads", status=202, headers={"Location": location})]
    with pytest.raises(UserError, match=r"sends us to|cannot be asked for"):
        client(proxy.host).push_blob(blob, digest(blob), "it")


# manifests and referrers


def some(one: Registry, word: str, subject: bytes | None = None) -> bytes:
    """An artifact with one small file in it, pushed but for its manifest."""
    import tempfile

    for data in (word.encode(), artifact.NOTHING):
        with tempfile.NamedTemporaryFile() as file:
            file.write(data)
            file.flush()
            one.push_blob(Path(file.name), digest(Path(file.name)), word)
    sha256 = hashlib.sha256(word.encode()).hexdigest()
    return artifact.render(
        "application/x", [artifact.layer(word, "a.txt", sha256, len(word))], {},
        None if subject is None else registry.descriptor(subject, registry.MANIFEST))


def test_manifests(server: Server) -> None:
    one = client(server.host)
    data = some(one, "first")
    assert one.manifest("1") is None
    found, listed = one.push_manifest(data, "1")
    assert not listed
    assert one.manifest("1") == (data, found) == one.manifest(found)
    assert json.loads(server.get("some/thing/tags/list"))["tags"] == ["1"]


def test_referrers_by_tag(server: Server) -> None:
    one = client(server.host)
    subject = some(one, "first")
    name, _ = one.push_manifest(subject)
    assert one.referrers(name) == []
    for word in ("second", "third", "second"):
        one.attach(some(one, word, subject), name, "application/x")
    found = one.referrers(name)
    assert len(found) == 2
    assert {entry["artifactType"] for entry in found} == {"application/x"}
    index = json.loads(server.get(f"some/thing/manifests/{name.replace(':', '-')}", registry.INDEX))
    assert index["manifests"] == found


def test_a_registry_with_the_referrers_interface(proxy: Proxy) -> None:
    one = client(proxy.host)
    subject = some(one, "first")
    name, _ = one.push_manifest(subject)
    proxy.faults = [Fault("PUT", "manifests", headers={"OCI-Subject": name})]
    one.attach(some(one, "second", subject), name, "application/x")
    assert one.manifest(name.replace(":", "-")) is None
    assert one.referrers(name) == []


def test_referrers_on_two_pages(proxy: Proxy) -> None:
    one = client(proxy.host)
    subject = some(one, "first")
    name, _ = one.push_manifest(subject)
    entries = [registry.descriptor(some(one, word, subject), registry.MANIFEST,
                                   artifactType="application/x") for word in ("second", "third")]
    pages = [json.dumps({"schemaVersion": 2, "mediaType": registry.INDEX, "manifests": [entry]})
             for entry in entries]
    first, last = (Fault("GET", f"referrers/{name}", status=200, body=page.encode(),
                         headers={"Content-Type": registry.INDEX}) for page in pages)
    first.headers["Link"] = f'</v2/some/thing/referrers/{name}?n=1&last=x>; rel="next"'
    proxy.faults = [replace(first), replace(last)]
    assert one.referrers(name) == entries
    assert proxy.asked[-1][1].endswith("?n=1&last=x")
    proxy.faults = [replace(first, times=9999)]
    with pytest.raises(UserError, match="on more than 100 pages"):
        one.referrers(name)
    proxy.faults = [replace(first), Fault("GET", "referrers", status=404)]
    with pytest.raises(UserError, match="list of referrers"):
        one.referrers(name)


@pytest.mark.parametrize("layer", [
    {"digest": "sha256:\u00e9"}, {"digest": 7}, {"digest": "sha512:" + "0" * 128}, {"size": "1"},
    {"size": -1}, {"digest": None}])
def test_a_manifest_whose_layers_are_none(layer: dict[str, object]) -> None:
    good = artifact.layer("a", "a", "0" * 64, 1)
    assert list(registry.titles({"layers": [good]})) == [("a", f"sha256:{'0' * 64}", 1)]
    with pytest.raises(UserError, match="manifest is damaged"):
        list(registry.titles({"layers": [{**good, **layer}]}))


def test_a_manifest_that_is_another_one(proxy: Proxy) -> None:
    one = client(proxy.host)
    data = some(one, "first")
    found, _ = one.push_manifest(data, "1")
    for wanted in ("1", found):
        proxy.faults = [Fault("GET", "manifests", answer=lambda data: data + b" ")]
        with pytest.raises(UserError, match="gives other bytes for the manifest"):
            one.manifest(wanted)
    proxy.faults = [Fault("PUT", "manifests", headers={"Docker-Content-Digest": "sha256:1"})]
    with pytest.raises(UserError, match="took the manifest as sha256:1"):
        one.push_manifest(data, "1")
    absent = artifact.render("application/x", [artifact.layer("a", "a", "0" * 64, 1)], {})
    with pytest.raises(UserError, match=r"does not take the manifest 2: .*blob unknown"):
        one.push_manifest(absent, "2")


def test_nobody_is_there(blob: Path) -> None:
    with pytest.raises(UserError, match="no connection"):
        client(f"localhost:{free_port()}").push_blob(blob, digest(blob), "it")
    with pytest.raises(UserError, match="cannot be resolved"):
        client("no-such-host.invalid").push_blob(blob, digest(blob), "it")
