"""What a trace of torch's profiler says of a GPU's time: by kind of kernel, idle, and how much runs on several streams at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

Interval = tuple[float, float]

KINDS = {
    "attention": ("flash", "fmha", "attention", "varlen"),
    "products of matrices": ("gemm", "cutlass", "cublas", "nvjet", "xmma", "splitk"),
    "collectives": ("nccl",),
    "optimizer": ("adam", "multi_tensor"),
    "norms": ("norm",),
    "cross entropy": ("softmax", "nll_loss", "cross_entropy"),
}
"""Parts of a kernel's name, in lower case. What fits none is `elementwise and other`."""
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


def summarize(trace: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield rows of a report: share of the steps by kind of kernel, idle share, and share of side streams' time that runs beside
    the stream with the most work."""
    events = [event for event in trace.get("traceEvents", []) if event.get("ph") == "X"]
    steps = [event for event in events if str(event.get("name", "")).startswith("optimizer step")]
    kernels = [event for event in events if event.get("cat") in ON_DEVICE]
    if not steps or not kernels:
        yield {"trace": "no kernels on a device were recorded"}
        return
    begin = min(event["ts"] for event in steps)
    end = max(max(event["ts"] + event["dur"] for event in group) for group in (steps, kernels))
    whole = end - begin
    by_kind: dict[str, float] = defaultdict(float)
    streams: dict[Any, list[Interval]] = defaultdict(list)
    for event in kernels:
        by_kind[kind_of(event)] += event["dur"]
        streams[event.get("args", {}).get("stream", event.get("tid"))].append((event["ts"], event["ts"] + event["dur"]))
    for kind, microseconds in sorted(by_kind.items(), key=lambda item: -item[1]):
        yield {"kind": kind, "share_of_step": microseconds / whole}
    busy = union(interval for intervals in streams.values() for interval in intervals)
    yield {"kind": "idle", "share_of_step": 1 - length(busy) / whole}
    main = max(streams, key=lambda stream: length(union(streams[stream])))
    main_busy = union(streams[main])
    for stream, intervals in streams.items():
        if stream != main:
            stream_busy = union(intervals)
            share = length(intersection(stream_busy, main_busy)) / length(stream_busy)
            yield {"stream": stream, "share_of_step": length(stream_busy) / whole, "beside_the_main_stream": share}


def kind_of(event: dict[str, Any]) -> str:
    if event["cat"] != "kernel":
        return "copies"
    name = str(event.get("name", "")).lower()
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "elementwise and other")


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Return the same points as disjoint intervals in order."""
    merged: list[Interval] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


def intersection(first: list[Interval], second: list[Interval]) -> list[Interval]:
    """Return the points that are in both; each has to be a `union`."""
    common, i, j = [], 0, 0
    while i < len(first) and j < len(second):
        begin, end = max(first[i][0], second[j][0]), min(first[i][1], second[j][1])
        if begin < end:
            common.append((begin, end))
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1
    return common


def length(intervals: Iterable[Interval]) -> float:
    return sum(end - begin for begin, end in intervals)
