"""Trained prompts: parameters in front of the row or of each layer's keys, and a model that stays as it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from dstune.config.method_schema import AdapterConfig, PrefixConfig, PromptConfig, PTuningConfig
from dstune.config.schema import RunConfig
from dstune.config.task_schema import (
    ClassificationConfig,
    EmbeddingConfig,
    QuestionAnsweringConfig,
    RewardConfig,
    TokenClassificationConfig,
)
from dstune.errors import Problem, UserError
from dstune.models.load import load_tokenizer, new_weights
from dstune.zero.parts import gathered

COMMON_TOKENS = 5000
"""A prompt without a text begins with some of the first tokens of the vocabulary, which are the most common ones where
merges are learnt in the order of their frequency (Lester et al. 2021 draw from the 5,000 most common)."""


def task_type(config: RunConfig, model: PreTrainedModel) -> Any:
    """peft's name of the task: which head is trained beside the adapter, and which class wraps the model."""
    import peft

    match config.task:
        case ClassificationConfig() | RewardConfig():
            return peft.TaskType.SEQ_CLS
        case EmbeddingConfig():
            return peft.TaskType.FEATURE_EXTRACTION
        case TokenClassificationConfig():
            return peft.TaskType.TOKEN_CLS
        case QuestionAnsweringConfig():
            return peft.TaskType.QUESTION_ANS
    return peft.TaskType.SEQ_2_SEQ_LM if model.config.is_encoder_decoder else peft.TaskType.CAUSAL_LM


def add_prompt(model: PreTrainedModel, method: AdapterConfig, config: RunConfig) -> nn.Module:
    """The frozen model behind a trained prompt. Every rank must call it. Raises UserError where the model takes none."""
    import peft

    new = [name for name in new_weights(model).parameters if not {"classifier", "score"} & set(name.split("."))]
    if new:
        reason = f"{', '.join(new[:2])} of {type(model).__name__} are new and have to be trained, which it cannot"
        raise UserError(Problem("method", reason, "method=lora", method.name))
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    taken = config.data.max_length + method.virtual_tokens  # type: ignore[attr-defined]
    if longest is not None and taken > longest:
        reason = f"rows of this length and the trained prompt take {taken} positions, and the model has {longest}"
        fix = f"data.max_length={longest - taken + config.data.max_length}"
        raise UserError(Problem("data.max_length", reason, fix, str(config.data.max_length)))
    try:
        adapted: Any = peft.get_peft_model(model, _settings(model, method, config), autocast_adapter_dtype=False)
    except (ValueError, AttributeError, KeyError) as error:
        reason = f"{type(model).__name__} takes no {method.name}: {str(error).splitlines()[0]}"
        raise UserError(Problem("method", reason, "method=lora", method.name)) from error
    adapted.prompt_encoder.to(model.dtype)  # as peft does with what it puts beside layers
    if isinstance(method, PromptConfig) and model.device.type != "meta":
        _start(adapted, method, config)
    return adapted


def _settings(model: PreTrainedModel, method: AdapterConfig, config: RunConfig) -> Any:
    import peft

    kind = task_type(config, model)
    match method:
        case PromptConfig():
            return peft.PromptTuningConfig(num_virtual_tokens=method.virtual_tokens, task_type=kind)
        case PrefixConfig():
            projected = method.projection_size is not None
            return peft.PrefixTuningConfig(
                num_virtual_tokens=method.virtual_tokens,
                prefix_projection=projected,
                encoder_hidden_size=method.projection_size,
                task_type=kind,
            )
        case PTuningConfig():
            return peft.PromptEncoderConfig(
                num_virtual_tokens=method.virtual_tokens,
                encoder_reparameterization_type=method.encoder.name.upper(),
                encoder_hidden_size=method.encoder_size,
                encoder_num_layers=method.encoder_layers,
                encoder_dropout=method.encoder_dropout,
                task_type=kind,
            )
    raise AssertionError(method)


def _start(adapted: Any, method: PromptConfig, config: RunConfig) -> None:
    """Give the prompt the embeddings of tokens: peft's own start has a deviation of 1, embeddings one of about 0.02."""
    words: nn.Parameter = adapted.word_embeddings.weight
    with gathered([words]), torch.no_grad():
        if method.init_text:
            ids = load_tokenizer(config.model)(method.init_text, add_special_tokens=False)["input_ids"]
            chosen = torch.tensor([ids[place % len(ids)] for place in range(method.virtual_tokens)])
        else:
            generator = torch.Generator().manual_seed(config.trainer.seed)
            chosen = torch.randint(min(COMMON_TOKENS, len(words)), (method.virtual_tokens,), generator=generator)
        embedding = adapted.prompt_encoder["default"].embedding.weight
        embedding.copy_(words[chosen.to(words.device)])
