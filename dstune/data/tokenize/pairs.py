"""Encode compared answers: a prompt with two of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dstune.data.chat.evidence import Exchange
from dstune.data.images.places import COLUMN
from dstune.data.preferences import ANSWERS, as_chat
from dstune.data.tokenize.conversations import NUMBERS, ChatEncoder
from dstune.data.tokenize.sample import Rows, Sample


class PairEncoder(ChatEncoder):
    """Encodes the prompt with its better answer and with its worse one; `input_ids` are those of the better one.

    A pair has the weight 0 unless both have a target within `max_length` and differ there.
    """

    one_sample = True

    @property
    def columns(self) -> Mapping[str, Any]:
        return {"labels": NUMBERS, "rejected_input_ids": NUMBERS, "rejected_labels": NUMBERS, **self.image_columns}

    def exchanges(self, row: dict[str, Any]) -> list[Exchange]:
        better, worse = (as_chat(self._with_common_prompt(row), answer) for answer in ANSWERS)
        return [self._exchange(better), self._exchange(worse, "rejected_")]

    def __call__(self, rows: Rows, numbers: list[int]) -> list[Sample]:
        rows = [self._with_common_prompt(row) for row in rows]
        better, worse = (super(PairEncoder, self).__call__([as_chat(r, a) for r in rows], numbers) for a in ANSWERS)
        for chosen, rejected in zip(better, worse, strict=True):
            is_same_answer = np.array_equal(chosen.input_ids, rejected.input_ids)
            chosen.weight = int(chosen.weight > 0 and rejected.weight > 0 and not is_same_answer)
            chosen.columns |= {"rejected_input_ids": rejected.input_ids, "rejected_labels": rejected.labels}
            chosen.truncated |= rejected.truncated
            chosen.problem = chosen.problem or rejected.problem or self._difference(chosen, rejected)
            chosen.length = max(chosen.length, rejected.length)
        return better

    def _difference(self, chosen: Sample, rejected: Sample) -> str:
        """Return the problem if the two samples show different images, else an empty text."""
        images = [sample.columns.get(COLUMN, ()) for sample in (chosen, rejected)]
        return "" if np.array_equal(*images) else "chosen and rejected show different images"

    def _with_common_prompt(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return the row with the same prompt for both answers: if only one of them begins with reasoning, the thinking switch is
        on for both. Scored conversations stay unchanged, because each is scored alone."""
        template_arguments = row.get("chat_template_kwargs") or {}
        if (
            self.scores
            or self.renderer is None
            or (switch := self.renderer.facts.switch) is None
            or switch in template_arguments
        ):
            return row
        thinks = [self.renderer.arguments_for(_first_answer(row[answer]))[switch] for answer in ANSWERS]
        return row if thinks[0] == thinks[1] else {**row, "chat_template_kwargs": {**template_arguments, switch: True}}


def _first_answer(answer: Any) -> Mapping[str, Any]:
    return {"role": "assistant", "content": answer} if isinstance(answer, str) else answer[0]
