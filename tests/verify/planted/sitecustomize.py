"""Faults of a training stack, planted into the ranks of `dstune-verify`: Python runs this file at start when its folder is on
PYTHONPATH. PLANTED names one; nothing happens in processes that are no ranks."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
from collections.abc import Callable
from typing import Any

PLANTS: dict[str, Callable[[], None]] = {}


def plant(function: Callable[[], None]) -> Callable[[], None]:
    PLANTS[function.__name__] = function
    return function


def change(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    setattr(owner, name, make(getattr(owner, name)))


def second_rank() -> bool:
    return os.environ["RANK"] == "1"


@plant
def all_reduce_loses_the_end() -> None:
    """The last element of odd sizes stays unreduced."""
    import torch

    def make(really: Any) -> Any:
        def all_reduce(tensor: Any, *arguments: Any, **keywords: Any) -> Any:
            last = tensor.flatten()[-1].clone()
            work = really(tensor, *arguments, **keywords)
            if tensor.numel() > 1000 and tensor.numel() % 2:
                tensor.view(-1)[-1] = last
            return work

        return all_reduce

    change(torch.distributed, "all_reduce", make)


@plant
def reduce_scatter_rounds() -> None:
    """Sums in bf16 lose their lowest bits on one rank."""
    import torch

    def make(really: Any) -> Any:
        def reduce_scatter(output: Any, sent: Any, *arguments: Any, **keywords: Any) -> Any:
            really(output, sent, *arguments, **keywords)
            if second_rank() and output.dtype == torch.bfloat16:
                output.copy_((output / 4).round() * 4)

        return reduce_scatter

    change(torch.distributed, "reduce_scatter_tensor", make)


@plant
def all_gather_swaps_ranks() -> None:
    import torch

    def make(really: Any) -> Any:
        def all_gather(output: Any, sent: Any, *arguments: Any, **keywords: Any) -> Any:
            really(output, sent, *arguments, **keywords)
            if sent.numel() > 1000:
                output.copy_(output.view(2, -1).flip(0).reshape(output.shape))

        return all_gather

    change(torch.distributed, "all_gather_into_tensor", make)


@plant
def another_version_on_a_rank() -> None:
    if not second_rank():
        return

    def make(really: Any) -> Any:
        def version(distribution: Any) -> str:
            return "9.9.9" if distribution.metadata["Name"] == "numpy" else really.__get__(distribution)

        return property(version)

    change(importlib.metadata.Distribution, "version", make)


@plant
def attention_is_wrong_for_one_head_size() -> None:
    from torch.nn import functional

    def make(really: Any) -> Any:
        def attention(query: Any, key: Any, value: Any, **keywords: Any) -> Any:
            return really(query * 1.25 if query.shape[-1] == 80 else query, key, value, **keywords)

        return attention

    change(functional, "scaled_dot_product_attention", make)


@plant
def attention_ignores_the_mask() -> None:
    from torch.nn import functional

    def make(really: Any) -> Any:
        def attention(query: Any, key: Any, value: Any, attn_mask: Any = None, **keywords: Any) -> Any:
            return really(query, key, value, **keywords)

        return attention

    change(functional, "scaled_dot_product_attention", make)


@plant
def norm_without_a_gradient() -> None:
    from torch.nn import functional

    def make(really: Any) -> Any:
        return lambda hidden, shape, weight=None, bias=None, *rest: really(
            hidden, shape, weight, None if bias is None else bias.detach() + 0 * bias, *rest
        )

    change(functional, "layer_norm", make)


@plant
def loss_is_scaled_by_the_ranks() -> None:
    from dstune_verify import engines

    def make(really: Any) -> Any:
        def step(engine: Any, batches: Any) -> Any:
            backward = engine.engine.backward
            engine.engine.backward = lambda loss: backward(2 * loss)
            try:
                return really(engine, batches)
            finally:
                engine.engine.backward = backward

        return step

    change(engines.DeepSpeedEngine, "step", make)


@plant
def a_rank_counts_only_its_targets() -> None:
    """Each rank divides by its own number of targets: the mean of means."""
    from dataclasses import replace

    from dstune_verify import engines

    def make(really: Any) -> Any:
        def step(engine: Any, batches: Any) -> Any:
            return really(engine, [replace(batch, weights=batch.weights / batch.weights.sum()) for batch in batches])

        return step

    change(engines.DeepSpeedEngine, "step", make)


@plant
def accumulation_keeps_the_last() -> None:
    from dstune_verify import engines

    def make(really: Any) -> Any:
        return lambda engine, batches: really(engine, [batches[-1]] * len(batches))

    change(engines.DeepSpeedEngine, "step", make)


@plant
def a_tensor_has_no_gradient() -> None:
    from dstune_verify import engines

    def make(really: Any) -> Any:
        def step(engine: Any, batches: Any) -> Any:
            tensor = engine.model.norm.weight
            hook = tensor.register_hook(lambda gradient: gradient * 0)
            losses = really(engine, batches)
            hook.remove()
            return losses

        return step

    change(engines.DDPEngine, "step", make)


@plant
def frozen_weights_move() -> None:
    import torch

    from dstune_verify import engines

    def make(really: Any) -> Any:
        def step(engine: Any, batches: Any) -> Any:
            losses = really(engine, batches)
            with torch.no_grad():
                # An index into the whole weight would change a copy.
                engine.model.embedding.weight.to_local()[0, 0] += 0.01
            return losses

        return step

    change(engines.FSDP2Engine, "step", make)


@plant
def rotary_frequencies_are_off() -> None:
    from transformers.models.llama import modeling_llama

    def make(really: Any) -> Any:
        return lambda rotary, hidden, position_ids: really(rotary, hidden, position_ids * 2)

    change(modeling_llama.LlamaRotaryEmbedding, "forward", make)


@plant
def checkpoints_lose_the_optimizer() -> None:
    from dstune_verify import engines

    def load(engine: Any, folder: str) -> None:
        engine.engine.load_checkpoint(folder, tag="step", load_optimizer_states=False)

    engines.DeepSpeedEngine.load = load


@plant
def steps_differ_from_run_to_run() -> None:
    import torch

    from dstune_verify import engines

    def make(really: Any) -> Any:
        def step(engine: Any, batches: Any) -> Any:
            with torch.no_grad():
                engine.model.norm.weight[0] *= 1 + 1e-6 * int.from_bytes(os.urandom(1), "little")
            return really(engine, batches)

        return step

    change(engines.DDPEngine, "step", make)


if "RANK" in os.environ and "DSTUNE_VERIFY_ORDER" in os.environ and (name := os.environ.get("PLANTED")):
    PLANTS[name]()
