"""Configurations of other tools, converted and composed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from dstune.config.compose import compose
from dstune.config.schema import RunConfig
from dstune.config.validate import validate
from dstune.importing.convert import Experiment, convert
from dstune.importing.files import read, tool_of

EXAMPLES = Path(__file__).parents[1] / "data" / "imports"


def imported(name: str, monkeypatch: pytest.MonkeyPatch, ranks: int | None = 8) -> Experiment:
    path = EXAMPLES / name
    monkeypatch.chdir(path.parent)  # zero.path and dataset_info.json are relative to where dstune is started
    raw = read(path)
    return convert(raw, tool_of(raw, None, name), path, ranks)


def configuration(text: str, tmp_path: Path) -> RunConfig:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    config = compose(["experiment=mine"], [tmp_path]).config
    validate(config)
    return config


def values(tool: str, **keys: Any) -> tuple[dict[str, Any], Experiment]:
    base = {
        "axolotl": {"base_model": "m", "datasets": [{"path": "rows.jsonl", "type": "alpaca"}]},
        "llama-factory": {"model_name_or_path": "m", "stage": "sft", "dataset": "none"},
        "ms-swift": {"model": "m", "dataset": "rows.jsonl"},
        "trl": {"model_name_or_path": "m", "dataset_name": "rows.jsonl"},
    }[tool]
    experiment = convert({**base, **keys}, tool, Path("x.yaml"), 1)
    return yaml.safe_load(experiment.text), experiment
