"""The reference of the parity tests: a plain single-process torch loop with no DeepSpeed and nothing of the trainer.

It shares with dstune what defines the problem (rows, their order, the loss of a global batch) and nothing of how it is solved:
one model, the whole global batch's gradient by autograd, SGD by hand. It computes in float64 (torch draws the same dropout masks
in both types), so that a difference is dstune's own rounding: the same loop in fp32 is no closer to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from dstune.config.forgetting import general_rows
from dstune.config.schema import RunConfig
from dstune.core.rank_env import RankEnv
from dstune.data.build import prepare
from dstune.data.collate import collate
from dstune.data.sampler import GlobalBatch, TrainingOrder
from dstune.models.load import load_tokenizer
from dstune.trainer.data_loader import order_of
from dstune.trainer.prefetcher import dropout_seed


@dataclass
class Reference:
    losses: list[float]
    grad_norms: list[float]
    weights: dict[str, torch.Tensor]


def next_token_loss(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, float]:
    """The sum of the losses of a micro-batch, and their weight."""
    labels = batch.pop("labels")
    logits = model(**batch, use_cache=False).logits
    targets = labels[:, 1:].flatten()
    loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets, ignore_index=-100, reduction="sum")
    return loss, int((targets != -100).sum())


def target_loss(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, float]:
    """That of an encoder-decoder, which makes the decoder's input from the labels by itself."""
    logits, targets = model(**batch, use_cache=False).logits, batch["labels"].flatten()
    loss = functional.cross_entropy(logits.flatten(0, 1), targets, ignore_index=-100, reduction="sum")
    return loss, int((targets != -100).sum())


def train_plainly(
    config: RunConfig,
    cache: Path,
    model_class: Any = AutoModelForCausalLM,
    loss_of: Any = next_token_loss,
    update: Callable[[torch.nn.Module], None] | None = None,
) -> Reference:
    """`config` with SGD, a constant rate and no clipping, in float64; with the penalties of `forgetting`.

    update: in place of SGD, changes the weights of the model by their gradients.
    """
    tokenizer = load_tokenizer(config.model)
    data = prepare(config, tokenizer, RankEnv(0, 1, 0, 1, "test"), cache)
    order = order_of(config, data.train)
    if AutoConfig.from_pretrained(config.model.path).is_encoder_decoder:
        model_class, loss_of = AutoModelForSeq2SeqLM, target_loss
    model = model_class.from_pretrained(
        config.model.path, dtype=torch.float64, attn_implementation="sdpa", **config.model.config_overrides
    )
    if loss_of is target_loss and model.config.decoder_start_token_id is None:  # two encoders that were joined
        model.config.decoder_start_token_id = tokenizer.bos_token_id or tokenizer.cls_token_id
        model.config.pad_token_id = tokenizer.pad_token_id
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    fisher = {name: torch.zeros_like(weight) for name, weight in start.items()}
    if config.forgetting.ewc:
        fisher = _fisher(config, model, tokenizer, cache)
    model.train()
    result = Reference([], [], {})
    assert config.trainer.max_steps is not None
    for step in range(config.trainer.max_steps):
        global_batch = order.global_batch(*order.locate(step))
        batches = [
            collate(data.train, m, pad_token_id=tokenizer.pad_token_id, packing=config.data.packing)
            for m in global_batch.micro_batches
        ]
        parts, weight = [], 0.0
        for micro_batch, batch in zip(global_batch.micro_batches, batches, strict=True):
            torch.manual_seed(dropout_seed(config.trainer.seed, step, micro_batch.index))
            part, counted = loss_of(model, batch)
            parts.append(part)
            weight += counted
        loss = torch.stack(parts).sum() / weight
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        result.losses.append(float(loss.detach()))
        result.grad_norms.append(float(torch.cat([g.flatten() for g in gradients]).norm()))
        if update is not None:
            with torch.no_grad():
                update(model)
            model.zero_grad()
            continue
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.grad is None:  # the pooler of an encoder that was joined to another
                    continue
                strength = config.forgetting.l2sp + config.forgetting.ewc * fisher[name]
                parameter.grad += strength * (parameter - start[name])
                parameter -= config.optimizer.lr * parameter.grad
                parameter.grad = None
    result.weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return result


def descend(
    config: RunConfig, order: TrainingOrder, model: torch.nn.Module, loss_of: Callable[[int, GlobalBatch], torch.Tensor]
) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of SGD by hand. loss_of: the mean loss of the global batch of a step."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    losses, norms = [], []
    assert config.trainer.max_steps is not None
    for step in range(config.trainer.max_steps):
        loss = loss_of(step, order.global_batch(*order.locate(step)))
        gradients = torch.autograd.grad(loss, trained)
        losses.append(float(loss.detach()))
        norms.append(float(torch.cat([gradient.flatten() for gradient in gradients]).norm()))
        with torch.no_grad():
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter -= config.optimizer.lr * gradient
    return losses, norms


def _fisher(config: RunConfig, model, tokenizer, cache: Path) -> dict[str, torch.Tensor]:
    """Mean over rows of the squared gradient of a row's loss."""
    rows = general_rows(config)
    rows = replace(rows, data=replace(rows.data, packing=False))
    data = prepare(rows, tokenizer, RankEnv(0, 1, 0, 1, "test"), cache)
    single = replace(rows, trainer=replace(rows.trainer, micro_batch_size=1, global_batch_size=1))
    order = order_of(single, data.train)
    model.eval()
    found = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for step in range(config.forgetting.ewc_rows):
        (micro_batch,) = order.global_batch(*order.locate(step)).micro_batches
        batch = collate(data.train, micro_batch, pad_token_id=tokenizer.pad_token_id, packing=False)
        labels = batch.pop("labels")
        logits = model(**batch, use_cache=False).logits
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        for (name, _), gradient in zip(
            model.named_parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True
        ):
            found[name] += gradient.square() / config.forgetting.ewc_rows
    return found
