"""Every YAML file in conf/ composes and validates, and holds what its comment promises."""

from __future__ import annotations

from pathlib import Path

import pytest

from dstune.config.compose import compose
from dstune.config.convert import to_dict
from dstune.config.hydra_session import config_folders
from dstune.config.schema import CHOICES, Precision
from dstune.config.validate import validate
from dstune.core.errors import UserError

PATHS = {f"{path.parent.name}/{path.stem}": path for folder in config_folders() for path in folder.glob("*/*.yaml")}
FILES = sorted(PATHS)

COMPANIONS = {
    "data/sentiment": ["task=classification"],
    "task/causal_lm": ["data=files", "data.train=rows.jsonl"],
    "task/classification": ["data=sentiment"],
    "task/preference": ["data=files", "data.train=rows.jsonl"],
    "task/reward": ["data=files", "data.train=rows.jsonl"],
    "task/reinforcement": ["data=files", "data.train=rows.jsonl", "task.rewards=[number]"],
    "task/distillation": ["data=files", "data.train=rows.jsonl", "task.teacher=teacher"],
    "task/embedding": ["data=files", "data.train=rows.jsonl"],
    "task/seq2seq": ["data=verses"],
    "data/verses": ["task=seq2seq"],
    "data/ner": ["task=token_classification"],
    "task/token_classification": ["data=ner"],
    "task/question_answering": ["data=files", "data.train=squad.json"],
    "method/head": ["task=classification", "data=sentiment"],
    "method/features": ["task=classification", "data=sentiment"],
    "method/freeze": ["data=chitchat", "method.embeddings=true"],
    "parallel/autotp": ["data=chitchat", "zero=stage2"],
    "parallel/tensor": ["data=chitchat", "zero=stage2"],
    "zero/file": ["data=chitchat", f"zero.path={Path(__file__).parents[1] / 'data' / 'deepspeed' / 'plain.json'}"],
}
"""What a choice makes sense with; the others go with the dialogues."""


def test_the_files_are_found():
    assert len(FILES) > 30


ALIASES = {"parallel/autotp": "tensor"}
"""Files under a second name of a choice."""


@pytest.mark.parametrize("name", FILES)
def test_file_composes_and_validates(name: str):
    group, choice = name.split("/")
    companions = COMPANIONS.get(name, [] if group == "experiment" else ["data=chitchat"])
    if name == "data/files":
        companions = ["data.train=rows.jsonl"]
    config = compose([f"{group}={choice}", *companions]).config
    validate(config)
    if group in CHOICES:
        choice = ALIASES.get(name, choice)
        assert getattr(config, group).name == choice
        assert type(getattr(config, group)) is CHOICES[group][choice]


def test_what_an_experiment_says_itself_is_not_requested_by_name(tmp_path: Path):
    """Its word would win over that of the other file, without a word."""
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\nmodel:\n  path: org/own\ndata:\n  train: own.jsonl\n"
    (tmp_path / "experiment" / "own.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        compose(["experiment=own", "model=minilm", "data=chitchat"], [tmp_path])
    assert [(problem.where, problem.fix) for problem in caught.value.problems] == [
        ("model", "model.path=sample://minilm"),
        ("data", "data.train=sample://chitchat"),
    ]
    assert compose(["experiment=own", "model=minilm", "model.path=mine"], [tmp_path]).config.model.path == "mine"
    assert compose(["experiment=sentiment", "model=bert_base"]).config.model.path == "google-bert/bert-base-uncased"


def test_the_file_of_a_name_may_be_on_a_searchpath(tmp_path: Path):
    for name, text in {
        "experiment/own": "# @package _global_\nmodel:\n  path: org/own\n",
        "model/ours": "path: org/ours\n",
    }.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / f"{name}.yaml").write_text(text)
    found = [f"hydra.searchpath=[file://{tmp_path}]", "experiment=own", "model=ours", "data=chitchat"]
    with pytest.raises(UserError) as caught:
        compose(found)
    assert [(problem.where, problem.fix) for problem in caught.value.problems] == [("model", "model.path=org/ours")]


@pytest.mark.parametrize("name", FILES)
def test_file_begins_with_a_comment(name: str):
    lines = PATHS[name].read_text().splitlines()
    assert [line for line in lines if line.startswith("# ") and "@package" not in line]


@pytest.mark.parametrize("group", sorted(CHOICES))
def test_every_choice_of_the_schema_has_a_file(group: str):
    aliases = {name.split("/")[1] for name in ALIASES if name.startswith(f"{group}/")}
    assert {path.stem for name, path in PATHS.items() if name.startswith(f"{group}/")} == set(CHOICES[group]) | aliases


def test_group_without_choices_only_holds_what_differs_from_the_schema():
    """A value in a `default` file that is not the schema's would contradict the documentation of the key."""
    for name in ("trainer", "checkpoint", "evaluate", "tracking"):
        plain = to_dict(compose(["data=chitchat"]).config)[name]
        from dstune.config.names import default_classes

        assert plain == to_dict(default_classes()[name]())


def test_quickstart_is_what_runs_when_nothing_is_requested():
    config = compose([]).config
    assert (config.run.name, config.data.train, config.zero.stage) == ("quickstart", "sample://chitchat", 3)
    assert config.evaluate.samples >= 1


def test_sentiment_is_the_issue_s_measurement():
    config = compose(["experiment=sentiment"]).config
    assert (config.data.max_rows, config.evaluate.max_rows, config.trainer.epochs) == (4000, 2000, 1)
    assert (config.launch.processes, config.model.path, config.data.packing) == (2, "sample://minilm", False)


def test_the_8b_experiment_is_zero3_in_bf16():
    config = compose(["experiment=llama3_8b_4nodes"]).config
    assert (config.zero.stage, config.trainer.precision) == (3, Precision.bf16)
    assert config.trainer.activation_checkpointing
