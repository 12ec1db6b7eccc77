"""Blobs, manifests, referrers: with Debian's registry, and with one that breaks."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from katagpu.errors import UserError
from katagpu.release import artifact, registry
from katagpu.release.registry import Registry, Upload, reference
from tests.release.conftest import Server, Starter, free_port
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
    "oci://host/a:", "oci://user@host/a", "oci://host/a@sha256:12", "oci://host/a?b"])
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
