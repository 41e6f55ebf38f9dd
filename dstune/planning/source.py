"""Where the planner finds a model's `config.json`: the folder, the sample's, the hub's cache, or the published numbers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from dstune import samples
from dstune.config.registered import fetched_path
from dstune.config.schema import ModelConfig, UnreachedParts
from dstune.config.stored_formats import with_modelopt
from dstune.core.errors import Problem, UserError
from dstune.core.parsing import parse_json, read_file
from dstune.planning.architectures.tensors import Architecture
from dstune.planning.published import CONFIGS
from dstune.planning.towers import tower_weights


def config_json(model: ModelConfig) -> dict[str, Any]:
    """Return the model's `config.json` with `model.config_overrides` in it, of a model that sees images the language model's part;
    never downloads.

    Raises:
        UserError: it is nowhere on this machine and not among the published ones; it cannot be read.
    """
    values = whole_config_json(model)
    # Models that see images hold the language model's numbers in a part of their own.
    text = values.get("text_config")
    if isinstance(text, dict) and "hidden_size" in text:
        values = text
    return values | model.config_overrides


def unreached_weights(model: ModelConfig, architecture: Architecture) -> int:
    """Return weights of the parts that stay frozen because rows of text never reach them. Raises UserError as `config_json`."""
    if model.unreached_parts is not UnreachedParts.frozen:
        return 0
    return tower_weights(whole_config_json(model)) if architecture.unreached is None else architecture.unreached


def whole_config_json(model: ModelConfig) -> dict[str, Any]:
    """Return the model's `config.json` as it is. Raises UserError as `config_json`."""
    for file in _places(model):
        if file.is_file():
            values = with_modelopt(_read(file, model), file.parent)
            break
    else:
        if model.path not in CONFIGS:
            reason = "its config.json is neither in a folder, nor in the hub's cache, nor known to the planner"
            fix = f"give a folder with its config.json, or one of {', '.join(sorted(CONFIGS)[:3])}, ..."
            raise UserError(Problem("model.path", reason, fix, model.path))
        values = dict(CONFIGS[model.path])
    return values


def _places(model: ModelConfig) -> list[Path]:
    if samples.is_sample(model.path):
        try:
            return [samples.resolve(model.path, fetch=False) / "config.json"]
        except UserError:
            return []  # not fetched yet, or no such sample
    if (folder := Path(fetched_path(model.path))).is_dir():
        return [folder / "config.json"]
    snapshot = cached_snapshot(model)
    return [snapshot / "config.json"] if snapshot else []


def cached_snapshot(model: ModelConfig) -> Path | None:
    """Return where the hub's cache has the files of `model.revision`, or of the main branch; None where it knows no commit of
    it."""
    cached = hub_cache() / f"models--{model.path.replace('/', '--')}"
    reference = cached / "refs" / (model.revision or "main")
    commit = reference.read_text().strip() if reference.is_file() else model.revision
    return cached / "snapshots" / commit if commit else None


def hub_cache() -> Path:
    """Return where huggingface_hub keeps files; asked from the environment, since importing it takes longer than the plan."""
    if folder := os.environ.get("HF_HUB_CACHE"):
        return Path(folder).expanduser()
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(home).expanduser() / "hub"


def _read(file: Path, model: ModelConfig) -> dict[str, Any]:
    try:
        values = parse_json(read_file(file))
    except (OSError, ValueError) as error:
        reason = f"its config.json cannot be read: {error}"
        raise UserError(Problem("model.path", reason, "give a folder in Hugging Face layout", model.path)) from None
    if not isinstance(values, dict):
        raise UserError(
            Problem("model.path", "its config.json is no object", "give a folder in Hugging Face layout", model.path)
        )
    return values
