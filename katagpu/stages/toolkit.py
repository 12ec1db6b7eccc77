"""NVIDIA's Container Toolkit, compiled from its Go module.

Fetching is a step of its own: it alone has the network, Go verifies the modules against the
checksum database that the host is configured for, and what comes out enters the build by content.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from katagpu.errors import UserError
from katagpu.files import full_disk
from katagpu.run import run
from katagpu.sandbox import Bind, Root
from katagpu.schema import Recipe
from katagpu.stages.api import Build, Ref, Stage
from katagpu.store import Kind

MODULE = "stages.toolkit"
GO_MODULE = "github.com/NVIDIA/nvidia-container-toolkit"
PROGRAMS = ("nvidia-ctk", "nvidia-cdi-hook", "nvidia-container-runtime-hook")
MODULES = "/katagpu/modules"
OUT = "/katagpu/out"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
RESOLVER = ("/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf")
# The host's Go configuration, which names its proxy (go help environment).
HOST_GO = ("GOPROXY", "GOSUMDB", "GONOPROXY", "GONOSUMDB", "GOPRIVATE", "GOINSECURE")
PROXIES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
# Without lazy binding the tools, which leave symbols of libnvidia-ml to the run time, do not start
# where there is no driver (the toolkit's own Makefile).
LINKER = "-s -w -extldflags=-Wl,-z,lazy -X {module}/internal/info.version={version}"


def source(recipe: Recipe) -> Stage:
    """The module with all that it needs, as a file system proxy (go help goproxy)."""
    return Stage(name="toolkit_source", title="container toolkit: Go modules", module=MODULE,
                 make=make_source, outputs={"modules": Kind.TREE}, network=True,
                 options={"module": GO_MODULE, "version": recipe.toolkit.version,
                          "programs": list(PROGRAMS)},
                 inputs={"tools": Ref(stage="imagetools", output="root")})


def toolkit(recipe: Recipe) -> Stage:
    """The programs, at their place in the guest."""
    return Stage(name="toolkit", title="container toolkit", module=MODULE, make=make_toolkit,
                 outputs={"layer": Kind.TREE},
                 options={"module": GO_MODULE, "version": recipe.toolkit.version,
                          "programs": list(PROGRAMS), "linker": LINKER},
                 inputs={"tools": Ref(stage="imagetools", output="root"),
                         "modules": Ref(stage="toolkit_source", output="modules")})


def _packages(build: Build) -> list[str]:
    module, version = build.options["module"], build.options["version"]
    return [f"{module}/cmd/{program}@{version}" for program in build.options["programs"]]


def host_environment() -> dict[str, str]:
    """Where this host gets Go modules from: its environment, and its `go env`."""
    found = {name: os.environ[name] for name in (*HOST_GO, *PROXIES) if os.environ.get(name)}
    if shutil.which("go"):
        for name in ("GOPROXY", "GOSUMDB"):
            value = run([shutil.which("go") or "go", "env", name], capture=True, check=False,
                        env={"HOME": str(Path.home())}).stdout.decode().strip()
            if value:
                found.setdefault(name, value)
    return found


def make_source(build: Build) -> None:
    """Let Go load the packages, which downloads and verifies every module that they need."""
    modules = build.directory("modules")
    binds = [Bind(source=modules, target=MODULES, writable=True)]
    binds += [Bind(source=Path(name).resolve(), target=name) for name in RESOLVER
              if Path(name).exists()]
    if CERTIFICATES.exists():
        binds.append(Bind(source=CERTIFICATES.resolve(), target=str(CERTIFICATES)))
    env = {"GOMODCACHE": MODULES, "GOFLAGS": "-mod=mod -modcacherw", "GOTOOLCHAIN": "local",
           "GOCACHE": "/tmp/cache", "CGO_ENABLED": "1", **host_environment()}
    result = build.enter(["go", "install", "-n", *_packages(build)],
                         [Root(lower=(build.tree("tools"),), upper=build.directory("upper"))],
                         binds=binds, env=env, network=True, check=False)
    if result.status != 0:
        from katagpu.run import tail

        failure = UserError("the container toolkit's Go modules cannot be fetched:\n"
                            f"{tail(build.log, 8)}",
                            hint="is the Go proxy reachable? `go env GOPROXY` of the host is used; "
                                 "or set `toolkit: {source: none}` in the recipe")
        full_disk(build.store.root, failure)
        raise failure
    proxy = build.directory("proxy")
    download = modules / "cache/download"
    own = download / re.sub("[A-Z]", lambda letter: f"!{letter[0].lower()}",
                            build.options["module"]) / "@v"
    for path in sorted(download.rglob("@v/*")):
        if path.parent == own and path.stem != build.options["version"]:
            continue  # the newest, where Go looks whether this version was retracted
        if path.suffix in (".info", ".mod", ".zip", ".ziphash"):
            target = proxy / path.relative_to(download)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
    for versions in proxy.rglob("@v"):
        # Which versions there are: those that we have, and not what the proxy has today.
        names = sorted(path.stem for path in versions.glob("*.mod"))
        (versions / "list").write_text("".join(f"{name}\n" for name in names))
    build.put_tree("modules", proxy)


def make_toolkit(build: Build) -> None:
    """Compile without network; trimmed paths and no VCS stamp make it the same anywhere."""
    out = build.directory("out")
    place = out / "usr/bin"
    place.mkdir(parents=True)
    linker = LINKER.format(module=build.options["module"],
                           version=str(build.options["version"]).removeprefix("v"))
    env = {"GOMODCACHE": "/tmp/modules", "GOPROXY": f"file://{MODULES}", "GOSUMDB": "off",
           "GOFLAGS": "-mod=mod -trimpath -buildvcs=false", "GOTOOLCHAIN": "local",
           "GOCACHE": "/tmp/cache", "CGO_ENABLED": "1", "GOBIN": OUT}
    build.enter(["go", "install", f"-ldflags={linker}", *_packages(build)],
                [Root(lower=(build.tree("tools"),), upper=build.directory("upper"))],
                binds=[Bind(source=build.tree("modules"), target=MODULES),
                       Bind(source=place, target=OUT, writable=True)], env=env)
    build.put_tree("layer", out)
