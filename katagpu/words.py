"""What a word of a recipe may be: names, versions, digests, addresses, sizes."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from msgspec import Meta

PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]+")
"""A package's name (Debian Policy 5.6.1)."""

DRIVER_VERSION = re.compile(r"\d{3}\.\d{1,3}(\.\d{1,2})?")
"""NVIDIA's driver versions: branch, release, and often a third part."""

# msgspec searches for a pattern, it does not anchor it.
PackageName = Annotated[str, Meta(
    pattern=rf"^{PACKAGE.pattern}\Z",
    description="a package's name: lower case letters, digits, plus, minus and full stop")]
DriverVersion = Annotated[str, Meta(pattern=rf"^{DRIVER_VERSION.pattern}\Z")]
KernelVersion = Annotated[str, Meta(
    pattern=r"^[0-9]+\.[0-9]+(\.[0-9]+)?([-+~.][0-9A-Za-z.+~-]*)?\Z")]
ToolkitVersion = Annotated[str, Meta(
    pattern=r"^(v[0-9]+\.[0-9]+\.[0-9]+(-[0-9a-z.]+)?|[0-9][0-9A-Za-z.+:~-]*)\Z")]
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Fingerprint = Annotated[str, Meta(pattern=r"^([0-9A-Fa-f]{40}|[0-9A-Fa-f]{64})\Z")]
Component = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*\Z")]
Suite = Annotated[str, Meta(pattern=r"^[a-z][a-z0-9.-]*\Z")]
Url = Annotated[str, Meta(pattern=r"^https?://\S+\Z")]
Mirror = Annotated[str, Meta(pattern=r"^(host|https?://\S+)\Z")]
ServerAddress = Annotated[str, Meta(
    pattern=r"^[0-9A-Za-z][0-9A-Za-z.:-]*\Z", description="a host name or an IP address")]
Port = Annotated[int, Meta(ge=1, le=65535)]
DeviceId = Annotated[str, Meta(pattern=r"^[0-9a-f]{4}\Z", description="four hexadecimal digits")]
Register = Annotated[str, Meta(
    pattern=r"^[0-9a-f]{8}\Z", description="eight hexadecimal digits")]
GuestMemory = Annotated[int, Meta(ge=1024, le=1048576)]
BarSize = Literal[1, 2, 4, 8, 16, 32, 64, 128, 256]
Minutes = Annotated[int, Meta(ge=10, le=10080)]
