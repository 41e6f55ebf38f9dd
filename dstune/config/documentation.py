"""Reads the documentation of every key from the classes of the schema, for `--help` and the guides (`tools/guides.py`)."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

from dstune.config import habits
from dstune.config.by_method import RATE
from dstune.config.convert import DEFAULT, describe, format_value
from dstune.config.examples import complete_example
from dstune.config.fields import BY_METHOD, DOC
from dstune.config.guidance import advice_of
from dstune.config.names import (
    OTHER_TOOLS,
    ROOT_KEYS,
    classes_of,
    entry_class,
    is_section,
    nearest,
    registered_values,
    sections,
    suggest_key,
    type_hints,
)
from dstune.config.ranges import TESTS
from dstune.config.schema import CHOICES
from dstune.core.errors import Problem, UserError
from dstune.core.plugin_files import KEY
from dstune.core.registry import on_change
from dstune.protocols import METHODS, OPTIMIZERS, TASKS


class Setting(NamedTuple):
    """One key. `group` is `trainer`, or `method=lora` where only that choice has the key."""

    group: str
    key: str
    type: str
    default: str
    doc: str


@cache
def _docs_in(module: str) -> dict[str, dict[str, str]]:
    """Return the string below each field of each class of a module, by class and field name."""
    docs: dict[str, dict[str, str]] = {}
    for node in ast.parse(inspect.getsource(sys.modules[module])).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for field, text in zip(node.body, node.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
            ):
                docs.setdefault(node.name, {})[field.target.id] = " ".join(str(text.value.value).split())
    return docs


def attribute_docs(cls: type) -> dict[str, str]:
    """Return the string below each field of `cls` and of its bases, by the field's name."""
    bases = [base for base in reversed(cls.__mro__) if dataclasses.is_dataclass(base)]
    return {name: doc for base in bases for name, doc in _docs_in(base.__module__).get(base.__name__, {}).items()}


@cache
def documentation() -> tuple[Setting, ...]:
    """Return every key that can be set, in the order of the schema. A key that several choices have is returned once for each."""
    settings: list[Setting] = []
    for section in sections():
        for choice, cls in classes_of(section).items():
            group = f"{section}={choice}" if choice else section
            settings += _settings_of(cls, group, section)
    settings.append(Setting("", KEY, "a list such as [a,b]", "[]", PLUGINS_DOC))
    return tuple(settings)


on_change(documentation.cache_clear)
on_change(_docs_in.cache_clear)

PLUGINS_DOC = (
    "Files (`./file.py`) and modules that add tasks, methods, metrics, callbacks, ...: read first, see docs/plugins.md."
)


def _settings_of(cls: type, group: str, prefix: str) -> list[Setting]:
    hints = type_hints(cls)
    docs = attribute_docs(cls)
    settings = []
    for field in dataclasses.fields(cls):
        hint, key = hints[field.name], f"{prefix}.{field.name}"
        if is_section(hint):
            settings += _settings_of(hint, group, key)
        elif not (field.name == "name" and prefix in CHOICES):  # chosen by `method=lora`, not set as a key
            default = getattr(cls(), field.name)
            doc = docs.get(field.name) or field.metadata.get(DOC, "")
            settings.append(Setting(group, key, describe(hint), format_value(default), doc))
            if entries := entry_class(hint):
                settings += _settings_of(entries, group, f"{key}.NAME")
    return settings


def merged() -> list[Setting]:
    """Return `documentation()` with a key that several choices share as one setting (`schedule=cosine|linear`)."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for setting in documentation():
        rows.setdefault(setting[1:], []).append(setting.group)
    result = []
    for (key, kind, default, doc), groups in rows.items():
        section = key.split(".", 1)[0]
        if section in ROOT_KEYS:
            result.append(Setting("", key, kind, default, doc))
            continue
        choices = [group.partition("=")[2] for group in groups]
        everywhere = choices == list(classes_of(section))
        result.append(Setting(section if everywhere else f"{section}={'|'.join(choices)}", key, kind, default, doc))
    return result


FLAGS = {
    "--multirun, -m": "a sweep: KEY=A,B, choice(A,B), range(FROM,TO,STEP) and, for Optuna, interval(FROM,TO) start a run for each",
    "--cfg, -c job|hydra|all": "check the composed configuration and print it instead of running",
    "--resolve": "with --cfg: references such as ${oc.env:NAME} as their values",
    "--package, -p KEY": "with --cfg: this part only, for example -p trainer",
    "--config-dir, -cd FOLDER": "add groups of your own: FOLDER/method/mine.yaml gives method=mine",
    "--info, -i [WHAT]": "how the configuration is composed: all, config, defaults, defaults-tree, plugins, searchpath",
    "--shell-completion, -sc": 'install=bash|zsh|fish prints what to evaluate: eval "$(dstune -sc install=bash)"',
    "--hydra-help": "Hydra's own settings",
    "--help, -h [GROUP|KEY]": "this page, or the help of a group, a choice or a key; `all` for everything",
}

EXAMPLES = {
    "dstune train": "the quickstart: SmolLM2 on dialogues, held-out loss before and after",
    "dstune train data.train=chats.jsonl model.path=ORG/MODEL method=lora": "your rows, a model of the hub, adapters",
    "dstune train experiment=sentiment trainer.epochs=2": "a packaged experiment with one value changed",
    "dstune train data.train='shards/*.parquet' task=causal_lm zero=stage2": "plain text",
    "dstune train experiment=sentiment run.dir=runs/mine": "the same command again continues the run",
    "dstune train -m experiment=chat_lora optimizer.lr=1e-4,2e-4 method.rank=8,16": "four runs, side by side in one report",
    "dstune train --cfg job experiment=sentiment": "check the configuration and print it",
}


def index(groups: Mapping[str, Sequence[str]]) -> str:
    """Return the text of `dstune train --help`: a page that leads to the help of groups and keys.

    Args:
        groups: the choices of each group, including the user's own.
    """
    lines = [
        "usage: dstune train [FILE.yaml] [GROUP=CHOICE ...] [KEY=VALUE ...] [flags]",
        "",
        "Fine-tune a model with DeepSpeed ZeRO. Values of the command line win over those of FILE, which win over those of an",
        "experiment, which win over those of the other groups. A list is KEY=[a,b], nothing is KEY=null.",
        "",
        "More:",
        "  dstune train --help GROUP     choices and keys of a group: --help method",
        "  dstune train --help CHOICE    keys of a choice: --help method=lora",
        "  dstune train --help KEY       meaning, range, default and advice: --help optimizer.lr",
        "  dstune train --help all       every key",
        "",
        *_block("Examples", EXAMPLES, 8),
        "Groups and sections",
    ]
    count = {
        section: len({setting.key for setting in documentation() if _section_of(setting) == section})
        for section in sections()
    }
    for name in dict.fromkeys([*groups, *sections()]):
        keys = f"{count[name]} key{'s' * (count[name] != 1)}" if name in count else ""
        choices = [choice for choice in groups.get(name, ()) if choice != "default"]
        choices_text = ", ".join(choices[:LISTED]) + (f", ... ({len(choices)})" if len(choices) > LISTED else "")
        first = f"  {name:<11} {keys:>8}  "
        lines += textwrap.wrap(choices_text, _width(), initial_indent=first, subsequent_indent=" " * len(first)) or [
            first.rstrip()
        ]
    return "\n".join([*lines, "", *_block("Flags", FLAGS, 30)])


LISTED = 6
"""Number of choices of a group that the index lists."""


def _section_of(setting: Setting) -> str:
    return setting.key.partition(".")[0]


def topic(name: str, groups: Mapping[str, Sequence[str]]) -> str:
    """Return the text of `dstune train --help NAME`, for a group, a choice (`method=lora`, `lora`), a key, or `all`.

    Raises:
        UserError: there is no such group, choice or key; suggests the nearest.
    """
    group, _, choice = name.partition("=")
    if name == "all":
        return help_text(groups)
    if any(setting.key == name for setting in documentation()):
        return _key_text(name)
    inside = [setting for setting in merged() if setting.key.startswith(f"{name}.")]
    if "=" not in name and (name in groups or inside):
        return _group_text(name, groups.get(name, ()), inside)
    owners = [(group, choice)] if choice else [(owner, name) for owner, names in groups.items() if name in names]
    owners = [(owner, chosen) for owner, chosen in owners if chosen in groups.get(owner, ())]
    if owners:
        return "\n".join(_choice_text(owner, chosen) for owner, chosen in owners)
    topics = [*groups, *sections(), *(f"{owner}={option}" for owner, names in groups.items() for option in names)]
    keys = [setting.key for setting in documentation()]
    similar = suggest_key(name, keys) or nearest(name, [*topics, *(word.partition("=")[2] for word in topics)])
    fix = f"did you mean --help {similar}?" if similar else "--help GROUP, --help KEY or --help all"
    raise UserError(Problem("--help", "there is no such group, choice or key", fix, name))


def _key_text(key: str) -> str:
    """Return one block about a key. Where the choices that have it differ, each text follows the choices that it is for."""
    settings = [setting for setting in merged() if setting.key == key]
    groups = [setting.group for setting in settings if "=" in setting.group]
    section = key.partition(".")[0]
    choices = "|".join(group.partition("=")[2] for group in groups)
    registered = registered_values().get(key)
    other_names = _names_elsewhere(key)
    lines = [
        f"{key}   ({section}={choices})" if choices else key,
        *_by_choice("meaning", [(setting.group, setting.doc) for setting in settings]),
        *_by_choice("type", [(setting.group, setting.type) for setting in settings]),
        *(_wrapped("values", ", ".join(registered)) if registered else []),
        *_by_choice("range", [(setting.group, _bounds(setting)) for setting in settings]),
        *_by_choice("default", [(setting.group, _default_of(setting)) for setting in settings]),
        *_by_choice("advice", [(setting.group, advice_of(key, setting.group)) for setting in settings]),
        *_wrapped("example", f"dstune train ... {_example(key)}"),
        *(_wrapped("also", f"{', '.join(other_names)} in other tools") if other_names else []),
    ]
    return "\n".join(lines)


def _by_choice(title: str, texts: Sequence[tuple[str, str]]) -> list[str]:
    """Return the lines of one property of a key. texts: its text for each group (`Setting.group`), empty where it has none."""
    choices_by_text: dict[str, list[str]] = {}
    for group, text in texts:
        choices_by_text.setdefault(text, []).append(group.partition("=")[2])
    same = len(choices_by_text) == 1
    lines: list[str] = []
    for text, choices in choices_by_text.items():
        if text:
            lines += _wrapped("" if lines else title, text if same else f"{'|'.join(choices)}: {text}")
    return lines


def _names_elsewhere(key: str) -> list[str]:
    """Return what other tools call a key."""
    same_value = [name for name, answer in habits.ANSWERS.items() if answer == f"{key}={{value}}" and "." not in name]
    return sorted({name for name, ours in OTHER_TOOLS.items() if ours == key} | {*same_value})


def _example(key: str) -> str:
    if ".NAME." in key:
        return f"{key}=VALUE"
    return complete_example(key).removeprefix("for example ").removesuffix(DEFAULT)


def _default_of(setting: Setting) -> str:
    if setting.key != RATE or BY_METHOD not in _metadata(setting.key, setting.group):
        return setting.default
    share = OPTIMIZERS.classes()[setting.group.partition("=")[2].split("|")[0]].rate_share
    if share != 1:
        return f"{share:g} times the rate for adamw"
    methods_by_rate: dict[float, list[str]] = {}
    for name, cls in METHODS.classes().items():
        methods_by_rate.setdefault(cls.learning_rate, []).append(name)
    of_methods = "; ".join(f"{rate:g} with method={'|'.join(names)}" for rate, names in sorted(methods_by_rate.items()))
    few = "|".join(name for name, cls in TASKS.classes().items() if cls.low_learning_rate)
    return of_methods + (f"; a tenth of it for task={few}" if few else "")


def _bounds(setting: Setting) -> str:
    """Return the range of a number in words; empty if it has none."""
    metadata = _metadata(setting.key, setting.group)
    return " and ".join(f"{words} {metadata[kind]:g}" for kind, (_, words) in TESTS.items() if kind in metadata)


def _metadata(key: str, group: str) -> Mapping[str, Any]:
    """Return the metadata of the key's field. `group` as in `Setting`."""
    section, *path = key.split(".")
    choice = group.partition("=")[2].split("|")[0]
    classes = classes_of(section) if section in sections() else {}
    cls: Any = classes.get(choice) or next(iter(classes.values()), None)
    for name in path[:-1]:
        cls = type_hints(cls).get(name) if is_section(cls) else None
    matching = [field for field in dataclasses.fields(cls) if field.name == path[-1]] if is_section(cls) else []
    return matching[0].metadata if matching else {}


def _group_text(name: str, choices: Sequence[str], settings: Sequence[Setting]) -> str:
    named_choices = [choice for choice in choices if choice != "default"]
    lines = [f"{name}: a group, chosen by {name}=CHOICE" if named_choices else f"{name}: a section of keys", ""]
    if named_choices:
        lines += _block("Choices", {choice: _description(name, choice) for choice in named_choices}, 16)
        if (default := _default_choice(name)) in named_choices:
            lines += [f"  {name}={default} where nothing else is said", ""]
    return "\n".join([*lines, *(_block("Keys", _rows(settings), 12) if settings else [])])


def _default_choice(group: str) -> str | None:
    """Return the choice that the root configuration makes for a group; None if it makes none."""
    import yaml

    from dstune.config.hydra_session import ROOT_CONFIG, config_folder

    root = yaml.safe_load((config_folder() / f"{ROOT_CONFIG}.yaml").read_text(encoding="utf-8"))
    return next((entry[group] for entry in root["defaults"] if isinstance(entry, dict) and group in entry), None)


def _choice_text(group: str, choice: str) -> str:
    settings = [
        setting
        for setting in merged()
        if setting.key.startswith(f"{group}.")
        and ("=" not in setting.group or choice in setting.group.partition("=")[2].split("|"))
    ]
    lines = [f"{group}={choice}", *_wrapped("meaning", _description(group, choice)), ""]
    return "\n".join([*lines, *(_block("Keys", _rows(settings, choice=False), 12) if settings else [])])


def _description(group: str, choice: str) -> str:
    """Return the description in the choice's file, or else in the docstring of its class."""
    from dstune.config.presets import description_of_choice

    if text := description_of_choice(group, choice):
        return text
    cls = CHOICES.find(group, choice) if group in CHOICES else None
    return " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split()) if cls is not None else ""


def _rows(settings: Sequence[Setting], choice: bool = True) -> dict[str, str]:
    """Return the meaning of each setting by `KEY=DEFAULT`. choice: whether to add the choices that have the key."""
    rows = {}
    names_by_key = registered_values()
    for setting in settings:
        only = f" [{setting.group}]" if choice and "=" in setting.group else ""
        names = f" ({setting.type})" if setting.type.startswith("one of") else ""
        if registered := names_by_key.get(setting.key):
            names = f" (there are: {', '.join(registered)})"
        rows[f"{setting.key}={setting.default}{only}"] = setting.doc + names
    return rows


def _width() -> int:
    return max(60, min(shutil.get_terminal_size().columns, 120))


def _wrapped(title: str, text: str) -> list[str]:
    return textwrap.wrap(
        text or "-", _width(), initial_indent=f"  {title:<10}", subsequent_indent=" " * 12, break_on_hyphens=False
    )


def _block(title: str, rows: Mapping[str, str], indent: int) -> list[str]:
    lines = [title]
    for key, right in rows.items():
        if len(key) < indent - 3:
            first = f"  {key}".ljust(indent)
        else:
            lines.append(f"  {key}")
            first = " " * indent
        lines += textwrap.wrap(
            right, _width(), initial_indent=first, subsequent_indent=" " * indent, break_on_hyphens=False
        ) or ([first.rstrip()] if first.strip() else [])
    return [*lines, ""]


def help_text(groups: Mapping[str, Sequence[str]]) -> str:
    """Return the text of `dstune train --help all`: every group and key.

    Args:
        groups: the choices of each group, including the user's own.
    """
    parts = [
        "usage: dstune train [FILE.yaml] [GROUP=CHOICE ...] [KEY=VALUE ...] [flags]",
        "",
        *_block("Groups (GROUP=CHOICE)", {group: ", ".join(choices) for group, choices in groups.items()}, 16),
        *_block("Keys and their defaults (KEY=VALUE)", _rows(merged()), 12),
        *_block("Flags", FLAGS, 30),
    ]
    return "\n".join(parts)
