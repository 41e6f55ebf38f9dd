"""Describes what a run ran on, for `environment.json`."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import socket
import subprocess
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "dstune",
    "torch",
    "deepspeed",
    "transformers",
    "datasets",
    "peft",
    "hydra-core",
    "tokenizers",
    "numpy",
    "wandb",
)


def describe(hosts: list[str], devices: list[str], data_fingerprint: str, model: dict[str, Any]) -> dict[str, Any]:
    """Return versions, hosts, devices, the git commit of the working folder (None outside a repository) and fingerprints."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "hosts": sorted(set(hosts)),
        "devices": devices or [_processor()],
        "git_commit": _git_commit(),
        "data_fingerprint": data_fingerprint,
        "model": model,
    }


def launches(before: Path, step: int, ranks: int) -> list[dict[str, Any]]:
    """Return the launches of a run, this one last: the step that each continued from, its time (UTC) and its number of ranks.

    before: the `environment.json` of the previous launch. A start at step 0 begins a new list, since nothing of an earlier attempt
    is left in the run.
    """
    earlier: list[dict[str, Any]] = []
    if step > 0:
        with suppress(OSError, ValueError, KeyError, TypeError):
            earlier = list(json.loads(before.read_text())["launches"])
    now = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    return [*earlier, {"step": step, "time": now, "ranks": ranks}]


def host() -> str:
    return socket.gethostname()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.10 and newer
    return str(capabilities.get("cpu_name") or platform.processor() or "CPU")


def _git_commit() -> str | None:
    try:
        answer = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None
