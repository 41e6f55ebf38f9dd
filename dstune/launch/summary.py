"""The page that `dstune train` ends with, from the files of the run."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dstune.config.run_file import read_run_content
from dstune.core.errors import UserError
from dstune.core.parsing import METRICS_BYTES, is_encoder_decoder, parse_json, read_file
from dstune.launch import records
from dstune.protocols import METHODS, TASKS
from dstune.tracking.console import FEW_ROWS

COLUMN = 14
COUNTS = ("rows", "targets", "tokens", "seconds", "generated")
TEXT_WIDTH = 96
MAX_CHARACTERS = 600


def summary(run_dir: Path, *, commands: bool = True) -> str:
    """Return the results of a finished run, one answered prompt, and the paths of its files. commands: whether to end with the
    commands that come next."""
    result = records.read_result(run_dir) or {}
    lines = [""]
    for section in (
        lambda: _losses(_of_the_weights(run_dir, result)),
        lambda: _cost(result),
        lambda: [_entry("stopped", str(result["reason"]))] if result.get("reason") else [],
        lambda: _answers(run_dir),
    ):
        # Malformed files in the directory cost a section of the page, not the command.
        with suppress(TypeError, ValueError, LookupError, AttributeError, ArithmeticError):
            lines += section()
    lines += ["", *_paths(run_dir, result)]
    if commands and result.get("export"):
        with suppress(UserError, TypeError, LookupError):
            lines += ["", *_next(run_dir, result)]
    return "\n".join(lines)


def _of_the_weights(run_dir: Path, result: Mapping[str, Any]) -> dict[str, Any]:
    """Return `result` with the metrics of the exported weights, if these are not the last ones (`run.export=best`)."""
    step, last = result.get("weights_step"), result.get("steps")
    if step is None or step == last:
        return dict(result)
    evaluation: dict[str, Any] = {}
    for row in _rows(run_dir / "metrics.jsonl"):
        if row.get("step") == step:
            evaluation |= {name.removeprefix("eval/"): value for name, value in row.items() if name.startswith("eval/")}
    note = {"weights": f"of step {step}, the best; the run ended at step {last}"}
    return {**result, **note, "eval_final": evaluation or result.get("eval_final")}


def _losses(result: Mapping[str, Any]) -> list[str]:
    metrics_before, after = result.get("eval_initial") or {}, result.get("eval_final") or {}
    lines = []
    for name, value in after.items():
        if isinstance(value, (int, float)) and name not in COUNTS:
            label = "held-out loss" if name == "loss" else name
            started = f"{metrics_before[name]:.4f} -> " if isinstance(metrics_before.get(name), (int, float)) else ""
            lines.append(_entry(label, f"{started}{value:.4f}"))
    rows = result.get("held_out_rows")
    if lines and isinstance(rows, int) and rows < FEW_ROWS:
        lines.append(_entry("held-out rows", f"{rows}, so these metrics say little"))
    if line := predicted_alone(result):
        lines.append(_entry("predicted", line))
    best = result.get("best")
    if weights := result.get("weights"):
        lines.append(_entry("weights", weights))
    elif best:
        lines.append(_entry("best", f"{best['metric']} {best['value']:.4f} at step {best['step']}"))
    lines += _overfitting(result)
    for name, value in (result.get("test") or {}).items():
        if isinstance(value, (int, float)):
            lines.append(_entry(f"test {name}", f"{value:.4f}"))
    for part in ("guard", "ood"):
        evaluation = result.get(part) or {}
        metrics_before = evaluation.get("before") or {}
        for name, value in (evaluation.get("after") or {}).items():
            if isinstance(value, (int, float)) and name not in COUNTS:
                first = f"{metrics_before[name]:.4f} -> " if name in metrics_before else ""
                lines.append(_entry(f"{part} {name}", f"{first}{value:.4f}"))
    return lines


def predicted_alone(result: Mapping[str, Any]) -> str:
    """Return a sentence about the class that a classifier predicts for all rows, if their labels differ; else an empty text.

    result: with `confusion` [true class][predicted class] and `labels`, their names.
    """
    confusion, labels = result.get("confusion") or [], result.get("labels") or []
    by_prediction = [sum(column) for column in zip(*confusion, strict=True)]
    predicted = [number for number, count in enumerate(by_prediction) if count]
    if len(predicted) != 1 or sum(any(row) for row in confusion) < 2:
        return ""
    (only,) = predicted
    rows = by_prediction[only]
    return f"{labels[only]} for all {rows} held-out rows, of which {confusion[only][only]} have this label"


def _overfitting(result: Mapping[str, Any]) -> list[str]:
    """Return the gap between held-out rows and those trained on, and whether the weights are past their best."""
    overfitting = result.get("overfitting")
    if not overfitting or overfitting["gap"] is None:  # no loss was finite
        return []
    lines = [_entry("gap", f"{overfitting['gap']:+.4f} (training loss {overfitting['training_loss']:.4f})")]
    best, measured = result.get("best"), result.get("weights_step")
    if best and measured and best["metric"] == "loss" and best["step"] < measured:
        advice = f"held-out loss has risen since step {best['step']}: run.export=best keeps those weights"
        lines.append(_entry("overfitting", advice))
    return lines


def _cost(result: Mapping[str, Any]) -> list[str]:
    if not result.get("steps"):
        return []
    facts = [f"{result['steps']} steps"]
    if result.get("tokens"):
        facts.append(f"{result['tokens']:,} tokens")
    if result.get("seconds"):
        facts.append(f"{result['seconds']:.0f} s")
    if result.get("tokens_per_second"):
        facts.append(_speed(result))
    if result.get("utilization"):
        facts.append(f"{result['utilization']:.1%} of the devices' peak")
    if result.get("peak_memory_gib"):
        facts.append(f"peak memory {result['peak_memory_gib']:.2f} GiB a rank")
    if result.get("world_size"):
        facts.append(f"{result['world_size']} rank{'s' * (result['world_size'] > 1)}")
    return [_entry("training", ", ".join(facts))]


def _speed(result: Mapping[str, Any]) -> str:
    """Return tokens per second of the time beside them, and those of the steps alone where they are others."""
    in_steps = f"{result['tokens_per_second']:,.0f}"
    if not result.get("tokens") or not result.get("seconds"):
        return f"{in_steps} tokens/s in steps"
    overall = f"{result['tokens'] / result['seconds']:,.0f}"
    return f"{overall} tokens/s" if overall == in_steps else f"{overall} tokens/s ({in_steps} in steps)"


def _answers(run_dir: Path) -> list[str]:
    """Return the first sample prompt with its answers at the first and the last step."""
    rows = _rows(run_dir / "samples.jsonl")
    if not rows:
        return []
    prompt = rows[0]["prompt"]
    prompt_rows = sorted((row for row in rows if row["prompt"] == prompt), key=lambda row: row["step"])
    first, last = prompt_rows[0], prompt_rows[-1]
    lines = ["", _text("prompt", prompt)]
    if first["step"] != last["step"]:
        lines.append(_text("before", first["answer"]))
    lines.append(_text("after", last["answer"]))
    if last.get("reference"):
        lines.append(_text("reference", last["reference"]))
    return lines


def _rows(path: Path) -> list[dict[str, Any]]:
    """Read the JSON lines that are objects; none if the file cannot be read."""
    try:
        rows = [parse_json(line) for line in read_file(path, METRICS_BYTES).splitlines()]
    except (OSError, ValueError):
        return []
    return [row for row in rows if isinstance(row, dict)]


def _paths(run_dir: Path, result: Mapping[str, Any]) -> list[str]:
    lines = [_entry("run", _short(run_dir))]
    for label, path in (
        ("metrics", run_dir / "metrics.jsonl"),
        ("result", records.result_path(run_dir)),
        ("checkpoint", result.get("checkpoint")),
        ("export", result.get("export")),
        ("report", run_dir / "report.html"),
        ("logs", run_dir / "logs"),
    ):
        if path and Path(path).exists():
            lines.append(_entry(label, _short(Path(path))))
    return lines


def _next(run_dir: Path, result: Mapping[str, Any]) -> list[str]:
    """Return commands that use the export, as a user would type them."""
    config = read_run_content(run_dir / "run.yaml")["config"]
    task, method = TASKS.classes()[config["task"]["name"]], METHODS.classes()[config["method"]["name"]]
    run = shlex.quote(_short(run_dir))
    input_flag = "--text '...'" if task.predicts_from_text else "--input FILE"
    commands = [f"dstune generate {run} --prompt '...'" if task.generates else f"dstune predict {run} {input_flag}"]
    if task.serves or (task.generates and not method.in_front and not is_encoder_decoder(Path(result["export"]))):
        commands.append(f"dstune serve {run}")
    return [_entry("" if position else "next", command) for position, command in enumerate(commands)]


def _short(path: Path) -> str:
    """Return `path` as a person in this folder would type it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _entry(label: str, text: str) -> str:
    return f"{label:<{COLUMN}} {text}"


def _text(label: str, text: str) -> str:
    """Return text of a model or a data set, wrapped, without control characters that a terminal would obey."""
    printable_text = "".join(
        character if character.isprintable() or character == "\n" else " " for character in text.strip()
    )
    if len(printable_text) > MAX_CHARACTERS:
        printable_text = (
            f"... {printable_text[-MAX_CHARACTERS:]}" if label == "prompt" else f"{printable_text[:MAX_CHARACTERS]} ..."
        )
    wrapped = [part for line in printable_text.splitlines() for part in textwrap.wrap(line, TEXT_WIDTH) or [""]]
    indent = "\n" + " " * (COLUMN + 1)
    return _entry(label, indent.join(wrapped) if wrapped else "(nothing)")
