"""Scored completions, and the files of a run that record them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dstune.core import files
from dstune.generation.completions import Completion

FOLDER = "rollouts"
"""Folder of a run directory: `step-000001.jsonl`, ..., one completion a line."""
OPTIONAL = ("prompt_ids", "read", "version")
"""Fields that most completions do not have."""


@dataclass
class Scored:
    """A completion with its scores."""

    completion: Completion
    text: str
    scores: list[float | None] = field(default_factory=list)
    """The score of each of `task.reward_names`; None for one that failed or does not apply."""
    reward: float | None = None
    """The weighted sum of the scores; None if there is none, or if a reward failed: the sum of the others measures less."""
    advantage: float = 0.0
    messages: list[dict[str, Any]] = field(default_factory=list)
    """In an environment: the turns of the completion, and the results of its tools."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Values that rewards logged for the completion, by column."""
    calls: int = 0
    """Number of tool calls."""
    failed_calls: int = 0
    failures: dict[str, str] = field(default_factory=dict)
    """Why rewards failed to score the completion, by name. A reward that returned None without failing is not among them."""

    replaced: bool = False
    """Whether its prompt was replaced with another one, since its completions all got the same reward: it does not train."""

    @property
    def answer(self) -> Any:
        """The answer that rewards score: the messages, or the text."""
        return self.messages or self.text


def record_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}.jsonl"


def write_records(
    folder: Path, step: int, completions: Iterable[Scored], rewards: Sequence[str], questions: Mapping[int, str]
) -> None:
    """Write the completions of a step, atomically. questions: texts of prompts, written with the first completion of each."""
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
    """Return the records of a step; empty if there is no file. Raises OSError, and ValueError for a line that is no JSON object."""
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
    """Return the completion in a record, or None if it was scored by other rewards."""
    try:
        return unpack_scored({**row, "scores": [row["rewards"][name] for name in rewards]})
    except (KeyError, TypeError):
        return None


def pack_scored(scored: Scored) -> dict[str, Any]:
    """Return the completion as JSON, without its advantage and without empty optional fields."""
    # Not `asdict`, which copies every token: a fifth of a small step.
    completion = {name: value for name, value in vars(scored.completion).items() if value or name not in OPTIONAL}
    row: dict[str, Any] = {**completion, "text": scored.text, "scores": list(scored.scores)}
    optional = {"messages": scored.messages, "extra": scored.extra, "calls": scored.calls}
    optional |= {"failed_calls": scored.failed_calls, "failures": scored.failures, "replaced": scored.replaced}
    return row | {name: value for name, value in optional.items() if value}


def unpack_scored(row: Mapping[str, Any]) -> Scored:
    """Build the completion that `pack_scored` packed."""
    needed = {name: row[name] for name in ("prompt", "sample", "ids", "logps", "entropy", "ended")}
    optional = {name: row[name] for name in OPTIONAL if name in row}
    names = ("messages", "extra", "calls", "failed_calls", "failures", "replaced")
    further = {name: row[name] for name in names if name in row}
    return Scored(Completion(**needed, **optional), row["text"], list(row["scores"]), **further)


def place_of(completion: Completion) -> str:
    return f"{completion.prompt}/{completion.sample}"


def identity_of(completion: Completion) -> str:
    """Return a text that identifies a completion by prompt, sample and tokens."""
    return f"{place_of(completion)}/{','.join(map(str, completion.ids))}"
