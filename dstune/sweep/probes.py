"""Whether the values of all axes can be trained with, told before the first trial starts."""

from __future__ import annotations

import itertools
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
"""Of more, each value is looked at beside the first ones of the other axes."""


def groups(config_dirs: Sequence[str], overrides: Sequence[str]) -> Mapping[str, Sequence[str]]:
    """Return the choices of each group where one is to be matched by `glob()`; reading them takes a while otherwise."""
    if not any("glob(" in text for text in overrides):
        return {}
    activate_requested(overrides, config_dirs)
    with session(config_dirs) as hydra:
        return group_options(hydra)


def of_axes(sweep: SweepConfig, axes: Sequence[Axis]) -> list[Problem]:
    """Return what the sweeper cannot do with an axis."""
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
    """Return the configuration of every combination, or of every value where there are too many; the first one first.

    Raises:
        UserError: every problem with names and types of the values; `validate` is for the caller.
    """
    chosen = [axis for axis in parts.axes if not _is_value(axis)]
    values = [axis for axis in parts.axes if _is_value(axis)]
    problems: dict[Problem, None] = {}
    configs = []
    for groups_chosen in _assignments(chosen):
        # Groups take Hydra, half a second each time; single values do not.
        start = [*parts.fixed, *groups_chosen.overrides, *first(values).overrides]
        try:
            base = compose(start, config_dirs).config
        except UserError as error:
            problems |= dict.fromkeys(error.problems)
            continue
        for assignment in _assignments(values):
            try:
                configs.append(apply_overrides(base, assignment.overrides))
            except UserError as error:
                problems |= dict.fromkeys(error.problems)
    if problems:
        raise UserError(problems)
    return configs


def _is_value(axis: Axis) -> bool:
    """Return whether the axis is a plain key, whose values can be put into a composed configuration."""
    return axis.key in all_keys() and axis.key not in sections() and axis.key != "zero.path"


def _assignments(axes: Sequence[Axis]) -> Iterable[Assignment]:
    """Return every combination of the axes' probes; where they are too many, the first one and each probe by itself."""
    probed = [Axis(axis.key, axis.probes) for axis in axes]
    count = 1
    for axis in probed:
        count *= len(axis.values)
    if count <= MOST_COMBINATIONS:
        return grid(probed)
    start = first(probed)
    one_by_one = (
        Assignment(start.axes, (*start.values[:at], value, *start.values[at + 1 :]))
        for at, axis in enumerate(probed)
        for value in axis.values[1:]
    )
    return itertools.chain([start], one_by_one)
