"""References to artifacts in registries: `oci://registry/repository:tag`."""

from __future__ import annotations

import re
import urllib.parse
from dataclasses import dataclass

from katagpu.errors import UserError

_REFERENCE = re.compile(
    r"oci://(?P<registry>[A-Za-z0-9.-]+(:\d+)?|\[[0-9A-Fa-f:]+\](:\d+)?)"
    r"/(?P<repository>[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*)"
    r"(:(?P<tag>[A-Za-z0-9_][A-Za-z0-9._-]{0,127}))?(@(?P<digest>sha256:[0-9a-f]{64}))?")


@dataclass(frozen=True)
class Reference:
    """`oci://registry/repository:tag`, or `@sha256:…` instead of the tag or behind it."""

    registry: str
    repository: str
    tag: str | None = None
    digest: str | None = None

    @property
    def name(self) -> str:
        """What is asked for: the digest where there is one."""
        return self.digest or self.tag or "latest"


def reference(text: str) -> Reference:
    """Read a reference. Raises `UserError`."""
    found = _REFERENCE.fullmatch(text)
    if found is None:
        raise _no_reference(text)
    try:
        urllib.parse.urlsplit(f"//{found['registry']}").port  # noqa: B018 - raises
    except ValueError:
        raise _no_reference(text) from None
    return Reference(registry=found["registry"], repository=found["repository"],
                     tag=found["tag"], digest=found["digest"])


def _no_reference(text: str) -> UserError:
    return UserError(f"{text!r} is no reference to an artifact in a registry",
                     hint="oci://registry.example/group/name:tag, in small letters")
