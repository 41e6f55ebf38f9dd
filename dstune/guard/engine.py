"""The guard's process: started, watched and restarted by the gateway."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from dstune.core.child_python import child_environment
from dstune.core.errors import DstuneError, UserError
from dstune.guard.check import GuardDown
from dstune.guard.policy import LINKS, PII, SECRETS, Policies
from dstune.guard.scanner import Item, Result
from dstune.guard.wire import items_to_json, result_from_json
from dstune.serve.engines.base import Command, Engine, EngineDown, Limits
from dstune.serve.source import Source

log = logging.getLogger("dstune.serve")

LONGEST_PAUSE = 30.0
PROBE_SECONDS = 5.0
"""Interval of asking the process how long its current step has taken."""
SILENT_SECONDS = 120.0
"""A process whose step (the search of one text, or the scores of sixteen windows) takes longer counts as stuck. On a slow core,
sixteen windows and their parts take three seconds, and a search of 200,000 characters a few; four searches share a core, of which
other processes may leave a tenth."""
SILENT_CHECKS = 4
"""The process has at least this many times a policy's `limits.seconds`, the time limit of a request."""


def _source() -> Source:
    return Source("guard", None, "guard", "classification", False, (), adapter=False, base="guard")


@dataclass
class GuardEngine(Engine):
    """The engine of the guard. It answers `scan`, but no client requests."""

    name: ClassVar[str] = "guard"
    models: Mapping[str, Path] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    window_tokens: Mapping[str, int] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def routes(self) -> Mapping[str, frozenset[str]]:
        return {}

    def command(self, folder: Path) -> Command:
        settings: dict[str, Any] = {
            "socket": str(folder / "http"),
            "status": str(self.start_error_file),
            "models": {detector: str(Path(path).resolve()) for detector, path in self.models.items()},
            "needs": list(self.needs),
            "drain_seconds": self.limits.drain_seconds,
            "threads": self.limits.threads,
        }
        argv = [sys.executable, "-m", "dstune.guard.process"]
        return Command(
            argv, child_environment(), "http://guard", str(folder / "http"), json.dumps(settings).encode() + b"\n"
        )


class Guarding:
    """Keeps the guard's process running. While it is down, every scan raises GuardDown."""

    def __init__(self, policies: Policies, state: Path, runtime: Path, limits: Limits | None = None):
        self.policies = policies
        detectors = {watch.detector for policy in policies.policies.values() for watch in policy.all_watches}
        needs = []
        if detectors & {SECRETS, *PII.values()}:
            needs.append("sensitive")
        if LINKS in detectors:
            needs.append("links")
        models = {detector: path for detector, path in policies.models.items() if detector in detectors}
        self.engine = GuardEngine(
            _source(), "guard", state, runtime, limits or Limits(), models=models, needs=tuple(needs)
        )
        longest = max(policy.limits.seconds for policy in policies.policies.values())
        self.patience = max(SILENT_SECONDS, SILENT_CHECKS * longest)
        """Seconds without a completed step after which the process counts as stuck."""
        self._watcher: asyncio.Task[None] | None = None
        self.up = False

    async def start(self) -> None:
        """Start the process and its watcher. Raises EngineDown; UserError if a policy blocks by a model without calibration."""
        await self._start_process()
        self._watcher = asyncio.create_task(self._watch())

    def lines(self) -> Iterator[str]:
        """Yield lines for the start of the guard: what each policy guards, and the label that each model's score is of."""
        policies = self.policies
        for name in policies.policies:
            routes = [route for route, policy_name in policies.routes.items() if policy_name == name]
            projects = [
                f"project {project}" for project, policy_name in policies.projects.items() if policy_name == name
            ]
            yield f"policy {name} for {', '.join([*routes, *projects]) or 'nothing'}"
        for detector, label in self.engine.labels.items():
            yield f"{detector} is the label {label} of {self.engine.models[detector]}"

    async def _start_process(self) -> None:
        await self.engine.start()
        health = await self.engine.ask("GET", "/health", None)
        try:
            self.policies.check_models(health["calibrated"])
        except UserError:
            await self.engine.stop(0)
            raise
        self.engine.window_tokens, self.engine.labels = health["window_tokens"], health["labels"]
        self.up = True

    async def stop(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watcher
        self.up = False
        await self.engine.stop(self.engine.limits.drain_seconds)

    async def _watch(self) -> None:
        pause = 1.0
        while True:
            why = await self._wait_until_down()
            self.up = False
            log.error("the guard %s; it is started again in %g s", why, pause)
            await self.engine.stop(0)
            await asyncio.sleep(pause)
            pause = min(pause * 2, LONGEST_PAUSE)
            try:
                await self._start_process()
            except Exception as error:  # the next iteration tries again
                if isinstance(error, DstuneError | EngineDown):
                    log.error("%s", error)
                else:
                    log.exception("the guard could not be started again")
                await self.engine.stop(0)
                continue
            pause = 1.0
            log.info("the guard is back")

    async def _wait_until_down(self) -> str:
        """Wait until the process has ended or is stuck, and return which."""
        waits = {
            asyncio.create_task(self.engine.ended()): "has ended",
            asyncio.create_task(self._stuck()): f"has done nothing for {self.patience:g} s",
        }
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waits:
                task.cancel()
        for task in done:
            task.result()
        return waits[done.pop()]

    async def _stuck(self) -> None:
        """Wait until the process does not answer, or completes no step of its work, for `patience` seconds. Timeouts of requests
        are no sign: with many requests all may be late, although the guard works through them."""
        heard = time.monotonic()
        while (seconds_left := heard + self.patience - time.monotonic()) > 0:
            await asyncio.sleep(min(PROBE_SECONDS, seconds_left))
            with contextlib.suppress(Exception):  # whatever the error, there was no answer
                async with asyncio.timeout(max(seconds_left, PROBE_SECONDS)):
                    health = await self.engine.ask("GET", "/health", None)
                heard = time.monotonic() - health["silent"]

    async def scan(self, items: Sequence[Item]) -> list[Result]:
        """Return the result of each text. Raises GuardDown."""
        try:
            answer = await self.engine.ask("POST", "/scan", items_to_json(items))
            return [result_from_json(value) for value in answer["results"]]
        except (EngineDown, DstuneError, KeyError, TypeError, RuntimeError) as error:
            raise GuardDown(f"{type(error).__name__}: {error}"[:300]) from error
