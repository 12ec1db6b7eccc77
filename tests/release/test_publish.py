"""Publish and install, with Debian's registry: open, with passwords, with TLS, with tokens."""

from __future__ import annotations

import base64
import errno
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from katagpu import embed
from katagpu.errors import UserError
from katagpu.release import artifact, install, layout, publish, registry
from katagpu.release.host import Host
from katagpu.release.reference import reference
from katagpu.release.source import Pulled
from tests.release import toyrelease
from tests.release.conftest import (
    PASSWORD,
    USER,
    Keys,
    Server,
    Starter,
    certificate,
    docker_config,
)
from tests.release.faulty import Fault, Proxy, before

PAUSES = (0.01, 0.01)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, keys: Keys) -> Path:
    """A signed release."""
    return toyrelease.make(tmp_path_factory.mktemp("release"), signer=keys.signer)


def push(place: Path, to: str, *, licensed: bool = False) -> None:
    """Publish without patience."""
    publish.publish(place, to, licensed=licensed, pauses=PAUSES, timeout=10)


@pytest.fixture
def server(start_registry: Starter) -> Server:
    """A registry that lets everybody in."""
    return start_registry()


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    """A proxy before it."""
    with before(server.host) as found:
        yield found


def installs(where: str, keys: Keys, tmp_path: Path) -> None:
    """It can be installed from there, and is whole."""
    host = Host(tmp_path / "prefix")
    host.prefix.mkdir()
    install.install(where, host, key=keys.public)
    assert "intact" in next(iter(install.status(host)))
    install.uninstall(host)


def test_publish_and_install(server: Server, place: Path, keys: Keys, tmp_path: Path) -> None:
    to = f"oci://{server.host}/guests/toy"
    push(place, f"{to}:1.0.0")
    index = json.loads(server.get("guests/toy/manifests/1.0.0", registry.MANIFEST))
    assert index["artifactType"] == artifact.RELEASE
    assert index["config"]["mediaType"] == registry.EMPTY
    kinds = {layer["annotations"][artifact.TITLE]: layer["mediaType"] for layer in index["layers"]}
    assert kinds["kata-toy-nvidia-gpu-1.0.0.image"] == "application/vnd.katagpu.image.disk"
    assert kinds["vmlinuz-6.1-toy-1.0.0"] == "application/vnd.katagpu.kernel.bzimage"
    assert layout.SUMS not in kinds
    attached = Pulled(f"{to}:1.0.0").attached(artifact.SIGNATURE, *artifact.ATTACHED)
    assert sorted(sorted(unit) for unit in attached) == [
        [layout.SUMS, layout.SIGNATURE], ["provenance-1.0.0.intoto.jsonl"]]
    installs(f"{to}:1.0.0", keys, tmp_path)


def test_another_client_pulls_it(server: Server, place: Path, tmp_path: Path) -> None:
    """oras-py, which knows nothing of this one: the artifact, and what refers to it."""
    from oras.client import OrasClient

    to = f"{server.host}/guests/toy"
    push(place, f"oci://{to}:1.0.0")
    one = registry.Registry(reference(f"oci://{to}:1.0.0"))
    found = one.manifest("1.0.0")
    assert found is not None
    client = OrasClient(hostname=server.host, insecure=True)
    for name in (":1.0.0", *(f"@{entry['digest']}" for entry in one.referrers(found[1]))):
        client.pull(target=f"{to}{name}", outdir=str(tmp_path / "pulled"))
    assert {path.name: layout.digest(path) for path in (tmp_path / "pulled").iterdir()} == {
        path.name: layout.digest(path) for path in place.iterdir()}


def test_twice_is_once(proxy: Proxy, place: Path, keys: Keys) -> None:
    push(place, f"oci://{proxy.host}/toy:1.0.0")
    sent = proxy.sent
    proxy.asked.clear()
    push(place, f"oci://{proxy.host}/toy:latest")
    assert proxy.count("PATCH") == proxy.count("POST") == 0
    assert proxy.sent - sent < 20_000  # manifests
    proxy.asked.clear()
    push(place, f"oci://{proxy.host}/toy")  # the tag is the version
    assert ("PUT", "/v2/toy/manifests/1.0.0") in proxy.asked


def test_a_version_is_published_once(server: Server, place: Path, keys: Keys, tmp_path: Path,
                                     ) -> None:
    to = f"oci://{server.host}/toy"
    push(place, f"{to}:1.0.0")
    push(place, f"{to}:stable")
    other = toyrelease.make(tmp_path, signer=keys.signer, word="other")
    with pytest.raises(UserError, match="is published already, with other content"):
        push(other, f"{to}:1.0.0")
    push(other, f"{to}:stable")
    assert json.loads(server.get("toy/manifests/1.0.0", registry.MANIFEST)) != json.loads(
        server.get("toy/manifests/stable", registry.MANIFEST))


@pytest.mark.parametrize("fault", [
    Fault("PATCH", "uploads", cut=1), Fault("PATCH", "uploads", status=500),
    Fault("PUT", "manifests/1.0.0", status=503), Fault("PUT", "manifests/sha256-", lose=True),
    Fault("GET", "blobs", short=5)], ids=lambda fault: f"{fault.method} {fault.path}")
def test_what_breaks_off_goes_on(proxy: Proxy, place: Path, keys: Keys, tmp_path: Path,
                                 fault: Fault) -> None:
    proxy.faults = [fault]
    push(place, f"oci://{proxy.host}/toy:1.0.0")
    assert fault.times == 0
    installs(f"oci://{proxy.host}/toy:1.0.0", keys, tmp_path)


def test_a_registry_that_goes_down(server: Server, proxy: Proxy, place: Path, keys: Keys,
                                   tmp_path: Path) -> None:
    to = f"oci://{proxy.host}/toy:1.0.0"
    proxy.faults = [Fault("PUT", "manifests", times=9, status=503)]
    with pytest.raises(UserError, match="503"):
        push(place, to)
    proxy.faults.clear()
    with pytest.raises(UserError, match="there is no"):
        Pulled(to)
    proxy.asked.clear()
    push(place, to)
    assert proxy.count("POST") == 0  # the blobs were there
    installs(to, keys, tmp_path)


def test_a_registry_that_keeps_other_bytes(server: Server, place: Path, keys: Keys,
                                           tmp_path: Path) -> None:
    to = f"oci://{server.host}/toy:1.0.0"
    push(place, to)
    image = next(place.glob("*.image"))
    sha256 = layout.digest(image)
    blob = server.storage / f"docker/registry/v2/blobs/sha256/{sha256[:2]}/{sha256}/data"
    blob.write_bytes(b"?" * image.stat().st_size)
    with pytest.raises(UserError, match="gives other bytes for kata-toy"):
        push(place, to)
    host = Host(tmp_path / "prefix")
    host.prefix.mkdir()
    with pytest.raises(UserError, match="gives other bytes for kata-toy"):
        install.install(to, host, key=keys.public)
    assert not [path for path in host.prefix.rglob("*") if not path.is_dir()]


def attach(where: str, place: Path, names: list[str], subject: dict[str, Any]) -> None:
    """Somebody else attaches files as a signature."""
    one = registry.Registry(reference(where), pauses=PAUSES)
    layers = []
    for name in names:
        digest = layout.digest(place / name)
        one.push_blob(place / name, f"sha256:{digest}", name)
        layers.append(artifact.layer(name, name, digest, (place / name).stat().st_size))
    manifest = artifact.render(artifact.SIGNATURE, layers, {}, subject)
    one.attach(manifest, subject["digest"], artifact.SIGNATURE)


def test_a_signature_of_somebody_else(server: Server, place: Path, keys: Keys, other_keys: Keys,
                                      tmp_path: Path) -> None:
    to = f"oci://{server.host}/toy:1.0.0"
    other = Path(shutil.copytree(place, tmp_path / "other"))
    (other / layout.SIGNATURE).write_bytes(
        other_keys.signer.sign((other / layout.SUMS).read_bytes()))
    push(other, to)
    host = Host(tmp_path / "host")
    host.prefix.mkdir()
    with pytest.raises(UserError, match="is not by the key"):
        install.install(to, host, key=keys.public)
    one = registry.Registry(reference(to))
    found = one.manifest("1.0.0")
    assert found is not None
    attach(to, place, [layout.SUMS, layout.SIGNATURE],
           registry.descriptor(found[0], registry.MANIFEST))
    installs(to, keys, tmp_path)  # of two, the one that is ours counts
    push(place, to)


def strangers(proxy: Proxy, place: Path) -> None:
    """What others attach to a release, readable or not, and before what is ours."""
    one = registry.Registry(reference(f"oci://{proxy.host}/toy:1.0.0"), pauses=PAUSES)
    found = one.manifest("1.0.0")
    assert found is not None
    subject = registry.descriptor(found[0], registry.MANIFEST)
    spdx, absent = "application/spdx+json", f"sha256:{'5' * 64}"
    sums = artifact.layer(layout.SUMS, layout.SUMS, layout.digest(place / layout.NOTES),
                          (place / layout.NOTES).stat().st_size)
    title = {**sums, "annotations": {artifact.TITLE: "out/sbom.json"}}
    good = json.loads(artifact.render(spdx, [title], {}, subject))
    no_type = {**good, "artifactType": None, "config": {**good["config"], "mediaType": spdx}}
    no_layers = {key: value for key, value in good.items() if key != "layers"}
    spoilt: list[object] = [good, no_type, no_layers, []]
    manifests = [json.dumps(each).encode() for each in spoilt]
    manifests += [artifact.render(artifact.SIGNATURE, [layer], {}, subject) for layer in (
        title, sums, {**sums, "size": 5 << 20}, {**sums, "digest": absent})]
    index = [registry.descriptor(data, registry.MANIFEST, artifactType=kind)
             for data in manifests for kind in (spdx, artifact.SIGNATURE)]
    index += [{**index[0], "digest": digest, "artifactType": artifact.SIGNATURE}
              for digest in (absent, "../x\u00e9")]
    listed = {"schemaVersion": 2, "manifests": [*index, *one.referrers(found[1])]}
    proxy.faults = [Fault("GET", "referrers", status=200, body=json.dumps(listed).encode(),
                          headers={"Content-Type": registry.INDEX}, times=999)]
    proxy.faults += [Fault("GET", registry.descriptor(data, "")["digest"], status=200, body=data,
                           times=999) for data in manifests]


def test_what_others_attached(proxy: Proxy, place: Path, keys: Keys, other_keys: Keys,
                              tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It is skipped, and what is ours found behind it."""
    to = f"oci://{proxy.host}/toy:1.0.0"
    push(place, to)
    strangers(proxy, place)
    push(place, to)
    installs(to, keys, tmp_path)
    assert "is skipped: " in capfd.readouterr().err
    host = Host(tmp_path / "host")
    host.prefix.mkdir()
    install.install(to, host, key=None, unverified=True)
    install.uninstall(host)
    with pytest.raises(UserError, match="is not by the key"):
        install.install(to, host, key=other_keys.public)


def test_what_others_attached_signs_nothing(proxy: Proxy, keys: Keys, tmp_path: Path) -> None:
    to = f"oci://{proxy.host}/toy:1.0.0"
    place = toyrelease.make(tmp_path)
    push(place, to)
    strangers(proxy, place)
    with pytest.raises(UserError, match="is not signed"):
        install.install(to, Host(tmp_path), key=keys.public)


def test_a_registry_that_fails_is_no_stranger(proxy: Proxy, place: Path, keys: Keys,
                                              monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                              ) -> None:
    """A list that nobody could read says nothing about who signed."""
    to = f"oci://{proxy.host}/toy:1.0.0"
    push(place, to)
    monkeypatch.setattr(time, "sleep", lambda _seconds: None)
    sums = layout.digest(place / layout.SUMS)
    proxy.faults = [Fault("GET", f"blobs/sha256:{sums}", times=9, status=503)]
    with pytest.raises(UserError, match="answered 503"):
        install.install(to, Host(tmp_path), key=keys.public)


def test_a_tag_that_names_another_version(server: Server, place: Path, keys: Keys, tmp_path: Path,
                                          ) -> None:
    to = f"oci://{server.host}/toy"
    push(place, f"{to}:1.0.0")
    found = registry.Registry(reference(f"{to}:1.0.0")).manifest("1.0.0")
    assert found is not None
    for tag in ("1.3.0", "stable"):
        registry.Registry(reference(to)).push_manifest(found[0], tag)
    host = Host(tmp_path / "host")
    host.prefix.mkdir()
    with pytest.raises(UserError, match=r"is toy-1\.0\.0, and 1\.3\.0 was asked for"):
        install.install(f"{to}:1.3.0", host, key=keys.public)
    assert not host.home.exists()
    installs(f"{to}:stable", keys, tmp_path)
    with pytest.raises(UserError, match="is the version of another release"):
        push(place, f"{to}:1.3.0")


def test_no_space_to_read_it_back(server: Server, place: Path, monkeypatch: pytest.MonkeyPatch,
                                  ) -> None:
    def pull(*_words: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(registry.Registry, "pull_blob", pull)
    with pytest.raises(UserError, match=r"cannot be read back into .*No space left"):
        push(place, f"oci://{server.host}/toy:1.0.0")


def test_what_is_no_release(server: Server, place: Path, keys: Keys, tmp_path: Path) -> None:
    to = f"oci://{server.host}/toy"
    push(place, f"{to}:1.0.0")
    other = next(entry["digest"] for entry in registry.Registry(reference(to)).referrers(
        Pulled(f"{to}:1.0.0").digest))
    with pytest.raises(UserError, match="is no release of katagpu"):
        Pulled(f"{to}@{other}")
    with pytest.raises(UserError, match="there is no oci://"):
        Pulled(f"{to}:none")


# who may


def test_a_password(start_registry: Starter, place: Path, keys: Keys, tmp_path: Path,
                    monkeypatch: pytest.MonkeyPatch) -> None:
    server = start_registry(password=True)
    to = f"oci://{server.host}/toy:1.0.0"
    with pytest.raises(UserError, match="wants a user and a password"):
        push(place, to)
    path = docker_config(tmp_path / "docker/config.json", server.host, password="another")
    monkeypatch.setenv("DOCKER_CONFIG", str(path.parent))
    with pytest.raises(UserError, match="docker login"):
        push(place, to)
    docker_config(path, server.host)
    push(place, to)
    installs(to, keys, tmp_path)
    monkeypatch.delenv("DOCKER_CONFIG")
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    monkeypatch.setenv("REGISTRY_AUTH_FILE",
                       str(docker_config(tmp_path / "auth.json", server.host)))
    push(place, to)
    for text, said in (("{", "cannot be read"), ("[]", "is no Docker configuration"),
                       (json.dumps({"auths": {server.host: "word"}}), "is damaged"),
                       (json.dumps({"auths": [server.host]}), "is damaged"),
                       (json.dumps({"auths": {server.host: {"auth": 7}}}), "is damaged")):
        (tmp_path / "auth.json").write_text(text)
        with pytest.raises(UserError, match=said):
            push(place, to)


def test_a_credential_helper(start_registry: Starter, place: Path, tmp_path: Path,
                             monkeypatch: pytest.MonkeyPatch) -> None:
    server = start_registry(password=True)
    helper = tmp_path / "docker-credential-toy"
    helper.write_text(f"#!/bin/sh\n[ \"$1\" = get ] && [ \"$(cat)\" = {server.host} ] && echo "
                      f"'{{\"Username\": \"{USER}\", \"Secret\": \"{PASSWORD}\"}}'\n")
    helper.chmod(0o755)
    config = tmp_path / "auth.json"
    config.write_text(json.dumps({"credHelpers": {server.host: "toy"}}))
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(config))
    with pytest.raises(UserError, match="gave no credentials"):
        push(place, f"oci://{server.host}/toy:1.0.0")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    push(place, f"oci://{server.host}/toy:1.0.0")


def test_tokens(proxy: Proxy, place: Path, keys: Keys, tmp_path: Path,
                monkeypatch: pytest.MonkeyPatch) -> None:
    proxy.token = "toy-token"
    to = f"oci://{proxy.host}/toy:1.0.0"
    push(place, to)
    assert any("scope=repository%3Atoy%3Apull%2Cpush" in path for _, path in proxy.asked)
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(docker_config(tmp_path / "auth.json", proxy.host)))
    proxy.authorizations.clear()
    installs(to, keys, tmp_path)
    basic = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    assert {each for each in proxy.authorizations if each} == {basic, "Bearer toy-token"}


def test_a_password_stays_with_its_registry(
    start_registry: Starter, place: Path, keys: Keys, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server, storage = start_registry(password=True), start_registry()
    with before(server.host) as one, before(storage.host) as other:
        monkeypatch.setenv("REGISTRY_AUTH_FILE",
                           str(docker_config(tmp_path / "auth.json", one.host)))
        push(place, f"oci://{one.host}/toy:1.0.0")
        push(place, f"oci://{other.host}/toy:1.0.0")
        image = layout.digest(next(place.glob("*.image")))
        blob = f"/v2/toy/blobs/sha256:{image}"
        one.faults = [Fault("GET", blob, status=307,
                            headers={"Location": f"http://{other.host}{blob}"})]
        one.authorizations.clear()
        other.asked.clear()
        installs(f"oci://{one.host}/toy:1.0.0", keys, tmp_path)
        assert ("GET", blob) in other.asked
        assert set(other.authorizations) == {None}
        assert any(one.authorizations)


def test_tls(start_registry: Starter, place: Path, keys: Keys, tmp_path: Path,
             monkeypatch: pytest.MonkeyPatch) -> None:
    cert, key = certificate(tmp_path)
    server = start_registry(password=True, tls=(cert, key))
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(docker_config(tmp_path / "auth", server.host)))
    to = f"oci://{server.host}/toy:1.0.0"
    with pytest.raises(UserError, match="certificate was not accepted"):
        push(place, to)
    monkeypatch.setenv("SSL_CERT_FILE", str(cert))
    push(place, to)
    installs(to, keys, tmp_path)
    monkeypatch.delenv("SSL_CERT_FILE")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(cert))
    push(place, to)


# what must not go out


def test_licensed_parts(server: Server, keys: Keys, tmp_path: Path) -> None:
    place = toyrelease.make(tmp_path, signer=keys.signer, licensed=True)
    for host in ("registry.invalid", "10.0.0.1:5000", "127.example.invalid"):
        with pytest.raises(UserError, match="vGPU software"):
            push(place, f"oci://{host}/toy:1.0.0")
    with pytest.raises(UserError, match="cannot be resolved"):
        push(place, "oci://registry.invalid/toy:1.0.0", licensed=True)
    push(place, f"oci://{server.host}/toy:1.0.0")  # this machine


def test_a_token(server: Server, place: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(place, tmp_path / "copy"))
    (copy / embed.NOTICE).write_text("  image\n")
    with pytest.raises(UserError, match="was changed since"):
        push(copy, f"oci://{server.host}/toy:1.0.0", licensed=True)


def test_a_changed_release(server: Server, place: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(place, tmp_path / "copy"))
    next(copy.glob("*.image")).write_bytes(b"?")
    with pytest.raises(UserError, match=r"was changed since it was made: kata-toy"):
        push(copy, f"oci://{server.host}/toy:1.0.0")
    with pytest.raises(UserError, match="there is no release"):
        push(tmp_path, f"oci://{server.host}/toy:1.0.0")
    copy = Path(shutil.copytree(place, tmp_path / "another"))
    (copy / "more").mkdir()
    with pytest.raises(UserError, match="was changed since it was made: more"):
        push(copy, f"oci://{server.host}/toy:1.0.0")
    (copy / layout.SUMS).unlink()
    with pytest.raises(UserError, match="SHA256SUMS cannot be read"):
        push(copy, f"oci://{server.host}/toy:1.0.0")
    with pytest.raises(UserError, match="under a tag"):
        push(place, f"oci://{server.host}/toy@sha256:{'0' * 64}")


# to a directory


def test_to_a_directory(place: Path, keys: Keys, tmp_path: Path) -> None:
    left = tmp_path / f"mirror/.{place.name}.4194305.part"  # of a process that cannot be
    (left / "half").mkdir(parents=True)
    for _ in range(2):
        push(place, str(tmp_path / "mirror"))
    copy = tmp_path / "mirror" / place.name
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == {
        path.name: path.read_bytes() for path in place.iterdir()}
    installs(str(copy), keys, tmp_path)
    next(copy.glob("*.image")).write_bytes(b"?")
    with pytest.raises(UserError, match="was changed since it was published"):
        push(place, str(tmp_path / "mirror"))
    other = toyrelease.make(tmp_path, signer=keys.signer, word="other")
    with pytest.raises(UserError, match="is published already, with other content"):
        push(other, str(tmp_path / "mirror"))
    with pytest.raises(UserError, match="cannot publish to"):
        push(place, "/proc/none")
    assert [path.name for path in (tmp_path / "mirror").iterdir()] == [place.name]
