"""Rewards that run what the model wrote, in the sandbox."""

from __future__ import annotations

import ast
import json
import logging
import math
import re
import secrets
import textwrap
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from markdown_it import MarkdownIt

from dstune.core.confinement.table import PROGRAM, Limits
from dstune.grading.sandbox import AT_ONCE, run_program
from dstune.protocols import Reward, reward

log = logging.getLogger(__name__)

MOST_TESTS = 100
_BEHIND_TEXT = re.compile(
    r"(?<=\S)[ \t]*(?=(?:```+|~~~+)[ \t]*(?:python|py)[\d.]*[ \t]*$)", re.IGNORECASE | re.MULTILINE
)
"""Where a Python block begins on a line that has text before it, which Markdown does not know."""
_PYTHON = re.compile(r"\{?\s*\.?(?:python|py)[\d.]*(?:$|[\s,:{}])", re.IGNORECASE)
"""The language of a block, as in `python3`, `py`, `{.python}` and `python title="a.py"`."""
_BLOCKS = MarkdownIt("commonmark").disable("inline")


@reward
class CodeTests(Reward):
    """The share of the column `tests` that the completion's last Python block passes: a list of `{"input": ..., "output": ...}`,
    what a program reads and has to print, or a text of Python with assertions that stands behind the block and passes or not.

    A completion can only pass an input by printing its output. It runs in one process with assertions, so that it might pass them
    in ways that nobody meant. Its tests end with the first that runs out of time; those that were not run count as failed.
    """

    name = "code_tests"
    reads_texts = True
    columns = ("tests",)
    runs_programs = True
    checks_rows = True

    @classmethod
    def row_problem(cls, columns: Mapping[str, Any]) -> str | None:
        """Return why the tests of a row cannot be run; None if they can, or if it has none."""
        try:
            tests_of(columns.get("tests"))
        except ValueError as error:
            return str(error)
        return None

    def __call__(
        self, prompts: Any, completions: Sequence[str], completion_ids: Any, **columns: Sequence[Any]
    ) -> list[float | None]:
        limits = self.limits or replace(PROGRAM, seconds=10.0)
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
    try:
        checked = tests_of(tests)
    except ValueError:
        return None
    if checked is None:
        return None
    if isinstance(checked, str):
        mark = secrets.token_hex(16)
        program = f"{code}\n\n{checked}\n\nprint({mark!r})\n"
        outcome = run_program(program, "", limits)
        return float(not outcome.failure and outcome.output.rstrip().endswith(mark))
    cases = checked[:MOST_TESTS]
    count, deadline = 0, time.monotonic() + seconds
    for read, expected in cases:
        outcome = run_program(code, read, limits)
        count += not outcome.failure and same_output(outcome.output, expected)
        if outcome.is_out_of_time or time.monotonic() > deadline:
            break
    return count / len(cases)


def tests_of(tests: Any) -> list[tuple[str, str]] | str | None:
    """Return tests as pairs of an input and an output, or as Python with assertions; None if there are none.

    tests: the column of a row. A list may be JSON text, as tables store it.

    Raises:
        ValueError: a test has no output, or one that is neither a text nor a whole number; or the text is neither a list nor
            Python.
    """
    if isinstance(tests, str) and tests.strip():
        try:
            tests = json.loads(tests)
        except ValueError:
            return _assertions(str(tests))
    if tests is None or tests == [] or (isinstance(tests, str) and not tests.strip()):
        return None
    if not isinstance(tests, Sequence) or isinstance(tests, str):
        raise ValueError("tests is neither a list nor a text of Python with assertions")
    return [_case(number, test) for number, test in enumerate(tests)]


def _assertions(text: str) -> str:
    try:
        ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"tests is neither a list nor Python: {error}") from None
    return text


def _case(number: int, test: Any) -> tuple[str, str]:
    place = f"tests[{number}]"
    if not isinstance(test, Mapping):
        raise ValueError(f"{place} is no object with input and output")
    stored = {key: value for key, value in test.items() if value is not None}
    if "output" not in stored:
        raise ValueError(f"{place} has no output (its keys: {', '.join(map(str, test))})")
    if "input" not in stored and stored.keys() - {"output"}:
        raise ValueError(f"{place} has no input (its keys: {', '.join(map(str, test))})")
    for key in ("input", "output"):
        value = stored.get(key, "")
        if isinstance(value, bool) or not isinstance(value, str | int):
            kind = type(value).__name__
            raise ValueError(f"{place}.{key} is a {kind}; write what the program reads or prints as a text")
    return str(stored.get("input", "")), str(stored["output"])


def code_of(completion: str) -> str:
    """Return the last Python block of a completion in Markdown, or if none is marked as Python the last block without a language,
    or if there is none the whole completion."""
    blocks = _fences(_BEHIND_TEXT.sub("\n", completion)) or _fences(textwrap.dedent(completion))
    python = [content for language, content in blocks if _PYTHON.match(language)]
    unmarked = [content for language, content in blocks if not language]
    return (python or unmarked or [completion])[-1]


def _fences(text: str) -> list[tuple[str, str]]:
    """Return the language and the content of each fenced block; also of those in an indented block."""
    blocks = []
    for token in _BLOCKS.parse(text):
        if token.type == "fence":
            blocks.append((token.info.strip(), textwrap.dedent(token.content)))
        elif token.type == "code_block" and token.content.lstrip().startswith(("```", "~~~")):
            blocks += _fences(textwrap.dedent(token.content).lstrip())
    return blocks


def same_output(printed: str, expected: str) -> bool:
    """Return whether the lines are the same, apart from white space at their ends and behind the last one."""
    return [line.rstrip() for line in printed.rstrip().splitlines()] == [
        line.rstrip() for line in expected.rstrip().splitlines()
    ]
