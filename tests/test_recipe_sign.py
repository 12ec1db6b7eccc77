"""The section `sign` of a recipe: what is wrong with it, and where."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from katagpu import recipe
from katagpu.errors import UserError
from tests.conftest import REPOSITORY

NAME = "debian-trixie"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with the default recipe, and a certificate (nobody reads it here)."""
    root = tmp_path / "repository"
    (root / "recipes").mkdir(parents=True)
    shutil.copy(REPOSITORY / f"recipes/{NAME}.yaml", root / "recipes")
    (root / "cert.pem").write_text("a certificate")
    (tmp_path / "key.pem").write_text("a key")
    return root


def load(root: Path, section: str) -> recipe.Recipe:
    """The recipe with this section."""
    path = root / f"recipes/{NAME}.yaml"
    path.write_text(path.read_text() + f"\nsign: {section}\n")
    return recipe.load(NAME, root)


def test_sign(root: Path, tmp_path: Path) -> None:
    assert recipe.load(NAME, root).sign is None
    found = load(root, f"{{key: {tmp_path}/key.pem, cert: cert.pem}}").sign
    assert found is not None and found.cert == "cert.pem" and found.force is False


def test_a_key_that_is_not_there_is_not_the_recipe_s_matter(root: Path, tmp_path: Path) -> None:
    """It is needed where something has to be signed."""
    assert load(root, f"{{key: {tmp_path}/none.pem, cert: cert.pem, force: true}}").sign


@pytest.mark.parametrize(("section", "said"), [
    ("{cert: cert.pem}", "key"), ("{key: /k.pem}", "cert"),
    ("{key: k.pem, cert: cert.pem}", "k.pem is not an absolute path"),
    ("{key: ROOT/k.pem, cert: cert.pem}", "is in the repository, which is copied and published"),
    ("{key: ROOT/link/k.pem, cert: cert.pem}", "is in the repository"),
    ("{key: /k.pem, cert: none.pem}", "there is no file"),
    ("{key: /k.pem, cert: cert.pem, forced: true}", "force"),
    ("{key: /k.pem, cert: cert.pem, force: 3}", "force")])
def test_what_is_wrong(root: Path, tmp_path: Path, section: str, said: str) -> None:
    (root / "keys").mkdir()
    (root / "link").symlink_to("keys")
    with pytest.raises(UserError, match="sign") as raised:
        load(root, section.replace("ROOT", str(root)))
    assert said in str(raised.value) and f"{NAME}.yaml" in str(raised.value)
