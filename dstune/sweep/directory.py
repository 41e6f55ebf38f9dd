"""The directory of a sweep: `sweep.yaml`, a record of each trial in `trials/`, and the trials' run directories."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dstune import __version__
from dstune.config.compose import frozen_at_start
from dstune.config.convert import dump, format_value, from_dict, load, may_refer, refers, to_dict
from dstune.config.overrides import key_of
from dstune.config.resume import check_resume
from dstune.config.run_file import RUN_FORMAT, plugins_of, read_run_beside
from dstune.config.schema import RunConfig
from dstune.config.sweep_space import Assignment, Axis, Value, short_names
from dstune.config.trust import OVERRIDES, SIGNATURE, check_overrides, statement
from dstune.core import files, plugins, signing
from dstune.core.errors import Problem, UserError
from dstune.core.parsing import read_file
from dstune.core.secrets import redacted
from dstune.launch import records
from dstune.tracking.trials import SWEEP_FILE, Record, is_sweep, record_path

LONGEST_NAME = 100
NOT_IDENTITY = ("launch", "tracking", "run", "sweep")
"""Sections of the configuration that may change without making it another sweep."""


CHANGED_DEFAULTS = ("model.unreached_parts", "data.padding")
"""Keys whose default has changed: a sweep that began with the old default keeps it."""


@dataclass(frozen=True)
class Sweep:
    """The content of `sweep.yaml`."""

    path: Path
    base: RunConfig
    """The configuration with the first value of every axis."""
    overrides: list[str]
    """As on the command line, with all values of the axes."""
    config_dirs: list[str]
    axes: list[Axis]


# ---- names of directories ----


def identity(base: RunConfig, axes: Sequence[Axis]) -> str:
    """Return eight hexadecimal digits that depend on the settings and on the varied keys, but not on the values of these: the same
    command with more values continues the sweep."""
    tree = to_dict(base)
    for name in NOT_IDENTITY:
        tree.pop(name)
    for key in (*(axis.key.lstrip("+") for axis in axes), *frozen_at_start()):
        _remove(tree, key)
    kind = [base.sweep.name, sorted(axis.key for axis in axes)]
    return hashlib.sha256(json.dumps([tree, kind], sort_keys=True).encode()).hexdigest()[:8]


def _remove(tree: dict[str, Any], key: str) -> None:
    *holders, last = key.split(".")
    for name in holders:
        tree = tree.get(name) or {}
    tree.pop(last, None)


def sweep_path(base: RunConfig, axes: Sequence[Axis]) -> Path:
    return Path(base.sweep.dir or Path("runs") / base.run.name / f"sweep-{identity(base, axes)}")


def trial_name(assignment: Assignment, number: int | None = None) -> str:
    """Return the name of a trial's directory: `lr=1e-05,rank=8`, with `number` in front for studies, which may repeat values."""
    names = short_names(assignment.axes)
    parts = [
        f"{names[axis.key]}={_rounded(value) if axis.is_interval else value.short}"
        for axis, value in zip(assignment.axes, assignment.values, strict=True)
    ]
    exact_name = ",".join(parts)
    name = re.sub(r"[^\w.=,+-]", "_", exact_name)
    if name != exact_name or len(name) > LONGEST_NAME:  # two trials must not get the same name
        name = f"{name[:LONGEST_NAME]}-{hashlib.sha256(exact_name.encode()).hexdigest()[:6]}"
    return name if number is None else f"{number:03d}-{name}"


def _rounded(value: Value) -> str:
    return f"{value.plain:.3g}" if isinstance(value.plain, float) else value.short


# ---- sweep.yaml ----


def write_sweep(sweep: Sweep, objectives: Sequence[str]) -> None:
    """Write `sweep.yaml`, without secrets and signed, so that another start believes its overrides."""
    content = {
        "format": RUN_FORMAT,
        "dstune_version": __version__,
        "overrides": sweep.overrides,
        "config_dirs": sweep.config_dirs,
        "axes": {
            axis.key: [format_value(value.plain) for value in axis.values] or _interval(axis) for axis in sweep.axes
        },
        "objective": list(objectives),
        plugins.KEY: plugins.to_dicts(plugins.used_by(sweep.base)),
        "config": to_dict(sweep.base),
    }
    content = redacted(content)
    digests = statement(content) | {OVERRIDES: signing.digest([content["overrides"], content["config_dirs"]])}
    files.write(sweep.path / SWEEP_FILE, dump(content | {SIGNATURE: signing.sign(digests)}))


def _interval(axis: Axis) -> str:
    ends = f"interval({axis.low:g},{axis.high:g})"
    return f"tag(log,{ends})" if axis.log else ends


def read_overrides(path: Path) -> tuple[list[str], list[str]]:
    """Return the overrides and the `--config-dir` folders with which the sweep at `path` began. Raises UserError."""
    content = _read_sweep_file(path)
    texts, folders = ([str(text) for text in content.get(name) or []] for name in ("overrides", "config_dirs"))
    check_overrides(texts, folders, content.get(SIGNATURE), path / SWEEP_FILE)
    return texts, folders


def _read_sweep_file(path: Path) -> dict[str, Any]:
    """Read the `sweep.yaml` in the directory `path`. Raises UserError."""
    file = path / SWEEP_FILE
    try:
        content = load(read_file(file).decode("utf-8"), str(file))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "this is no text"
        raise UserError(Problem(str(file), f"cannot be read: {reason}", "give the directory of a sweep")) from None
    kinds = {"overrides": list, "config_dirs": list, "axes": dict}
    if not isinstance(content, dict) or any(
        content.get(name) is not None and not isinstance(content[name], kind) for name, kind in kinds.items()
    ):
        raise UserError(Problem(str(file), "this is no sweep.yaml", "give the directory of a sweep"))
    return content


def continued(sweep: Sweep) -> tuple[Sweep, bool]:
    """Return `sweep` with the settings that its first start froze, and whether its runs became longer since then.

    A sweep whose directory is new or empty is returned as it is.

    Raises:
        UserError: the directory holds something else, or a sweep whose other settings differ.
    """
    path = sweep.path
    if not is_sweep(path):
        if path.exists() and (
            not path.is_dir() or any(entry.name not in (records.LOCK, "launch.json") for entry in path.iterdir())
        ):
            reason = "this folder is not empty, and holds no sweep" if path.is_dir() else "this is a file"
            fix = "give a new or empty folder, or one that holds this sweep"
            raise UserError(Problem("sweep.dir", reason, fix, str(path)))
        return sweep, False
    if not sweep.base.run.accept_plugin_changes:
        plugins.refuse_changes(plugins_of(path / SWEEP_FILE), plugins.used_by(sweep.base))
    old = read_run_beside(path / SWEEP_FILE, sweep.base, decided=True)
    old_keys = set(_read_sweep_file(path).get("axes") or {})
    keys = {axis.key for axis in sweep.axes}
    if old_keys != keys:
        reason = f"the sweep in {path} varies {', '.join(sorted(old_keys))}, not {', '.join(sorted(keys))}"
        raise UserError(Problem("sweep.dir", reason, "give another sweep.dir", str(path)))
    tree, stored = to_dict(sweep.base), to_dict(old.config)
    varied = {axis.key.lstrip("+") for axis in sweep.axes}
    for key in frozen_at_start():
        section, name = key.split(".")
        if section not in varied and key not in varied and name in tree[section] and name in stored[section]:
            tree[section][name] = stored[section][name]
    for key in {*CHANGED_DEFAULTS} - {key_of(text) for text in sweep.overrides}:
        _copy(stored, tree, key)
    base = from_dict(tree, "the composed configuration")
    for key in varied:  # may differ: the first value of an axis may be another one now
        _copy(tree, stored, key)
    check_resume(from_dict(stored, str(path / SWEEP_FILE)), base)
    longer = (old.config.trainer.max_steps, old.config.trainer.epochs) != (base.trainer.max_steps, base.trainer.epochs)
    return replace(sweep, base=base), longer


def _copy(source: dict[str, Any], target: dict[str, Any], key: str) -> None:
    """Copy the value of the dotted `key` from one tree to the other, if it has one."""
    *holders, last = key.split(".")
    for name in holders:
        source, target = source.get(name) or {}, target.setdefault(name, {})
    if last in source:
        target[last] = source[last]


def frozen_overrides(base: RunConfig, axes: Sequence[Axis]) -> list[str]:
    """Return overrides that give every trial the settings that the first start froze, whenever the trial starts."""
    varied = {axis.key.lstrip("+") for axis in axes}
    tree = to_dict(base)
    overrides = []
    for key in frozen_at_start():
        section, name = key.split(".")
        value = tree[section].get(name)
        is_varied = {section, key, f"{section}.path"} & varied or "experiment" in varied
        # Composing a trial would resolve a reference that a stranger may have written into sweep.yaml.
        is_unsafe = isinstance(value, str) and may_refer(value) and not refers(value)
        if value is not None and not is_varied and not is_unsafe:
            overrides.append(f"{key}={value}")
    return overrides


# ---- records of trials ----


def write_record(sweep: Path, record: Record) -> None:
    """Write the record of a trial into the directory of its sweep."""
    path = record_path(sweep, record.name)
    path.parent.mkdir(exist_ok=True)
    records.write_json(path, asdict(record))


def status_in(run_dir: Path) -> str:
    """Return the status in the trial's result.json; empty without one."""
    return str((records.read_result(run_dir) or {}).get("status") or "")
