"""Models that rows of text cannot train, and packages that parts of models need: refused by `config.json` alone."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

from dstune.config.compose import compose
from dstune.config.requirements import OTHER_INPUTS, PACKAGES, requirement_problem
from dstune.core.errors import UserError
from dstune.launch.preflight import description_problems
from dstune.models.load import load_config
from dstune.planning.hardware import parse
from dstune.planning.stage import setup_on

GEMMA_3N = {"model_type": "gemma3n", "text_config": {"model_type": "gemma3n_text", "num_hidden_layers": 2}}


@pytest.mark.parametrize("kind", [*OTHER_INPUTS, "gemma3n"])
def test_training_planning_and_loading_refuse_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name in PACKAGES.values() else find(name, *rest)
    )
    values = GEMMA_3N if kind == "gemma3n" else {"model_type": kind, "is_encoder_decoder": True}
    (tmp_path / "config.json").write_text(json.dumps(values))
    run = compose([f"model.path={tmp_path}", "data.train=x.jsonl", "task=seq2seq"]).config
    problem = requirement_problem(values, str(tmp_path))
    assert problem is not None
    assert OTHER_INPUTS.get(kind, "timm") in problem.reason
    assert (".[vision]" in problem.fix) == (kind == "gemma3n")
    problems = description_problems(tmp_path, run.model, run)
    assert problem in problems and not any("encoder-decoder" in problem.reason for problem in problems)
    with pytest.raises(UserError) as refused:
        load_config(run.model)
    assert refused.value.problems == [problem]
    with pytest.raises(UserError) as refused:
        setup_on(run, parse("H100", {}, 1))
    assert refused.value.problems == [problem]


def test_a_package_is_required_wherever_its_part_is() -> None:
    tower = {"model_type": "fast_vlm", "vision_config": {"model_type": "timm_wrapper"}}
    assert requirement_problem({"model_type": "llama"}, "x") is None
    missing = importlib.util.find_spec("timm") is None
    assert (requirement_problem(tower, "x") is not None) == (requirement_problem(GEMMA_3N, "x") is not None) == missing


def test_the_table_has_what_transformers_asks_for() -> None:
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    required: dict[str, str] = {}
    for file in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        source = file.read_text()
        packages = set(re.findall(r'"(\w+)"', " ".join(re.findall(r"requires_backends\(self, (.*)\)", source))))
        for package in packages - {"vision", "scipy", "torch"}:
            required |= dict.fromkeys(re.findall(r"^class (\w+)\(", source, re.M), package)
    kinds = {kind: required[name] for kind, name in MODEL_MAPPING_NAMES.items() if name in required}
    assert kinds.pop("dinat") == "natten"  # reads images alone
    assert kinds.pop("layoutlmv2") == "detectron2" and "layoutlmv2" in OTHER_INPUTS
    assert kinds == {kind: package for kind, package in PACKAGES.items() if kind != "gemma3n"}
