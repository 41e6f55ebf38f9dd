"""The page of a sweep and the list of runs, from directories that were written by hand."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import Any

import pytest

from dstune import cli
from dstune.report.best_trial import best_commands
from dstune.report.curves import title_of
from dstune.report.effects import positions, shares
from dstune.report.sweep_page import page, scale, without_outliers
from dstune.tracking.trials import Record, best_first, logarithmic_keys, ranked, read_record, read_records, unbeaten
from tests.support.pages import Page
from tests.support.runs import HOSTILE, full_run, metrics_rows, write_sweep_directory


def trial(number: int, lr: float, rank: int, loss: float | None, **more: Any) -> dict[str, Any]:
    reached = {} if loss is None else {"loss": loss}
    values = {"optimizer.lr": lr, "method.rank": rank}
    return {
        "name": f"{number:03d}-lr={lr},rank={rank}",
        "number": number,
        "values": values,
        "objective": reached,
        **more,
    }


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    trials = [
        trial(0, 1e-5, 8, 3.0),
        trial(1, 1e-3, 8, 2.0),
        trial(2, 1e-4, 16, 2.5),
        trial(3, 1e-4, 8, 2.6),
        trial(
            4, 1e-5, 16, 1.9, status="pruned", reason="pruned (asha) at step 10", files={"metrics": metrics_rows(10)}
        ),
        trial(5, 1.0, 8, None, status="failed", reason=f"not finite {HOSTILE}", run=False),
    ]
    return write_sweep_directory(tmp_path / "sweep", trials)


def test_trials_stand_best_first(sweep: Path):
    sweep_page = Page(page(sweep))
    links = [str(found["href"]) for found in sweep_page.having("href") if str(found["href"]).endswith("report.html")]
    assert [link[:3] for link in links] == ["001", "002", "003", "000", "004"], "what was pruned stands behind"
    assert all("=" not in link.rsplit("/", 1)[0] for link in links), "names are quoted in addresses"
    assert "best held-out loss 2 trial 001" in sweep_page.text
    assert "4 completed, 1 pruned, 1 failed" in sweep_page.text
    assert "<script>alert(1)" not in sweep_page.html
    assert "Failed 005-lr=1.0,rank=8 not finite" in sweep_page.text


def test_the_title_is_the_name_of_the_runs(sweep: Path):
    (sweep / "sweep.yaml").write_text(json.dumps({"objective": ["loss"], "config": {"run": {"name": "film reviews"}}}))
    assert "<title>film reviews · dstune</title>" in page(sweep)
    (sweep / "sweep.yaml").write_text(json.dumps({"objective": ["loss"], "config": None}))
    assert f"<title>{sweep.parent.name}/sweep · dstune</title>" in page(sweep)


def test_values_curves_and_importance(sweep: Path):
    sweep_page = Page(page(sweep))
    titles = [words for words in sweep_page.words if words]
    for title in ("All values together", "optimizer.lr", "method.rank", "Held-out loss", "Training loss"):
        assert title in titles
    assert len(sweep_page.classed("dot")) >= 10, "five trials over each of two keys"
    assert len(sweep_page.classed("ring")) == 2, "the pruned trial over each key"
    paths = [found for found in sweep_page.having("d") if "c" in str(found.get("class"))]
    assert len([found for found in paths if str(found["d"]).count("L") == 2]) == 5, "through two keys to the loss"


def test_the_importance_of_keys_needs_trials(tmp_path: Path):
    def with_trials(count: int) -> str:
        runs = [trial(at, 1e-5 * (1 + at % 3), 8 * (1 + at % 2), 2.0 + at % 3) for at in range(count)]
        return Page(page(write_sweep_directory(tmp_path / str(count), runs))).text

    assert "Importance" not in with_trials(5)
    assert "fitted to the 6 trials" in with_trials(6)
    assert "optimizer.lr 100" in with_trials(6 + 6)


def test_curves_of_trials_that_diverged_are_left_out(tmp_path: Path):
    runs = [trial(at, 1e-4, 8, 2.0 + at / 100, files={"metrics": metrics_rows(40)}) for at in range(7)]
    rows = [{**row, **({"eval/loss": 90.0 + row["step"]} if "eval/loss" in row else {})} for row in metrics_rows(20)]
    for at, own in enumerate(runs):
        for row in own["files"]["metrics"]:
            if "eval/loss" in row:
                row["eval/loss"] += at / 100
    sweep_page = Page(
        page(write_sweep_directory(tmp_path / "sweep", [*runs, trial(7, 1.0, 8, 110.0, files={"metrics": rows})]))
    )
    assert "1 diverged, not drawn" in sweep_page.text
    assert "1 beyond the edge" in sweep_page.text


def test_steps_that_pruning_saved(tmp_path: Path):
    runs = [trial(0, 1e-4, 8, 2.0), trial(1, 1e-5, 8, 3.0, status="pruned")]
    path = write_sweep_directory(tmp_path / "sweep", runs)
    for name, steps, status in (("000-lr=0.0001,rank=8", 40, "completed"), ("001-lr=1e-05,rank=8", 10, "pruned")):
        (path / name / "result.json").write_text(json.dumps({"steps": steps, "status": status}))
        text = (path / name / "run.yaml").read_text()
        (path / name / "run.yaml").write_text(text.replace("max_steps: null", "max_steps: 40"))
    assert "50 of 80: 37.5 % never trained" in Page(page(path)).text


def test_several_objectives_mark_what_nobody_beats(tmp_path: Path):
    reached = [(0.9, 50.0), (0.8, 10.0), (0.7, 20.0), (0.85, 60.0)]
    trials = [
        {"name": f"t{at}", "values": {"trainer.seed": at}, "objective": {"accuracy": accuracy, "seconds": seconds}}
        for at, (accuracy, seconds) in enumerate(reached)
    ]
    path = write_sweep_directory(tmp_path / "sweep", trials, ["accuracy", "seconds"])
    sweep_page = Page(page(path))
    assert len(sweep_page.classed("best")) == 2
    assert "more is better" in sweep_page.text
    found = [Record(one["name"], 0, {}, status="completed", objective=one["objective"]) for one in trials]
    assert unbeaten(found, ["accuracy", "seconds"]) == {"t0", "t1"}
    assert [one.name for one in ranked(found, "accuracy")] == ["t0", "t3", "t1", "t2"]


def test_a_sweep_in_which_nothing_began(tmp_path: Path):
    path = write_sweep_directory(tmp_path / "sweep", [trial(0, 1e-4, 8, None, status="failed", run=False)])
    sweep_page = Page(page(path))
    assert "1 failed" in sweep_page.text
    assert "Curves" not in sweep_page.text
    assert read_record(tmp_path / "none.json") is None


# ---- importance ----


def grid_of(function, *axes):
    points = [{"a": a, "b": b} for a in axes[0] for b in axes[1]]
    return points, [function(point["a"], point["b"]) for point in points]


def test_shares_of_a_full_grid_are_its_main_effects():
    """Of 3a + b over {0, 1} x {0, 1, 2}: variances 9/4 and 2/3 of their sum."""
    found = shares(*grid_of(lambda a, b: 3 * a + b, [0, 1], [0, 1, 2]))
    assert list(found) == ["a", "b"]
    assert found["a"] == pytest.approx(27 / 35, abs=0.02)
    assert found["b"] == pytest.approx(8 / 35, abs=0.02)


def test_what_keys_do_together_is_in_no_share():
    found = shares(*grid_of(lambda a, b: float(a == b), [0, 1, 2], [0, 1, 2]))
    assert sum(found.values()) < 0.05


def test_texts_and_logarithms():
    found = shares(*grid_of(lambda a, b: math.log10(a) + (b == "y"), [1e-5, 1e-4, 1e-3], ["x", "y"]))
    # Variances: 2/3 of the three rates, 1/4 of the two names.
    assert found["a"] == pytest.approx((2 / 3) / (2 / 3 + 1 / 4), abs=0.02)
    assert positions(["b", "a", "b", None]) == [2.0, 1.0, 2.0, 0.0]
    assert positions([True, False]) == [1.0, 0.0]


def test_no_shares_without_differences():
    assert shares([{"a": at} for at in range(3)], [1.0, 2.0, 3.0]) == {}, "too few"
    three = [{"a": at % 2, "b": at % 3, "c": at} for at in range(9)]
    assert shares(three, [float(at) for at in range(9)])
    assert shares(three[:8], [float(at) for at in range(8)]) == {}, "three trials for each key"
    assert shares([{"a": at} for at in range(5)], [1.0] * 5) == {}


def test_trials_that_diverged_do_not_flatten_the_others():
    losses = [0.5, 0.6, 0.65, 0.68, 0.7, 0.7, 0.71, 3.0]
    assert without_outliers(losses, lower=True) == (losses[:-1], 1)
    assert without_outliers([1 - loss for loss in losses], lower=False) == ([1 - loss for loss in losses[:-1]], 1)
    assert without_outliers([0.7, 0.7, 0.7, 3.0], lower=True)[1] == 0, "equal values say nothing about distances"
    assert scale([0.5, 0.7]).position(3.0) == 100


def test_scales():
    assert [label for _, label in scale([4, 8, 16], of_key=True).ticks] == ["4", "8", "16"]
    assert scale(["b", "a"]).position("a") == 8
    assert scale(["only"]).position("only") == 50
    rates = scale([1e-5, 1e-3])
    assert rates.logarithmic
    assert rates.position(1e-4) == pytest.approx(50, abs=0.1)
    assert 0 < scale([1.0, 2.0]).position(1.0) < scale([1.0, 2.0]).position(2.0) < 100
    assert best_first(0.9, "accuracy") < best_first(0.8, "accuracy")
    assert best_first(0.8, "loss") < best_first(0.9, "loss") < best_first(None, "loss")


# ---- the verbs ----


def test_report_of_a_sweep(sweep: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["report", str(sweep), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["report"] == str(sweep / "report.html")
    assert [Path(run).name[:3] for run in printed["runs"]] == ["001", "002", "003", "000", "004"]
    assert "Trials, best first" in (sweep / "report.html").read_text()
    assert (
        cli.main(
            [
                "report",
                str(sweep / "001-lr=0.001,rank=8"),
                str(sweep / "000-lr=1e-05,rank=8"),
                "--output",
                str(sweep / "two.html"),
            ]
        )
        == 0
    )


def test_runs_of_a_sweep(sweep: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["runs", str(sweep), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["runs"]
    assert [Path(line["run"]).name[:3] for line in found] == ["001", "002", "003", "000", "004", "005"]
    assert [line["status"] for line in found] == ["completed"] * 4 + ["pruned", "failed"]
    assert found[0]["values"] == {"optimizer.lr": 1e-3, "method.rank": 8}
    assert cli.main(["runs", str(sweep)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:3] == ["run", "status", "step"]
    assert lines[2].startswith("001-lr=0.001,rank=8")
    assert len(lines) == 8


def test_runs_below_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for at, name in enumerate(("a/old", "a/new", "b/other")):
        launch = {"id": "x", "pid": 1, "started": 1000.0 * (1 + at), "host": "elsewhere", "processes": 1, "jobs": []}
        rows = [{"step": 4, "loss": 1.0}, {"step": 4, "eval/loss": 3.0 - at, "eval/seconds": 1}]
        full_run(tmp_path / name, launch=launch, metrics=rows)
    assert cli.main(["runs", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["runs"]
    assert [line["run"] for line in found] == [str(tmp_path / name) for name in ("b/other", "a/new", "a/old")]
    assert (found[0]["step"], found[0]["metrics"]) == (4, {"loss": 1.0})
    assert cli.main(["runs", str(tmp_path / "a"), "--sort", "loss"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["new", "old"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runs", "none"], "there is no such folder"),
        (["runs", "SWEEP", "--sort", "f1"], "--sort=f1: none of these runs has such a metric\n    fix: one of loss"),
        (["runs", "SWEEP", "--sot"], "did you mean --sort?"),
    ],
)
def test_mistakes(arguments: list[str], message: str, sweep: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main([str(sweep) if word == "SWEEP" else word for word in arguments]) == 2
    assert message in capsys.readouterr().err


def test_values_that_were_drawn_by_their_logarithm_have_a_logarithmic_axis(tmp_path: Path):
    runs = [trial(at, 1e-4 * (1 + at), 8 * 2 ** (at % 3), 2.0 + at) for at in range(6)]
    write_sweep_directory(tmp_path / "sweep", runs)
    file = tmp_path / "sweep" / "sweep.yaml"
    content = json.loads(file.read_text())
    assert "logarithmic" not in Page(page(tmp_path / "sweep")).text
    for axes, expected in (
        ({"optimizer.lr": "tag(log,interval(0.0001,0.001))"}, {"optimizer.lr"}),
        ({"optimizer.lr": "interval(0.0001,0.001)", "method.rank": ["8", "16", "32"]}, {"method.rank"}),
        ({"method.rank": ["8", "12", "16"], "schedule": ["a", "b", "c"], "data.packing": ["true", "false"]}, set()),
    ):
        file.write_text(json.dumps({**content, "axes": axes}))
        assert logarithmic_keys(tmp_path / "sweep") == expected
        assert Page(page(tmp_path / "sweep")).text.count("logarithmic") == len(expected)


def test_the_best_trial_is_a_command(sweep: Path):
    file = sweep / "sweep.yaml"
    given = [
        "data.train=my rows.jsonl",
        "method=lora",
        "optimizer.lr=1e-5,1e-4",
        "sweep.trials=4",
        "run.dir=x",
        "method.rank=8,16",
    ]
    file.write_text(json.dumps({"objective": ["loss"], "overrides": given, "config_dirs": ["groups"], "config": {}}))
    train, export = best_commands(sweep, read_records(sweep), "loss")
    words = ["--config-dir", "groups", "data.train=my rows.jsonl", "method=lora", "optimizer.lr=0.001", "method.rank=8"]
    assert shlex.split(train) == ["dstune", "train", *words]
    assert shlex.split(export) == ["dstune", "export", f"{sweep}/001-lr=0.001,rank=8", "--out", f"{sweep}/best"]
    assert train in Page(page(sweep)).text
    file.write_text("{")
    assert best_commands(sweep, [], "loss") == []


def test_importance_has_whole_numbers(tmp_path: Path):
    runs = [trial(at, 1e-5 * (1 + at % 3), 8 * (1 + at % 2), 2.0 + at % 3) for at in range(12)]
    text = Page(page(write_sweep_directory(tmp_path / "sweep", runs))).text
    assert "optimizer.lr 100 %" in " ".join(text.split())


@pytest.mark.parametrize(
    ("metric", "title"),
    [
        ("eval/entity_f1", "Held-out entity F1"),
        ("eval/rougeL", "Held-out ROUGE-L"),
        ("guard/my_own", "My own on data.guard"),
        ("reward_margin", "Reward margin"),
        ("lr", "Learning rate"),
    ],
)
def test_metrics_have_plain_names(metric: str, title: str):
    assert title_of(metric) == title
