"""What is proven before the first step: of the model's arithmetic, and that all nodes have the same rows."""

from __future__ import annotations

from collections import Counter

import xxhash

from dstune import environment
from dstune.config.schema import RunConfig
from dstune.data.build import PreparedData
from dstune.dist import World
from dstune.errors import Problem, UserError
from dstune.models.heads import Head
from dstune.models.heads.language import CausalLmHead
from dstune.models.packing import TOLERANCE, contamination
from dstune.zero.engine import Engine


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
