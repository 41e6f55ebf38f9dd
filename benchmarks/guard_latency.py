"""What the guard adds to requests and streamed answers, and whom it stops.

    python benchmarks/guard_latency.py input [--model EXPORT] [--requests 60]      time that a request takes longer, by length
    python benchmarks/guard_latency.py stream [--model EXPORT] [--streams 10]      first text and end of a streamed answer
    python benchmarks/guard_latency.py conversations [--model EXPORT] [--rows 2000]  packaged conversations that a policy stops
    python benchmarks/guard_latency.py rules                                       what the rules find without a model

Gateway, stub engine and client share a process, the guard has its own, as in `dstune serve`; with and without the guard alternate
in one run. Without --model an encoder of the size of MiniLM with random weights stands in: what it finds means nothing, what it
takes for harmless texts is the same.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

LENGTHS = (100, 400, 1600, 6400)
"""Characters of a request."""
TOKEN_SECONDS = 0.04
"""Between two tokens of the stub: 25 tokens a second."""


WORDS = "the a of house river light when they came over small and green to find it under"


def stand_in(folder: Path) -> Path:
    """Save MiniLM's architecture with random weights and thresholds that nothing reaches."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    from dstune import samples
    from dstune.guard.calibration import DIRECTIONS, LEVELS, Bucket, Calibration, digest_of

    source = samples.resolve("sample://minilm")
    labels = {0: "benign", 1: "attack"}
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(
        source, id2label=labels, label2id={name: index for index, name in labels.items()}
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    buckets = (Bucket(None, dict.fromkeys(LEVELS.values(), 1.0)),)
    Calibration(digest_of(folder), dict.fromkeys(DIRECTIONS, buckets), {"input": {"rows": 0, "digest": ""}}).save(
        folder
    )
    return folder


def everything() -> dict[str, Any]:
    """Return a policy that looks for all that there is, in both directions."""
    exact = [
        {"detector": detector, "action": "flag"}
        for detector in ("prompt_attack/rules", "pii", "secrets", "unknown_links")
    ]
    model = [{"detector": "prompt_attack", "level": "l2_very_likely", "action": "block"}]
    leak = [{"detector": "system_prompt_leak", "action": "flag"}]
    return {"input": exact + model, "tool_result": exact + model, "output": exact + model + leak}


@asynccontextmanager
async def behind_guard(model: Path, folder: Path):
    """Start a gateway over a stub, and yield a switch that takes the guard away."""
    from dstune.guard.engine import Guarding
    from dstune.guard.gateway_routes import guard_routes
    from dstune.guard.policy import read
    from dstune.serve.engines.base import Limits
    from tests.support.guards import write_policies
    from tests.support.serving import served

    async with served(folder) as server:
        policies = read(write_policies(folder, everything(), models={"prompt_attack": str(model.resolve())}))
        with tempfile.TemporaryDirectory(prefix="dstune-guard-") as runtime:
            guarding = Guarding(policies, folder, Path(runtime), Limits(threads=1))
            await guarding.start()
            try:
                server.gateway.add_routes(guard_routes(server.gateway, guarding, folder, 1.0)[0])
                guard = server.gateway.guard

                def switch(on: bool) -> None:
                    server.gateway.inference.guard = guard if on else None

                yield server, switch, psutil.Process(guarding.engine.process.pid)
            finally:
                await guarding.stop()


def prose(characters: int, seed: int) -> str:
    """Return words that no cache has seen."""
    draw, words = random.Random(seed), WORDS.split()
    text = ""
    while len(text) < characters:
        text += f"{' '.join(draw.choice(words) for _ in range(draw.randint(5, 14)))}. "
    return text[:characters]


def spread(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    p95 = ordered[min(len(ordered) - 1, round(0.95 * len(ordered)))]
    return {"median_ms": round(1000 * statistics.median(ordered), 1), "p95_ms": round(1000 * p95, 1)}


async def measure_input(model: Path, requests: int) -> None:
    from tests.support.serving import chat

    with tempfile.TemporaryDirectory() as name:
        async with behind_guard(model, Path(name)) as (server, switch, process):
            client = server.client()
            for characters in LENGTHS:
                spent = sum(process.cpu_times()[:2])
                taken: dict[bool, list[float]] = {True: [], False: []}
                for number in range(requests):
                    for on in (True, False):
                        switch(on)
                        server.app.pieces = ["fine"]
                        body = chat(prose(characters, number * 7919 + characters))
                        began = time.perf_counter()
                        answer = await client.post("/v1/chat/completions", json=body)
                        taken[on].append(time.perf_counter() - began)
                        assert answer.status_code == 200, answer.text
                added = [with_guard - without for with_guard, without in zip(taken[True], taken[False], strict=True)]
                figures = {"characters": characters, "requests": requests, "added": spread(added)}
                figures["guard_cpu_ms"] = round(1000 * (sum(process.cpu_times()[:2]) - spent) / requests, 1)
                print(json.dumps(figures | {"load": round(os.getloadavg()[0], 1)}), flush=True)


async def measure_stream(model: Path, streams: int) -> None:
    from tests.support.serving import chat

    with tempfile.TemporaryDirectory() as name:
        async with behind_guard(model, Path(name)) as (server, switch, _):
            client, figures = server.client(), {}
            server.app.seconds = TOKEN_SECONDS
            for on in (True, False):
                first: list[float] = []
                whole: list[float] = []
                for number in range(streams):
                    switch(on)
                    server.app.pieces = [f"{word} " for word in prose(800, number).split()]
                    began, seen = time.perf_counter(), False
                    body = chat(f"question {number} {on}", stream=True)
                    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                        async for line in answer.aiter_lines():
                            if not seen and '"content"' in line:
                                first.append(time.perf_counter() - began)
                                seen = True
                    whole.append(time.perf_counter() - began)
                figures["with" if on else "without"] = {"first": spread(first), "end": spread(whole)}
            print(
                json.dumps(
                    {"tokens_per_second": 1 / TOKEN_SECONDS, "streams": streams, **figures, "load": os.getloadavg()[0]}
                )
            )


def conversations(rows: int) -> Iterator[list[dict[str, str]]]:
    """Yield the first ones of the packaged dialogues: the model's training reads none of them (docs/guard-model.md)."""
    from dstune import samples

    with samples.resolve("sample://chitchat").open(encoding="utf-8") as lines:
        for _, line in zip(range(rows), lines, strict=False):
            yield json.loads(line)["messages"]


def measure_conversations(policy: str, model: Path | None, rows: int) -> None:
    from dstune.guard.check import Checker, Text
    from dstune.guard.policy import read
    from dstune.guard.scanner import Scanner

    policies = read(policy, str(model) if model else None)
    scanner = Scanner.load(policies.models)
    route_policy = policies.of_route("/v1/chat/completions")
    assert route_policy is not None

    async def scan(items):
        return [scanner.scan(item) for item in items]

    check = Checker(scan)
    blocked, detectors, messages = 0, Counter(), 0
    for turns in conversations(rows):
        verdict = asyncio.run(
            check(
                route_policy, [Text(turn["content"], turn["role"], n) for n, turn in enumerate(turns)], everything=True
            )
        )
        blocked += bool(verdict.blocked)
        messages += len(turns)
        detectors.update({entry.detector for entry in verdict.detected})
    share_by_detector = {name: f"{100 * count / rows:.2f}%" for name, count in sorted(detectors.items())}
    figures = {
        "conversations": rows,
        "messages": messages,
        "blocked": f"{100 * blocked / rows:.2f}%",
        "found": share_by_detector,
    }
    print(json.dumps(figures | {"prompt_attack": "ran" if scanner.models else "did not run: no model"}))


def measure_rules() -> None:
    """Measure the rules on the packaged attacks' test and calibration (docs/guard-model.md): they were written without them."""
    from dstune import samples
    from dstune.guard.rules import matching
    from dstune.guard.variants import variants

    count, found_counts, names = Counter(), Counter(), Counter()
    for split in ("test", "calibration"):
        with samples.resolve(f"sample://attacks:{split}").open(encoding="utf-8") as lines:
            for row in map(json.loads, lines):
                readings = variants(row["text"])
                tool = row["direction"] == "tool_result"
                rules = {rule.name for reading in readings for rule in matching(reading.text, tool_result=tool)}
                kind = (row["label"], row.get("suite", split))
                count[kind] += 1
                found_counts[kind] += bool(rules)
                names.update(rules if row["label"] == "benign" else ())
    for kind in sorted(count):
        print(
            json.dumps(
                {
                    "label": kind[0],
                    "suite": kind[1],
                    "rows": count[kind],
                    "found": f"{100 * found_counts[kind] / count[kind]:.1f}%",
                }
            )
        )
    print(json.dumps({"false alarms": dict(names.most_common())}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("input", "stream", "conversations", "rules"))
    parser.add_argument("--model", type=Path)
    parser.add_argument("--policy", default="default")
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--streams", type=int, default=10)
    parser.add_argument("--rows", type=int, default=2000)
    arguments = parser.parse_args()
    if arguments.what == "conversations":
        measure_conversations(arguments.policy, arguments.model, arguments.rows)
        return
    if arguments.what == "rules":
        measure_rules()
        return
    with tempfile.TemporaryDirectory() as name:
        model = arguments.model or stand_in(Path(name) / "export")
        if arguments.what == "input":
            asyncio.run(measure_input(model, arguments.requests))
        else:
            asyncio.run(measure_stream(model, arguments.streams))


if __name__ == "__main__":
    main()
