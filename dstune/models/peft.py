"""A fine-tuning method applied to a loaded model: what is added, what is trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from dstune.config.method_schema import (
    FeaturesConfig,
    FreezeConfig,
    FullConfig,
    HeadConfig,
    ImportanceConfig,
    LoraConfig,
    UlmfitConfig,
)
from dstune.config.schema import RunConfig
from dstune.config.task_schema import (
    ClassificationConfig,
    EmbeddingConfig,
    QuestionAnsweringConfig,
    RewardConfig,
    TaskConfig,
    TokenClassificationConfig,
)
from dstune.errors import Problem, UserError
from dstune.models.freeze import freeze_body, freeze_parts
from dstune.models.load import NewWeights, new_weights
from dstune.zero.engine import gathered


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
        case LoraConfig() as lora:
            torch.manual_seed(config.trainer.seed)  # the adapters' first weights, the same on every rank
            return _add_lora(model, lora, config)


def _add_lora(model: PreTrainedModel, lora: LoraConfig, config: RunConfig) -> nn.Module:
    import peft

    targets: Any = lora.target_modules
    if lora.target_modules == ["all-linear"]:
        targets = "all-linear"
    new = new_weights(model)
    settings = peft.LoraConfig(
        r=lora.rank,
        # peft types alpha as an integer but only ever divides it by the rank.
        lora_alpha=int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        modules_to_save=_modules_to_save(lora, new) or None,
        trainable_token_indices=_token_rows(model, new) or None,
        use_rslora=lora.rslora,
        task_type=_task_type(config.task),
    )
    try:
        # peft copies the rows that it trains, so the vocabulary has to be whole for a moment.
        with gathered(_vocabulary(model) if new.rows else []):
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


def _task_type(task: TaskConfig) -> Any:
    import peft

    match task:
        case ClassificationConfig() | RewardConfig():
            return peft.TaskType.SEQ_CLS
        case EmbeddingConfig():
            return peft.TaskType.FEATURE_EXTRACTION
        case TokenClassificationConfig():
            return peft.TaskType.TOKEN_CLS
        case QuestionAnsweringConfig():
            return peft.TaskType.QUESTION_ANS
    return peft.TaskType.CAUSAL_LM


def _modules_to_save(lora: LoraConfig, new: NewWeights) -> list[str]:
    """The modules trained whole: those asked for, and those whose weights are drawn new (a pooler, a head).

    An adapter's folder holds nothing else of the model, so a new weight left frozen would be another one at every load.
    """
    owners = {name.rpartition(".")[0] for name in new.parameters}
    # peft adds a task's own head by itself, as a whole.
    owners = {owner for owner in owners if not {"classifier", "score", "qa_outputs"} & set(owner.split("."))}
    return [*lora.modules_to_save, *sorted(owners - set(lora.modules_to_save))]


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
