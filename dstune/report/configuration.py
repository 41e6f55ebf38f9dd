"""Lists the configuration of runs: overridden keys, differences from the defaults, and differences between runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dstune.config.convert import format_value
from dstune.config.documentation import documentation
from dstune.config.overrides import key_of
from dstune.report.run_files import RunFiles

OWN_TO_EACH_RUN = ("run.dir", "run.name", "task.template_date")
"""Keys that differ between any two runs and say nothing about them."""


@dataclass(frozen=True)
class Entry:
    """One key of a run."""

    key: str
    value: str
    given: bool
    """Whether an override of the command line named it."""
    changed: bool
    """Whether it differs from the schema's default (an experiment or a group's choice may have set it)."""
    reference: bool
    """Whether the value comes from an environment variable, of which only the name is known here."""
    meaning: str


@dataclass(frozen=True)
class Section:
    name: str
    choice: str
    """The group's choice (`lora`) if it has several; otherwise empty."""
    given: bool
    """Whether an override chose it."""
    entries: list[Entry]


def sections(run: RunFiles) -> list[Section]:
    """Return the resolved configuration of `run`, in the order of its `run.yaml`."""
    given_keys = {key_of(text) for text in run.overrides}
    default_by_key: dict[tuple[str, str], tuple[str, str]] = {
        (setting.group, setting.key): (setting.default, setting.doc) for setting in documentation()
    }
    result = []
    for name, values in run.config.items():
        flat = flatten(values, str(name))
        choice = flat.pop(f"{name}.name", "") if str(name) != "run" else ""
        entries = []
        for key, value in flat.items():
            default, meaning = default_by_key.get((f"{name}={choice}" if choice else str(name), key), (None, ""))
            entries.append(
                Entry(
                    key=key.removeprefix(f"{name}."),
                    value=value,
                    given=_is_given(key, given_keys),
                    changed=default is not None and value != default,
                    reference="${" in value,
                    meaning=meaning,
                )
            )
        result.append(Section(str(name), choice, str(name) in given_keys, entries))
    return result


def flatten(value: Any, key: str) -> dict[str, str]:
    """Return the leaves of nested mappings by their dotted keys, written as one would write them on the command line."""
    if isinstance(value, dict) and value:
        leaves: dict[str, str] = {}
        for name, part in value.items():
            leaves |= flatten(part, f"{key}.{name}")
        return leaves
    return {key: format_value(value)}


def _is_given(key: str, given_keys: set[str]) -> bool:
    """Return whether a key was overridden, by itself or with the whole mapping that contains it (`data.columns={...}`)."""
    return any(key == name or (key.startswith(f"{name}.") and "." in name) for name in given_keys)


def differences(runs: Sequence[RunFiles]) -> list[tuple[str, list[str]]]:
    """Return the keys in which `runs` differ, each with its value in every run (empty if a run lacks the key)."""
    flat = [flatten(run.config, "") for run in runs]
    keys = dict.fromkeys(key for values in flat for key in values)
    rows = []
    for key in keys:
        values = [run.get(key, "") for run in flat]
        if len(set(values)) > 1 and key.removeprefix(".") not in OWN_TO_EACH_RUN:
            rows.append((key.removeprefix("."), values))
    return rows


def one_line(run: RunFiles) -> str:
    """Return a short description of model and method: `sample://smollm2 · full · ZeRO-3`."""
    model, task, method, zero = (run.config.get(name) or {} for name in ("model", "task", "method", "zero"))
    facts = [model.get("path"), task.get("name"), method.get("name")]
    stage = f"ZeRO-{zero['stage']}" if "stage" in zero else None
    return " · ".join(str(fact) for fact in (*facts, stage) if fact)
