"""Builds micro-batches of completions for `PolicyHead`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch

from dstune.data.batches import padded
from dstune.data.collate import NO_TARGET


class TrainedCompletion(NamedTuple):
    prompt: np.ndarray
    """Token ids of the prompt."""
    ids: np.ndarray
    """Token ids of the completion."""
    labels: np.ndarray
    """`ids`, with `NO_TARGET` for tokens that do not train."""
    sampled: np.ndarray
    """The sampler's log-probability of each token of `ids`."""
    advantage: float


def completion_batch(completions: Sequence[TrainedCompletion], pad: int) -> dict[str, torch.Tensor]:
    """Make a row for each completion: `input_ids`, `attention_mask`, `labels`, `sampled` [completions, sequence] and `advantages`
    [completions]."""
    ids = [np.concatenate([completion.prompt, completion.ids]) for completion in completions]
    labels = [np.concatenate([np.full(len(c.prompt), NO_TARGET), c.labels]) for c in completions]
    arrays = padded(ids, labels, pad)
    sampled = np.zeros(arrays["input_ids"].shape, dtype=np.float32)
    for row, completion in zip(sampled, completions, strict=True):
        row[len(completion.prompt) : len(completion.prompt) + len(completion.ids)] = completion.sampled
    arrays |= {"sampled": sampled, "advantages": _advantages(completions)}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def shared_batch(completions: Sequence[TrainedCompletion]) -> dict[str, torch.Tensor]:
    """Build one row in which neighbouring completions share their prompt; see `models.shared_prompts`.

    `input_ids` [1, tokens]: the prompts, then the completions without their last tokens, which predict nothing. `prompt_lengths`
    and `prompt_samples` (completions of each prompt) [prompts]; `answer_lengths` (tokens of each completion in the row)
    [completions]; `labels` and `sampled` [completions, longest]; `advantages` [completions].
    """
    groups = [list(group) for _, group in groupby(completions, key=lambda completion: completion.prompt.tobytes())]
    prompts = [group[0].prompt for group in groups]
    answers = [completion.ids[:-1] for completion in completions]
    longest = max(1, *(len(completion.ids) for completion in completions))
    labels = np.full((len(completions), longest), NO_TARGET, dtype=np.int64)
    sampled = np.zeros(labels.shape, dtype=np.float32)
    for number, completion in enumerate(completions):
        labels[number, : len(completion.ids)] = completion.labels
        sampled[number, : len(completion.ids)] = completion.sampled
    arrays = {
        "input_ids": np.concatenate([*prompts, *answers])[None].astype(np.int64),
        "prompt_lengths": np.array([len(prompt) for prompt in prompts]),
        "prompt_samples": np.array([len(group) for group in groups]),
        "answer_lengths": np.array([len(answer) for answer in answers]),
        "labels": labels,
        "sampled": sampled,
        "advantages": _advantages(completions),
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _advantages(completions: Sequence[TrainedCompletion]) -> np.ndarray:
    return np.array([completion.advantage for completion in completions], dtype=np.float32)
