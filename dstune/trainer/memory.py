"""Measures the peak of this rank's memory, as the public contract defines it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dstune.zero import accelerator

GIB = 2**30


def resident_bytes() -> int:
    """Return the anonymous plus shared resident memory of this process, bytes. Pages of mapped files (weights, data) do not
    count."""
    kilobytes = 0
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(("RssAnon:", "RssShmem:")):
            kilobytes += int(line.split()[1])
    return kilobytes * 1024


def give_back() -> None:
    """Return to the system the freed memory that glibc holds and the system still counts as used. Other C libraries hold less."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def keep_freed() -> None:
    """Make glibc reuse memory that one micro-batch freed for the next one, on a CPU. Other C libraries are not changed.

    By default glibc returns large tensors to the system when they are freed, and the pages of each new tensor are mapped and
    cleared again: a norm of transformers took 7.3 ms with it, 3.4 ms without (`benchmarks/norms.py`). Call this after the model
    is loaded and checked: memory that was freed until then is returned. Values that the user has set in the environment stay.
    """
    if accelerator.present():
        return
    give_back()
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        for option, (variable, value) in MALLOC_OPTIONS.items():
            if variable not in os.environ and TUNABLES[option] not in os.environ.get("GLIBC_TUNABLES", ""):
                libc.mallopt(option, value)


MALLOC_OPTIONS = {
    -1: ("MALLOC_TRIM_THRESHOLD_", 2**31 - 1),  # M_TRIM_THRESHOLD: free memory that is kept at the heap's end
    -3: ("MALLOC_MMAP_THRESHOLD_", 2**25),  # M_MMAP_THRESHOLD: from this size on memory is not taken from the heap
}
"""Options of glibc's mallopt: the environment variable for the same option, and the value that dstune sets."""


TUNABLES = {-1: "glibc.malloc.trim_threshold", -3: "glibc.malloc.mmap_threshold"}


class PeakMemory:
    """GPU: the allocator's peak. CPU: resident memory above the level at construction, sampled 20 times a second.

    Build it after the imports and before the model, and `close()` it at the end.
    """

    def __init__(self) -> None:
        self._on_gpu = accelerator.present()
        self._base = self._peak = 0
        self._earlier = 0
        """The allocator's peak before its statistics were last reset."""
        self._stop = threading.Event()
        if self._on_gpu:
            accelerator.module().reset_peak_memory_stats()
            return
        self._base = self._peak = resident_bytes()
        threading.Thread(target=self._watch, name="peak-memory", daemon=True).start()

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            self._peak = max(self._peak, resident_bytes())

    @property
    def gib(self) -> float:
        if self._on_gpu:
            return max(self._earlier, accelerator.module().max_memory_allocated()) / GIB
        self._peak = max(self._peak, resident_bytes())
        return (self._peak - self._base) / GIB

    @property
    def now_gib(self) -> float:
        """Memory in use now."""
        return (accelerator.module().memory_allocated() if self._on_gpu else resident_bytes() - self._base) / GIB

    @contextmanager
    def apart(self) -> Iterator[Callable[[], float]]:
        """Measure a separate peak within the block, which does not count as the run's. Yield a function that returns it, in GiB."""
        if self._on_gpu:
            self._earlier = max(self._earlier, accelerator.module().max_memory_allocated())
            accelerator.module().reset_peak_memory_stats()
            yield lambda: accelerator.module().max_memory_allocated() / GIB
            accelerator.module().reset_peak_memory_stats()
            return
        peak_before = max(self._peak, resident_bytes())
        give_back()
        self._peak = resident_bytes()
        yield lambda: (max(self._peak, resident_bytes()) - self._base) / GIB
        give_back()
        self._peak = peak_before

    def close(self) -> None:
        self._stop.set()
