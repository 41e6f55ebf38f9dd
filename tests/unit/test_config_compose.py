"""Composition, conversion, run.yaml and references to the environment."""

from __future__ import annotations

import dataclasses
import datetime
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from dstune.config.compose import compose
from dstune.config.convert import EnvironmentText, from_dict, load, to_dict, to_yaml
from dstune.config.resume import continue_run
from dstune.config.run_file import Composed, read_run, write_run
from dstune.config.run_overrides import apply_overrides
from dstune.config.schema import Offload, RunConfig
from dstune.core.errors import UserError
from dstune.methods.lora.config import LoraConfig
from dstune.optim.adamw import AdamWConfig
from dstune.optim.sgd import SgdConfig
from dstune.tasks.classification.config import ClassificationConfig


@pytest.fixture
def config() -> RunConfig:
    return compose(["data=chitchat", "method=lora"]).config


@pytest.mark.parametrize(
    ("overrides", "quickstart"),
    [
        ([], True),
        (["trainer.max_steps=3", "method=lora"], True),
        (["model.attention=sdpa"], True),
        (["experiment=sentiment"], False),
        (["experiment=null", "data.train=x.jsonl"], False),
        (["model=minilm"], False),
        (["model.path=some/model"], False),
        (["data=chitchat"], False),
        (["data.max_length=64"], True),
        (["data.max_rows=64", "data.validation=v.jsonl"], True),
        (["data.mixture={a: {path: x.jsonl}}"], False),
        (["data.mixture.a.path=x.jsonl"], False),
        (["++data.train=x.jsonl"], False),
    ],
)
def test_quickstart_unless_an_experiment_a_model_or_data_is_named(overrides: list[str], quickstart: bool):
    composed = compose(overrides)
    assert (composed.config.run.name == "quickstart") is quickstart
    assert composed.overrides == (["experiment=quickstart", *overrides] if quickstart else overrides)


def test_values_arrive_with_their_types():
    config = compose(
        [
            "data.train=x.csv",
            "task=classification",
            "task.labels=[good,bad]",
            "data.columns.text=review",
            "data.columns={label: stars}",
            "model.config_overrides.attention_dropout=0.1",
            "optimizer.betas=[0.8,0.95]",
            "optimizer.lr=1e-3",
            "zero=stage3_offload",
            "trainer.max_steps=null",
            "run.name=7",
        ]
    ).config
    assert config.task == ClassificationConfig(labels=["good", "bad"])
    assert config.data.columns == {"text": "review", "label": "stars"}
    assert config.model.config_overrides == {"attention_dropout": 0.1}
    assert config.optimizer == AdamWConfig(lr=1e-3, betas=(0.8, 0.95))
    assert isinstance(config.optimizer.betas, tuple)
    assert config.zero.offload_param is Offload.cpu
    assert config.trainer.max_steps is None
    assert config.run.name == "7"


def test_command_line_wins_over_experiment_wins_over_group():
    plain = compose(["experiment=sentiment"]).config
    assert (plain.data.max_length, plain.data.train) == (128, "sample://sentiment")
    changed = compose(["experiment=sentiment", "data.max_length=64", "optimizer=sgd", "schedule=linear"]).config
    assert changed.data.max_length == 64
    assert isinstance(changed.optimizer, SgdConfig)
    assert changed.optimizer.lr == 1e-4  # the experiment's value also for another optimizer


def test_nothing_of_hydra_leaves(config: RunConfig):
    def walk(value: object) -> None:
        assert not type(value).__module__.startswith("omegaconf"), value
        if dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                walk(getattr(value, field.name))
        elif isinstance(value, (list, tuple)):
            for item in value:
                walk(item)
        elif isinstance(value, dict):
            for item in value.values():
                walk(item)

    walk(config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.run.name = "x"  # type: ignore[misc]


def test_template_date_is_frozen_to_the_day_of_composition():
    before = datetime.date.today()
    frozen = datetime.date.fromisoformat(compose(["data=chitchat"]).config.task.template_date)
    assert before <= frozen <= datetime.date.today()  # midnight may pass
    assert compose(["data=chitchat", "task.template_date=2020-02-29"]).config.task.template_date == "2020-02-29"
    assert not hasattr(compose(["experiment=sentiment"]).config.task, "template_date")


def test_config_dir_adds_choices(tmp_path: Path):
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "mine.yaml").write_text("defaults: [lora, _self_]\nrank: 99\n")
    config = compose(["data=chitchat", "method=mine", "method.alpha=1"], [tmp_path]).config
    assert config.method == LoraConfig(rank=99, alpha=1.0)
    with pytest.raises(UserError, match="there is no such method"):
        compose(["data=chitchat", "method=mine"])


def test_composing_imports_nothing_heavy():
    code = (
        "import sys; from dstune.config.compose import compose; from dstune.config.validate import validate;"
        "from dstune.config import flags, completion, documentation; validate(compose([]).config);"
        "print([m for m in ('torch', 'transformers', 'deepspeed', 'datasets', 'numpy') if m in sys.modules])"
    )
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


# ---- YAML ----


@pytest.mark.parametrize("experiment", ["quickstart", "sentiment", "chat_lora", "llama3_8b_4nodes"])
def test_yaml_round_trip(experiment: str):
    config = compose([f"experiment={experiment}"]).config
    assert from_dict(load(to_yaml(config), "run.yaml"), "run.yaml") == config
    assert from_dict(to_dict(config), "run.yaml") == config


@pytest.mark.parametrize(
    "text", ["1e-5", "null", "true", "2020-01-01", "12:30", "${x", r"\${a}", "a\nb", "ä: #", " x "]
)
def test_any_text_survives_the_round_trip(config: RunConfig, text: str):
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=text))
    assert from_dict(load(to_yaml(config), "run.yaml"), "run.yaml").run.dir == text


def test_to_dict_holds_plain_values_only(config: RunConfig):
    tree = to_dict(config)
    assert tree["zero"]["offload_param"] == "none"
    assert tree["optimizer"]["betas"] == [0.9, 0.999]
    assert tree["method"]["name"] == "lora"


def test_a_run_file_reports_everything_at_once(config: RunConfig):
    text = to_yaml(config).replace("epochs: 1", "epochs: many").replace("rank: 16", "rnk: 16")
    text = text.replace("name: cosine", "name: cosin").replace("export: last", "export: lst") + "foo: 1\n"
    with pytest.raises(UserError) as caught:
        from_dict(load(text, "run.yaml"), "run.yaml")
    found = {problem.where: problem for problem in caught.value.problems}
    assert set(found) == {"foo", "method.rnk", "schedule.name", "trainer.epochs", "run.export"}
    assert "method.rank" in found["method.rnk"].fix
    assert "cosine" in found["schedule.name"].fix
    assert found["run.export"].fix == "run.export=last"
    assert found["trainer.epochs"].value == "many"


@pytest.mark.parametrize(
    ("text", "where", "reason"),
    [("a: [", "run.yaml:1", "no YAML"), ("- a", "run.yaml", "not a configuration"), ("run: 3", "run", "section")],
)
def test_a_run_file_of_something_else(text: str, where: str, reason: str):
    with pytest.raises(UserError) as caught:
        from_dict(load(text, "run.yaml"), "run.yaml")
    assert any(problem.where == where and reason in problem.reason for problem in caught.value.problems)


# ---- the environment ----


def test_environment_values_are_used_and_never_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SECRET_NAME", "hunter2")
    composed = compose(
        [
            "data=chitchat",
            "run.name=${oc.env:SECRET_NAME}",
            "tracking.project=p-${run.name}",  # refers to the environment through another key
            "tracking.tags=[a,'${oc.env:SECRET_NAME}']",
            "tracking.group=g-${model.path}",
            "trainer.seed=${oc.env:SEED,5}",
        ]
    )
    config = composed.config
    assert (config.run.name, config.tracking.project) == ("hunter2", "p-hunter2")
    assert config.tracking.tags == ["a", "hunter2"]
    assert (config.tracking.group, config.trainer.seed) == ("g-sample://smollm2", 5)
    write_run(tmp_path / "run.yaml", composed)
    written = (tmp_path / "run.yaml").read_text()
    assert "hunter2" not in written + to_yaml(config) + str(to_dict(config))
    assert "p-${oc.env:SECRET_NAME}" in written
    assert read_run(tmp_path / "run.yaml") == composed

    monkeypatch.setenv("SECRET_NAME", "other")  # the reader's environment counts
    assert read_run(tmp_path / "run.yaml").config.tracking.project == "p-other"
    monkeypatch.delenv("SECRET_NAME")
    with pytest.raises(UserError) as caught:
        read_run(tmp_path / "run.yaml")
    assert len(caught.value.problems) == 3
    assert "SECRET_NAME is not set" in str(caught.value)


def test_environment_text_survives_pickling_and_replacement(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SECRET_NAME", "hunter2")
    config = compose(["data=chitchat", "run.name=${oc.env:SECRET_NAME}"]).config
    copied = pickle.loads(pickle.dumps(dataclasses.replace(config, launch=config.launch)))
    assert isinstance(copied.run.name, EnvironmentText)
    assert to_dict(copied)["run"]["name"] == "${oc.env:SECRET_NAME}"


def test_unset_variables_are_all_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("NOT_SET", raising=False)
    with pytest.raises(UserError) as caught:
        compose(["data=chitchat", "run.name=${oc.env:NOT_SET}", "run.dir=${oc.env:NOT_SET}"])
    assert [problem.where for problem in caught.value.problems] == ["run.name", "run.dir"]
    assert "export NOT_SET" in caught.value.problems[0].fix


# ---- run.yaml and its continuation ----


def test_run_yaml_holds_version_overrides_and_configuration(tmp_path: Path):
    import yaml

    from dstune import __version__

    composed = compose(["trainer.max_steps=3"])
    path = tmp_path / "run.yaml"
    write_run(path, composed)
    content = yaml.safe_load(path.read_text())
    assert list(content) == ["format", "dstune_version", "overrides", "config", "signature"]
    assert content["dstune_version"] == __version__
    assert content["overrides"] == ["experiment=quickstart", "trainer.max_steps=3"]
    assert read_run(path) == composed
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.yaml"]


@pytest.mark.parametrize("content", [None, b"foo: 1\n", b"[1", b"\xff\xfe\x00"])
def test_unreadable_run_yaml_is_a_user_error(tmp_path: Path, content: bytes | None):
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_run(path)
    assert str(path) in caught.value.problems[0].where


def test_apply_overrides_changes_values_only(config: RunConfig):
    changed = apply_overrides(
        config, ["method.rank=2", "data.columns.text=t", "run.dir=null", "trainer={seed: 3}", "data.packing=off"]
    )
    assert (changed.method.rank, changed.data.columns, changed.run.dir) == (2, {"text": "t"}, None)
    assert (changed.trainer.seed, changed.trainer.epochs, changed.data.packing) == (3, 1, False)
    assert config.method.rank == 16


@pytest.mark.parametrize(
    ("override", "where", "fix"),
    [
        ("method=full", "method", "single values"),
        ("experiment=quickstart", "experiment", "single values"),
        ("trainer.max_step=3", "trainer.max_step", "trainer.max_steps"),
        ("task.labels=[a]", "task.labels", "task=classification"),
        ("trainer.seed=x", "trainer.seed", ""),
        ("run.name=${model.path}", "run.name", "oc.env"),
        ("nonsense", "nonsense", ""),
    ],
)
def test_apply_overrides_refuses(config: RunConfig, override: str, where: str, fix: str):
    with pytest.raises(UserError) as caught:
        apply_overrides(config, [override, "optimizer.momentum=1"])
    assert [problem.where for problem in caught.value.problems if problem.where != "optimizer.momentum"] == [where]
    assert len(caught.value.problems) == 2
    assert fix in next(problem.fix for problem in caught.value.problems if problem.where == where)


def test_continue_run_takes_over_what_the_first_start_froze():
    old = compose(["data=chitchat", "model=llama3_8b"])
    frozen = dataclasses.replace(
        old.config,
        task=dataclasses.replace(old.config.task, template_date="2020-01-01"),
        model=dataclasses.replace(old.config.model, revision="0" * 40),
    )
    old = Composed(frozen, old.overrides)
    config = continue_run(old, compose(["data=chitchat", "model=llama3_8b", "trainer.epochs=2"]))
    assert (config.task.template_date, config.model.revision, config.trainer.epochs) == ("2020-01-01", "0" * 40, 2)
    with pytest.raises(UserError) as caught:
        continue_run(
            old, compose(["data=chitchat", "model=llama3_8b", "model.revision=v2", "task.template_date=2021-01-01"])
        )
    assert {problem.where for problem in caught.value.problems} == {"model.revision", "task.template_date"}


def stored(*overrides: str, config_dirs: tuple[Path, ...] = (), **changes: object) -> Composed:
    """A run as its first start wrote it; `section__key` in `changes` as if that had been the default then."""
    composed = compose(["data=chitchat", *overrides], config_dirs)
    config = composed.config
    for key, value in changes.items():
        section, name = key.split("__")
        config = dataclasses.replace(
            config, **{section: dataclasses.replace(getattr(config, section), **{name: value})}
        )
    return Composed(config, composed.overrides)


def test_a_default_that_changed_since_changes_no_run():
    old = stored("method=lora", method__rank=7, optimizer__eps=0.5, evaluate__every=3, trainer__seed=11)
    config = continue_run(old, compose(["data=chitchat", "method=lora"]))
    assert config == old.config


def test_what_a_command_no_longer_says_comes_from_the_run():
    old = stored(
        "method=lora", "method.rank=7", "optimizer.lr=0.5", "zero=stage2", "evaluate.every=3", "run.force=true"
    )
    config = continue_run(old, compose(["data=chitchat"]))
    assert config == dataclasses.replace(old.config, run=dataclasses.replace(old.config.run, force=False))


def test_what_a_command_newly_says_counts():
    old = stored("zero=stage3_offload", "evaluate.every=3", "method=lora", "method.rank=7")
    now = ["data=chitchat", "method=lora", "method.rank=7"]
    assert continue_run(old, compose([*now, "evaluate.every=5"])).evaluate.every == 5
    assert (
        continue_run(old, compose([*now, "zero=stage2"])).zero == compose(["data=chitchat", "zero=stage2"]).config.zero
    )
    for change, where in (
        ("method.rank=8", "method.rank"),
        ("method=vera", "method"),
        ("optimizer.lr=9", "optimizer.lr"),
    ):
        given = [text for text in now if not change.startswith("method=") or not text.startswith("method")]
        again = compose([*given, change])
        with pytest.raises(UserError) as caught:
            continue_run(old, again)
        assert [problem.where for problem in caught.value.problems] == [where]


def test_what_the_user_s_own_file_says_counts(tmp_path: Path):
    file = tmp_path / "experiment" / "mine.yaml"
    file.parent.mkdir()
    file.write_text(
        "# @package _global_\ndefaults:\n- override /method: lora\ntrainer: {seed: 3}\nevaluate: {every: 4}\n"
    )
    old = stored("experiment=mine", config_dirs=(tmp_path,), optimizer__eps=0.5, method__rank=7)
    again = compose(["data=chitchat", "experiment=mine"], (tmp_path,))
    assert continue_run(old, again) == old.config
    file.write_text(file.read_text().replace("every: 4", "every: 6"))
    again = compose(["data=chitchat", "experiment=mine"], (tmp_path,))
    assert continue_run(old, again).evaluate.every == 6
    file.write_text(file.read_text().replace("seed: 3", "seed: 4"))
    with pytest.raises(UserError) as caught:
        continue_run(old, compose(["data=chitchat", "experiment=mine"], (tmp_path,)))
    assert [problem.where for problem in caught.value.problems] == ["trainer.seed"]


@pytest.mark.parametrize(
    ("choice", "fix"),
    [
        ("zero=stage2", "write zero.stage=2"),
        ("zero=stage3_offload", "write zero.offload_optimizer=cpu zero.offload_param=cpu"),
        ("task=causal_lm", "set single values, such as task.KEY=VALUE"),
        ("zero=stage9", "set single values, such as zero.KEY=VALUE"),
    ],
)
def test_a_group_of_an_existing_run_is_refused_with_the_keys_that_it_would_change(choice: str, fix: str) -> None:
    with pytest.raises(UserError) as caught:
        apply_overrides(compose(["data=chitchat", "zero=stage3"]).config, [choice])
    assert [problem.fix for problem in caught.value.problems] == [fix]


@pytest.mark.parametrize(
    "name",
    [
        "my review",
        "Review (text)",
        "a, b",
        "#x",
        "größe",
        "a=b",
        "it's",
        'say "x"',
        "x{y}",
        "[a]",
        " a",
        "null",
        "True",
        "C:\\x",
    ],
)
def test_a_column_has_the_name_that_stands_behind_the_equals_sign(name):
    assert compose([f"data.columns.text={name}"]).config.data.columns == {"text": name}
    of_source = [f"data.mixture.a.columns.text={name}", "data.mixture.a.path=x.jsonl"]
    assert compose(of_source).config.data.mixture["a"].columns == {"text": name}


def test_a_quoted_column_name_and_a_reference_are_what_they_are_elsewhere(monkeypatch):
    monkeypatch.setenv("COLUMN", "column of the environment")  # messages of this process name the variable in its place
    given = ["data.columns.text='my review'", 'data.columns.label="my label"']
    assert compose(given).config.data.columns == {"text": "my review", "label": "my label"}
    assert compose(["data.columns.text=${oc.env:COLUMN}"]).config.data.columns == {"text": "column of the environment"}
