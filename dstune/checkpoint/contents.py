"""Checks that the folder of a model is complete: it needs every tensor of its base model, and the files of its processor.

A folder with the language model alone answers text like the trained model, but vLLM does not start on it (it needs a
processor), or the model sees no images. Checking needs only the files: this module does not import torch.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dstune.config.stored_formats import quantization_of
from dstune.core.errors import Problem, UserError
from dstune.core.parsing import object_in, parse_json

PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
)
"""Files that `AutoProcessor` reads beside the tokenizer, which say how images and sound become inputs of the model. Servers need
them even for text."""
MOST_HEADER_BYTES = 100 << 20
KEY = "contents"
"""Key in `dstune.json`."""


def describe_contents(folder: Path) -> dict[str, Any]:
    """Describe the contents of a freshly written export, for `missing_contents`."""
    names = _tensor_names(folder)
    return {"tensors": len(names), "names": _digest(names), "processor": _processor_files(folder)}


def missing_contents(folder: Path, record: Mapping[str, Any], base: Path | None) -> str:
    """Return what the folder of a complete model lacks; empty if nothing is known to be missing.

    record: its `dstune.json`. base: folder of the model that it was trained from, if that is on this machine.
    """
    if not (folder / "config.json").is_file():  # GGUF, which has another layout
        return ""
    names = _tensor_names(folder)
    recorded = record.get(KEY)
    if isinstance(recorded, dict):
        if recorded.get("names") != _digest(names):
            return f"it has {len(names)} tensors, and not those that were exported ({recorded.get('tensors')})"
        expected = recorded.get("processor")
        absent = set(expected if isinstance(expected, list) else []) - set(_processor_files(folder))
        return f"it lacks {', '.join(sorted(map(str, absent)))} of its export" if absent else ""
    config = object_in(folder / "config.json")
    if is_composite(config):
        if not _processor_files(folder):
            return f"it sees images or sound, and has neither {PROCESSOR_FILES[0]} nor {PROCESSOR_FILES[1]}"
        if names and all("language_model." in name or name.startswith("lm_head.") for name in names):
            return "it has the tensors of its language model alone"
    return "" if base is None else _missing_of_base(config, names, base)


def _missing_of_base(config: Mapping[str, Any], names: set[str], base: Path) -> str:
    base_config = object_in(base / "config.json")
    if is_composite(base_config) and not is_composite(config):
        text = base_config["text_config"]
        if config.get("model_type") in (text.get("model_type"), base_config.get("model_type")):
            return "it has the language model of its base alone"
    if base_config.get("architectures") != config.get("architectures"):
        return ""  # another head
    if quantization_of(base_config) != quantization_of(config):
        return ""  # scales, and weights under other names
    absent = [name for name in sorted(_tensor_names(base)) if not _is_among(name, names)]
    absent = [name for name in absent if name != "lm_head.weight"]  # tied in the export
    return f"it lacks {len(absent)} tensors of its base, first {absent[0]}" if absent else ""


def _is_among(name: str, names: set[str]) -> bool:
    """Return whether `names` has the tensor `name`, with or without the name of the outermost module."""
    starts = {name_in_file.partition(".")[0] for name_in_file in names}
    other = {*layouts_of(name), name.partition(".")[2], *(f"{start}.{name}" for start in starts)}
    return bool(other & names)


def layouts_of(name: str) -> tuple[str, ...]:
    """Return the names in published files of a tensor or module of a language model that is part of a larger model: `model` may be
    outside of `language_model`, as in transformers, or inside."""
    for first, second in (("model.language_model.", "language_model.model."), ("lm_head", "language_model.lm_head")):
        for prefix, other_prefix in ((first, second), (second, first)):
            if name.startswith(prefix):
                return name, other_prefix + name.removeprefix(prefix)
    return name, name.removeprefix("model."), f"model.{name}"


def is_composite(config: Mapping[str, Any]) -> bool:
    """Return whether a `config.json` describes a language model with further parts, such as a vision tower."""
    parts = {name for name, part in config.items() if name.endswith("_config") and isinstance(part, dict)}
    return "text_config" in parts and bool(parts & {"vision_config", "audio_config", "image_config", "speech_config"})


def _processor_files(folder: Path) -> list[str]:
    return [name for name in PROCESSOR_FILES if (folder / name).is_file()]


def _tensor_names(folder: Path) -> set[str]:
    return {name for file in sorted(folder.glob("*.safetensors")) for name in tensor_shapes(file)}


def _digest(names: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()


def tensor_shapes(file: Path) -> dict[str, list[int]]:
    """Read the tensors' shapes from the header of a safetensors file. Raises UserError if it is no such file."""
    try:
        with file.open("rb") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            if size > MOST_HEADER_BYTES:
                raise ValueError
            header = parse_json(stream.read(size))
        return {name: list(map(int, value["shape"])) for name, value in header.items() if name != "__metadata__"}
    except (OSError, struct.error, ValueError, TypeError, AttributeError, LookupError, ArithmeticError):
        raise UserError(Problem(str(file), "is no safetensors file", "dstune export RUN")) from None
