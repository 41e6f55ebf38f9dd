"""A name that is not there beside runs is a typing error to every verb, and no model of the hub."""

import pytest

from dstune.cli import run
from dstune.core.errors import UserError


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
def test_every_verb_says_that_there_is_no_such_run(tmp_path, monkeypatch, words):
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "run.yaml").write_text("config: {}\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="there is no such run directory"):
        run(words)
