"""Reads how much memory this machine and this process's container have left, and whether the CPU is fast in bf16."""

from __future__ import annotations

from pathlib import Path

import psutil


def available_bytes() -> float:
    """Return the bytes of memory that processes on this machine, and in this container, can still allocate in total."""
    return min(float(psutil.virtual_memory().available), container_limit())


def container_limit(root: Path = Path("/sys/fs/cgroup")) -> float:
    """Return the bytes of memory that this process's container can still allocate; infinite if it has no limit.

    The container's usage includes cached pages of files, but the kernel frees these when memory is needed, so they count as free.
    """
    try:
        limit = (root / "memory.max").read_text().strip()
        if limit == "max":
            return float("inf")
        lines = [line.split() for line in (root / "memory.stat").read_text().splitlines()]
        cached_bytes = sum(int(size) for name, size in lines if name in ("active_file", "inactive_file"))
        return max(0.0, int(limit) - int((root / "memory.current").read_text()) + cached_bytes)
    except (OSError, ValueError):
        return float("inf")


def fast_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Return whether this CPU multiplies bf16 matrices at least as fast as fp32 ones (`dstune.zero.precision.fast_bf16`)."""
    try:
        flags = next((line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")), "")
    except OSError:
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags
