"""Adds low-rank adapters to a loaded model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

from torch import nn
from transformers import PreTrainedModel

from dstune.config.schema import RunConfig
from dstune.core.confinement.here import check_patterns
from dstune.core.errors import Problem, UserError
from dstune.methods._peft.apply import adapt, common_settings
from dstune.methods.lora.beneath import put_beneath
from dstune.methods.lora.config import LoraConfig, LoraInit
from dstune.methods.lora.start import start_lora
from dstune.models.base_weights import original_weights
from dstune.models.load import NewWeights, new_weights
from dstune.models.unreached import is_within, unreached_parts
from dstune.planning.adapters import STATE_SPACES
from dstune.zero.parts import full_count, full_shape, is_partitioned


def add_lora(
    lora: LoraConfig, model: PreTrainedModel, config: RunConfig, refused: Callable[[str], Problem]
) -> nn.Module:
    """Return the model with LoRA adapters. refused: makes a problem from peft's error message."""
    from dstune.models.peft_import import peft

    new = new_weights(model)
    on_meta = model.device.type == "meta"  # an export, which takes all weights from the checkpoint
    if new.rows and not on_meta:
        _refuse_vocabulary(lora, model)
    if lora.frozen_adapters and not on_meta:
        put_beneath(model, lora.frozen_adapters)
    patterns = {"rank_pattern": dict(lora.rank_pattern), "alpha_pattern": dict(lora.alpha_pattern)}
    check_patterns(patterns, [name for name, _ in model.named_modules()], "method.rank_pattern", lora.adapter or "")
    _check_stacked(lora, model)
    settings = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=_number(lora.alpha),
        lora_dropout=lora.dropout,
        trainable_token_indices=_token_rows(model, new) or None,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern={name: _number(alpha) for name, alpha in lora.alpha_pattern.items()},
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        init_lora_weights="gaussian" if lora.init is LoraInit.gaussian else True,
        target_parameters=list(lora.target_parameters) or None,
        **common_settings(lora, model, config),
    )
    # peft copies the rows that it trains, so the vocabulary must not be partitioned meanwhile.
    with _layers_gathered(model) if lora.dora else nullcontext():
        adapted: nn.Module = adapt(model, settings, refused, _vocabulary(model) if new.rows else [], config)
    if not on_meta:
        start_lora(adapted, lora, partial(original_weights, config.model))
    return adapted


@contextmanager
def _layers_gathered(model: nn.Module) -> Iterator[None]:
    """Let peft gather the partitioned weights that DoRA measures, one layer at a time.

    peft does so only if transformers reports ZeRO-3, and transformers reports it only while a model is loaded. If it reported it
    here, peft would also look for the rows of trained tokens on a GPU; therefore only peft's own check is replaced.
    """
    if not any(map(is_partitioned, model.parameters())):
        yield
        return
    with patch("peft.utils.integrations.check_deepspeed_zero3_enabled", lambda: True):
        yield


def _check_stacked(lora: LoraConfig, model: PreTrainedModel) -> None:
    """Raises UserError for each ending in `method.target_parameters` that no weight of the model has. It need not be a stacked
    weight: a finished adapter may name a router's."""
    shapes = {name: full_shape(parameter) for name, parameter in model.named_parameters()}
    stacked = [name for name, shape in shapes.items() if len(shape) == 3]
    endings = sorted({".".join(name.split(".")[-2:]) for name in stacked})
    fix = f"[{','.join(endings)}]" if endings else "leave it out: this model has none"
    problems = [
        Problem("method.target_parameters", "no weight of the model ends so", fix, ending)
        for ending in lora.target_parameters
        if not any(f".{name}".endswith(f".{ending}") for name in shapes)
    ]
    if problems:
        raise UserError(problems)


def layers_without_adapters(adapted: nn.Module) -> dict[str, int]:
    """Return the number of weights of each linear layer that `all-linear` leaves without an adapter, by the layer's name.

    Not counted: the head, modules trained whole, parts that rows never reach, and layers that peft never adapts.
    """
    if not hasattr(adapted, "get_base_model"):
        return {}
    model: Any = adapted.get_base_model()  # type: ignore[operator]
    head, parts = model.get_output_embeddings(), unreached_parts(model)
    count_by_name = {}
    for name, module in model.named_modules():
        inner = {"base_layer", "modules_to_save", "original_module", "lora_A", "lora_B"} & set(name.split("."))
        if not isinstance(module, nn.Linear) or module is head or inner or is_within(name, parts):
            continue
        if model.config.model_type in STATE_SPACES and name.endswith("out_proj"):
            continue
        weight: Any = module.weight
        count_by_name[name] = full_count(weight)
    return count_by_name


def experts_without_adapters(module: nn.Module) -> float:
    """Return the share of the weights that are in stacked experts; 0 if any expert has an adapter or there are none."""
    parameters = dict(module.named_parameters())
    inside = {name: parameter for name, parameter in parameters.items() if ".experts." in name}
    if any(".lora_" in name for name in inside):
        return 0.0
    stacked = sum(full_count(parameter) for parameter in inside.values() if len(full_shape(parameter)) == 3)
    return stacked / sum(map(full_count, parameters.values()))


def _number(value: float) -> float:
    """Return alpha as an integer if it is whole. peft declares it as one, but only divides it by the rank."""
    return int(value) if value == int(value) else value


def _token_rows(model: PreTrainedModel, new: NewWeights) -> dict[str, list[int]]:
    """Return the rows to train, by the name of each module that has them (two modules if the vocabulary is not tied)."""
    if not new.rows:
        return {}
    weights = {id(weight) for weight in _vocabulary(model)}
    owners = [name for name, weight in model.named_parameters() if id(weight) in weights]
    return {name.split(".")[-2]: list(new.rows) for name in owners}


def _refuse_vocabulary(lora: LoraConfig, model: PreTrainedModel) -> None:
    """Raises UserError if the vocabulary would get another adapter besides trained rows of new tokens: peft has no layer with both.
    Only a tied projection may have one, since the trained rows then belong to the embedding."""
    tied = model.get_output_embeddings() if len(_vocabulary(model)) == 1 else None
    vocabulary = {id(weight) for weight in _vocabulary(model)}
    owners = {name: owner for name, owner in model.named_modules() if id(getattr(owner, "weight", None)) in vocabulary}
    for name, module in owners.items():
        for key, endings in (("target_modules", lora.target_modules), ("modules_to_save", lora.modules_to_save)):
            if module is tied and key == "target_modules":
                continue
            if matching := [ending for ending in endings if f".{name}".endswith(f".{ending}")]:
                reason = f"{name} holds the vocabulary, and the rows of its new tokens are trained already"
                fix = "leave it out, or train no new tokens (model.add_tokens, model.chat_template)"
                raise UserError(Problem(f"method.{key}", reason, fix, matching[0]))


def _vocabulary(model: PreTrainedModel) -> list[nn.Parameter]:
    """Return the weights with a row for each token: one if they are tied, otherwise two."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = {id(module.weight): module.weight for module in modules if module is not None}
    return list(weights.values())
