"""Starts, proves, watches and restarts all engines with the models that they serve."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from dstune.core.errors import DstuneError, Problem, UserError
from dstune.serve import adapters
from dstune.serve.engines.base import Engine, EngineDown, EngineFault, Unprovable
from dstune.serve.parity import Proof, Refused, prove
from dstune.serve.source import NAME, Source, base_source

log = logging.getLogger("dstune.serve")

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
"""Seconds between two starts of an engine that keeps failing."""

EngineOf = Callable[[Source, str], Engine]
"""Creates the engine of a base model that is served under a name."""


@dataclass
class Model:
    """A served model."""

    source: Source
    engine: Engine
    proof: Proof
    parent: str | None = None
    """The name of an adapter's base."""
    ready: bool = True
    """False while its engine restarts, until the model is proven again."""
    failed: str = ""
    """Why an adapter was refused when its engine was restarted; the engine's other models are still served."""
    version: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.version = self.source.version


@dataclass
class _Group:
    """An engine and its models."""

    engine: Engine
    base: str
    serves_base: bool
    """Whether the base is served as a model itself, not only beneath its adapters."""
    adapters: dict[str, Source] = field(default_factory=dict)
    busy: asyncio.Lock = field(default_factory=asyncio.Lock)


class Fleet:
    """All engines, and the served models by name."""

    def __init__(
        self,
        engine_of: EngineOf,
        *,
        one_template: bool = False,
        require_proof: bool = False,
        drain_seconds: float = 20.0,
        base_name: str = "",
        may_be_empty: bool = False,
    ):
        """one_template: engines use one chat template for all adapters. require_proof: refuse a model without a reference, or on an
        engine that cannot be compared. base_name: the name of the adapters' base. may_be_empty: whether it is ready without any
        model."""
        self._may_be_empty = may_be_empty
        self._engine_of, self._require_proof, self._drain = engine_of, require_proof, drain_seconds
        self._one_template, self._named_base = one_template, base_name
        self.models: dict[str, Model] = {}
        self._groups: list[_Group] = []
        self._watchers: list[asyncio.Task[None]] = []
        self._stopping = False
        self._adding: set[str] = set()
        self._replacing: dict[str, asyncio.Event] = {}
        """Events by the names of adapters that are being replaced; each is set when its replacement ends."""
        self.started = asyncio.Event()
        """Set when every engine has been started and its models are proven."""
        if may_be_empty:
            self.started.set()
        self.awaited: frozenset[str] = frozenset()
        """Names of the models that will be served after the start."""

    # -- start and end

    async def start(self, sources: Sequence[Source]) -> None:
        """Start and prove all models. Raises UserError, Refused and EngineDown; whatever was started is stopped then."""
        try:
            groups = self._group_by_base(sources)
            self.awaited = frozenset(name for group in groups for name in (group.base, *group.adapters))
            for group in groups:
                log.info("starting the engine %s for %s", group.engine.name, group.base)
                self._groups.append(group)
                await group.engine.start()
                async with group.busy:
                    await self._publish(group)
        except BaseException:
            await self.stop()
            raise
        self._watchers = [asyncio.create_task(self._watch(group)) for group in self._groups]
        self.awaited = frozenset()
        self.started.set()

    def _group_by_base(self, sources: Sequence[Source]) -> list[_Group]:
        """Group the adapters by base; the adapters of a base share an engine. Raises UserError for duplicate names and for adapters
        that do not fit."""
        names = [source.name for source in sources]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(
                Problem("MODEL", "two models have this name", "give one another name: NAME=PATH", name)
                for name in twice
            )
        if self._named_base and not any(source.adapter and source.generates for source in sources):
            reason = "names the base of adapters, but no adapter of a language model is served"
            raise UserError(Problem("--base-name", reason, "to name a model, give NAME=PATH", self._named_base))
        groups: list[_Group] = []
        by_base: dict[tuple[str, ...], _Group] = {}
        for source in sorted(sources, key=lambda entry: entry.adapter):  # full models first: one may be a base
            shared = source.adapter and source.generates
            template = (source.template or "") if self._one_template else ""
            place = source.base if shared else str(source.folder or source.path)
            key = (place, source.base_revision or "", template)
            group = by_base.get(key) if shared else None
            if group is None:
                base = source
                if shared:
                    taken_names = [*names, *(entry.base for entry in groups)]
                    if self._named_base in taken_names:
                        reason = "another model or base has this name"
                        raise UserError(Problem("--base-name", reason, "give another name", self._named_base))
                    name = self._named_base or self._base_name(source.base, taken_names)
                    base = base_source(source, name, one_template=self._one_template)
                group = _Group(self._engine_of(base, base.name), base.name, serves_base=not shared)
                groups.append(group)
                by_base.setdefault(key, group)
            if shared:
                adapters.check(source, group.engine.source, one_template=self._one_template)
                group.adapters[source.name] = source
                group.engine.expect(source)
        return groups

    @staticmethod
    def _base_name(path: str, taken_names: Sequence[str]) -> str:
        name = Path(path).name if Path(path).is_dir() else path.removeprefix("sample://")
        name = re.sub(r"[^A-Za-z0-9._:/@-]", "-", name).lstrip("._:/@-")[:100] or "base"
        while name in taken_names:
            name = f"{name}-base"
        return name

    async def stop(self) -> None:
        self._stopping = True
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        self.models = {}
        await asyncio.gather(*(group.engine.stop(self._drain) for group in self._groups))

    # -- models

    async def _publish(self, group: _Group, *, after_restart: bool = False) -> None:
        """List the models of an engine that has just started. after_restart: skip an adapter that was served before and is refused
        now. Raises Refused, UserError, EngineDown."""
        engine, source = group.engine, group.engine.source
        proof = Proof("base", dtype=engine.dtype)
        if group.serves_base:
            proof = self._accepted(group.base, await prove(engine, group.base, source))
        self._add_to_models(Model(source, engine, proof))
        for name, adapter in group.adapters.items():
            try:
                await self._load(group, name, adapter)
            except (DstuneError, EngineDown, Unprovable, OSError) as error:
                # An external server that cannot be reached has refused nothing: the next restart tries again.
                is_down = isinstance(error, EngineDown) and not isinstance(error, EngineFault)
                is_temporary = is_down and not engine.starts_process
                if is_temporary or not (after_restart and engine.alive()):
                    raise
                log.error("%s is not served until it is added again: %s", name, error)
                self.models[name] = replace(self.models[name], ready=False, failed=str(error))

    async def _load(self, group: _Group, name: str, source: Source) -> None:
        """Load and prove an adapter, and list it. Raises Refused, UserError, EngineDown; the adapter is unloaded then."""
        assert source.folder is not None
        await group.engine.load_adapter(name, source.folder)
        try:
            proof = self._accepted(name, await prove(group.engine, name, source, group.base))
        except BaseException:
            with contextlib.suppress(DstuneError, EngineDown, Unprovable):
                await group.engine.unload_adapter(name)
            raise
        self._add_to_models(Model(source, group.engine, proof, parent=group.base))

    def _accepted(self, name: str, proof: Proof) -> Proof:
        """Return the proof, and log it. Raises Refused for an unproven model if a proof is required."""
        if proof.status == "unproven":
            if self._require_proof:
                raise Refused(f"{name} is {proof}")
            log.warning("%s is served unproven: %s", name, proof.detail)
        else:
            log.info("%s is %s", name, proof)
        return proof

    def _add_to_models(self, model: Model) -> None:
        listed_before = self.models.get(model.source.name)
        if listed_before is not None:
            model.created = listed_before.created
        self.models[model.source.name] = model

    def _check_started(self) -> None:
        if not self.started.is_set():
            raise EngineDown("the engines are being started")

    async def add(self, source: Source) -> Model:
        """Serve another adapter while requests run. Raises UserError, Refused, EngineDown."""
        if not NAME.fullmatch(source.name):
            reason = "is not a valid model name"
            fix = "use letters, digits and . _ : / @ -, beginning with a letter or digit"
            raise UserError(Problem("name", reason, fix, source.name))
        self._check_started()
        if not (source.adapter and source.generates):
            reason = "is a complete model, which needs a server of its own" if source.generates else "writes no text"
            raise UserError(Problem("path", reason, "dstune serve, with this model alone", source.path))
        if source.name in self._adding:
            raise UserError(Problem("name", "a model of this name is being added", value=source.name))
        self._adding.add(source.name)
        try:
            return await self._add(source)
        finally:
            self._adding.discard(source.name)

    async def _add(self, source: Source) -> Model:
        problems: list[Problem] = []
        for group in self._groups:
            try:
                adapters.check(source, group.engine.source, one_template=self._one_template)
            except UserError as error:
                problems += error.problems
                continue
            async with group.busy:
                listed_model = self.models.get(source.name)
                is_readded = listed_model is not None and listed_model.failed and source.name in group.adapters
                is_taken = listed_model is not None or any(source.name in other.adapters for other in self._groups)
                if is_taken and not is_readded:
                    fix = '"replace": true gives its name to another adapter'
                    raise UserError(Problem("name", "a model has this name already", fix, source.name))
                await self._load(group, source.name, source)
                group.adapters[source.name] = source
            return self.models[source.name]
        raise UserError(problems or [Problem("path", "no engine serves its base", value=source.base)])

    async def replace(self, source: Source) -> Model:
        """Replace the adapter served under a name, once the new one is proven. Until then the previous one answers; requests that
        arrive during the switch wait for it. Raises UserError, Refused, EngineDown; the previous adapter stays then."""
        self._check_started()
        group = next((group for group in self._groups if source.name in group.adapters), None)
        if group is None or not (source.adapter and source.generates):
            raise UserError(Problem("name", "is not the name of a served adapter", value=source.name))
        adapters.check(source, group.engine.source, one_template=self._one_template)
        async with group.busy:
            previous = group.adapters.get(source.name)
            listed = self.models.get(source.name)
            if previous is None or listed is None or not listed.ready:
                fix = "remove it and add it again"
                raise UserError(Problem("name", "is not being served now, so it cannot be replaced", fix, source.name))
            proof = await self._prove_on_trial(group, source)
            replaced = self._replacing[source.name] = asyncio.Event()
            try:
                await self._switch_adapter(group, previous, source)
                group.adapters[source.name] = source
                self._add_to_models(Model(source, group.engine, proof, parent=group.base))
            finally:
                del self._replacing[source.name]
                replaced.set()
        return self.models[source.name]

    async def _prove_on_trial(self, group: _Group, source: Source) -> Proof:
        """Prove an adapter under a name that no client can request."""
        trial = f"{source.name}@trial"
        assert source.folder is not None
        await group.engine.load_adapter(trial, source.folder)
        try:
            return self._accepted(source.name, await prove(group.engine, trial, source, group.base))
        finally:
            with contextlib.suppress(DstuneError, EngineDown, Unprovable):
                await group.engine.unload_adapter(trial)

    @staticmethod
    async def _switch_adapter(group: _Group, previous: Source, source: Source) -> None:
        assert source.folder is not None and previous.folder is not None
        try:
            await group.engine.replace_adapter(source.name, source.folder)
        except BaseException:
            with contextlib.suppress(DstuneError, EngineDown, Unprovable):
                await group.engine.load_adapter(previous.name, previous.folder)
            raise

    async def wait_until_replaced(self, name: str) -> None:
        """Wait until the model of this name is not being replaced."""
        while (event := self._replacing.get(name)) is not None:
            await event.wait()

    async def remove(self, name: str) -> None:
        """Stop serving an adapter. Raises UserError if `name` is not an adapter, EngineDown while the engines are starting."""
        self._check_started()
        for group in self._groups:
            if name in group.adapters:
                async with group.busy:
                    if group.adapters.pop(name, None) is None:  # another request was faster
                        break
                    model = self.models.pop(name, None)
                    if model is None or not model.failed:
                        await group.engine.unload_adapter(name)
                return
        raise UserError(Problem("name", "is not the name of a served adapter", value=name))

    # -- watching

    @property
    def ready(self) -> bool:
        usable = [model for model in self.models.values() if not model.failed]
        if not self.started.is_set():
            return False
        return bool(usable or self._may_be_empty) and not self._stopping and all(model.ready for model in usable)

    async def _watch(self, group: _Group) -> None:
        """Restart an engine whenever it ends, and list its models once they are proven again."""
        pause, engine = FIRST_PAUSE, group.engine
        while True:
            began = time.monotonic()
            try:
                await engine.ended()
            except Exception:  # whatever its health check raises
                log.exception("the engine %s of %s cannot be watched", engine.name, group.base)
            self._mark_unready(engine)
            if time.monotonic() - began > 60:
                pause = FIRST_PAUSE
            symptom = "has ended" if engine.starts_process else "does not answer or was replaced"
            log.error("the engine %s of %s %s; trying again in %g s", engine.name, group.base, symptom, pause)
            try:
                await engine.stop(0)
                await asyncio.sleep(pause)
                pause = min(pause * 2, LONGEST_PAUSE)
                async with group.busy:
                    await engine.start()
                    await self._publish(group, after_restart=True)
            except Exception as error:  # its models stay unlisted; the next iteration tries again
                if isinstance(error, DstuneError | EngineDown):
                    log.error("%s", error)
                else:
                    log.exception("the engine %s of %s could not be started again", engine.name, group.base)
                await engine.stop(0)
                continue
            log.info("the engine %s of %s is back", engine.name, group.base)

    def _mark_unready(self, engine: Engine) -> None:
        for name, model in self.models.items():
            if model.engine is engine:
                self.models[name] = replace(model, ready=False, failed="")

    def restarts(self) -> Mapping[str, int]:
        return {group.base: max(group.engine.starts - 1, 0) for group in self._groups}
