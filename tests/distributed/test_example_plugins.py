"""The plugins of `examples/plugins` on two ranks: trained, resumed to the bit, evaluated, asked, exported, reported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.command import Commands, exact, metrics, result
from support.examples import CASES, EXAMPLES, LABELS, SPLIT, TOGETHER, overrides, prepare

STREAM = ["data.streaming=true", "data.stream_rows=20", "data.validation=held_out.jsonl"]
BY_STAGE = {0: SPLIT, 1: [*SPLIT, "data.workers=2"], 2: STREAM, 3: SPLIT}
"""Where rows are read: in the ranks, in processes of `datasets`, in a process of blocks."""


@pytest.fixture
def workplace(tmp_path) -> Commands:
    prepare(tmp_path)
    return Commands(tmp_path)


def check(workplace: Commands, case: tuple[list[str], list[str]], stage: int, *further: str) -> None:
    """A run, `whole`, and one that was continued after half of its steps are the same to the bit."""

    def train(run: str, steps: int) -> None:
        settings = ["schedule=constant", f"zero=stage{stage}", "launch.processes=2", *further]
        done = workplace.run("train", *overrides(case, run, steps, *settings), timeout=400)
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]

    train("whole", 6)
    train("broken", 3)
    train("broken", 6)
    folder = workplace.folder
    after = [[row for row in exact(folder / run) if row["step"] > 3] for run in ("broken", "whole")]
    assert len(after[0]) >= 4  # three steps and an evaluation
    assert after[0] == after[1]
    for file in (folder / "whole" / "export").glob("*.safetensors"):
        assert file.read_bytes() == (folder / "broken" / "export" / file.name).read_bytes()
    listed = (folder / "whole" / "run.yaml").read_text()
    assert all(f"name: {one}\n" in listed and (folder / "whole" / "plugins" / f"{one}.py").is_file() for one in case[0])


@pytest.mark.parametrize("stage", [*(pytest.param(stage, marks=pytest.mark.ci) for stage in range(3)), 3])
@pytest.mark.timeout(1500)
def test_all_six_at_once_at_every_stage(workplace, stage):
    check(workplace, TOGETHER, stage, *BY_STAGE[stage])
    folder = workplace.folder
    final = result(folder / "whole")
    assert {"kappa", "mae", "accuracy"} <= set(final["eval_final"])
    assert final["best"]["metric"] == "kappa"
    assert final["veto_outliers"] == max(row.get("veto_outliers/vetoed", 0) for row in metrics(folder / "whole")) > 0

    # The files themselves are gone: the run has its copies.
    for name in TOGETHER[0]:
        (folder / f"{name}.py").unlink()
    evaluated = workplace.run("evaluate", "whole", "--json")
    assert evaluated.returncode == 0, evaluated.stderr[-3000:]
    again = json.loads(evaluated.stdout)["metrics"]
    assert again["kappa"] == final["eval_final"]["kappa"]
    if stage < 3:
        return

    answered = workplace.run("predict", "whole", "--text", "w1 w2 w1", "--json")
    assert answered.returncode == 0, answered.stderr[-3000:]
    assert json.loads(answered.stdout)["predicted"] in ("1", "2", "3")
    assert workplace.run("export", "whole", "--out", "exported").returncode == 0
    record = json.loads((folder / "exported" / "dstune.json").read_text())
    assert (record["data"]["format"], record["data"]["shape"]) == ("star_rating", "text_label")
    (folder / "review.jsonl").write_text(json.dumps({"title": "w1", "body": "w2 w1"}) + "\n")
    copies = "plugins=[whole/plugins/ordinal.py,whole/plugins/star_rating.py]"
    by_columns = workplace.run("predict", "exported", "--input", "review.jsonl", "--json", copies)
    by_text = workplace.run("predict", "exported", "--text", "w1\nw2 w1", "--json", copies)
    assert by_columns.returncode == by_text.returncode == 0, by_columns.stderr[-3000:]
    assert json.loads(by_columns.stdout)["predicted"] == json.loads(by_text.stdout)["predicted"]
    served = workplace.run("serve", "whole", "--check")
    assert served.returncode == 0 and ": proven: " in served.stdout, served.stderr[-3000:]
    unknown = workplace.run("serve", "exported", "--check")
    assert unknown.returncode == 2 and "plugins: [FILE.py] in dstune.yaml" in unknown.stderr
    page = workplace.run("report", "whole")
    assert page.returncode == 0, page.stderr[-3000:]
    html = (folder / "whole" / "report.html").read_text()
    assert all(name in html for name in ("kappa", "veto_outliers", "ordinal.py"))

    # What looks after a run needs no plugin, not even a broken one.
    (folder / "whole" / "plugins" / "ordinal.py").write_text("raise SystemExit('a plugin was loaded')")
    for verb in (
        ["status", "whole"],
        ["checkpoints", "whole"],
        ["report", "whole"],
        ["runs", "."],
        ["cancel", "whole"],
    ):
        done = workplace.run(*verb)
        assert done.returncode == 0, (verb, done.stderr[-2000:])
    refused = workplace.run("train", "whole", "trainer.max_steps=8")
    assert refused.returncode == 2
    assert "has changed since the run began" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("name", CASES)
def test_each_at_every_stage(workplace, name, stage):
    check(workplace, CASES[name], stage, *SPLIT)


WRAPPED = """
import torch
from dataclasses import dataclass

import dstune
from dstune.protocols.method import MethodConfig


class Scaled(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.scale = inner, torch.nn.Parameter(torch.ones(()))

    def forward(self, hidden):
        return self.scale * self.inner(hidden)


@dataclass(frozen=True)
class WrappedConfig(MethodConfig):
    name: str = "wrapped"


@dstune.method
class Wrapped(dstune.Method):
    Config = WrappedConfig

    def apply(self, model, run):
        model.dropout = Scaled(model.dropout)
        return model
"""


def test_a_method_whose_parameters_an_export_would_lose_does_not_start(workplace):
    (workplace.folder / "wrapped.py").write_text(WRAPPED)
    case = ["wrapped"], ["task=classification", "method=wrapped", LABELS]
    done = workplace.run("train", *overrides(case, "run", 1, "launch.processes=1", *SPLIT), timeout=200)
    assert done.returncode == 2, done.stderr[-3000:]
    assert "dropout.scale" in done.stderr and not (workplace.folder / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "wrong", "nearest"),
    [
        ("ordinal", "task.smoothin=0.1", "task.smoothing"),
        ("bitfit", "method.norm=true", "method.norms"),
        ("signum", "optimizer.momentun=0.9", "optimizer.momentum"),
        ("kappa", "trainer.early_stopping.metric=kapa", "kappa"),
        ("star_rating", "data.format=star_ratings", "star_rating"),
        ("veto_outliers", "trainer.callbacks=[{veto_outliers: {facter: 2}}]", "did you mean factor?"),
    ],
)
def test_a_typing_error_names_the_nearest_key(monkeypatch, name, wrong, nearest):
    from dstune.config.compose import compose
    from dstune.config.validate import validate
    from dstune.core import plugins
    from dstune.core.errors import UserError

    monkeypatch.chdir(EXAMPLES)
    settings = [text for text in CASES[name][1] if not text.startswith(wrong.split("=")[0])]
    try:
        with pytest.raises(UserError) as error:
            validate(compose([f"plugins=[{name}.py]", "model=smollm2", *settings, wrong]).config)
        assert nearest in str(error.value)
    finally:
        plugins.activate([])


def test_every_example_is_one_file_that_says_how_it_is_used():
    files = sorted(EXAMPLES.glob("*.py"))
    assert [file.stem for file in files] == sorted(CASES)
    for file in files:
        assert f"plugins=[examples/plugins/{file.name}]" in file.read_text()
        assert isinstance(file, Path)
