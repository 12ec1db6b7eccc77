"""Signatures of modules and certificates of kernels: each fault in an otherwise sound guest."""

from __future__ import annotations

import dataclasses
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from katagpu.check.signed import SignedFacts, trusted
from tests.signers import Signer, needs_openssl, sign, signer

from .toys import MODULES, NVIDIA, Toy

pytestmark = needs_openssl


@pytest.fixture(scope="module")
def signers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Signer, Signer]:
    """Who signs, and somebody else."""
    top = tmp_path_factory.mktemp("signers")
    return signer(top), signer(top, "stranger")


def kernel(path: Path, *ders: bytes) -> Path:
    """An ELF file with these certificates where a kernel has its own."""
    path.with_suffix(".der").write_bytes(b"".join(ders))
    path.with_suffix(".s").write_text(
        ".section .init.rodata,\"a\"\n.quad 0\n.globl system_certificate_list\n"
        f"system_certificate_list: .incbin \"{path.with_suffix('.der')}\"\nend: .balign 8\n"
        ".globl system_certificate_list_size\n"
        "system_certificate_list_size: .quad end - system_certificate_list\n"
        ".globl _start\n.text\n_start: ret\n")
    subprocess.run(["gcc", "-nostdlib", "-static", "-no-pie", "-Wl,-Ttext=0x1000000", "-o", path,
                    path.with_suffix(".s")], check=True)
    return path


@pytest.fixture
def signed(toy: Toy, signers: tuple[Signer, Signer]) -> Toy:
    """The sound guest with signed modules, and a kernel that insists on them."""
    mine = signers[0]
    for path in modules(toy):
        sign(path, mine)
    toy.configure("CONFIG_MODULE_SIG=y\nCONFIG_MODULE_SIG_FORCE=y")
    known = {field.name: getattr(toy.facts, field.name)
             for field in dataclasses.fields(toy.facts)}
    return replace(toy, facts=SignedFacts(
        **known, certificate=mine.cert,
        vmlinux=kernel(toy.root.parent / "vmlinux", mine.certificate.der)))


def modules(toy: Toy) -> list[Path]:
    """The toy's modules."""
    return sorted((toy.root / MODULES / "updates").glob("*.ko"))


def about(toy: Toy, check: str) -> list[str]:
    """The findings of a check."""
    return [f"{finding.where}: {finding.what}" for finding in toy.find() if finding.check == check]


def test_a_sound_guest(signed: Toy) -> None:
    assert signed.find() == []


def test_each_module_that_is_not_signed_by_the_certificate_is_named(
    signed: Toy, signers: tuple[Signer, Signer],
) -> None:
    second, first = modules(signed)
    signed.module(NVIDIA)  # anew, as one that was swapped afterwards
    assert about(signed, "module-signature") == [f"/usr/lib/modules/6.12.1-toy/updates/{first.name}"
                                                 ": is not signed"]
    sign(first, signers[1])
    assert "is signed by another than O=Toys,CN=signer" in about(signed, "module-signature")[0]
    signed.module(NVIDIA)
    sign(first, signers[0])
    assert about(signed, "module-signature") == []
    data = bytearray(second.read_bytes())
    data[-600 - len(data) // 2] ^= 1
    second.write_bytes(data)
    (only,) = about(signed, "module-signature")
    assert second.name in only and "was changed after it was signed" in only


def test_stripped_after_it_was_signed(signed: Toy) -> None:
    """The commonest mistake: strip takes the signature away."""
    path = modules(signed)[0]
    subprocess.run(["strip", "--strip-debug", path], check=True)
    assert "is not signed" in about(signed, "module-signature")[0]


def test_compressed_modules_are_read(signed: Toy) -> None:
    import lzma

    path = modules(signed)[0]
    path.with_suffix(".ko.xz").write_bytes(lzma.compress(path.read_bytes()))
    path.unlink()
    assert about(signed, "module-signature") == []


@pytest.mark.parametrize(("which", "said"), [
    ((), "does not have the certificate O=Toys,CN=signer"),
    ((1,), "does not have the certificate"),
    ((0, 1), "trusts another certificate beside"), ((1, 0), "trusts another certificate beside")])
def test_what_the_kernel_trusts(
    signed: Toy, signers: tuple[Signer, Signer], which: tuple[int, ...], said: str,
) -> None:
    assert isinstance(signed.facts, SignedFacts)
    kernel(signed.facts.vmlinux, *(signers[number].certificate.der for number in which))
    assert signed.ids() == {"module-certificate"}
    assert said in about(signed, "module-certificate")[0]


def test_a_kernel_without_certificates(signed: Toy) -> None:
    assert isinstance(signed.facts, SignedFacts)
    subprocess.run(["strip", signed.facts.vmlinux], check=True)
    assert trusted(signed.facts.vmlinux) is None
    assert "does not have the certificate" in about(signed, "module-certificate")[0]


def test_a_kernel_that_verifies_nothing(signed: Toy) -> None:
    signed.facts.kernel_config.write_text(
        signed.facts.kernel_config.read_text().replace("CONFIG_MODULE_SIG=y\n", ""))
    assert "does not verify modules" in about(signed, "module-certificate")[0]
