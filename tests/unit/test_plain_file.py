"""`dstune train my.yaml`: choices, sections and keys of a file as overrides, its lines in messages, and its limits."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml

from dstune import cli
from dstune.config.compose import compose
from dstune.config.flags import hydra_flags
from dstune.config.overrides import parse
from dstune.config.plain_file import MAX_BYTES, MAX_VALUES, expand, literal, read_overrides
from dstune.core.errors import UserError


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    def write(text: str, name: str = "my.yaml") -> Path:
        Path(name).write_text(text)
        return Path(name)

    return write


MINE = """\
model: qwen3_4b
optimizer: {lr: 1e-4}
method:
  rank: 8   # before the name of its choice
  name: lora
data:
  train: my rows.jsonl
  columns: {text: my review}
trainer:
  early_stopping: {patience: 3}
trainer.max_steps: 7
tracking: {tags: [a b, "null"], wandb: {mode: offline}}
"""


def test_a_file_composes_to_what_its_overrides_compose_to(write):
    write(MINE)
    config = compose(hydra_flags(["my.yaml"]).overrides).config
    assert config.model.path == "Qwen/Qwen3-4B"
    assert (config.method.name, config.method.rank, config.optimizer.lr) == ("lora", 8, 1e-4)
    assert (config.data.train, config.data.columns) == ("my rows.jsonl", {"text": "my review"})
    assert (config.trainer.early_stopping.patience, config.trainer.max_steps) == (3, 7)
    assert (config.tracking.tags, config.tracking.wandb.mode.name) == (["a b", "null"], "offline")


def test_the_command_line_wins_over_the_file_wherever_the_file_stands(write):
    write(MINE)
    for words in (
        ["my.yaml", "optimizer.lr=5e-5", "model=qwen3_8b"],
        ["optimizer.lr=5e-5", "my.yaml", "model=qwen3_8b"],
    ):
        composed = compose(hydra_flags(words).overrides)
        assert (composed.config.optimizer.lr, composed.config.model.path) == (5e-5, "Qwen/Qwen3-8B")
        assert "method=lora" in composed.overrides, "run.yaml records what the file says as overrides"
        assert [text for text in composed.overrides if text.startswith("optimizer.lr")] == ["optimizer.lr=5e-5"]


def test_a_file_without_model_and_rows_changes_the_quickstart(write):
    write("trainer: {max_steps: 3}")
    composed = compose(hydra_flags(["my.yaml"]).overrides)
    assert composed.overrides == ["experiment=quickstart", "trainer.max_steps=3"]


def test_an_experiment_is_read_where_a_plain_file_is(write):
    text = "# @package _global_\ndefaults:\n  - chat_lora\n  - override /zero: stage1\n  - _self_\nmethod: {rank: 4}\n"
    write(text, "experiment.yaml")
    config = compose(hydra_flags(["experiment.yaml"]).overrides).config
    assert (config.method.name, config.method.rank, config.zero.stage, config.run.name) == ("lora", 4, 1, "chat_lora")


PACKAGED = sorted((Path(__file__).parents[2] / "conf/experiment").glob("*.yaml"))


@pytest.mark.parametrize("file", PACKAGED, ids=lambda file: file.stem)
def test_every_packaged_experiment_is_the_same_as_a_file(file: Path):
    by_name = compose([f"experiment={file.stem}", "data.train=x.jsonl"]).config
    assert compose([*expand([str(file)]), "data.train=x.jsonl"]).config == by_name


def exit_of(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, str]]:
    assert cli.main([*words, "--json"]) == 2
    problems = json.loads(capsys.readouterr().out)["error"]["problems"]
    return [{key: problem[key] for key in ("where", "reason", "fix")} for problem in problems]


@pytest.mark.parametrize("verb", [["train"], ["plan"], ["data", "show"], ["train", "-m"]], ids=" ".join)
def test_unknown_names_are_answered_with_their_line_and_the_nearest_name(write, capsys, verb: list[str]):
    write(
        "modle: qwen3_4b\nmethod: loar\ntrainer:\n  seed: 1\n  epoch: 3\noptimizer: {lr: fast}\ndata: {train: x.jsonl}\n"
    )
    more = ["optimizer.weight_decay=0,0.1"] if "-m" in verb else []
    found = {problem["where"]: problem["fix"] for problem in exit_of(capsys, *verb, "my.yaml", *more)}
    assert found == {
        "my.yaml:1: modle": "did you mean model=qwen3_4b?",
        "my.yaml:2: method": "did you mean method=lora?",
        "my.yaml:5: trainer.epoch": "did you mean trainer.epochs=3?",
        "my.yaml:6: optimizer.lr": "leave it out, and optimizer.lr is the default of the method",
    }


def test_what_validation_refuses_has_its_line_and_what_the_command_says_has_none(write, capsys):
    write("data:\n  train: x.jsonl\nmethod: lora\noptimizer:\n  lr: -1\n")
    assert exit_of(capsys, "train", "my.yaml", "trainer.epochs=0")[0]["where"] == "my.yaml:5: optimizer.lr"
    assert exit_of(capsys, "train", "my.yaml", "optimizer.lr=-2")[0]["where"] == "optimizer.lr"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "this is no configuration"),
        ("- a\n- b\n", "this is no configuration"),
        ("a: [\n", "this is no YAML"),
        ("optimizer: {lr: 1}\noptimizer: {eps: 1}\n", "stands twice, first in line 1"),
        ("data: {train: x, train: y}\n", "stands twice"),
        ("data: {train: !!python/object/apply:os.system [id]}\n", "could not determine a constructor"),
        ("run: {name: !!binary aGk=}\n", "cannot contain a value of type bytes"),
        ("task: {name: classification, class_weights: {Größe: 2}}\n", "characters that are not allowed in keys"),
        ("'a b': 1\n", "this is no name of a key"),
        ("# @package method\nrank: 3\n", "a choice of a group"),
        ("defaults: [/schema/method/lora]\n", "only choices of groups are allowed"),
        ("defaults: [{/hydra/launcher: x}]\n", "only choices of groups are allowed"),
        ("x: &a {x: *a}\n", "an alias inside of what it stands for"),
        ("a: " + "[" * 200 + "]" * 200, "nested more than 100 deep"),
        (f"tracking: {{tags: [{','.join('abc' for _ in range(MAX_VALUES))}]}}", "more than 2,000 values"),
        (f"a: &a [{'1,' * 13}]\nb: &b [{'*a,' * 13}]\nc: [{'*b,' * 13}]\n", "more than 2,000 values"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_as_a_configuration_is_refused(write, text: str, reason: str):
    write(text)
    with pytest.raises(UserError) as caught:
        expand(["my.yaml"])
    assert reason in str(caught.value)
    assert "my.yaml" in caught.value.problems[0].where


def test_files_that_are_too_large_or_no_files_are_refused(write, tmp_path: Path):
    write("run: {name: " + "x" * MAX_BYTES + "}")
    (tmp_path / "folder.yaml").mkdir()
    for word in ("my.yaml", "folder.yaml", "/dev/zero.yaml", "no.yaml", "x" * 5000 + ".yaml"):
        with pytest.raises(UserError):
            expand([word])
    with pytest.raises(UserError, match=r"did you mean my\.yaml"):
        expand(["may.yaml"])
    with pytest.raises(UserError, match="only one"):
        expand(["my.yaml", "my.yml"])


LEAVES: tuple[Any, ...] = (
    *(
        None,
        True,
        0,
        -17,
        10**12,
        0.5,
        1e-4,
        float("inf"),
        -1e300,
        "",
        " ",
        "null",
        "True",
        "1e-4",
        "yes",
        "inf",
        "lora",
    ),
    *(
        "it's",
        "\\",
        "a\\'b",
        "a\\\\",
        "\\${a}",
        "a,b",
        "[x]",
        "{a: b}",
        "${a}",
        "--x",
        "a b",
        "Größe",
        "x\ny",
        "a=b",
        '"',
        "#",
    ),
)
NAMES = ("a", "a.b", "a b", "a:b", "a,b", "a=b", "(a)", "{a}", "[a]", "a\\b", "1", "a-b", "x/y")


def random_value(random: Random, depth: int) -> Any:
    kind = random.random() if depth else 1.0
    if kind < 0.3:
        return [random_value(random, depth - 1) for _ in range(random.randrange(4))]
    if kind < 0.6:
        return {name: random_value(random, depth - 1) for name in random.sample(NAMES, random.randrange(4))}
    return random.choice(LEAVES)


def test_every_value_of_yaml_is_itself_in_hydra_s_grammar():
    random = Random(0)
    for value in (*LEAVES, *(random_value(random, 3) for _ in range(200))):
        parsed, problems = parse([f"key={literal(value)}"])
        assert not problems
        assert plain(parsed[0].value()) == plain(value)


def plain(value: Any) -> Any:
    """Names of mappings as text: Hydra's grammar reads `1` as a number there, and dstune as a name."""
    if isinstance(value, dict):
        return {str(name): plain(part) for name, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, list) else value


def test_variables_of_the_environment_stay_references(write, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MY_PROJECT", "secret-name")
    write("tracking: {project: '${oc.env:MY_PROJECT}'}\ndata: {train: x.jsonl}")
    composed = compose(expand(["my.yaml"]))
    assert composed.config.tracking.project == "secret-name"
    assert not any("secret-name" in text for text in composed.overrides)


def test_plugins_of_a_file_are_those_of_the_command(write):
    write("plugins: [./mine.py]\n")
    assert read_overrides(Path("my.yaml")) == [("plugins=['./mine.py']", "my.yaml:1")]


def test_the_values_of_a_file_are_no_sweep(write):
    write("data: {train: x.jsonl}\nrun: {name: 'a,b'}\n")
    assert compose(expand(["my.yaml"])).config.run.name == "a,b"
    assert yaml.safe_load(Path("my.yaml").read_text())["run"]["name"] == "a,b"
