"""Rewards that compare a completion with the column `answer`: 1 where it is right, else 0."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from dstune.protocols import Reward, reward

_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|[-+]?\.\d+")
_BOX = r"\boxed{"


@reward
class ExactAnswer(Reward):
    """The completion is the answer, apart from white space at its ends and upper and lower case."""

    name = "exact_answer"
    columns = ("answer",)

    def __call__(
        self, prompts: Any, completions: Sequence[str], completion_ids: Any, **columns: Sequence[Any]
    ) -> list[float | None]:
        return [
            None if expected is None else float(completion.strip().casefold() == str(expected).strip().casefold())
            for completion, expected in zip(completions, columns["answer"], strict=True)
        ]


@reward
class Number(Reward):
    """The last number in the completion equals the last number in the answer (`1,000` and `1000.0` are equal)."""

    name = "number"
    columns = ("answer",)

    def __call__(
        self, prompts: Any, completions: Sequence[str], completion_ids: Any, **columns: Sequence[Any]
    ) -> list[float | None]:
        return [
            _score(last_number(completion), None if expected is None else last_number(str(expected)))
            for completion, expected in zip(completions, columns["answer"], strict=True)
        ]


@reward
class BoxedAnswer(Reward):
    r"""What the last `\boxed{...}` of the completion holds is the answer: equal as numbers, or as texts without white space."""

    name = "boxed_answer"
    columns = ("answer",)

    def __call__(
        self, prompts: Any, completions: Sequence[str], completion_ids: Any, **columns: Sequence[Any]
    ) -> list[float | None]:
        return [
            None if expected is None else float(_agrees(boxed(completion), str(expected)))
            for completion, expected in zip(completions, columns["answer"], strict=True)
        ]


def last_number(text: str) -> float | None:
    """Return the last number in `text`, or None."""
    numbers = _NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None


def boxed(text: str) -> str | None:
    r"""Return the content of the last `\boxed{...}` in `text`, with balanced braces; None where there is none."""
    start = text.rfind(_BOX)
    if start < 0:
        return None
    depth, begin = 1, start + len(_BOX)
    for position in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if not depth:
            return text[begin:position]
    return None


def _score(number: float | None, expected: float | None) -> float | None:
    if expected is None:
        return None
    return float(number is not None and math.isclose(number, expected, rel_tol=1e-9, abs_tol=1e-12))


def _agrees(content: str | None, expected: str) -> bool:
    if content is None:
        return False
    expected = inner if (inner := boxed(expected)) is not None else expected
    if _NUMBER.fullmatch(content.strip()) and _NUMBER.fullmatch(expected.strip()):
        return bool(_score(last_number(content), last_number(expected)))
    return re.sub(r"\s+", "", content) == re.sub(r"\s+", "", expected)
