"""The program of each rank of `dstune evaluate`: `python -m dstune.evaluation.ranks DIR OPTIONS`.

OPTIONS is JSON: split, shots, rows, safety, checkpoint.

It works as in training, but without an optimizer, and saves nothing. ZeRO-3 partitions the weights; otherwise every rank holds the
complete model.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dstune.checkpoint.adapters import load_trained
from dstune.checkpoint.own_labels import with_labels
from dstune.config.convert import format_value
from dstune.config.run_file import read_decided
from dstune.config.schema import OptimizerOffload, Precision, RunConfig, stage_of
from dstune.core.distributed import World
from dstune.core.errors import Problem, UserError
from dstune.core.paths import cache_root
from dstune.core.rank_env import RankEnv
from dstune.data.build import prepare
from dstune.data.prepared import PreparedData, Split
from dstune.generation.answers import write_texts
from dstune.models.activation_rounding import round_activations
from dstune.models.heads import Head
from dstune.models.kernels import use_kernels
from dstune.models.load import load_config, load_model, load_tokenizer
from dstune.models.lora_sum import use_joint_sums
from dstune.models.packed_attention import attention_of_samples
from dstune.protocols import Task, method_of, task_of
from dstune.protocols.task_options import NeedsReference
from dstune.rank import process
from dstune.rank.finalize import write_result
from dstune.tracking.console import Console, show_activities
from dstune.trainer import baseline
from dstune.trainer.evaluate import Evaluator, limited
from dstune.trainer.measure import Evaluation, count_rows
from dstune.trainer.safety import measure_safety
from dstune.trainer.sanity_checks import check_padding, examine, refuse_uneven_gathers, verify_rows
from dstune.trainer.sight import prove_images
from dstune.zero import accelerator
from dstune.zero.ds_config import deepspeed_config
from dstune.zero.engine import Engine
from dstune.zero.parts import partitioned_loading
from dstune.zero.precision import DTYPES, resolve
from dstune.zero.start import start_process_group

activity = logging.getLogger("dstune.evaluation.ranks")  # not __name__, which is __main__ in a rank


def evaluate(
    config: RunConfig,
    directory: Path,
    split: str,
    checkpoint: Path | None,
    world: World,
    *,
    shots: Sequence[int] | None = None,
    with_rows: bool = False,
    safety: bool = False,
    steps: int = 0,
) -> None:
    """Evaluate the whole model in `config.model` on a split; rank 0 writes `result.json` into `directory`.

    checkpoint: of an adapter, whose base is `config.model`; None if the model is complete. shots: numbers of worked examples; for
    each, the untuned model is prompted instead. with_rows: whether the result contains the answer to each row. safety: run the
    probes of `trainer.safety` instead. steps: number of steps of the run, for rewards that ask.

    Raises UserError if the split does not exist, or the model does not fit the task.
    """
    console = Console() if world.is_main else None
    if console:
        show_activities(console)
    precision = Precision[world.broadcast(resolve(config).name)]
    if checkpoint is None and shots is None:
        config = with_labels(config)
    stage = 3 if stage_of(config.zero) == 3 else 0
    config = replace(config, zero=replace(config.zero, stage=stage, offload_optimizer=OptimizerOffload.none))
    tokenizer = load_tokenizer(config.model)
    data = prepare(config, tokenizer, world.env, cache_root(), trains=False, write=write_texts)
    part = data.train if safety else _rows_of(data, split)
    task = task_of(config.task)
    if isinstance(task, NeedsReference):
        data = task.before_loading(config, data, tokenizer, world, precision)
        part = part if safety else _rows_of(data, split)
    message = console.message if console else lambda text: None
    is_prompted = shots is not None
    engine, head = _build(config, task, data, tokenizer, checkpoint, precision, world, message, prompted=is_prompted)
    if safety:
        measured_safety = measure_safety(config, data, engine, tokenizer, world)
        if world.is_main:
            write_result(directory, {"status": "completed", "safety": measured_safety})
        world.barrier()
        return
    trained = {"global_step": steps, "max_steps": steps, "epoch": float(config.trainer.epochs if steps else 0)}
    evaluator = Evaluator(config, data, engine, head, world, tokenizer, lambda: trained)
    doing = "evaluating" if shots is None else "prompting the untuned model"
    progress = partial(console.activity, doing) if console else None
    if shots is None:
        measured, row_results = _measure(evaluator, part, config, data.labels, progress, message)
    else:
        prompted = baseline.measure_prompted(
            config, data, engine, head, tokenizer, world, part, shots, progress=progress
        )
        metrics = [{"shots": answers.shots, "metrics": answers.evaluation.metrics} for answers in prompted]
        measured = {"asked": format_value(config.model.path), "prompted": metrics}
        row_results = [
            {"shots": answers.shots, **row}
            for answers in prompted
            for row in results_in_file_order(answers.evaluation, part, config, data.labels)
        ]
    if world.is_main:
        rows = count_rows(limited(part, config.evaluate.max_rows, config.task), config.task)
        result = {"status": "completed", "split": split, "rows": rows, "world_size": world.size, **measured}
        if left_out := data.report.get(split, {}).get("bad_rows"):
            result["left_out"] = left_out
        write_result(directory, result | ({"row_results": row_results} if with_rows else {}))
    world.barrier()


def _rows_of(data: PreparedData, split: str) -> Split:
    """Return the rows to evaluate. Raises UserError if there are none."""
    part: Split | None = getattr(data, split)
    if part is None:
        fix = f"give data.{split}=FILE"
        if split in ("validation", "test"):
            fix += f", or data.split.{split}=0.1 to hold rows out"
        raise UserError(Problem("--split", f"there are no {split} rows", fix, split))
    return part


def _build(
    config: RunConfig,
    task: Task,
    data: PreparedData,
    tokenizer: Any,
    checkpoint: Path | None,
    precision: Precision,
    world: World,
    message: Callable[[str], None],
    *,
    prompted: bool,
) -> tuple[Engine, Head]:
    """Return the engine and the head. prompted: use the model as a language model, whatever the task's head."""
    loaded = baseline.as_language_model(config) if prompted else config
    settings = deepspeed_config(config, world.size, precision, on_gpu=accelerator.present())
    activity.info("loading the model")
    with partitioned_loading(settings):
        model = load_model(loaded, tokenizer, data.labels if loaded is config else (), DTYPES[precision])
    module = model if checkpoint is None else method_of(config.method).apply(model, config)
    if checkpoint is not None:
        load_trained(module, checkpoint)
    elif not prompted:
        round_activations(model, getattr(load_config(config.model), "quantization_config", None))
    # As in training, so that its numbers are the same.
    has_images = data.train.images is not None  # then masks separate samples
    attention = None if has_images else attention_of_samples(loaded, model, world, message)
    use_kernels(module, config.model, message)
    use_joint_sums(module)
    head = (task if loaded is config else task_of(loaded.task)).head(model, attention)
    engine = Engine(module, None, settings, world)
    refuse_uneven_gathers(config, model, world)
    examine(head, engine, model, config.model.path)
    verify_rows(config, engine, head, attention, model.config.get_text_config(), world, message, has_images=has_images)
    if getattr(head, "rows", None) is None:
        check_padding(config, engine, model, tokenizer, data, world, message)
    prove_images(config, engine, data, world, message)
    return engine, head


def _measure(
    evaluator: Evaluator,
    part: Split,
    config: RunConfig,
    labels: Sequence[str],
    progress: Callable[..., None] | None,
    message: Callable[[str], None],
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Evaluate `part`. Returns fields of `result.json`, and the result of each row."""
    evaluation = evaluator(part, progress)
    for warning in evaluation.warnings:
        message(f"warning: {warning}")
    measured: dict[str, Any] = {"metrics": evaluation.metrics}
    changes = evaluator.counterfactual(part)
    if changes is not None:
        measured["counterfactual"] = changes
    if evaluation.details:
        measured |= {"labels": list(labels), **evaluation.details}
    return measured, results_in_file_order(evaluation, part, config, labels)


def results_in_file_order(
    evaluation: Evaluation, part: Split, config: RunConfig, labels: Sequence[str]
) -> list[dict[str, Any]]:
    """Return the result of each row, with its FILE:LINE as `row`, in the order of the files.

    The places of training rows, and of rows cached by an earlier version, are unknown: their results keep the order of evaluation.
    """
    results = evaluation.row_results(labels)
    measured = limited(part, config.evaluate.max_rows, config.task)
    if evaluation.generated:
        measured = limited(measured, config.evaluate.generate_rows, config.task)
    if measured.places is None or measured.origins is None:
        return results
    numbers = np.unique(measured.origins)
    if len(numbers) != len(results):
        return results
    everywhere = json.loads(measured.places.read_text())
    rows = [{"row": everywhere[number], **result} for number, result in zip(numbers, results, strict=True)]
    return sorted(rows, key=_file_and_line)


def _file_and_line(row: dict[str, Any]) -> tuple[str, int]:
    file, _, line = row["row"].rpartition(":")
    return file, int(line)


def run(directory: Path, env: RankEnv, options: str) -> None:
    config, world = read_decided(directory / "run.yaml").config, start_process_group(env)
    settings = json.loads(options)
    checkpoint = None if settings["checkpoint"] is None else Path(settings["checkpoint"])
    shots, with_rows = settings["shots"], settings["rows"]
    safety = settings.get("safety", False)
    flags = {"with_rows": with_rows, "safety": safety, "steps": settings.get("steps", 0)}
    evaluate(config, directory, settings["split"], checkpoint, world, shots=shots, **flags)


if __name__ == "__main__":
    process.main(run)
