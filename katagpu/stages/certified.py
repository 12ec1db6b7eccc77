"""The kernel of a recipe that says `sign`: with the certificate in it, and with its `sign-file`.

It is made without the private key, and none is made for it.
"""

from __future__ import annotations

from katagpu import modsig
from katagpu.stages import kernel
from katagpu.stages.api import Build

MODULE = "stages.certified"
CERTIFICATE = "certificate"
FILE = "certificate.pem"  # below kbuild.AREA, as CONFIG_SYSTEM_TRUSTED_KEYS names it


def make_kernel(build: Build) -> None:
    """The kernel as ever, with the certificate where its configuration has it."""
    area = build.directory("area")
    (area / FILE).write_bytes(modsig.certificate(build.file(CERTIFICATE)).pem())
    kernel.make_kernel(build)
    build.put_file("sign_file", area / "build/scripts/sign-file")
