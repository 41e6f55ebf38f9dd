"""Converts between the frozen tree and plain dicts or YAML. A value that does not fit is a `UserError` with key and fix.

Text from the environment (`${oc.env:KEY}`) becomes an `EnvironmentText`: code sees its value, but everything that is written
(run.yaml, the configuration sent to a tracker) contains only the reference, so no secret is saved.
"""

from __future__ import annotations

import re
import shlex
import types
import typing
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from typing import Any

import yaml

from dstune.config.fields import EXAMPLE, MemberName, options_of
from dstune.config.names import (
    OTHER_VALUES,
    ROOT_EXAMPLES,
    all_keys,
    classes_of,
    default_of,
    entry_class,
    field_of,
    is_section,
    nearest,
    sections,
    suggest_key,
    type_hints,
)
from dstune.config.schema import CHOICES, RunConfig
from dstune.core.errors import Problem, UserError, collected, first_line
from dstune.core.parsing import parse_yaml
from dstune.core.secrets import remember

ENVIRONMENT = "${oc.env:"
_REFERS = re.compile(r"\$\{\s*oc\.env\s*:")
"""Matches `ENVIRONMENT` with the spaces that OmegaConf allows."""
TRUE, FALSE = ("true", "yes", "on"), ("false", "no", "off")
EXAMPLES = {int: "100", float: "0.1", bool: "true", str: "NAME"}
"""Example values by type, for keys whose default is empty."""
DEFAULT = " (the default)"
"""The end of a fix that names a default."""


class EnvironmentText(str):
    """A value from the environment, with the reference (`${oc.env:KEY}`) that is written to files instead of it."""

    reference: str

    def __new__(cls, value: str, reference: str) -> EnvironmentText:
        text = super().__new__(cls, value)
        text.reference = _REFERS.sub(ENVIRONMENT, reference)
        remember(value, text.reference)
        return text

    def __reduce__(self) -> tuple[type[EnvironmentText], tuple[str, str]]:
        return EnvironmentText, (str(self), self.reference)


def refers(text: str) -> bool:
    """Return whether a text refers to the environment."""
    return _REFERS.search(text) is not None


def may_refer(text: str) -> bool:
    """Return whether Hydra could resolve a reference in a text; it reads `$\\{` as `${`, too."""
    return re.search(r"\$\\*\{", text) is not None


def resolve_text(text: str, where: str) -> EnvironmentText:
    """Return the value of a text with `${oc.env:KEY}` or `${oc.env:KEY,default}` in it.

    Raises:
        UserError: the variable is not set and has no default, or the text cannot be read.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return EnvironmentText(str(OmegaConf.create({"text": text}).text), text)
    except OmegaConfBaseException as error:
        raise UserError(interpolation_problem(where, text, error)) from None


class UnsetVariable(Problem):
    """A reference to an environment variable that is not set, directly or through another key."""


def interpolation_problem(where: str, text: str, error: Exception) -> Problem:
    """Return the problem with a `${...}` that cannot be resolved."""
    reason = first_line(error)
    if match := re.search(r"Environment variable '([^']+)' not found", reason):
        fix = f"export {match[1]}=..., or give a default: {ENVIRONMENT}{match[1]},default}}"
        return UnsetVariable(where, f"the environment variable {match[1]} is not set", fix, text)
    return Problem(where, f"this reference cannot be resolved: {reason}", f"write {ENVIRONMENT}NAME}} or a value", text)


# ---- one value ----


def describe(hint: Any) -> str:
    """Describe what a value of this type looks like, for messages and tables."""
    options = [part for part in typing.get_args(hint) if part is not type(None)]
    if is_optional(hint):
        return f"{describe(options[0])} or null"
    if len(options) > 1 and isinstance(hint, types.UnionType):
        return " or ".join(describe(part) for part in options)
    if words := options_of(hint):
        return "one of " * (len(words) > 1) + ", ".join(words)
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    if hint in names:
        return names[hint]
    origin = typing.get_origin(hint)
    if entry_class(hint):
        return "sections by name such as {a: {path: FILE}}"
    return {
        list: "a list such as [a,b]",
        tuple: "two numbers such as [0.9,0.95]",
        dict: "a mapping such as {a: b}",
    }.get(origin, "a section with keys")


def is_optional(hint: Any) -> bool:
    return isinstance(hint, types.UnionType) and type(None) in typing.get_args(hint)


def format_value(value: Any) -> str:
    """Write a value as a user writes it on the command line."""
    if isinstance(value, EnvironmentText):
        return value.reference
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(format_value(item) for item in value) + "]"
    if is_dataclass(value) and not isinstance(value, type):
        value = to_dict(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}: {format_value(item)}" for key, item in value.items()) + "}"
    return str(value).replace("\n", "\\n") or "''"


def convert(value: Any, hint: Any, where: str) -> Any:
    """Convert `value` (of YAML or of Hydra's grammar) to the type of a field.

    Raises:
        UserError: it does not fit; all problems inside a list, mapping or section are listed.
    """
    if is_section(hint):
        return build(hint, value, where)
    declared_hint = hint
    if is_optional(hint):
        if value is None:
            return None
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if isinstance(value, str) and not isinstance(value, EnvironmentText) and refers(value):
        value = resolve_text(value, where)

    def wrong() -> (
        UserError
    ):  # called only to raise it: made for every good value, it would be a third of the time to compose
        return UserError(
            Problem(where, f"expected {describe(declared_hint)}", _fix(value, hint, where), format_value(value))
        )

    if hint is Any:
        return _plain_any(value, where)
    if isinstance(hint, types.UnionType):
        return _one_of(value, typing.get_args(hint), where, wrong)
    if isinstance(hint, type) and issubclass(hint, Enum):
        if isinstance(value, hint):
            return value
        if isinstance(value, bool) or str(value) not in hint.__members__:  # `on` of YAML is a bool
            raise wrong()
        return hint[str(value)]
    if isinstance(hint, type) and issubclass(hint, MemberName):
        if value not in hint.options():
            raise wrong()
        return str(value)
    origin = typing.get_origin(hint)
    if origin in (list, tuple, dict):
        return _container(value, hint, origin, where, wrong)
    return _scalar(value, hint, wrong)


def _one_of(value: Any, hints: Sequence[Any], where: str, wrong: Callable[[], UserError]) -> Any:
    """Convert `value` to the first of `hints` that accepts it. Raises `wrong()` if none does."""
    for hint in hints:
        with suppress(UserError):
            return convert(value, hint, where)
    raise wrong()


def _scalar(value: Any, hint: Any, wrong: Callable[[], UserError]) -> Any:
    if hint is bool:
        if isinstance(value, str) and value.lower() in TRUE + FALSE:
            return value.lower() in TRUE
        if isinstance(value, bool) or value in (0, 1):
            return bool(value)
        raise wrong()
    if not isinstance(value, (int, float, str)):
        raise wrong()
    if hint is str:
        return value if isinstance(value, str) else str(value)
    if isinstance(value, bool) or (hint is int and isinstance(value, float)):
        raise wrong()
    try:
        # Text is converted because YAML 1.1 reads a hand-written 1e-5 as text, and the environment holds only text.
        return hint(value)
    except (ValueError, OverflowError):
        raise wrong() from None


def _container(value: Any, hint: Any, origin: type, where: str, wrong: Callable[[], UserError]) -> Any:
    arguments = typing.get_args(hint)
    problems: list[Problem] = []

    def item(part: Any, part_hint: Any, part_where: str) -> Any:
        try:
            return convert(part, part_hint, part_where)
        except UserError as error:
            problems.extend(error.problems)

    if origin is dict:
        if not isinstance(value, Mapping):
            raise wrong()
        result: Any = {str(key): item(part, arguments[1], f"{where}.{key}") for key, part in value.items()}
    else:
        if not isinstance(value, (list, tuple)) or (origin is tuple and len(value) != len(arguments)):
            raise wrong()
        hints = arguments if origin is tuple else arguments * len(value)
        result = origin(item(part, hints[i], f"{where}[{i}]") for i, part in enumerate(value))
    if problems:
        raise UserError(problems)
    return result


def _plain_any(value: Any, where: str) -> Any:
    if isinstance(value, Mapping):
        return {str(key): convert(part, Any, f"{where}.{key}") for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [convert(part, Any, f"{where}[{i}]") for i, part in enumerate(value)]
    return value


def _fix(value: Any, hint: Any, where: str) -> str:
    """Return a fix with what the user probably meant; an example, or nothing, if that cannot be guessed."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    words = [name for kind in kinds for name in options_of(kind)]
    if words:
        meant = OTHER_VALUES.get(str(value).lower())
        words += [*TRUE[:1], *FALSE[:1]] if bool in kinds else []
        similar = meant if meant in words else nearest(str(value).lower(), words, cutoff=0.5)
        if similar:
            return f"{where}={similar}"
    if hint is int and isinstance(value, float) and value.is_integer():
        return f"{where}={int(value)}"  # 1e3
    if isinstance(value, (list, tuple)) and len(value) > 1 and hint in (int, float, str) and where in all_keys():
        values = ",".join(format_value(item) for item in value)
        return f"a run for each of them: {shlex.join(['dstune', 'train', '--multirun', f'{where}={values}'])}"
    if typing.get_origin(hint) is list and isinstance(value, (str, int, float)):
        return f"{where}=[{format_value(value)}]"
    if typing.get_origin(hint) is dict and (pair := re.fullmatch(r"(\w+):(\S+)", str(value))):
        return f"'{where}={{{pair[1]}: {pair[2]}}}'"  # without quotes, bash takes the braces for alternatives
    return example(where) if where in all_keys() else ""


def typed(key: str, value: str) -> str:
    """Write `key=value` with the quotes that a shell needs. value: in Hydra's grammar (`literal` writes any text in it)."""
    return shlex.quote(f"{key}={value}")


def literal(text: str) -> str:
    """Write a text in Hydra's grammar: in quotes if Hydra would read something else, or several values."""
    is_plain = _PLAIN.fullmatch(text) and text.lower() not in ("null", "true", "false", "nan", "inf")
    escaped = re.sub(r'(\\*)"', r'\1\1\\"', re.sub(r"(\\+)$", r"\1\1", text))
    return text if is_plain else f'"{escaped}"'


_PLAIN = re.compile(r"[A-Za-z_./]([\w./:%@?|+* -]*[\w./:%@?|+*-])?", re.ASCII)


def example(key: str) -> str:
    """Return an example that sets `key` to a valid value, where the run has all that the key needs (see `complete_example`)."""
    setting = typed(key, example_value(key))
    return f"{setting}{DEFAULT}" if has_default(key) else f"for example {setting}"


def has_default(key: str) -> bool:
    """Return whether the example of a key is its default."""
    field = field_of(key)
    return default_of(key) not in (None, "", [], {}) and not (field and EXAMPLE in field.metadata)


def example_value(key: str) -> str:
    """Return a valid value of a key, in Hydra's grammar: of its field's `example`, else the default, else one of its type."""
    if key in ROOT_EXAMPLES:
        return ROOT_EXAMPLES[key]
    field = field_of(key)
    if field and EXAMPLE in field.metadata:
        return str(field.metadata[EXAMPLE])
    hint, default = all_keys()[key], default_of(key)
    if has_default(key):
        return literal(default) if isinstance(default, str) else format_value(default)
    if is_optional(hint):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if options := options_of(hint):
        return options[0]
    other = {list: "[NAME,NAME]", dict: "{NAME: VALUE}"}.get(typing.get_origin(hint), "VALUE")
    return EXAMPLES.get(hint, other)


# ---- the tree ----


def build(cls: type, value: Any, where: str) -> Any:
    """Build an instance of the dataclass `cls` from a mapping; missing keys get the default.

    Raises:
        UserError: unknown keys (with the nearest valid one) and values of the wrong type, all of them.
    """
    if isinstance(value, cls):
        return value
    hints = type_hints(cls)
    if not isinstance(value, Mapping):
        keys = ", ".join(f"{where}.{name}" for name in hints)
        raise UserError(Problem(where, "this is a section, not a value", f"set one of {keys}", format_value(value)))
    problems = [unknown_key(f"{where}.{key}", hints, where) for key in value if key not in hints]
    arguments = {}
    for name, hint in hints.items():
        if name not in value:
            continue
        with collected(problems):
            arguments[name] = convert(value[name], hint, f"{where}.{name}")
    if problems:
        raise UserError(problems)
    return cls(**arguments)


def unknown_key(key: str, names: Mapping[str, Any], section: str) -> Problem:
    """Return the problem with a key that `section` does not have."""
    similar = suggest_key(key, [f"{section}.{name}" for name in names])
    fix = f"did you mean {similar}?" if similar else f"it has {', '.join(names)}"
    return Problem(key, f"{section} has no such key", fix)


def from_dict(raw: Any, where: str) -> RunConfig:
    """Build the frozen tree from nested mappings (`to_dict`'s inverse). `where` names the source in messages.

    Raises:
        UserError: every unknown key, missing choice and value of the wrong type.
    """
    config, problems = partly_from_dict(raw, where)
    if problems:
        raise UserError(problems)
    return config


def partly_from_dict(raw: Any, where: str) -> tuple[RunConfig, list[Problem]]:
    """Build the tree as `from_dict` does, but with defaults for sections that have problems. Returns the tree and all problems."""
    if not isinstance(raw, Mapping):
        raise UserError(Problem(where, "this is not a configuration (a mapping of sections)"))
    problems = []
    for name in raw:
        if name not in sections():
            similar = nearest(str(name), sections())
            fix = f"did you mean {similar}?" if similar else f"sections are {', '.join(sections())}"
            problems.append(Problem(str(name), f"unknown section in {where}", fix))
    built = {}
    for section in sections():
        value = raw.get(section)
        if section not in raw and section in LATER:
            continue
        try:
            built[section] = build(chosen_class(section, value, where), {} if value is None else value, section)
        except UserError as error:
            problems += error.problems
            built[section] = next(iter(classes_of(section).values()))()
    return RunConfig(**built), problems


LATER = frozenset(field.name for field in fields(RunConfig) if field.default_factory is not MISSING)
"""Sections that were added later, so the run.yaml of an earlier version may lack them."""


def chosen_class(section: str, value: Any, where: str) -> type:
    """Return the class of a section; if the section has choices, that of the choice `name` in `value`.

    Raises:
        UserError: `value` names no choice, or one that does not exist.
    """
    classes = classes_of(section)
    if section not in CHOICES:
        return classes[""]
    name = value.get("name") if isinstance(value, Mapping) else None
    if isinstance(name, str) and name in classes:
        return classes[name]
    if name is None:
        fix = f"add `name:` with one of {', '.join(classes)}, or inherit a choice with `defaults: [CHOICE, _self_]`"
        raise UserError(Problem(f"{section}.name", f"{where} does not say which {section} this is", fix))
    similar = nearest(str(name), classes)
    fix = f"did you mean {similar}?" if similar else f"one of {', '.join(classes)}"
    raise UserError(Problem(f"{section}.name", f"there is no such {section}", fix, format_value(name)))


def to_dict(config: Any) -> Any:
    """Return the tree as plain dicts, with the names of enums, lists for tuples, and references for text from the environment."""
    if is_dataclass(config) and not isinstance(config, type):
        return {field.name: to_dict(getattr(config, field.name)) for field in fields(config)}
    if isinstance(config, EnvironmentText):
        return config.reference
    if isinstance(config, Enum):
        return config.name
    if isinstance(config, Mapping):
        return {key: to_dict(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_dict(value) for value in config]
    return config


def to_yaml(config: RunConfig) -> str:
    """Write the tree as YAML in the order of the schema; `load` and `from_dict` give back an equal tree."""
    return dump(to_dict(config))


def dotted(tree: Mapping[str, Any], leaves: Container[str] = (), prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) for every leaf of nested mappings. A mapping whose key is in `leaves` counts as a leaf."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and key not in leaves:
            yield from dotted(value, leaves, f"{key}.")
        else:
            yield key, value


def dump(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=1_000_000)


def load(text: str, where: str) -> Any:
    """Parse YAML into plain values.

    Raises:
        UserError: the text is no YAML; names the line.
    """
    try:
        return parse_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(yaml_problem(error, where)) from None


def yaml_problem(error: yaml.YAMLError, where: str) -> Problem:
    """Return the problem with a text that is no YAML, with its line."""
    mark = getattr(error, "problem_mark", None)
    place = f"{where}:{mark.line + 1}" if mark else where
    return Problem(place, f"this is no YAML: {getattr(error, 'problem', None) or error}")
