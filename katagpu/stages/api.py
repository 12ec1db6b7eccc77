"""What a stage is, and what it gets to work with.

A `Stage` is data: everything that may change the output is in it, and its action key is made from
it. `Build` is what the stage's `make` receives: its inputs as paths, a sandbox, and a place for the
outputs.
"""

from __future__ import annotations

import json
import operator
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from katagpu import apt, keys, sandbox
from katagpu.errors import CorruptBlob, StepError, UserError
from katagpu.fetch import SUPERSEDED, Gone, Job, fetch_all
from katagpu.lock import Deb
from katagpu.run import Result
from katagpu.sandbox import Bind, Entry, Root
from katagpu.store import Action, Kind, Output, Store, writing
from katagpu.tree import EPOCH

Options = Mapping[str, Any]
CCACHE_SIZE = "2G"  # of each compiler cache, which drops what is more by itself
RECIPE = "the recipe has its address and its digest: mend them there"
"""What to do about a download that is not there, or not what was asked for."""
CCACHE_LOG = "ccache-log"


@dataclass(frozen=True, kw_only=True)
class Ref:
    """An output of another stage."""

    stage: str
    output: str


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step: its code, what it reads, and what it puts out.

    `module` is the stage's module below katagpu, whose code is in the key. `files` are files of the
    repository or the host by a logical name; `packages` are groups of locked packages; `downloads`
    are files by URL and SHA-256 (None: verified by the stage itself).
    """

    name: str
    title: str
    module: str
    make: Callable[[Build], None]
    outputs: Mapping[str, Kind]
    options: Options = field(default_factory=dict)
    inputs: Mapping[str, Ref] = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict)
    packages: Mapping[str, tuple[Deb, ...]] = field(default_factory=dict)
    downloads: Mapping[str, tuple[str, str | None]] = field(default_factory=dict)
    network: bool = False

    def file_digests(self) -> dict[str, str]:
        """SHA-256 of each of `files`."""
        return {name: keys.file_digest(path) for name, path in self.files.items()}

    def key(self, identities: Mapping[str, str]) -> dict[str, Any]:
        """The action key; `identities` are those of the inputs by name."""
        return {
            "stage": self.name,
            "code": keys.code(self.module),
            "architecture": "x86_64",
            "options": dict(self.options),
            "inputs": dict(identities),
            "files": self.file_digests(),
            "packages": {group: {deb.package: f"{deb.version} sha256:{deb.sha256}"
                                 for deb in debs} for group, debs in self.packages.items()},
            "downloads": {name: digest or url for name, (url, digest) in self.downloads.items()},
        }


def unpacked_tree(store: Store, output: Output) -> Path:
    """A tree of the store as a directory that must not be written to (an overlay's lower one)."""
    assert output.kind is Kind.TREE, output

    def unpack(target: Path) -> None:
        found = sandbox.unpack(store.sound(output.blob), target, overlay=True)
        if found != output.identity:
            store.drop(output.blob)
            raise CorruptBlob(output.blob, f"the blob of another tree, {found}")

    return _unpacked(store, f"tree{keys.MECHANISMS['tree']}-{output.identity}", unpack)


def _unpacked(store: Store, name: str, unpack: Callable[[Path], None]) -> Path:
    target = store.root / "unpacked" / name
    if target.exists():
        return target
    with store.lock(f"unpack-{name}"):
        if not target.exists():
            with writing(store.root), store.staging("unpack", sandbox.remove) as scratch:
                part = scratch / "part"
                unpack(part)
                part.rename(target)
    return target


Wanted = tuple[str, str, int | None, str]
"""A file to have in the store: its address, SHA-256, size in bytes if known, and what it is."""


def bring(store: Store, wanted: Sequence[Wanted], cure: str,
          proxies: Callable[[], Mapping[str, str]] = dict) -> None:
    """Fetch what the store lacks; stages side by side want the same packages.

    All that can be had is had before `Gone` names what cannot. `cure` is what to do then.
    """
    def missing() -> list[Wanted]:
        return [item for item in wanted if not store.has(item[1], item[2])]

    if not missing():
        return
    gone: list[str] = []
    with store.lock("fetch"), writing(store.root):
        partial = store.root / "partial"
        jobs = [(Job(url=url, sha256=digest, size=size, what=what, cure=cure), partial / digest)
                for url, digest, size, what in missing()]
        while jobs:
            try:
                fetch_all(jobs, proxies=proxies())
                break
            except Gone as refusal:
                left = [job for job in jobs if not refusal.what.startswith(f"{job[0].what}: ")]
                if len(left) == len(jobs):
                    raise
                jobs = left
                gone.append(refusal.what)
        for job, path in jobs:
            store.put(path, job.sha256)
    if gone:
        shown = "\n  ".join(gone[:20]) + (f"\n  and {len(gone) - 20} more" if gone[20:] else "")
        raise Gone(shown, hint=cure)


def packages(debs: Iterable[Deb], address: Callable[[Deb], str]) -> list[Wanted]:
    """Packages as files to have; `address` is where this host has one."""
    return [(address(deb), deb.sha256, deb.size, f"{deb.package} {deb.version}") for deb in debs]


def jobs() -> int:
    """How many compilers may run at once: KATAGPU_JOBS, else one for each processor of ours.

    Raises `UserError` for what is no number.
    """
    given = os.environ.get("KATAGPU_JOBS", "")
    if not given:
        return len(os.sched_getaffinity(0))
    if not given.isdecimal() or int(given) == 0:
        raise UserError(f"KATAGPU_JOBS={given} is no number of jobs", hint="for example 4")
    return int(given)


class Build:
    """One run of a stage: inputs, scratch space, sandbox and outputs."""

    def __init__(self, stage: Stage, store: Store, inputs: Mapping[str, Output], scratch: Path,
                 log: Path, *, ccache: bool = True,
                 address: Callable[[Deb], str] = operator.attrgetter("url")) -> None:
        self.stage = stage
        self.address = address
        self.options = stage.options
        self.store = store
        self.inputs = inputs
        self.scratch = scratch
        self.log = log
        self.ccache = ccache
        self.outputs: dict[str, Output] = {}
        self.facts: dict[str, Any] = {}
        self.cpu = 0.0
        self._entries = 0

    # inputs

    def file(self, name: str) -> Path:
        """A repository file of the stage."""
        return self.stage.files[name]

    def blob(self, name: str) -> Path:
        """A file input, its bytes verified. Raises `CorruptBlob`."""
        output = self.inputs[name]
        assert output.kind is Kind.FILE, name
        return self.store.sound(output.blob)

    def tree(self, name: str) -> Path:
        """A tree input as a directory that must not be written to (an overlay's lower one)."""
        return unpacked_tree(self.store, self.inputs[name])

    def unpacked(self, name: str, unpack: Callable[[Path], None]) -> Path:
        """A disposable unpacked copy beside the store, made once by `unpack(target)`."""
        return _unpacked(self.store, name, unpack)

    def debs(self, group: str) -> list[Path]:
        """The packages of a group as verified blobs, fetched where they are missing."""
        debs = self.stage.packages[group]
        if not all(self.store.has(deb.sha256, deb.size) for deb in debs):
            bring(self.store, packages(debs, self.address), SUPERSEDED, apt.proxies)
        return [self.store.sound(deb.sha256) for deb in debs]

    def download(self, name: str, cure: str = RECIPE) -> Path:
        """A downloaded file as a verified blob, fetched where it is missing."""
        url, digest = self.stage.downloads[name]
        assert digest is not None, "a download without a digest is fetched by its stage"
        bring(self.store, [(url, digest, None, self.stage.title)], cure)
        return self.store.sound(digest)

    def repository(self, group: str, files: Sequence[Path] = ()) -> Path:
        """A directory that is a flat apt repository of a group's packages and of `files`."""
        from katagpu.stages import repository

        directory = self.scratch / f"repository-{group}"
        if not directory.exists():
            known = {deb.sha256: path for deb, path in
                     zip(self.stage.packages[group], self.debs(group), strict=True)}
            given = {keys.file_digest(path): path for path in files}
            repository.lay(directory, {**known, **given})
        return directory

    # work

    def directory(self, name: str) -> Path:
        """A new directory in the scratch space."""
        path = self.scratch / name
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(0o755)
        return path

    def enter(self, argv: Sequence[str], roots: Sequence[Root], *, binds: Sequence[Bind] = (),
              env: Mapping[str, str] | None = None, cwd: str = "/", network: bool = False,
              capture: bool = False, check: bool = True, timeout: float | None = None,
              stdin: bytes | None = None) -> Result:
        """Run a program in a sandbox, its output in the step's log; `timeout` in seconds.

        Only a stage that says `network` gets one.
        """
        assert not network or self.stage.network, f"{self.stage.name} may not use the network"
        self._entries += 1
        entry = Entry(argv=argv, roots=roots, scratch=self.directory(f"entry{self._entries}"),
                      binds=binds, cwd=cwd, network=network, timeout=timeout,
                      env={"SOURCE_DATE_EPOCH": str(EPOCH), "TZ": "UTC", **(env or {})})
        try:
            return sandbox.enter(entry, log=self.log, capture=capture, check=check, stdin=stdin)
        finally:
            self.cpu += entry.cpu

    def inside(self, function: Callable[..., Any], roots: Sequence[Root], **arguments: Any) -> Any:
        """Call a module's function in the namespace that owns a root's files.

        The root is assembled but not entered. The function gets its path and `arguments`; they and
        the answer go as JSON.
        """
        self._entries += 1
        scratch = self.directory(f"entry{self._entries}")
        request = scratch / "request.json"
        answer = scratch / "answer.json"
        mount = Entry(argv=(), roots=(), scratch=scratch).mount
        request.write_text(json.dumps({"module": function.__module__,
                                       "function": function.__name__, "root": str(mount),
                                       "answer": str(answer), "arguments": arguments}))
        code = f"import sys; sys.path.insert(0, {str(keys.PACKAGE.parent)!r}); " \
               "from katagpu.inside import main; main(sys.argv[1])"
        entry = Entry(argv=[sys.executable, "-I", "-c", code, str(request)], roots=roots,
                      scratch=scratch, stay=True)
        sandbox.enter(entry, log=self.log)
        self.cpu += entry.cpu
        return json.loads(answer.read_text())

    def compiler_cache(self, name: str, compiler: str) -> tuple[list[Bind], dict[str, str]]:
        """Binds and environment for ccache; `compiler` is the digest of the toolchain.

        ccache's own check looks at the compiler's time and size, and our times are clamped.
        """
        self.facts["compiler_cache"] = self.ccache
        if not self.ccache:
            self.facts["ccache"] = {"hits": 0, "misses": 0}
            return [], {"CCACHE_DISABLE": "1"}
        directory = self.store.root / "ccache" / name
        with writing(self.store.root):
            directory.mkdir(parents=True, exist_ok=True)
        return ([Bind(source=directory, target="/ccache", writable=True),
                 Bind(source=self.directory(CCACHE_LOG), target=f"/{CCACHE_LOG}", writable=True)],
                {"CCACHE_DIR": "/ccache", "CCACHE_COMPILERCHECK": f"string:{compiler}",
                 "CCACHE_NOHASHDIR": "1", "CCACHE_MAXSIZE": CCACHE_SIZE,
                 "CCACHE_STATSLOG": f"/{CCACHE_LOG}/log"})

    def _compilations(self) -> dict[str, Any]:
        """How many compilations ccache answered, and how many not; nothing where it is silent.

        CCACHE_STATSLOG lists each call's counters by name; ccache before 4.4 has no such log.
        """
        try:
            counters = (self.scratch / CCACHE_LOG / "log").read_text(errors="replace").splitlines()
        except OSError:
            return {}
        hits = sum(line in ("direct_cache_hit", "preprocessed_cache_hit") for line in counters)
        return {"ccache": {"hits": hits, "misses": counters.count("cache_miss")}}

    # outputs

    def put_file(self, name: str, path: Path) -> None:
        """Make a file an output. The file is moved."""
        blob, size = self.store.put(path)
        self.outputs[name] = Output(kind=Kind.FILE, identity=blob, blob=blob, size=size)

    def put_bytes(self, name: str, data: bytes) -> None:
        """Make bytes an output."""
        path = self.scratch / f"bytes-{name}"
        with writing(self.store.root):
            path.write_bytes(data)
        self.put_file(name, path)

    def put_tree(self, name: str, directory: Path, *, overlay: bool = False,
                 final: bool = False) -> None:
        """Make a directory an output, captured as a tree.

        `overlay`: it is an overlay's upper directory, whose markers become whiteouts. `final`: it
        holds the files that the guest gets where build roots have none (`tree.LAID`).
        """
        packed = self.scratch / f"tree-{name}"
        form = sandbox.Form(overlay=overlay, final=final)
        with writing(self.store.root):
            identity = sandbox.capture(directory, packed, form, log=self.log)
        blob, size = self.store.put(packed)
        self.outputs[name] = Output(kind=Kind.TREE, identity=identity, blob=blob, size=size)

    def finish(self, key: Mapping[str, Any], record: Mapping[str, Any]) -> Action:
        """The action of this run. Raises `StepError` when an output is missing."""
        missing = set(self.stage.outputs) - set(self.outputs)
        if missing:
            raise StepError(f"{self.stage.name} did not make: {', '.join(sorted(missing))}")
        return Action(stage=self.stage.name, key=dict(key), outputs=self.outputs,
                      record={**record, **self._compilations(), **self.facts})
