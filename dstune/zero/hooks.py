"""ZeRO-3's hooks, which gather the weights of each layer, taken off and put back."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

from torch import nn


@contextmanager
def without_hooks(engine: Any, module: nn.Module) -> Iterator[None]:
    """Keep DeepSpeed's stage-3 `engine` off its `module`, whose weights are gathered, within the block."""
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

    # An engine that only evaluates has the hooks in place of an optimizer.
    offload = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
    parameters: list[Any] = list(module.parameters())
    for parameter in parameters:
        parameter.ds_active_sub_modules.clear()
    # The first of them begins a pass, and compares with the other ranks where none was recorded yet.
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
        FWD_MODULE_STACK.pop()  # it was there already


_closed: WeakSet[Any] = WeakSet()


def forget(engine: Any, model: nn.Module) -> None:
    """Let go of a DeepSpeed engine that was closed: version 0.19.8 keeps models of stage 3 in a list of a module and in a cache,
    and an engine is in the hooks of its model."""
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
    """Free what closed engines hold, models among it: they are in cycles, and one that Python only collects while it trains
    synchronises the device in the midst of a step. Takes 0.3 s, and nothing where there was none."""
    if _closed:
        gc.collect()
