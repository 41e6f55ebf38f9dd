"""What is no run to the verbs that take one or a model: a name that is not there, a folder of runs, a file; and checkpoints."""

import pytest

from dstune.cli import run
from dstune.core.errors import UserError
from dstune.evaluation import command as evaluate


@pytest.fixture
def a_run(tmp_path, monkeypatch) -> None:
    """runs/mine in the working directory."""
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "run.yaml").write_text("config: {}\n")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "words",
    [
        ["evaluate", "runs/nope"],
        ["generate", "runs/nope", "--prompt", "x"],
        ["predict", "runs/nope", "--text", "x"],
        ["serve", "runs/nope"],
        ["export", "runs/nope"],
    ],
    ids=lambda words: words[0],
)
def test_every_verb_says_that_there_is_no_such_run(a_run, words):
    with pytest.raises(UserError, match="there is no such run directory"):
        run(words)


@pytest.mark.parametrize(
    "words",
    [["evaluate", "runs"], ["generate", "runs", "--prompt", "x"], ["predict", "runs", "--text", "x"]],
    ids=lambda words: words[0],
)
def test_a_folder_of_runs_is_no_model(a_run, words):
    with pytest.raises(UserError, match="this folder contains runs"):
        run(words)


def test_a_model_in_whose_folder_runs_are_is_a_model(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "run.yaml").write_text("")
    (tmp_path / "config.json").write_text("{}")
    assert evaluate.parse([str(tmp_path)]).target == str(tmp_path)


def test_a_checkpoint_is_evaluated_as_that_of_its_run(tmp_path):
    step = tmp_path / "checkpoints" / "step-00000003"
    step.mkdir(parents=True)
    (tmp_path / "run.yaml").write_text("")
    found = evaluate.parse([str(step)])
    assert (found.target, found.checkpoint) == (str(tmp_path), "3")
    (tmp_path / "chat.jsonl").write_text("{}")
    for words, reason in (
        ([f"{step}", "--checkpoint", "best"], "is a checkpoint already"),
        ([f"{step}", "--shots", "0"], f"fix: give {tmp_path} without a checkpoint"),
        ([f"{step}.incomplete"], "is no whole checkpoint"),
        ([f"{tmp_path}/chat.jsonl"], "this is a file"),
    ):
        with pytest.raises(UserError, match=reason):
            evaluate.parse(words)
