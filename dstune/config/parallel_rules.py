"""Rules of `parallel`: what cannot be trained when ranks share the positions of a row, or the weights of a layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from dstune.config.convert import format_value
from dstune.config.multi_task import tasks_of
from dstune.config.schema import Attention, Automatic, OptimizerOffload, Precision, RunConfig, stage_of
from dstune.core.errors import Problem
from dstune.protocols import launcher_of, method_of, parallelism_of, task_of

OFF = "parallel=none"
"""What to write in place of any other choice."""


def check_parallel(config: RunConfig) -> Iterator[Problem]:
    parallel = parallelism_of(config.parallel)
    if parallel.size == 1:
        return
    yield from parallel.check(config)
    if isinstance(config.trainer.micro_batch_size, Automatic):
        reason = "the measurement supports only ranks that do not share rows or weights"
        yield Problem("trainer.micro_batch_size", reason, "trainer.micro_batch_size=1, or a number that fits", "auto")
    ranks = launcher_of(config.launch).ranks
    if ranks is not None and (problem := ranks_problem(ranks, parallel.size)):
        yield problem


def check_ulysses(config: RunConfig) -> Iterator[Problem]:
    if not task_of(config.task).language:
        reason = f"ranks can share the rows of language models only, and task={config.task.name} compares complete rows"
        yield Problem("parallel", reason, f"{OFF}, or task=chat|causal_lm|seq2seq", "ulysses")
    if why := method_of(config.method).why_not_shared_rows:
        reason = f"method={config.method.name} cannot share rows among ranks: {why}"
        yield Problem("parallel", reason, f"{OFF}, or method=full|freeze|lora", "ulysses")
    if config.model.attention not in (Attention.auto, Attention.sdpa):
        value = config.model.attention.value
        reason = "parallel=ulysses computes attention by torch's scaled_dot_product_attention, flash kernels included"
        yield Problem("model.attention", reason, "model.attention=auto", value)
    if config.forgetting.ewc:
        reason = "the Fisher information is measured on complete rows"
        yield Problem("forgetting.ewc", reason, f"forgetting.ewc=0, or {OFF}", format_value(config.forgetting.ewc))
    for key in ("slices", "counterfactual"):
        if value := getattr(config.evaluate, key):
            reason = "with parallel=ulysses, no rank has the complete loss of a row"
            fix = f"leave it out here; `dstune evaluate RUN evaluate.{key}=...` measures it after training"
            yield Problem(f"evaluate.{key}", reason, fix, format_value(value))


def check_tensor(config: RunConfig) -> Iterator[Problem]:
    tasks = (config.task, *tasks_of(config).values())
    if others := sorted({task.name for task in tasks if not task_of(task).tensor_parallel}):
        reason = f"shared weights were verified only for task=chat and task=causal_lm, not for task={', '.join(others)}"
        yield Problem("parallel", reason, f"{OFF}, or task=chat|causal_lm", "tensor")
    yield from method_of(config.method).check_sharded_weights(config)
    if stage_of(config.zero) == 3:
        reason = "ZeRO-3 already partitions every weight and gathers it for each layer; tensor parallelism needs stage 0 to 2"
        yield Problem("zero.stage", reason, f"zero=stage2, or {OFF}", "3")
    if config.zero.offload_optimizer is not OptimizerOffload.none:
        value = config.zero.offload_optimizer.value
        reason = "an optimizer in host memory was not verified together with tensor parallelism"
        yield Problem("zero.offload_optimizer", reason, f"zero=stage2, or {OFF}", value)
    if config.trainer.precision is Precision.fp16:
        reason = "the loss scale of fp16 was not verified together with tensor parallelism"
        yield Problem("trainer.precision", reason, "trainer.precision=bf16", "fp16")
    for key in ("ewc", "l2sp"):
        if value := getattr(config.forgetting, key):
            reason = "the penalty is summed over complete weights, and each rank has only a slice of them"
            yield Problem(f"forgetting.{key}", reason, f"forgetting.{key}=0, or {OFF}", format_value(value))


CAPPED = "its attention caps its scores, which the fused attention of torch does not do"
"""Why neither sample-by-sample attention nor `parallel=ulysses` works for Gemma 2."""


def uncut_problem(kind: str, reason: str, fix: str = OFF) -> Problem:
    """Return the problem that `parallel=ulysses` cannot share the rows of a model of this kind."""
    return Problem("parallel", f"{kind}: {reason}", fix, "ulysses")


def ranks_problem(ranks: int, parts: int) -> Problem | None:
    """Return the problem if `ranks` cannot be divided into groups of `parts`; else None."""
    if ranks % parts == 0:
        return None
    fits = [str(size) for size in range(2, ranks + 1) if ranks % size == 0]
    fix = f"launch.processes={parts} or a multiple of it" + (f", or parallel.size={'|'.join(fits)}" if fits else "")
    return Problem("parallel.size", f"{ranks} ranks cannot be divided into groups of {parts}", fix, format_value(parts))


def repeats_of_keys(heads: int, parts: int) -> int:
    """Return how often each of `heads` key heads is repeated so that each of `parts` ranks gets complete ones."""
    return parts // math.gcd(heads, parts)


def heads_problem(heads: int, parts: int) -> Problem | None:
    """Return the problem if `parts` ranks cannot share the `heads` query heads of a model; else None.

    The number of key heads does not matter: `repeats_of_keys` repeats them until every rank has complete ones.
    """
    if heads % parts == 0:
        return None
    sizes = _divisors(heads)
    reason = f"{heads} attention heads cannot be shared by {parts} ranks"
    fix = (
        f"parallel.size={'|'.join(map(str, sizes))}, on a number of ranks that it divides" if sizes else "parallel=none"
    )
    return Problem("parallel.size", reason, fix, format_value(parts))


INWARD = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
OUTWARD = ("o_proj", "down_proj")
"""The matrices of a layer that ranks share: `INWARD` by their outputs (into the heads and the feed-forward width), `OUTWARD` by
their inputs (back to the hidden size)."""

SLICED = ("gemma", "gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3", "smollm3")
"""Architectures whose layers `dstune.models.tensor` can share. Each was compared with the complete model."""


def slices_problems(values: Mapping[str, Any], parts: int) -> list[Problem]:
    """Return why `parts` ranks cannot share the weights of a model. values: its `config.json`.

    Sizes that the file does not contain are checked when the model is built.
    """
    kind = str(values.get("model_type"))
    if kind not in SLICED:
        reason = f"{kind}: it is not known how ranks share its layers"
        fix = f"{OFF} with zero=stage3, or a model of the kinds {', '.join(SLICED)}"
        return [Problem("parallel", reason, fix, "tensor")]
    names = {
        "num_attention_heads": "attention heads",
        "num_key_value_heads": "heads of keys",
        "intermediate_size": "values inside a feed-forward layer",
    }
    widths = {name: int(values[key]) for key, name in names.items() if values.get(key)}
    wrong = [f"{width} {name}" for name, width in widths.items() if width % parts]
    if not wrong:
        return []
    sizes = _divisors(math.gcd(*widths.values()))
    fix = f"parallel.size={'|'.join(map(str, sizes))}, on a number of ranks that it divides" if sizes else OFF
    return [Problem("parallel.size", f"{', '.join(wrong)} cannot be shared by {parts} ranks", fix, format_value(parts))]


def _divisors(number: int) -> list[int]:
    return [size for size in range(2, number + 1) if number % size == 0]
