"""What is proven before the first step: of the model's arithmetic, and that all nodes have the same rows."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.nn.functional as functional
import xxhash

from dstune import environment
from dstune.config.schema import RunConfig
from dstune.data.build import PreparedData
from dstune.data.collate import NO_TARGET
from dstune.dist import World
from dstune.errors import Problem, UserError
from dstune.models.heads import Head
from dstune.models.heads.base import Rows
from dstune.models.heads.language import CausalLmHead
from dstune.models.packing import TOLERANCE, contamination
from dstune.zero.engine import Engine

ROWS_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Largest accepted relative difference of a loss, by the format that it was computed in."""


def examine(head: Head, engine: Engine) -> None:
    """Let the head of a language model see whether it may leave the logits out."""
    if isinstance(head, CausalLmHead):
        engine.train(False)
        head.examine(engine.forward, engine.device)
        engine.train(True)


def check_packing(config: RunConfig, engine: Engine, vocabulary: int, world: World) -> None:
    """Raises UserError on all ranks where samples of one packed row see each other on any of them."""
    if not config.data.packing:
        return
    engine.train(False)
    difference, dtype = contamination(engine.forward, vocabulary, engine.device)
    engine.train(True)
    if world.any(not difference <= TOLERANCE[dtype]):  # not a number is no proof either
        raise UserError(
            Problem(
                "data.packing",
                value="true",
                reason=f"attention of {config.model.path} crosses packed samples (logits differ by {difference:.1%})",
                fix="data.packing=false, or another model.attention",
            )
        )


def check_rows(engine: Engine, head: Head, rows: Rows, architecture: Any, max_length: int, world: World) -> None:
    """Raises UserError on all ranks where packed rows that are handed to the model in this way have another loss than the same
    samples one by one.

    One of them is longer than the window of the model's attention, where rows of `max_length` tokens are.
    """
    vocabulary, window = architecture.vocab_size, getattr(architecture, "sliding_window", None) or 0
    longest = max(21, min(window + 9, max_length))
    generator = torch.Generator().manual_seed(0)
    packed = [
        [torch.randint(vocabulary, (length,), generator=generator) for length in lengths]
        for lengths in ((9, longest - 9), (longest,))
    ]
    ids = torch.stack([torch.cat(row) for row in packed])
    positions = torch.stack([torch.cat([torch.arange(len(sample)) for sample in row]) for row in packed])
    labels = ids.masked_fill(positions == 0, NO_TARGET)
    batch = {"input_ids": ids, "position_ids": positions, "labels": labels}
    engine.train(False)
    output = engine.evaluate(head, {name: value.to(engine.device) for name, value in batch.items()})
    mine = float(output.loss_sum) if world.counts else 0.0
    (together,) = world.sum([mine / world.data_parallel_size])
    alone, dtype = 0.0, torch.float32
    with torch.no_grad():
        for sample in (sample for row in packed for sample in row):
            logits = engine.forward(input_ids=sample[None].to(engine.device)).logits[0]
            targets = sample[1:].to(engine.device)
            alone += float(functional.cross_entropy(logits[:-1].float(), targets, reduction="sum"))
            dtype = logits.dtype
    engine.train(True)
    difference = abs(together - alone) / alone
    if world.any(not difference <= ROWS_TOLERANCE[dtype]):
        raise UserError(rows.refused(f"their loss is not that of the model's own attention ({difference:.2%} apart)"))


def refuse_different_rows(world: World, digest: str) -> None:
    """Raises UserError on all ranks where nodes with files of their own do not have the same rows."""
    digests = dict(zip(world.gather(environment.host()), world.gather(digest), strict=True))
    common, _ = Counter(digests.values()).most_common(1)[0]
    others = sorted(host for host, found in digests.items() if found != common)
    if others:
        reason = f"the rows on {', '.join(others)} are not those of the other nodes"
        raise UserError(Problem("data.train", reason, "bring the same files to every node"))


def samples_digest(data: PreparedData) -> str:
    """Digest of the lengths and targets of all training samples in order: it changes with the rows, not with the code.

    Of a stream it knows the first block and what the shards are."""
    digest = xxhash.xxh3_64()
    digest.update(data.train.lengths.tobytes())
    digest.update(data.train.weights.tobytes())
    if data.stream is not None:
        digest.update(data.stream.identity.encode())
    return digest.hexdigest()


def content_digest(data: PreparedData) -> str:
    """Digest of what all training samples say, in order. Apart from `samples_digest`, which older checkpoints have alone."""
    return xxhash.xxh3_64_hexdigest(data.train.content.encode())
