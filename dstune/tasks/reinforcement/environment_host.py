"""Holds the environments in the child process, one for each completion."""

from __future__ import annotations

import asyncio
import inspect
import random
from collections.abc import Mapping, Sequence
from typing import Any

from dstune.core.parsing import whole_characters
from dstune.protocols import ENVIRONMENTS
from dstune.tasks.reinforcement.outages import Failure

LONGEST_RESULT = 100_000
"""Results of tools are cut off after this many characters."""


FAULTS = (Exception, SystemExit, asyncio.CancelledError)
"""What the code of an environment may raise without ending the process, and so all other episodes."""
ENDED = "its environment has ended with the process that held it"


class EnvironmentHost:
    def __init__(self) -> None:
        self._instances: dict[str, Any] = {}
        self.name = ""
        """Name of the environments that currently exist."""

    def reset(self, name: str, rows: Sequence[Mapping[str, Any]], *, again: bool = False) -> list[dict[str, Any]]:
        """Create an environment for each of `rows` (key, seed, columns), in the place of all others, or if `again` beside them.
        Return for each its first observation (`text`), or why it could not be reset (`failure`, `may_pass`)."""
        self._instances, self.name = self._instances if again else {}, name
        return [self._reset(**row) for row in rows]

    def _reset(self, key: str, seed: int, columns: Mapping[str, Any]) -> dict[str, Any]:
        try:
            environment = ENVIRONMENTS[self.name]()
            environment.random = random.Random(seed)
            observation = finished(environment.reset(**columns))
        except FAULTS as error:
            failure = Failure.of(error)
            return {"text": "", "failure": failure.reason, "may_pass": failure.may_pass}
        self._instances[key] = environment
        return {"text": "" if observation is None else shown(observation)}

    def call(self, calls: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Run tool calls (key of the environment, name of the tool, arguments) one after the other; return their results."""
        return [self._call(**call) for call in calls]

    def rewards(self, keys: Sequence[str]) -> list[float | Failure | None]:
        """Return what `get_reward` of each environment returns, or why it failed."""
        return [self._reward(key) for key in keys]

    def _reward(self, key: str) -> float | Failure | None:
        if key not in self._instances:
            return Failure(ENDED)
        try:
            reward = finished(self._instances[key].get_reward())
            return None if reward is None else float(reward)
        except FAULTS as error:
            return Failure.of(error)

    def instances(self, keys: Sequence[str]) -> list[Any]:
        return [self._instances[key] for key in keys]

    def _call(self, key: str, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        environment = self._instances.get(key)
        if environment is None:
            return {"lost": ENDED}
        try:
            if name not in environment.tool_names():
                raise ValueError(f"there is no tool {name!r}; there are {', '.join(environment.tool_names())}")
            result = finished(getattr(environment, name)(**arguments))
        except FAULTS as error:
            return {"text": shown(f"error: {error}"), "failed": True}
        return {"text": shown(result), "failed": False}


def shown(value: Any) -> str:
    """Return `value` as the text that the model reads."""
    return whole_characters(str(value)[:LONGEST_RESULT])


def finished(value: Any) -> Any:
    """Return `value`; if it is awaitable, wait for its result and return that."""
    return asyncio.run(_awaited(value)) if inspect.isawaitable(value) else value


async def _awaited(value: Any) -> Any:
    return await value
