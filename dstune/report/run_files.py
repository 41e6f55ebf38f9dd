"""Reads the files in the directory of a run. Of a running, killed or half-written run, it reads what is there."""

from __future__ import annotations

import math
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dstune.checkpoint import store
from dstune.config.run_links import refuse_files_elsewhere
from dstune.core.errors import Problem, UserError, first_line
from dstune.core.parsing import METRICS_BYTES, object_in, parse_json, parse_yaml, read_file
from dstune.core.paths import RUN_FILE as RUN_FILE

SEARCHED_DEPTH = 3
"""Levels of folders that are searched for runs: SWEEP/TRIAL, NAME/DATE_TIME below `runs`, or one level more."""

ROLLOUTS = "rollouts"
"""Folder of a run with the model's own answers."""

Row = dict[str, Any]


@dataclass(frozen=True)
class RunFiles:
    """The files of one run as plain values; absent or broken ones are empty."""

    path: Path
    config: Row
    """The resolved configuration in `run.yaml`; references to environment variables stay as they are."""
    overrides: list[str]
    plugins: list[Row]
    """As `run.yaml` lists them; none of them is loaded."""
    metrics: list[Row]
    samples: list[Row]
    result: Row
    environment: Row
    data: Row
    launch: Row
    checkpoints: list[store.CheckpointInfo]

    @property
    def name(self) -> str:
        return str(section(self.config, "run").get("name") or self.path.name)

    @property
    def status(self) -> str:
        """The status in result.json; without that file `running`, `elsewhere` (this machine cannot tell, as in `dstune status`), or
        `ended` (killed before it could write a result)."""
        if self.result.get("status"):
            return str(self.result["status"])
        if _is_alive(self.launch):
            return "running"
        return "elsewhere" if self._place else "ended"

    @property
    def _place(self) -> str:
        """The host or job of a run that this machine cannot see; empty for a run that was launched here."""
        if jobs := self.launch.get("jobs"):
            return f"SLURM job {jobs[-1]}"
        host = self.launch.get("host")
        return str(host) if host and host != socket.gethostname() else ""

    @property
    def reason(self) -> str:
        if self.status == "ended":
            return "no result was written: the run was killed"
        if self.status == "elsewhere":
            return f"no result yet ({self._place}): `dstune status` there says whether it runs"
        return str(self.result.get("reason") or "")


def section(mapping: Row, name: str) -> Row:
    """Return `mapping[name]` if it is a mapping, else an empty one."""
    value = mapping.get(name)
    return value if isinstance(value, dict) else {}


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """Return the run directories at `paths`, without duplicates. Each path is a run, or a folder that holds runs (a sweep).

    Raises:
        UserError: every path that is neither.
    """
    run_by_path: dict[Path, Path] = {}
    problems = []
    for path in paths:
        runs = [path] if (path / RUN_FILE).is_file() else _inside(path)
        if not runs:
            problems.append(_no_run(path))
        for run in runs:
            run_by_path.setdefault(run.resolve(), run)
    if problems:
        raise UserError(problems)
    return list(run_by_path.values())


def _inside(folder: Path) -> list[Path]:
    depths = ("/".join("*" * depth) for depth in range(1, SEARCHED_DEPTH + 1))
    return sorted(file.parent for pattern in depths for file in folder.glob(f"{pattern}/{RUN_FILE}"))


def _no_run(path: Path) -> Problem:
    if path.is_dir():
        reason = "this folder holds no run (no run.yaml in it or below it)"
    elif path.exists():
        reason = "this is a file, not a run"
    else:
        reason = "there is no such folder"
    places = [place for place in (path.parent, Path("runs")) if place.is_dir()]
    runs = [run for place in places for run in _inside(place)]
    if path.is_file() and (path.parent / RUN_FILE).is_file():
        runs = [path.parent]
    newest = max(runs, key=lambda run: (run / RUN_FILE).stat().st_mtime, default=None)
    fix = f"give {newest}" if newest else "give the directory of a run, for example runs/NAME/DATE_TIME"
    return Problem("RUN", reason, fix, str(path))


def read(path: Path) -> RunFiles:
    """Return everything the report needs of the run at `path`.

    Raises:
        UserError: its `run.yaml` cannot be read, or a stranger's run has links to files outside of it.
    """
    try:
        refuse_files_elsewhere(path, ROLLOUTS)
        stored = parse_yaml(read_file(path / RUN_FILE).decode())
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = f"cannot be read: {first_line(error)}"
        raise UserError(Problem(str(path / RUN_FILE), reason, "give another run")) from None
    stored = stored if isinstance(stored, dict) else {}
    return RunFiles(
        path=path,
        config=section(stored, "config"),
        overrides=[str(text) for text in stored.get("overrides") or []],
        plugins=[plugin for plugin in stored.get("plugins") or [] if isinstance(plugin, dict)],
        metrics=_rows(path / "metrics.jsonl"),
        samples=_rows(path / "samples.jsonl"),
        result=shaped_result(object_in(path / "result.json")),
        environment=object_in(path / "environment.json"),
        data=object_in(path / "data_report.json"),
        launch=object_in(path / "launch.json"),
        checkpoints=_checkpoints(path),
    )


_NUMBER: tuple[type, ...] = (int, float)
_RESULT: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("status", "reason", "checkpoint", "export"), (str,)),
    **dict.fromkeys(("steps", "world_size", "tokens", "seconds", "tokens_per_second", "peak_memory_gib"), _NUMBER),
    **dict.fromkeys(("nonfinite_steps", "overflow_steps", "weights_step"), _NUMBER),
    **dict.fromkeys(
        ("eval_initial", "eval_final", "best", "test", "overfitting", "counterfactual", "micro_batch"), (dict,)
    ),
}
"""Types of the values in `result.json`. A file from a stranger may hold anything."""
_MEASURED = ("eval_initial", "eval_final", "test")


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def shaped_result(result: Row) -> Row:
    """Return `result.json` without values of types that dstune does not write."""
    shaped = {}
    for key, value in result.items():
        kinds = _RESULT.get(key)
        if kinds is None or value is None or (is_number(value) if kinds is _NUMBER else isinstance(value, kinds)):
            shaped[key] = value
    for key in _MEASURED:
        if shaped.get(key):
            shaped[key] = {name: number for name, number in shaped[key].items() if number is None or not is_odd(number)}
    return shaped


def is_odd(value: Any) -> bool:
    """Return whether a value cannot be a metric's: a list, a text, or a number too large to calculate with."""
    return not (isinstance(value, dict) or is_number(value) or (isinstance(value, float) and not math.isfinite(value)))


def _rows(path: Path) -> list[Row]:
    """Return the rows of a file (see `is_row`); incomplete lines, such as one that is just being written, are skipped."""
    rows = []
    try:
        lines = read_file(path, METRICS_BYTES).splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            row = parse_json(line)
        except ValueError:
            continue
        if is_row(row):
            rows.append(row)
    return rows


def is_row(row: Any) -> bool:
    """Return whether this is a row of `metrics.jsonl` or `samples.jsonl`: it has a step, and its metrics are numbers."""
    if not isinstance(row, dict) or type(row.get("step")) is not int or not 0 <= row["step"] < 2**53:
        return False
    if not isinstance(row.get("skipped", ""), str) or any(
        not isinstance(row.get(key, ""), str) for key in ("prompt", "answer")
    ):
        return False
    return all(
        value is None or not is_odd(value) for key, value in row.items() if key == "loss" or key.startswith("eval/")
    )


def _checkpoints(path: Path) -> list[store.CheckpointInfo]:
    try:
        return [info for info in store.listing(path) if info.committed]
    except (OSError, ValueError):  # a running launch prunes while this reads
        return []


def _is_alive(launch: Row) -> bool:
    """Return whether the process in launch.json still runs on this machine, and is not a later one with the same id."""
    if launch.get("host") != socket.gethostname():
        return False
    import psutil  # not at the top: 10 ms of every command

    try:
        process = psutil.Process(launch["pid"])
        return abs(process.create_time() - launch["started"]) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, KeyError, TypeError, ValueError):
        return False
