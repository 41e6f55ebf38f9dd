"""Signals from the served model: its confidence, its predictions, and its loss where a label is known."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dstune.config.schema import ModelConfig, RunConfig
from dstune.monitor.conversations import Conversation
from dstune.protocols import task_of

PROMPT_TOKENS = 512
"""Tokens of a conversation on which a language model's loss is measured."""
LEAST_PROBABILITY = 1e-12

Values = dict[str, np.ndarray]
"""Values by signal, [conversations]: numbers, with NaN for a missing one, or texts, with ""."""


def measure(run: Path, config: RunConfig, conversations: Sequence[Conversation], batch_size: int = 32) -> Values:
    """Measure each conversation with a run's newest checkpoint. A language model gives `prompt_loss`, the mean loss per token of
    the questions, since live rows have no correct answers. Other models give `confidence` (the probability of their prediction) or
    `prediction_score`, `prediction`, and `loss` where a label is known. Raises UserError if the model cannot answer."""
    if task_of(config.task).generates:
        return {"prompt_loss": _prompt_losses(run, [conversation.text for conversation in conversations])}
    from dstune.api.models import predict

    answers = predict(
        run,
        [_columns(conversation, config) for conversation in conversations],
        batch_size=batch_size,
        probabilities=True,
    )
    return _readings(answers, conversations)


def _columns(conversation: Conversation, config: RunConfig) -> Mapping[str, Any]:
    """Return the row under the column names of the run."""
    names = config.data.columns
    return {names.get(role, role): value for role, value in conversation.fields.items() if value is not None}


def _readings(answers: Sequence[Mapping[str, Any]], conversations: Sequence[Conversation]) -> Values:
    confidence = [_number(answer.get("probability")) for answer in answers]
    score = [_number(answer.get("score")) for answer in answers]
    predicted = [answer["predicted"] if isinstance(answer.get("predicted"), str) else "" for answer in answers]
    loss = [_loss(answer, conversation.label) for answer, conversation in zip(answers, conversations, strict=True)]
    values: Values = {
        "confidence": np.array(confidence),
        "prediction_score": np.array(score),
        "prediction": np.array(predicted),
        "loss": np.array(loss),
    }
    return {name: reading for name, reading in values.items() if _is_known(reading).any()}


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _loss(answer: Mapping[str, Any], label: str | None) -> float:
    probabilities = answer.get("probabilities")
    if label is None or not isinstance(probabilities, Mapping) or label not in probabilities:
        return math.nan
    return -math.log(max(float(probabilities[label]), LEAST_PROBABILITY))


def _is_known(values: np.ndarray) -> np.ndarray:
    return values != "" if values.dtype.kind == "U" else np.isfinite(values)


def _prompt_losses(run: Path, texts: Sequence[str]) -> np.ndarray:
    """Return the mean loss per token, [texts]; NaN for a text of one token."""
    import torch

    from dstune.inference.voices import open_speaker

    losses = np.full(len(texts), math.nan)
    with open_speaker(ModelConfig(path=str(run)), "last", {}) as speaker, torch.inference_mode():
        tokenizer = next(iter(speaker.voices.values())).tokenizer
        device = next(speaker.model.parameters()).device
        for number, text in enumerate(texts):
            ids = tokenizer(text, truncation=True, max_length=PROMPT_TOKENS, return_tensors="pt")["input_ids"].to(
                device
            )
            if ids.shape[1] < 2:
                continue
            logits = speaker.model(input_ids=ids).logits[0, :-1].float()
            losses[number] = float(torch.nn.functional.cross_entropy(logits, ids[0, 1:]))
    return losses
