"""Rows of every kind that a run has, kept beside its samples, and their proof before the first step."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np

from dstune.core.errors import Problem, UserError
from dstune.data.chat.proof import Server, difference
from dstune.data.message import REASONING_KEYS
from dstune.data.stopping import stop_token_ids

FILE = "train.evidence.json"

ROWS_AT_ONCE = 2000
MOST_KINDS = 200
"""Arguments of a row are a part of its kind, and may be others in each."""
LONGEST_ROW = 100_000
"""Characters of the longest row that is kept: rendering it again before each run takes time."""

KINDS = ('"tools"', '"tool_calls"', '"reasoning', '"thinking"', "</think>", '"system"', '"tool"', '"weight"')
"""Strings in a row (JSON text) that tell its kind; how often the assistant speaks and the arguments are told beside."""


_CONVERSATION, _ROLE = '"messages":[{"content":"', '","role":"'
"""In a row (JSON text, the keys of a message in order): the first message, and what stands in front of its role."""

REASONING = ('"reasoning', '"thinking"', "</think>")
"""Strings without which a row (JSON text) has no reasoning."""

TRAINED = ("messages", "chosen", "rejected", "completion", "target")
"""Keys of a row under which the assistant speaks and is trained: messages, or a text."""


@dataclass(frozen=True)
class Proof:
    """What was proven of a run's conversations."""

    turns: int = 0
    """Compared with what a server renders."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Of the chat template, where all conversations have the same: what a server has to give it."""
    note: str = ""
    """What is to be told."""


class Exchange(NamedTuple):
    """A conversation of a row, and the columns of its sample."""

    row: dict[str, Any]
    """`messages`, `tools`, `chat_template_kwargs`."""
    prefix: str = ""
    """Of the columns: `rejected_` of a pair's worse answer."""
    sample: int | None = None
    """Which of the row's samples it is, where each conversation has its own."""


def keep(
    rows: datasets.Dataset, numbers: np.ndarray, truncated: np.ndarray, sources: np.ndarray | None, target: Path
) -> None:
    """Write a row of every kind, and a long one, with the places of their samples.

    rows: columns `row` and `number`. numbers: the row of each sample that is kept; truncated: rows of which a part is not.
    sources: of each row, the number of its source in a mixture.
    """
    whole = np.setdiff1d(numbers, truncated)
    kept: dict[str, tuple[str, int]] = {}
    longest: tuple[str, int] | None = None
    counts = dict.fromkeys(("thinking", "mixed", "thinking_last", "opened"), 0)
    for batch in rows.iter(batch_size=ROWS_AT_ONCE):
        places = np.searchsorted(whole, batch["number"])
        for text, number, place in zip(batch["row"], batch["number"], places, strict=True):
            counts["opened"] += _is_opened(text)
            if thought := _reasoning_of_turns(text):
                counts["thinking"] += any(thought)
                counts["mixed"] += any(thought) and not all(thought)
                counts["thinking_last"] += thought[-1]
            if place == len(whole) or whole[place] != number:
                continue
            kind = _kind(text)
            if kind not in kept and len(kept) < MOST_KINDS:
                kept[kind] = text, number
            if len(longest[0] if longest else "") < len(text) <= LONGEST_ROW:
                longest = text, number
    chosen = [*kept.values(), *([longest] if longest else [])]
    found = [_entry(text, number, numbers, sources) for text, number in chosen]
    target.write_text(json.dumps({"rows": found, **counts, "of": len(rows)}), encoding="utf-8")


def _is_opened(text: str) -> bool:
    """Whether the assistant begins the conversation of a row. Inside of strings quotes are escaped, so nobody can write it."""
    start = text.find(_CONVERSATION)
    return start >= 0 and text.startswith(f'{_ROLE}assistant"', text.find(_ROLE, start))


def _reasoning_of_turns(text: str) -> list[bool]:
    """Whether the assistant thinks in each turn of a row (JSON text) that is trained; empty where no turn can have reasoning."""
    if not any(mark in text for mark in REASONING):
        return []
    row = json.loads(text)
    given = {key: row[key] for key in TRAINED if key in row}
    turns = [
        message
        for key, value in given.items()
        for at, message in enumerate(value if isinstance(value, list) else [{"role": "assistant", "content": value}])
        if message["role"] == "assistant" and message.get("weight", 1) and (at or key != "messages")
    ]
    return [_is_thought(message) for message in turns]


def _is_thought(message: Mapping[str, Any]) -> bool:
    before, ended, _ = str(message.get("content") or "").partition("</think>")
    fields = [message.get(key) for key in REASONING_KEYS]
    return any(str(text or "").strip() for text in (*fields, before.replace("<think>", "") if ended else ""))


def _entry(text: str, number: int, numbers: np.ndarray, sources: np.ndarray | None) -> dict[str, Any]:
    places = np.flatnonzero(numbers == number).tolist()
    source = 0 if sources is None else int(sources[number])
    return {"row": json.loads(text), "number": number, "source": source, "samples": places}


def _kind(text: str) -> str:
    turns = text.count('"assistant"')
    arguments = text.partition('"chat_template_kwargs":')[2][:80]
    return " ".join([*(kind for kind in KINDS if kind in text), str(min(turns, 2)), arguments])


def prove(tokenizer: Any, encode: Any, table: datasets.Dataset, file: Path) -> Proof:
    """Compare the samples of the rows in `file` with what a server renders.

    encode: the `RowTokenizer` of the run. Raises UserError with the first turn that is trained otherwise.
    """
    kept = json.loads(file.read_text(encoding="utf-8"))
    arguments: dict[str, Any] = {}
    notes: dict[str, None] = {}
    stops: frozenset[int] = frozenset()
    compared = 0
    if kept["opened"]:
        notes[
            f"{kept['opened']:,} of {kept['of']:,} conversations begin with the assistant: what it says there answers nothing "
            "and is context"
        ] = None
    for entry in kept["rows"]:
        own = encode.of_source(entry["source"])
        renderer = own.renderer
        if renderer is None:
            continue
        stops = stops or frozenset(stop_token_ids(tokenizer, renderer.run_arguments))  # the run's, whatever the source
        server = Server(tokenizer, stops, renderer.date, renderer.run_arguments, renderer.facts)
        arguments |= renderer.run_arguments
        switch = renderer.facts.switch
        if switch is not None:
            thinking, mixed = kept["thinking"], kept.get("mixed", 0)
            if renderer.choice.drop_reasoning:
                thinking, mixed = 0, 0
            elif renderer.choice.turns == "last":
                thinking, mixed = kept.get("thinking_last", thinking), 0
            if thinking in (0, kept["of"]) and not mixed:
                arguments.setdefault(switch, bool(thinking))
            else:
                notes[
                    f"{thinking:,} of {kept['of']:,} rows have reasoning: turns with it are trained with {switch}=true, those "
                    f"without with {switch}=false"
                ] = None
        exchanges = own.exchanges(entry["row"])
        if exchanges[0].sample is not None and len(entry["samples"]) != len(exchanges):
            continue  # one of them teaches nothing and is left out
        for exchange in exchanges:
            if renderer.holds_control_tokens(exchange.row):
                continue  # transformers would make control tokens of what somebody wrote
            places = entry["samples"] if exchange.sample is None else [entry["samples"][exchange.sample]]
            samples = [_columns(table[place], exchange.prefix) for place in places]
            row = {**exchange.row, "messages": renderer.expected(exchange.row["messages"])}
            reason, count = _compared(server, row, samples, own, stops)
            compared += count
            if reason is not None:
                raise UserError(
                    Problem(
                        "data.train",
                        f"a row is not trained as a server would render it: {reason} (row {entry['number']}: "
                        f"{json.dumps(row['messages'], ensure_ascii=False)[:200]})",
                        "please report it with the chat template of the model; DSTUNE_CACHE=FOLDER prepares the rows anew",
                    )
                )
    return Proof(compared, arguments, "; ".join(notes))


def _compared(
    server: Server, row: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], own: Any, stops: frozenset[int]
) -> tuple[str | None, int]:
    renderer = own.renderer
    if renderer.choice.whole:
        expected = server.whole(row)
        same = any(sample["input_ids"].tolist() == expected[: len(sample["input_ids"])] for sample in samples)
        return None if same else "the conversation as a whole has other tokens", 1
    numbers = [number for number, message in enumerate(row["messages"]) if message["role"] == "assistant" and number]
    if renderer.choice.turns == "last":
        numbers = numbers[-1:]
    marked = renderer.choice.turns == "auto" and renderer.has_marks(row.get("tools"))
    turns = server.turns(row, numbers)
    for turn in turns:
        reason = difference(turn, samples, stops, all_trained=own.trains_on_prompt, marked=marked)
        if reason is not None:
            return f"message {turn.number + 1}: {reason}", len(turns)
    return None, len(turns)


def _columns(sample: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {
        name: np.asarray(sample[f"{prefix}{name}"]) for name in ("input_ids", "labels") if f"{prefix}{name}" in sample
    }
