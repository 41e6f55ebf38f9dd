"""The last page of `dstune train`."""

import json

import pytest
from support.configs import run_config

from dstune.config.run_file import Composed, write_run
from dstune.launch.summary import summary
from dstune.protocols import METHODS, TASKS

RESULT = {
    "status": "completed",
    "reason": "",
    "steps": 14,
    "world_size": 2,
    "tokens": 28672,
    "seconds": 142.4,
    "tokens_per_second": 203.4,
    "peak_memory_gib": 1.913,
    "eval_initial": {"loss": 3.4, "perplexity": 29.96},
    "eval_final": {"loss": 2.9, "perplexity": 18.17},
    "best": {"metric": "loss", "value": 2.9, "step": 14},
    "test": {"accuracy": 0.8125},
}


def test_a_finished_run(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "export").mkdir()
    result = {**RESULT, "export": str(tmp_path / "export"), "checkpoint": str(tmp_path / "gone")}
    (tmp_path / "result.json").write_text(json.dumps(result))
    rows = [
        {"step": 0, "prompt": "Hi", "reference": "Hello!", "answer": "Hi Hi\x1b[2J"},
        {"step": 0, "prompt": "Other", "reference": "", "answer": "-"},
        {"step": 14, "prompt": "Hi", "reference": "Hello!", "answer": "Hey there"},
    ]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    value_by_title = {line[:15].strip(): line[15:] for line in summary(tmp_path).splitlines() if line}
    assert value_by_title == {
        "held-out loss": "3.4000 -> 2.9000",
        "perplexity": "29.9600 -> 18.1700",
        "best": "loss 2.9000 at step 14",
        "test accuracy": "0.8125",
        "training": "14 steps, 28,672 tokens, 142 s, 201 tokens/s (203 in steps), peak memory 1.91 GiB a rank, 2 ranks",
        "prompt": "Hi",
        "before": "Hi Hi [2J",  # a model's text cannot clear the user's screen
        "after": "Hey there",
        "reference": "Hello!",
        "run": str(tmp_path),
        "result": str(tmp_path / "result.json"),
        "export": str(tmp_path / "export"),
        "logs": str(tmp_path / "logs"),
    }


def test_speeds_agree_with_their_line_and_few_rows_are_counted(tmp_path):
    result = {**RESULT, "tokens": 10_230, "seconds": 499.0, "tokens_per_second": 39.0, "held_out_rows": 12}
    (tmp_path / "result.json").write_text(json.dumps(result))
    shown = summary(tmp_path)
    assert "10,230 tokens, 499 s, 21 tokens/s (39 in steps)," in shown
    assert "held-out rows  12, so these metrics say little" in shown
    (tmp_path / "result.json").write_text(json.dumps({**result, "tokens_per_second": 20.5, "held_out_rows": 20}))
    shown = summary(tmp_path)
    assert "499 s, 21 tokens/s (20 in steps)" in shown
    assert "held-out rows" not in shown


def test_the_metrics_are_those_of_the_exported_weights(tmp_path):
    result = {**RESULT, "weights_step": 10, "overfitting": {"gap": 0.5, "training_loss": 2.4}}
    (tmp_path / "result.json").write_text(json.dumps(result))
    rows = [
        {"step": 10, "loss": 2.6},
        {"step": 10, "eval/loss": 2.75, "eval/seconds": 3.0},
        {"step": 14, "eval/loss": 2.9},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    value_by_title = {line[:15].strip(): line[15:] for line in summary(tmp_path).splitlines() if line}
    assert value_by_title["held-out loss"] == "3.4000 -> 2.7500"
    assert value_by_title["weights"] == "of step 10, the best; the run ended at step 14"
    assert "best" not in value_by_title and "seconds" not in value_by_title


@pytest.mark.parametrize(
    ("confusion", "line"),
    [
        ([[7, 0], [12, 0]], "left for all 19 held-out rows, of which 7 have this label"),
        ([[0, 7], [0, 12]], "right for all 19 held-out rows, of which 12 have this label"),
        ([[6, 1], [12, 0]], None),
        ([[19, 0], [0, 0]], None),
        ([], None),
    ],
)
def test_a_class_that_takes_all_rows_is_named(tmp_path, confusion, line):
    """Its accuracy may look well, and its matrix is seen by nobody."""
    result = {**RESULT, "confusion": confusion, "labels": ["left", "right"]}
    (tmp_path / "result.json").write_text(json.dumps(result))
    (found,) = [text[15:] for text in summary(tmp_path).splitlines() if text.startswith("predicted")] or [None]
    assert found == line


def test_a_gap_that_is_not_finite_costs_no_other_line(tmp_path):
    result = {**RESULT, "overfitting": {"gap": None, "training_loss": 2.4}}
    (tmp_path / "result.json").write_text(json.dumps(result))
    assert "held-out loss" in summary(tmp_path)


def test_long_texts_are_wrapped_and_cut(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps({"status": "stopped", "reason": "no gain", "steps": 1}))
    row = {"step": 3, "prompt": "first " + "word " * 400 + "last", "reference": "", "answer": ""}
    (tmp_path / "samples.jsonl").write_text(json.dumps(row) + "\n")
    text = summary(tmp_path)
    assert max(map(len, text.splitlines())) <= 120
    assert "word last" in text  # the end of a prompt is what is answered
    assert "first" not in text
    assert "(nothing)" in text
    assert "no gain" in text


def test_files_that_are_missing_or_incomplete(tmp_path):
    (tmp_path / "samples.jsonl").write_text('{"step": 0, "pro')
    assert str(tmp_path) in summary(tmp_path)


GENERATE, SERVE = "generate {} --prompt '...'", "serve {}"


@pytest.mark.parametrize(
    ("task", "method", "export", "commands"),
    [
        ("chat", "lora", {}, [GENERATE, SERVE]),
        ("chat", "prompt", {}, [GENERATE]),
        ("seq2seq", "full", {"config.json": {"is_encoder_decoder": True}}, [GENERATE]),
        ("seq2seq", "lora", {"adapter_config.json": {"task_type": "SEQ_2_SEQ_LM"}}, [GENERATE]),
        ("classification", "prompt", {}, ["predict {} --text '...'", SERVE]),
        ("question_answering", "full", {}, ["predict {} --input FILE", SERVE]),
        ("preference", "lora", {}, [GENERATE, SERVE]),
    ],
)
def test_it_ends_with_what_comes_next(tmp_path, monkeypatch, task, method, export, commands):
    monkeypatch.chdir(tmp_path)
    run_dir = tmp_path / "runs" / "of mine"
    (run_dir / "export").mkdir(parents=True)
    for name, content in export.items():
        (run_dir / "export" / name).write_text(json.dumps(content))
    config = run_config(task=TASKS.configs()[task](), method=METHODS.configs()[method]())
    write_run(run_dir / "run.yaml", Composed(config, []))
    (run_dir / "result.json").write_text(json.dumps(RESULT))
    assert "dstune " not in summary(run_dir)  # nothing to go on with
    (run_dir / "result.json").write_text(json.dumps({**RESULT, "export": str(run_dir / "export")}))
    assert "dstune " not in summary(run_dir, commands=False)
    quoted, lines = "'runs/of mine'", summary(run_dir).splitlines()
    found = [line[15:] for line in lines[lines.index("") :] if "dstune " in line]
    assert found == [f"dstune {command.format(quoted)}" for command in commands]
    assert lines[-len(commands) - 1] == "" and lines[-len(commands)].startswith("next ")


def test_a_run_of_a_task_that_is_not_known_here(tmp_path):
    (tmp_path / "run.yaml").write_text("config: {task: {name: own}, method: {name: lora}}")
    (tmp_path / "result.json").write_text(json.dumps({**RESULT, "export": str(tmp_path)}))
    assert summary(tmp_path).splitlines()[-1].startswith("export ")
