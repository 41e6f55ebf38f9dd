"""Makes ZeRO-3 gather weights in fewer and larger messages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from dstune.zero.node_copies import drop_copies

SEQUENTIAL_DECODERS = {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3"}
"""Model types whose layers share no weights, are called once each, and take the hidden states as their first input."""


def handle_layers_whole(model: nn.Module) -> None:
    """Let ZeRO-3 gather and release each decoder layer as a unit, not module by module. Fewer, larger messages make a step of
    SmolLM2-135M on two CPU ranks up to a sixth shorter (docs/performance.md).

    DeepSpeed reduces such a layer's gradients as soon as the gradient of its input is known, and takes missing ones for zeros. If
    the input needs no gradient, torch reports it too early. That is the case for the first layer above a frozen embedding, whose
    input is made to need a gradient here. Only for decoders of `SEQUENTIAL_DECODERS` whose layers all train something.
    """
    from deepspeed.utils import set_z3_leaf_module
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    kind = getattr(getattr(model, "config", None), "model_type", "")
    train = [any(parameter.requires_grad for parameter in layer.parameters()) for layer in layers]
    if kind not in SEQUENTIAL_DECODERS or not layers or not all(train):
        return
    for layer in layers:
        layer.register_forward_pre_hook(_require_input_gradient)
        set_z3_leaf_module(layer, True)


REPEATING = {"qwen4_exp_text": "indexer"}
"""By model type, the modules that call one of their parts once for each token of a row."""


def handle_repeating_modules_whole(model: nn.Module) -> None:
    """Let ZeRO-3 gather each module of `REPEATING` as a unit.

    Part by part, ranks with rows of different lengths would gather weights in a different order, and gloo or NCCL would end or
    hang. No gradient may pass through such a module: Qwen 4's indexer only chooses tokens.
    """
    from deepspeed.utils import set_z3_leaf_module

    config = getattr(model, "config", None)
    kind = config.get_text_config().model_type if isinstance(config, PretrainedConfig) else ""
    for name, module in model.named_modules():
        if kind in REPEATING and name.endswith(f".{REPEATING[kind]}"):
            set_z3_leaf_module(module, True)


def gather_persistent_together(optimizer: Any) -> None:
    """Gather the persistent parameters, which ZeRO-3 keeps complete on every rank, in one message after an update.

    DeepSpeed sends one message per parameter: 420 for LoRA on SmolLM2-135M, 0.26 s of a step of 4.2 s on two CPU ranks.
    optimizer: DeepSpeed's of stage 3.
    """
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
        # DeepSpeed drops them only after this; gathered together, parameters come from their copies, which the update left behind.
        drop_copies(absent)
        if absent:
            first.all_gather_coalesced(absent).wait()
        return None

    first.all_gather = all_gather


def wait_for_copies_only() -> None:
    """Let a single rank wait only for copies from host memory. On one rank DeepSpeed "gathers" views of complete weights, but still
    waits for the device in each layer. Does nothing the second time."""
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


def _require_input_gradient(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
    hidden = inputs[0]
    if torch.is_grad_enabled() and not hidden.requires_grad:
        hidden.requires_grad_()
