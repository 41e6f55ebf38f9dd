"""Collects the answers to held-out prompts before and after training, of one run or several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from dstune.report.run_files import RunFiles

MAX_PROMPTS = 20


@dataclass
class Answered:
    """One prompt and the answers to it."""

    prompt: str
    reference: str = ""
    answers: list[tuple[str, int, str]] = field(default_factory=list)
    """(label, number of the run, text): `before`, `after`, or the run's name."""


def answered(runs: Sequence[RunFiles], labels: Sequence[str]) -> list[Answered]:
    """Return the prompts in order with their answers. One run: its first and last answer. Several runs: the first answer of the
    first run, and the last answer of each."""
    entry_by_prompt: dict[str, Answered] = {}
    for number, (run, label) in enumerate(zip(runs, labels, strict=True)):
        by_prompt: dict[str, list[dict]] = {}
        for row in sorted(run.samples, key=lambda row: row["step"]):
            by_prompt.setdefault(str(row.get("prompt", "")), []).append(row)
        for prompt, rows in by_prompt.items():
            new = prompt not in entry_by_prompt
            entry = entry_by_prompt.setdefault(prompt, Answered(prompt, str(rows[-1].get("reference") or "")))
            first, last = rows[0], rows[-1]
            if new and (first["step"] == 0 or first is not last):
                entry.answers.append(_answer("before", number if len(runs) == 1 else -1, first))
            if last is not first or last["step"] > 0:
                entry.answers.append(_answer("after" if len(runs) == 1 else label, number, last))
    return list(entry_by_prompt.values())[:MAX_PROMPTS]


def _answer(label: str, run: int, row: dict) -> tuple[str, int, str]:
    return (label, run, str(row.get("answer") or ""))
