"""A fine-tuning method applied to a loaded model: what is added, what is trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from dstune.config.schema import ClassificationConfig, FullConfig, HeadConfig, LoraConfig, RunConfig
from dstune.errors import Problem, UserError
from dstune.models.freeze import freeze_body


def apply_method(config: RunConfig, model: PreTrainedModel) -> nn.Module:
    """The model with the method's parameters added and the rest frozen.

    Raises UserError where the method does not fit the model.
    """
    match config.method:
        case FullConfig():
            return model
        case HeadConfig():
            freeze_body(model)
            return model
        case LoraConfig() as lora:
            torch.manual_seed(config.trainer.seed)  # the adapters' first weights, the same on every rank
            return _add_lora(model, lora, config)


def _add_lora(model: PreTrainedModel, lora: LoraConfig, config: RunConfig) -> nn.Module:
    import peft

    classification = isinstance(config.task, ClassificationConfig)
    targets: Any = lora.target_modules
    if lora.target_modules == ["all-linear"]:
        targets = "all-linear"
    settings = peft.LoraConfig(
        r=lora.rank,
        # peft types alpha as an integer but only ever divides it by the rank.
        lora_alpha=int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        modules_to_save=lora.modules_to_save or None,
        use_rslora=lora.rslora,
        task_type=peft.TaskType.SEQ_CLS if classification else peft.TaskType.CAUSAL_LM,
    )
    try:
        adapted = peft.get_peft_model(model, settings, autocast_adapter_dtype=False)
    except ValueError as error:
        raise UserError(
            Problem(
                "method.target_modules",
                value=str(lora.target_modules),
                reason=str(error).splitlines()[0],
                fix="method.target_modules=[all-linear], or endings of names of linear layers of the model",
            )
        ) from error
    if config.trainer.activation_checkpointing:
        # A frozen embedding's output carries no gradient, and a checkpointed block without one is not differentiated.
        model.enable_input_require_grads()
    return adapted
