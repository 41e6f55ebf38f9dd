"""A fine-tuning method applied to a loaded model: what is added, what is trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from transformers import PreTrainedModel

from dstune.config.architectures import adapted_experts_problem
from dstune.config.method_schema import (
    AdapterConfig,
    FeaturesConfig,
    FreezeConfig,
    FullConfig,
    HeadConfig,
    Ia3Config,
    ImportanceConfig,
    LoraConfig,
    LoraInit,
    ModuleAdapterConfig,
    OftConfig,
    UlmfitConfig,
    VeraConfig,
)
from dstune.config.schema import RunConfig
from dstune.errors import Problem, UserError
from dstune.models.adapter_files import load_adapter, put_beneath
from dstune.models.base_weights import original_weights
from dstune.models.freeze import freeze_body, freeze_parts
from dstune.models.load import NewWeights, new_weights
from dstune.models.lora_start import start_lora
from dstune.models.prompts import add_prompt, task_type
from dstune.zero.parts import full_count, full_shape, gathered


def apply_method(config: RunConfig, model: PreTrainedModel) -> nn.Module:
    """The model with the method's parameters added and the rest frozen.

    Raises UserError where the method does not fit the model.
    """
    match config.method:
        case FullConfig() | FeaturesConfig() | UlmfitConfig() | ImportanceConfig():
            return model
        case FreezeConfig() as freeze:
            freeze_parts(model, freeze)
            return model
        case HeadConfig():
            freeze_body(model)
            return model
        case AdapterConfig() as adapter:
            torch.manual_seed(config.trainer.seed)  # the adapters' first weights, the same on every rank
            return _add_adapter(model, adapter, config)
    raise AssertionError(f"no way to apply {config.method!r}")


def _add_adapter(model: PreTrainedModel, method: AdapterConfig, config: RunConfig) -> nn.Module:
    if not isinstance(method, LoraConfig) and new_weights(model).rows:
        reason = f"{len(new_weights(model).rows)} added tokens have to be trained, which method={method.name} cannot"
        raise UserError(Problem("method", reason, "method=lora, or model.chat_template=null"))
    adapted: nn.Module
    match method:
        case LoraConfig():
            adapted = _add_lora(model, method, config)
        case ModuleAdapterConfig():
            adapted = _adapt(model, _module_settings(model, method, config), method, [], config)
        case _:
            adapted = add_prompt(model, method, config)
    if method.adapter and model.device.type != "meta":
        load_adapter(adapted, Path(method.adapter))
    return adapted


def _module_settings(model: PreTrainedModel, method: ModuleAdapterConfig, config: RunConfig) -> Any:
    """peft's settings of an adapter other than LoRA."""
    import peft

    common = {
        "target_modules": _targets(method),
        "modules_to_save": _modules_to_save(method, new_weights(model)) or None,
        "task_type": task_type(config, model),
    }
    match method:
        case Ia3Config():
            chosen = {"feedforward_modules": method.feedforward_modules} if method.target_modules else {}
            return peft.IA3Config(**common, **chosen)
        case VeraConfig():
            return peft.VeraConfig(
                r=method.rank,
                vera_dropout=method.dropout,
                d_initial=method.first_scale,
                projection_prng_key=method.projection_seed,
                **common,
            )
        case OftConfig():
            return peft.OFTConfig(
                r=0,
                oft_block_size=method.block_size,
                module_dropout=method.dropout,
                block_share=method.block_share,
                use_cayley_neumann=not method.exact,
                **common,
            )
    raise AssertionError(method)


def _add_lora(model: PreTrainedModel, lora: LoraConfig, config: RunConfig) -> nn.Module:
    import peft

    new = new_weights(model)
    on_meta = model.device.type == "meta"  # an export, which takes all weights from the checkpoint
    if lora.frozen_adapters and not on_meta:
        put_beneath(model, lora.frozen_adapters)
    settings = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=_number(lora.alpha),
        lora_dropout=lora.dropout,
        target_modules=_targets(lora),
        modules_to_save=_modules_to_save(lora, new) or None,
        trainable_token_indices=_token_rows(model, new) or None,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern={name: _number(alpha) for name, alpha in lora.alpha_pattern.items()},
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        init_lora_weights="gaussian" if lora.init is LoraInit.gaussian else True,
        task_type=task_type(config, model),
    )
    # peft copies the rows that it trains, so the vocabulary has to be whole for a moment.
    with _layers_gathered(model) if lora.dora else nullcontext():
        adapted = _adapt(model, settings, lora, _vocabulary(model) if new.rows else [], config)
    if not on_meta:
        start_lora(adapted, lora, partial(original_weights, config.model))
    return adapted


@contextmanager
def _layers_gathered(model: nn.Module) -> Iterator[None]:
    """Let peft gather the partitioned weights that DoRA measures, one layer at a time.

    It does so where transformers says that it runs under ZeRO-3, which that says while a model is loaded only; then peft
    would look for the rows of trained tokens on a GPU too.
    """
    if not any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        yield
        return
    with patch("peft.utils.integrations.check_deepspeed_zero3_enabled", lambda: True):
        yield


def _adapt(
    model: PreTrainedModel, settings: Any, method: ModuleAdapterConfig, whole: list[nn.Parameter], config: RunConfig
) -> Any:
    """The model with peft's adapters on its modules. Raises UserError where it has no such modules."""
    import peft

    try:
        with gathered(whole):
            adapted = peft.get_peft_model(model, settings, autocast_adapter_dtype=False)
    except ValueError as error:
        raise UserError(_refused_by_peft(str(error).splitlines()[0], method)) from error
    if config.trainer.activation_checkpointing:
        # A frozen embedding's output carries no gradient, and a checkpointed block without one is not differentiated.
        model.enable_input_require_grads()
    return adapted


def experts_without_adapters(module: nn.Module) -> float:
    """Share of the weights that are in stacked experts, where there are any and none of them has an adapter; else 0."""
    parameters = dict(module.named_parameters())
    inside = {name: parameter for name, parameter in parameters.items() if ".experts." in name}
    if any(".lora_" in name for name in inside):
        return 0.0
    stacked = sum(full_count(parameter) for parameter in inside.values() if len(full_shape(parameter)) == 3)
    return stacked / sum(map(full_count, parameters.values()))


def _refused_by_peft(reason: str, method: ModuleAdapterConfig) -> Problem:
    if "ParamWrapper" in reason and isinstance(method, LoraConfig) and (problem := adapted_experts_problem(method)):
        return problem
    fix = "method.target_modules=[all-linear], or endings of names of linear layers of the model"
    return Problem("method.target_modules", reason, fix, str(method.target_modules))


def _number(value: float) -> float:
    """peft types alpha as an integer but only ever divides it by the rank."""
    return int(value) if value == int(value) else value


def _targets(method: ModuleAdapterConfig) -> Any:
    if not method.target_modules:  # only with ia3
        return None
    return "all-linear" if method.target_modules == ["all-linear"] else method.target_modules


def _modules_to_save(method: ModuleAdapterConfig, new: NewWeights) -> list[str]:
    """The modules trained whole: those asked for, and those whose weights are drawn new (a pooler, a head).

    An adapter's folder holds nothing else of the model, so a new weight left frozen would be another one at every load.
    """
    owners = {name.rpartition(".")[0] for name in new.parameters}
    # peft adds a task's own head by itself, as a whole.
    owners = {owner for owner in owners if not {"classifier", "score", "qa_outputs"} & set(owner.split("."))}
    return [*method.modules_to_save, *sorted(owners - set(method.modules_to_save))]


def _token_rows(model: PreTrainedModel, new: NewWeights) -> dict[str, list[int]]:
    """Rows to train, by the name of each module that has them (two where the vocabulary is not tied)."""
    if not new.rows:
        return {}
    weights = {id(weight) for weight in _vocabulary(model)}
    owners = [name for name, weight in model.named_parameters() if id(weight) in weights]
    return {name.split(".")[-2]: list(new.rows) for name in owners}


def _vocabulary(model: PreTrainedModel) -> list[nn.Parameter]:
    """The weights with a row for each token: one where they are tied, else two."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = {id(module.weight): module.weight for module in modules if module is not None}
    return list(weights.values())
