"""The guard of `dstune serve`: it checks requests to and answers of the engines, and has its own routes."""

from __future__ import annotations

import argparse
import asyncio
import logging
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dstune.core.errors import Problem
from dstune.protocols import Routes, routes

if TYPE_CHECKING:
    from dstune.guard.audit import Audit
    from dstune.guard.engine import Guarding
    from dstune.serve.gateway.app import Gateway, Route

log = logging.getLogger("dstune.serve")


@routes
class GuardRoutes(Routes):
    name = "guard"
    title = "the guard"
    prefix = "v2/guard"
    flags_without_models = ("--guard-only",)
    closed = dict.fromkeys(("/v2/guard", "/utf-16/v2/guard"), "--guard POLICY")
    checks_itself = True

    def __init__(self) -> None:
        self._guarding: Guarding | None = None
        self._audit: Audit | None = None

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--guard", metavar="FILE", help="policies to check by: a file, `rules` (needs no model) or `default`"
        )
        parser.add_argument("--guard-model", metavar="DIR", help="calibrated export that finds prompt attacks")
        parser.add_argument("--guard-only", action="store_true", help="serve /v2/guard alone; no MODEL is named then")

    def is_served(self, arguments: argparse.Namespace) -> bool:
        return bool(arguments.guard or arguments.guard_only)

    def replaces_models(self, arguments: argparse.Namespace) -> bool:
        return bool(arguments.guard_only)

    def options_used(self, arguments: argparse.Namespace) -> Collection[str]:
        return ("--threads",) if self.is_served(arguments) else ()

    def check(self, arguments: argparse.Namespace) -> Iterator[Problem]:
        if arguments.guard_model and not self.is_served(arguments):
            yield Problem("--guard-model", "needs policies", "--guard default", arguments.guard_model)

    def open(self, arguments: argparse.Namespace, state: Path, runtime: Path) -> None:
        from dstune.guard.engine import Guarding
        from dstune.guard.policy import read
        from dstune.serve.engines.base import Limits

        policies = read(arguments.guard or "default", arguments.guard_model)
        if arguments.guard_only:
            policies.check_answers()
        self._state, self._log_days = state, arguments.log_days
        self._guarding = Guarding(policies, state, runtime, Limits(threads=arguments.threads, drain_seconds=5))

    async def before_models(self) -> None:
        assert self._guarding is not None
        await self._guarding.start()

    def notes(self) -> Sequence[str]:
        return () if self._guarding is None else [f"guard: {line}" for line in self._guarding.lines()]

    def routes(self, gateway: Gateway) -> Sequence[Route]:
        assert self._guarding is not None
        routes, self._audit = guard_routes(gateway, self._guarding, self._state, self._log_days)
        return routes

    def attach(self, gateway: Gateway) -> None:
        assert self._guarding is not None
        self._warning = asyncio.create_task(warn_of_unguarded(gateway, self._guarding))

    async def on_drained(self) -> None:
        self._warning.cancel()
        if self._audit is not None:
            self._audit.close()

    async def close(self) -> None:
        if self._guarding is not None:
            await self._guarding.stop()


def guard_routes(gateway: Gateway, guarding: Guarding, state: Path, log_days: float) -> tuple[list[Route], Audit]:
    """Put the guard in front of a gateway's engines. Returns its own routes and its audit log."""
    from dstune.guard import lakera
    from dstune.guard.audit import Audit
    from dstune.guard.front import Guard

    audit = Audit(state / "guard", log_days)
    guard = Guard(guarding, audit, gateway.admission)
    gateway.guard_with(guard)
    return lakera.routes(guard), audit


async def warn_of_unguarded(gateway: Gateway, guarding: Guarding) -> None:
    """Warn of routes without a policy. It runs once the engines are up, since only then their routes are known."""
    await gateway.fleet.started.wait()
    served = {path for model in gateway.fleet.models.values() for path in model.engine.routes}
    if unguarded := sorted(path for path in served if guarding.policies.of_route(path) is None):
        log.warning("the guard does not look at %s: no policy is named for them", ", ".join(unguarded))
