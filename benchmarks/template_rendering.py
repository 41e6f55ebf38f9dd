#!/usr/bin/env python3
"""What it costs to render a conversation in a process of its own, as the threads of a server do, and for the rows of a training.

usage: python benchmarks/template_rendering.py

Each row is made into samples by the renderer of training, in the main thread (in this process) and in a thread (in a process of
its own); each conversation is rendered as for a request in both. The texts have to be equal. Wall-clock time, median of the rounds,
taken in turns.
"""

from __future__ import annotations

import os
import platform
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script it finds its own folder only
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from dstune.data.chat.template import ChatTemplate
from dstune.data.render import ChatRenderer
from tests.unit.data_helpers import CHATML, byte_tokenizer

ROUNDS, ROWS, OF_ROWS = 7, 100, 10_000


def in_thread(work: Callable[[], Any]) -> Any:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    thread.join()
    return results[0]


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def compare(name: str, work: Callable[[], Any], count: int, scale: float, unit: str) -> bool:
    work(), in_thread(work)  # compiled, and the process started
    taken: dict[str, list[float]] = {"here": [], "own": []}
    for _ in range(ROUNDS):
        here, expected = seconds(work)
        own, result = seconds(lambda: in_thread(work))
        taken["here"].append(here / count * scale)
        taken["own"].append(own / count * scale)
    here, own = median(taken["here"]), median(taken["own"])
    print(f"| {name}, {unit} | {here:.2f} | {own:.2f} | {own - here:+.2f} |", flush=True)
    return bool(result == expected)


def main() -> int:
    print(f"{platform.machine()}, {os.cpu_count()} cores; Python {platform.python_version()}\n")
    print("| | in this process | in its own | |\n| --- | --- | --- | --- |")
    tokenizer, equal = byte_tokenizer(CHATML), True
    template = ChatTemplate(tokenizer, None)
    for exchanges, letters in ((1, 100), (10, 1_000), (10, 20_000)):
        messages = [
            {"role": role, "content": "word " * (letters // 5)}
            for _ in range(exchanges)
            for role in ("user", "assistant")
        ]

        def render(messages: list[dict[str, str]] = messages) -> list[str]:
            return [template.text(messages, prompt=True) for _ in range(50)]

        name = f"a request of {2 * exchanges} messages of {letters:,} characters"
        equal &= compare(name, render, 50, 1000, "ms")
    rows = [
        {
            "messages": [
                {"role": role, "content": f"{role} {row} {turn} " + "word " * 40}
                for turn in range(3)
                for role in ("user", "assistant")
            ]
        }
        for row in range(ROWS)
    ]
    renderer = ChatRenderer(tokenizer, None)
    equal &= compare(
        "rows of three exchanges into samples",
        lambda: [str(renderer.passages(row["messages"])) for row in rows],
        ROWS,
        OF_ROWS,
        f"s for {OF_ROWS:,}",
    )
    print("the texts are equal" if equal else "THE TEXTS DIFFER")
    return int(not equal)


if __name__ == "__main__":
    sys.exit(main())
