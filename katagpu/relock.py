"""Making a recipe's committed lock, or moving parts of it.

Packages are resolved by apt. What else a recipe takes from outside is fetched, verified and written
down: a release of kernel.org with who signed it, a `.run`, the Go modules with their sums.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import replace

from katagpu import driverfile, guest, kernelorg, keys, lockfile, lockparts, log, request, resolve
from katagpu.emulator import EmulatorLock
from katagpu.errors import UserError
from katagpu.lock import Deb, File, Known, Request
from katagpu.lockfile import LockedDeb, LockedPart, LockFile
from katagpu.lockparts import OF_GROUP, Part
from katagpu.plan import Plan
from katagpu.stages import locked
from katagpu.stages.api import RECIPE, Stage, bring, unpacked_tree
from katagpu.store import Action, Store, writing

if TYPE_CHECKING:
    from katagpu.context import Context


def relock(context: Context, update: str = "") -> None:
    """Resolve the recipe into its committed lock; with `update` only these parts of it.

    Raises `UserError` where something cannot be had, or does not fit what stays; the file is as it
    was then.
    """
    committed = context.locks.committed
    before = committed.read() if update else None
    moved = list(lockparts.asked(context.plain, context.root))
    if update:
        if before is None:
            raise UserError(f"{committed} is not there, so no part of it can be moved",
                            hint=f"`{lockfile.command(context.plain.name)}` makes it")
        moved = lockparts.named(update, {*moved, *map(Part, before.parts)})
        _rest_must_hold(context, before, moved)
    with context.resolving() as apt:
        what = ", ".join(moved) if update else "all packages"
        with log.step(f"lock: resolve {what} of {context.plain.name}"):
            making = _Making(context, before, moved)
            found = making.make(apt)
        with writing(committed.path):
            lockfile.write(found, committed.path)
    if making.modules is not None:
        _adopt(context.plan, context.store, making.modules)
    _said(context, before, found)


def _rest_must_hold(context: Context, before: LockFile, moved: list[Part]) -> None:
    stale = [part for part in context.locks.committed.stale(before) if part not in moved]
    if stale:
        both = ",".join([*moved, *stale])
        raise UserError(f"{', '.join(stale)}: the lock does not answer the recipe there either",
                        hint=f"`{lockfile.command(before.recipe)} update={both}` moves it too")


class _Making:
    """One lock in the making: `before` is the one whose other parts stay as they are."""

    def __init__(self, context: Context, before: LockFile | None, moved: list[Part]) -> None:
        self.context = context
        self.recipe = context.plain
        self.root = context.root
        self.store: Store = context.store
        self.before = before
        self.moved = moved
        self.asked = lockparts.asked(self.recipe, self.root)
        self.modules: Action | None = None

    def make(self, apt: Path) -> LockFile:
        """Resolve, fetch what its digest must be known of, and put it together."""
        # By name, not by what is asked: parts that ask alike move apart.
        wanted = replace(request.request(self.recipe, self.root), digests={})
        kept = {} if self.before is None else self.before.lock().groups
        known = {name: Known(debs=kept[name]) for name in wanted.groups
                 if OF_GROUP[name] not in self.moved and name in kept}
        groups = dict(resolve.resolve(wanted, apt, known).groups)
        _fits(wanted, groups, self.moved)
        if Part.EMULATOR in self.moved:
            groups |= self._emulator(apt)
        found = self._packages(wanted, groups)
        return self._files(found)

    def _emulator(self, apt: Path) -> Mapping[str, tuple[Deb, ...]]:
        try:
            return EmulatorLock(self.recipe, self.root, self.store.root).resolve(apt).groups
        except UserError as refusal:
            log.warn(f"the lock is without QEMU for boot checks: {refusal}")
            return {}

    def _packages(self, wanted: Request,
                  groups: Mapping[str, tuple[Deb, ...]]) -> LockFile:
        """The lock with its packages; parts that do not move are taken over as they are."""
        parts = {} if self.before is None else {
            name: part for name, part in self.before.parts.items()
            if Part(name) not in self.moved}
        place = _Places(self.context)
        for part in self.moved:
            mine = {name: debs for name, debs in groups.items() if OF_GROUP[name] == part}
            if part in self.asked and (mine or part is not Part.EMULATOR):
                parts[str(part)] = LockedPart(asked=self.asked[part], packages={
                    name: tuple(place.of(deb, name, wanted) for deb in debs)
                    for name, debs in mine.items()})
        used = {deb.archive for part in parts.values()
                for debs in part.packages.values() for deb in debs}
        known = {**place.origins, **({} if self.before is None else self.before.archives)}
        return LockFile(recipe=self.recipe.name, parts=parts,
                        archives={name: known[name] for name in sorted(used)})

    def _files(self, made: LockFile) -> LockFile:
        """What is not a package, for the parts that move."""
        parts = dict(made.parts)
        lock = made.lock()
        stages = guest.stages(self.recipe, lock, self.root)
        plan = self.context.planned(stages, lock)
        for name, part in ((name, part) for name, part in made.parts.items()
                           if Part(name) in self.moved):
            files: dict[str, File] = {}
            modules: dict[str, str] = {}
            if name == Part.KERNEL and stages["kernel_source"].network:
                files = self._kernel(stages["kernel_source"])
            if name == Part.DRIVER and "driver_package" in stages:
                files = self._given(self.recipe.driver.file, stages["driver_package"].files) \
                    or self._run()
            if name == Part.TOOLKIT:
                files = {Path(deb).name: _file(self.root / deb, name=deb)
                         for deb in self.recipe.toolkit.debs}
                if "toolkit_source" in stages:
                    modules = self._modules(plan)
            if name == Part.AGENT:
                files = self._agent()
            parts[name] = replace(part, files=files, modules=modules)
        return replace(made, parts=parts)

    def _given(self, name: str | None, files: Mapping[str, Path]) -> dict[str, File]:
        version = self.recipe.driver.version or ""
        return {key: _file(path, name=name.replace("{version}", version))
                for key, path in files.items()} if name else {}

    def _kernel(self, stage: Stage) -> dict[str, File]:
        """A release of kernel.org, verified; the public address is kernel.org's or the recipe's."""
        version = stage.options["version"]
        tarball, signature = kernelorg.urls(version, stage.options["releases"])
        with self.store.staging("lock", _remove) as place:
            pins = place / "keys"
            pins.mkdir()
            for name, path in stage.files.items():
                (pins / name).write_bytes(path.read_bytes())
            release = kernelorg.release(version, place, pins, releases=stage.options["releases"])
            sign = place / signature.rpartition("/")[2]
            found = {"tarball": _file(release.tarball, url=tarball, signer=release.signed_by),
                     "signature": _file(sign, url=signature)}
            self.store.put(release.tarball, found["tarball"].sha256)
            self.store.put(sign, found["signature"].sha256)
        return found

    def _run(self) -> dict[str, File]:
        """The driver's file, from the first address that has it."""
        driver = self.recipe.driver
        if driver.url is not None and driver.sha256 is not None:
            url = driver.url.replace("{version}", driver.version or "")
            return {"run": self._file(url, driver.sha256, f"NVIDIA driver {driver.version}")}
        partial = self.store.root / "partial"
        ((url, digest),) = driverfile.pin(self.recipe, {}, partial).items()
        self.store.put(partial / digest, digest)
        return {"run": _file(self.store.blob(digest), url=url)}

    def _file(self, url: str, digest: str, what: str) -> File:
        """A file whose digest the recipe has."""
        bring(self.store, [(url, digest, None, what)], RECIPE)
        return _file(self.store.sound(digest), url=url)

    def _agent(self) -> dict[str, File]:
        """What kata-agent is taken out of."""
        given = self.recipe.agent
        assert given is not None
        name = given.file or given.image
        if name is not None:
            return {"source": _file(self.root / name, name=name)}
        assert given.release is not None and given.sha256 is not None
        return {"source": self._file(given.release, given.sha256, "kata-agent's release")}

    def _modules(self, plan: Plan) -> dict[str, str]:
        """The sums of the toolkit's Go modules; it is Go that knows which it needs."""
        with self.store.lease():
            self.modules = plan.ensure("toolkit_source")
            return locked.sums(unpacked_tree(self.store, self.modules.outputs["modules"]))


class _Places:
    """From where this host had a package to the archive's name and the path below it."""

    def __init__(self, context: Context) -> None:
        self.recipe = context.plain
        self.here = lockparts.here(self.recipe, context.root)
        self.origins = lockparts.origins(self.recipe, context.root)

    def of(self, deb: Deb, group: str, wanted: Request) -> LockedDeb:
        """A package as a lock has it. Raises `UserError` where no public archive has it."""
        asked = wanted.groups.get(group)
        name = lockparts.set_of(self.recipe, group, asked.archives if asked else "")
        known = [(len(address), each) for each, address in self.here.items()
                 if deb.url.startswith(f"{address}/")
                 and (each in {name, f"{name}-security"} or each.startswith("repository-"))]
        if not known:
            raise UserError(f"{deb.package} comes from {deb.url}, which is below no archive of the "
                            "recipe", hint="name it there: `mirror`, or `security_mirror`")
        archive = max(known)[1]
        if archive not in self.origins:
            raise UserError(f"{deb.package} comes from this host's {archive} archive, of which the "
                            "recipe has no public address", hint=(
                                "write `security_mirror` in the recipe; a lock names no host's own "
                                "mirror"))
        return LockedDeb(package=deb.package, version=deb.version, size=deb.size,
                         architecture=deb.architecture, sha256=deb.sha256, archive=archive,
                         path=deb.url.removeprefix(f"{self.here[archive]}/"))


def _fits(wanted: Request, groups: Mapping[str, tuple[Deb, ...]],
          moved: Iterable[Part]) -> None:
    """Nothing that stays may have an older package than what it stands on now."""
    from debian.debian_support import Version

    for name, group in wanted.groups.items():
        if OF_GROUP[name] in moved or group.alone:
            continue
        mine = {deb.package: deb for deb in groups[name]}
        below = group.on
        while below is not None:
            if OF_GROUP[below] in moved:
                for deb in groups[below]:
                    held = mine.get(deb.package)
                    if held is not None and Version(held.version) < Version(deb.version):
                        both = ",".join([*moved, OF_GROUP[name]])
                        raise UserError(
                            f"{OF_GROUP[name]} stays, and has {deb.package} {held.version}, older "
                            f"than {deb.version} of {OF_GROUP[below]} that it stands on",
                            hint=f"`{lockfile.command(wanted.recipe)} update={both}` moves both")
            below = wanted.groups[below].on


def _adopt(plan: Plan, store: Store, made: Action) -> None:
    """The Go modules that the lock was made of are those that it names: no build fetches them."""
    key = plan.key("toolkit_source")
    if key is not None and plan.action("toolkit_source") is None:
        store.commit(keys.digest(key), Action(stage=made.stage, key=key, outputs=made.outputs,
                                              record=made.record))


def _file(path: Path, *, url: str | None = None, name: str | None = None,
          signer: str | None = None) -> File:
    try:
        return File(sha256=keys.file_digest(path), size=path.stat().st_size, url=url, path=name,
                    signer=signer)
    except OSError as failure:
        raise UserError(f"cannot read {path}: {failure.strerror}",
                        hint="the recipe names it") from None


def _said(context: Context, before: LockFile | None, found: LockFile) -> None:
    """What was written, and what of it differs from before."""
    count = sum(len(debs) for part in found.parts.values() for debs in part.packages.values())
    log.say(f"lock: {context.locks.committed}: {count} packages, {len(found.parts)} parts; builds "
            "take exactly these now")
    for name, part in found.parts.items() if before is not None else ():
        old = before.parts.get(name) if before is not None else None
        if old != part:
            log.say(f"  {name}: {_difference(old, part)}")


def _difference(old: LockedPart | None, new: LockedPart) -> str:
    was = {(group, deb.package): deb.version for group, debs in old.packages.items()
           for deb in debs} if old is not None else {}
    now = {(group, deb.package): deb.version for group, debs in new.packages.items()
           for deb in debs}
    lines = list(dict.fromkeys(
        f"{name[1]} {was.get(name, 'none')} → {now.get(name, 'none')}"
        for name in sorted({*was, *now}) if was.get(name) != now.get(name)))
    more = f" and {len(lines) - 5} more" if len(lines) > 5 else ""
    return ", ".join(lines[:5]) + more if lines else "other files"


def _remove(path: Path) -> None:
    import shutil

    shutil.rmtree(path, ignore_errors=True)
