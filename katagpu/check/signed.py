"""Checks of modules' signatures, and of the certificates that the kernel trusts."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection

from katagpu import modsig
from katagpu.check.context import Guest
from katagpu.check.facts import Fault, GuestFacts
from katagpu.check.kmod import opened

# certs/system_certificates.S: the certificates one after the other, and how many bytes they are.
LIST, SIZE = "system_certificate_list", "system_certificate_list_size"
RESIGN = "./doitw build_image signs what the store does not have; nothing may change a module after"


@dataclass(frozen=True, kw_only=True)
class SignedFacts(GuestFacts):
    """Those of a guest with signed modules: the certificate (PEM), and the kernel."""

    certificate: Path
    vmlinux: Path


def signatures(guest: Guest) -> Iterator[Fault]:
    """Every module is signed by the recipe's certificate; signed at all where the kernel insists.

    Without a certificate in the recipe nothing says by whom.
    """
    if isinstance(guest.facts, SignedFacts):
        signer = modsig.certificate(guest.facts.certificate)
        for module in guest.modules:
            with opened(guest.root.host(module.path)) as stream:
                data = stream.read()
            try:
                modsig.verify(data, signer)
            except modsig.Unsigned as why:
                yield Fault(what=str(why), where=module.path, cure=RESIGN)
    elif guest.config.get("MODULE_SIG_FORCE") == "y":
        for module in guest.modules:
            if not module.signed:
                yield Fault(what="is not signed, and this kernel (MODULE_SIG_FORCE) refuses it",
                            where=module.path,
                            cure="`sign` in the recipe, which brings MODULE_SIG_FORCE by itself")


def certificates(guest: Guest) -> Iterator[Fault]:
    """The kernel trusts the recipe's certificate, and no other."""
    if not isinstance(guest.facts, SignedFacts):
        return
    signer = modsig.certificate(guest.facts.certificate)
    found = trusted(guest.facts.vmlinux)
    if found != signer.der:
        lacks = signer.der not in (found or b"")
        yield Fault(what=f"the kernel does not have the certificate {signer.subject}" if lacks
                    else "the kernel trusts another certificate beside that of the recipe",
                    where="vmlinux", cure="take kernel and modules from one build; no fragment may "
                    "set SYSTEM_TRUSTED_KEYS or MODULE_SIG_KEY")
    if guest.config.get("MODULE_SIG") != "y":
        yield Fault(what="this kernel does not verify modules (MODULE_SIG)", where="its .config",
                    cure="no fragment of the recipe may take MODULE_SIG away")


def trusted(vmlinux: Path) -> bytes | None:
    """The certificates in a kernel, DER after DER; None where it has no such list."""
    with vmlinux.open("rb") as stream:
        elf = ELFFile(stream)
        table = elf.get_section_by_name(".symtab")
        if not isinstance(table, SymbolTableSection):
            return None
        places = {}
        for name in (LIST, SIZE):
            symbols = table.get_symbol_by_name(name)
            if not symbols:
                return None
            places[name] = _offset(elf, symbols[0]["st_value"])
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            (size,) = struct.unpack_from("<Q", data, places[SIZE])
            start = places[LIST]
            return bytes(data[start:start + size])


def _offset(elf: ELFFile, address: int) -> int:
    """Where an address of the kernel is in its file."""
    for section in elf.iter_sections():
        start = section["sh_addr"]
        if section["sh_type"] == "SHT_PROGBITS" and start <= address < start + section["sh_size"]:
            return int(section["sh_offset"] + address - start)
    return 0
