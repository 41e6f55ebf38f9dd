"""Choose the held-out prompts that the model answers before and after training."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np

from dstune.config.schema import RunConfig
from dstune.data.collate import NO_TARGET
from dstune.data.images.expand import count_to
from dstune.data.images.places import COLUMN
from dstune.data.ingest import Table
from dstune.data.message import content_text
from dstune.data.prepared import SamplePrompt
from dstune.data.render import RenderError
from dstune.data.tokenize import RowTokenizer, conversation
from dstune.data.tokenize.sample import SourcePrompts

TEXT_PROMPT_TOKENS = 16
"""Number of tokens at the beginning of a document that are its prompt."""

TEXT_REFERENCE_TOKENS = 64
"""Number of tokens after the prompt of a document that are the reference."""

MIN_PROMPTS = 16
"""Minimum number of prompts in a cache entry, so that slightly more `evaluate.samples` need no new entry."""


def prompt_count(config: RunConfig) -> int:
    """Return the number of prompts in the run's cache entry."""
    return max(MIN_PROMPTS, config.evaluate.samples)


def sample_prompts(
    encode: RowTokenizer, table: Table, indices: np.ndarray, count: int, max_length: int
) -> list[SamplePrompt]:
    """Return the first `count` different prompts of at most `max_length` tokens among the rows `indices`."""
    prompts: dict[tuple[int, ...], SamplePrompt] = {}
    for index in indices:
        row = json.loads(table.data[int(index)]["row"])
        row_encoder = encode.for_row(int(index))
        if row_encoder.sources is not None:
            prompt = _from_source(row_encoder.sources, row)
            if prompt is not None and row_encoder is not encode:  # a source with its own task: show its task prompt too
                prompt = replace(prompt, text=row_encoder.sources.prompt_text(row["source"]))
        else:
            prompt = (
                _from_chat(row_encoder, row)
                if "messages" in row or "prompt" in row
                else _from_document(row_encoder, row)
            )
        if prompt is not None and len(prompt.input_ids) <= max_length:
            prompts.setdefault((*prompt.input_ids, *(-1 - image for image in prompt.images)), prompt)
        if len(prompts) == count:
            break
    return list(prompts.values())


def _from_source(sources: SourcePrompts, row: dict[str, Any]) -> SamplePrompt | None:
    try:
        ids = sources.prompt_ids(row["source"], row.get("chat_template_kwargs"), row["target"])
        return SamplePrompt(ids, row["source"], row["target"])
    except RenderError:
        return None


def _from_chat(encode: RowTokenizer, row: dict[str, Any]) -> SamplePrompt | None:
    """Return the prompt of the assistant's first turn; for a row without an answer, the complete prompt."""
    if "columns" in row:
        return _from_prompt(encode, row)
    messages = conversation(row)
    first = next((number for number, message in enumerate(messages) if message["role"] == "assistant"), 0)
    if not first:
        return None
    prompt_messages = messages[:first]
    prompt_text = "\n".join(
        content_text(message["content"]) for message in prompt_messages if message["role"] != "system"
    )
    reference = content_text(messages[first].get("content"))
    if row.get(COLUMN):
        return _with_images(encode, row, prompt_messages, SamplePrompt([], prompt_text, reference))
    if encode.renderer is None:
        return SamplePrompt(encode.plain_prompt_ids(row["prompt"]), prompt_text, reference)
    try:
        ids = encode.renderer.prompt_ids(
            prompt_messages, tools=row.get("tools"), arguments=row.get("chat_template_kwargs"), answer=messages[first]
        )
        return SamplePrompt(ids, prompt_text, reference)
    except RenderError:
        return None


def _with_images(
    encode: RowTokenizer, row: dict[str, Any], prompt_messages: list[dict[str, Any]], prompt: SamplePrompt
) -> SamplePrompt | None:
    """Return `prompt` with the tokens and images that the row's first sample holds before its first target."""
    sample = encode.samples([row], [0])[0]
    targets = np.flatnonzero(sample.labels != NO_TARGET)
    if sample.problem or not len(targets) or encode.trains_on_prompt:
        return None
    count = max(count_to(prompt_messages, len(prompt_messages) - 1))
    ids = sample.input_ids[: targets[0]].tolist()
    return replace(prompt, input_ids=ids, images=sample.columns[COLUMN][:count].tolist())


def _from_prompt(encode: RowTokenizer, row: dict[str, Any]) -> SamplePrompt | None:
    (sample,) = encode.samples([row], [0])
    if sample.problem:
        return None
    text = "\n".join(content_text(message["content"]) for message in row["messages"] if message["role"] != "system")
    return SamplePrompt(sample.input_ids.tolist(), text, str(row["columns"].get("answer", "")))


def _from_document(encode: RowTokenizer, row: dict[str, Any]) -> SamplePrompt | None:
    ids = row["input_ids"] if "input_ids" in row else encode.plain_prompt_ids(row["text"])
    cut = min(TEXT_PROMPT_TOKENS, len(ids) // 2)
    if not cut:
        return None
    return SamplePrompt(ids[:cut], encode.decode(ids[:cut]), encode.decode(ids[cut : cut + TEXT_REFERENCE_TOKENS]))
