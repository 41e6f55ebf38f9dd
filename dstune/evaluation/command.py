"""The verb `dstune evaluate`: metrics of a run, an export or a model on held-out rows, on as many ranks as training."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

from dstune import samples
from dstune.checkpoint import store
from dstune.checkpoint.export import existing_or_new_export, find_checkpoint, model_of_export, refuse_damaged
from dstune.checkpoint.record import recorded_overrides
from dstune.config.compose import compose
from dstune.config.forgetting import measured_alone
from dstune.config.multi_task import is_multi_task
from dstune.config.overrides import quoted
from dstune.config.registered import local_path
from dstune.config.run_file import Composed, read_run, write_run
from dstune.config.run_overrides import apply_overrides
from dstune.config.schema import Automatic, ModelConfig, RunConfig, tracking_class
from dstune.config.trust import Use
from dstune.config.validate import validate
from dstune.core import baseline_file, files, plugins
from dstune.core.arguments import VerbParser, is_path, refuse_place
from dstune.core.errors import EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED, Problem, TrainingFailed, UserError
from dstune.core.model_names import refuse_ambiguous_folder
from dstune.data.inputs import PARTS
from dstune.data.recorded_files import refuse_changed_files
from dstune.evaluation import harness, safety
from dstune.launch import preflight, records, rundir
from dstune.launch.commands import on_this_machine
from dstune.launch.console import Console
from dstune.launch.summary import predicted_alone
from dstune.parallel.none import NoParallelConfig
from dstune.protocols import METHODS, launcher_of, method_of, task_of
from dstune.protocols.launcher import LaunchRequest
from dstune.protocols.task import TaskConfig
from dstune.protocols.task_options import EvaluatesOtherwise, TakesLabels
from dstune.tracking.jsonl import json_text


def main(argv: list[str]) -> int:
    """Run `dstune evaluate RUN|CHECKPOINT|EXPORT|MODEL`. Raises UserError; returns the exit code."""
    code = run_command(argv)
    return EXIT_FAILED if code == EXIT_PREEMPTED else code  # an evaluation saves nothing that it could resume from


def run_command(argv: list[str]) -> int:
    """Run like `main`, but return EXIT_PREEMPTED if a signal ended the ranks."""
    arguments = parse(argv)
    console = Console(sys.stderr if arguments.json else sys.stdout)
    if arguments.harness:
        return _harness(arguments, console.stage)
    if arguments.safety:
        return safety.measure_changes(arguments, console, _configuration)
    if arguments.against:
        from dstune.evaluation.against.command import main as compare

        return compare(arguments, console.stage)
    code, result = measure(arguments, console)
    if result is not None:
        rows = result.pop("row_results", [])
        _print(arguments.target, result, as_json=arguments.json)
        if arguments.output is not None:  # last: a full disk loses no metrics
            _write_rows(arguments.output, rows)
    return code


def measure(arguments: argparse.Namespace, console: Console) -> tuple[int, dict[str, Any] | None]:
    """Evaluate on ranks. Returns their exit code and, if it is 0, the result. Raises UserError."""
    with tempfile.TemporaryDirectory(prefix="dstune-") as scratch:
        directory = Path(scratch)
        config, checkpoint = _configuration(arguments, directory, console.stage)
        write_run(directory / "run.yaml", Composed(config, arguments.overrides, plugins.used_by(config)))
        options = {"split": arguments.split, "shots": arguments.shots, "rows": arguments.output is not None}
        options["checkpoint"] = None if checkpoint is None else str(checkpoint)
        if _is_run(arguments.target):
            options["steps"] = (records.read_result(Path(arguments.target)) or {}).get("steps", 0)
        command = ("dstune.evaluation.ranks", str(directory), json.dumps(options))
        request = LaunchRequest(config, directory, console, command=command, saves=False)
        code = launcher_of(config.launch).start(request)
        if code != EXIT_DONE:
            return code, None
        result = records.read_result(directory)
        assert result is not None, "the supervisor writes a result"
    del result["status"]
    if arguments.shots is not None and _is_run(arguments.target):
        run, model = Path(arguments.target), result["asked"]
        baseline_file.remember(run, model, result["split"], result["rows"], result["prompted"])
    return EXIT_DONE, result


def measure_weights(run: Path, folder: Path) -> dict[str, Any] | None:
    """Evaluate the complete model in `folder` on the rows that `run` held out; return None if it held none out. Raises UserError
    and TrainingFailed."""
    data = _read(run, []).data
    if not (data.validation or data.split.holds_out):
        return None
    arguments = parse([str(run)])
    arguments.weights = folder
    code, result = measure(arguments, Console(sys.stderr))
    if code != EXIT_DONE:
        raise TrainingFailed(f"the evaluation of {folder} ended with exit code {code}")
    return result


def _harness(arguments: argparse.Namespace, stage: Callable[[str], None]) -> int:
    harness.require()
    path = Path(arguments.target)
    shots = arguments.shots
    if shots is not None and len(shots) > 1:
        raise UserError(Problem("--shots", "the harness asks with one number of examples", "--shots 5", str(shots)))
    with tempfile.TemporaryDirectory(prefix="dstune-") as scratch:
        if _is_run(arguments.target):
            stored = _read(path, arguments.overrides)
            config = apply_overrides(_with_rows(stored, path), arguments.overrides)
            folder = str(existing_or_new_export(path, Path(scratch), which=arguments.checkpoint, merge=True))
            config = replace(config, model=replace(config.model, revision=None))
        else:
            config = compose([f"model.path={quoted(arguments.target)}", *arguments.overrides]).config
            folder = arguments.target
            trusts_code = config.model.trust_remote_code
            refuse_ambiguous_folder(folder, "MODEL", trusts_code=trusts_code)
            if not (path / "adapter_config.json").is_file():
                config = replace(config, model=preflight.resolve_model(config.model, stage))
                folder = str(samples.resolve(folder)) if samples.is_sample(folder) else folder
        tasks = [name for name in arguments.harness.split(",") if name]
        with redirect_stdout(sys.stderr):
            results = harness.run(config, folder, tasks, arguments.harness_path, shots[0] if shots else None)
    if arguments.json:
        print(json_text({"model": arguments.target, "harness": results}))
    else:
        harness.show(arguments.target, results)
    return EXIT_DONE


def parse(argv: list[str]) -> argparse.Namespace:
    """Return the arguments of the command line, checked. Raises UserError."""
    parser = VerbParser(prog="dstune evaluate", description="Metrics of a run, an export or a model on held-out rows.")
    parser.add_argument(
        "target",
        metavar="RUN|CHECKPOINT|EXPORT|MODEL",
        help="run directory, folder, hub id or sample://NAME; with --against also a .gguf file or a server's address",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="with a model, `data=...` and `task=...` at least"
    )
    parser.add_argument("--split", choices=PARTS, default="validation", help="which rows (default validation)")
    parser.add_argument("--checkpoint", default="last", help="of a run: a step, `best` or `last` (default)")
    parser.add_argument(
        "--shots",
        type=_numbers,
        metavar="N[,N...]",
        help="evaluate the untuned model instead, prompted with N worked examples before each row (0: none)",
    )
    parser.add_argument(
        "--prompted",
        metavar="MODEL",
        help="with --shots and a run: the model to prompt (default: its base model)",
    )
    parser.add_argument(
        "--harness",
        metavar="TASK[,TASK...]",
        help="run tasks of lm-evaluation-harness instead (needs the extra `harness`)",
    )
    parser.add_argument("--harness-path", type=Path, metavar="FOLDER", help="a folder with your own harness tasks")
    parser.add_argument(
        "--grader",
        action="append",
        default=[],
        metavar="FILE",
        help="let a grader of the fine-tuning API score the answers (JSON; may be repeated)",
    )
    parser.add_argument(
        "--safety",
        action="store_true",
        help="run the packaged probes instead and look for rows that the model recites: what fine-tuning changed",
    )
    parser.add_argument(
        "--against",
        metavar="RUN|MODEL|GGUF|URL",
        help="name what differs between two models; with --safety: the model to compare with (default for a run: its base)",
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="with --against: prompts on which both are compared, as for `dstune generate`",
    )
    parser.add_argument("--served-model", metavar="NAME", help="with --against and a server: the model's name there")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="with --against: run the code that the models' folders bring"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the answer to each row as JSON lines")
    parser.add_argument("--force", action="store_true", help="replace the file of --output")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(weights=None)
    arguments = parser.parse_intermixed_args(argv)
    if arguments.against and not arguments.safety and arguments.target.startswith(("http://", "https://")):
        return arguments
    if not is_path(arguments.target):
        fix = f"dstune evaluate RUN {arguments.target}"
        raise UserError(Problem("command line", "the run or model comes first", fix, arguments.target))
    arguments.target = local_path(arguments.target, "MODEL")
    path = Path(arguments.target)
    if path.is_file() and not (arguments.against and path.suffix == ".gguf"):
        fix = f"give a run, an export or a model, and the rows after it: data.{arguments.split}=FILE"
        raise UserError(Problem("MODEL", "this is a file", fix, arguments.target))
    if store.is_checkpoint(path):
        if arguments.checkpoint != "last":
            reason = "the model is a checkpoint already"
            raise UserError(Problem("--checkpoint", reason, "leave it out", arguments.checkpoint))
        path, arguments.checkpoint = store.run_and_step(path, "MODEL")
        arguments.target = str(path)
    rundir.refuse_missing(path)
    if arguments.output is not None:
        refuse_place(arguments.output, arguments.force)
    safety.check(arguments)
    if not arguments.against or arguments.safety:
        for flag, value in (("--prompts", arguments.prompts), ("--served-model", arguments.served_model)):
            if value is not None:
                raise UserError(
                    Problem(flag, "is read by --against alone", f"dstune evaluate MODEL --against MODEL {flag} {value}")
                )
    if arguments.checkpoint != "last" and (arguments.shots is not None or not _is_run(arguments.target)):
        reason = "only a run has checkpoints" if arguments.shots is None else "--shots prompts the untuned model"
        fix = f"give {arguments.target} without a checkpoint"
        raise UserError(Problem("--checkpoint", reason, fix, arguments.checkpoint))
    if arguments.prompted and (arguments.shots is None or not _is_run(arguments.target)):
        fix = "dstune evaluate RUN --shots 0,4 --prompted MODEL"
        raise UserError(
            Problem(
                "--prompted",
                "it needs --shots and a run, whose rows the model is prompted with",
                fix,
                arguments.prompted,
            )
        )
    return arguments


def _numbers(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError("numbers of examples, for example 0,4")
    return sorted({int(part) for part in parts})


def _is_run(target: str) -> bool:
    return (Path(target) / "run.yaml").is_file()


def _configuration(
    arguments: argparse.Namespace, scratch: Path, stage: Callable[[str], None]
) -> tuple[RunConfig, Path | None]:
    """Return what `_resolve` returns. Raises UserError, also if files of the run's rows have changed since its training."""
    config, checkpoint = _resolve(arguments, scratch, stage)
    if _is_run(arguments.target):
        part = f"data.{arguments.split}"
        named = {word.partition("=")[0] for word in arguments.overrides}
        if part in named and arguments.shots is None:
            named.add("data.train")  # not read
        refuse_changed_files(
            Path(arguments.target), config, f"name the rows to measure: {part}=FILE", except_keys=named
        )
    return config, checkpoint


def _resolve(
    arguments: argparse.Namespace, scratch: Path, stage: Callable[[str], None]
) -> tuple[RunConfig, Path | None]:
    """Return the configuration that the ranks evaluate, with the data of the run or of the overrides: of a complete model; or, if a
    run's adapter cannot be merged, of the base model and the method, with the adapter's checkpoint. Raises UserError."""
    path, checkpoint = Path(arguments.target), None
    stored = None
    if (path / "run.yaml").is_file():
        stored = _with_rows(measured_alone(_read(path, arguments.overrides)), path)
    if stored is not None and arguments.shots is not None:
        return _prompted(apply_overrides(stored, arguments.overrides), arguments, stage), None
    method = None if stored is None else method_of(stored.method)
    if stored is not None and method is not None and method.adapter and not method.merges:
        config = apply_overrides(stored, arguments.overrides)
        checkpoint = find_checkpoint(path, arguments.checkpoint)
        refuse_damaged(path, checkpoint)
        if isinstance(task := task_of(config.task), TakesLabels):
            config = replace(config, task=task.with_labels(store.read_state(checkpoint)["labels"]))
        config = replace(config, task=_for_evaluation(config))
    elif stored is not None:
        config = apply_overrides(stored, arguments.overrides)
        folder = arguments.weights or existing_or_new_export(path, scratch, which=arguments.checkpoint, merge=True)
        model = model_of_export(config.model, folder)
        config = replace(config, model=model, task=_for_evaluation(config))
    else:
        recorded = recorded_overrides(path, arguments.overrides)
        config = compose([f"model.path={quoted(arguments.target)}", *recorded, *arguments.overrides]).config
    if arguments.shots is not None:
        return _prompted(config, arguments, stage), None
    if arguments.grader:
        config = replace(config, task=_with_graders(config.task, arguments.grader))
    data = config.data
    names_rows = any(word.startswith(f"data.{arguments.split}=") for word in arguments.overrides)
    if stored is not None and names_rows and arguments.split != "train":
        data = replace(data, train=None, mixture={})  # the training rows are not needed
    if not data.train and not data.mixture:
        # Preparation needs training rows. Here they are the measured rows themselves, which is no leak.
        data = replace(data, train=getattr(data, arguments.split), clean=replace(data.clean, leaks=False))
    if isinstance(task := task_of(config.task), EvaluatesOtherwise):
        task.check_evaluation()
    config = replace(
        config,
        data=data,
        method=config.method if checkpoint else METHODS.default(),
        launch=on_this_machine(config.launch),
        tracking=tracking_class()(),
        parallel=NoParallelConfig(),  # without gradients a long row fits on one rank
    )
    validate(config)
    return preflight.resolve_run(config, stage, trains=False), checkpoint


def _read(run: Path, overrides: Sequence[str]) -> RunConfig:
    return read_run(run / "run.yaml", overrides, use=Use.rows).config


def _with_rows(config: RunConfig, run: Path) -> RunConfig:
    """Return `config` of `run`, with the micro-batch size that the run measured instead of `auto`."""
    if config.trainer.micro_batch_size is not Automatic.auto:
        return config
    micro_batch = (records.read_result(run) or {}).get("micro_batch") or {}
    return replace(
        config, trainer=replace(config.trainer, micro_batch_size=micro_batch.get("rows", config.trainer.rows))
    )


def _with_graders(task: TaskConfig, files: list[str]) -> TaskConfig:
    """Return `task` with these graders in addition to its rewards. Raises UserError if the task does not score the model's
    answers."""
    if not hasattr(task, "graders"):
        reason = f"task={task.name} has no answers to prompts that a grader could score"
        fix = "dstune evaluate MODEL task=reinforcement data.validation=PROMPTS --grader FILE; of a run give RUN/export"
        raise UserError(Problem("--grader", reason, fix, files[0]))
    graders = [str(Path(file).absolute()) for file in files]
    changed: TaskConfig = replace(task, graders=graders, reward_weights=[])  # type: ignore[call-arg]
    return changed


def _for_evaluation(config: RunConfig) -> TaskConfig:
    task = task_of(config.task)
    return task.for_evaluation(config) if isinstance(task, EvaluatesOtherwise) else config.task


def _prompted(config: RunConfig, arguments: argparse.Namespace, stage: Callable[[str], None]) -> RunConfig:
    """Return the configuration for prompting the untuned model, with training rows for the examples. Raises UserError."""
    problems = []
    if not config.data.train and not config.data.mixture and any(arguments.shots):
        reason = "worked examples come from training rows"
        problems.append(Problem("--shots", reason, "data.train=FILE, or --shots 0", str(max(arguments.shots))))
    if not task_of(config.task).few_shot:
        reason = f"task={config.task.name} has no answers that a prompted model could give"
        problems.append(Problem("--shots", reason, "leave --shots out"))
    if is_multi_task(config):
        reason = "the rows belong to several tasks, but worked examples show one task"
        problems.append(Problem("--shots", reason, "leave --shots out"))
    if config.data.streaming:
        problems.append(Problem("data.streaming", "examples are drawn from all training rows", "data.streaming=false"))
    if problems:
        raise UserError(problems)
    data = config.data
    if not data.train and not data.mixture:
        data = replace(data, train=getattr(data, arguments.split), clean=replace(data.clean, leaks=False))
    if arguments.prompted:
        config = replace(config, model=ModelConfig(path=arguments.prompted))
    tracking = tracking_class()()
    launch = on_this_machine(config.launch)
    data = replace(data, packing=False)
    alone = NoParallelConfig()
    config = replace(config, data=data, method=METHODS.default(), launch=launch, tracking=tracking, parallel=alone)
    validate(config)
    return preflight.resolve_run(config, stage)


def _print(target: str, result: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json_text({"model": target, **result}))
        return
    if "prompted" in result:
        _print_prompted(target, result)
        return
    print(f"{target}: {result['rows']:,} {result['split']} rows")
    if result.get("left_out"):
        print(f"  {result['left_out']:,} rows of the file are bad and left out (data.on_bad_row=skip)")
    width = max(map(len, result["metrics"]))
    for name, value in result["metrics"].items():
        print(f"  {name:<{width}}  {value:.4f}" if isinstance(value, float) else f"  {name:<{width}}  {value}")
    if "confusion" in result:
        _print_confusion(result["labels"], result["confusion"])
        if line := predicted_alone(result):
            print(f"  predicted: {line}")
    if result.get("by_type"):
        _print_table("by type", result["by_type"])
    for column, slice_result in result.get("slices", {}).items():
        gap = (
            f", {slice_result['metric']}: worst {slice_result['worst']}, gap {slice_result['gap']:.4f}"
            if slice_result["worst"] is not None
            else ""
        )
        _print_table(f"by {column}{gap}", slice_result["values"])
    if result.get("counterfactual"):
        changes = dict(result["counterfactual"])
        by_term = changes.pop("by_term")
        _print_table("with swapped terms", {"all": changes, **by_term})


def _print_table(title: str, rows: dict[str, dict[str, Any]]) -> None:
    """Print one line per name, with a column for each value that any of them has."""
    columns = list(dict.fromkeys(column for values in rows.values() for column in values))
    _print_cells(
        [
            [title, *columns],
            *([name, *(_cell(values.get(column)) for column in columns)] for name, values in rows.items()),
        ]
    )


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def _print_prompted(target: str, result: dict[str, Any]) -> None:
    """Print a column for each number of examples."""
    print(f"{result['asked']}, untuned: {result['rows']:,} {result['split']} rows of {target}")
    columns = [(f"{prompted['shots']} examples", prompted["metrics"]) for prompted in result["prompted"]]
    names = list(columns[0][1])
    print(" " * (2 + max(map(len, names))) + "".join(f"{head:>14}" for head, _ in columns))
    for name in names:
        print(f"  {name:<{max(map(len, names))}}" + "".join(f"{metrics[name]:>14.4f}" for _, metrics in columns))


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    try:
        files.write(path, "".join(json_text(row, ensure_ascii=False) + "\n" for row in rows))
    except OSError as error:
        reason = f"cannot be written: {error.strerror or error}"
        raise UserError(Problem("--output", reason, "give a file in another folder", str(path))) from None


def _print_confusion(labels: list[str], confusion: list[list[int]]) -> None:
    rows = [[label, *map(str, counts)] for label, counts in zip(labels, confusion, strict=True)]
    _print_cells([["true \\ predicted", *labels], *rows])


def _print_cells(cells: list[list[str]]) -> None:
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    for row in cells:
        print("  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)))
