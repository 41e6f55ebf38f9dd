"""Scored completions, and the files of a run that hold them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dstune.core import files
from dstune.tasks.reinforcement.sampling import Completion

FOLDER = "rollouts"
"""Of a run directory: `step-000001.jsonl`, ..., a completion a line."""
OPTIONAL = ("prompt_ids", "read", "version")
"""Fields of a completion that most are without."""


@dataclass
class Scored:
    """A completion with what its rewards say."""

    completion: Completion
    text: str
    scores: list[float | None] = field(default_factory=list)
    """Of each of `task.reward_names`."""
    reward: float | None = None
    """The scores added up with their weights; None where there is none."""
    advantage: float = 0.0
    messages: list[dict[str, Any]] = field(default_factory=list)
    """Of a completion in an environment, its turns and what the tools said."""
    extra: dict[str, Any] = field(default_factory=dict)
    """What rewards logged about it."""
    calls: int = 0
    """Of tools."""
    failed_calls: int = 0

    @property
    def answer(self) -> Any:
        """What rewards get."""
        return self.messages or self.text


def record_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}.jsonl"


def write_records(
    folder: Path, step: int, completions: Iterable[Scored], rewards: Sequence[str], questions: Mapping[int, str]
) -> None:
    """Write the completions of a step, whole or not at all. questions: texts of prompts, beside the first completion of each."""
    folder.mkdir(exist_ok=True)
    lines = []
    for scored in completions:
        row = pack_scored(scored)
        scores = dict(zip(rewards, row.pop("scores"), strict=True))
        row |= {"rewards": scores, "reward": scored.reward, "advantage": scored.advantage}
        if not scored.completion.sample:
            row["question"] = questions.get(scored.completion.prompt, "")
        lines.append(json.dumps(row, ensure_ascii=False))
    # Half of a surrogate pair, as a reward may log it, is no character that a file can hold.
    files.write(record_path(folder, step), ("\n".join(lines) + "\n").encode("utf-8", "replace"))


def read_records(folder: Path, step: int) -> list[dict[str, Any]]:
    """Return the lines that were written of a step; none where there is no file. Raises OSError, and ValueError for a line that
    is no object of JSON."""
    try:
        # Of bytes: a text would also be parted at U+2028, which a completion may hold.
        lines = record_path(folder, step).read_bytes().splitlines()
    except FileNotFoundError:
        return []
    rows = [json.loads(line) for line in lines]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("a line is no object")
    return rows


def from_record(row: Mapping[str, Any], rewards: Sequence[str]) -> Scored | None:
    """Return a line of such a file, or None where it is of other rewards."""
    try:
        return unpack_scored({**row, "scores": [row["rewards"][name] for name in rewards]})
    except (KeyError, TypeError):
        return None


def pack_scored(scored: Scored) -> dict[str, Any]:
    """Return all but the advantage, as JSON; what is empty in most completions is left out where it is."""
    # Not `asdict`, which copies every token: a fifth of a small step.
    completion = {name: value for name, value in vars(scored.completion).items() if value or name not in OPTIONAL}
    row: dict[str, Any] = {**completion, "text": scored.text, "scores": list(scored.scores)}
    optional = {"messages": scored.messages, "extra": scored.extra, "calls": scored.calls}
    optional["failed_calls"] = scored.failed_calls
    return row | {name: value for name, value in optional.items() if value}


def unpack_scored(row: Mapping[str, Any]) -> Scored:
    """Return the inverse of `pack_scored`."""
    needed = {name: row[name] for name in ("prompt", "sample", "ids", "logps", "entropy", "ended")}
    optional = {name: row[name] for name in OPTIONAL if name in row}
    further = {name: row[name] for name in ("messages", "extra", "calls", "failed_calls") if name in row}
    return Scored(Completion(**needed, **optional), row["text"], list(row["scores"]), **further)


def place_of(completion: Completion) -> str:
    return f"{completion.prompt}/{completion.sample}"


def identity_of(completion: Completion) -> str:
    """Return a text of prompt, sample and tokens of a completion."""
    return f"{place_of(completion)}/{','.join(map(str, completion.ids))}"
