"""Makes ZeRO-3 gather weights in fewer and larger messages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

SEQUENTIAL_DECODERS = {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3"}
"""Model types whose layers share no weights, are called once each, and take the hidden states as their first input."""


def handle_layers_whole(model: nn.Module) -> None:
    """Let ZeRO-3 gather and release each decoder layer at once, not module by module. With these fewer, larger messages a step of
    SmolLM2-135M on two CPU ranks is up to a sixth shorter (docs/performance.md).

    DeepSpeed reduces such a layer's gradients when that of its input is there, and takes those that are not there by then for
    zeros. torch says so too early of a layer whose input has no gradient: the first one above a frozen embedding, which gets one
    here. Only for decoders of `SEQUENTIAL_DECODERS` whose layers all train something.
    """
    from deepspeed.utils import set_z3_leaf_module
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    kind = getattr(getattr(model, "config", None), "model_type", "")
    train = [any(parameter.requires_grad for parameter in layer.parameters()) for layer in layers]
    if kind not in SEQUENTIAL_DECODERS or not layers or not all(train):
        return
    for layer in layers:
        layer.register_forward_pre_hook(_give_input_a_gradient)
        set_z3_leaf_module(layer, True)


def gather_persistent_together(optimizer: Any) -> None:
    """Let what ZeRO-3 leaves whole on every rank come in one message after an update, in place of one for each parameter: 420 of
    them for LoRA on SmolLM2-135M, 0.26 s of a step of 4.2 on two CPU ranks. optimizer: DeepSpeed's of stage 3."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    persistent = optimizer.persistent_parameters
    if not persistent:
        return
    first = persistent[0]
    one_by_one = first.all_gather

    def all_gather(param_list: Any = None, async_op: bool = False, hierarchy: int = 0) -> Any:
        if async_op or param_list is not persistent:
            return one_by_one(param_list, async_op=async_op, hierarchy=hierarchy)
        absent = [parameter for parameter in persistent if parameter.ds_status is ZeroParamStatus.NOT_AVAILABLE]
        if absent:
            first.all_gather_coalesced(absent).wait()
        return None

    first.all_gather = all_gather


def wait_for_copies_only() -> None:
    """Let a single rank wait for copies from the host's memory only: what DeepSpeed gathers there is a view of whole weights,
    and yet it waits for the device in each layer. Does nothing the second time."""
    from deepspeed.runtime.zero import partition_parameters

    for name in ("NoGatherHandle", "NoGatherCoalescedHandle"):
        handle = getattr(partition_parameters, name, None)
        if handle is not None and not hasattr(handle.wait, "original"):
            handle.wait = _waits_for_copies(handle.wait, name, partition_parameters.ZeroParamStatus.AVAILABLE)


def _waits_for_copies(original: Callable[..., None], name: str, available: Any) -> Callable[..., None]:
    def wait(handle: Any, **options: Any) -> None:
        attributes, complete = vars(handle), f"_{name}__complete"
        parameter = attributes.get(f"_{name}__param")
        weights = attributes.get(f"_{name}__params", [] if parameter is None else [parameter])
        if (
            attributes.get(complete, True)
            or not weights
            or any(weight.ds_tensor.device != weight.device for weight in weights)
        ):
            original(handle, **options)
            return
        for weight in weights:
            weight.ds_status = available
        attributes[complete] = True

    wait.original = original  # type: ignore[attr-defined]
    return wait


def _give_input_a_gradient(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
    hidden = inputs[0]
    if torch.is_grad_enabled() and not hidden.requires_grad:
        hidden.requires_grad_()
