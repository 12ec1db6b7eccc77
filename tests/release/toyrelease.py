"""Releases of toy guests: a build as it lies below out/, and the release that is made of it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from katagpu import kataconfig
from katagpu.release import assemble, signing
from katagpu.release.assemble import Order, Piece
from katagpu.stages import final
from katagpu.statement import Built, Material
from tests import toybuild

RECIPE = "toy"
LINKS = {"vmlinuz": final.KERNEL, "image": final.IMAGE}


def build(place: Path, word: str = "one", *, size: int = 60_000, **facts: Any) -> list[Piece]:
    """A build whose kernel and image are of a word; what is released of it."""
    toybuild.write(place, **facts)
    manifest = json.loads((place / "manifest.json").read_bytes())
    kernel, image = f"{final.PLACE}/{final.KERNEL}", f"{final.PLACE}/{final.IMAGE}"
    contents = {
        "vmlinuz": (f"vmlinuz-{toybuild.RELEASE}", f"kernel {word}\n".encode() * 100),
        "vmlinux": (f"vmlinux-{toybuild.RELEASE}", f"symbols {word}\n".encode() * 100),
        "image": ("kata-toy-nvidia-gpu.image", (f"image {word}\n".encode() * size)[:size])}
    for part, name, shim in (("kata_config", "50-katagpu.toml", kataconfig.Shim.GO),
                             ("kata_config_rs", "50-katagpu-runtime-rs.toml",
                              kataconfig.Shim.RUST)):
        text = kataconfig.render_drop_in(kataconfig.KataSettings(
            shim=shim, kernel=kernel, image=image, extra_kernel_params=(f"toy={word}",)))
        contents[part] = (name, text.encode())
    for part, (name, data) in contents.items():
        (place / name).write_bytes(data)
        manifest["parts"][part] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    (place / "manifest.json").write_text(json.dumps(manifest))
    (place / "boot-check.json").write_text("{}")
    named = {**{part: name for part, (name, _data) in contents.items()},
             "kernel_config": f"config-{toybuild.RELEASE}", "sizes": "sizes.json",
             "files": "files.mtree"}
    return [*(Piece(path=place / name, part=part, link=LINKS.get(part))
              for part, name in named.items()),
            Piece(path=place / "manifest.json"), Piece(path=place / "boot-check.json")]


def order(place: Path, version: str = "1.0.0", signer: signing.Signer | None = None,
          word: str = "one", *, licensed: bool = False, size: int = 60_000,
          **facts: Any) -> Order:
    """What is released of such a build, made in a directory."""
    return Order(recipe=RECIPE, version=version, signer=signer, licensed=licensed,
                 pieces=build(place, word, size=size, **facts),
                 built=Built(recipe={"name": RECIPE}, materials=[Material(
                     uri="git+https://git.example/toy", name="repository",
                     digest={"gitCommit": "c" * 40})]))


def make(top: Path, version: str = "1.0.0", signer: signing.Signer | None = None,
         word: str = "one", *, licensed: bool = False, size: int = 60_000, **facts: Any) -> Path:
    """The directory of such a release below a directory."""
    return assemble.make(order(top / f"build-{word}-{version}", version, signer, word,
                               licensed=licensed, size=size, **facts), top / "release")
