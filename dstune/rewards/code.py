"""Rewards that run what the model wrote, in the sandbox."""

from __future__ import annotations

import logging
import math
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dstune.grading.sandbox import AT_ONCE, Limits, run_program
from dstune.protocols import Reward, reward

log = logging.getLogger(__name__)

MOST_TESTS = 100
_FENCED = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)


@reward
class CodeTests(Reward):
    """The share of the column `tests` that the completion's last Python block passes: a list of `{"input": ..., "output": ...}`,
    what a program reads and has to print, or a text of Python with assertions that stands behind the block and passes or not.

    A completion can only pass an input by printing its output. It runs in one process with assertions, so that it might pass them
    in ways that nobody meant. Its tests end with the first that runs out of time; those that were not run count as failed.
    """

    name = "code_tests"
    columns = ("tests",)
    runs_programs = True

    def __call__(
        self, prompts: Any, completions: Sequence[str], completion_ids: Any, **columns: Sequence[Any]
    ) -> list[float | None]:
        limits = self.limits or Limits(seconds=10.0)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(
                pool.map(lambda text, tests: judged(text, tests, limits, self.seconds), completions, columns["tests"])
            )


def judged(completion: str, tests: Any, limits: Limits, seconds: float) -> float | None:
    """Return what `passed` does; None if the judge itself fails, so that the other completions keep their scores."""
    try:
        return passed(completion, tests, limits, seconds)
    except Exception as error:
        log.warning("a completion has no score of its tests: %s: %s", type(error).__name__, error)
        return None


def passed(completion: str, tests: Any, limits: Limits, seconds: float = math.inf) -> float | None:
    """Return the share of tests that a completion passes; None where there is none. seconds: in which its tests begin."""
    code = code_of(completion)
    if isinstance(tests, str) and tests.strip():
        mark = secrets.token_hex(16)
        program = f"{code}\n\n{tests}\n\nprint({mark!r})\n"
        outcome = run_program(program, "", limits)
        return float(not outcome.failure and outcome.output.rstrip().endswith(mark))
    if not isinstance(tests, Sequence) or isinstance(tests, str) or not tests:
        return None
    cases = [test for test in tests if isinstance(test, Mapping)][:MOST_TESTS]
    count, deadline = 0, time.monotonic() + seconds
    for case in cases:
        outcome = run_program(code, str(case.get("input") or ""), limits)
        count += not outcome.failure and same_output(outcome.output, str(case.get("output") or ""))
        if outcome.is_out_of_time or time.monotonic() > deadline:
            break
    return count / len(cases) if cases else None


def code_of(completion: str) -> str:
    """Return the last fenced block of a completion, or the whole of it."""
    blocks = _FENCED.findall(completion)
    return blocks[-1] if blocks else completion


def same_output(printed: str, expected: str) -> bool:
    """Return whether the lines are the same, apart from white space at their ends and behind the last one."""
    return [line.rstrip() for line in printed.rstrip().splitlines()] == [
        line.rstrip() for line in expected.rstrip().splitlines()
    ]
