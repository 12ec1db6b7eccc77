"""A release as an artifact in a registry: the media types, and what refers to what."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from katagpu.release import layout
from katagpu.release.registry import EMPTY, MANIFEST

RELEASE = f"{layout.TYPE}.release.v1"
SIGNATURE = f"{layout.TYPE}.signature.v1"
NOTHING = b"{}"  # the configuration of an artifact that has none
TITLE = "org.opencontainers.image.title"


def render(artifact_type: str, layers: Sequence[Mapping[str, Any]],
           annotations: Mapping[str, str], subject: Mapping[str, Any] | None = None) -> bytes:
    """An artifact's manifest (OCI image specification 1.1, guidelines for artifact usage)."""
    content: dict[str, Any] = {
        "schemaVersion": 2, "mediaType": MANIFEST, "artifactType": artifact_type,
        "config": {"mediaType": EMPTY, "size": len(NOTHING),
                   "digest": f"sha256:{hashlib.sha256(NOTHING).hexdigest()}"},
        "layers": list(layers)}
    if subject is not None:
        content["subject"] = dict(subject)
    if annotations:
        content["annotations"] = dict(annotations)
    return json.dumps(content, indent=1).encode()


def layer(name: str, source: str, sha256: str, size: int) -> dict[str, Any]:
    """The descriptor of a file; `source` is the name by which its media type is known."""
    return {"mediaType": layout.media_type(source), "digest": f"sha256:{sha256}", "size": size,
            "annotations": {TITLE: name}}


ATTACHED = ("application/vnd.dsse.envelope.v1+json", "application/vnd.in-toto+json",
            "application/spdx+json", "application/vnd.cyclonedx+json")
"""What refers to a release under its own type, and is no part of it."""


def attached(name: str) -> str | None:
    """The type of the artifact as which a file refers to the release; None: it is part of it."""
    if name in (layout.SUMS, layout.SIGNATURE):
        return SIGNATURE
    kind = layout.media_type(name)
    return kind if kind in ATTACHED else None
