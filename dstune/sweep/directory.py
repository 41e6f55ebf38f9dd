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
"""Sections that do not make another sweep of it."""


CHANGED_DEFAULTS = ("model.unreached_parts", "data.padding")
"""Keys that sweeps of earlier versions have with another value than the present default."""


@dataclass(frozen=True)
class Sweep:
    """What `sweep.yaml` holds."""

    path: Path
    base: RunConfig
    """The configuration with the first value of every axis."""
    overrides: list[str]
    """As given, with all values of the axes."""
    config_dirs: list[str]
    axes: list[Axis]


# ---- where ----


def identity(base: RunConfig, axes: Sequence[Axis]) -> str:
    """Return eight characters that are the same for the same settings and varied keys, whatever their values: a command with
    more of them continues the sweep."""
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
    """Return `lr=1e-05,rank=8`, with the number in front where values may come again: a folder's name."""
    names = short_names(assignment.axes)
    parts = [
        f"{names[axis.key]}={_rounded(value) if axis.is_interval else value.short}"
        for axis, value in zip(assignment.axes, assignment.values, strict=True)
    ]
    whole = ",".join(parts)
    name = re.sub(r"[^\w.=,+-]", "_", whole)
    if name != whole or len(name) > LONGEST_NAME:  # two trials must not come to the same name
        name = f"{name[:LONGEST_NAME]}-{hashlib.sha256(whole.encode()).hexdigest()[:6]}"
    return name if number is None else f"{number:03d}-{name}"


def _rounded(value: Value) -> str:
    return f"{value.plain:.3g}" if isinstance(value.plain, float) else value.short


# ---- sweep.yaml ----


def write_sweep(sweep: Sweep, objectives: Sequence[str]) -> None:
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


def given_before(path: Path) -> tuple[list[str], list[str]]:
    """Return overrides and folders of groups with which the sweep at `path` began. Raises UserError."""
    content = _content(path)
    texts, folders = ([str(text) for text in content.get(name) or []] for name in ("overrides", "config_dirs"))
    check_overrides(texts, folders, content.get(SIGNATURE), path / SWEEP_FILE)
    return texts, folders


def _content(path: Path) -> dict[str, Any]:
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
    """Return `sweep` with what the first start froze, where its directory holds one; whether its runs became longer.

    Raises:
        UserError: the directory holds something else, or a sweep whose other settings differ.
    """
    path = sweep.path
    if not is_sweep(path):
        if path.exists() and (
            not path.is_dir() or any(e.name not in (records.LOCK, "launch.json") for e in path.iterdir())
        ):
            reason = "this is no sweep, and not empty" if path.is_dir() else "this is a file"
            fix = "give a new or empty folder, or one that holds this sweep"
            raise UserError(Problem("sweep.dir", reason, fix, str(path)))
        return sweep, False
    if not sweep.base.run.accept_plugin_changes:
        plugins.refuse_changes(plugins_of(path / SWEEP_FILE), plugins.used_by(sweep.base))
    old = read_run_beside(path / SWEEP_FILE, sweep.base, decided=True)
    axes_before = set(_content(path).get("axes") or {})
    now = {axis.key for axis in sweep.axes}
    if axes_before != now:
        reason = f"the sweep in {path} varies {', '.join(sorted(axes_before))}, not {', '.join(sorted(now))}"
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
    for key in varied:
        _copy(tree, stored, key)
    check_resume(from_dict(stored, str(path / SWEEP_FILE)), base)
    longer = (old.config.trainer.max_steps, old.config.trainer.epochs) != (base.trainer.max_steps, base.trainer.epochs)
    return replace(sweep, base=base), longer


def _copy(source: dict[str, Any], target: dict[str, Any], key: str) -> None:
    *holders, last = key.split(".")
    for name in holders:
        source, target = source.get(name) or {}, target.setdefault(name, {})
    if last in source:
        target[last] = source[last]


def frozen(base: RunConfig, axes: Sequence[Axis]) -> list[str]:
    """Return overrides that give every trial what the first start froze, whenever it begins."""
    varied = {axis.key.lstrip("+") for axis in axes}
    tree = to_dict(base)
    overrides = []
    for key in frozen_at_start():
        section, name = key.split(".")
        value = tree[section].get(name)
        whole_varied = {section, key, f"{section}.path"} & varied or "experiment" in varied
        # Composing a trial would resolve what somebody may have written into sweep.yaml.
        is_reference = isinstance(value, str) and may_refer(value) and not refers(value)
        if value is not None and not whole_varied and not is_reference:
            overrides.append(f"{key}={value}")
    return overrides


# ---- records of trials ----


def write_record(sweep: Path, record: Record) -> None:
    path = record_path(sweep, record.name)
    path.parent.mkdir(exist_ok=True)
    records.write_json(path, asdict(record))


def status_in(run_dir: Path) -> str:
    """Return the status in the trial's result.json; empty without one."""
    return str((records.read_result(run_dir) or {}).get("status") or "")
