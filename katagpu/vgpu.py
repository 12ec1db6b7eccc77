"""vGPU guests: what the licence client's files are made from, and which driver packages have it.

nvidia-gridd, its configuration keys and the token's place are described in NVIDIA's Virtual GPU
Client Licensing User Guide; docs/vgpu.md says what of it is used here.
"""

from __future__ import annotations

from typing import Any

from katagpu.errors import UserError
from katagpu.schema import Recipe

DAEMON = "nvidia-gridd"
TOKEN_DIRECTORY = "/etc/nvidia/ClientConfigToken"
"""Where nvidia-gridd looks for a token: any file there whose name ends in `.tok`."""


def settings(recipe: Recipe) -> dict[str, Any] | None:
    """What the guest's files are rendered from; None for a guest without a licence client.

    Nothing of the token is in it: it goes into keys, and a token must not.
    """
    vgpu = recipe.vgpu
    if vgpu is None:
        return None
    legacy = vgpu.server_address is not None
    backup = vgpu.backup_server_address is not None
    return {"feature_type": int(vgpu.feature_type), "server_address": vgpu.server_address,
            "server_port": vgpu.server_port if legacy else None,
            "backup_server_address": vgpu.backup_server_address,
            "backup_server_port": vgpu.backup_server_port if backup else None,
            "license_interval": vgpu.license_interval}


def require_grid(*, is_grid: bool, package: str) -> None:
    """Raise `UserError` when a vGPU guest's driver package is no GRID guest package.

    `is_grid`: its manifest lists nvidia-gridd. `package` is the package's name in the message.
    """
    if not is_grid:
        raise UserError(f"{package} is no GRID guest driver: it has no nvidia-gridd, which the "
                        f"recipe's `vgpu:` is about", hint=(
                            "take NVIDIA-Linux-x86_64-VERSION-grid.run, from Guest_Drivers/ of "
                            "the vGPU software archive in NVIDIA's licensing portal; or remove "
                            "`vgpu:`"))
