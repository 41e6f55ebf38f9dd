"""Checks before the first trial that the values of all axes can be trained with."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

from dstune.config.compose import compose
from dstune.config.hydra_session import group_options, session
from dstune.config.names import all_keys, sections
from dstune.config.plugins import activate_requested
from dstune.config.run_overrides import apply_overrides
from dstune.config.schema import RunConfig
from dstune.config.sweep_schema import Sampler, SweepConfig
from dstune.config.sweep_space import Assignment, Axis, Split, first, grid
from dstune.core.errors import Problem, UserError

MOST_COMBINATIONS = 512
"""If there are more, each value is checked only together with the first values of the other axes."""


def groups(config_dirs: Sequence[str], overrides: Sequence[str]) -> Mapping[str, Sequence[str]]:
    """Return the choices of each configuration group if an override uses `glob()`, which matches them. Otherwise empty, since
    reading them takes a while."""
    if not any("glob(" in text for text in overrides):
        return {}
    activate_requested(overrides, config_dirs)
    with session(config_dirs) as hydra:
        return group_options(hydra)


def of_axes(sweep: SweepConfig, axes: Sequence[Axis]) -> list[Problem]:
    """Return a problem for each interval, if the sweep can only combine single values."""
    problems = []
    for axis in axes:
        if axis.is_interval and sweep.optuna is None:
            reason = "an interval has no single values to combine"
            fix = f"{axis.key}=A,B,C or range(FROM,TO,STEP), or let Optuna choose: hydra/sweeper=optuna"
            problems.append(Problem(axis.key, reason, fix, _interval_text(axis)))
        elif axis.is_interval and sweep.optuna and sweep.optuna.sampler is Sampler.grid:
            fix = "single values, or sweep.sampler=tpe"
            problems.append(Problem(axis.key, "sweep.sampler=grid needs single values", fix, _interval_text(axis)))
    return problems


def _interval_text(axis: Axis) -> str:
    return f"interval({axis.low:g},{axis.high:g})"


def configurations(parts: Split, config_dirs: Sequence[str]) -> list[RunConfig]:
    """Return the configuration of every combination, or of every single value if there are too many combinations. The first
    configuration has the first value of every axis.

    Raises:
        UserError: every problem with names and types of the values. The caller has to `validate` the configurations.
    """
    group_axes = [axis for axis in parts.axes if not _is_plain_key(axis)]
    key_axes = [axis for axis in parts.axes if _is_plain_key(axis)]
    problems: dict[Problem, None] = {}
    configs = []
    for group_choices in _assignments(group_axes):
        # Only Hydra can compose groups, half a second each time; plain keys are set in the composed configuration.
        overrides = [*parts.fixed, *group_choices.overrides, *first(key_axes).overrides]
        try:
            base = compose(overrides, config_dirs).config
        except UserError as error:
            problems |= dict.fromkeys(error.problems)
            continue
        for assignment in _assignments(key_axes):
            try:
                configs.append(apply_overrides(base, assignment.overrides))
            except UserError as error:
                problems |= dict.fromkeys(error.problems)
    if problems:
        raise UserError(problems)
    return configs


def _is_plain_key(axis: Axis) -> bool:
    """Return whether the axis is a key (not a group), whose values can be set in a composed configuration."""
    return axis.key in all_keys() and axis.key not in sections() and axis.key != "zero.path"


def _assignments(axes: Sequence[Axis]) -> Iterable[Assignment]:
    """Return every combination of the axes' probes; if there are too many, the first one, and each other probe by itself."""
    probed = [Axis(axis.key, axis.probes) for axis in axes]
    if math.prod(len(axis.values) for axis in probed) <= MOST_COMBINATIONS:
        return grid(probed)
    start = first(probed)
    one_by_one = (
        Assignment(start.axes, (*start.values[:at], value, *start.values[at + 1 :]))
        for at, axis in enumerate(probed)
        for value in axis.values[1:]
    )
    return itertools.chain([start], one_by_one)
