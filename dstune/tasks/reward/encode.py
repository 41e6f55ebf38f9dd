"""Encodes pairs of answers whose scores are compared, and single answers to be scored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import datasets

from dstune.core.errors import Problem, UserError
from dstune.data.tokenize.conversations import NUMBERS, ChatEncoder
from dstune.data.tokenize.pairs import PairEncoder
from dstune.data.tokenize.sample import Rows, Sample


class RewardEncoder(PairEncoder):
    """Encodes both answers of a pair with their prompt, and the margin by which the better one must win."""

    scores = True

    @staticmethod
    def _end_of(tokenizer: Any) -> int:
        """Return the token that ends a text. Without an end-of-sequence token it is an encoder's separator, which serves as well,
        since nothing is generated after it. Raises UserError if the tokenizer has neither."""
        end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
        if end is None:
            reason = "the tokenizer has neither an end-of-sequence token nor a separator"
            raise UserError(Problem("model.path", reason, "choose another model"))
        return int(end)

    @property
    def columns(self) -> Mapping[str, Any]:
        return {"rejected_input_ids": NUMBERS, "margin": datasets.Value("float64")}

    def of_answers(self, rows: Rows, numbers: list[int]) -> list[Sample]:
        """Make samples of chat rows, each with one answer to score. A sample has weight 0 if no token of the answer is within
        `max_length`."""
        return ChatEncoder.__call__(self, rows, numbers)

    def __call__(self, rows: Rows, numbers: list[int]) -> list[Sample]:
        samples = super().__call__(rows, numbers)
        for row, sample in zip(rows, samples, strict=True):
            sample.columns["margin"] = float(row.get("margin", 0.0))
        return samples
