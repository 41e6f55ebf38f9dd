"""Files by which sentence-transformers loads an embedding model with its pooling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dstune.config.task_schema import EmbeddingConfig, Pooling

MODES = {Pooling.mean: "mean_tokens", Pooling.cls: "cls_token", Pooling.last: "lasttoken"}


def write_modules(folder: Path, task: EmbeddingConfig, hidden_size: int, max_length: int) -> None:
    """Write `modules.json` and what it names: the model in `folder`, pooling, and vectors of length 1."""
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


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
