"""Samples of preferences: a prompt with two answers, or with one that is good or bad."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import datasets
import numpy as np

from dstune.config.task_schema import ChatConfig
from dstune.data.preferences import ANSWERS, as_chat
from dstune.data.tokenize.language import ChatEncoder
from dstune.data.tokenize.sample import Rows, Sample
from dstune.errors import Problem, UserError

TOKENS = datasets.List(datasets.Value("int32"))


class PairEncoder(ChatEncoder):
    """The prompt with its better answer, and with its worse one; `input_ids` are the better one's.

    Both have to have a target within `max_length`, and differ there, else the pair has the weight 0.
    """

    def __init__(self, tokenizer: Any, template_date: str | None, fmt: str, max_length: int):
        super().__init__(tokenizer, ChatConfig(template_date=template_date), fmt, max_length)

    @property
    def columns(self) -> Mapping[str, Any]:
        return {"labels": TOKENS, "rejected_input_ids": TOKENS, "rejected_labels": TOKENS}

    def __call__(self, rows: Rows, numbers: list[int]) -> list[Sample]:
        better, worse = (super(PairEncoder, self).__call__([as_chat(r, a) for r in rows], numbers) for a in ANSWERS)
        for chosen, rejected in zip(better, worse, strict=True):
            same = np.array_equal(chosen.input_ids, rejected.input_ids)
            chosen.weight = int(chosen.weight > 0 and rejected.weight > 0 and not same)
            chosen.columns |= {"rejected_input_ids": rejected.input_ids, "rejected_labels": rejected.labels}
            chosen.truncated |= rejected.truncated
            chosen.problem = chosen.problem or rejected.problem
            chosen.length = max(chosen.length, rejected.length)
        return better


class RewardEncoder(PairEncoder):
    """Both answers with their prompt, and by how much the better one has to win."""

    @staticmethod
    def _end_of(tokenizer: Any) -> int:
        """An encoder's separator serves as well: what ends the text writes nothing."""
        end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
        if end is None:
            reason = "the tokenizer has neither an end-of-sequence token nor a separator"
            raise UserError(Problem("model.path", reason, "choose another model"))
        return int(end)

    @property
    def columns(self) -> Mapping[str, Any]:
        return {"rejected_input_ids": TOKENS, "margin": datasets.Value("float64")}

    def of_answers(self, rows: Rows, numbers: list[int]) -> list[Sample]:
        """Samples of chat rows, each with one answer to be scored; of weight 0 where nothing of it is within `max_length`."""
        return ChatEncoder.__call__(self, rows, numbers)

    def __call__(self, rows: Rows, numbers: list[int]) -> list[Sample]:
        samples = super().__call__(rows, numbers)
        for row, sample in zip(rows, samples, strict=True):
            sample.columns["margin"] = float(row.get("margin", 0.0))
        return samples


class JudgedEncoder(ChatEncoder):
    """A prompt with an answer that is good or bad; of a pair of answers two such samples."""

    def __init__(self, tokenizer: Any, template_date: str | None, fmt: str, max_length: int):
        super().__init__(tokenizer, ChatConfig(template_date=template_date), fmt, max_length)

    @property
    def columns(self) -> Mapping[str, Any]:
        return {"labels": TOKENS, "desirable": datasets.Value("int64")}

    def __call__(self, rows: Rows, numbers: list[int]) -> list[Sample]:
        judged: list[tuple[int, dict[str, Any], bool]] = []
        for number, row in zip(numbers, rows, strict=True):
            if "chosen" in row:
                judged += [(number, as_chat(row, answer), answer == "chosen") for answer in ANSWERS]
            else:
                judged.append((number, row, row["desirable"]))
        samples = super().__call__([row for _, row, _ in judged], [number for number, _, _ in judged])
        for sample, (_, _, desirable) in zip(samples, judged, strict=True):
            sample.weight = int(sample.weight > 0)
            sample.columns["desirable"] = int(desirable)
        return samples
