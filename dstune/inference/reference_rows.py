"""Rows of a reference: held-out rows, or training rows, as a client would ask them, with the tokens that training saw."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from dstune.config.schema import RunConfig
from dstune.core.errors import UserError
from dstune.data import sources
from dstune.data.collate import NO_TARGET
from dstune.data.images.batch import prompt_inputs
from dstune.data.inputs import of_training
from dstune.data.prepared import PreparedData, Split
from dstune.data.problems import RowError
from dstune.data.rows import normalise, recognise
from dstune.data.special_tokens import decoder_prompt
from dstune.data.tokenize import RowTokenizer, conversation
from dstune.inference.reference_images import Allowance, RowImages
from dstune.protocols import ROW_FORMATS, TASKS, task_of
from dstune.protocols.task_options import BuildsQueries

ROWS = 32
"""Rows of a reference, at most."""
MOST_SCANNED_ROWS = 512
"""Rows of the data that are looked at to find `ROWS`."""
MOST_TOKENS = 1024
"""Longest row in tokens; longer ones are skipped, so that a reference takes seconds."""
MOST_TOKENS_WITH_IMAGES = 4096
"""The same for a row with images, which are few: a photograph has a thousand tokens or more."""
LOOKED_AHEAD = 16
"""Samples that are searched for the one that the next training row became."""


def held_out_rows(config: RunConfig, data: PreparedData, tokenizer: Any, served: Any) -> Iterator[dict[str, Any]]:
    """Yield the first held-out rows as a client would ask them, with their tokens.

    tokenizer: the run's; only rows that it renders as training saw them are used. served: the one that renders what is yielded,
    which differs from `tokenizer` for an edited export.
    """
    split = data.validation or data.test
    if split is None or split.places is None:
        return
    places = json.loads(split.places.read_text(encoding="utf-8"))[:MOST_SCANNED_ROWS]
    fields_by_place = _read_fields(config, split.name, places)
    origins = np.arange(len(split.lengths)) if split.origins is None else split.origins
    row_count, allowance = 0, Allowance()
    for sample, origin in enumerate(origins.tolist()):
        if row_count == ROWS or origin >= len(places):
            break
        fields, source_config = fields_by_place.get(places[origin], (None, config))
        if fields is None or np.count_nonzero(origins[: sample + 1] == origin) > 1:  # one sample of a row is enough
            continue
        row = _reference_row(fields, source_config, split, sample, tokenizer, served, allowance)
        if row is not None:
            row_count += 1
            yield row


def training_rows(config: RunConfig, data: PreparedData, tokenizer: Any, served: Any) -> Iterator[dict[str, Any]]:
    """Yield the first training rows in the same way, for a run that held out none.

    They serve as well: an engine with another template, base or adapter answers these differently too. Samples are in the order
    of their rows, but some rows have no sample.
    """
    if config.data.streaming:
        return
    sample_count = min(len(data.train.lengths), MOST_SCANNED_ROWS)
    next_sample, row_count, allowance = 0, 0, Allowance()
    files = [
        (file, source_config)
        for key, source_config in of_training(config).values()
        for file in sources.of_part(source_config.data, "train", key)
    ]
    rows = ((raw, source_config) for file, source_config in files for raw in sources.read(file))
    for raw, source_config in itertools.islice(rows, MOST_SCANNED_ROWS):
        if row_count == ROWS or next_sample == sample_count:
            return
        if raw.fields is None:
            continue
        for sample in range(next_sample, min(next_sample + LOOKED_AHEAD, sample_count)):
            row = _reference_row(raw.fields, source_config, data.train, sample, tokenizer, served, allowance)
            if row is not None:
                next_sample, row_count = sample + 1, row_count + 1
                yield row
                break


def _read_fields(config: RunConfig, part: str, places: Iterable[str]) -> dict[str, tuple[Mapping[str, Any], RunConfig]]:
    """Return the columns of the rows at these places, with the configuration of their source.

    The cache knows prepared rows by their content, so the files may have moved since the places were written. If no two files
    have the same name, names are compared instead of paths.
    """
    has_files = getattr(config.data, part) is not None  # else the part was split off the training rows
    configs = [(f"data.{part}", config)] if has_files else list(of_training(config).values())
    files = [
        (file, source_config)
        for key, source_config in configs
        for file in sources.of_part(source_config.data, part if has_files else "train", key)
    ]
    names_are_unique = len({os.path.basename(str(file)) for file, _ in files}) == len(files)

    def key_of(place: str) -> str:
        return os.path.basename(place) if names_are_unique else place

    missing = {key_of(place): place for place in places}
    fields_by_place: dict[str, tuple[Mapping[str, Any], RunConfig]] = {}
    for file, source_config in files:
        for raw in sources.read(file):
            if not missing:
                return fields_by_place
            if raw.fields is not None and (place := missing.pop(key_of(raw.place), None)):
                fields_by_place[place] = raw.fields, source_config
    return fields_by_place


def _reference_row(
    fields: Mapping[str, Any],
    config: RunConfig,
    split: Split,
    number: int,
    tokenizer: Any,
    served: Any,
    allowance: Allowance,
) -> dict[str, Any] | None:
    """Build the row of the sample `number`.

    Returns None if a client cannot ask it as training saw it, because `data.clean` changed its text or it was cut, and if it
    shows more images than `allowance` has left.
    """
    task, sample = task_of(config.task), split.sample(number)
    try:
        row_format = recognise(fields, config.data.columns, config.data.format, config.task, "")
        row = normalise(fields, row_format, config.data.columns, config.task)
        if not task.generates:
            # A server may not have the plugin whose format the row is in, so it is sent the normalised row.
            sent = row if ROW_FORMATS[row_format].shape else fields
            query = task.as_query(sent, row) if isinstance(task, BuildsQueries) else dict(sent)
            return {"row": query, "ids": np.asarray(sample["input_ids"]).tolist()}
        return _language_row(row, config, split, sample, tokenizer, served, allowance)
    except (RowError, UserError):
        return None


def _language_row(
    row: dict[str, Any],
    config: RunConfig,
    split: Split,
    sample: Mapping[str, Any],
    tokenizer: Any,
    served: Any,
    allowance: Allowance,
) -> dict[str, Any] | None:
    """Return the prompt of a language model's row, as messages or text, with its tokens and those of the target.

    The prompt of a conversation ends before the assistant's first turn. `inputs` holds what the model gets of its images.
    Raises RowError.
    """
    trained_ids = np.asarray(sample["input_ids"]).tolist()
    if "text" in row:
        if len(trained_ids) < 2:
            return None
        cut = max(1, len(trained_ids) // 2)
        targets = trained_ids[cut:][:256]
        return {"text": row["text"], "ids_only": True, "prompt_ids": trained_ids[:cut], "target_ids": targets}
    if not row.keys() & {"messages", "prompt", "chosen"}:  # a source and its target
        start = len(decoder_prompt(sample, NO_TARGET))
        return (
            {"ids_only": True, "prompt_ids": trained_ids[:start], "target_ids": trained_ids[start:]} if start else None
        )
    messages = conversation(row)
    answer_at = next((number for number, message in enumerate(messages) if message["role"] == "assistant"), 0)
    if not answer_at:
        return None
    prompt_messages, answer_message = messages[:answer_at], messages[answer_at]
    images = RowImages.of(split, sample, prompt_messages)
    template_columns = {key: row[key] for key in ("tools", "chat_template_kwargs") if row.get(key)}
    trained_messages = [{**message, "weight": 1} for message in (*prompt_messages, answer_message)]
    one_turn = {"messages": trained_messages, **template_columns, **images.entries()}
    trained_turn = render_turn(one_turn, config, tokenizer, images)
    if trained_turn is None:
        return None
    if trained_ids[: len(trained_turn.prompt) + 1] != [*trained_turn.prompt, trained_turn.target[0]]:
        return None
    turn = trained_turn if served is tokenizer else render_turn(one_turn, config, served, images)
    if turn is None or not allowance.take(images):
        return None
    requested: dict[str, Any] = {"messages": prompt_messages}
    if images:
        requested["messages"] = images.shown(prompt_messages)
        requested["inputs"] = prompt_inputs(split, [*turn.prompt, *turn.target], images.numbers)
        if isinstance(answer := answer_message.get("content"), str) and not answer_message.get("tool_calls"):
            requested["answer"] = answer
    if "tools" in template_columns:
        requested["tools"] = template_columns["tools"]
    if "chat_template_kwargs" in template_columns:
        requested["arguments"] = template_columns["chat_template_kwargs"]
    if not served.chat_template:
        requested = {"text": row["prompt"]} if "prompt" in row else {"ids_only": True}
    if turn.prompt != trained_turn.prompt:
        requested["other_prompt"] = True
    return {**requested, "prompt_ids": turn.prompt, "target_ids": turn.target}


class Turn(NamedTuple):
    """Token ids of a prompt and of the assistant's answer to it."""

    prompt: list[int]
    target: list[int]


def render_turn(
    one_turn: dict[str, Any], config: RunConfig, tokenizer: Any, images: RowImages | None = None
) -> Turn | None:
    """Render a conversation with one answer, as a row that is trained. Returns None if it would be cut, or trains no token."""
    # A task that compares answers is asked like a chat: nobody sends a server pairs of answers.
    chats = TASKS["chat"].for_source(config.task, None)
    rows = RowTokenizer(tokenizer, chats, "messages", MOST_TOKENS_WITH_IMAGES if images else MOST_TOKENS)
    rows.use_images(images.files if images else None)
    samples = rows.samples([one_turn], [0])
    if len(samples) != 1 or samples[0].problem or samples[0].truncated:
        return None
    ids, targets = samples[0].input_ids.tolist(), np.flatnonzero(samples[0].columns["labels"] != NO_TARGET)
    start, end = int(targets[0]), int(targets[-1]) + 1
    return Turn(ids[:start], ids[start:end])
