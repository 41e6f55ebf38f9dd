"""Report what each cleaning step did: counts and a few examples, for `data_report.json`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dstune.data.clean.cleaner import STEPS

MAX_EXAMPLES = 3

KINDS = ("removed", "changed", "flagged")

NAMES = {
    "unicode": "Unicode",
    "control_tokens": "control tokens",
    "secrets": "secrets",
    "personal_data": "personal data",
    "refusals": "answers that refuse",
    "toxicity": "toxic answers",
    "empty": "empty",
    "too_short": "too short",
    "too_long": "too long",
    "languages": "other languages",
    "duplicates": "duplicates",
    "near_duplicates": "near duplicates",
    "leaks": "in validation or test",
}


class Report:
    """The rows of one part that each step removed, changed or flagged.

    steps: the configured steps; they appear in the report even if they found nothing.
    """

    def __init__(self, steps: Iterable[str]):
        self.counts = {step: dict.fromkeys(KINDS, 0) for step in steps}
        self.examples: dict[str, list[dict[str, str]]] = {}

    def add(self, step: str, kind: str, number: int = 1) -> None:
        self.counts[step][kind] += number

    def wants_example(self, step: str) -> bool:
        return len(self.examples.get(step, [])) < MAX_EXAMPLES

    def example(self, step: str, place: str, text: str, note: str = "") -> None:
        """Add a row as an example: its place and the beginning of its text; `note` says what the step found."""
        example_text = f"{note}: {text}" if note else text
        self.examples.setdefault(step, []).append({"place": place, "text": example_text})

    def to_dict(self) -> dict[str, Any]:
        steps = [step for step in STEPS if step in self.counts]
        return {
            "clean": {step: self.counts[step] for step in steps},
            "examples": {step: self.examples[step] for step in steps if step in self.examples},
        }


def summary(counts: dict[str, dict[str, int]]) -> str:
    """Return one line that says what the steps removed, changed and flagged; empty if they did nothing.

    counts: the field `clean` of one part in the data report. Example: `left out 60 duplicates, 3 too short; changed 2 Unicode`.
    """
    words = {"removed": "left out", "changed": "changed", "flagged": "flagged"}
    phrases = []
    for kind in KINDS:
        steps = [f"{counted[kind]:,} {NAMES[step]}" for step, counted in counts.items() if counted[kind]]
        if steps:
            phrases.append(f"{words[kind]} {', '.join(steps)}")
    return "; ".join(phrases)
