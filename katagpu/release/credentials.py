"""Who we are to a registry: the files that `docker login` and `podman login` leave, and tokens."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from katagpu.errors import UserError

DOCKER_HUB = "docker.io"
_CHALLENGE = re.compile(r'(\w+)="([^"]*)"')


@dataclass(frozen=True)
class Credentials:
    """A user with a password, or an identity token (OAuth2's refresh token)."""

    user: str = ""
    password: str = ""
    token: str = ""

    @property
    def basic(self) -> str:
        """The header of HTTP's basic authentication."""
        return "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode()


def files() -> list[Path]:
    """Where credentials are looked for, first come, first served."""
    given, docker = os.environ.get("REGISTRY_AUTH_FILE"), os.environ.get("DOCKER_CONFIG")
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    found = [Path(given)] if given else []
    found += [Path(docker) / "config.json"] if docker else [Path.home() / ".docker/config.json"]
    return found + ([Path(runtime) / "containers/auth.json"] if runtime else [])


def find(registry: str, repository: str) -> Credentials | None:
    """The credentials for a repository, where there are any. Raises `UserError`."""
    for path in files():
        try:
            config = json.loads(path.read_bytes())
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as bad:
            raise UserError(f"{path} cannot be read: {bad}", hint="docker login writes it anew") \
                from None
        found = _of(config, registry, repository, path)
        if found is not None:
            return found
    return None


def _of(config: Any, registry: str, repository: str, path: Path) -> Credentials | None:
    if not isinstance(config, dict):
        raise UserError(f"{path} is no Docker configuration", hint="docker login writes it anew")
    names = [registry, f"https://{registry}", f"https://{registry}/v1/", f"https://{registry}/v2/"]
    if registry == DOCKER_HUB:
        names.append("https://index.docker.io/v1/")
    parts = repository.split("/")
    names[:0] = [f"{registry}/{'/'.join(parts[:length])}" for length in range(len(parts), 0, -1)]
    for name in names:
        try:
            found = _entry(config, name)
        except (ValueError, TypeError, AttributeError):
            raise UserError(f"{path}: the entry of {name} is damaged",
                            hint=f"docker login {registry}") from None
        if found is not None:
            return found
    return None


def _entry(config: Mapping[str, Any], name: str) -> Credentials | None:
    """What a configuration has under a name. Raises `ValueError` or its like for a damaged one."""
    helper = (config.get("credHelpers") or {}).get(name)
    if helper:
        return _helped(helper, name)
    entry = (config.get("auths") or {}).get(name)
    if entry is None:
        return None
    if entry.get("identitytoken"):
        return Credentials(token=entry["identitytoken"])
    if entry.get("auth"):
        user, _, password = base64.b64decode(entry["auth"]).decode().partition(":")
        return Credentials(user=user, password=password.rstrip("\0"))
    return _helped(config["credsStore"], name) if config.get("credsStore") else None


def _helped(helper: str, server: str) -> Credentials | None:
    """Ask a credential helper of Docker's (docker-credential-helpers, `get`)."""
    program = f"docker-credential-{helper}"
    try:
        said = subprocess.run([program, "get"], input=server.encode(), check=False,
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=60)
        if said.returncode != 0:
            return None
        found = json.loads(said.stdout)
        user, secret = str(found["Username"]), str(found["Secret"])
    except (OSError, ValueError, KeyError, TypeError, subprocess.TimeoutExpired) as bad:
        raise UserError(f"{program}, which Docker's configuration names, gave no credentials: "
                        f"{bad}") from None
    return Credentials(token=secret) if user == "<token>" else Credentials(
        user=user, password=secret)


def challenge(header: str) -> tuple[str, dict[str, str]]:
    """The scheme of a WWW-Authenticate header, in small letters, and its parameters."""
    scheme, _, rest = header.strip().partition(" ")
    return scheme.lower(), dict(_CHALLENGE.findall(rest))
