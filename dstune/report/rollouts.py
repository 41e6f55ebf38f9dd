"""Shows how a model's own answers changed in training: some steps, each with a prompt, its best answer and its worst; and some
answers of the last step by their reward.

On-policy distillation scores no answers, so it gets one answer per step.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dstune.core.parsing import METRICS_BYTES, parse_json, read_file
from dstune.report.run_files import ROLLOUTS

SHOWN_STEPS = 6
SHOWN_ANSWERS = 5
SHOWN_TURNS = 40
LONGEST_TEXT = 1500
"""Longest part of a prompt or an answer that is shown, in characters."""
_FILE = re.compile(r"step-(\d{1,12})\.jsonl")


@dataclass(frozen=True)
class Turn:
    """What the model or a tool said in an environment."""

    speaker: str
    """`model`, or the name of a tool."""
    text: str
    calls: list[str] = field(default_factory=list)
    """The calls of the model, each with its arguments."""


@dataclass(frozen=True)
class Answer:
    label: str
    """`best` or `worst`; `answer` if nothing is scored."""
    text: str
    rewards: list[tuple[str, str]]
    """Name and formatted score of each reward."""
    ended: bool
    turns: list[Turn] = field(default_factory=list)
    """Its turns in an environment; empty for a single answer."""
    prompt: str = ""
    """Empty where it is shown beside the prompt."""


@dataclass(frozen=True)
class Episode:
    """A step with one of its prompts."""

    step: int
    reward: str
    """Mean over the step, formatted; empty if nothing is scored."""
    completions: int
    prompt: str
    answers: list[Answer]


def story(run: Path) -> list[Episode]:
    """Return evenly spaced steps of a run, among them the first and the last; empty if the run saved no completions."""
    folder = run / ROLLOUTS
    if not folder.is_dir():
        return []
    files = {int(match[1]): file for file in folder.iterdir() if (match := _FILE.fullmatch(file.name))}
    steps = sorted(files)
    last = len(steps) - 1
    chosen = sorted({round(number * last / (SHOWN_STEPS - 1)) for number in range(SHOWN_STEPS)}) if steps else []
    episodes = [_episode(steps[number], files[steps[number]]) for number in chosen]
    return [episode for episode in episodes if episode is not None]


def by_reward(run: Path) -> tuple[int, list[Answer]]:
    """Return the last step whose answers are scored, and some of its answers from the highest reward to the lowest; 0 and none if
    there is no such step."""
    folder = run / ROLLOUTS
    files = sorted(folder.iterdir(), reverse=True) if folder.is_dir() else []
    for file in files:
        if (match := _FILE.fullmatch(file.name)) is None:
            continue
        rows = _rows(file)
        ordered = sorted((row for row in rows if math.isfinite(_total(row))), key=_total, reverse=True)
        if not ordered:
            return 0, []
        questions = {row["prompt"]: str(row["question"]) for row in rows if row.get("question")}
        last = len(ordered) - 1
        chosen = sorted({round(number * last / (SHOWN_ANSWERS - 1)) for number in range(SHOWN_ANSWERS)})
        answers = [_answer(f"{_total(row):.3g}", row) for row in (ordered[number] for number in chosen)]
        prompts = [questions.get(ordered[number]["prompt"], f"prompt {ordered[number]['prompt']}") for number in chosen]
        return int(match[1]), [
            replace(answer, prompt=_cut(prompt)) for answer, prompt in zip(answers, prompts, strict=True)
        ]
    return 0, []


def _rows(file: Path) -> list[dict[str, Any]]:
    rows = [parse_json(line) for line in read_file(file, METRICS_BYTES).splitlines() if line.strip()]
    return [row for row in rows if isinstance(row, dict)]


def _episode(step: int, file: Path) -> Episode | None:
    rows = _rows(file)
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["prompt"], []).append(row)
    if not groups:
        return None
    scored = [total for row in rows if math.isfinite(total := _total(row))]
    group = max(groups.values(), key=_spread)
    ordered = sorted((row for row in group if math.isfinite(_total(row))), key=_total, reverse=True) or group
    is_scored = any("rewards" in row for row in rows)
    answers = [_answer("best" if is_scored else "answer", ordered[0])]
    if len(ordered) > 1 and _total(ordered[-1]) < _total(ordered[0]):
        answers.append(_answer("worst", ordered[-1]))
    question = next((str(row["question"]) for row in group if row.get("question")), f"prompt {group[0]['prompt']}")
    mean = f"{sum(scored) / len(scored):.3f}" if scored else "none" if is_scored else ""
    return Episode(step, mean, len(rows), _cut(question), answers)


def _spread(group: list[dict[str, Any]]) -> float:
    totals = [total for row in group if math.isfinite(total := _total(row))]
    return max(totals) - min(totals) if totals else -1.0


def _total(row: dict[str, Any]) -> float:
    """Return the total reward of an answer, as training added it up; NaN if no reward could score it."""
    value = row.get("reward")
    if isinstance(value, int | float):
        return float(value)
    if row.get("failures"):  # the other rewards alone measure less
        return math.nan
    scores = [float(score) for score in row.get("rewards", {}).values() if score is not None]
    return sum(scores) if scores else math.nan


def _answer(label: str, row: dict[str, Any]) -> Answer:
    rewards = [
        (str(name), "none" if score is None else f"{float(score):.3g}")
        for name, score in row.get("rewards", {}).items()
    ]
    return Answer(label, _cut(str(row["text"])), rewards, bool(row["ended"]), _turns(row))


def _turns(row: dict[str, Any]) -> list[Turn]:
    """Return the turns of an answer that has several."""
    messages = row.get("messages")
    if not isinstance(messages, list) or len(messages) < 2:
        return []
    turns = []
    for message in messages:
        calls = [
            f"{call['function']['name']}({call['function']['arguments']})" for call in message.get("tool_calls") or []
        ]
        speaker = "model" if message["role"] == "assistant" else str(message.get("name") or message["role"])
        turns.append(Turn(speaker, _cut(str(message["content"] or "")), [_cut(call) for call in calls]))
    if len(turns) > SHOWN_TURNS:
        left_out = Turn("", f"{len(turns) - SHOWN_TURNS} turns are left out")
        turns = [*turns[: SHOWN_TURNS // 2], left_out, *turns[-SHOWN_TURNS // 2 :]]
    return turns


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} …"
