"""The best trial of a sweep as a command, for its last words and its page."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from dstune.config.overrides import key_of, parse
from dstune.config.plain_file import literal
from dstune.core.errors import UserError
from dstune.core.parsing import parse_yaml, read_file
from dstune.core.secrets import redact
from dstune.tracking.trials import FINISHED, SWEEP_FILE, Record, ranked


def best_commands(sweep: Path, records: Sequence[Record], objective: str) -> list[str]:
    """Return the commands that train the best trial again on its own and export it; empty if no trial has completed."""
    ended = [
        record
        for record in ranked(records, objective)
        if record.status in FINISHED[:2] and objective in record.objective
    ]
    if not ended:
        return []
    best = ended[0]
    try:
        content = parse_yaml(read_file(sweep / SWEEP_FILE).decode())
        fixed = _fixed(content, best)
        values = [f"{key}={literal(value)}" for key, value in best.values.items()]
    except (OSError, ValueError, yaml.YAMLError, TypeError, AttributeError, KeyError, UserError):
        return []
    folder = sweep / "best"  # the trial's own export folder already contains an export
    export = ["dstune", "export", str(sweep / best.name), "--out", str(folder)]
    return [redact(shlex.join(["dstune", "train", *fixed, *values])), shlex.join(export)]


def _fixed(content: Any, best: Record) -> list[str]:
    """Return the overrides of the sweep without its own settings and without the keys that it varies."""
    folders = [word for folder in content.get("config_dirs") or [] for word in ("--config-dir", str(folder))]
    texts = [str(text) for text in content["overrides"]]
    varied = {key.lstrip("+") for key in best.values}
    return [*folders, *(text for text in texts if key_of(text) not in varied and not _is_of_sweep(text))]


def _is_of_sweep(text: str) -> bool:
    key = key_of(text)
    if key == "sweep" or key.startswith(("sweep.", "hydra")) or key in ("run.dir", "sweep"):
        return True
    parsed, problems = parse([text])
    return bool(problems) or not parsed  # several values, of a key that the trial does not name
