"""Converts the keys of another tool to an experiment that composes."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dstune.config.by_method import RATE
from dstune.config.compose import compose
from dstune.config.convert import dump, to_dict
from dstune.config.names import all_keys, classes_of, has_field
from dstune.config.schema import CHOICES
from dstune.config.validate import validate
from dstune.core.errors import Problem, UserError
from dstune.core.text import one_line
from dstune.importing.files import TOOLS, has_variable
from dstune.importing.result import MEANINGLESS, NOT_SUPPORTED, Dropped, Import
from dstune.importing.rules import apply

USUAL = {"task": "chat", "method": "full", "optimizer": "adamw", "schedule": "cosine", "zero": "auto"}
"""The default choices of `conf/train.yaml`."""


@dataclass(frozen=True)
class Experiment:
    """The result of an import."""

    tool: str
    text: str
    """The experiment's YAML."""
    carried: dict[str, list[str]]
    dropped: dict[str, Dropped]
    off: list[str]
    """Keys without effect: empty, or a feature that is switched off."""
    assumed: list[str]
    problems: list[Problem]
    """Problems that composing the experiment reports."""


def convert(raw: dict[str, Any], tool: str, source: Path, ranks: int | None = None) -> Experiment:
    """Return the experiment for the keys `raw` of `tool`, read from `source`.

    ranks: the number by which the batch of one rank is multiplied; by default, that of the file, otherwise 1.

    Raises:
        UserError: dstune does not have the kind of training, or the file's number of ranks is invalid.
    """
    imported = carry(raw, tool, source, ranks)
    text = text_of(imported, tool, source)
    carried = {key: names for key, names in imported.carried.items() if key in raw and key not in imported.dropped}
    problems = [*imported.problems, *problems_of(text)]
    off = [key for key in raw if key not in carried and key not in imported.dropped]
    return Experiment(tool, text, carried, imported.dropped, off, imported.assumed, problems)


def carry(
    raw: dict[str, Any],
    tool: str,
    source: Path,
    ranks: int | None = None,
    choices: Mapping[str, str] = MappingProxyType({}),
) -> Import:
    """Apply the tool's table to the keys `raw`, and return what becomes of them.

    choices: options of configuration groups that are settled otherwise. Raises as `convert`.
    """
    module = TOOLS[tool]
    module.check(raw)
    defaults = module.defaults(raw)
    silent = {key: value for key, value in defaults.items() if raw.get(key) is None}
    imported = Import(
        {**silent, **{key: value for key, value in raw.items() if value is not None}}, 1, frozenset(silent)
    )
    for key in [key for key, value in raw.items() if has_variable(value)]:
        imported.drop("a variable of the shell: write its value", key=key)
        imported.raw[key] = defaults.get(key)
    imported.ranks = ranks or _ranks(imported.get("num_processes"))
    imported.raw["_file"] = str(source)
    apply({**module.TABLE, "_file": lambda imported, value: None}, imported)
    del imported.raw["_file"]
    imported.choices |= choices
    _without_references(imported)
    _finish(imported)
    return imported


def _ranks(processes: Any) -> int:
    if not re.fullmatch(r"[1-9]\d{0,5}", str(processes or 1)):
        fix = "correct it in the file, or give --ranks N"
        raise UserError(Problem("num_processes", "expected a whole number of at least 1", fix, str(processes)))
    return int(processes or 1)


def _without_references(imported: Import) -> None:
    """Drop values that an experiment would resolve: `${oc.env:HF_TOKEN}` in a stranger's file would become this user's token."""
    for key, value in list(imported.values.items()):
        if "${" in str(value):
            del imported.values[key]
            _undo(imported, key, "it has a reference (${...}), which would be resolved on this machine", NOT_SUPPORTED)


def _finish(imported: Import) -> None:
    """Convert settings that depend on several keys together."""
    values = imported.values
    if "zero" not in imported.choices:
        imported.choices["zero"] = "stage1"
        imported.assume("no DeepSpeed configuration: zero=stage1, which computes what data parallelism does")
    if not (values.get("data.validation") or values.get("data.split.validation", 0.05)):
        for key in ("evaluate.every", "trainer.early_stopping.patience", "run.export"):
            if key in values:
                del values[key]
                _undo(imported, key, "no rows are held out for an evaluation (data.validation, data.split.validation)")
    if values.get("evaluate.every") == 0:
        for key in ("trainer.early_stopping.patience", "run.export"):
            if key in values:
                del values[key]
                _undo(imported, key, "it needs evaluations during training (evaluate.every)")
    if "trainer.length_grouping" in values and values.get("data.packing", True):
        del values["trainer.length_grouping"]
        _undo(imported, "trainer.length_grouping", "packed rows all have one length (data.packing)")
    for section in ("task", "method", "optimizer", "schedule"):
        choice = imported.choices.get(section, USUAL[section])
        for key in [key for key in values if key.startswith(f"{section}.")]:
            if not has_field(CHOICES[section][choice], key.split(".")[1:]):
                del values[key]
                _undo(imported, key, f"{section}={choice} has no such key")


def _undo(imported: Import, key: str, reason: str, kind: str = MEANINGLESS) -> None:
    """Remove an invalid value: the keys that it came from count as dropped."""
    for foreign_key in [foreign_key for foreign_key, ours in imported.carried.items() if key in ours]:
        imported.drop(reason, kind, key=foreign_key)


def text_of(imported: Import, tool: str, source: Path) -> str:
    """Return the YAML of the experiment."""
    lines = ["# @package _global_", f"# From {one_line(source.name)} ({tool}) by `dstune import`."]
    wished = {key: dropped for key, dropped in imported.dropped.items() if dropped.kind != MEANINGLESS}
    if wished:
        lines.append("# Not carried over, or not to the letter:")
        lines += [f"#   {one_line(key)}: {one_line(dropped.reason)}" for key, dropped in wished.items()]
    chosen = [f"  - override /{group}: {imported.choices[group]}" for group in USUAL if _differs(imported, group)]
    lines += ["defaults:", *chosen, "  - _self_"]
    tree: dict[str, Any] = {}
    for key in sorted(imported.values, key=list(all_keys()).index):
        # Always write the rate: an experiment without it would get the method's rate.
        if key == RATE or imported.values[key] != _usual(imported, key):
            _nest(tree, key.split("."), imported.values[key])
    return "\n".join(lines) + "\n" + (dump(tree) if tree else "")


def _differs(imported: Import, group: str) -> bool:
    return imported.choices.get(group, USUAL[group]) != USUAL[group]


def _usual(imported: Import, key: str) -> Any:
    """Return the default of a key, which an experiment does not need to repeat."""
    section, *names = key.split(".")
    classes = classes_of(section)
    value: Any = to_dict(classes.get(imported.choices.get(section, ""), next(iter(classes.values())))())
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _nest(tree: dict[str, Any], path: list[str], value: Any) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value


def problems_of(text: str) -> list[Problem]:
    """Return the problems of an experiment, found by composing it."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "experiment"
        place.mkdir()
        (place / "imported.yaml").write_text(text, encoding="utf-8")
        try:
            validate(compose(["experiment=imported"], [folder]).config)
        except UserError as error:
            return error.problems
    return []
