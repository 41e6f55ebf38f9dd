"""Rewards that compare a completion with the column `answer`: 1 where it is right, else 0."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from dstune.protocols import Reward, reward

_NUMBER = re.compile(
    r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d{1,3}(?!\d))?(?:\s?/\s?\d+(?![\d.]))?|[-+]?\.\d+"
)
_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}")
_TUPLE = re.compile(r"[(\[{]\s*([^()\[\]{}]*?)\s*[)\]}]\W*\Z")
_LONGEST_NUMBER = 1000
"""Limit of characters: longer ones are not compared as numbers."""
_SECONDS = 2
"""Time limit for reading, and for comparing, one formula."""
_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf|textit|operatorname)\s*\{([^{}]*)\}")
_BOX = r"\boxed{"


@reward
class ExactAnswer(Reward):
    """The completion is the answer, apart from white space at its ends and upper and lower case."""

    name = "exact_answer"
    reads_texts = True
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
    """The last number in the completion equals the last number in the answer (`1,000` and `1000.0` are equal, `1/2` and `0.5` too).
    If the answer ends with several numbers in brackets, such as `(1, 2)`, all of them have to be equal."""

    name = "number"
    reads_texts = True
    columns = ("answer",)

    def __call__(
        self, prompts: Any, completions: Sequence[str], completion_ids: Any, **columns: Sequence[Any]
    ) -> list[float | None]:
        return [
            _score(_last_numbers(completion), None if expected is None else _last_numbers(str(expected)))
            for completion, expected in zip(completions, columns["answer"], strict=True)
        ]


@reward
class BoxedAnswer(Reward):
    r"""What the last `\boxed{...}` of the completion holds is the answer: equal in mathematics (by math-verify), or as texts
    without white space."""

    name = "boxed_answer"
    reads_texts = True
    columns = ("answer",)
    package = "math_verify"

    def __call__(
        self, prompts: Any, completions: Sequence[str], completion_ids: Any, **columns: Sequence[Any]
    ) -> list[float | None]:
        return [
            None if expected is None else float(_agrees(boxed(completion), str(expected)))
            for completion, expected in zip(completions, columns["answer"], strict=True)
        ]


def last_number(text: str) -> Fraction | None:
    """Return the last number in `text`, or None."""
    numbers = _NUMBER.findall(_FRACTION.sub(r"\1/\2", text))
    return _exact(numbers[-1]) if numbers else None


def _last_numbers(text: str) -> tuple[Fraction | None, ...]:
    """Return the numbers of the brackets at the end of `text` if there are several, otherwise its last number."""
    text = _FRACTION.sub(r"\1/\2", text)
    brackets = _TUPLE.search(text[-_LONGEST_NUMBER:])
    if brackets is not None:
        parts = [part.strip() for part in re.split(r"[,;]\s+|;", brackets[1])]
        if len(parts) == 1 and not re.fullmatch(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?", parts[0]):
            parts = [part.strip() for part in parts[0].split(",")]
        if len(parts) > 1 and all(_NUMBER.fullmatch(part) for part in parts):
            return tuple(_exact(part) for part in parts)
    return (last_number(text),)


def _exact(number: str) -> Fraction | None:
    top, _, bottom = re.sub(r"[,\s]", "", number[: _LONGEST_NUMBER + 1]).partition("/")
    if len(number) > _LONGEST_NUMBER or (bottom and not int(bottom)):
        return None
    return Fraction(top) / Fraction(bottom or 1)


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


def _score(numbers: tuple[Fraction | None, ...] | None, expected: tuple[Fraction | None, ...] | None) -> float | None:
    if expected is None or None in expected:
        return None
    return float(numbers is not None and len(numbers) == len(expected) and all(map(_are_equal, numbers, expected)))


def _are_equal(number: Fraction | None, expected: Fraction | None) -> bool:
    """Return whether two numbers are equal: whole ones exactly, decimals to nine digits."""
    if number is None or expected is None or number == expected:
        return number is not None and number == expected
    is_whole = number.denominator == expected.denominator == 1
    return not is_whole and abs(number - expected) <= Fraction(1, 10**9) * max(abs(number), abs(expected))


def _agrees(content: str | None, expected: str) -> bool:
    if content is None:
        return False
    expected = inner if (inner := boxed(expected)) is not None else expected
    if _NUMBER.fullmatch(content.strip()) and _NUMBER.fullmatch(expected.strip()):
        return _are_equal(last_number(content), last_number(expected))
    return _plain(content) == _plain(expected) or _are_equal_formulas(content, expected)


def _plain(formula: str) -> str:
    """Return a formula without white space, and the text of its LaTeX texts in lower case."""
    formula = _TEXT.sub(lambda match: match[1].casefold(), formula.strip().strip("$"))
    return re.sub(r"\s+|\\[!,;: ]", "", formula).rstrip(".")


def _are_equal_formulas(content: str, expected: str) -> bool:
    """Return whether math-verify reads both as the same."""
    from math_verify import parse, verify

    if max(len(content), len(expected)) > _LONGEST_NUMBER:
        return False
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    # Its time limits are signals, which only the main thread gets.
    seconds = _SECONDS if threading.current_thread() is threading.main_thread() else None
    read = [parse(f"\\boxed{{{text.strip().strip('$')}}}", parsing_timeout=seconds) for text in (expected, content)]
    return bool(all(read) and verify(*read, timeout_seconds=seconds))
