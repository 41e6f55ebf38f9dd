"""Keep rows of every kind beside a run's samples, and prove before the first step that they train what a server renders."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np

from dstune.config.architectures import vision_of
from dstune.core.errors import Problem, UserError
from dstune.data.chat.proof import REFUSALS, Served, Server, difference
from dstune.data.collate import NO_TARGET
from dstune.data.images.places import COLUMN
from dstune.data.images.processor import processor_of
from dstune.data.message import REASONING_KEYS, content_start, inline_reasoning
from dstune.data.stopping import stop_token_ids

FILE = "train.evidence.json"

ROWS_AT_ONCE = 2000
MOST_KINDS = 200
"""A row's arguments are part of its kind and may differ in every row. After this many kinds, further arguments count as one."""
MOST_ARGUMENTS = 1000
"""Number of distinct combinations of rows' own arguments that are counted separately."""
LONGEST_ROW = 100_000
"""Limit of the extra long row that is kept, in characters: rendering it again before each run takes time."""

LARGE_PIXELS = 2**25
"""A row whose images have more pixels is kept only if its kind has no other row: all images are decoded before each run."""

KINDS = (
    '"images"',
    '"tools"',
    '"tool_calls"',
    '"reasoning',
    '"thinking"',
    "</think>",
    '"system"',
    '"tool"',
    '"weight"',
)
"""Strings in a row (JSON text) that determine its kind, together with the number of assistant turns and the arguments."""

_ARGUMENTS = '{"chat_template_kwargs":'
"""The beginning of a row (JSON text, sorted keys) that has its own arguments."""

_CONVERSATION = re.compile(r'[{,](?:"desirable":\w+,)?"messages":\[')
"""The text before the first message of a row (JSON text), at its beginning or after its arguments."""

REASONING = ('"reasoning', '"thinking"', "</think>")
"""A row (JSON text) with reasoning contains one of these strings."""

TRAINED = ("messages", "chosen", "rejected", "completion", "target")
"""Keys of a row whose values (messages, or a text) the assistant is trained on."""


@dataclass(frozen=True)
class Proof:
    """The result of proving a run's conversations."""

    turns: int = 0
    """Number of turns that were compared with what a server renders."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Chat-template arguments that are the same in all conversations: a server has to pass them."""
    note: str = ""
    """Remarks for the user."""


class Exchange(NamedTuple):
    """A conversation of a row, and the columns of its sample."""

    row: dict[str, Any]
    """`messages`, `tools`, `chat_template_kwargs`."""
    prefix: str = ""
    """Prefix of the sample's columns: `rejected_` for a pair's worse answer."""
    sample: int | None = None
    """Index among the row's samples, if each conversation has its own sample."""


class Kept(NamedTuple):
    """A row to prove."""

    text: str
    number: int
    cut: bool
    """Whether `data.max_length` left out a part of the row."""
    is_large: bool
    """Whether its images have more than LARGE_PIXELS."""

    def is_better_than(self, other: Kept) -> bool:
        """Return whether this row proves more than `other` of its kind, or as much with less work."""
        return (self.cut, self.is_large) < (other.cut, other.is_large)


def keep(rows: datasets.Dataset, numbers: np.ndarray, truncated: np.ndarray, encode: Any, target: Path) -> None:
    """Write a row of every kind and a long one, with the places of their samples, and how the turns of all rows are rendered.

    rows: columns `row` and `number`. numbers: the row of each kept sample. truncated: sorted numbers of truncated rows.
    encode: the `RowTokenizer` that made the samples. A row that contains control tokens cannot be compared, so another row of its
    kind is kept. Complete rows are preferred to truncated ones.
    """
    with_samples = np.unique(numbers)
    row_by_kind: dict[tuple[str, str], Kept] = {}
    longest: Kept | None = None
    rendered: Counter[tuple[int, str, bool, bool, bool]] = Counter()
    opened = hidden = 0
    for batch in rows.iter(batch_size=ROWS_AT_ONCE):
        is_sampled, cut = (_among(record, np.asarray(batch["number"])) for record in (with_samples, truncated))
        for text, number, has_samples, is_cut in zip(batch["row"], batch["number"], is_sampled, cut, strict=True):
            if not has_samples:
                continue
            opened += _is_opened(text)
            hidden += _hidden_turns(text, encode.for_row(number))
            arguments_text = _own_arguments(text)
            manner = (encode.source_of(number), arguments_text, *_reasoning(text))
            if manner not in rendered and len(rendered) >= MOST_ARGUMENTS:
                manner = manner[0], _as_others(arguments_text), *manner[2:]
            rendered[manner] += 1
            row = Kept(text, number, bool(is_cut), _pixels(text) > LARGE_PIXELS)
            if (
                not is_cut
                and not row.is_large
                and len(longest.text if longest else "") < len(text) <= LONGEST_ROW
                and _is_plain(row, encode)
            ):
                longest = row
            kind = _kind(text), arguments_text
            if kind not in row_by_kind and len(row_by_kind) >= MOST_KINDS:
                kind = kind[0], ""
            if (kind not in row_by_kind or row.is_better_than(row_by_kind[kind])) and _is_plain(row, encode):
                row_by_kind[kind] = row
    entries = [_entry(row, numbers, encode) for row in (*row_by_kind.values(), *([longest] if longest else []))]
    total = sum(rendered.values())
    record = {
        "rows": entries,
        "opened": opened,
        "hidden": hidden,
        "of": total,
        "rendered": [[*key, count] for key, count in rendered.items()],
    }
    target.write_text(json.dumps(record), encoding="utf-8")


def _pixels(text: str) -> int:
    """Return the number of pixels in all images of a row (JSON text)."""
    if '"images"' not in text:
        return 0
    sizes = (image["size"] for image in json.loads(text).get(COLUMN) or ())
    return sum(width * height for width, height in sizes)


def _among(sorted_numbers: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Return for each of `numbers` whether it is in `sorted_numbers`."""
    places = np.searchsorted(sorted_numbers, numbers)
    return np.append(sorted_numbers, -1)[places] == numbers


def _is_plain(row: Kept, encode: Any) -> bool:
    """Return whether the row contains no text that reads like a control token: transformers would turn such text into one."""
    renderer = encode.for_row(row.number).renderer
    return renderer is not None and not renderer.holds_control_tokens(json.loads(row.text))


def _hidden_turns(text: str, encode: Any) -> int:
    """Return how many turns of a row serve only as context because the template does not print their reasoning."""
    renderer = encode.renderer
    if renderer is None or renderer.choice.whole or not any(mark in text for mark in REASONING):
        return 0
    return sum(renderer.count_hidden(exchange.row["messages"]) for exchange in encode.exchanges(json.loads(text)))


def _own_arguments(text: str) -> str:
    """Return the chat-template arguments of a row (JSON text, sorted keys) as JSON text."""
    if not text.startswith(_ARGUMENTS):
        return "{}"
    start = len(_ARGUMENTS)
    return text[start : json.JSONDecoder().raw_decode(text, start)[1]]


def _as_others(arguments_text: str) -> str:
    """Return arguments with the same names and a common value, for rows beyond the combinations that are counted separately."""
    return json.dumps({name: {"others": MOST_ARGUMENTS} for name in json.loads(arguments_text)})


def _is_opened(text: str) -> bool:
    """Return whether the assistant begins the conversation of a row. Quotes inside strings are escaped, so no text of a row can
    imitate this."""
    start = len(_ARGUMENTS) + len(_own_arguments(text)) if text.startswith(_ARGUMENTS) else 0
    match = _CONVERSATION.match(text, start)
    return match is not None and json.JSONDecoder().raw_decode(text, match.end())[0]["role"] == "assistant"


def _reasoning(text: str) -> tuple[bool, bool, bool]:
    """Return whether the assistant thinks in any, in every, and in the last trained turn of a row."""
    thought = _reasoning_of_turns(text)
    return any(thought), bool(thought) and all(thought), bool(thought) and thought[-1]


def _reasoning_of_turns(text: str) -> list[bool]:
    """Return for each trained turn of a row (JSON text) whether the assistant thinks in it; empty if no turn can have reasoning."""
    if not any(mark in text for mark in REASONING):
        return []
    row = json.loads(text)
    trained_parts = {key: row[key] for key in TRAINED if key in row}
    turns = [
        message
        for key, value in trained_parts.items()
        for at, message in enumerate(value if isinstance(value, list) else [{"role": "assistant", "content": value}])
        if message["role"] == "assistant" and message.get("weight", 1) and (at or key != "messages")
    ]
    return [_is_thought(message) for message in turns]


def _is_thought(message: Mapping[str, Any]) -> bool:
    inline = inline_reasoning(content_start(message.get("content")))
    fields = [message.get(key) for key in REASONING_KEYS]
    return any(str(text or "").strip() for text in (*fields, inline[0] if inline else ""))


def _entry(row: Kept, numbers: np.ndarray, encode: Any) -> dict[str, Any]:
    places = np.flatnonzero(numbers == row.number).tolist()
    source = encode.source_of(row.number)
    return {"row": json.loads(row.text), "number": row.number, "source": source, "samples": places, "cut": row.cut}


def _kind(text: str) -> str:
    turns = text.count('"assistant"')
    return " ".join([*(kind for kind in KINDS if kind in text), str(min(turns, 2))])


def prove(tokenizer: Any, encode: Any, table: datasets.Dataset, file: Path) -> Proof:
    """Compare the samples of the rows in `file` with what a server renders.

    encode: the `RowTokenizer` of the run. Raises UserError for the first turn that is trained differently.
    """
    record = json.loads(file.read_text(encoding="utf-8"))
    arguments, notes = _built_in(record["rendered"], encode)
    if record["opened"]:
        notes.append(
            f"{record['opened']:,} of {record['of']:,} conversations begin with the assistant: what it says there answers nothing "
            "and is context"
        )
    if hidden := record.get("hidden"):  # absent from what earlier versions wrote
        notes.append(
            f"{hidden:,} turns of the assistant are context: the chat template drops their reasoning, so they are not trained"
        )
    stops: frozenset[int] = frozenset()
    compared = 0
    marked: Counter[bool] = Counter()
    counted_rows: set[int] = set()
    for entry in record["rows"]:
        row_encoder = encode.of_source(entry["source"])
        renderer = row_encoder.renderer
        # A truncated source is shortened before its target, so it cannot be compared.
        if renderer is None or (entry["cut"] and row_encoder.sources is not None):
            continue
        stops = stops or frozenset(stop_token_ids(tokenizer, renderer.run_arguments))  # the run's, whatever the source
        server = Server(tokenizer, stops, renderer.date, renderer.run_arguments, renderer.facts)
        if not renderer.choice.whole and renderer.stops.plain:
            server = replace(server, ending=(renderer.stops.plain, renderer.stops.trailing))
            notes.append(
                f"the chat template ends turns with {renderer.stops.plain!r} and no token: a server goes on behind it unless "
                "it is told to stop there"
            )
        if images := row_encoder.images_of(entry["row"]):
            vision = vision_of(tokenizer)
            assert vision is not None
            server = replace(server, images=images, processor=processor_of(vision))
        exchanges = row_encoder.exchanges(entry["row"])
        if note := renderer.note_of_code(exchanges[0].row):
            notes.append(note)
        if exchanges[0].sample is not None and len(entry["samples"]) != len(exchanges):
            continue  # one of them has no target and was left out
        for exchange in exchanges:
            places = entry["samples"] if exchange.sample is None else [entry["samples"][exchange.sample]]
            samples = [_columns(table[place], exchange.prefix) for place in places]
            row = {
                **exchange.row,
                "messages": renderer.prepare_messages(exchange.row["messages"], exchange.row.get("tools")),
            }
            try:
                # The longest row may also be kept for its kind: count its turns once.
                counts = Counter() if entry["number"] in counted_rows else marked
                reason, count = _compared(server, row, samples, row_encoder, stops, counts)
            except REFUSALS as error:  # of the conversation that was rendered to make the samples
                reason, count = f"the chat template refuses it: {error}", 0
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
        counted_rows.add(entry["number"])
    if marked[False]:
        notes.append(
            f"the chat template marks what is trained ({{% generation %}}): of {marked.total():,} turns that were compared "
            f"{marked[True]:,} have a mark, the others are context; task.turns=all trains every turn"
        )
    if not compared and any(encode.of_source(source).renderer is not None for source, *_ in record["rendered"]):
        notes.append(
            f"none of {record['of']:,} conversations could be compared with what a server renders: all of them write control "
            "tokens, or their sources were shortened"
        )
    return Proof(compared, arguments, "; ".join(dict.fromkeys(notes)))


def _built_in(rendered: Sequence[Sequence[Any]], encode: Any) -> tuple[dict[str, Any], list[str]]:
    """Return the arguments that are the same for all conversations, and notes about those that differ.

    rendered: groups of rows as (source, their own arguments as JSON text, whether any, every and the last turn has reasoning,
    number of rows).
    """
    arguments_of_kinds: list[dict[str, Any]] = []
    thinking: Counter[str] = Counter()
    by_reasoning: dict[str, set[bool]] = {}
    rows = 0
    for source, row_arguments, some, every, last, count in rendered:
        renderer = encode.of_source(source).renderer
        if renderer is None:
            continue
        rows += count
        arguments = {**renderer.run_arguments, **json.loads(row_arguments)}
        switch = renderer.facts.switch
        if switch is not None and switch not in arguments:
            if renderer.choice.drop_reasoning:
                some = every = False
            elif renderer.choice.turns == "last":
                some = every = last
            thinking[switch] += count * some
            by_reasoning.setdefault(switch, set()).update((some, every))
            if some == every:
                arguments[switch] = some
        arguments_of_kinds.append(arguments)
    names = {name for arguments in arguments_of_kinds for name in arguments}
    differ = {
        name
        for name in names
        if any(
            name not in arguments or arguments[name] != arguments_of_kinds[0].get(name)
            for arguments in arguments_of_kinds
        )
    }
    reasoned = {name for name, values in by_reasoning.items() if len(values) > 1}
    notes = [
        f"{thinking[name]:,} of {rows:,} rows have reasoning: turns with it are trained with {name}=true, those without with "
        f"{name}=false"
        for name in sorted(reasoned)
    ]
    if others := sorted(differ - reasoned):
        notes.append(
            f"rows have different arguments of the chat template ({', '.join(others)}), which a server has to be given: an "
            "export has none of them built in"
        )
    return {name: arguments_of_kinds[0][name] for name in sorted(names - differ - reasoned)}, notes


def _compared(
    server: Server,
    row: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]],
    encoder: Any,
    stops: frozenset[int],
    marked_turns: Counter[bool],
) -> tuple[str | None, int]:
    """Return the first difference, or None, and the number of compared turns. marked_turns: is updated with the numbers of turns
    that the template marks (True) and leaves out (False)."""
    renderer = encoder.renderer
    if renderer.choice.whole:
        expected = server.whole(row)
        is_same = any(sample["input_ids"].tolist() == expected[: len(sample["input_ids"])] for sample in samples)
        return None if is_same else "the conversation as a whole has other tokens", 1
    numbers = [number for number in renderer.trained(row["messages"]) if number]
    marked = renderer.choice.turns == "auto" and renderer.has_marks(row.get("tools")) and not encoder.trains_on_prompt
    turns = [turn for turn in server.turns(row, numbers) if len(turn.prompt) < encoder.max_length]
    marks = [
        server.marks(row, sample["input_ids"].tolist(), encoder.max_length) if marked else None for sample in samples
    ]
    if marked:
        marked_turns.update(any(_trains(sample, turn) for sample in samples) for turn in turns)
    count = 0
    for turn in turns:
        counted = (
            [None if row_marks is None else server.counted(turn, row_marks) for row_marks in marks] if marked else None
        )
        if counted and not any(row_marks is None or any(row_marks) for row_marks in counted):
            continue  # nothing of it has a mark
        reason = difference(
            turn, samples, stops, max_length=encoder.max_length, all_trained=encoder.trains_on_prompt, counted=counted
        )
        if reason is not None:
            return f"message {turn.number + 1}: {reason}", len(turns)
        count += min(turn.length, encoder.max_length) - len(turn.prompt)
    if marked:
        reason = next(
            filter(None, (_unmarked(server, turns, *pair) for pair in zip(samples, marks, strict=True))), None
        )
        if reason is not None:
            return reason, len(turns)
    if not marked and not encoder.trains_on_prompt:
        trained = sum(int(np.count_nonzero(sample["labels"] != NO_TARGET)) for sample in samples)
        if trained != count:
            return f"{trained} tokens are trained, a server would have the model write {count}", len(turns)
    return None, len(turns)


def _trains(sample: Mapping[str, Any], turn: Served) -> bool:
    """Return whether a token of the turn counts in a sample that holds its prompt."""
    start, end = len(turn.prompt), turn.length
    holds = sample["input_ids"][:start].tolist() == turn.prompt
    return holds and bool(np.any(sample["labels"][start:end] != NO_TARGET))


def _unmarked(
    server: Server, turns: Sequence[Served], sample: Mapping[str, Any], marks: list[bool] | None
) -> str | None:
    """Return why a sample trains what the template does not mark, or nothing."""
    if marks is None:
        return None
    ids = sample["input_ids"].tolist()
    counted = {
        len(turn.prompt) + at
        for turn in turns
        if ids[: len(turn.prompt)] == turn.prompt
        for at, counts in enumerate(server.counted(turn, marks))
        if counts
    }
    further = set(np.flatnonzero(sample["labels"] != NO_TARGET).tolist()) - counted
    return f"token {min(further)} is trained, and has no mark" if further else None


def _columns(sample: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {
        name: np.asarray(sample[f"{prefix}{name}"]) for name in ("input_ids", "labels") if f"{prefix}{name}" in sample
    }
