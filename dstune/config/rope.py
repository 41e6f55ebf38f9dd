"""`model.rope`: rotary embeddings for rows longer than those that a model was trained on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from dstune.config.fields import setting
from dstune.core.errors import Problem
from dstune.protocols import method_of, task_of
from dstune.protocols.task_options import BuildsBatches

if TYPE_CHECKING:
    from dstune.config.schema import RunConfig

KEY = "model.rope.type"


class RopeType(Enum):
    yarn = "yarn"
    linear = "linear"
    dynamic = "dynamic"


@dataclass(frozen=True)
class RopeConfig:
    type: RopeType | None = None
    """Extend the positions of the model: `yarn` (arXiv:2309.00071), `linear` (arXiv:2306.15595), or `dynamic` (frequencies that
    depend on the longest row of a micro-batch); they are not extended when not given."""
    factor: float = setting(2.0, above=1.0)
    """Factor by which the number of positions grows; 2 turns 16,384 into 32,768."""


def check_rope(config: RunConfig) -> Iterator[Problem]:
    """Yield the settings that `model.rope` cannot be combined with."""
    rope = config.model.rope
    if rope.type is None:
        if rope.factor != RopeConfig.factor:
            yield Problem(
                "model.rope.factor", "it has no effect without model.rope.type", f"{KEY}=yarn", str(rope.factor)
            )
        return
    if rope.type is RopeType.dynamic and not has_lone_samples(config):
        reason = "its frequencies follow the longest row of a micro-batch, so a sample's loss would depend on the rows beside it"
        fixes = (f"{KEY}=yarn", *lone_samples_fix(config))
        yield Problem(KEY, reason, ", or ".join(fixes), rope.type.value)
    if method_of(config.method).adapter and config.run.export.name != "none":
        reason = (
            "an exported adapter cannot contain it, so servers would load the base model with its original positions"
        )
        yield Problem(KEY, reason, "run.export=none, then `dstune export RUN --merge` after training", rope.type.value)


def has_lone_samples(config: RunConfig) -> bool:
    """Return whether every forward pass has one sample, in training and evaluation."""
    rows = config.trainer.micro_batch_size
    sizes = {rows, config.evaluate.micro_batch_size or rows}
    return not config.data.packing and sizes == {1} and not _has_several_rows(config)


def lone_samples_fix(config: RunConfig) -> tuple[str, ...]:
    """Return the settings that give every forward pass one sample; empty if the task does not allow it."""
    if _has_several_rows(config):
        return ()
    of_evaluation = "" if config.evaluate.micro_batch_size is None else " evaluate.micro_batch_size=1"
    return (f"data.packing=false trainer.micro_batch_size=1{of_evaluation}",)


def _has_several_rows(config: RunConfig) -> bool:
    """Return whether a sample has several rows, such as the two answers of a preference."""
    return isinstance(task_of(config.task), BuildsBatches)


def rope_problems(values: Mapping[str, Any], rope: RopeConfig, max_length: int = 0) -> Iterator[Problem]:
    """Yield why the positions of a language model cannot be extended, or not to rows of `max_length` tokens.

    values: the language model's part of `config.json`.
    """
    if rope.type is None:
        return
    kind, settings = str(values.get("model_type")), rope_settings(values)
    if any(isinstance(value, Mapping) for value in settings.values()):
        reason = f"{kind} has several kinds of rotary embeddings, each with its own range, and only one can be extended"
        yield Problem(KEY, reason, "leave model.rope out", rope.type.value)
    elif (present := settings.get("rope_type") or settings.get("type") or "default") != "default":
        reason = f"the positions of this model are extended already ({present}, factor {settings.get('factor')})"
        yield Problem(KEY, reason, "leave model.rope out", rope.type.value)
    elif values.get("alibi") or values.get("position_embedding_type", "rope") not in ("rope", "rotary"):
        yield not_rotary(kind, rope)
    elif not settings and "rope_theta" not in values:
        yield Problem(
            KEY, f"the config.json of this {kind} model describes no rotary embeddings", "leave it out", rope.type.value
        )
    elif type(values.get("max_position_embeddings")) is not int:
        reason = "config.json does not say how many positions the model was made for (max_position_embeddings)"
        yield Problem(KEY, reason, "leave model.rope out", rope.type.value)
    elif max_length > (longest := int((positions := values["max_position_embeddings"]) * rope.factor)):
        reason = f"model.rope.factor={rope.factor:g} extends the {positions:,} positions of this model to {longest:,}"
        fix = f"data.max_length={longest}, or model.rope.factor={math.ceil(max_length / positions)}"
        yield Problem("data.max_length", reason, fix, str(max_length))


def not_rotary(model: str, rope: RopeConfig) -> Problem:
    """Return the problem that the positions of `model` are not rotary, although its `config.json` has settings of rotary ones."""
    assert rope.type is not None
    reason = f"the positions of this {model} model are not rotary, so there is nothing to extend"
    return Problem(KEY, reason, "leave model.rope out", rope.type.value)


def rope_settings(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return `rope_parameters` of a `config.json`, or `rope_scaling`, its older name; empty if it has neither."""
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(settings := values.get(name), Mapping):
            return settings
    return {}


def extended_rope(rope: RopeConfig, positions: int) -> tuple[dict[str, Any], int]:
    """Return the new `rope_parameters`, and `max_position_embeddings` in place of `positions`.

    With `dynamic`, `max_position_embeddings` stays: transformers stretches the positions of rows that are longer.
    """
    assert rope.type is not None
    settings: dict[str, Any] = {"rope_type": rope.type.value, "factor": rope.factor}
    if rope.type is RopeType.yarn:
        settings["original_max_position_embeddings"] = positions
    return settings, positions if rope.type is RopeType.dynamic else int(positions * rope.factor)
