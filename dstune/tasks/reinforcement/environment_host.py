"""Holds the environments in the child process, one for each completion."""

from __future__ import annotations

import asyncio
import inspect
import random
from collections.abc import Mapping, Sequence
from typing import Any

from dstune.core.parsing import whole_characters
from dstune.protocols import ENVIRONMENTS

LONGEST_RESULT = 100_000
"""Results of tools are cut off after this many characters."""


class EnvironmentHost:
    def __init__(self) -> None:
        self._instances: dict[str, Any] = {}
        self.name = ""
        """Name of the environments that currently exist."""

    def reset(self, name: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """Replace all environments by a new one for each of `rows` (key, seed, columns); return their first observations."""
        self._instances, self.name = {}, name
        observations = []
        for row in rows:
            environment = self._instances[row["key"]] = ENVIRONMENTS[name]()
            environment.random = random.Random(row["seed"])
            observation = finished(environment.reset(**row["columns"]))
            observations.append("" if observation is None else shown(observation))
        return observations

    def call(self, calls: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Run tool calls (key of the environment, name of the tool, arguments) one after the other; return their results."""
        return [self._call(**call) for call in calls]

    def rewards(self, keys: Sequence[str]) -> list[float | None]:
        rewards = [finished(self._instances[key].get_reward()) for key in keys]
        return [None if reward is None else float(reward) for reward in rewards]

    def instances(self, keys: Sequence[str]) -> list[Any]:
        return [self._instances[key] for key in keys]

    def _call(self, key: str, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        environment = self._instances[key]
        try:
            if name not in environment.tool_names():
                raise ValueError(f"there is no tool {name!r}; there are {', '.join(environment.tool_names())}")
            result = finished(getattr(environment, name)(**arguments))
        except Exception as error:
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
