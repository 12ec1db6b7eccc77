"""A toy driver package and a root in which tests run the installer that lies beside this file.

The root has the build host's /usr under a layer of its own, with kernel headers of a kernel that
does not exist and module tools that report what a test lets them report. The sandbox is the
product's; make and the compiler are the build host's, and run on the package's toy sources.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from katagpu import sandbox
from katagpu.nvoutcome import Outcome
from katagpu.sandbox import Bind, Entry, Root
from katagpu.schema import KernelModule

HERE = Path(__file__).parent
STAND_IN = HERE / "nvidia-installer"
RELEASE = "6.1.0-toy"
VERSION = "550.163.01"
PACKAGE = "/package"
LOG = "/var/log/nvidia-installer.log"
MODULES = ("nvidia", "nvidia-uvm", "nvidia-modeset", "nvidia-drm", "nvidia-peermem")
PROGRAMS = ("modprobe", "rmmod", "lsmod", "depmod")
TYPES = """\
libcuda.so.{version} 0755 CUDA_LIB NATIVE . MODULE:gpgpu
libcuda.so.1 0000 CUDA_SYMLINK NATIVE . libcuda.so.{version} MODULE:gpgpu
32/libcuda.so.{version} 0755 CUDA_LIB COMPAT32 . MODULE:gpgpu
libnvidia-ml.so.{version} 0755 UTILITY_LIB NATIVE MODULE:nvml
libnvidia-ml.so.1 0000 UTILITY_LIB_SYMLINK NATIVE libnvidia-ml.so.{version} MODULE:nvml
libnvidia-glcore.so.{version} 0755 OPENGL_LIB NATIVE MODULE:opengl
nvidia-smi 0755 UTILITY_BINARY MODULE:nvml
nvidia-modprobe 4755 NVIDIA_MODPROBE /usr/bin MODULE:installer
nvidia.icd 0644 CUDA_ICD MODULE:gpgpu
nvngx.dll 0644 WINE_LIB NATIVE MODULE:ngx
systemd/system/nvidia-suspend.service 0644 SYSTEMD_UNIT MODULE:powerd
systemd/system/nvidia-suspend.service 0000 SYSTEMD_UNIT_SYMLINK systemd-suspend.service.requires/ \
nvidia-suspend.service MODULE:powerd
LICENSE 0644 DOCUMENTATION NVIDIA_GLX-1.0/ MODULE:installer
nvidia-installer 0755 INSTALLER_BINARY MODULE:installer
nvidia-uninstall 0000 UTILITY_BIN_SYMLINK nvidia-installer MODULE:installer
firmware/gsp_ga10x.bin 0644 FIRMWARE INHERIT_PATH_DEPTH:1 MODULE:gsp
firmware/gsp_tu10x.bin 0644 FIRMWARE INHERIT_PATH_DEPTH:1 MODULE:gsp
kernel/Makefile 0644 KERNEL_MODULE_SRC INHERIT_PATH_DEPTH:1 MODULE:resman
kernel/nvidia/nv.c 0644 KERNEL_MODULE_SRC INHERIT_PATH_DEPTH:1 MODULE:resman
kernel-open/Makefile 0644 KERNEL_MODULE_SRC INHERIT_PATH_DEPTH:1 MODULE:resman
"""
# What NVIDIA's makefile is asked for, and no more: modules that carry the release they are for.
MAKEFILE = """\
NV_KERNEL_MODULES ?= {modules}
WANTED := $(filter-out $(NV_EXCLUDE_KERNEL_MODULES),$(NV_KERNEL_MODULES))
modules: $(WANTED:%=%.ko)
%.ko: nvidia/nv.c
\t@echo "  CC [M]  nvidia/nv.o"
\t@$(CC) -c -I$(SYSSRC)/include nvidia/nv.c -o $*.o
\t@echo "$*.o: warning: objtool: _nv012345rm+0x1: 'naked return' found in RETHUNK build"
\t@{{ cat $*.o; printf 'vermagic=%s SMP\\0' `cat $(SYSOUT)/include/config/kernel.release`; }} > $@
clean:
\t@rm -f *.o *.ko
"""
CONFTEST = """\
#!/bin/sh
# compiler, architecture, source, output, test
if [ "$5" = cc_sanity_check ] && ! command -v "$1" > /dev/null; then
    echo "no compiler $1"
    exit 1
fi
if [ "$5" = test_configuration_option ]; then
    exit 1  # no kernel has it
fi
if [ "$5" = preempt_rt_sanity_check ] && [ -e "$4/include/config/PREEMPT_RT" ]; then
    echo "The kernel you are installing for is a PREEMPT_RT kernel!"
    exit 1
fi
"""
SOURCE = "#include <linux/kernel.h>\nint nv(void) { return toy_resize(1, 2); }\n"
HEADER = "int toy_resize(int, int);\n"


@dataclass(kw_only=True)
class Machine:
    """A package with `installer` and a root below `place`. Both can be changed before a run."""

    place: Path
    version: str = VERSION
    installer: Path = STAND_IN
    runs: int = 0
    binds: list[Bind] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Make package and root."""
        self._package()
        self._root()

    @property
    def package(self) -> Path:
        """The unpacked driver package."""
        return self.place / "package"

    @property
    def layers(self) -> tuple[Path, Path]:
        """What the root has of its own: all but /usr, and on top of the build host's /usr."""
        return self.place / "base", self.place / "usr"

    @property
    def headers(self) -> Path:
        """The kernel's headers."""
        return self.layers[1] / "src" / f"linux-headers-{RELEASE}"

    def file(self, path: str) -> Path:
        """Where a file is that a run wrote to a path of the root."""
        if path.startswith(("/lib/", "/bin/", "/sbin/")):
            path = f"/usr{path}"
        if path.startswith("/usr/"):
            return self.place / "upper-usr" / path.removeprefix("/usr/")
        return self.place / "upper" / path.lstrip("/")

    def written(self) -> set[str]:
        """The paths of all files that runs wrote, but for caches and logs."""
        found = {f"/usr/{path.relative_to(self.place / 'upper-usr')}"
                 for path in (self.place / "upper-usr").rglob("*") if not path.is_dir()}
        found |= {f"/{path.relative_to(self.place / 'upper')}"
                  for path in (self.place / "upper").rglob("*") if not path.is_dir()}
        return {path for path in found
                if not path.startswith(("/var/log/", "/var/cache/", "/etc/ld.so.cache"))}

    def program(self, name: str, script: str) -> None:
        """Put a program into the root's /usr/sbin, in front of the build host's."""
        path = self.layers[1] / "sbin" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def hide(self, *names: str) -> None:
        """Make programs of the build host's /usr and our own unfindable."""
        for name in names:
            for directory in ("bin", "sbin", "local/bin", "local/sbin"):
                path = self.layers[1] / directory / name
                path.unlink(missing_ok=True)
                if shutil.which(name, path=f"/usr/{directory}"):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text("")  # neither executable nor the build host's
                    path.chmod(0o644)

    def source(self, text: str, directory: str = "kernel") -> None:
        """Change the source of the modules."""
        (self.package / directory / "nvidia" / "nv.c").write_text(text)

    def manifest(self, *more: str) -> None:
        """Write the manifest; `more` are further entries."""
        lines = ["NVIDIA Accelerated Graphics Driver for Linux-x86_64", self.version, " ",
                 " ".join(MODULES), " ", " ", "./kernel/", "./kernel/precompiled/",
                 *TYPES.format(version=self.version).splitlines(), *more]
        (self.package / ".manifest").write_text("\n".join(lines) + "\n")

    def run(self, *options: str, setup: str = "", env: Mapping[str, str] | None = None,
            timeout: float | None = None, flavour: KernelModule = KernelModule.CLOSED,
            program: str = "./nvidia-installer") -> Outcome:
        """Run the installer; `setup` is a shell script that runs before, in the same root."""
        self.runs += 1
        scratch = self.place / f"run{self.runs}"
        scratch.mkdir()
        bounded = ["timeout", "--kill-after=1", str(timeout)] if timeout else []
        script = f"{setup}\nexec \"$@\""
        base, usr = self.layers
        entry = Entry(
            argv=["sh", "-c", script, "sh", *bounded, program, *options], scratch=scratch,
            roots=[Root(lower=(base,), upper=self.place / "upper"),
                   Root(lower=(usr, Path("/usr")), upper=self.place / "upper-usr", target="/usr",
                        special=False)],
            binds=[Bind(source=self.package, target=PACKAGE, writable=True), *self.binds],
            cwd=PACKAGE, env=dict(env or {}))
        (self.place / "upper" / LOG.lstrip("/")).unlink(missing_ok=True)
        result = sandbox.enter(entry, log=scratch / "said", check=False)
        log = self.place / "upper" / LOG.lstrip("/")
        status = None if timeout and result.status in (124, 137) else result.status
        return Outcome(status=status, log=log.read_text(errors="replace") if log.exists() else "",
                       said=(scratch / "said").read_text(errors="replace"), version=self.version,
                       release=RELEASE, flavour=flavour, seconds=timeout or 0.0)

    def built(self) -> dict[str, str]:
        """The modules that are installed, with their vermagic."""
        found = {}
        for path in (self.place / "upper-usr/lib/modules").rglob("*.ko"):
            match = re.search(rb"vermagic=([^\0]*)\0", path.read_bytes())
            found[path.stem] = match[1].decode() if match else ""
        return found

    def _package(self) -> None:
        self.package.mkdir(parents=True)
        shutil.copy(self.installer, self.package / "nvidia-installer")
        for line in TYPES.format(version=self.version).splitlines():
            name, mode = line.split()[:2]
            path = self.package / name
            if mode != "0000" and name != "nvidia-installer":
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(f"{name} of {self.version}\n")
        for directory in ("kernel", "kernel-open"):
            (self.package / directory / "nvidia").mkdir(parents=True, exist_ok=True)
            (self.package / directory / "Makefile").write_text(
                MAKEFILE.format(modules=" ".join(MODULES)))
            (self.package / directory / "conftest.sh").write_text(CONFTEST)
            self.source(f"/* {directory} */\n{SOURCE}", directory)
        self.manifest()

    def _root(self) -> None:
        base, usr = self.layers
        for name in ("etc", "usr", "var/log", "var/lib", "var/cache/ldconfig"):
            (base / name).mkdir(parents=True)
        for name in ("bin", "sbin", "lib", "lib64"):
            (base / name).symlink_to(f"usr/{name}")
        (base / "etc/alternatives").mkdir()
        (base / "etc/alternatives/cc").symlink_to("/usr/bin/gcc")
        (base / "etc/ld.so.conf").write_text("/usr/lib/x86_64-linux-gnu\n")
        for name in PROGRAMS:
            self.program(name, "exit 0")
        self.hide("systemctl", "dkms", "rpm", "update-initramfs")
        for path, text in (("include/linux/kernel.h", HEADER),
                           ("include/linux/version.h", "\n"),
                           ("include/generated/autoconf.h", "\n"),
                           ("include/config/kernel.release", f"{RELEASE}\n"),
                           ("Module.symvers", "\n"), ("scripts/mod/modpost", "\n")):
            (self.headers / path).parent.mkdir(parents=True, exist_ok=True)
            (self.headers / path).write_text(text)
        modules = usr / "lib" / "modules" / RELEASE
        (modules / "kernel").mkdir(parents=True)
        (modules / "build").symlink_to(f"/usr/src/linux-headers-{RELEASE}")
