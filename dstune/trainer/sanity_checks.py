"""Checks before the first step: of the model's arithmetic, and that all nodes have the same rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as functional
import xxhash
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dstune.config.architectures import encoder_problem
from dstune.config.data_schema import Padding
from dstune.config.schema import RunConfig, stage_of
from dstune.core import environment
from dstune.core.distributed import World
from dstune.core.errors import Problem, UserError
from dstune.data.collate import NO_TARGET
from dstune.data.prepared import PreparedData
from dstune.models.heads import Head
from dstune.models.heads.base import LeavesOutLogits, Rows
from dstune.models.heads.language import CausalLmHead
from dstune.models.packing import TOLERANCE, contamination
from dstune.models.padding import measure_padding, rows_of_proof
from dstune.models.row_length import row_length_problem
from dstune.models.unreached import verify_unreached
from dstune.protocols import task_of
from dstune.protocols.task_options import BuildsBatches
from dstune.trainer.first_pass import refuse_failing_model
from dstune.zero.engine import Engine

BEGINNING, FOLLOWING = 4, 12
"""Tokens of a row whose logits are compared, and tokens after them that differ, in the check for later tokens."""
LONGEST_PROOF = 600
"""Most tokens of a sample in these checks, enough for a sliding window of 512."""


def examine(head: Head, engine: Engine, model: PreTrainedModel, path: str) -> None:
    """Let the head of a language model test whether it can skip computing all logits. path: `model.path`.

    Raises UserError if this forward pass, the first one, fails in the model's code.
    """
    if isinstance(head, LeavesOutLogits):
        engine.train(False)
        with refuse_failing_model(path, type(model).__name__):
            head.examine(engine.forward, engine.device)
        engine.train(True)


def check_unreached(model: PreTrainedModel, engine: Engine) -> None:
    """Raise UserError if text reaches a part of the model that is frozen as unreachable."""
    engine.train(False)
    verify_unreached(model, engine.forward, engine.device)
    engine.train(True)


def refuse_sight_of_later_tokens(
    config: RunConfig, engine: Engine, model: PreTrainedModel, rows: Rows | None, world: World
) -> None:
    """Check, for a task whose model writes text, that later tokens of a row do not change earlier logits.

    rows: as passed to the head; the check runs with the attention that the model was loaded with. Every rank calls this.
    Raises UserError on all ranks if they do on any, or if this forward pass fails in the model's code.
    """
    if not task_of(config.task).generates or model.config.is_encoder_decoder:
        return
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.get_text_config().vocab_size, (2, BEGINNING + FOLLOWING), generator=generator)
    tokens[1, :BEGINNING] = tokens[0, :BEGINNING]
    engine.train(False)
    with (
        torch.no_grad(),
        rows.original_attention() if rows is not None else nullcontext(),
        refuse_failing_model(config.model.path, type(model).__name__),
    ):
        logits = engine.forward(input_ids=tokens.to(engine.device), use_cache=False).logits
    engine.train(True)
    logits = logits[:, -tokens.shape[1] :]  # behind the positions of a trained prompt
    largest, difference = logits.abs().max(), (logits[0, :BEGINNING] - logits[1, :BEGINNING]).abs().max()
    if world.any(not float(difference / largest) <= TOLERANCE[logits.dtype]):
        reason = f"later tokens change earlier logits of {type(model).__name__} (by {float(difference / largest):.1%})"
        raise UserError(encoder_problem(config.model, reason))


def refuse_uneven_gathers(config: RunConfig, model: PreTrainedModel, world: World) -> None:
    """Raises UserError where rows decide which weights a rank reads next, and several ranks have partitioned them: they would wait
    for different weights at the same time, and gloo or NCCL ends or hangs."""
    if stage_of(config.zero) < 3 or world.size == 1:
        return
    reason = ""
    if any(isinstance(module, nn.ModuleDict) and name.endswith("experts") for name, module in model.named_modules()):
        reason = "calls the experts that its rows choose (Switch Transformers, NLLB-MoE)"
    elif getattr(model.config, "attention_window", None) and model.config.is_encoder_decoder:
        reason = "reads its embeddings again where a row does not fill its last window (LED)"
    if reason:
        reason = f"{type(model).__name__} {reason}: ranks of stage 3 would wait for different weights at the same time"
        raise UserError(Problem("zero.stage", reason, "zero=stage2", "3"))


def check_packing(config: RunConfig, engine: Engine, vocabulary: int, world: World) -> None:
    """Raise UserError on all ranks if the samples of a packed row see each other on any rank."""
    if not config.data.packing:
        return
    engine.train(False)
    difference, dtype = contamination(engine.forward, vocabulary, engine.device)
    engine.train(True)
    if world.any(not difference <= TOLERANCE[dtype]):  # a NaN fails the check too
        raise UserError(
            Problem(
                "data.packing",
                value="true",
                reason=f"attention of {config.model.path} crosses packed samples (logits differ by {difference:.1%})",
                fix="data.packing=false, or another model.attention",
            )
        )


def check_padding(
    config: RunConfig,
    engine: Engine,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: PreparedData,
    world: World,
    message: Callable[[str], None],
) -> None:
    """Check, if rows are not packed, that a padded row has the same outputs as the row alone.

    message: shows the difference if `data.padding` tolerates it. Every rank calls this. Raises UserError on all ranks if padded
    rows differ, or this forward pass fails in the model's code.
    """
    if config.data.packing or model.main_input_name != "input_ids":  # vectors are not padded
        return
    name, rows, padding = type(model).__name__, rows_of_proof(tokenizer, model), tokenizer.pad_token_id
    if not config.data.pads_rows:  # some pool so many positions that the shortest row has too few of them (Funnel)
        rows[0] = rows[0][: min(int(split.lengths.min()) for split in data.splits if len(split.lengths))]
    engine.train(False)
    with refuse_failing_model(config.model.path, name):
        measured = measure_padding(model, engine.forward, rows, padding, engine.device)
    engine.train(True)
    if not world.any(measured.reads_padding) or not config.data.pads_rows:
        return
    reason = f"{name} reads padding: its states of a row change by {measured.largest:.1%} with the padding behind it"
    if config.data.padding is Padding.tolerated:
        message(f"warning: {reason} (data.padding=tolerated)")
        return
    fix = "data.padding=tolerated, for losses that change with the rows beside each other, or another model"
    if not isinstance(task_of(config.task), BuildsBatches):
        fix = f"data.padding=never, for rows of one length in each micro-batch; {fix}"
    raise UserError(Problem("data.padding", reason, fix, config.data.padding.value))


def verify_rows(
    config: RunConfig,
    engine: Engine,
    head: Head,
    rows: Rows | None,
    architecture: Any,
    world: World,
    message: Callable[[str], None],
    *,
    has_images: bool = False,
) -> None:
    """Check that the samples of a row do not see each other, in the form in which `rows` passes them to the model.

    has_images: rows have images; their check (`trainer.sight`) covers text too.

    If they do, falls back to passing rows unchanged; raises UserError on all ranks if that is impossible or fails too.
    """
    problem = row_length_problem(config, architecture)
    if problem:
        raise UserError(problem)
    if rows is not None:
        assert isinstance(head, CausalLmHead)
        if reason := rows_problem(engine, head, rows, architecture, config.data.max_length, world):
            message(rows.refuse(reason))
            head.rows = rows = None
    if rows is None and not has_images:
        check_packing(config, engine, architecture.vocab_size, world)


def rows_problem(
    engine: Engine, head: CausalLmHead, rows: Rows, architecture: Any, max_length: int, world: World
) -> str | None:
    """Describe how logits of packed and padded rows differ from those of the same samples alone, if they do on any rank; rows are
    passed to the model by `rows`.

    One sample is longer than the model's attention window, unless that is too long to test before every run.
    """
    samples, sample_numbers, batches = _trial(architecture, max_length)
    engine.train(False)
    difference = 0.0
    with torch.no_grad():
        with rows.original_attention():
            alone = torch.cat(
                [
                    head.logits(engine.forward, {"input_ids": sample[None].to(engine.device)}, (numbers >= 0)[None])
                    for sample, numbers in zip(samples, sample_numbers, strict=True)
                ]
            )
        largest = float(alone.abs().max())
        for batch, numbers in batches:
            inputs, numbers_in_rows = rows.model_inputs(
                {name: value.to(engine.device) for name, value in batch.items()}, numbers.to(engine.device)
            )
            logits = head.logits(engine.forward, inputs, numbers_in_rows >= 0)
            worst = (
                logits.sub_(alone[numbers_in_rows[numbers_in_rows >= 0]]).abs_().amax()
                if len(logits)
                else torch.zeros(())
            )
            difference = max(difference, float(worst) / largest, key=lambda value: (value != value, value))
    engine.train(True)
    wrong = max(world.gather(difference), key=lambda value: (value != value, value))
    return f"by {wrong:.1%} of the largest" if not wrong <= TOLERANCE[alone.dtype] else None


def _trial(
    architecture: Any, max_length: int
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[tuple[dict[str, torch.Tensor], torch.Tensor]]]:
    """Return test samples; the number of each compared logit in them, `NO_TARGET` elsewhere; and batches of the same samples packed
    and padded, as (inputs, numbers)."""
    window = getattr(architecture, "sliding_window", None) or 0
    longest = window + 9 if window and window + 9 <= min(max_length, LONGEST_PROOF) else 21
    generator = torch.Generator().manual_seed(0)
    first, second, third = (
        torch.randint(architecture.vocab_size, (length,), generator=generator) for length in (9, longest - 9, longest)
    )
    samples, sample_numbers, count = [first, second, third], [], 0
    for sample in samples:
        # Numbers of the logits that are compared: where a sample begins and ends, and where its window begins to move.
        numbers = torch.full((len(sample),), NO_TARGET)
        numbers[-10:], numbers[:4] = 0, 0
        chosen = numbers == 0
        numbers[chosen] = torch.arange(count, count + int(chosen.sum()))
        sample_numbers.append(numbers)
        count += int(chosen.sum())

    def apart(*parts: torch.Tensor, fill: int) -> torch.Tensor:
        return functional.pad(torch.cat(parts), (0, longest - sum(map(len, parts))), value=fill)

    positions = [torch.cat([torch.arange(len(part)) for part in row]) for row in ((first, second), (third,))]
    batches = [
        (
            {"input_ids": torch.stack([apart(first, second, fill=0), third]), "position_ids": torch.stack(positions)},
            torch.stack([apart(sample_numbers[0], sample_numbers[1], fill=NO_TARGET), sample_numbers[2]]),
        ),
        (
            {
                "input_ids": torch.stack([third, apart(first, fill=0)]),
                "attention_mask": (torch.arange(longest) < torch.tensor([[longest], [len(first)]])).long(),
            },
            torch.stack([sample_numbers[2], apart(sample_numbers[0], fill=NO_TARGET)]),
        ),
    ]
    return samples, sample_numbers, batches


def refuse_different_rows(world: World, digest: str) -> None:
    """Raise UserError on all ranks if nodes with local files do not have the same rows."""
    digests = dict(zip(world.gather(environment.host()), world.gather(digest), strict=True))
    common, _ = Counter(digests.values()).most_common(1)[0]
    different_hosts = sorted(host for host, host_digest in digests.items() if host_digest != common)
    if different_hosts:
        reason = f"the rows on {', '.join(different_hosts)} are not those of the other nodes"
        raise UserError(Problem("data.train", reason, "bring the same files to every node"))


def samples_digest(data: PreparedData) -> str:
    """Digest the lengths and targets of all training samples in order, which change with the rows, not with the code. For a stream,

    digest the first block and the identity of the shards."""
    digest = xxhash.xxh3_64()
    digest.update(data.train.lengths.tobytes())
    digest.update(data.train.weights.tobytes())
    if data.stream is not None:
        digest.update(data.stream.identity.encode())
    return digest.hexdigest()


def content_digest(data: PreparedData) -> str:
    """Digest the content of all training samples, in order. Separate from `samples_digest`, the only one in older checkpoints."""
    return xxhash.xxh3_64_hexdigest(data.train.content.encode())
