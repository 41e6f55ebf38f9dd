"""All tensors of a model, from its `config.json` alone: names and shapes as `named_parameters()` of transformers lists them; tied
weights appear once, as there. `tests/unit/test_plan_architecture.py` compares them, name by name, with models that transformers
builds on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from dstune.config.architectures import size_problems
from dstune.config.parallel_rules import INWARD, OUTWARD
from dstune.core.errors import Problem, UserError
from dstune.planning import counted
from dstune.planning.architectures import decoders, encoder_decoders, encoders
from dstune.planning.architectures.tensors import (
    BODY,
    CLASSIFIER,
    LANGUAGE_MODEL,
    TOKEN_CLASSIFIER,
    Architecture,
    Tensor,
)

__all__ = [
    "BODY",
    "CLASSIFIER",
    "LANGUAGE_MODEL",
    "TOKEN_CLASSIFIER",
    "Architecture",
    "Tensor",
    "architecture",
    "architecture_or_count",
    "sliced",
]

DEFAULTS = decoders.DEFAULTS | encoders.DEFAULTS | encoder_decoders.DEFAULTS
_BUILDERS: dict[str, Callable[[dict[str, Any], str, int], Architecture]] = {
    **dict.fromkeys(decoders.DEFAULTS, decoders.decoder),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta"), encoders.bert),
    "deberta-v2": encoders.deberta,
    "modernbert": encoders.modernbert,
    "t5": encoder_decoders.t5,
    "bart": encoder_decoders.bart,
}


class MissingValue(UserError):
    """A `config.json` leaves out a size for which only transformers has a default."""


def architecture(config: Mapping[str, Any], head: str = LANGUAGE_MODEL, labels: int = 2) -> Architecture:
    """Return the architecture that a `config.json` describes, with the head of a task.

    head: `LANGUAGE_MODEL`, `CLASSIFIER` (of texts), `TOKEN_CLASSIFIER` or `BODY`.

    Raises:
        UserError: an architecture whose memory is not known here, or a value that is missing.
    """
    kind = str(config.get("model_type", ""))
    if kind not in DEFAULTS:
        kinds = ", ".join(sorted(DEFAULTS))
        reason = f"the planner does not know the architecture {kind or '(config.json names none)'}"
        raise UserError(Problem("model.path", reason, f"it knows {kinds}"))
    values = dict(DEFAULTS[kind]) | {key: value for key, value in config.items() if value is not None}
    if problems := size_problems(values):
        raise UserError(problems)
    try:
        built = _BUILDERS[kind](values, head, labels)
        if any(type(length) is not int for tensor in built.tensors for length in tensor.shape):
            reason = "its config.json has a size that is no whole number"
        elif (part := _missing_part(built)) is None:
            return built
        else:
            reason = f"its config.json describes a model without {part}"
    except KeyError as missing:
        reason = f"its config.json has no {missing.args[0]}"
        raise MissingValue(Problem("model.path", reason, "give a whole config.json")) from None
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        reason = f"its config.json has a value of another kind than a model's: {error}"
    raise UserError(Problem("model.path", reason, "give a whole config.json"))


def is_known(values: Mapping[str, Any]) -> bool:
    """Return whether the architecture of this `config.json` has a closed form."""
    return str(values.get("model_type", "")) in DEFAULTS


def architecture_or_count(
    values: Mapping[str, Any], whole: Mapping[str, Any], head: str = LANGUAGE_MODEL, labels: int = 2
) -> Architecture:
    """Build as `architecture`; where there is no closed form, or a size is missing, counted by a child process
    (`planning.counted`).

    values: the language model's part of `whole`, a `config.json`.

    Raises:
        UserError: as `architecture`, and where transformers has no such architecture.
    """
    if is_known(values):
        try:
            return architecture(values, head, labels)
        except MissingValue:
            if not {"hidden_size", "num_hidden_layers"} <= set(values):
                raise  # nothing but defaults would be counted
    if problems := size_problems(whole):
        raise UserError(problems)
    return counted.counted(whole, head, labels)


def _missing_part(built: Architecture) -> str | None:
    """Return what a size below 1 leaves a model without; None if it has all of its parts."""
    sizes = {"layers": built.layers, "attention heads": built.heads, "vocabulary": built.vocabulary}
    sizes["width"] = min(length for tensor in built.tensors for length in tensor.shape)
    return next((part for part, size in sizes.items() if size < 1), None)


def sliced(model: Architecture, parts: int) -> Architecture:
    """Return one of `parts` ranks' share of a model whose layers the ranks share (`dstune.models.tensor`)."""
    inward = {name for names in INWARD for name in names}

    def slice_of(tensor: Tensor) -> Tensor:
        owner, shape = tensor.name.split(".")[-2], list(tensor.shape)
        if owner in inward:
            shape[0] //= parts
        elif owner in OUTWARD and len(shape) == 2:
            shape[1] //= parts
        return replace(tensor, shape=tuple(shape))

    return replace(
        model,
        tensors=tuple(map(slice_of, model.tensors)),
        heads=model.heads // parts,
        kv_heads=model.kv_heads // parts,
        intermediate=model.intermediate // parts,
    )
