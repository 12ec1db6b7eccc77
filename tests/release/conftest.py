"""Keys, and a real registry: Debian's docker-registry on the loopback."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from katagpu.release import signing

USER, PASSWORD = "somebody", "word of passage"
HASHED = "$2b$05$y4fAwrJepHKQZqVqMZvEC.05TpHGSyXbSLwxMTHeH61CbXNyjASm6"  # its bcrypt(3)


@dataclass(frozen=True)
class Keys:
    """A key pair in files."""

    private: Path
    public: Path

    @property
    def signer(self) -> signing.KeySigner:
        """Who signs with it."""
        return signing.load(self.private)


def make_keys(directory: Path, name: str, *words: str) -> Keys:
    """A pair of openssl's."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    private, public = directory / f"{name}.key", directory / f"{name}.pem"
    subprocess.run(["openssl", "genpkey", "-out", private, "-algorithm", *(words or ("ed25519",))],
                   check=True, capture_output=True)
    subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], check=True)
    return Keys(private, public)


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    """The key of who releases."""
    return make_keys(tmp_path_factory.mktemp("keys"), "ed25519")


@pytest.fixture(scope="session")
def other_keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    """Somebody else's."""
    return make_keys(tmp_path_factory.mktemp("keys"), "other")


@pytest.fixture(scope="session")
def p256(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    """A key on NIST's curve P-256."""
    return make_keys(tmp_path_factory.mktemp("keys"), "p256", "ec", "-pkeyopt",
                     "ec_paramgen_curve:P-256")


@pytest.fixture(scope="session")
def registry_program(tmp_path_factory: pytest.TempPathFactory) -> str:
    """docker-registry: the host's, else unpacked from Debian's package."""
    installed = shutil.which("docker-registry")
    if installed is not None:
        return installed
    if shutil.which("apt-get") is None:
        pytest.skip("docker-registry is not installed, and this is no Debian")
    place = tmp_path_factory.mktemp("debs")
    said = subprocess.run(["apt-get", "download", "-q", "docker-registry"], cwd=place,
                          capture_output=True, text=True, check=False)
    if said.returncode != 0:
        pytest.skip("docker-registry is not installed, and cannot be downloaded")
    subprocess.run(["dpkg", "-x", next(place.glob("*.deb")), place / "root"], check=True)
    return str(place / "root/usr/bin/docker-registry")


@dataclass
class Server:
    """A registry that runs, and how to stop and start it."""

    host: str
    storage: Path
    argv: list[str]
    log: Path
    scheme: str = "http"
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it answers."""
        with self.log.open("ab") as sink:
            self.process = subprocess.Popen(self.argv, stdout=sink, stderr=sink)
        name, port = self.host.split(":")
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection((name, int(port)), 1):
                return
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)
        raise AssertionError(self.log.read_text())

    def stop(self) -> None:
        """Kill it."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def get(self, path: str, accept: str = "*/*") -> bytes:
        """What it answers to a plain client."""
        request = urllib.request.Request(f"http://{self.host}/v2/{path}",
                                         headers={"Accept": accept})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return bytes(answer.read())


Starter = Callable[..., Server]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture
def start_registry(tmp_path: Path, registry_program: str) -> Iterator[Starter]:
    """Starts registries, with passwords, with TLS; they end with the test."""
    running: list[Server] = []
    memory = Path("/dev/shm")
    stack = contextlib.ExitStack()
    top = Path(stack.enter_context(tempfile.TemporaryDirectory(
        dir=memory if memory.is_dir() else tmp_path)))

    def start(*, password: bool = False, tls: tuple[Path, Path] | None = None) -> Server:
        place = top / f"registry-{len(running)}"
        place.mkdir()
        host = f"127.0.0.1:{free_port()}"
        config = [f"version: 0.1\nlog: {{level: info}}\nstorage:\n  filesystem: "
                  f"{{rootdirectory: {place}/data}}\nhttp:\n  addr: {host}\n"]
        if tls is not None:
            config.append(f"  tls: {{certificate: {tls[0]}, key: {tls[1]}}}\n")
        if password:
            (place / "htpasswd").write_text(f"{USER}:{HASHED}\n")
            config.append(f"auth:\n  htpasswd: {{realm: toy, path: {place}/htpasswd}}\n")
        (place / "config.yml").write_text("".join(config))
        server = Server(host=host, storage=place / "data", log=place / "log",
                        argv=[registry_program, "serve", str(place / "config.yml")],
                        scheme="https" if tls else "http")
        running.append(server)
        server.start()
        return server

    yield start
    for server in running:
        server.stop()
    stack.close()


def certificate(directory: Path) -> tuple[Path, Path]:
    """A certificate of 127.0.0.1 for TLS, and its key."""
    cert, key = directory / "tls.pem", directory / "tls.key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
         "-nodes", "-keyout", key, "-out", cert, "-days", "2", "-subj", "/CN=toy",
         "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True)
    return cert, key


def docker_config(path: Path, host: str, user: str = USER, password: str = PASSWORD) -> Path:
    """What `docker login` leaves."""
    path.parent.mkdir(parents=True, exist_ok=True)
    auth = base64.b64encode(f"{user}:{password}".encode()).decode()
    path.write_text(json.dumps({"auths": {host: {"auth": auth}}}))
    return path


@pytest.fixture(autouse=True)
def no_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees this host's own logins, certificates or proxies."""
    for name in ("REGISTRY_AUTH_FILE", "XDG_RUNTIME_DIR", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE",
                 "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "no-docker"))
