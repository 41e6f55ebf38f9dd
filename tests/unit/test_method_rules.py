"""What a method refuses, and what a saved adapter says of its own form."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dstune.checkpoint.export import refuse_unmergeable
from dstune.config import data_schema, schema
from dstune.config.validate import find_problems
from dstune.core.errors import UserError
from dstune.launch.first_rows import hardware_problems
from dstune.methods._peft.config import AdapterConfig
from dstune.methods.ia3 import Ia3Config
from dstune.methods.lora.config import LoraConfig, LoraInit
from dstune.methods.oft import OftConfig
from dstune.methods.p_tuning import PTuningConfig
from dstune.methods.prefix import PrefixConfig
from dstune.methods.prompt import PromptConfig
from dstune.methods.qlora.config import QloraConfig
from dstune.methods.vera import VeraConfig
from dstune.protocols import METHODS, method_of
from dstune.tasks.classification.config import ClassificationConfig
from dstune.tasks.question_answering.config import QuestionAnsweringConfig
from dstune.tasks.reward.config import RewardConfig
from dstune.tasks.token_classification.config import TokenClassificationConfig
from tests.support.configs import run_config

PISSA, LOFTQ = LoraInit.pissa, LoraInit.loftq
Lora, Qlora = LoraConfig, QloraConfig
RANDOM = {"model": schema.ModelConfig(weights=schema.InitialWeights.random)}
UNPACKED = {"data": data_schema.DataConfig(train="rows.jsonl", packing=False)}


@pytest.mark.parametrize(
    ("key", "method", "sections"),
    [
        ("data.packing", PromptConfig(), {}),
        ("data.packing", PrefixConfig(), {}),
        ("data.packing", PTuningConfig(), {}),
        ("method", PrefixConfig(), {"task": ClassificationConfig()} | UNPACKED),
        ("method", PrefixConfig(), {"task": RewardConfig()} | UNPACKED),
        ("method", PrefixConfig(), {"task": TokenClassificationConfig()} | UNPACKED),
        ("method", PrefixConfig(), {"task": QuestionAnsweringConfig()} | UNPACKED),
        ("model.weights", PromptConfig(), RANDOM | UNPACKED),
        ("model.weights", Qlora(), RANDOM),
        (
            "trainer.activation_checkpointing",
            PrefixConfig(),
            {"trainer": schema.TrainerConfig(activation_checkpointing=True)} | UNPACKED,
        ),
        ("method.adapter", PTuningConfig(adapter="runs/one"), UNPACKED),
        ("method.adapter", PrefixConfig(adapter="runs/one", projection_size=8), UNPACKED),
        ("method.init", Lora(init=PISSA, adapter="runs/one"), {}),
        ("method.init", Lora(init=LOFTQ), {}),
        ("method.init", Qlora(init=PISSA), {}),
        ("method.init_iterations", Lora(init_iterations=4), {}),
        ("method.dora", Lora(dora=True, frozen_adapters=["runs/one"]), {}),
        ("method.frozen_adapters", Qlora(frozen_adapters=["runs/one"]), {}),
        ("method.lr_ratio", Lora(init=PISSA, lr_ratio=16.0), {}),
        ("method.rank_pattern", Lora(rank_pattern={"q_proj": 0}), {}),
        ("method.rank_pattern", Lora(rank_pattern={"q_proj(": 2}), {}),
        ("method.feedforward_modules", Ia3Config(feedforward_modules=["down_proj"]), {}),
        ("method.target_modules", VeraConfig(target_modules=[]), {}),
    ],
)
def test_refused_with_the_reason(key, method, sections):
    problems = find_problems(run_config(method=method, **sections))
    assert [problem.where for problem in problems] == [key], problems
    assert problems[0].reason


def test_4_bit_weights_at_stage_3_need_a_gpu():
    config = run_config(method=Qlora(), zero=schema.ZeroConfig(stage=3))
    assert [problem.where for problem in hardware_problems(config, 0)] == ["zero.stage"]
    assert not list(hardware_problems(replace(config, zero=schema.ZeroConfig(stage=2)), 0))


def saved(folder: Path, **changes: object) -> Path:
    settings = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "target_modules": ["v_proj", "q_proj"],
        "modules_to_save": ["classifier", "score"],
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {},
        "use_rslora": True,
        "use_dora": False,
        "bias": "none",
        **changes,
    }
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def test_an_adapter_brings_its_own_form(tmp_path):
    saved(tmp_path / "run" / "export")
    found = method_of(Lora(adapter=str(tmp_path / "run"), lr_ratio=4.0)).resolve()
    assert found == Lora(
        adapter=str(tmp_path / "run" / "export"),
        rank=4,
        alpha=8.0,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"q_proj": 2},
        rslora=True,
        lr_ratio=4.0,
    )
    assert method_of(found).resolve() == found, "a run that is continued resolves again"


@pytest.mark.parametrize(
    ("key", "method", "changes"),
    [
        ("method.rank", Lora(rank=8), {}),
        ("method.dora", Lora(dora=True), {}),
        ("method.adapter", Lora(), {"bias": "all"}),
        ("method.adapter", Lora(), {"layers_to_transform": [1]}),
        ("method.adapter", Lora(), {"peft_type": "IA3"}),
        ("method.adapter", OftConfig(), {}),
    ],
)
def test_an_adapter_that_says_otherwise_is_refused(tmp_path, key, method, changes):
    folder = saved(tmp_path / "adapter", **changes)
    if key == "method.dora":
        method = replace(method, dora=True)
    with pytest.raises(UserError) as caught:
        method_of(replace(method, adapter=str(folder))).resolve()
    assert [problem.where for problem in caught.value.problems] == [key]


def test_no_adapter_there(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.yaml").write_text("")
    for method in (Lora(adapter=str(tmp_path / "run")), Lora(frozen_adapters=[str(tmp_path / "run")])):
        with pytest.raises(UserError, match="dstune export"):
            method_of(method).resolve()


@pytest.mark.parametrize("flag", ["--merge", "--gguf"])
def test_only_what_becomes_weights_is_merged(flag):
    for choice, cls in METHODS.configs().items():
        method = cls()
        problems = []
        try:
            refuse_unmergeable(flag, method)
        except UserError as error:
            problems = error.problems
        stands_in_front = choice in ("prompt", "prefix", "p_tuning")
        nothing_to_merge = flag == "--merge" and not isinstance(method, AdapterConfig)
        assert bool(problems) is (stands_in_front or nothing_to_merge), (choice, problems)
        if stands_in_front:
            assert "stands in front of each row" in problems[0].reason
