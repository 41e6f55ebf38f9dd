"""What the memory of this machine, and of the container that this process is in, leaves free."""

from __future__ import annotations

from pathlib import Path

import psutil


def available_bytes() -> float:
    """Return bytes that processes here may still take together."""
    return min(float(psutil.virtual_memory().available), container_limit())


def container_limit(root: Path = Path("/sys/fs/cgroup")) -> float:
    """Return bytes that this process's container may still take; infinite without a limit.

    Pages of files that were read count as taken until others need the room, so they are free."""
    try:
        limit = (root / "memory.max").read_text().strip()
        if limit == "max":
            return float("inf")
        lines = [line.split() for line in (root / "memory.stat").read_text().splitlines()]
        cached = sum(int(size) for name, size in lines if name in ("active_file", "inactive_file"))
        return max(0.0, int(limit) - int((root / "memory.current").read_text()) + cached)
    except (OSError, ValueError):
        return float("inf")


def fast_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Return whether this CPU multiplies bf16 matrices at least as fast as fp32 ones (`dstune.zero.precision.fast_bf16`)."""
    try:
        flags = next((line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")), "")
    except OSError:
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags
