"""`trainer_state.json`: a run's metrics as the Trainer of transformers writes them, for tools that read that file."""

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
"""Training steps in `log_history`; of a longer run every second, third, ... one is."""

NAMES = {"lr": "learning_rate", "eval/seconds": "eval_runtime"}
"""Trainer's names of metrics that are called otherwise here."""

OF_STEPS = ("epoch", "loss", "lr", "grad_norm")


def write_trainer_state(
    run_dir: Path, config: RunConfig, result: Mapping[str, Any], total_steps: int, *, epochs: float | None
) -> Path:
    """Write the file from `metrics.jsonl` and the content of `result.json`. Returns its path.

    total_steps: of the whole run. epochs: passes over the training rows in them, where that is known.
    """
    steps = int(result["steps"])
    every = max(1, -(-steps // MOST_STEPS))
    history = list(_history(run_dir / "metrics.jsonl", every))
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
        "logging_steps": every,
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


def _history(path: Path, every: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of `metrics.jsonl`, each with its step last, as Trainer has them."""
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
            elif step % every == 0 or step == 1:
                yield {**{NAMES.get(name, name): row[name] for name in OF_STEPS if name in row}, "step": step}
