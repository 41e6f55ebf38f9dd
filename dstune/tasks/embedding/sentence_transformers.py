"""Writes and reads the files by which sentence-transformers loads an embedding model with its pooling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dstune.core.errors import Problem, UserError
from dstune.core.parsing import object_in, parse_json, read_file
from dstune.tasks.embedding.config import EmbeddingConfig, Pooling

MODES = {Pooling.mean: "mean_tokens", Pooling.cls: "cls_token", Pooling.last: "lasttoken"}


def write_modules(folder: Path, task: EmbeddingConfig, hidden_size: int, max_length: int) -> None:
    """Write `modules.json` and the files that it names: the model in `folder`, pooling, and normalization to length 1."""
    kinds = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (path, kind) in enumerate(kinds)
    ]
    pooling = {"word_embedding_dimension": hidden_size}
    pooling |= {f"pooling_mode_{name}": mode is task.pooling for mode, name in MODES.items()}
    (folder / "2_Normalize").mkdir(exist_ok=True)
    _write(folder / "modules.json", modules)
    _write(folder / "1_Pooling" / "config.json", pooling)
    _write(folder / "sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": False})
    _write(folder / "config_sentence_transformers.json", {"prompts": {}, "similarity_fn_name": "cosine"})


def embedding_overrides(folder: Path) -> list[str]:
    """Return the task, pooling and length that the files of an embedding model state, as overrides; empty without such files.

    Raises UserError for a pooling, or a further layer, that dstune does not have.
    """
    modules = _read(folder / "modules.json")
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        return []
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    unsupported_kinds = [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
    pooling = next(
        (folder / str(module.get("path")) for module, kind in zip(modules, kinds, strict=True) if kind == "Pooling"),
        None,
    )
    settings = object_in(pooling / "config.json") if pooling else {}
    # Newer releases name the mode, older ones have a switch for each.
    pooling_mode = settings.get("pooling_mode")
    pooling_names = [
        str(one) for one in (pooling_mode if isinstance(pooling_mode, list) else [pooling_mode] if pooling_mode else [])
    ]
    chosen = [name.removeprefix("pooling_mode_") for name, on in settings.items() if on is True and "_mode_" in name]
    by_name = {name: mode for mode, name in MODES.items()} | {mode.value: mode for mode in MODES}
    modes = [by_name.get(name) for name in pooling_names or chosen]
    if unsupported_kinds or len(modes) != 1 or modes[0] is None:
        unsupported = (
            f"a layer of the kind {unsupported_kinds[0]}"
            if unsupported_kinds
            else f"the pooling {', '.join(pooling_names or chosen) or 'unknown'}"
        )
        reason = f"its modules.json names {unsupported}, which dstune does not have"
        raise UserError(Problem("MODEL", reason, "embed with sentence-transformers itself", str(folder)))
    length = object_in(folder / "sentence_bert_config.json").get("max_seq_length")
    longest = [f"data.max_length={length}"] if type(length) is int else []
    return ["task=embedding", f"task.pooling={modes[0].value}", *longest]


def _read(path: Path) -> Any:
    try:
        return parse_json(read_file(path))
    except (OSError, ValueError):
        return None


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
