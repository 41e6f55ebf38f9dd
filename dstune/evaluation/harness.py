"""`dstune evaluate --harness TASKS`: the public benchmarks of lm-evaluation-harness, in one process.

Tasks are prompted as plain text, as in published tables, without a chat template.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dstune.config.schema import RunConfig
from dstune.core.errors import Problem, UserError, first_line
from dstune.core.parsing import object_in


def require() -> None:
    """Raise UserError if lm-eval is not installed."""
    if find_spec("lm_eval") is None:
        fix = "pip install '.[harness]' in a clone of dstune"
        raise UserError(Problem("--harness", "the package lm-eval is not installed", fix))


def run(
    config: RunConfig, folder: str, tasks: Sequence[str], task_files: Path | None, shots: int | None
) -> dict[str, dict[str, Any]]:
    """Return metrics by task of the model in `folder` (or of the adapter there).

    config: only `model`, `evaluate.max_rows` and `evaluate.micro_batch_size` are used. task_files: a folder with the user's tasks.
    shots: number of worked examples; each task's default if None.

    Raises UserError if a task does not exist or its data cannot be loaded.
    """
    require()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    manager = TaskManager(include_path=str(task_files) if task_files else None)
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown:
        fix = "the tasks are listed by `lm-eval ls tasks`; --harness-path FOLDER adds your own"
        raise UserError(Problem("--harness", "there is no such task", fix, name) for name in unknown)
    batch_size = config.evaluate.micro_batch_size or config.trainer.rows
    options: dict[str, Any] = {"trust_remote_code": config.model.trust_remote_code, "batch_size": batch_size}
    if config.model.revision is not None:
        options["revision"] = config.model.revision
    adapter = Path(folder) / "adapter_config.json"
    if adapter.is_file():
        options["peft"], folder = folder, str(object_in(adapter).get("base_model_name_or_path"))
    from dstune.zero import accelerator

    model = HFLM(pretrained=folder, device=accelerator.kind(), **options)
    try:
        outcome = simple_evaluate(
            model,
            tasks=list(tasks),
            num_fewshot=shots,
            limit=config.evaluate.max_rows,
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=1000,
        )
    except (OSError, ConnectionError) as error:
        reason = f"its rows cannot be loaded: {first_line(error)}"
        fix = "run it once where the model hub is reachable, or give tasks with local rows (--harness-path FOLDER)"
        raise UserError(Problem("--harness", reason, fix, ",".join(tasks))) from error
    assert outcome is not None, "there is one process"
    return {name: _plain(metrics) for name, metrics in outcome["results"].items()}


def _plain(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers by metric; names omit the filter `none`."""
    return {
        key.removesuffix(",none"): value
        for key, value in metrics.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def show(target: str, results: dict[str, dict[str, Any]], message: Callable[[str], None] = print) -> None:
    """Print the results as a table."""
    message(f"{target}: lm-evaluation-harness")
    rows = [(task, name, value) for task, metrics in results.items() for name, value in metrics.items()]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for task, name, value in rows:
        message(f"  {task:<{widths[0]}}  {name:<{widths[1]}}  {value:.4f}")
