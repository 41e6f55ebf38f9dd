"""Holds the environments in the child process, one for each completion."""

from __future__ import annotations

import asyncio
import inspect
import math
import queue
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from dstune.core.parsing import whole_characters
from dstune.protocols import ENVIRONMENTS
from dstune.tasks.reinforcement.outages import Failure

LONGEST_RESULT = 100_000
"""Results of tools are cut off after this many characters."""


FAULTS = (Exception, SystemExit, asyncio.CancelledError)
"""What the code of an environment may raise without ending the process, and so all other episodes."""
ENDED = "its environment has ended with the process that held it"

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(
    function: Callable[[Item], Result], items: Sequence[Item], threads: int, seconds: float = math.inf
) -> list[Result | None]:
    """Return the result of `function` for each of `items`, computed in up to `threads` threads; None for one that takes longer than
    `seconds`. Its thread goes on, since Python cannot end it. With one thread, that is the caller's, and nothing ends it."""
    if threads < 2:
        return [function(item) for item in items]
    results: dict[int, Result] = {}
    began: dict[int, float] = {}
    ends: queue.SimpleQueue[int] = queue.SimpleQueue()

    def run(number: int) -> None:
        try:
            results[number] = function(items[number])
        finally:
            ends.put(number)

    waiting, running = [*reversed(range(len(items)))], set[int]()
    while waiting or running:
        while waiting and len(running) < threads:
            number = waiting.pop()
            running.add(number)
            began[number] = time.monotonic()
            threading.Thread(target=run, args=[number], name=f"environment {number}", daemon=True).start()
        first_end = min(began[number] for number in running) + seconds
        with suppress(queue.Empty):
            running.discard(ends.get(timeout=None if math.isinf(first_end) else max(0.0, first_end - time.monotonic())))
        running -= {number for number in running if time.monotonic() - began[number] >= seconds}
    return [results.get(number) for number in range(len(items))]


class EnvironmentHost:
    def __init__(self) -> None:
        self._instances: dict[str, Any] = {}
        self.name = ""
        """Name of the environments that currently exist."""

    def reset(self, name: str, rows: Sequence[Mapping[str, Any]], *, again: bool = False) -> list[dict[str, Any]]:
        """Create an environment for each of `rows` (key, seed, columns), in the place of all others, or if `again` beside them.
        Return for each its first observation (`text`), or why it could not be reset (`failure`, `may_pass`)."""
        self._instances, self.name = self._instances if again else {}, name
        unset = {"text": "", "failure": ENDED, "may_pass": False}
        return [each or unset for each in in_threads(lambda row: self._reset(**row), rows, self._threads)]

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

    @property
    def _threads(self) -> int:
        return ENVIRONMENTS[self.name].at_once if self.name else 1

    def call(self, calls: Sequence[Mapping[str, Any]], seconds: float) -> list[dict[str, Any]]:
        """Run tool calls (key of the environment, name of the tool, arguments); return their results. Those of one environment run
        one after the other, and are lost if they take longer than `seconds`; those of several run at the same time."""
        numbers: dict[str, list[int]] = {}
        for number, call in enumerate(calls):
            numbers.setdefault(call["key"], []).append(number)
        late = {"lost": f"its calls took longer than {seconds:g} s (task.environment_seconds)"}

        def call_in_turn(of_one: Sequence[int]) -> list[dict[str, Any]]:
            return [self._call(**calls[number]) for number in of_one]

        groups = [*numbers.values()]
        results = [late] * len(calls)
        for group, answers in zip(groups, in_threads(call_in_turn, groups, self._threads, seconds), strict=True):
            if answers is None:
                del self._instances[calls[group[0]]["key"]]  # a thread still uses it
            for number, answer in zip(group, answers or (), strict=answers is not None):
                results[number] = answer
        return results

    def rewards(self, keys: Sequence[str]) -> list[float | Failure | None]:
        """Return what `get_reward` of each environment returns, or why it failed."""
        return in_threads(self._reward, keys, self._threads)

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
