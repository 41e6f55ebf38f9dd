"""Loads tuned models onto the engines, when a job creates them or a request first needs them, and checks who may use them."""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
from collections import defaultdict

from dstune.core.errors import DstuneError, UserError
from dstune.core.text import visible
from dstune.finetuning.jobs.tables import TunedModel
from dstune.finetuning.models.names import PREFIX
from dstune.finetuning.models.store import ModelStore, missing
from dstune.serve import source
from dstune.serve.engines.base import EngineDown
from dstune.serve.errors import ApiError
from dstune.serve.fleet import Fleet
from dstune.serve.parity import Refused
from dstune.serve.store.keys import Caller

log = logging.getLogger("dstune.serve")

PERMISSION_CACHE_SECONDS = 2.0
"""How long permissions to use a model are cached, as keys are."""
LATER = {"retry-after": "5"}
LOADED_AT_START = 64
"""How many of the newest models are loaded at the start."""
MOST_LOADED = 64
IDLE_SECONDS = 3600.0
"""Beyond `MOST_LOADED`, models that were not requested for this long are unloaded; otherwise the engines' memory would fill up."""
_FOLDERS = re.compile(r"(?<![\w.])/(?:[^\s/:;'\"]+/)+")
"""Folders in the server's paths, which are removed from messages; the name of the file stays."""


class Serving:
    """Serves the tuned models on a fleet."""

    def __init__(self, fleet: Fleet, store: ModelStore):
        self._fleet, self._store = fleet, store
        self._allowed: dict[tuple[str, str], tuple[float, TunedModel]] = {}
        self._loading: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._refused: set[str] = set()
        """Models that failed to load; they are retried only on request."""
        self._last_used: dict[str, float] = {}
        """When each loaded model was last requested."""

    async def ensure(self, caller: Caller, name: str) -> None:
        """Load the model for a request, if it is a tuned model. Raises ApiError if the caller may not use it, or no engine can
        serve it."""
        if not name.startswith(PREFIX):
            return
        model = await self._authorized_model(caller, name)
        if name not in self._fleet.models:
            await self._load(model)
        if name in self._last_used:
            self._last_used[name] = time.monotonic()

    async def _authorized_model(self, caller: Caller, name: str) -> TunedModel:
        cached = self._allowed.get((caller.project, name))
        if cached is not None and time.monotonic() - cached[0] < PERMISSION_CACHE_SECONDS:
            return cached[1]
        model = await asyncio.to_thread(self._store.find, caller, name)
        if model is None:
            self._allowed.pop((caller.project, name), None)
            raise missing(name)
        if len(self._allowed) > 4096:
            self._allowed.clear()
        self._allowed[caller.project, name] = (time.monotonic(), model)
        return model

    async def _load(self, model: TunedModel) -> None:
        async with self._loading[model.name]:
            if model.name in self._fleet.models:
                return
            try:
                resolved = await asyncio.to_thread(source.resolve, model.name, str(self._store.folder(model)))
                await self._fleet.add(resolved)
            except UserError as error:
                reasons = "; ".join(problem.reason for problem in error.problems)
                log.info("%s is not served: %s", model.name, error)
                message = f"The model {model.name!r} is not served here: {reasons}."
                raise ApiError(400, message[:500], param="model", code="model_not_served") from None
            except Refused as error:
                log.error("%s is not served: %s", model.name, error)
                reason = _FOLDERS.sub("", str(error))
                message = f"The model {model.name!r} cannot be served: it does not answer as it was trained. {reason}"
                raise ApiError(400, visible(message)[:800], param="model", code="model_not_served") from None
            except (DstuneError, EngineDown) as error:
                log.error("%s is not served: %s", model.name, error)
                raise ApiError(
                    503, "The engine of the model does not answer.", code="starting", headers=LATER
                ) from None
        self._loading.pop(model.name, None)
        self._last_used[model.name] = time.monotonic()
        await self._make_room()

    async def _make_room(self) -> None:
        self._last_used = {name: at for name, at in self._last_used.items() if name in self._fleet.models}
        old = time.monotonic() - IDLE_SECONDS
        for name in sorted(self._last_used, key=self._last_used.__getitem__)[
            : max(0, len(self._last_used) - MOST_LOADED)
        ]:
            if self._last_used.get(name, math.inf) < old and name in self._fleet.models:
                self._refused.add(name)
                try:
                    await self._fleet.remove(name)
                except (DstuneError, EngineDown) as error:
                    log.warning("%s could not be taken off its engine: %s", name, error)

    async def forget(self, name: str) -> None:
        """Unload a deleted model from its engine."""
        for key in [key for key in self._allowed if key[1] == name]:
            del self._allowed[key]
        async with self._loading[name]:  # wait for one that is being loaded
            if name in self._fleet.models:
                await self._fleet.remove(name)
        self._loading.pop(name, None)

    def forget_permissions(self) -> None:
        self._allowed.clear()

    async def load_new(self) -> None:
        """Load the newest models that are not loaded yet, once the fleet has started."""
        await self._fleet.started.wait()
        if not self._fleet.models:
            return
        for model in await asyncio.to_thread(self._store.final, LOADED_AT_START):
            if model.name not in self._fleet.models and model.name not in self._refused:
                try:
                    await self._load(model)
                except ApiError as error:
                    if error.status != 503:  # an engine that does not answer has refused nothing: retry later
                        self._refused.add(model.name)
                    log.info("%s", error)
