"""The statement on a release (`katagpu.statement`) in an envelope of DSSE v1, signed."""

from __future__ import annotations

import base64
import json

from katagpu.release.signing import Signer

PAYLOAD = "application/vnd.in-toto+json"


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
