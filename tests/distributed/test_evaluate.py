"""The verb `evaluate` measures what training measured: on any number of ranks, at any stage, from any source."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dstune.checkpoint import store
from dstune.checkpoint.export import export_checkpoint
from dstune.config.compose import compose
from dstune.config.run_file import write_run
from dstune.core.errors import UserError
from dstune.evaluation import command as evaluate
from tests.support.ranks import run_ranks
from tests.support.tiny import save_decoder, save_encoder, write_dialogues, write_labelled

PROGRAM = Path(__file__).parents[1] / "parity" / "train_cases.py"

CASES = {
    "full-3": ("decoder", ["task=chat", "method=full", "zero=stage3", "data.packing=true"]),
    "lora-2": (
        "decoder",
        ["task=chat", "method=lora", "zero=stage2", "data.packing=true", "evaluate.every=2", "checkpoint.every=2"],
    ),
    "half-2": ("decoder", ["task=chat", "method=full", "zero=stage2", "data.packing=false", "trainer.precision=bf16"]),
    "labels-2": ("encoder", ["task=classification", "method=full", "zero=stage2", "data.packing=false"]),
}


class Shelf:
    def __init__(self, folder: Path):
        self.folder = folder
        self.models = {"decoder": save_decoder(folder / "decoder"), "encoder": save_encoder(folder / "encoder")}
        self.data = {
            "decoder": write_dialogues(folder / "chat.jsonl", 40),
            "encoder": write_labelled(folder / "labels.jsonl", 60),
        }

    def overrides(self, name: str) -> list[str]:
        model, overrides = CASES[name]
        return ["data=files", f"data.train={self.data[model]}", "data.max_length=64", *SHARED, *overrides]

    def result(self, name: str) -> dict:
        return json.loads((self.folder / name / "result.json").read_text())


SHARED = [
    "data.split.validation=0.3",
    "trainer.precision=fp32",
    "trainer.micro_batch_size=2",
    "trainer.global_batch_size=4",
    "trainer.max_steps=3",
    "optimizer.lr=0.01",
]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    shelf = Shelf(tmp_path_factory.mktemp("evaluate"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSTUNE_CACHE", str(shelf.folder / "cache"))
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        cases = []
        for name, (model, _) in CASES.items():
            path = shelf.folder / f"{name}.yaml"
            write_run(path, compose([f"model.path={shelf.models[model]}", *shelf.overrides(name)]))
            cases.append({"run_yaml": str(path), "run_dir": str(shelf.folder / name)})
        run_ranks(PROGRAM, 2, cases)
        yield shelf


def measured(capsys, *arguments: object) -> dict:
    assert evaluate.main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        ("full-3", 2),
        ("lora-2", 1),
        pytest.param("full-3", 1, marks=pytest.mark.ci),
        pytest.param("labels-2", 2, marks=pytest.mark.ci),
    ],
)
def test_a_run_is_measured_as_at_its_end(shelf, name, ranks, capsys):
    found = measured(capsys, shelf.folder / name, f"launch.processes={ranks}")
    result = shelf.result(name)
    assert found["metrics"] == pytest.approx(result["eval_final"], rel=1e-5)
    assert found["metrics"]["loss"] != pytest.approx(result["eval_initial"]["loss"], rel=1e-3), "nothing was trained"
    assert (found["split"], found["world_size"], found["model"]) == ("validation", ranks, str(shelf.folder / name))
    if name == "labels-2":
        assert found["labels"] == ["left", "right"]
        assert sum(map(sum, found["confusion"])) == found["rows"]
        assert found["confusion"] == result["confusion"]


def test_in_half_precision_it_computes_as_training_did(shelf, capsys):
    """Another order of sums, or another attention, would show in bf16 at once."""
    found = measured(capsys, shelf.folder / "half-2", "launch.processes=2")
    assert found["metrics"] == pytest.approx(shelf.result("half-2")["eval_final"], rel=1e-9)


def test_an_earlier_checkpoint_is_measured_as_it_was_then(shelf, capsys):
    found = measured(capsys, shelf.folder / "lora-2", "launch.processes=1", "--checkpoint", 2)
    rows = [json.loads(line) for line in (shelf.folder / "lora-2" / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["eval/loss"] for row in rows if "eval/loss" in row}
    assert found["metrics"]["loss"] == pytest.approx(losses[2], rel=1e-5)
    assert found["metrics"]["loss"] != pytest.approx(losses[3], rel=1e-3), "the last one was measured"


def test_a_checkpoint_of_what_is_no_run_is_refused(shelf):
    with pytest.raises(UserError, match="only a run has checkpoints"):
        evaluate.main([str(shelf.models["decoder"]), "--checkpoint", "best"])
    with pytest.raises(UserError, match="--shots prompts the untuned model"):
        evaluate.main([str(shelf.folder / "lora-2"), "--checkpoint", "2", "--shots", "0"])


def test_a_model_is_measured_as_before_training(shelf, capsys):
    found = measured(capsys, shelf.models["decoder"], *shelf.overrides("full-3"), "launch.processes=1")
    assert found["metrics"] == pytest.approx(shelf.result("full-3")["eval_initial"], rel=1e-5)


@pytest.mark.parametrize("name", [pytest.param("full-3", marks=pytest.mark.ci), "labels-2"])
def test_an_export_says_itself_how_it_is_measured(shelf, name, capsys):
    """Neither task, labels nor length are given, only the rows."""
    data = ["data=files", f"data.train={shelf.data[CASES[name][0]]}", *SHARED, "launch.processes=1"]
    found = measured(capsys, shelf.folder / name / "export", *data)
    assert found["metrics"] == pytest.approx(shelf.result(name)["eval_final"], rel=1e-5)


def test_a_classifiers_labels_keep_their_order_on_other_rows(shelf, capsys, tmp_path):
    rows = [json.loads(line) for line in shelf.data["encoder"].read_text().splitlines()]
    path = tmp_path / "right.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows if row["label"] == "right"))
    overrides = [*shelf.overrides("labels-2")[2:], f"data.test={path}", "data=files"]
    overrides.append("data.clean.leaks=false")  # the rows are those of training
    found = measured(capsys, shelf.folder / "labels-2" / "export", *overrides, "--split", "test", "launch.processes=1")
    assert found["labels"] == ["left", "right"]
    assert found["confusion"][0] == [0, 0] and sum(found["confusion"][1]) == found["rows"]


def test_rows_of_their_own_need_no_training_file(shelf, capsys, tmp_path):
    """Nor are they held against its rows; bad ones among them are counted."""
    rows, trained_on = tmp_path / "rows.jsonl", shelf.data["encoder"]
    rows.write_text(trained_on.read_text() + '{"text": "w1", "label": "neither"}\n')
    away = trained_on.rename(tmp_path / "away.jsonl")
    try:
        words = [f"data.validation={rows}", "data.on_bad_row=skip", "launch.processes=1"]
        found = measured(capsys, shelf.folder / "labels-2", *words)
    finally:
        away.rename(trained_on)
    assert (found["rows"], found["left_out"]) == (60, 1)


def test_it_prints_a_table_for_people_and_writes_the_rows(shelf, capsys, tmp_path):
    """Each row with where it is, in the order of the file, though rows of a length are evaluated together."""
    written = tmp_path / "rows.jsonl"
    words = ["launch.processes=1", "evaluate.max_rows=5", "--output", str(written)]
    assert evaluate.main([str(shelf.folder / "labels-2"), *words]) == 0
    rows = [json.loads(line) for line in written.read_text().splitlines()]
    file = shelf.data["encoder"]
    given = [json.loads(line)["label"] for line in file.read_text().splitlines()]
    places = [row["row"].rpartition(":") for row in rows]
    numbers = [int(number) for _, _, number in places]
    assert numbers == sorted(set(numbers)) and {name for name, _, _ in places} == {str(file)}
    assert [given[number - 1] for number in numbers] == [row["label"] for row in rows]
    assert len({row["label"] for row in rows}) == 2, "or an order could not be told"
    lines = capsys.readouterr().out.splitlines()
    table = lines[lines.index(f"{shelf.folder / 'labels-2'}: 5 validation rows") :]
    assert any(line.split()[0] == "accuracy" for line in table)
    assert table[-3].split() == ["true", "\\", "predicted", "left", "right"]


def refusal(*arguments: object) -> str:
    with pytest.raises(UserError) as caught:
        evaluate.main(list(map(str, arguments)))
    return str(caught.value)


def test_no_file_is_replaced_without_force_and_no_metrics_are_lost(tmp_path, monkeypatch, capsys):
    there = tmp_path / "rows.jsonl"
    there.write_text("")
    for place, reason in (
        (there, "exists already"),
        (tmp_path, f"is a folder\n    fix: --output {tmp_path}/answers.jsonl"),
        (tmp_path / "nowhere" / "rows.jsonl", "there is no such folder"),
    ):
        assert reason in refusal("model", "--output", place)

    def measure(arguments, console):
        return 0, {"rows": 1, "split": "test", "metrics": {"loss": 2.0}, "row_results": [{"row": "x:1"}]}

    monkeypatch.setattr(evaluate, "measure", measure)
    assert evaluate.main(["model", "--output", str(there), "--force"]) == 0
    assert there.read_text() == '{"row": "x:1"}\n'
    capsys.readouterr()

    def write(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evaluate.files, "write", write)
    assert "cannot be written: No space left" in refusal("model", "--output", there, "--force")
    assert "loss  2.0000" in capsys.readouterr().out


def test_what_it_refuses(shelf, tmp_path):
    run_dir = shelf.folder / "full-3"
    assert "there are no test rows" in refusal(run_dir, "--split", "test", "launch.processes=1")
    assert "task" in refusal(run_dir, "task=classification")  # a group: the run has its own
    headless = refusal(shelf.models["encoder"], *shelf.overrides("labels-2"), "launch.processes=1")
    assert "no trained classification head" in headless
    adapter = shelf.folder / "lora-2" / "export"
    assert "adapter" in refusal(adapter, *shelf.overrides("lora-2"))
    assert "comes first" in refusal("data=files")
    assert "does not exist" in refusal(tmp_path / "nowhere", *shelf.overrides("full-3"))


def test_a_newer_checkpoint_counts_more_than_an_older_export(shelf, tmp_path, capsys):
    """An interrupted run was finished once, then went on."""
    from dstune.checkpoint.export import existing_or_new_export

    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "run.yaml").write_bytes((shelf.folder / "full-3" / "run.yaml").read_bytes())
    export = export_checkpoint(shelf.folder / "full-3", store.newest(shelf.folder / "full-3"), run_dir / "export")
    assert existing_or_new_export(run_dir, tmp_path / "scratch") == export
    (run_dir / "checkpoints").symlink_to(shelf.folder / "full-3" / "checkpoints")
    marker = store.newest(run_dir) / "COMMITTED"
    assert existing_or_new_export(run_dir, tmp_path / "scratch") == export
    marker.touch()
    assert existing_or_new_export(run_dir, tmp_path / "scratch") == tmp_path / "scratch" / "export"


def test_a_quantized_export_is_measured_on_the_rows_of_the_run(shelf, tmp_path, capsys):
    """With activations rounded as servers round them; `dstune evaluate` says the same of the run and of the export."""
    from dstune.cli import _export

    run, out = shelf.folder / "lora-2", tmp_path / "out"
    assert _export.main([str(run), "--quantize", "fp8", "--out", str(out), "--json"]) == 0
    described = json.loads(capsys.readouterr().out)["quantization"]
    whole = measured(capsys, run)
    assert (described["split"], described["rows"]) == ("validation", whole["rows"])
    assert described["original"]["loss"] == pytest.approx(whole["metrics"]["loss"], rel=1e-6)
    assert 1e-5 < abs(described["quantized"]["loss"] / described["original"]["loss"] - 1) < 0.05
    again = measured(capsys, out, *shelf.overrides("lora-2"), "method=full")
    assert again["metrics"]["loss"] == pytest.approx(described["quantized"]["loss"], rel=1e-6)
