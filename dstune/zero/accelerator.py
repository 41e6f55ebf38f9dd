"""The accelerator that a rank computes on: CUDA, ROCm (which torch calls CUDA), Intel's XPU, Gaudi, ...; or none, and then the CPU.

`torch.accelerator` says which there is; `torch.get_device_module` has its memory, streams and events. What is here takes the
place of `torch.cuda` everywhere, but for what CUDA alone has.
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
"""Accelerators on which DeepSpeed does not partition: runs on a Mac train on its CPU."""


def kind() -> str:
    """Return `cuda`, `xpu`, `hpu`, ... or `cpu`."""
    if torch.cuda.is_available():
        return "cuda"
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if device is None or device.type in NOT_TRAINED_ON else device.type


def present() -> bool:
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
    """Return a text that tells the device of this rank, which may be a part of a divided GPU, from all others of its node; empty
    where torch does not know."""
    get_properties = getattr(module(), "get_device_properties", None)
    return "" if get_properties is None else str(getattr(get_properties(module().current_device()), "uuid", ""))


def name(index: int | None = None) -> str:
    """Return the name of a device as its maker calls it, or `CPU`."""
    return str(module().get_device_name(index)) if present() else "CPU"


def names() -> list[str]:
    return [name(index) for index in range(count())]


def synchronize() -> None:
    """Wait for all that was started on the device."""
    if present():
        module().synchronize()


def memory(device: torch.device | None = None) -> tuple[int, int]:
    """Return the (free, all) bytes of the device."""
    free, total = module().mem_get_info(device)
    return int(free), int(total)


def free_bytes(device: torch.device) -> int:
    """Return the bytes that tensors may still take of the device: what torch's allocator has kept of freed ones is free too."""
    return memory(device)[0] + int(module().memory_reserved(device)) - int(module().memory_allocated(device))


def has_bf16() -> bool:
    """Return whether the device computes bf16 by itself: Volta and Turing go by way of fp32, slower than fp32 itself."""
    if kind() == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    supported = getattr(module(), "is_bf16_supported", None)
    return supported is None or bool(supported())


def capability() -> tuple[int, int] | None:
    """Return CUDA's compute capability, (9, 0) of an H100; None of others, ROCm's among them."""
    version = module().get_device_capability() if present() and not torch.version.hip else None
    return version if isinstance(version, tuple) else None


def moment() -> Any:
    """Record an event in the stream; `earlier.elapsed_time(later)` gives milliseconds."""
    event = module().Event(enable_timing=True)
    event.record()
    return event


def out_of_memory(error: BaseException) -> bool:
    """Return whether the accelerator, or the host, had no room for a tensor."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(re.search("out of memory|can't allocate memory", str(error), re.I))


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Compile with `torch.compile`. What it makes is kept in a folder of this user alone: torch's own is below /tmp, under a name
    that somebody else may take first, and what lies there is loaded as code.

    Raises:
        UserError: somebody else may write to that folder, or it is a link.
    """
    folder = cache_root() / f"compiled-{os.getuid()}"  # a team may share the rest
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        reason = "compiled code would be loaded from here, and others may write to it"
        raise UserError(Problem(str(folder), reason, f"look what is in it, then remove it: rm -r {folder.name}"))
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
    # Else each rank starts up to 32 processes, for a function or two.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    return torch.compile(function, **options)
