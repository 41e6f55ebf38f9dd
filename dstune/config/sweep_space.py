"""Parses what a sweep varies (`key=a,b`, `choice()`, `range()`, `interval()` and `glob()` of Hydra's grammar) into axes."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from dstune.config.convert import dotted, format_value
from dstune.config.names import all_keys, names_choice
from dstune.config.overrides import key_of
from dstune.core.errors import Problem, UserError, collected

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

SWEEPERS = {"optuna": "optuna", "basic": "grid", "grid": "grid"}
"""Values of `hydra/sweeper` and the choice of `sweep` that each is."""
LOG = "log"


@dataclass(frozen=True)
class Value:
    """One value of an axis."""

    text: str
    """The text after `key=` on the command line."""
    plain: Any
    """As a number, truth value, text or None; a list or mapping as its text."""

    @property
    def short(self) -> str:
        """For names: `1e-05`, `8`, `lora`."""
        if isinstance(self.plain, float):
            return next(text for text in (f"{self.plain:.3g}", repr(self.plain)) if float(text) == self.plain)
        return format_value(self.plain)


@dataclass(frozen=True)
class Axis:
    """A key or group that the sweep varies, with its possible values: a list, or all numbers of an interval."""

    key: str
    values: tuple[Value, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    integer: bool = False
    step: float | None = None
    """Distance between two values of a range."""

    @property
    def is_interval(self) -> bool:
        return not self.values

    @property
    def probes(self) -> tuple[Value, ...]:
        """Values that a configuration is checked with before the sweep starts: all of them, or the ends of the interval."""
        return self.values or (self.value(self.low), self.value(self.high))

    def value(self, plain: Any) -> Value:
        """Return `plain`, which a sampler chose, as a value of this axis."""
        listed_value = next(
            (value for value in self.values if value.plain == plain and type(value.plain) is type(plain)), None
        )
        if listed_value is not None:
            return listed_value
        return Value(str(int(plain)) if self.integer else repr(float(plain)), int(plain) if self.integer else plain)


@dataclass(frozen=True)
class Assignment:
    """A value for every axis."""

    axes: tuple[Axis, ...]
    values: tuple[Value, ...]

    @property
    def overrides(self) -> list[str]:
        return [f"{axis.key}={value.text}" for axis, value in zip(self.axes, self.values, strict=True)]

    @property
    def plain(self) -> dict[str, Any]:
        return {axis.key: value.plain for axis, value in zip(self.axes, self.values, strict=True)}


@dataclass
class Split:
    """A command line of a sweep: what all trials have in common, and what differs."""

    fixed: list[str] = field(default_factory=list)
    axes: list[Axis] = field(default_factory=list)


def split(overrides: Sequence[str], groups: Mapping[str, Sequence[str]]) -> Split:
    """Split the overrides of a sweep into axes and fixed overrides. groups: the choices of each group, for `glob()`.

    Overrides that Hydra's grammar refuses stay among the fixed ones, since `compose` reports them.

    Raises:
        UserError: all problems with the axes themselves. `compose` checks whether their values fit the key.
    """
    parts, problems = Split(), []
    for text in overrides:
        if key_of(text) == "hydra/sweeper":
            name = text.partition("=")[2]
            if name in SWEEPERS:
                parts.fixed.append(f"sweep={SWEEPERS[name]}")
            else:
                problems.append(Problem("hydra/sweeper", "there is no such sweeper", "optuna, or basic", name))
            continue
        override = _parsed(text)
        if override is None or not override.is_sweep_override():
            parts.fixed.append(text)
            continue
        with collected(problems):
            parts.axes.append(_axis(override, text, groups))
    problems += _repeated(parts)
    if problems:
        raise UserError(problems)
    return parts


def with_space(split: Split, space: Mapping[str, Any], groups: Mapping[str, Sequence[str]]) -> Split:
    """Return `split` with the axes of `sweep.space` added, except for keys that the command line sets. Raises UserError."""
    given_keys = {key_of(text) for text in split.fixed} | {axis.key for axis in split.axes}
    axes = list(split.axes)
    problems: list[Problem] = []
    for key, value in dotted(space):  # `{optimizer: {lr: ...}}` means the same as `{optimizer.lr: ...}`
        if key in given_keys:
            continue
        with collected(problems):
            axes.append(_of_file(key, value, groups))
    if problems:
        raise UserError(problems)
    return replace(split, axes=axes)


def grid(axes: Sequence[Axis]) -> Iterator[Assignment]:
    """Yield every combination; the last axis varies fastest."""
    for values in itertools.product(*(axis.values for axis in axes)):
        yield Assignment(tuple(axes), values)


def first(axes: Sequence[Axis]) -> Assignment:
    """Return the first value of every axis."""
    return Assignment(tuple(axes), tuple(axis.probes[0] for axis in axes))


def short_names(axes: Sequence[Axis]) -> dict[str, str]:
    """Return a short name for each key: its last part, or the complete key if two share that part."""
    last = [axis.key.rsplit(".", 1)[-1] for axis in axes]
    return {axis.key: name if last.count(name) == 1 else axis.key for axis, name in zip(axes, last, strict=True)}


# ---- one axis ----


def _parsed(text: str) -> Override | None:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(text)
    except HydraException:
        return None


def _axis(override: Override, text: str, groups: Mapping[str, Sequence[str]], where: str | None = None) -> Axis:
    """Return the axis of a sweep override. where: the place that problems name; by default the key."""
    from hydra.core.override_parser.types import Glob, IntervalSweep, RangeSweep

    key, value_text = override.get_key_element(), text.partition("=")[2]
    where = where or key
    if refusal := _refusal_to_vary(key):
        reason, fix = refusal
        raise UserError(Problem(where, reason, fix, value_text))
    value: Any = override._value
    if isinstance(value, IntervalSweep):
        return _interval(key, where, value, value_text)
    if isinstance(value, Glob):
        texts = value.filter(list(groups.get(key, ())))
        if not texts:
            choices = ", ".join(groups.get(key, ())) or "glob() is for groups"
            raise UserError(Problem(where, "no choice of this group matches", choices, value_text))
    elif isinstance(value, RangeSweep) and value.step == 0:
        raise UserError(
            Problem(where, "the step of a range must not be 0", f"range({value.start},{value.stop},1)", value_text)
        )
    else:
        texts = list(override.sweep_string_iterator())
    if not texts:
        raise UserError(Problem(where, "the range holds no value", "range(FROM,TO,STEP) ends before TO", value_text))
    values = tuple(_value(key, text) for text in dict.fromkeys(texts))
    step = float(value.step) if override.is_range_sweep() else None
    integer = step is not None and all(isinstance(choice.plain, int) for choice in values)
    numbers = [choice.plain for choice in values] if step is not None else [0.0]
    return Axis(key, values, min(numbers), max(numbers), integer=integer, step=step and abs(step))


def _value(key: str, text: str) -> Value:
    override = _parsed(f"{key}={text}")
    plain: Any = text if override is None else override.value()
    return Value(text, text if isinstance(plain, (list, dict)) else plain)


def _interval(key: str, where: str, value: Any, value_text: str) -> Axis:
    low, high, log = value.start, value.end, LOG in value.tags
    takes_integers = all_keys().get(key) in (int, int | None)
    if not low < high:
        raise UserError(
            Problem(where, "an interval goes from a smaller to a larger number", f"interval({high},{low})", value_text)
        )
    if log and low <= 0:
        fix = f"a lower end above 0, or interval({low},{high}) without the tag"
        raise UserError(Problem(where, "a logarithm needs numbers above 0", fix, value_text))
    if takes_integers and not (float(low).is_integer() and float(high).is_integer()):
        raise UserError(
            Problem(where, "this key takes whole numbers", f"interval({int(low)},{int(high) + 1})", value_text)
        )
    return Axis(key, low=low, high=high, log=log, integer=takes_integers)


def _of_file(key: str, value: Any, groups: Mapping[str, Sequence[str]]) -> Axis:
    """Return an axis of `sweep.space`."""
    where = f"sweep.space.{key}"
    if isinstance(value, (list, tuple)):
        if not value:
            raise UserError(Problem(where, "there are no values", "give some: [A, B]", "[]"))
        value = f"choice({','.join(_element(item) for item in value)})"
    override = _parsed(f"{key}={value}") if isinstance(value, str) else None
    if override is None or not override.is_sweep_override():
        fix = '[A, B], "A,B", "range(FROM,TO)" or "interval(FROM,TO)"; a single value belongs to the key itself'
        raise UserError(Problem(where, "this is not a set of values", fix, format_value(value)))
    return _axis(override, f"{key}={value}", groups, where)


def _element(value: Any) -> str:
    """Return a value of YAML in Hydra's grammar."""
    if isinstance(value, str):
        escaped = re.sub(r"(\\*)'", r"\1\1\\'", value)
        return f"'{escaped}'"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(_element, value)) + "]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_element(item)}" for key, item in value.items()) + "}"
    return repr(value) if isinstance(value, float) else format_value(value)


def _refusal_to_vary(key: str) -> tuple[str, str] | None:
    """Return (reason, fix) if `key` cannot differ between trials; else None."""
    plain = key.lstrip("+~")
    section = plain.split(".", 1)[0]
    if section in ("sweep", "hydra") or plain.startswith("hydra/"):
        return "this is about the sweep, not about a trial", "give one value"
    if plain in ("run.dir", "run.name", "run.resume"):
        return (
            "every trial has its own directory and name",
            "leave it out; sweep.dir=FOLDER contains the directories of all trials",
        )
    if section == "launch" and plain != "launch.processes":
        return "trials of a sweep run in the same way", "give one value"
    if names_choice(plain):
        return "this names the choice of the group", f"{section}=A,B"
    return None


def _repeated(parts: Split) -> list[Problem]:
    keys = [axis.key for axis in parts.axes]
    fixed = {key_of(text): text.partition("=")[2] for text in parts.fixed}
    problems = []
    for key in dict.fromkeys(keys):
        if keys.count(key) > 1 or key in fixed:
            also = f", and as {key}={fixed[key]}" if key in fixed else ""
            problems.append(Problem(key, f"it is given more than once{also}", "give it once"))
    return problems
