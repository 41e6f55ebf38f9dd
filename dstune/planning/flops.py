"""Floating-point operations that a model needs for its texts: the numerator of its utilisation, and the arithmetic of a plan.

After Chowdhery et al. 2022 (PaLM, arXiv:2204.02311, appendix B): two operations for each weight of a matrix and position in
the forward pass, twice as many in the backward pass, and attention over all pairs of positions (causal masks halve nothing).
What is computed again (activation checkpointing) does not count. Counted here beside PaLM: frozen weights get no gradient,
the backward pass ends below the lowest layer with a trained weight, and only targets are projected onto the vocabulary.
Not counted: elementwise work, embeddings (a look-up), heads of classes and poolers (a few thousand weights for a row), and the
keys of `method=prefix`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dstune.planning.setup import Setup

BELOW_LAYERS = ("embed", "shared", "prompt_encoder")
"""Parts of the names of trained tensors below all layers; if one is trained, the backward pass goes through all layers."""


@dataclass(frozen=True)
class Work:
    """The size of a model's input, in the units that its operations grow with."""

    positions: int = 0
    """Tokens that go through the layers."""
    pairs: int = 0
    """Pairs of a position and one that it attends to, in a layer without a window."""
    windowed_pairs: int = 0
    """The same in a layer with a sliding window."""
    projected: float = 0
    """Positions that are projected onto the vocabulary."""


def work_of(lengths: Iterable[int], *, window: int | None, projected: float) -> Work:
    """Count the work of texts that do not see each other, packed or not. lengths: tokens of each, without padding. window: of
    sliding attention, in tokens. projected: positions that are projected onto the vocabulary."""
    lengths = list(lengths)
    return Work(
        positions=sum(lengths),
        pairs=sum(length * length for length in lengths),
        windowed_pairs=sum(length * min(window or length, length) for length in lengths),
        projected=projected,
    )


def micro_batch_work(s: Setup) -> Work:
    """Count the work of a micro-batch as computed: with full rows, and with windows if the attention implementation uses them."""
    window = min(s.model.window or s.length, s.length) if s.attention in ("flash_attention_2", "samples") else s.length
    projected = 0 if s.model.encoder else s.tokens * s.target_share
    return Work(s.tokens, s.tokens * s.length, s.tokens * window, projected)


def forward_flops(s: Setup, work: Work | None = None) -> tuple[float, float, float]:
    """Count the operations of the forward pass: linear layers, attention, vocabulary projection. work: a micro-batch of `s` when
    not given."""
    work = micro_batch_work(s) if work is None else work
    linear = 2.0 * sum(_weights_of_layers(s)) * work.positions
    return linear, _attention(s, 0, work), 2.0 * s.model.vocabulary * s.model.hidden * work.projected


def backward_flops(s: Setup, work: Work | None = None) -> tuple[float, float, float]:
    """Count the operations of the backward pass, as `forward_flops`: gradients of inputs from the lowest layer with a trained
    weight on, those of weights where they are trained."""
    work = micro_batch_work(s) if work is None else work
    lowest = _lowest_trained(s)
    inputs = sum(_weights_of_layers(s)[lowest:])
    weights = sum(tensor.count * tensor.used for tensor in s.trained if tensor.layer is not None)
    projection = 2.0 * s.model.vocabulary * s.model.hidden * work.projected
    passes = (lowest < s.model.layers) + _projection_is_trained(s)
    return 2.0 * (inputs + weights) * work.positions, 2 * _attention(s, lowest, work), projection * passes


def step_flops(s: Setup, work: Work) -> float:
    """Count the operations of forward and backward pass over `work`."""
    return sum(forward_flops(s, work)) + sum(backward_flops(s, work))


def _weights_of_layers(s: Setup) -> list[float]:
    """Return for each layer the weights that a position is multiplied by, those of adapters included."""
    counts = [0.0] * s.model.layers
    for tensor in (*s.model.tensors, *(s.trained if s.adapter else ())):
        if tensor.layer is not None:
            counts[tensor.layer] += tensor.count * tensor.used
    return counts


def _attention(s: Setup, lowest: int, work: Work) -> float:
    """Return scores and weighted values in the forward pass of the layers from `lowest` on. Those with a window are taken to be
    the lowest ones: how many there are matters, which they are does so only where some layers are frozen."""
    windowed = max(s.model.windowed_layers - lowest, 0)
    whole = s.model.layers - lowest - windowed
    return 4.0 * s.model.heads * s.model.head_dim * (windowed * work.windowed_pairs + whole * work.pairs)


def _lowest_trained(s: Setup) -> int:
    """Return the lowest layer in the backward pass; the number of layers if it contains none."""
    if any(part in tensor.name for tensor in s.trained for part in BELOW_LAYERS if tensor.layer is None):
        return 0
    return min((tensor.layer for tensor in s.trained if tensor.layer is not None), default=s.model.layers)


def _projection_is_trained(s: Setup) -> bool:
    name = s.model.tensors[0].name if s.model.tied else "lm_head.weight"
    return any(tensor.name == name for tensor in s.trained)
