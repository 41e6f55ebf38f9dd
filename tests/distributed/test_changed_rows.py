"""Verbs that read a run's rows again refuse rows that changed since its training."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import dstune
from dstune.checkpoint.quantization import parse_quantization
from dstune.checkpoint.quantize import export_quantized
from dstune.checkpoint.store import newest
from dstune.config.compose import compose
from dstune.config.run_file import write_run
from dstune.core.errors import UserError
from dstune.cycle.settings import CycleSettings
from dstune.cycle.steps import Cycle
from dstune.evaluation import command as evaluate
from dstune.monitor import command as monitor
from dstune.recording.compare import held_out_prompts
from dstune.recording.sides import LocalModel
from dstune.serve.parity import PARTS
from dstune.show import command as show
from tests.support.ranks import run_ranks
from tests.support.tiny import save_decoder, write_dialogues

PROGRAM = Path(__file__).parents[1] / "parity" / "train_cases.py"
FILES = ("train.jsonl", "validation.jsonl")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with rows and a finished run on them."""
    folder = tmp_path_factory.mktemp("changed")
    train, validation = (write_dialogues(folder / name, 24, seed=seed) for seed, name in enumerate(FILES))
    words = ["data=files", f"data.train={train}", f"data.validation={validation}", "data.max_length=64"]
    words += [f"model.path={save_decoder(folder / 'model')}", "task=chat", "method=full", "data.packing=false"]
    words += ["trainer.precision=fp32", "trainer.micro_batch_size=2", "trainer.global_batch_size=4"]
    words += ["trainer.max_steps=2", "launch.processes=1", "run.export=none"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSTUNE_CACHE", str(folder / "cache"))
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        write_run(folder / "run.yaml", compose(words))
        run_ranks(PROGRAM, 1, [{"run_yaml": str(folder / "run.yaml"), "run_dir": str(folder / "run")}])
        yield folder


@pytest.fixture(params=FILES)
def changed(shelf: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A rows file, one answer of which is another one than at training."""
    path = shelf / request.param
    before = path.read_text()
    first, rest = before.split("\n", 1)
    row = json.loads(first)
    row["messages"][-1]["content"] = "w1 w2 w3 w4"
    path.write_text(json.dumps(row) + "\n" + rest)
    yield path
    path.write_text(before)


def check_refusal(refused: UserError, changed: Path) -> None:
    """Check that the file is named, and no digest."""
    (problem,) = refused.problems
    assert problem.where == f"data.{changed.stem}" and problem.value == str(changed)
    assert problem.reason.startswith("the file changed") and not re.search("[0-9a-f]{16}", problem.reason)


def test_an_evaluation(shelf: Path, changed: Path) -> None:
    with pytest.raises(UserError) as refused:
        evaluate.main([str(shelf / "run"), "--json"])
    check_refusal(refused.value, changed)


def test_an_export_in_fewer_bits(shelf: Path, changed: Path, tmp_path: Path) -> None:
    quantization, measure = parse_quantization("fp8"), evaluate.measure_weights
    with pytest.raises(UserError) as refused:
        export_quantized(shelf / "run", newest(shelf / "run"), tmp_path / "out", quantization, measure=measure)
    check_refusal(refused.value, changed)


def test_a_monitor(shelf: Path, changed: Path, tmp_path: Path) -> None:
    live = write_dialogues(tmp_path / "live.jsonl", 20, seed=5)
    with pytest.raises(UserError) as refused:
        monitor.main([str(shelf / "run"), "--data", str(live), "--model-rows", "0"])
    check_refusal(refused.value, changed)
    assert (
        monitor.main([str(shelf / "run"), "--data", str(live), "--model-rows", "0", "--reference", str(changed)]) == 0
    )


def test_rows_that_a_cycle_begins_with(shelf: Path, changed: Path, tmp_path: Path) -> None:
    settings = CycleSettings(shelf / "run", tmp_path / "cycle", str(shelf / FILES[0]))
    with pytest.raises(UserError) as refused:
        Cycle(settings, print).run()
    check_refusal(refused.value, changed)


def test_held_out_prompts_of_a_comparison(shelf: Path, changed: Path) -> None:
    side = LocalModel("OLD", str(shelf / "run"), 1)
    with pytest.raises(UserError) as refused:
        held_out_prompts(side, side)
    check_refusal(refused.value, changed)
    assert "--prompts FILE" in refused.value.problems[0].fix


def test_shown_rows(shelf: Path, changed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    part = changed.stem
    words = ["show", str(shelf / "run"), "--split", part, "--rows", "0", "--json"]
    assert show.main(words) == 0
    assert f"{changed}: the file changed since" in json.loads(capsys.readouterr().out)["note"]
    assert show.main([*words, f"data.{part}={changed}", "data.train=" + str(shelf / FILES[0])]) == 0
    assert json.loads(capsys.readouterr().out)["note"] == "", "rows that the command names are its own"


def test_the_reference_of_an_export(shelf: Path, changed: Path, tmp_path: Path) -> None:
    """A server may be proven with it, and says which rows it was asked."""
    made = dstune.export(shelf / "run", tmp_path / "export")
    part = json.loads((Path(made) / "reference.json").read_text())["part"]
    assert part == "changed" and "changed since the training" in PARTS[part]


def test_rows_named_by_the_command_are_read(shelf: Path, changed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_dialogues(shelf / "other.jsonl", 20, seed=7)
    assert evaluate.main([str(shelf / "run"), "--json", f"data.validation={other}"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"]


def test_rows_that_moved_are_the_same(shelf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = []
    for name in FILES:
        (tmp_path / name).write_bytes((shelf / name).read_bytes())
        words.append(f"data.{Path(name).stem}={tmp_path / name}")
    assert evaluate.main([str(shelf / "run"), "--json", *words]) == 0
    assert json.loads(capsys.readouterr().out)["rows"]
