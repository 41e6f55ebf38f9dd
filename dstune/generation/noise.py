"""Noise for sampling that is a pure function of its keys: there is no state of a generator to save, and whatever is computed beside
a row does not change its draws."""

from __future__ import annotations

import torch
from torch import Tensor

_ODD = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
"""Constants of SplitMix64 (Steele et al. 2014, doi:10.1145/2660193.2660195)."""


def exponential(keys: Tensor, count: int) -> Tensor:
    """Draw exponential noise of mean 1, fp32 [rows, count]. keys: int64 [rows]."""
    bits = mixed(keys[:, None], torch.arange(count, device=keys.device)[None])
    # 53 bits, and a half of the last one, so that it is never 0.
    uniform = bits.bitwise_right_shift_(11).bitwise_and_(2**53 - 1).double().add_(0.5).mul_(2.0**-53)
    return uniform.log_().neg_().float()


def mixed(keys: Tensor, number: Tensor | int) -> Tensor:
    """Return keys of which any two that differ in `keys` or `number` are unrelated: SplitMix64's output function, int64."""
    golden, first, second = (odd - 2**64 if odd >= 2**63 else odd for odd in _ODD)
    value = (keys ^ _shifted(keys, 32)) * second + (torch.as_tensor(number, device=keys.device) + 1) * golden
    value.bitwise_xor_(_shifted(value, 30)).mul_(first)
    value.bitwise_xor_(_shifted(value, 27)).mul_(second)
    return value.bitwise_xor_(_shifted(value, 31))


def _shifted(value: Tensor, bits: int) -> Tensor:
    """Return a logical shift to the right of int64."""
    return (value >> bits).bitwise_and_(2 ** (64 - bits) - 1)
