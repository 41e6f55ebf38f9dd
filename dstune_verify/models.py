"""Tiny language models and batches, made from a formula.

Weights and tokens come from an integer hash and not from a random generator, so that every version of torch, every device and
every rank starts from the same numbers.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

VOCABULARY, WIDTH, HEADS, LAYERS, EXPERTS = 61, 24, 3, 2, 4
"""Odd sizes on purpose: no partition of the weights over ranks ends with a tensor."""


def hashed(count: int, seed: str) -> torch.Tensor:
    """Return `count` float64 numbers in [-1, 1) that look random and depend on `seed` alone: exact integer arithmetic."""
    number = torch.arange(count, dtype=torch.int64) * 0x9E3779B1 + zlib.crc32(seed.encode())
    number = number & 0xFFFFFFFF
    for _ in range(2):
        number = ((number ^ (number >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    number = number ^ (number >> 16)
    return number.double() / 2**31 - 1


@torch.no_grad()
def fill(model: nn.Module) -> nn.Module:
    """Overwrite every weight of `model` by the formula: matrices with variance 1 / inputs, the scales of norms around 1."""
    for name, parameter in model.named_parameters():
        values = hashed(parameter.numel(), name).view(parameter.shape)
        if parameter.dim() == 3 and min(parameter.shape) > 1:  # the matrices of all experts in one tensor
            values = values * math.sqrt(3 / max(parameter.shape[1:]))
        elif parameter.dim() > 1:
            values = values * math.sqrt(3 / parameter[0].numel())
        elif name.endswith("weight"):
            values = 1 + values / 4
        else:
            values = values / 10
        parameter.copy_(values)
    return model


@dataclass(frozen=True)
class Batch:
    """A micro-batch. tokens: [rows, length + 1]. weights: [rows, length], 0 where the target does not count, else 1 / (targets
    of an average micro-batch of this step), so that the mean over micro-batches and ranks is the mean over all targets."""

    tokens: torch.Tensor
    weights: torch.Tensor
    banned_expert: int = -1
    """An expert that no token of this micro-batch may use; -1 for none."""


def make_batches(
    step: int, ranks: int, accumulation: int, *, rows: int = 2, length: int = 9, ban_experts: bool = False
) -> list[list[Batch]]:
    """Return the micro-batches of a step for all ranks, `[rank][micro-batch]`, with a different number of targets in each."""
    made: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
    for rank in range(ranks):
        made.append([])
        for micro in range(accumulation):
            seed = f"{step}.{rank}.{micro}"
            values = hashed(rows * (length + 1), "tokens" + seed)
            tokens = ((values + 1) / 2 * VOCABULARY).long().view(rows, length + 1)
            share = 0.35 + 0.6 * ((rank * accumulation + micro) % 3) / 2
            counts = (hashed(rows * length, "mask" + seed).view(rows, length) + 1) / 2 < share
            counts[0, 0] = True
            made[-1].append((tokens, counts))
    targets = sum(int(counts.sum()) for of_rank in made for _, counts in of_rank)
    mean = targets / (ranks * accumulation)
    return [
        [Batch(tokens, counts.double() / mean, rank % EXPERTS if ban_experts else -1) for tokens, counts in of_rank]
        for rank, of_rank in enumerate(made)
    ]


class LoRALinear(nn.Module):
    """A frozen linear layer with a trained low-rank update (https://arxiv.org/abs/2106.09685)."""

    def __init__(self, inputs: int, outputs: int, rank: int = 4):
        super().__init__()
        self.base = nn.Linear(inputs, outputs, bias=False)
        self.lora_a = nn.Linear(inputs, rank, bias=False)
        self.lora_b = nn.Linear(rank, outputs, bias=False)
        self.base.weight.requires_grad_(False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.base(hidden) + self.lora_b(self.lora_a(hidden))


class Attention(nn.Module):
    def __init__(self, lora: bool):
        super().__init__()
        self.qkv = LoRALinear(WIDTH, 3 * WIDTH) if lora else nn.Linear(WIDTH, 3 * WIDTH)
        self.out = LoRALinear(WIDTH, WIDTH) if lora else nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        rows, length, _ = hidden.shape
        qkv = self.qkv(hidden).view(rows, length, 3, HEADS, WIDTH // HEADS)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        scores = query @ key.transpose(-1, -2) / math.sqrt(WIDTH // HEADS)
        future = torch.ones(length, length, dtype=torch.bool, device=hidden.device).triu(1)
        mixed = scores.masked_fill(future, float("-inf")).softmax(-1) @ value
        return self.out(mixed.transpose(1, 2).reshape(rows, length, WIDTH))


class MLP(nn.Module):
    def __init__(self, lora: bool = False):
        super().__init__()
        self.up = LoRALinear(WIDTH, 2 * WIDTH) if lora else nn.Linear(WIDTH, 2 * WIDTH)
        self.down = LoRALinear(2 * WIDTH, WIDTH) if lora else nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.down(functional.gelu(self.up(hidden)))


class Experts(nn.Module):
    """Top-2 routing over a ModuleList. An expert without tokens is not called, as in most public implementations."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList(MLP() for _ in range(EXPERTS))

    def forward(self, hidden: torch.Tensor, banned: int) -> torch.Tensor:
        flat = hidden.reshape(-1, WIDTH)
        scores = self.router(flat).float()
        if banned >= 0:
            scores = scores.masked_fill(torch.arange(EXPERTS, device=scores.device) == banned, float("-inf"))
        shares, chosen = scores.softmax(-1).topk(2, dim=-1)
        result = torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            token, choice = torch.where(chosen == index)
            if len(token):
                result = result.index_add(0, token, expert(flat[token]) * shares[token, choice, None].to(flat.dtype))
        return result.view_as(hidden)


class Block(nn.Module):
    def __init__(self, experts: bool, lora: bool):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention(lora)
        self.experts = Experts() if experts else None
        self.mlp = None if experts else MLP(lora)

    def forward(self, hidden: torch.Tensor, banned: int = -1) -> torch.Tensor:
        hidden = hidden + self.attention(self.norm1(hidden))
        inner = self.norm2(hidden)
        if self.experts is not None:
            return hidden + self.experts(inner, banned)
        assert self.mlp is not None
        return hidden + self.mlp(inner)


KINDS = {
    "plain": "blocks one after another",
    "repeated": "one block called twice, and a head that shares the embedding's weight",
    "two-inputs": "one block run on two inputs, as an encoder of pairs is",
    "experts": "top-2 mixture of experts, each expert a module",
}
"""The tiny models and what they have that others do not."""


class TinyModel(nn.Module):
    """A causal language model of about ten thousand weights. `forward` returns the loss of a micro-batch."""

    def __init__(self, kind: str = "plain", *, lora: bool = False, recomputation: str = ""):
        super().__init__()
        assert kind in KINDS and recomputation in ("", "reentrant", "non-reentrant")
        self.kind, self.recomputation = kind, recomputation
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        count = 1 if kind in ("repeated", "two-inputs") else LAYERS
        self.blocks = nn.ModuleList(Block(kind == "experts", lora) for _ in range(count))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if kind == "repeated":
            self.head.weight = self.embedding.weight
        if lora:
            for name, parameter in self.named_parameters():
                parameter.requires_grad_("lora" in name)

    def forward(self, batch: Batch) -> torch.Tensor:
        inputs, targets = batch.tokens[:, :-1], batch.tokens[:, 1:]
        hidden = self._run(self.embedding(inputs), batch.banned_expert)
        if self.kind == "two-inputs":
            hidden = hidden + self._run(self.embedding(inputs.flip(0)), batch.banned_expert)
        logits = self.head(self.norm(hidden)).float()
        losses = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return (losses * batch.weights.flatten().float()).sum()

    def _run(self, hidden: torch.Tensor, banned: int) -> torch.Tensor:
        for block in self._calls():
            if self.recomputation:
                reentrant = self.recomputation == "reentrant"
                if reentrant and not hidden.requires_grad:
                    hidden = hidden.requires_grad_()
                hidden = checkpoint(block, hidden, banned, use_reentrant=reentrant)
            else:
                hidden = block(hidden, banned)
        return hidden

    def _calls(self) -> Iterator[Any]:
        for _ in range(2 if self.kind == "repeated" else 1):
            yield from self.blocks


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Turn the parameters of `model` into `dtype`. Buffers stay, as rotary frequencies do in a model that is loaded in bf16."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return the micro-batch with its tensors on `device`."""
    return Batch(batch.tokens.to(device), batch.weights.to(device), batch.banned_expert)
