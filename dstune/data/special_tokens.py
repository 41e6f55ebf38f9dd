"""Find the special tokens that a tokenizer puts around a text, and where the targets of a sample begin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def end_of_target(tokenizer: Any) -> int | None:
    """Return the token that ends a target: the end-of-text token, or an encoder's separator; None without either."""
    return tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id


def first_special_tokens(tokenizer: Any) -> list[int]:
    """Return the tokens that the tokenizer puts in front of a text (a beginning-of-sequence token); often none."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a", add_special_tokens=True)["input_ids"]
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start]
    return []


def decoder_prompt(sample: Mapping[str, Any], ignored: int) -> list[int]:
    """Return the tokens of a sample before its first target, from which the model continues. ignored: the label of no target."""
    if "target_ids" in sample:
        return np.asarray(sample["input_ids"]).tolist()
    targets = np.flatnonzero(np.asarray(sample["labels"]) != ignored)
    return np.asarray(sample["input_ids"])[: targets[0]].tolist()
