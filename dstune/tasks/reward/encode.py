"""Samples of compared answers that are scored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import datasets

from dstune.core.errors import Problem, UserError
from dstune.data.tokenize.conversations import NUMBERS, ChatEncoder
from dstune.data.tokenize.pairs import PairEncoder
from dstune.data.tokenize.sample import Rows, Sample


class RewardEncoder(PairEncoder):
    """Both answers with their prompt, and by how much the better one has to win."""

    scores = True

    @staticmethod
    def _end_of(tokenizer: Any) -> int:
        """Return the token that ends a text: an encoder's separator where there is no end-of-sequence token, since nothing is
        written after it. Raises UserError where there is neither."""
        end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
        if end is None:
            reason = "the tokenizer has neither an end-of-sequence token nor a separator"
            raise UserError(Problem("model.path", reason, "choose another model"))
        return int(end)

    @property
    def columns(self) -> Mapping[str, Any]:
        return {"rejected_input_ids": NUMBERS, "margin": datasets.Value("float64")}

    def of_answers(self, rows: Rows, numbers: list[int]) -> list[Sample]:
        """Make samples of chat rows, each with one answer to be scored; of weight 0 where nothing of it is within `max_length`."""
        return ChatEncoder.__call__(self, rows, numbers)

    def __call__(self, rows: Rows, numbers: list[int]) -> list[Sample]:
        samples = super().__call__(rows, numbers)
        for row, sample in zip(rows, samples, strict=True):
            sample.columns["margin"] = float(row.get("margin", 0.0))
        return samples
