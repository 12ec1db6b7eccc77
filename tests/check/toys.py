"""A toy guest that passes every check: small ELF files by gcc, and indexes written here."""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from katagpu.check import Capability, Driver, Finding, Flavour, GuestFacts, Toolkit, check_guest

RELEASE = "6.12.1-toy"
DRIVER = "550.163.01"
LIB = "usr/lib/x86_64-linux-gnu"
MODULES = f"usr/lib/modules/{RELEASE}"
VERMAGIC = f"{RELEASE} SMP preempt mod_unload modversions "
CONFIG = ("SMP", "PREEMPT_BUILD", "MODULES", "MODULE_UNLOAD", "MODVERSIONS", "EROFS_FS",
          "EROFS_FS_ZIP", "EROFS_FS_ZIP_ZSTD", "EXT4_FS", "BLK_DEV_INITRD", "RD_ZSTD")
KERNEL_EXPORTS = {"module_layout": 0x11111111, "_printk": 0x22222222, "gpl_thing": 0x33333333}
OPEN_ALIAS = "pci:v000010DEd*sv*sd*bc03sc02i00*"


def gcc(*words: str | Path) -> None:
    """Run gcc on no files but ours, without the host's C library."""
    subprocess.run(["gcc", "-nostdlib", *map(str, words)], check=True, capture_output=True)


def library(path: Path, soname: str | None = None, *options: str | Path,
            version: str | None = None) -> None:
    """A shared library; `version` is a symbol version that it defines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    source = path.parent / f".{path.name}.c"
    source.write_text(f"int f_{'x' if version is None else 'v'}(void) {{ return 1; }}\n")
    words: list[str | Path] = ["-shared", "-fPIC", "-o", path, source, "-Wl,--no-as-needed"]
    if soname is not None:
        words.append(f"-Wl,-soname,{soname}")
    if version is not None:
        script = path.parent / f".{path.name}.map"
        script.write_text(f"{version} {{ global: f_v; }};\n")
        words.append(f"-Wl,--version-script={script}")
    gcc(*words, *options)
    for scrap in path.parent.glob(f".{path.name}.*"):
        scrap.unlink()


def program(path: Path, *options: str | Path, call: str | None = None) -> None:
    """A dynamically linked program."""
    path.parent.mkdir(parents=True, exist_ok=True)
    source = path.parent / f".{path.name}.c"
    declaration, body = (f"int {call}(void);", f"{call}();") if call else ("", "")
    source.write_text(f"{declaration} void _start(void) {{ {body} }}\n")
    gcc("-pie", "-fPIE", "-o", path, source, "-Wl,--no-as-needed",
        "-Wl,--dynamic-linker=/lib64/ld-linux-x86-64.so.2", *options)
    source.unlink()


@dataclass(frozen=True, kw_only=True)
class ToyModule:
    """What a module says of itself; `uses` are its undefined symbols, `versions` its CRCs."""

    name: str
    version: str | None = DRIVER
    license: str = "Dual MIT/GPL"
    vermagic: str = VERMAGIC
    depends: str = ""
    aliases: Sequence[str] = ()
    uses: Sequence[str] = ("_printk",)
    versions: Mapping[str, int] | None = field(default_factory=lambda: {
        name: KERNEL_EXPORTS[name] for name in ("module_layout", "_printk")})
    exports: Mapping[str, int] = field(default_factory=dict)
    extended: bool = False
    own_name: str | None = None


NVIDIA = ToyModule(name="nvidia", aliases=(OPEN_ALIAS,), exports={"nv_open": 0x44444444})
UVM = ToyModule(name="nvidia-uvm", depends="nvidia", uses=("_printk", "nv_open"),
                versions={"module_layout": 0x11111111, "_printk": 0x22222222,
                          "nv_open": 0x44444444})


def module(path: Path, toy: ToyModule) -> None:
    """Assemble a kernel module."""
    path.parent.mkdir(parents=True, exist_ok=True)
    info = [("license", toy.license), ("vermagic", toy.vermagic), ("depends", toy.depends),
            ("name", toy.own_name or toy.name.replace("-", "_")),
            *(("alias", alias) for alias in toy.aliases)]
    if toy.version is not None:
        info.append(("version", toy.version))
    lines = ['.section .modinfo,"a"', *(f'.asciz "{key}={value}"' for key, value in info)]
    if toy.versions is not None and toy.extended:
        lines += ['.section __version_ext_crcs,"a"',
                  *(f".long {crc:#x}" for crc in toy.versions.values()),
                  '.section __version_ext_names,"a"',
                  *(f'.asciz "{name}"' for name in toy.versions)]
    elif toy.versions is not None:
        lines.append('.section __versions,"a"')
        for name, crc in toy.versions.items():
            lines += [f".quad {crc:#x}", f'.ascii "{name}"', f".zero {56 - len(name)}"]
    for name, crc in toy.exports.items():
        lines += ['.section __ksymtab,"a"', f"__ksymtab_{name}: .quad 0",
                  '.section __kcrctab,"a"', f"__crc_{name}: .long {crc:#x}"]
    lines += [".text", *(f".quad {name}" for name in toy.uses)]
    source = path.parent / f".{path.name}.s"
    source.write_text("\n".join(lines) + "\n")
    gcc("-c", "-o", path, source)
    source.unlink()


def index(entries: Mapping[str, str]) -> bytes:
    """A binary index as depmod writes it, one node per character."""
    out = bytearray(struct.pack(">III", 0xB007F457, 0x00020001, 0))

    def node(prefix: str) -> int:
        following = sorted({ord(key[len(prefix)]) for key in entries
                            if key.startswith(prefix) and key != prefix})
        children = [(character, node(prefix + chr(character))) for character in following]
        flags, start = 0, len(out)
        if children:
            flags |= 1 << 29
            first, last = children[0][0], children[-1][0]
            table = dict(children)
            out.extend(bytes((first, last)))
            for character in range(first, last + 1):
                out.extend(struct.pack(">I", table.get(character, 0)))
        if prefix in entries:
            flags |= 1 << 30
            out.extend(struct.pack(">II", 1, 0) + entries[prefix].encode() + b"\0")
        return start | flags

    struct.pack_into(">I", out, 8, node(""))
    return bytes(out)


def depmod(root: Path) -> None:
    """Write the toy's indexes: uvm depends on nvidia, everything else on nothing."""
    top = root / MODULES
    paths = sorted(str(path.relative_to(top)) for path in top.rglob("*.ko*"))
    nvidia = next((path for path in paths if path.endswith("/nvidia.ko")), "")
    needs = {path: nvidia if "uvm" in path else "" for path in paths}
    dep = "".join(f"{path}: {need}".rstrip() + "\n" for path, need in needs.items())
    (top / "modules.dep").write_text(dep)
    (top / "modules.dep.bin").write_bytes(index({
        Path(path).name.partition(".ko")[0].replace("-", "_"): line
        for path, line in zip(paths, dep.splitlines(), strict=True)}))
    (top / "modules.alias").write_text(f"# made by a test\nalias {OPEN_ALIAS} nvidia\n")
    (top / "modules.alias.bin").write_bytes(index({OPEN_ALIAS: "nvidia"}))
    (top / "modules.builtin").write_text("kernel/fs/erofs/erofs.ko\n")


def ldconfig(root: Path, entries: Mapping[str, str]) -> None:
    """Write ld.so.cache in glibc's current format."""
    names = sorted(entries)
    strings, offset, table = b"", 48 + 24 * len(names), b""
    for name in names:
        key = offset + len(strings)
        strings += name.encode() + b"\0"
        value = offset + len(strings)
        strings += entries[name].encode() + b"\0"
        table += struct.pack("<iIIIQ", 0x0303, key, value, 0, 0)
    head = struct.pack("<20sII20s", b"glibc-ld.so.cache1.1", len(names), len(strings), b"\x02")
    (root / "etc/ld.so.cache").write_bytes(head + table + strings)


@dataclass(frozen=True, kw_only=True)
class Toy:
    """A copy of the toy guest, with the facts that fit it."""

    root: Path
    facts: GuestFacts

    def find(self, **facts: object) -> list[Finding]:
        """The findings, with some facts changed."""
        return check_guest(self.root, replace(self.facts, **facts))  # type: ignore[arg-type]

    def ids(self, **facts: object) -> set[str]:
        """The ids of the checks that found something."""
        return {finding.check for finding in self.find(**facts)}

    def module(self, toy: ToyModule) -> None:
        """Put a module of NVIDIA's driver in its place."""
        module(self.root / MODULES / f"updates/{toy.name}.ko", toy)

    def configure(self, text: str) -> None:
        """Add lines to the kernel's configuration."""
        with self.facts.kernel_config.open("a") as stream:
            stream.write(text + "\n")


def cache_entries(root: Path) -> dict[str, str]:
    """What ldconfig would find in the toy's library directory."""
    return {path.name: f"/lib/x86_64-linux-gnu/{path.name}"
            for path in sorted((root / LIB).glob("lib*.so.*")) if path.exists()}


def make(top: Path) -> Toy:
    """Build the toy guest and the kernel's files beside it."""
    root = top / "root"
    for directory in ("proc", "sys", "dev", "run", "tmp", "etc/systemd/system/basic.target.wants",
                      "usr/sbin", "usr/bin", "usr/lib64", "usr/lib/systemd/system", "var", LIB):
        (root / directory).mkdir(parents=True)
    for name in ("bin", "sbin", "lib", "lib64"):
        (root / name).symlink_to(f"usr/{name}")
    (root / "var/run").symlink_to("/run")
    (root / "etc/resolv.conf").touch()
    (root / "etc/ld.so.conf").write_text("include /etc/ld.so.conf.d/*.conf\n")
    (root / "etc/ld.so.conf.d").mkdir()
    (root / "etc/ld.so.conf.d/a.conf").write_text("# multiarch\n/lib/x86_64-linux-gnu\n")
    _userland(root)
    _driver(root)
    _units(root)
    module(root / MODULES / "updates/nvidia.ko", NVIDIA)
    module(root / MODULES / "updates/nvidia-uvm.ko", UVM)
    depmod(root)
    ldconfig(root, cache_entries(root))
    return Toy(root=root, facts=_facts(top))


def _userland(root: Path) -> None:
    library(root / LIB / "libc.so.6", "libc.so.6", version="GLIBC_2.34")
    library(root / "usr/lib64/ld-linux-x86-64.so.2", "ld-linux-x86-64.so.2")
    program(root / "usr/lib/systemd/systemd", root / LIB / "libc.so.6", call="f_v")
    (root / "usr/sbin/init").symlink_to("../lib/systemd/systemd")
    for path in ("usr/bin/kmod", "usr/sbin/xtables", "usr/sbin/mkfs.ext4", "usr/bin/kata-agent",
                 "usr/bin/nvidia-ctk", "usr/bin/nvidia-cdi-hook", "usr/bin/nvidia-persistenced",
                 "usr/bin/nvidia-smi"):
        shutil.copy(root / "usr/lib/systemd/systemd", root / path)
    (root / "usr/sbin/modprobe").symlink_to("/bin/kmod")
    for name in ("iptables", "ip6tables"):
        for kind in ("save", "restore"):
            (root / f"usr/sbin/{name}-{kind}").symlink_to("xtables")


def _driver(root: Path) -> None:
    for soname in ("libcuda.so.1", "libnvidia-nvvm.so.4", "libnvidia-ptxjitcompiler.so.1",
                   "libnvidia-ml.so.1", "libnvidia-cfg.so.1"):
        file = f"{soname.partition('.so')[0]}.so.{DRIVER}"
        library(root / LIB / file, soname)
        (root / LIB / soname).symlink_to(file)
    name = f"libnvidia-pkcs11-openssl3.so.{DRIVER}"
    library(root / LIB / name, name)
    firmware = root / "usr/lib/firmware/nvidia" / DRIVER
    firmware.mkdir(parents=True)
    for name in ("gsp_ga10x.bin", "gsp_tu10x.bin"):
        (firmware / name).write_bytes(b"\x7fELF is for another processor")


def _units(root: Path) -> None:
    units = root / "usr/lib/systemd/system"
    (units / "kata-agent.service").write_text("[Service]\nExecStart=/usr/bin/kata-agent\n")
    (units / "kata-containers.target").write_text("[Unit]\nRequires=kata-agent.service\n")
    (units / "tmp.mount").write_text("[Mount]\nWhat=tmpfs\n")
    (units / "nvidia-cdi.service").write_text(
        "[Service]\nExecStart=/usr/bin/nvidia-ctk cdi generate --output=/run/cdi/x\n")
    (root / "etc/kata-opa").mkdir()
    (root / "etc/kata-opa/default-policy.rego").write_text("package agent_policy\n")
    (root / "etc/systemd/system/basic.target.wants/kata-containers.target").symlink_to(
        "/usr/lib/systemd/system/kata-containers.target")


def _facts(top: Path) -> GuestFacts:
    (top / "Module.symvers").write_text("".join(
        f"{crc:#010x}\t{name}\tvmlinux\tEXPORT_SYMBOL{'_GPL' if 'gpl' in name else ''}\t\n"
        for name, crc in KERNEL_EXPORTS.items()))
    (top / "config").write_text("".join(f"CONFIG_{symbol}=y\n" for symbol in CONFIG)
                                + "# CONFIG_DRM_NOUVEAU is not set\n")
    return GuestFacts(
        kernel_release=RELEASE, symvers=top / "Module.symvers", kernel_config=top / "config",
        driver=Driver(version=DRIVER, flavour=Flavour.OPEN,
                      capabilities=frozenset({Capability.COMPUTE, Capability.UTILITY})),
        toolkit=Toolkit.CDI, agent=True, compressor="zstd")


EXTENSION = "run/kata-extensions/gpu"


def split(toy: Toy) -> Toy:
    """The same guest with the driver on a disk of its own, mounted in its place.

    Its kernel has no MODVERSIONS' help from elsewhere: both module directories are checked.
    """
    root, disk = toy.root, toy.root / EXTENSION
    modules = disk / "lib/modules" / RELEASE
    for directory in (disk / LIB, disk / "bin", disk / "etc", modules):
        directory.mkdir(parents=True)
    for path in [*(root / LIB).glob("libcuda*"), *(root / LIB).glob("libnvidia*")]:
        path.rename(disk / LIB / path.name)
    for path in (root / "usr/bin").glob("nvidia-*"):
        path.rename(disk / "bin" / path.name)
    (disk / "lib/firmware").mkdir(parents=True)
    (root / "usr/lib/firmware/nvidia").rename(disk / "lib/firmware/nvidia")
    (root / "usr/lib/firmware/nvidia").mkdir()
    for path in [*(root / MODULES).iterdir()]:
        path.rename(modules / path.name)
    ldconfig(root, cache_entries(root))
    ldconfig(disk, {name: f"/{LIB}/{name}" for name in cache_entries(disk)})
    _mounting(root)
    toy.configure("CONFIG_BLK_DEV_DM=y\nCONFIG_DM_VERITY=y")
    return Toy(root=root, facts=replace(
        toy.facts, extension=f"/{EXTENSION}", toolkit_programs=(
            f"/{EXTENSION}/bin/nvidia-ctk", f"/{EXTENSION}/bin/nvidia-cdi-hook")))


def _mounting(root: Path) -> None:
    """Kata's unit and programs, and units that start what is on the disk."""
    units = root / "usr/lib/systemd/system"
    (units / "kata-extension-mount@.service").write_text(
        "[Service]\nExecStart=/usr/libexec/kata-extension-mount.sh %i\n")
    (units / "nvidia-cdi.service").write_text(
        f"[Service]\nExecStart=/{EXTENSION}/bin/nvidia-ctk cdi generate --output=/run/cdi/x\n")
    for path in ("usr/libexec/kata-extension-mount.sh", "usr/libexec/kata-extension-umount.sh",
                 "usr/lib/systemd/system-generators/kata-extension-mount-generator"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text("#!/bin/sh\n")
        (root / path).chmod(0o755)
    shutil.copy(root / "usr/lib/systemd/systemd", root / "usr/sbin/veritysetup")
