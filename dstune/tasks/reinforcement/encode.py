"""Encodes prompts as samples, and builds micro-batches of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np

from dstune.data.message import content_text
from dstune.data.prepared import Split
from dstune.data.render import RenderError
from dstune.data.sampler import MicroBatch
from dstune.data.tokenize.conversations import ChatEncoder
from dstune.data.tokenize.sample import Rows, Sample


class PromptEncoder(ChatEncoder):
    """Encodes a prompt as a server gives it to the model, including the generation prompt; keeps the columns for the rewards."""

    only_prompts = True

    @property
    def columns(self) -> Mapping[str, Any]:
        return {"columns": datasets.Value("string")}

    def __call__(self, rows: Rows, numbers: list[int]) -> list[Sample]:
        return [self._prompt(number, row) for number, row in zip(numbers, rows, strict=True)]

    def _prompt(self, number: int, row: dict[str, Any]) -> Sample:
        problem, ids = "", list[int]()
        try:
            ids = self._ids(row)
        except RenderError as error:
            problem = str(error)
        if not problem and len(ids) > self._max_length:
            problem = f"the prompt has {len(ids):,} tokens, data.max_length is {self._max_length:,}"
        columns = {"columns": json.dumps(row["columns"], ensure_ascii=False)}
        return Sample(number, np.array(ids, dtype=np.int32), columns, int(not problem), False, problem, len(ids))

    def _ids(self, row: dict[str, Any]) -> list[int]:
        if self.renderer is not None:
            return self.renderer.prompt_ids(
                row["messages"], tools=row.get("tools"), arguments=row.get("chat_template_kwargs")
            )
        if not row["plain"]:
            raise RenderError("the model has no chat template, so the prompt must be a text, not messages")
        return self.plain_prompt_ids(content_text(row["messages"][0]["content"]))


def prompt_batch(split: Split, micro_batch: MicroBatch, pad: int) -> dict[str, np.ndarray]:
    """Return `input_ids` and `attention_mask` [prompts, longest prompt], padded on the left, and `sample` [prompts], the numbers
    of the prompts in `split`."""
    prompts = [split.sample(index)["input_ids"] for index in micro_batch.samples]
    arrays = left_padded(prompts, pad)
    return {**arrays, "sample": np.array(micro_batch.samples, dtype=np.int64)}


def left_padded(prompts: Sequence[np.ndarray], pad: int) -> dict[str, np.ndarray]:
    """Return `input_ids` and `attention_mask`, int64 [prompts, longest prompt]."""
    width = max(map(len, prompts))
    ids = np.full((len(prompts), width), pad, dtype=np.int64)
    mask = np.zeros((len(prompts), width), dtype=np.int64)
    for number, prompt in enumerate(prompts):
        ids[number, width - len(prompt) :] = prompt
        mask[number, width - len(prompt) :] = 1
    return {"input_ids": ids, "attention_mask": mask}
