"""Applies `key=value` overrides to an existing run: `dstune evaluate RUN data.test=...`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from dstune.config import overrides as user_overrides
from dstune.config.compose import compose, typed_config
from dstune.config.convert import ENVIRONMENT, format_value, may_refer, refers, to_dict
from dstune.config.names import sections
from dstune.config.schema import RunConfig
from dstune.config.validate import find_problems
from dstune.core import plugins
from dstune.core.errors import Problem, UserError


def apply_overrides(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """Return the configuration of an existing run with some values replaced (`dstune evaluate RUN data.test=...`).

    Raises:
        UserError: every unknown key, wrong type, and choice of a group (a run's groups cannot be changed).
    """
    parsed, problems = user_overrides.parse(overrides)
    tree = to_dict(config)
    groups: dict[str, list[str]] = {section: [] for section in (*sections(), "experiment")}
    values = []
    for override in parsed:
        key = override.key_or_group
        if user_overrides.is_group_choice(override, groups) and "." not in key:
            fix = _single_values(config, key, str(override.value()))
            problems.append(
                Problem(key, "the groups of an existing run cannot be changed", fix, format_value(override.value()))
            )
        elif key == plugins.KEY:
            fix = f"`dstune train run.dir=RUN` with the run's settings, plugins=[...] and {plugins.ACCEPT}"
            problems.append(
                Problem(key, "the plugins of an existing run cannot be changed", fix, format_value(override.value()))
            )
        elif key == "zero.path":
            fix = "set single values, such as zero.reduce_bucket_size=N or zero.settings.KEY=VALUE"
            problems.append(Problem(key, "the file was read when the run started", fix, format_value(override.value())))
        else:
            values.append(override)
    classes = {section: type(getattr(config, section)) for section in sections()}
    doubtful = {user_overrides.meant_by(problem.where) for problem in problems}
    checked = user_overrides.check(values, {}, lambda _: classes)
    problems += checked.problems
    for override in list(checked.good):
        value = override.value()
        if isinstance(value, str) and may_refer(value) and not refers(value):
            fix = f"write the value or {ENVIRONMENT}NAME}}"
            problems.append(Problem(override.key_or_group, "keys of a run cannot refer to each other", fix, value))
            checked.good.remove(override)
            doubtful.add(override.key_or_group)
    for override in checked.good:
        _set(tree, override.key_or_group.split("."), override.value(), delete=override.is_delete())
    changed = typed_config(tree, "the run's configuration")
    if problems:
        raise UserError(problems + find_problems(changed, doubtful | checked.doubtful))
    return changed


def _single_values(config: RunConfig, section: str, choice: str) -> str:
    """Return the fix for choosing from a group: the single values that have the same effect, if they can be told."""
    if section == "experiment":
        return "set single values"
    if section == "zero":
        with suppress(UserError):  # no such choice, or one that needs other settings too
            composed = compose(["data=chitchat", f"zero={choice}"], keep_plugins=True)
            old_zero, chosen = config.zero, composed.config.zero
            changed = {
                key: getattr(chosen, key) for key in DECIDE_ZERO if getattr(old_zero, key) != getattr(chosen, key)
            }
            if changed:
                return "write " + " ".join(f"zero.{key}={format_value(value)}" for key, value in changed.items())
    return f"set single values, such as {section}.KEY=VALUE"


DECIDE_ZERO = ("stage", "offload_optimizer", "offload_param")
"""The keys in which the choices of `zero` differ."""


def _set(tree: dict[str, Any], path: list[str], value: Any, delete: bool) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    if delete:
        tree.pop(path[-1], None)
    elif isinstance(value, Mapping) and isinstance(tree.get(path[-1]), dict):
        for key, part in value.items():
            _set(tree[path[-1]], [key], part, delete=False)
    else:
        tree[path[-1]] = value
