"""The plugins of `examples/plugins` on two ranks: trained, resumed to the bit, evaluated, asked, exported, reported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.command import ROOT, Commands, exact, metrics, result
from support.tiny import save_encoder

EXAMPLES = ROOT / "examples" / "plugins"

SETTINGS = [
    "model.path=model",
    "data.max_length=32",
    "data.split.validation=0.2",
    "trainer.micro_batch_size=4",
    "trainer.global_batch_size=8",
    "checkpoint.every=3",
    "evaluate.every=3",
    "launch.processes=2",
    "model.config_overrides={hidden_dropout_prob: 0.1}",
]
LABELS = "data.train=labelled.jsonl"
STARS = "data.train=stars.jsonl"

CASES = {
    "ordinal": (["ordinal"], ["task=ordinal", "task.labels=[low,middle,high]", "task.smoothing=0.05", LABELS]),
    "bitfit": (["bitfit"], ["task=classification", "method=bitfit", "method.norms=true", LABELS]),
    "star_rating": (["star_rating"], ["task=classification", "data.format=star_rating", STARS]),
    "kappa": (["kappa"], ["task=classification", "trainer.early_stopping.metric=kappa", LABELS]),
    "veto_outliers": (
        ["veto_outliers"],
        ["task=classification", "trainer.callbacks=[{veto_outliers: {factor: 1.02, at_least: 1}}]", LABELS],
    ),
    "lion": (["lion"], ["task=classification", "optimizer=lion", "optimizer.lr=1e-3", LABELS]),
}
TOGETHER = (
    ["ordinal", "bitfit", "star_rating", "kappa", "veto_outliers", "lion"],
    [
        *("task=ordinal", "task.labels=['1','2','3']", "method=bitfit", "data.format=star_rating", STARS),
        *("trainer.early_stopping.metric=kappa", "optimizer=lion", "optimizer.lr=1e-3"),
        "trainer.callbacks=[{veto_outliers: {factor: 1.02, at_least: 1}}]",
    ],
)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Commands:
    folder = tmp_path_factory.mktemp("plugins")
    save_encoder(folder / "model")
    labels = ("low", "middle", "high")
    labelled = [{"text": f"w{n % 5} w{n % 7} w{n % 3}", "label": labels[n % 3]} for n in range(60)]
    stars = [{"title": f"w{n % 5}", "body": f"w{n % 7} w{n % 3}", "stars": n % 3 + 1} for n in range(60)]
    for name, rows in (("labelled", labelled), ("stars", stars)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Commands(folder)


def train(workplace: Commands, run: str, files: list[str], settings: list[str], steps: int, *further: str):
    plugins = f"plugins=[{','.join(f'{name}.py' for name in files)}]"
    for name in files:
        if not (workplace.folder / f"{name}.py").is_file():
            shutil.copyfile(EXAMPLES / f"{name}.py", workplace.folder / f"{name}.py")
    return workplace.run(
        "train", plugins, *SETTINGS, *settings, f"trainer.max_steps={steps}", f"run.dir={run}", *further, timeout=400
    )


def check(workplace: Commands, name: str, case: tuple[list[str], list[str]], stage: int) -> None:
    files, settings = case
    schedule = ["schedule=constant", f"zero=stage{stage}"]
    whole, broken = f"{name}-{stage}-whole", f"{name}-{stage}-broken"
    done = train(workplace, whole, files, settings, 6, *schedule)
    assert done.returncode == 0, done.stderr[-3000:]
    assert train(workplace, broken, files, settings, 3, *schedule).returncode == 0
    done = train(workplace, broken, files, settings, 6, *schedule)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = workplace.folder
    after = [[row for row in exact(folder / run) if row["step"] > 3] for run in (broken, whole)]
    assert len(after[0]) >= 4  # three steps and an evaluation
    assert after[0] == after[1]
    for file in (folder / whole / "export").glob("*.safetensors"):
        assert file.read_bytes() == (folder / broken / "export" / file.name).read_bytes()
    listed = (folder / whole / "run.yaml").read_text()
    assert all(f"name: {one}\n" in listed and (folder / whole / "plugins" / f"{one}.py").is_file() for one in files)


def test_all_six_at_once(workplace):
    check(workplace, "together", TOGETHER, 3)
    folder, run = workplace.folder, "together-3-whole"
    shown = result(folder / run)
    assert {"kappa", "mae", "accuracy"} <= set(shown["eval_final"])
    assert shown["best"]["metric"] == "kappa"
    assert shown["veto_outliers"] == max(row.get("veto_outliers/vetoed", 0) for row in metrics(folder / run)) > 0

    # The files themselves are gone: the run has its copies.
    for name in TOGETHER[0]:
        (folder / f"{name}.py").unlink()
    evaluated = workplace.run("evaluate", run, "--json")
    assert evaluated.returncode == 0, evaluated.stderr[-3000:]
    again = json.loads(evaluated.stdout)["metrics"]
    assert again["kappa"] == shown["eval_final"]["kappa"]
    asked = workplace.run("predict", run, "--text", "w1 w2 w1", "--json")
    assert asked.returncode == 0, asked.stderr[-3000:]
    assert json.loads(asked.stdout)["predicted"] in ("1", "2", "3")
    assert workplace.run("export", run, "--out", "exported").returncode == 0
    assert (folder / "exported" / "config.json").is_file()
    page = workplace.run("report", run)
    assert page.returncode == 0, page.stderr[-3000:]
    html = (folder / run / "report.html").read_text()
    assert all(name in html for name in ("kappa", "veto_outliers", "ordinal.py"))

    # What looks after a run needs no plugin, not even a broken one.
    (folder / run / "plugins" / "ordinal.py").write_text("raise SystemExit('a plugin was loaded')")
    for verb in (["status", run], ["checkpoints", run], ["report", run], ["runs", "."], ["cancel", run]):
        done = workplace.run(*verb)
        assert done.returncode == 0, (verb, done.stderr[-2000:])
    refused = workplace.run("train", run, "trainer.max_steps=8")
    assert refused.returncode == 2
    assert "has changed since the run began" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("name", CASES)
def test_each_at_every_stage(workplace, name, stage):
    check(workplace, name, CASES[name], stage)


@pytest.mark.parametrize(
    ("name", "wrong", "nearest"),
    [
        ("ordinal", "task.smoothin=0.1", "task.smoothing"),
        ("bitfit", "method.norm=true", "method.norms"),
        ("lion", "optimizer.momentun=0.9", "optimizer.momentum"),
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
