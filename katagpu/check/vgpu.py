"""Checks of the licence client of a vGPU guest, and that no guest is stored with a token."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase

from katagpu.check.context import Guest
from katagpu.check.facts import Fault
from katagpu.vgpu import TOKEN_DIRECTORY

GRIDD = "/usr/bin/nvidia-gridd"
CONFIG = "/etc/nvidia/gridd.conf"
UNIT = "nvidia-gridd.service"
UNITS = ("/etc/systemd/system", "/usr/lib/systemd/system")
# What starts it: the boot, and the mount that the agent makes in every new sandbox.
WANTED = {UNIT: "kata-containers.target.wants",
          "nvidia-licence.service": "run-kata\\x2dcontainers-sandbox-shm.mount.wants"}
TOKENS = "client_configuration_token*.tok"  # as the licence servers name them
FEATURES = {"0", "1", "2", "4"}
TEXT = {"ServerAddress", "BackupServerAddress"}
NUMBERS = {"ServerPort": range(1, 65536), "BackupServerPort": range(1, 65536),
           "LicenseInterval": range(10, 10081), "LingerInterval": range(10081)}
SWITCHES = {"EnableUI"}


def config(guest: Guest) -> Iterator[Fault]:
    """gridd.conf is there, and every line is a key of nvidia-gridd with a value that it takes.

    The keys and ranges are those of gridd.conf.template in GRID driver packages.
    """
    if not guest.facts.vgpu:
        return
    cure = "mend rootfs/etc/nvidia/gridd.conf.j2, or `vgpu:` in the recipe"
    if not guest.root.is_file(CONFIG):
        yield Fault(what="the licence client has no configuration", where=CONFIG, cure=cure)
        return
    found: dict[str, str] = {}
    for number, line in enumerate(guest.root.text(CONFIG).splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        key, sign, value = (part.strip() for part in line.partition("="))
        if not sign or not _valid(key, value):
            yield Fault(what=f"line {number}, {line.strip()!r}, is no setting of nvidia-gridd",
                        where=CONFIG, cure=cure)
        elif key in found:
            yield Fault(what=f"line {number} sets {key} again", where=CONFIG, cure=cure)
        found[key] = value
    if "FeatureType" not in found:
        yield Fault(what="FeatureType is not set", where=CONFIG, cure=cure)


def _valid(key: str, value: str) -> bool:
    if key in NUMBERS:
        return value.isdecimal() and int(value) in NUMBERS[key]
    return bool((key == "FeatureType" and value in FEATURES)
                or (key in SWITCHES and value in {"TRUE", "FALSE"})
                or (key in TEXT and value and not value.split()[1:]))


def daemon(guest: Guest) -> Iterator[Fault]:
    """nvidia-gridd is there, and started at boot and for each sandbox; its token has a place."""
    if not guest.facts.vgpu:
        return
    package = "take a GRID guest driver (…-grid.run)"
    if not guest.root.is_program(GRIDD):
        yield Fault(what="the licence client is not there", where=GRIDD, cure=package)
    elif not (guest.root.read(GRIDD) or b"").startswith(b"\x7fELF"):
        # Whether it is whole, and what it NEEDs is there, elf-damaged and elf-needed say.
        yield Fault(what="it is not the licence client, but some other file", where=GRIDD,
                    cure=package)
    for unit, wants in WANTED.items():
        real = guest.root.resolve(f"{UNITS[0]}/{wants}/{unit}")
        if real is None or not real.endswith(f"/{unit}"):
            yield Fault(what="nothing starts this unit", where=f"{UNITS[0]}/{wants}/{unit}",
                        cure=f"lay {unit} and this link to it (rootfs/layout.yaml)")
    if not guest.root.is_dir(TOKEN_DIRECTORY):
        yield Fault(what="the token's mount point is not there", where=TOKEN_DIRECTORY,
                    cure="make this directory: the root is read-only when it boots")


def no_token(guest: Guest) -> Iterator[Fault]:
    """No client configuration token is in the stored root: everybody with the image could use it.

    `embed_token` adds it later, to the copy of the image in out/.
    """
    root = guest.root
    directory = root.resolve(TOKEN_DIRECTORY) or TOKEN_DIRECTORY
    for path in (*root.files, *root.links):
        if path.startswith(f"{directory}/") or fnmatchcase(path.rpartition("/")[2], TOKENS):
            yield Fault(what="a licence token would be in the image and in the store", where=path,
                        cure="remove it from what is laid or installed; `vgpu: {embed_token: "
                             "true, token_file: …}` puts a token into the image in out/ alone")
