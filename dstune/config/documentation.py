"""The documentation of every key, read from `schema.py`: for `--help` and for the table in the README."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from dstune.config.convert import describe, shown
from dstune.config.method_matrix import matrix_table
from dstune.config.methods_page import methods_page
from dstune.config.names import ROOT_KEYS, classes_of, entry_class, sections, type_hints
from dstune.config.presets import presets_page
from dstune.config.schema import CHOICES
from dstune.core.plugins import KEY
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
        if dataclasses.is_dataclass(hint):
            settings += _of_class(hint, group, key)  # type: ignore[arg-type]
        elif not (field.name == "name" and prefix in CHOICES):  # said by `method=lora`, not by itself
            default = getattr(cls(), field.name)
            settings.append(Setting(group, key, describe(hint), shown(default), docs.get(field.name, "")))
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


def markdown_table() -> str:
    """All keys as a Markdown table, for the README (a test holds the two against each other)."""
    lines = ["| key | default | values | meaning |", "| --- | --- | --- | --- |"]
    for setting in merged():
        only = f" ({setting.group})" if "=" in setting.group else ""
        cells = [f"`{setting.key}`{only}", f"`{setting.default}`", setting.type, setting.doc]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def groups_table(groups: Mapping[str, Sequence[str]]) -> str:
    """Groups with their choices and keys as a Markdown table, for the README (a test holds the two against each other)."""
    keys: dict[str, list[str]] = {}
    for setting in merged():
        section, _, key = setting.key.partition(".")
        if ".NAME." not in setting.key and key not in keys.setdefault(section, []):
            keys[section].append(key)
    lines = ["| group | choices | keys |", "| --- | --- | --- |"]
    for group in ["experiment", *keys]:
        names = [choice for choice in groups.get(group, ()) if choice != "default"]
        choices = ", ".join(f"`{name}`" for name in names)
        if len(names) > LISTED:
            choices = f"[{len(names)} presets](docs/presets.md), for example `{names[0]}`, `{names[-1]}`"
        lines.append(f"| `{group}` | {choices} | {' '.join(f'`{key}`' for key in keys.get(group, ()))} |")
    return "\n".join(lines) + "\n"


LISTED = 20
"""A group with more choices than this is described on the page of presets."""

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
    for setting in merged():
        only = f" [{setting.group}]" if "=" in setting.group else ""
        names = f" ({setting.type})" if setting.type.startswith("one of") else ""
        keys[f"{setting.key}={setting.default}{only}"] = setting.doc + names
    parts = [
        "usage: dstune train [GROUP=CHOICE ...] [KEY=VALUE ...] [flags]",
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


def _between(text: str, start: str, table: str, end: str) -> str:
    """`text` with `table` between the two marks."""
    before, _, rest = text.partition(start)
    return f"{before}{start}\n{table}{end}{rest.partition(end)[2]}"


def write_guides(root: Path) -> None:
    """Put the current tables into README.md, docs/configuration.md, docs/methods.md and docs/presets.md below `root`."""
    from dstune.config.hydra_session import group_options, session

    with session() as hydra:
        table = groups_table(group_options(hydra))
    readme = root / "README.md"
    text = _between(readme.read_text(encoding="utf-8"), GROUPS_START, table, GROUPS_END)
    readme.write_text(_between(text, METHODS_START, matrix_table(), METHODS_END), encoding="utf-8")
    (root / "docs" / "configuration.md").write_text(f"{CONFIGURATION_HEAD}\n{markdown_table()}", encoding="utf-8")
    (root / "docs" / "methods.md").write_text(methods_page(root), encoding="utf-8")
    (root / "docs" / "presets.md").write_text(presets_page(root / "conf"), encoding="utf-8")


GROUPS_START = "<!-- groups: made by `python -m dstune.config.documentation` -->"
GROUPS_END = "<!-- /groups -->"
METHODS_START = "<!-- methods: made by `python -m dstune.config.documentation` -->"
METHODS_END = "<!-- /methods -->"
CONFIGURATION_HEAD = """\
# Configuration

Made from the schema by `python -m dstune.config.documentation`. A name in parentheses behind a key is the choice that has it.
Values of the command line win over those of an experiment, which win over those of the other groups. A list is `key=[a,b]`,
nothing is `key=null`.
"""

if __name__ == "__main__":
    write_guides(Path(__file__).parents[2])
