"""Where a release comes from: an in-toto statement with SLSA's provenance, in a DSSE envelope.

Nothing of the time or the machine is in it: the same commit and lock give the same statement.
Specifications: in-toto attestation v1, slsa.dev/spec/v1.0/provenance, DSSE v1.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any

from katagpu.lock import Lock
from katagpu.release.signing import Signer

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
PAYLOAD = "application/vnd.in-toto+json"
BUILD_TYPE = "urn:katagpu:release:v1"
BUILDER = "urn:katagpu:doitw"


def dependencies(commit: str, lock: Lock) -> list[dict[str, Any]]:
    """What the build was made from: the commit, and every package of the lock."""
    found: dict[str, dict[str, Any]] = {}
    for group in lock.groups.values():
        for deb in group:
            found.setdefault(deb.sha256, {
                "name": f"{deb.package} {deb.version}", "uri": deb.url,
                "digest": {"sha256": deb.sha256}})
    debs = sorted(found.values(), key=lambda one: (str(one["name"]), str(one["uri"])))
    return [{"name": "repository", "digest": {"gitCommit": commit}}, *debs]


def statement(digests: Mapping[str, str], parameters: Mapping[str, Any],
              resolved: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> bytes:
    """The statement about files by name; `facts` of the guest go into it as they are."""
    content = {
        "_type": STATEMENT,
        "subject": [{"name": name, "digest": {"sha256": digests[name]}}
                    for name in sorted(digests)],
        "predicateType": PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE, "externalParameters": dict(parameters),
                "internalParameters": dict(facts), "resolvedDependencies": list(resolved)},
            "runDetails": {"builder": {"id": BUILDER}, "metadata": {}}}}
    return (json.dumps(content, indent=1) + "\n").encode()


def encoded(payload: bytes) -> bytes:
    """What is signed: DSSE's pre-authentication encoding."""
    return b"DSSEv1 %d %s %d %s" % (len(PAYLOAD), PAYLOAD.encode(), len(payload), payload)


def envelope(payload: bytes, signer: Signer, before: bytes | None) -> bytes:
    """The signed statement, in one line; that from before where it is of the same statement."""
    if before is not None:
        try:
            known = json.loads(before)
            signature = base64.b64decode(known["signatures"][0]["sig"])
            if base64.b64decode(known["payload"]) == payload \
                    and known["signatures"][0]["keyid"] == signer.keyid \
                    and signer.accepts(encoded(payload), signature):
                return before
        except (ValueError, KeyError, TypeError, IndexError):
            pass  # it is made anew
    signature = signer.sign(encoded(payload))
    content = {"payloadType": PAYLOAD, "payload": base64.b64encode(payload).decode(),
               "signatures": [{"keyid": signer.keyid,
                               "sig": base64.b64encode(signature).decode()}]}
    return (json.dumps(content) + "\n").encode()
