"""Checks the Python code in an export: only the code of its base model and of dstune's own head is trusted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dstune.config.schema import ModelConfig
from dstune.core.errors import UserError
from dstune.core.parsing import object_in

EARLIER_HEADS = (
    "cba98cd469b9094b4b3d47541d4455a14d10bc88de8515d2007c2944cb8e1f76",
    "17721c1bd45f88dbe20332ae2491f0674aec368ccba8153f0d91eff1ae9b4cfa",
)
"""SHA-256 of `models/pooled.py` in earlier versions. Exports carry a copy of it, so each change to that file adds a digest here."""


def is_of_base(folder: Path, base: ModelConfig) -> bool:
    """Return whether the model in `folder` runs only the code of dstune and of its base model, which must be on this machine.

    A run's `model.trust_remote_code` covers only the code of its base model. An adapter names its base itself.
    """
    from dstune.checkpoint.model_folder import base_name
    from dstune.models import pooled
    from dstune.models.load import model_folder

    adapter_base = object_in(folder / "adapter_config.json").get("base_model_name_or_path", base_name(base))
    if adapter_base != base_name(base):
        return False
    carried = [file.read_bytes() for file in folder.rglob("*.py")]
    places = {name.partition("--")[0] for file in folder.glob("*.json") for name in _maps(file) if "--" in name}
    if not carried and places <= {base.path}:
        return True
    trusted = {hashlib.sha256(Path(pooled.__file__).read_bytes()).hexdigest(), *EARLIER_HEADS}
    try:
        base_code = [file.read_bytes() for file in model_folder(base).rglob("*.py")]
    except (OSError, AssertionError, UserError):
        return False
    unknown = [code for code in carried if code not in base_code]
    return places <= {base.path} and {hashlib.sha256(code).hexdigest() for code in unknown} <= trusted


def _maps(file: Path) -> Iterator[str]:
    """Yield the custom classes that a `config.json` or `tokenizer_config.json` names: `module.Class` or
    `OWNER/NAME--module.Class`."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return
    yield from _texts_below(content, within=False)


def _texts_below(value: Any, within: bool) -> Iterator[str]:
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _texts_below(part, within or key in ("auto_map", "custom_pipelines"))
    elif isinstance(value, list):
        for part in value:
            yield from _texts_below(part, within)
    elif within and isinstance(value, str):
        yield value
