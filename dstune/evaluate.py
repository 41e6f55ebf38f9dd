"""The verb `dstune evaluate`: metrics of a run, an export or a model on held-out rows, on as many ranks as training."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from dstune.arguments import VerbParser
from dstune.checkpoint import store
from dstune.checkpoint.export import exported, find_checkpoint, refuse_damaged
from dstune.checkpoint.record import recorded_overrides
from dstune.config.compose import Composed, apply_overrides, compose, read_run, write_run
from dstune.config.launch_schema import LocalConfig
from dstune.config.method_rules import can_merge
from dstune.config.method_schema import AdapterConfig, FullConfig
from dstune.config.schema import InitialWeights, RunConfig, WandbConfig
from dstune.config.task_schema import ClassificationConfig, PreferenceConfig, TaskConfig
from dstune.config.validate import validate
from dstune.errors import EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED, Problem, UserError
from dstune.launch import preflight, records, supervise
from dstune.launch.commands import local_plan
from dstune.launch.console import Console

SPLITS = ("validation", "test")


def main(argv: list[str]) -> int:
    """`dstune evaluate RUN|EXPORT|MODEL`. Raises UserError; returns the exit code."""
    arguments = _parse(argv)
    console = Console(sys.stderr if arguments.json else sys.stdout)
    with tempfile.TemporaryDirectory(prefix="dstune-") as scratch:
        directory = Path(scratch)
        config, checkpoint = _configuration(arguments, directory, console.stage)
        write_run(directory / "run.yaml", Composed(config, arguments.overrides))
        plan = local_plan(config, directory, console=console.kind)
        ranks = tuple(_command(argv, directory, arguments.split, checkpoint) for argv in plan.argv)
        code = supervise.run(config, directory, plan=replace(plan, argv=ranks), console=console)
        if code != EXIT_DONE:
            # There is nothing saved to go on from.
            return EXIT_FAILED if code == EXIT_PREEMPTED else code
        result = records.read_result(directory)
        assert result is not None, "the supervisor saw to it"
    _print(arguments.target, result, as_json=arguments.json)
    return EXIT_DONE


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = VerbParser(prog="dstune evaluate", description="Metrics of a run, an export or a model on held-out rows.")
    parser.add_argument("target", metavar="RUN|EXPORT|MODEL", help="run directory, folder, hub id or sample://NAME")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="with a model, `data=...` and `task=...` at least"
    )
    parser.add_argument("--split", choices=SPLITS, default="validation", help="which rows (default validation)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    arguments = parser.parse_intermixed_args(argv)
    if "=" in arguments.target:
        fix = f"dstune evaluate RUN {arguments.target}"
        raise UserError(Problem("command line", "the run or model comes first", fix, arguments.target))
    return arguments


def _configuration(
    arguments: argparse.Namespace, scratch: Path, stage: Callable[[str], None]
) -> tuple[RunConfig, Path | None]:
    """What the ranks evaluate: a whole model, with the data of the run or of the overrides; where a run's adapter cannot
    become part of its model, the base, the method and the checkpoint to take it from. Raises UserError."""
    path, checkpoint = Path(arguments.target), None
    stored = read_run(path / "run.yaml").config if (path / "run.yaml").is_file() else None
    if stored is not None and isinstance(stored.method, AdapterConfig) and not can_merge(stored.method):
        config = apply_overrides(stored, arguments.overrides)
        checkpoint = find_checkpoint(path, "last")
        refuse_damaged(path, checkpoint)
        if isinstance(config.task, ClassificationConfig):
            config = replace(config, task=replace(config.task, labels=store.read_state(checkpoint)["labels"]))
        config = replace(config, task=_compared(config))
    elif stored is not None:
        config = apply_overrides(stored, arguments.overrides)
        folder = exported(path, scratch, merge=True)
        # Its configuration, tokenizer and chat template are those that the run trained with.
        model = replace(
            config.model,
            path=str(folder),
            revision=None,
            weights=InitialWeights.pretrained,
            chat_template=None,
            config_overrides={},
        )
        config = replace(config, model=model, task=_compared(config))
    else:
        recorded = recorded_overrides(path, arguments.overrides)
        config = compose([f"model.path={_quoted(arguments.target)}", *recorded, *arguments.overrides]).config
    data = config.data
    if not data.train and not data.mixture:
        # Data are prepared with training rows; here they are the ones to be measured, so they are no leak.
        data = replace(data, train=getattr(data, arguments.split), clean=replace(data.clean, leaks=False))
    if isinstance(config.task, PreferenceConfig) and config.task.compares and config.task.reference_model is None:
        reason = f"the rewards of task.loss={config.task.loss.name} are relative to the model that training began with"
        raise UserError(Problem("task.reference_model", reason, "task.reference_model=PATH of that model"))
    config = replace(
        config,
        data=data,
        method=config.method if checkpoint else FullConfig(),
        launch=config.launch if isinstance(config.launch, LocalConfig) else LocalConfig(),  # on this machine
        tracking=replace(config.tracking, wandb=WandbConfig()),
    )
    validate(config)
    return preflight.resolve_run(config, stage, trains=False), checkpoint


def _compared(config: RunConfig) -> TaskConfig:
    """The task of a run, with the model that it began with as the reference."""
    task, model = config.task, config.model
    if not isinstance(task, PreferenceConfig) or not task.compares or task.reference_model is not None:
        return task
    if model.weights is InitialWeights.random:
        reason = (
            "the run began with random weights, which are nowhere to be found, and the rewards are relative to them"
        )
        raise UserError(Problem("task.reference_model", reason, "give another model as the reference"))
    if getattr(config.method, "adapter", None) or getattr(config.method, "frozen_adapters", None):
        reason = "the run began with another adapter, and the rewards are relative to the model with it"
        fix = "task.reference_model=FOLDER of that adapter's run, merged by dstune export RUN --merge"
        raise UserError(Problem("task.reference_model", reason, fix))
    return replace(task, reference_model=model.path, reference_revision=model.revision)


def _quoted(path: str) -> str:
    """`path` as a value of Hydra's grammar, whatever characters it has."""
    escaped = path.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _command(argv: tuple[str, ...], directory: Path, split: str, checkpoint: Path | None) -> tuple[str, ...]:
    """The command of a training rank, turned into one that evaluates."""
    module = argv.index("dstune.worker")
    adapter = () if checkpoint is None else (str(checkpoint),)
    return (*argv[:module], "dstune.evaluate_ranks", str(directory), split, *adapter)


def _print(target: str, result: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"model": target, **{key: value for key, value in result.items() if key != "status"}}))
        return
    print(f"{target}: {result['rows']:,} {result['split']} rows")
    width = max(map(len, result["metrics"]))
    for name, value in result["metrics"].items():
        print(f"  {name:<{width}}  {value:.4f}" if isinstance(value, float) else f"  {name:<{width}}  {value}")
    if "confusion" in result:
        _print_confusion(result["labels"], result["confusion"])
    if result.get("by_type"):
        _print_table("by type", result["by_type"])
    for column, found in result.get("slices", {}).items():
        gap = (
            f", {found['metric']}: worst {found['worst']}, gap {found['gap']:.4f}" if found["worst"] is not None else ""
        )
        _print_table(f"by {column}{gap}", found["values"])
    if result.get("counterfactual"):
        changes = dict(result["counterfactual"])
        by_term = changes.pop("by_term")
        _print_table("with swapped terms", {"all": changes, **by_term})


def _print_table(title: str, rows: dict[str, dict[str, Any]]) -> None:
    """One line a name; columns are all values that any of them has."""
    columns = list(dict.fromkeys(column for values in rows.values() for column in values))
    _print_cells(
        [
            [title, *columns],
            *([name, *(_cell(values.get(column)) for column in columns)] for name, values in rows.items()),
        ]
    )


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def _print_confusion(labels: list[str], confusion: list[list[int]]) -> None:
    rows = [[label, *map(str, counts)] for label, counts in zip(labels, confusion, strict=True)]
    _print_cells([["true \\ predicted", *labels], *rows])


def _print_cells(cells: list[list[str]]) -> None:
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    for row in cells:
        print("  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)))
