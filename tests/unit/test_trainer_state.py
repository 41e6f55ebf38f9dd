"""`trainer_state.json` is read by transformers' own class, and has the numbers of `metrics.jsonl`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.configs import run_config
from transformers import TrainerState

from dstune.tracking import trainer_state
from dstune.tracking.trainer_state import write_trainer_state

ROWS = [
    {"step": 0, "eval/loss": 2.5, "eval/seconds": 1.0},
    {"step": 1, "epoch": 0.25, "loss": 2.0, "lr": 1e-4, "grad_norm": 0.5, "tokens": 10, "skipped": "spike"},
    {"step": 2, "epoch": 0.5, "loss": None, "lr": 5e-5, "grad_norm": 0.25, "tokens": 20},
    {"step": 2, "eval/loss": 1.5, "eval/shop/accuracy": 0.75, "eval/seconds": 2.0},
]
RESULT = {"steps": 2, "tokens": 20, "best": {"metric": "loss", "value": 1.5, "step": 2}}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


def test_transformers_reads_it(run_dir):
    state = TrainerState.load_from_json(str(write_trainer_state(run_dir, run_config(), RESULT, 4, epochs=1.0)))
    assert (state.global_step, state.max_steps, state.num_train_epochs, state.epoch) == (2, 4, 1.0, 0.5)
    assert (state.best_metric, state.best_global_step, state.num_input_tokens_seen) == (1.5, 2, 20)
    assert state.log_history == [
        {"eval_loss": 2.5, "eval_runtime": 1.0, "step": 0},
        {"epoch": 0.25, "loss": 2.0, "learning_rate": 1e-4, "grad_norm": 0.5, "step": 1},
        {"epoch": 0.5, "loss": None, "learning_rate": 5e-5, "grad_norm": 0.25, "step": 2},
        {"epoch": 0.5, "eval_loss": 1.5, "eval_shop_accuracy": 0.75, "eval_runtime": 2.0, "step": 2},
    ]


def test_a_long_run_lists_every_so_many_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_state, "MOST_STEPS", 3)
    rows = [{"step": step, "epoch": step / 10, "loss": 1.0} for step in range(1, 11)] + [{"step": 9, "eval/loss": 2.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_trainer_state(tmp_path, run_config(), {"steps": 10}, 10, epochs=None)
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert state["logging_steps"] == 4
    assert [row["step"] for row in state["log_history"]] == [1, 4, 8, 9]


def test_a_run_that_measured_nothing_has_one_too(tmp_path):
    write_trainer_state(tmp_path, run_config(), {"steps": 0}, 10, epochs=1.0)
    assert json.loads((tmp_path / "trainer_state.json").read_text())["log_history"] == []
