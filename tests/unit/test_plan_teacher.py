"""What a plan counts of a model that is held beside the one that trains."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dstune.config.compose import compose
from dstune.launch.plan import main
from dstune.launch.room import least
from dstune.planning.hardware import GIB, parse
from dstune.planning.memory import memory
from dstune.planning.setup import Setup
from dstune.planning.stage import setup_on

VOCABULARY, HIDDEN, INNER, LAYERS = 1000, 256, 512, 3
ATTENTION = 4 * HIDDEN * HIDDEN
NORMS = (2 * LAYERS + 1) * HIDDEN
TEACHER = 2 * VOCABULARY * HIDDEN + LAYERS * (ATTENTION + 3 * HIDDEN * INNER) + NORMS
"""Weights of the teacher, by hand."""


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    folder = tmp_path / "teacher"
    folder.mkdir()
    values = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def words(teacher: Path | str, *more: str) -> list[str]:
    return ["model=qwen3_0.6b", "task=distillation", f"task.teacher={teacher}", "data=chitchat", *more]


def setup_with(teacher: Path, *more: str) -> Setup:
    config = compose(words(teacher, *more)).config
    return setup_on(config, parse("4xA100-40G", {}, 1))[0]


def test_a_teacher_is_whole_below_stage_3_and_partitioned_there(teacher: Path) -> None:
    for stage, size in ((0, 4), (1, 2), (2, 2)):  # stage 0 trains in fp32
        s = setup_with(teacher, f"zero.stage={stage}", *(["trainer.precision=fp32"] if stage == 0 else []))
        for moment in memory(s).moments.values():
            assert moment["teacher"] == size * TEACHER
    s = setup_with(teacher, "zero.stage=3", "zero.param_persistence_threshold=300")
    copy = VOCABULARY * HIDDEN  # of its projection
    share = (TEACHER - NORMS) // 4
    assert memory(s).parts["teacher"] == 2 * (share + NORMS + copy)
    in_host = setup_with(teacher, "zero.stage=3", "zero.param_persistence_threshold=300", "zero.offload_param=cpu")
    assert memory(in_host).parts["teacher"] == 2 * (NORMS + copy)
    without = memory(
        setup_with(
            teacher, "zero.stage=3", "zero.offload_param=cpu", "task.teacher=null", "task.text_weight=1", "method=lora"
        )
    )
    assert "teacher" not in without.parts


def test_a_run_that_cannot_fit_beside_its_teacher_is_refused(teacher: Path) -> None:
    config = compose(words(teacher, "zero.stage=2")).config
    s = setup_on(config, parse("4xA100-40G", {}, 1))[0]
    with_teacher = least(s, memory(s), full=False, config=config)
    alone = replace(s, held=())
    assert with_teacher - least(alone, memory(alone), full=False, config=config) == 2 * TEACHER


def test_the_plan_shows_the_teacher_or_says_that_it_is_not_counted(
    teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words(teacher, "zero.stage=2"), "hardware=4xA100-40G", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["configured"]["parts_gib"]["teacher"] == pytest.approx(2 * TEACHER / GIB, abs=1e-4)
    assert not any("teacher" in warning for warning in found["warnings"])
    assert main([*words("nobody/has-it", "zero.stage=2"), "hardware=4xA100-40G"]) == 0
    text = capsys.readouterr().out
    assert "warning: task.teacher is not counted: its config.json is neither in a folder" in text
