"""Parses and checks the `key=value` overrides that a user wrote.

Hydra stops at the first bad override. `check` compares each override with the groups and the schema, so one command line with three
mistakes gets one answer with three fixes, each with the nearest valid name.
"""

from __future__ import annotations

import re
import shlex
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yaml import YAMLError

from dstune.config import habits
from dstune.config.convert import build, convert, example, format_value, is_optional
from dstune.config.examples import complete, complete_example, needs_of
from dstune.config.fields import EXAMPLE
from dstune.config.names import (
    all_keys,
    choices_with,
    classes_of,
    entry_class,
    entry_leaves,
    field_of,
    is_section,
    keys_below,
    keys_of,
    names_choice,
    nearest,
    sections,
    suggest_key,
    type_hints,
)
from dstune.config.not_offered import not_offered
from dstune.config.schema import CHOICES
from dstune.config.words import meaning, packaged_choices, rejoined
from dstune.core.errors import Problem, UserError
from dstune.core.parsing import parse_yaml

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

QUOTED_FIX = "quote the value for Hydra inside quotes for the shell: '{key}=\"{value}\"'"
ENTRY = "for example trainer.max_steps=100"


def key_of(text: str) -> str:
    """Return the key of an override as written, without `+`, `++`, `~` and a package (`@...`)."""
    return text.split("=", 1)[0].lstrip("+~").split("@", 1)[0].strip()


def quoted(text: str) -> str:
    """Quote `text` as a value of Hydra's grammar, whatever characters it has."""
    # Hydra keeps backslashes, except in front of a quote and at the end.
    escaped = re.sub(r"(\\+)$", r"\1\1", re.sub(r"(\\*)'", r"\1\1\\'", text))
    return f"'{escaped}'"


def for_hydra(overrides: Sequence[str]) -> list[str]:
    """Return the overrides in the form that Hydra accepts.

    Hydra adds an entry to a mapping only with a plus, which users need not write: `data.columns.text=review` becomes
    `++data.columns.text=review`. Hydra cannot choose nothing from a group, so `experiment=null` is left out.
    """
    # Only the rooms of the sections in the overrides are imported.
    named_sections = {key.partition(".")[0] for key in map(key_of, overrides) if "." in key}
    keys = {
        key: hint for section in sections() if section in named_sections for key, hint in keys_below(section).items()
    }
    mappings = [key for key, hint in keys.items() if typing.get_origin(hint) is dict]
    starts = tuple(f"{key}{end}" for key in mappings for end in ".=")
    texts = [_with_literal_name(text) for text in overrides if text != "experiment=null"]
    return [f"++{text}" if text.startswith(starts) else text for text in texts]


def parse(texts: Sequence[str]) -> tuple[list[Override], list[Problem]]:
    """Return the overrides that Hydra's grammar accepts, and a problem for each of the others."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    parsed: list[Override] = []
    texts, problems = rejoined(texts)
    texts = [_with_literal_name(text) for text in texts]
    for previous, text in zip(["", *texts], texts, strict=False):
        try:
            override = parser.parse_override(text)
        except HydraException:
            problems.append(_grammar_problem(text, previous))
            continue
        override.input_line = text
        if override.is_sweep_override():
            key, value = override.key_or_group, text.split("=", 1)[1]
            reason = "several values start a sweep, with a run for each"
            problems.append(Problem(key, reason, _one_value(key, value), value))
        else:
            parsed.append(override)
    return parsed, problems


_COLUMN = re.compile(r"([+]*data\.(?:mixture\.[^.=]+\.)?columns\.[^.=]+=)(.*)", re.DOTALL)
"""Matches an override that names the column for a role."""

_PLAIN_NAME = re.compile(r"[A-Za-z_][\w-]*", re.ASCII)
_QUOTED_NAME = re.compile(r"(['\"]).*\1|.*\$\{.*", re.DOTALL)
_WORDS_OF_HYDRA = ("null", "true", "false", "nan", "inf")


def _with_literal_name(text: str) -> str:
    """Quote the name in `data.columns.ROLE=NAME` if Hydra's grammar would read it differently; other texts stay the same."""
    match = _COLUMN.fullmatch(text)
    if match is None or _QUOTED_NAME.fullmatch(match[2]) or not match[2]:
        return text
    plain = _PLAIN_NAME.fullmatch(match[2]) and match[2].lower() not in _WORDS_OF_HYDRA
    return text if plain else match[1] + quoted(match[2])


def _one_value(key: str, value: str) -> str:
    """Return the fix for several values (`a,b`) of a key that takes one."""
    hint = all_keys().get(key)
    if typing.get_origin(hint) in (list, tuple):
        return f"{key}=[{value}]"
    if _takes_any_text(f"{key}={value}"):
        return QUOTED_FIX.format(key=key, value=value)
    first = value.split(",")[0]
    is_unknown = key in (choices := packaged_choices()) and first not in choices[key]
    return "`dstune train --multirun` starts them" + ("" if is_unknown else f"; one of them is {key}={first}")


def _with_closed_brackets(key: str, value: str) -> str:
    """Return `key=value` with the brackets that are missing at its end; if more than these are wrong, the quoted value."""
    missing: list[str] = []
    for character in value:
        if character in "[{":
            missing.append({"[": "]", "{": "}"}[character])
        elif character in "]}" and (not missing or missing.pop() != character):
            return QUOTED_FIX.format(key=key, value=value)
    return shlex.quote(f"{key}={value}{''.join(reversed(missing))}")


def _quoted_entries(key: str, value: str) -> str:
    """Return a fix with the quoted values of a mapping, as it is typed in a shell."""
    entries = [entry.partition(":") for entry in value[1:-1].split(",")]
    inside = ", ".join(f'{name.strip()}: "{text.strip()}"' if colon else name for name, colon, text in entries)
    return f"quote its values: '{key}={{{inside}}}'"


def _grammar_problem(text: str, previous: str) -> Problem:
    """Return the problem with a word that Hydra's grammar refuses. previous: the word before it."""
    key, equals, value = text.partition("=")
    key = key.lstrip("+")
    if not equals:
        fix = meaning(text) or ENTRY
        if text and _takes_any_text(previous):  # `run.name=my run` without quotes
            fix = f"{fix}; or, if it belongs to the word before, quote both: {shlex.quote(f'{previous} {text}')}"
        return Problem(text or "''", "expected KEY=VALUE", fix)
    if value.count("[") != value.count("]") or value.count("{") != value.count("}"):
        return Problem(key, "a bracket of the value is not closed", _with_closed_brackets(key, value), value)
    if not re.fullmatch(r"~{0,2}[\w./@:-]+", key):
        return Problem(key, "this is no name of a key", meaning(key) or ENTRY, value)
    if value.startswith("~"):
        return Problem(key, "the shell did not expand the ~", f"{key}={Path(value).expanduser()}", value)
    if value.startswith("{") and value.endswith("}"):
        return Problem(key, "the value has characters with a meaning in Hydra", _quoted_entries(key, value), value)
    return Problem(
        key, "the value has characters with a meaning in Hydra", QUOTED_FIX.format(key=key, value=value), value
    )


def _takes_any_text(setting: str) -> bool:
    """Return whether `setting` (`KEY=VALUE`) gives a text, which may have spaces."""
    key, equals, _ = setting.partition("=")
    hint = all_keys().get(key.lstrip("+"))
    return bool(equals) and (hint is str or (hint is not None and is_optional(hint) and str in typing.get_args(hint)))


def is_group_choice(override: Override, groups: Mapping[str, Sequence[str]]) -> bool:
    """Return whether the override chooses from a group. Hydra merges a mapping into the group instead."""
    return override.key_or_group in groups and not isinstance(override.value(), dict)


def is_hydra_setting(override: Override) -> bool:
    """Return whether the override sets something of Hydra itself that dstune does not use (all but `hydra.searchpath`)."""
    key = override.key_or_group
    return (key == "hydra" or key.startswith(("hydra.", "hydra/"))) and key != "hydra.searchpath"


def hydra_would_take(override: Override) -> bool:
    """Return whether Hydra may accept the override although it is wrong, so that it must be checked before."""
    key = override.key_or_group
    # Hydra accepts any value for a key of several types.
    is_not_offered = not_offered(key, override.value()) is not None
    return (
        is_not_offered
        or is_hydra_setting(override)
        or names_choice(key)
        or override.is_delete()
        or _leaves_group(override)
    )


def _leaves_group(override: Override) -> bool:
    """Return whether a choice is a path that leaves the folder of its group: Hydra would compose any file there."""
    value = override.value()
    return "." not in override.key_or_group and isinstance(value, str) and ".." in re.split(r"[/\\]", value)


@dataclass
class Checked:
    """The overrides that can be applied, and the problems with the others."""

    problems: list[Problem] = field(default_factory=list)
    good: list[Override] = field(default_factory=list)
    doubtful: set[str] = field(default_factory=set)
    """Keys and sections that the wrong overrides were meant for; "" stands for all (see `validate.find_problems`)."""


def check(
    overrides: Sequence[Override],
    groups: Mapping[str, Sequence[str]],
    compose_classes: Callable[[list[str]], dict[str, type]],
) -> Checked:
    """Collect everything that is wrong with parsed overrides.

    Args:
        groups: the choices of each group.
        compose_classes: the class of each section for a list of group choices.
    """
    checked = Checked()
    choices: list[Override] = []
    undecided: set[str] = set()
    values = []
    for override in overrides:
        key = override.key_or_group
        problems: list[Problem] = []
        is_offered = override.value() in groups.get(key, ())  # a plugin may offer what dstune does not
        if not is_offered and (problem := not_offered(key, override.value())) is not None:
            problems = [problem]
            undecided.update([key] if key in CHOICES else [])
        elif key == "hydra.searchpath":
            choices.append(override)
        elif is_hydra_setting(override):
            problems = [_hydra_setting(override)]
        elif is_group_choice(override, groups):
            if problems := _choice_problems(override, groups):
                # A wrong experiment may have chosen any class.
                undecided.update(CHOICES if key == "experiment" else [key])
            else:
                choices.append(override)
        elif "/" in key or override.package is not None:
            similar = nearest(key, groups)
            fix = f"did you mean {similar}=CHOICE?" if similar else f"groups are {', '.join(groups)}"
            problems = [Problem(key, "there is no such group", fix, format_value(override.value()))]
        else:
            values.append(override)
        if problems:
            checked.problems += problems
            checked.doubtful.add(meant_by(key))
    checked.good += choices
    classes = compose_classes([str(override.input_line) for override in choices])
    for override in values:
        key = override.key_or_group
        problems = []
        if key.split(".", 1)[0] not in undecided:
            problems = _value_problems(override, classes, groups)
        elif key not in all_keys():
            problems = [_unknown_key(key, all_keys(), classes, groups, override.value())]
        if problems:
            checked.problems += problems
            checked.doubtful.add(meant_by(key))
        elif key.split(".", 1)[0] not in undecided:
            checked.good.append(override)
    return checked


def meant_by(key: str) -> str:
    """Return the key, section or group that a wrong override was probably meant for; "" (all of them) if that cannot be guessed."""
    if key in all_keys() or key in sections():
        return key
    meant = suggest_key(key, all_keys()) or nearest(key.split(".", 1)[0], sections(), cutoff=0.7)
    if meant is None and (inside := key.rpartition(".")[0]):
        return meant_by(inside)
    return meant or ""


SWEEPER_KEYS = {
    "hydra/sweeper": "sweep",
    "hydra/sweeper/sampler": "sweep.sampler",
    "hydra.sweeper.params": "sweep.space",
    "hydra.sweeper.n_trials": "sweep.trials",
    "hydra.sweeper.n_jobs": "sweep.parallel",
    "hydra.sweeper.storage": "sweep.storage",
    "hydra.sweeper.study_name": "sweep.study",
    "hydra.sweeper.sampler.seed": "sweep.seed",
    "hydra.sweeper.max_batch_size": "sweep.parallel",
    "hydra.sweep.dir": "sweep.dir",
    "hydra/launcher": "launch",
}
"""dstune's keys for the settings of sweeps of Hydra and its plugins."""


def _hydra_setting(override: Override) -> Problem:
    key = override.key_or_group
    if key_here := SWEEPER_KEYS.get(key):
        value = format_value(override.value())
        reason = "dstune runs sweeps itself and has its own key for this"
        if key == "hydra/launcher":
            value = "slurm" if "submitit" in value else "local"
        fix = complete(f"{key_here}={value}") + (" with --multirun" if key == "hydra/sweeper" else "")
        return Problem(key, reason, fix, format_value(override.value()))
    if key == "hydra.sweeper.direction":
        fix = "leave it out: sweep.objective=[METRIC] names metrics, and dstune knows for each which way is better"
        return Problem(key, "dstune runs sweeps itself", fix, format_value(override.value()))
    fix = "run.dir=FOLDER chooses the run directory" if ".dir" in key else "leave it out"
    reason = (
        "dstune launches runs and writes files itself; hydra.searchpath is the only setting of Hydra that has an effect"
    )
    return Problem(key, reason, fix, format_value(override.value()))


def _choice_problems(override: Override, groups: Mapping[str, Sequence[str]]) -> list[Problem]:
    group, value = override.key_or_group, override.value()
    if override.is_delete():
        sufficient = [name for name in groups[group] if not needs_of(f"{group}={name}")]
        return [Problem(group, "a group cannot be removed", f"choose one: {group}={'|'.join(sufficient)}")]
    if override.is_add() or override.is_force_add():
        return [
            Problem(
                group,
                "the group already has a choice",
                f"write {complete(f'{group}={format_value(value)}')}",
                format_value(value),
            )
        ]
    if value is None:
        return [Problem(group, "this group needs a choice", f"one of {', '.join(groups[group])}", "null")]
    chosen = value if isinstance(value, list) else [value]
    return [
        habits.unknown_choice(group, format_value(name), groups[group]) for name in chosen if name not in groups[group]
    ]


def _value_problems(
    override: Override, classes: Mapping[str, type], groups: Mapping[str, Sequence[str]]
) -> list[Problem]:
    key, value = override.key_or_group, override.value()
    section = key.split(".", 1)[0]
    keys = keys_of(classes)
    inside = next((name for name, hint in keys.items() if _is_entry(key, name, hint)), None)
    if override.is_delete():
        if inside:
            return []
        return [Problem(key, "a key cannot be removed", f"give it a value: {key}=VALUE")]
    if names_choice(key):
        fix = f"write {section}={format_value(value)}"
        return [
            Problem(key, "this is the name of the group's choice and cannot be set as a key", fix, format_value(value))
        ]
    try:
        if inside and (entry := entry_class(keys[inside])) and key.count(".") > inside.count(".") + 1:
            return _entry_problems(key, value, inside, entry)
        if inside:
            if problem := _nested_problem(key, value, inside, keys[inside]):
                return [problem]
            convert(value, typing.get_args(keys[inside])[1], key)
        elif key in keys:
            convert(value, keys[key], key)
        elif (owner := _section_class(key, classes)) is not None:
            if not isinstance(value, Mapping) and (words := habits.answer(key, format_value(value))):
                return [Problem(key, "this is a section, not a value", habits.as_fix(words), format_value(value))]
            build(owner, value, key)
        else:
            return [_unknown_key(key, keys, classes, groups, value)]
    except UserError as error:
        return error.problems
    if override.is_add() and not override.is_force_add() and not inside:
        return [Problem(key, "the key exists already", f"write {key}={format_value(value)}", format_value(value))]
    return []


def _nested_problem(key: str, value: Any, mapping: str, hint: Any) -> Problem | None:
    """Return the problem with a key inside a value of `mapping` (`data.columns.text.a`), which Hydra makes of a name with a dot."""
    name = key.removeprefix(f"{mapping}.")
    if "." not in name or typing.get_args(hint)[1] is Any:
        return None
    fix = f"'{mapping}={{{name}: {format_value(value)}}}', if the name has a dot"
    return Problem(key, f"the values of {mapping} have no keys", fix, format_value(value))


def _entry_problems(key: str, value: Any, mapping: str, entry: type) -> list[Problem]:
    """Return the problems with a key of one entry of a mapping of sections (`data.mixture.code.weight`).

    Raises:
        UserError: the value has the wrong type.
    """
    hint_by_key = entry_leaves(key, mapping, entry)
    inside = next((name for name, hint in hint_by_key.items() if _is_entry(key, name, hint)), None)
    if inside:
        convert(value, typing.get_args(hint_by_key[inside])[1], key)
    elif key in hint_by_key:
        convert(value, hint_by_key[key], key)
    else:
        similar = suggest_key(key, hint_by_key)
        fix = f"did you mean {similar}={format_value(value)}?" if similar else f"it has {', '.join(hint_by_key)}"
        return [Problem(key, f"an entry of {mapping} has no such key", fix, format_value(value))]
    return []


def _as_value(key: str, hint: Any, text: str) -> str:
    """Return a fix that gives `key` the value `text`; an example if it cannot have it, or takes lists that nobody would guess."""
    is_list = typing.get_origin(hint) in (list, tuple)
    if is_list and (field := field_of(key)) and EXAMPLE in field.metadata:
        return complete_example(key)
    value = f"[{text}]" if is_list else text
    try:
        convert(parse_yaml(value), hint, key)
    except (UserError, YAMLError):
        return example(key)
    return f"write {key}={value}"


def _is_entry(key: str, mapping: str, hint: Any) -> bool:
    return typing.get_origin(hint) is dict and key.startswith(f"{mapping}.")


def _section_class(key: str, classes: Mapping[str, type]) -> type | None:
    """Return the class of a section or a section inside one (`trainer.early_stopping`), None if `key` is no section."""
    first, *names_below = key.split(".")
    hint = classes.get(first)
    for name in names_below:
        hint = type_hints(hint).get(name) if is_section(hint) else None
    return hint if is_section(hint) else None


def _unknown_key(
    key: str, keys: Mapping[str, Any], classes: Mapping[str, type], groups: Mapping[str, Sequence[str]], value: Any
) -> Problem:
    section = key.split(".", 1)[0]
    text = format_value(value)
    if words := habits.answer(key, text):
        reason = f"{section} has no such key" if "." in key and section in sections() else "there is no such key"
        return Problem(key, reason, habits.as_fix(words), text)
    if other := choices_with(key):
        chosen = next(name for name, cls in classes_of(section).items() if cls is classes[section])
        fix = f"it is a key of {' and '.join(other)}: choose that or leave it out"
        why = getattr(classes[section], "absent_keys", {}).get(key.removeprefix(f"{section}."))
        return Problem(key, f"{section}={chosen} has no such key" + (f": {why}" if why else ""), fix, text)
    parents = (key.rsplit(".", count)[0] for count in range(1, key.count(".") + 1))
    if leaf := next((parent for parent in parents if parent in keys), None):
        is_list = typing.get_origin(keys[leaf]) in (list, tuple)
        reason = f"{leaf} is a {'list' if is_list else 'value'}, so it has no keys"
        return Problem(key, reason, _as_value(leaf, keys[leaf], text), text)
    if "." not in key and (group := nearest(key, groups, cutoff=0.7)):
        return Problem(key, "there is no such group or key", f"did you mean {group}={text}?", text)
    similar = suggest_key(key, keys) or suggest_key(key, all_keys())
    reason = f"{section} has no such key" if section in sections() else "there is no such key"
    if similar:
        return Problem(key, reason, f"did you mean {similar}={text}?", text)
    if section in sections():
        section_keys = ", ".join(name for name in keys if name.startswith(f"{section}.") and not names_choice(name))
        return Problem(key, reason, f"it has {section_keys}" if section_keys else f"{section} has no keys", text)
    return Problem(key, reason, "`dstune train --help all` lists all keys", text)
