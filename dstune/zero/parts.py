"""Parameters that stage 3 partitions: partitions them while a model loads, and gathers them later."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from dstune.core import messages
from dstune.zero.hooks import collect_closed


@contextmanager
def partitioned_loading(settings: dict[str, Any]) -> Iterator[None]:
    """Let `models.load.load_model` keep, at stage 3, only this rank's part of each parameter within the block. At every stage this
    frees the memory of closed engines first.

    transformers keeps only a weak reference to this object: it has to outlive the loading.
    """
    from transformers.integrations import HfDeepSpeedConfig

    collect_closed()
    keep_alive = HfDeepSpeedConfig(settings)
    yield
    del keep_alive


@contextmanager
def whole_loading() -> Iterator[None]:
    """Let `from_pretrained` load complete models, even within `partitioned_loading` and during a run at stage 3."""
    from transformers.integrations import deepspeed

    saved = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = saved


def partitioning() -> bool:
    """Return whether the caller is within `partitioned_loading` at stage 3."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    return bool(is_deepspeed_zero3_enabled())


def all_ranks_hold(contents: str | None) -> bool:
    """Return whether every rank has the same files. contents: a digest of this rank's files, None if they cannot be used. A
    collective."""
    return contents is not None and set(messages.gather(contents)) == {contents}


def keep_parts(module: nn.Module) -> None:
    """Keep only this rank's part of each parameter, in the dtype that the run computes in. Call it within `partitioned_loading`,
    with the same parameters on all ranks.

    Unlike `deepspeed.zero.Init(module)`, it does not broadcast every parameter from rank 0: each rank reads only the pages of
    its part from weights that are mapped from a file.
    """
    import deepspeed
    from transformers.integrations.deepspeed import deepspeed_config

    class Parts(deepspeed.zero.Init):
        def _zero_init_param(self, parameter: Any) -> None:
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(self.dtype)
            self._convert_to_deepspeed_param(parameter)
            parameter.partition()

    init = Parts(module, config_dict_or_path=deepspeed_config())
    for buffer in module.buffers():
        buffer.data = buffer.data.to(init.local_device)


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """Return the parameter's shape before stage 3 partitioned it."""
    return getattr(parameter, "ds_shape", parameter.shape)


def full_count(parameter: nn.Parameter) -> int:
    """Return how many elements the parameter had before stage 3 partitioned it, or bitsandbytes packed several into a byte."""
    packed = getattr(parameter, "quant_state", None)
    if packed is not None:
        return int(packed.shape.numel())
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Return whether stage 3 partitions this parameter."""
    return hasattr(parameter, "ds_id")


def gathered(parameters: Sequence[nn.Parameter], *, modified_by_rank: int | None = None) -> Any:
    """Return a context in which stage-3 parameters are complete on every rank; a collective on entry and on exit.

    With `modified_by_rank`, changes by that rank are kept.
    """
    partitioned = [parameter for parameter in parameters if is_partitioned(parameter)]
    if not partitioned:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(partitioned, modifier_rank=modified_by_rank)
