"""The documentation of every key, read from the classes of the schema: for `--help`, and for the guides (`tools/guides.py`)."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

from dstune.config.convert import describe, format_value
from dstune.config.fields import DOC
from dstune.config.names import ROOT_KEYS, classes_of, entry_class, is_section, registered_values, sections, type_hints
from dstune.config.schema import CHOICES
from dstune.core.plugin_files import KEY
from dstune.core.registry import on_change


class Setting(NamedTuple):
    """One key. `group` is `trainer`, or `method=lora` where only that choice has the key."""

    group: str
    key: str
    type: str
    default: str
    doc: str


@cache
def _docs_in(module: str) -> dict[str, dict[str, str]]:
    """The string below each field of each class of a module, by class and field name."""
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
    """The string below each field of `cls` and of its bases, by the field's name."""
    bases = [base for base in reversed(cls.__mro__) if dataclasses.is_dataclass(base)]
    return {name: doc for base in bases for name, doc in _docs_in(base.__module__).get(base.__name__, {}).items()}


@cache
def documentation() -> tuple[Setting, ...]:
    """Every key that can be set, in the order of the schema. A key of several choices comes once for each."""
    settings: list[Setting] = []
    for section in sections():
        for choice, cls in classes_of(section).items():
            group = f"{section}={choice}" if choice else section
            settings += _of_class(cls, group, section)
    settings.append(Setting("", KEY, "a list such as [a,b]", "[]", PLUGINS_DOC))
    return tuple(settings)


on_change(documentation.cache_clear)
on_change(_docs_in.cache_clear)

PLUGINS_DOC = (
    "Files (`./file.py`) and modules that add tasks, methods, metrics, callbacks, ...: read first, see docs/plugins.md."
)


def _of_class(cls: type, group: str, prefix: str) -> list[Setting]:
    hints = type_hints(cls)
    docs = attribute_docs(cls)
    settings = []
    for field in dataclasses.fields(cls):
        hint, key = hints[field.name], f"{prefix}.{field.name}"
        if is_section(hint):
            settings += _of_class(hint, group, key)
        elif not (field.name == "name" and prefix in CHOICES):  # said by `method=lora`, not by itself
            default = getattr(cls(), field.name)
            doc = docs.get(field.name) or field.metadata.get(DOC, "")
            settings.append(Setting(group, key, describe(hint), format_value(default), doc))
            if entries := entry_class(hint):
                settings += _of_class(entries, group, f"{key}.NAME")
    return settings


def merged() -> list[Setting]:
    """`documentation()` with equal keys of several choices as one row (`schedule=cosine|linear`)."""
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
    "--cfg, -c job|hydra|all": "print the composed configuration instead of running",
    "--resolve": "with --cfg: references such as ${oc.env:NAME} as their values",
    "--package, -p KEY": "with --cfg: this part only, for example -p trainer",
    "--config-dir, -cd FOLDER": "add groups of your own: FOLDER/method/mine.yaml gives method=mine",
    "--info, -i [WHAT]": "how the configuration is composed: all, config, defaults, defaults-tree, plugins, searchpath",
    "--shell-completion, -sc": 'install=bash|zsh|fish prints what to evaluate: eval "$(dstune -sc install=bash)"',
    "--hydra-help": "Hydra's own settings",
    "--help, -h": "this text",
}

EXAMPLES = {
    "dstune train": "the quickstart: SmolLM2 on dialogues, held-out loss before and after",
    "dstune train data.train=chats.jsonl model.path=ORG/MODEL method=lora": "your rows, a model of the hub, adapters",
    "dstune train experiment=sentiment trainer.epochs=2": "a packaged experiment with one value changed",
    "dstune train data.train='shards/*.parquet' task=causal_lm zero=stage2": "plain text",
    "dstune train experiment=sentiment run.dir=runs/mine": "the same command again continues the run",
    "dstune train -m experiment=chat_lora optimizer.lr=1e-4,2e-4 method.rank=8,16": "four runs, side by side in one report",
    "dstune train --cfg job experiment=sentiment": "print the configuration only",
}


def help_text(groups: Mapping[str, Sequence[str]]) -> str:
    """The text of `dstune train --help`.

    Args:
        groups: the choices of each group, user's own included.
    """
    width = max(60, min(shutil.get_terminal_size().columns, 120))

    def block(title: str, rows: Mapping[str, str], indent: int) -> list[str]:
        lines = [title]
        for left, right in rows.items():
            if len(left) < indent - 3:
                first = f"  {left}".ljust(indent)
            else:
                lines.append(f"  {left}")
                first = " " * indent
            lines += textwrap.wrap(
                right, width, initial_indent=first, subsequent_indent=" " * indent, break_on_hyphens=False
            ) or [first.rstrip()]
        return [*lines, ""]

    keys = {}
    named = registered_values()
    for setting in merged():
        only = f" [{setting.group}]" if "=" in setting.group else ""
        names = f" ({setting.type})" if setting.type.startswith("one of") else ""
        if registered := named.get(setting.key):
            names = f" (there are: {', '.join(registered)})"
        keys[f"{setting.key}={setting.default}{only}"] = setting.doc + names
    parts = [
        "usage: dstune train [FILE.yaml] [GROUP=CHOICE ...] [KEY=VALUE ...] [flags]",
        "",
        "Fine-tune a model with DeepSpeed ZeRO. Values of the command line win over those of an experiment, which win",
        "over those of the other groups. A list is KEY=[a,b], nothing is KEY=null.",
        "",
        *block("Examples", EXAMPLES, 8),
        *block("Groups (GROUP=CHOICE)", {group: ", ".join(choices) for group, choices in groups.items()}, 16),
        *block("Keys and their defaults (KEY=VALUE)", keys, 12),
        *block("Flags", FLAGS, 30),
    ]
    return "\n".join(parts)
