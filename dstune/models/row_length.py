"""Models that compute a sample differently in a long row, which a check with short samples cannot detect."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dstune.config.rope import has_lone_samples, lone_samples_fix
from dstune.config.schema import RunConfig
from dstune.core.errors import Problem


@dataclass(frozen=True)
class Limit:
    """A length in tokens up to which a model computes samples as it computes them alone."""

    tokens: int
    reason: str
    is_of_packing: bool
    """Whether a row is computed right if it has one sample; otherwise a micro-batch must be one sample."""


def row_length_problem(config: RunConfig, architecture: Any) -> Problem | None:
    """Return the problem with rows of up to `data.max_length` tokens whose samples would not be computed as they are alone.

    architecture: the text part of the model's configuration.
    """
    limits = [
        *(_packing_limits(architecture) if config.data.packing else ()),
        *(() if has_lone_samples(config) else _rope_limits(architecture)),
    ]
    passed = [limit for limit in limits if config.data.max_length > limit.tokens]
    if not passed:
        return None
    shortest = min(passed, key=lambda limit: limit.tokens)
    shorter = f"data.max_length={shortest.tokens}"
    if shortest.is_of_packing:
        return Problem("data.packing", shortest.reason, f"data.packing=false, or {shorter}", "true")
    fix = ", or ".join((shorter, *lone_samples_fix(config)))
    return Problem("data.max_length", shortest.reason, fix, str(config.data.max_length))


def _packing_limits(architecture: Any) -> Iterator[Limit]:
    kind = architecture.model_type
    if chosen := getattr(architecture, "index_topk", None):  # DeepSeek 3.2; up to this length all tokens are chosen
        reason = (
            f"attention of {kind} chooses {chosen} tokens of a row (index_topk), and losses of longer packed rows differ from "
            "those of their samples (by 0.3 to 0.6% in small models)"
        )
        yield Limit(chosen, reason, True)
    # Llama 4 counts both from the beginning of the row, not of the sample.
    if "chunked_attention" in (getattr(architecture, "layer_types", None) or ()):
        chunk = architecture.attention_chunk_size
        yield Limit(chunk, f"attention of {kind} stops at every {chunk}th token of a row, also within a sample", True)
    if getattr(architecture, "attn_temperature_tuning", False) and (floor := getattr(architecture, "floor_scale", 0)):
        reason = (
            f"attention of {kind} is scaled by the place in the row from token {floor} on, not by that in the sample"
        )
        yield Limit(floor - 1, reason, True)


def _rope_limits(architecture: Any) -> Iterator[Limit]:
    for name, tokens in varying_rope(architecture).items():
        reason = (
            f"positions of {architecture.model_type} ({name}) change where a sample has over {tokens} tokens, for all samples of "
            "its micro-batch"
        )
        yield Limit(tokens, reason, False)


def varying_rope(architecture: Any) -> dict[str, int]:
    """Return the kinds of rotary positions that depend on the longest sample of a micro-batch, each with the number of tokens from
    which on it does. Some models have a kind for each kind of layer."""
    parameters = getattr(architecture, "rope_parameters", None) or getattr(architecture, "rope_scaling", None) or {}
    each = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    tokens = {}
    for values in each:
        name = values.get("rope_type", values.get("type"))
        if name in ("dynamic", "longrope"):
            original = values.get("original_max_position_embeddings") if name == "longrope" else None
            tokens[name] = int(original or architecture.max_position_embeddings)
    return tokens
