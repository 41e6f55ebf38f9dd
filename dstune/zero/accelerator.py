"""The accelerator that a rank computes on: CUDA, ROCm (which torch calls CUDA), Intel's XPU, Gaudi, ...; without one, the CPU.

`torch.accelerator` says which one there is; `torch.get_device_module` has its memory, streams and events. The rest of the code
calls these functions instead of `torch.cuda`, except for features of CUDA alone.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from typing import Any

import torch

from dstune.core.errors import Problem, UserError
from dstune.core.paths import cache_root

NOT_TRAINED_ON = ("mps", "mtia", "meta")
"""Accelerators on which DeepSpeed cannot partition: on a Mac, runs train on the CPU."""


def kind() -> str:
    """Return `cuda`, `xpu`, `hpu`, ... or `cpu`."""
    if torch.cuda.is_available():
        return "cuda"
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if device is None or device.type in NOT_TRAINED_ON else device.type


def present() -> bool:
    """Return whether this machine has an accelerator that dstune trains on."""
    return kind() != "cpu"


def module() -> Any:
    """Return torch's module for the accelerator: `torch.cuda`, `torch.xpu`, ..."""
    return torch.get_device_module(kind())


def count() -> int:
    """Count the devices that this process sees."""
    return int(module().device_count()) if present() else 0


def current() -> torch.device:
    """Return the device of this rank."""
    return torch.device(kind(), module().current_device()) if present() else torch.device("cpu")


def choose(index: int) -> None:
    """Let this rank compute on its node's device number `index`."""
    module().set_device(index)


def identity() -> str:
    """Return the UUID of this rank's device, which may be a partition of a GPU; empty if torch does not know it."""
    get_properties = getattr(module(), "get_device_properties", None)
    return "" if get_properties is None else str(getattr(get_properties(module().current_device()), "uuid", ""))


def name(index: int | None = None) -> str:
    """Return the manufacturer's name of a device, or `CPU`."""
    return str(module().get_device_name(index)) if present() else "CPU"


def names() -> list[str]:
    return [name(index) for index in range(count())]


def synchronize() -> None:
    """Wait until the device has finished all work."""
    if present():
        module().synchronize()


def memory(device: torch.device | None = None) -> tuple[int, int]:
    """Return the (free, total) bytes of the device."""
    free, total = module().mem_get_info(device)
    return int(free), int(total)


def free_bytes(device: torch.device) -> int:
    """Return how many bytes tensors can still allocate on the device, including freed memory that torch's allocator holds."""
    return memory(device)[0] + int(module().memory_reserved(device)) - int(module().memory_allocated(device))


def has_bf16() -> bool:
    """Return whether the hardware computes in bf16. Volta and Turing emulate it, slower than fp32."""
    if kind() == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    supported = getattr(module(), "is_bf16_supported", None)
    return supported is None or bool(supported())


def capability() -> tuple[int, int] | None:
    """Return CUDA's compute capability, such as (9, 0) for an H100; None for other accelerators, including ROCm."""
    version = module().get_device_capability() if present() and not torch.version.hip else None
    return version if isinstance(version, tuple) else None


def moment() -> Any:
    """Record an event in the stream; `earlier.elapsed_time(later)` gives milliseconds."""
    event = module().Event(enable_timing=True)
    event.record()
    return event


def out_of_memory(error: BaseException) -> bool:
    """Return whether `error` says that the accelerator or the host ran out of memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(re.search("out of memory|can't allocate memory", str(error), re.I))


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Compile with `torch.compile`, whose cache is put into a folder that only this user can write to. torch loads its cache as
    code, and by default keeps it below /tmp, under a name that another user could take first.

    Raises:
        UserError: another user can write to that folder, or it is a link.
    """
    folder = cache_root() / f"compiled-{os.getuid()}"  # a team may share the rest of the cache
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        reason = "compiled code would be loaded from here, and others may write to it"
        raise UserError(Problem(str(folder), reason, f"look what is in it, then remove it: rm -r {folder.name}"))
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
    # Otherwise each rank starts up to 32 processes to compile one or two functions.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    return torch.compile(function, **options)
