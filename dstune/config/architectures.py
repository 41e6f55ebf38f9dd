"""Architectures that no task can train: known from a model's `config.json`, so by the launcher and by every rank."""

from __future__ import annotations

from dstune.config.schema import ModelConfig
from dstune.errors import Problem


def encoder_decoder_problem(model: ModelConfig, architecture: str) -> Problem:
    """The problem with a model (T5, BART, ...) that reads one text and writes another."""
    reason = f"{architecture} is an encoder-decoder, which needs task=seq2seq; this version has no such task"
    fix = "choose a decoder (task=chat, task=causal_lm) or an encoder (task=classification)"
    return Problem("model.path", reason, fix, model.path)
