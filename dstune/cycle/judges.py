"""Query a version for the gates: scores of rows that have answers, and answers to rows that have none."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dstune.config.data_schema import AUTOMATIC
from dstune.config.schema import ModelConfig, RunConfig
from dstune.cycle.gates import Judge
from dstune.grading.verdicts import LOG_PROBABILITIES
from dstune.monitor.conversations import asked_texts
from dstune.protocols import task_of

if TYPE_CHECKING:
    from dstune.data.tokenize import Sample
    from dstune.inference.voices import Speaker

Row = Mapping[str, Any]
ANSWER_TOKENS = 64


def judge_of(folder: Path, config: RunConfig, batch_size: int = 32) -> Judge:
    """Return the judge of an exported model. config: the configuration of its run."""
    if task_of(config.task).generates:
        return Judge(
            lambda rows: _log_probabilities(folder, config, rows),
            lambda rows: _written(folder, rows),
            lambda rows: _recited(folder, config, rows),
            LOG_PROBABILITIES,
        )
    return Judge(
        lambda rows: _hits(folder, rows, batch_size),
        lambda rows: [name for name, _ in _predicted(folder, rows, batch_size)],
    )


def _predicted(folder: Path, rows: Sequence[Row], batch_size: int) -> list[tuple[str, float]]:
    from dstune.api.models import predict

    asked = [{"text": "\n".join(asked_texts(row))} for row in rows]
    answers = predict(folder, asked, batch_size=batch_size)
    return [(str(answer.get("predicted", "")), float(answer.get("probability", math.nan))) for answer in answers]


def _hits(folder: Path, rows: Sequence[Row], batch_size: int) -> np.ndarray:
    names = [name for name, _ in _predicted(folder, rows, batch_size)]
    return np.array([name == row.get("label") for name, row in zip(names, rows, strict=True)], dtype=float)


def _written(folder: Path, rows: Sequence[Row]) -> list[str]:
    from dstune.api.models import generate

    prompts = [_prompt(row) for row in rows]
    return [str(text) for text in generate(folder, prompts, max_new_tokens=ANSWER_TOKENS)]


def _prompt(row: Row) -> Any:
    """Return the conversation up to its last question, or the text."""
    messages = row.get("messages")
    if not isinstance(messages, list):
        return "\n".join(asked_texts(row))
    last = max((number for number, message in enumerate(messages) if message.get("role") == "user"), default=-1)
    return messages[: last + 1]


def _log_probabilities(folder: Path, config: RunConfig, rows: Sequence[Row]) -> np.ndarray:
    """Return mean log-probability of a token of each row's answer, by the sums and masks of training [rows]; NaN of a row that
    training would leave out."""
    import torch

    from dstune.inference.voices import open_speaker

    scores = np.full(len(rows), math.nan)
    with open_speaker(ModelConfig(path=str(folder)), "last", {}) as speaker, torch.inference_mode():
        device = next(speaker.model.parameters()).device
        sums, counts = np.zeros(len(rows)), np.zeros(len(rows))
        for sample in _samples(speaker, config, rows):
            ids = torch.as_tensor(np.asarray(sample.input_ids), dtype=torch.long, device=device)[None]
            labels = torch.as_tensor(np.asarray(sample.labels), dtype=torch.long, device=device)[1:]
            logits = speaker.model(input_ids=ids).logits[0, :-1].float()
            sums[sample.row] += float(
                -torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
            )
            counts[sample.row] += int((labels != -100).sum())
    is_scored = counts > 0
    scores[is_scored] = sums[is_scored] / counts[is_scored]
    return scores


def _samples(speaker: Speaker, config: RunConfig, rows: Sequence[Row]) -> Iterator[Sample]:
    """Yield the samples of the rows, truncated as in training; rows without a sample are left out."""
    from dstune.data.rows import normalise, recognise
    from dstune.data.tokenize import RowTokenizer

    tokenizer = next(iter(speaker.voices.values())).tokenizer
    form = recognise(rows[0], {}, AUTOMATIC, config.task, "gate")
    encode = RowTokenizer(tokenizer, config.task, form, config.data.max_length)
    normalised = [normalise(row, recognise(row, {}, AUTOMATIC, config.task, "gate"), {}, config.task) for row in rows]
    return (sample for sample in encode.samples(normalised, list(range(len(rows)))) if not sample.problem)


def _recited(folder: Path, config: RunConfig, rows: Sequence[Row]) -> np.ndarray:
    """Measure which share of each row the model recites after its beginning, [rows]; 0 for rows that are too short."""
    from dstune.inference.voices import open_speaker
    from dstune.trainer.safety import recital_of, recited_shares

    shares = np.zeros(len(rows))
    with open_speaker(ModelConfig(path=str(folder)), "last", {}) as speaker:
        padding = next(iter(speaker.voices.values())).tokenizer.pad_token_id
        for sample in _samples(speaker, config, rows):
            if (recital := recital_of(sample.input_ids, sample.labels)) is not None:
                shares[sample.row] = max(shares[sample.row], *recited_shares(speaker.model, [recital], padding))
    return shares
