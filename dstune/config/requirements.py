"""What a model takes beyond rows of text and the packages that dstune installs, by the `model_type`s in its `config.json`.

Both are known without loading the model, and so before its weights are downloaded.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

from dstune.core.errors import Problem

OTHER_INPUTS = {
    "gemma4_assistant": "it drafts tokens for Gemma 4 from that model's hidden states, and reads no text itself",
    "gemma4_unified_assistant": "it drafts tokens for Gemma 4 from that model's hidden states, and reads no text itself",
    "layoutlmv2": "it reads the picture of a page with every text, which rows of text do not have",
    "musicgen": "it writes music, as codes of sound that rows of text do not have",
    "musicgen_melody": "it writes music, as codes of sound that rows of text do not have",
}
"""Why no task can train a model, by its `model_type`."""

PACKAGES = {"gemma3n": "timm", "gemma3n_vision": "timm", "timm_backbone": "timm", "timm_wrapper": "timm"}
"""Packages that transformers needs to build a model or a part of one, by its `model_type`."""


def requirement_problem(values: Mapping[str, Any], path: str) -> Problem | None:
    """Return the problem if rows of text cannot train a model, or if a package is missing that its parts need; else None.

    values: the model's `config.json`. path: the model, as the user gave it.
    """
    kinds = list(dict.fromkeys(_kinds(values)))
    if kinds and (reason := OTHER_INPUTS.get(kinds[0])):
        return Problem("model.path", f"no task trains a model of type {kinds[0]}: {reason}", "see dstune models", path)
    for kind in kinds:
        package = PACKAGES.get(kind)
        if package and importlib.util.find_spec(package) is None:
            reason = f"{kind} needs the package {package}, which is not installed"
            return Problem("model.path", reason, "pip install '.[vision]' in a clone of dstune", path)
    return None


def _kinds(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield the `model_type` of a configuration, then those of the parts in it."""
    if "model_type" in values:
        yield str(values["model_type"])
    for part in values.values():
        if isinstance(part, Mapping):
            yield from _kinds(part)
