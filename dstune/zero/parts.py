"""Parameters that stage 3 keeps in parts: while a model loads, and read whole afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn


@contextmanager
def partitioned_loading(settings: dict[str, Any]) -> Iterator[None]:
    """While open, `models.load.load_model` at stage 3 leaves on each rank its part of each parameter.

    transformers keeps only a weak reference to this object: it has to outlive the loading.
    """
    from transformers.integrations import HfDeepSpeedConfig

    keep_alive = HfDeepSpeedConfig(settings)
    yield
    del keep_alive


@contextmanager
def whole_loading() -> Iterator[None]:
    """`from_pretrained` makes whole models, also within `partitioned_loading` and while a run at stage 3 goes on."""
    from transformers.integrations import deepspeed

    keep = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = keep


def from_own_files(contents: str | None) -> bool:
    """Whether every rank can take its parts from files of its own, which stay where they are until then.

    contents: a digest of this rank's files, or None where they cannot be used as they are. A collective within
    `partitioned_loading` at stage 3, and False outside. It is False too where nodes have different files: rank 0's are sent.
    """
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    if not is_deepspeed_zero3_enabled():
        return False
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, contents)
    return contents is not None and set(everyone) == {contents}


def keep_parts(module: nn.Module) -> None:
    """Leave of each parameter, which is alike on all ranks, this rank's part, in the type that the run computes in. Call it
    within `partitioned_loading`.

    As `deepspeed.zero.Init(module)`, which sends every parameter from rank 0 first: of weights mapped from a file only the
    pages of the part are read here, and nothing is sent.
    """
    import deepspeed
    from transformers.integrations.deepspeed import deepspeed_config

    init = deepspeed.zero.Init(config_dict_or_path=deepspeed_config())
    parameter: Any
    for parameter in module.parameters():
        parameter.data = parameter.data.to(init.dtype)
        init._convert_to_deepspeed_param(parameter)
        parameter.partition()
        parameter.data = parameter.data.to(init.local_device)  # empty by now; where it will be gathered


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """The parameter's shape before stage 3 partitioned it."""
    return getattr(parameter, "ds_shape", parameter.shape)


def full_count(parameter: nn.Parameter) -> int:
    """The parameter's number of elements before stage 3 partitioned it, or bitsandbytes packed several into a byte."""
    packed = getattr(parameter, "quant_state", None)
    if packed is not None:
        return int(packed.shape.numel())
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether stage 3 keeps this parameter in parts."""
    return hasattr(parameter, "ds_id")


def gathered(parameters: Sequence[nn.Parameter], *, modified_by_rank: int | None = None) -> Any:
    """Context in which stage 3 parameters are whole on every rank; a collective on entry and on exit.

    With `modified_by_rank`, what that rank writes into them is kept.
    """
    partitioned = [parameter for parameter in parameters if is_partitioned(parameter)]
    if not partitioned:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(partitioned, modifier_rank=modified_by_rank)
