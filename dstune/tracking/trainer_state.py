"""Writes `trainer_state.json`: a run's metrics in the format of the transformers Trainer, for tools that read that file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dstune.config.schema import RunConfig
from dstune.core import files
from dstune.core.parsing import parse_json
from dstune.tracking.jsonl import json_text

FILE = "trainer_state.json"
MOST_STEPS = 10_000
"""Most training steps in `log_history`; of a longer run only every second, third, ... step is written."""

NAMES = {"lr": "learning_rate", "eval/seconds": "eval_runtime"}
"""Trainer's name for each metric that has another name here."""

STEP_METRICS = ("epoch", "loss", "lr", "grad_norm")


def write_trainer_state(
    run_dir: Path, config: RunConfig, result: Mapping[str, Any], total_steps: int, *, epochs: float | None
) -> Path:
    """Write the file from `metrics.jsonl` and `result`, the content of `result.json`, and return its path.

    total_steps: planned optimizer steps. epochs: passes over the training rows in these, if known.
    """
    steps = int(result["steps"])
    interval = max(1, -(-steps // MOST_STEPS))
    history = list(_read_history(run_dir / "metrics.jsonl", interval))
    best = result.get("best") or {}
    content: dict[str, Any] = {
        "best_global_step": best.get("step"),
        "best_metric": best.get("value"),
        "best_model_checkpoint": None,
        "epoch": next((row["epoch"] for row in reversed(history) if "epoch" in row), None),
        "eval_steps": None,
        "global_step": steps,
        "is_hyper_param_search": False,
        "is_local_process_zero": True,
        "is_world_process_zero": True,
        "log_history": history,
        "logging_steps": interval,
        "max_steps": total_steps,
        "num_input_tokens_seen": result.get("tokens") or 0,
        "num_train_epochs": epochs,
        "save_steps": None,
        "stateful_callbacks": {},
        "total_flos": 0,
        "train_batch_size": None if not isinstance(config.trainer.micro_batch_size, int) else config.trainer.rows,
        "trial_name": None,
        "trial_params": None,
    }
    path = run_dir / FILE
    files.write(path, json_text(content, indent=2) + "\n")
    return path


def _read_history(path: Path, interval: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of `metrics.jsonl` under Trainer's names: all evaluations, and every `interval`-th training step."""
    epoch: float | None = None
    if not path.is_file():
        return
    with path.open("rb") as stream:
        for line in stream:
            row = parse_json(line)
            step = row["step"]
            evaluation = {
                NAMES.get(name, f"eval_{name.removeprefix('eval/').replace('/', '_')}"): value
                for name, value in row.items()
                if name.startswith("eval/")
            }
            epoch = row.get("epoch", epoch)
            if evaluation:
                yield {**({} if epoch is None else {"epoch": epoch}), **evaluation, "step": step}
            elif step % interval == 0 or step == 1:
                yield {**{NAMES.get(name, name): row[name] for name in STEP_METRICS if name in row}, "step": step}
