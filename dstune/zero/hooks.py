"""Removes and restores ZeRO-3's hooks, which gather the weights of each layer, and frees closed engines."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

from torch import nn


@contextmanager
def without_hooks(engine: Any, module: nn.Module) -> Iterator[None]:
    """Remove the hooks of DeepSpeed's stage-3 `engine` from its `module` within the block. The caller has gathered the weights."""
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

    # An engine that only evaluates has the object with the hooks in place of an optimizer.
    offload = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
    parameters: list[Any] = list(module.parameters())
    for parameter in parameters:
        parameter.ds_active_sub_modules.clear()
    # `fwd_pre_hook` begins a pass; as long as none is recorded, it compares with the other ranks.
    for hook in [offload.fwd_pre_hook, *offload.forward_hooks, *offload.backward_hooks]:
        hook.remove()
    offload.forward_hooks, offload.backward_hooks = [], []
    try:
        yield
    finally:
        # The recorded order of fetches belongs to the hooks that were removed.
        coordinator = offload.get_param_coordinator()
        if not coordinator.is_invalid_trace():
            coordinator._invalidate_trace()
        offload.setup_zero_stage3_hooks()
        FWD_MODULE_STACK.pop()  # `setup_zero_stage3_hooks` pushes the module once more


_closed: WeakSet[Any] = WeakSet()


def forget(engine: Any, model: nn.Module) -> None:
    """Drop DeepSpeed's references to a closed engine: version 0.19.8 keeps stage-3 models in a module-level list and in a cache,
    and the hooks of a model refer to its engine."""
    _closed.add(engine)
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    closed = set(model.modules())
    stack = getattr(parameter_offload, "FWD_MODULE_STACK", [])
    stack[:] = [module for module in stack if module not in closed]
    cached = getattr(PartitionedParameterCoordinator, "_PartitionedParameterCoordinator__params_to_release", None)
    for cell in getattr(cached, "__closure__", None) or ():  # of the wrapper that records NVTX ranges
        if hasattr(cell.cell_contents, "cache_clear"):
            cell.cell_contents.cache_clear()


def collect_closed() -> None:
    """Free the memory of closed engines and their models, which are in reference cycles. If Python collected them during a later
    training, that would synchronize the device in the middle of a step. Takes 0.3 s; no time if no engine was closed."""
    if _closed:
        gc.collect()
