"""Rules of `parallel`: what cannot be computed by several ranks on parts of a row."""

from __future__ import annotations

import math
from collections.abc import Iterator

from dstune.config.convert import shown
from dstune.config.launch_schema import LocalConfig
from dstune.config.method_schema import (
    FeaturesConfig,
    HeadConfig,
    ImportanceConfig,
    PrefixConfig,
    PromptConfig,
    PTuningConfig,
    UlmfitConfig,
)
from dstune.config.schema import Attention, Automatic, RunConfig, UlyssesConfig
from dstune.config.task_schema import CausalLmConfig, ChatConfig, Seq2SeqConfig
from dstune.errors import Problem

UNCUT = {
    HeadConfig: "it reads one vector of the whole row",
    FeaturesConfig: "it reads one vector of the whole row",
    UlmfitConfig: "its classifier reads one vector of the whole row",
    ImportanceConfig: "it measures gradients of whole rows",
    PromptConfig: "its trained positions stand in front of the whole row",
    PrefixConfig: "its trained positions stand in front of the whole row",
    PTuningConfig: "its trained positions stand in front of the whole row",
}
"""Methods that need a row in one piece, and why."""


def check_parallel(config: RunConfig) -> Iterator[Problem]:
    if not isinstance(config.parallel, UlyssesConfig):
        return
    off = "parallel=none"
    if not isinstance(config.task, ChatConfig | CausalLmConfig | Seq2SeqConfig):
        reason = f"only language models are computed on parts of a row, and task={config.task.name} compares whole ones"
        yield Problem("parallel", reason, f"{off}, or task=chat|causal_lm|seq2seq", "ulysses")
    for why in (why for method, why in UNCUT.items() if isinstance(config.method, method)):
        reason = f"method={config.method.name} cannot be cut: {why}"
        yield Problem("parallel", reason, f"{off}, or method=full|freeze|lora", "ulysses")
    if isinstance(config.trainer.micro_batch_size, Automatic):
        reason = "the measurement knows ranks with rows of their own only"
        yield Problem("trainer.micro_batch_size", reason, "trainer.micro_batch_size=1, or a number that fits", "auto")
    if config.model.attention not in (Attention.auto, Attention.sdpa):
        value = config.model.attention.value
        reason = "parallel=ulysses computes attention by torch's scaled_dot_product_attention, flash kernels included"
        yield Problem("model.attention", reason, "model.attention=auto", value)
    if config.forgetting.ewc:
        reason = "the Fisher information is measured on whole rows"
        yield Problem("forgetting.ewc", reason, f"forgetting.ewc=0, or {off}", shown(config.forgetting.ewc))
    for key in ("slices", "counterfactual"):
        if value := getattr(config.evaluate, key):
            reason = "no rank has the whole loss of a row under parallel=ulysses"
            fix = f"leave it out here; `dstune evaluate RUN evaluate.{key}=...` measures it afterwards"
            yield Problem(f"evaluate.{key}", reason, fix, shown(value))
    ranks = config.launch.processes if isinstance(config.launch, LocalConfig) else None
    if ranks is not None and (problem := ranks_problem(ranks, config.parallel.size)):
        yield problem


def ranks_problem(ranks: int, parts: int) -> Problem | None:
    """What is wrong where so many ranks are to be divided into groups of `parts`."""
    if ranks % parts == 0:
        return None
    fits = [str(size) for size in range(2, ranks + 1) if ranks % size == 0]
    fix = f"parallel.size={'|'.join(fits)}, or another number of ranks" if fits else "more ranks, or parallel=none"
    return Problem("parallel.size", f"{ranks} ranks cannot be divided into groups of so many", fix, shown(parts))


def repeats_of_keys(heads: int, parts: int) -> int:
    """How often a head of keys is repeated so that each of `parts` ranks gets whole ones."""
    return parts // math.gcd(heads, parts)


def heads_problem(heads: int, parts: int) -> Problem | None:
    """What is wrong where `parts` ranks are to share the attention heads of a model.

    Those of keys are no obstacle: where they divide those of queries, each is repeated as often as its queries' ranks are."""
    if heads % parts == 0:
        return None
    sizes = [size for size in range(2, heads + 1) if heads % size == 0]
    reason = f"{heads} attention heads cannot be shared by {parts} ranks"
    fix = f"parallel.size={'|'.join(map(str, sizes))}" if sizes else "parallel=none"
    return Problem("parallel.size", reason, fix, shown(parts))
