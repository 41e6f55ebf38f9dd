"""A guard within the test's process, and models with thresholds made by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

from dstune.guard.calibration import DIRECTIONS, LEVELS, Bucket, Calibration, digest_of
from dstune.guard.check import GuardDown
from dstune.guard.gateway_routes import guard_routes
from dstune.guard.model import GuardModel
from dstune.guard.policy import Policies, read
from dstune.guard.scanner import Item, Result, Scanner


def calibrate(
    folder: Path, threshold: float, *, window_tokens: int = 16, stride: int = 12, part_tokens: int = 0
) -> Path:
    """Return `guard.json` with one threshold for all levels."""
    bucket = Bucket(None, dict.fromkeys(LEVELS.values(), threshold))
    directions = dict.fromkeys(DIRECTIONS, (bucket,))
    made_of = {"input": {"rows": 1, "digest": "0"}}
    lengths = {"window_tokens": window_tokens, "stride": stride, "part_tokens": part_tokens}
    Calibration(digest_of(folder), directions, made_of, **lengths).save(folder)
    return folder


def calibrated_between(folder: Path, low: str, high: str) -> Path:
    """Return a threshold between the scores of two texts. Raises AssertionError where `low` has not the lower one."""
    model = GuardModel.load(folder, window_tokens=16, stride=12)
    first, second = (max(score.value for score in scores) for scores in model.scores([low, high]))
    assert first < second
    return calibrate(folder, (first + second) / 2)


class InProcess:
    """What keeps the guard's process running, without one."""

    def __init__(self, policies: Policies, scanner: Scanner):
        self.policies, self.scanner = policies, scanner
        self.up = True
        self.seen: list[Item] = []
        self.engine = SimpleNamespace(window_tokens=dict.fromkeys(scanner.models, 16))

    async def scan(self, items: Sequence[Item]) -> list[Result]:
        if not self.up:
            raise GuardDown("EngineDown: guard is not running")
        self.seen += items
        return await asyncio.to_thread(lambda: [self.scanner.scan(item) for item in items])


def write_policies(folder: Path, policy: Mapping[str, Any], **fields: Any) -> Path:
    """Write a file with one policy for all routes."""
    routes = dict.fromkeys(("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v2/guard"), "own")
    value = {"format": 1, "policies": {"own": dict(policy)}, "routes": routes, **fields}
    file = folder / "guard.yaml"
    file.write_text(yaml.safe_dump(value))
    return file


def guarded(
    server: Any, policy: Mapping[str, Any], models: Mapping[str, Path] | None = None, **fields: Any
) -> InProcess:
    """Put a guard in front of a gateway that runs (`tests.support.serving.served`)."""
    policies = read(write_policies(server.folder, policy, **fields))
    guarding = InProcess(policies, Scanner.load(models or {}))
    policies.check_models(guarding.scanner.calibrated)
    server.gateway.add_routes(guard_routes(server.gateway, guarding, server.folder, 30.0)[0])  # type: ignore[arg-type]
    return guarding
