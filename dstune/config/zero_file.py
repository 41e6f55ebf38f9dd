"""Implements `zero=file`: sets dstune's keys to the values of an existing DeepSpeed configuration.

The file is read once, when a run is composed, and `run.yaml` stores the result. If the user gave one of dstune's keys a value that
differs from the file's, this contradiction is reported with both places. Values that dstune has no key for go into `zero.settings`,
and from there to DeepSpeed unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dstune.config import overrides as user_overrides
from dstune.config.convert import convert, dotted, format_value, from_dict, to_dict
from dstune.config.deepspeed_file import read
from dstune.config.deepspeed_values import Content, Value, is_number
from dstune.config.hydra_session import ROOT_CONFIG
from dstune.config.names import classes_of, type_hints
from dstune.config.schema import CHOICES, RunConfig
from dstune.core.errors import Problem, UserError

if TYPE_CHECKING:
    from hydra._internal.hydra import Hydra

Given = Callable[[str], str | None]
"""Returns what set a key or chose a group: `the command line` or a file such as `experiment=NAME`; None if it has its default."""

COMMAND_LINE = "the command line"


def with_file(config: RunConfig, given: Given) -> tuple[RunConfig, dict[str, str]]:
    """Return `config` with the content of the file `zero.path`, or unchanged if that key is unset; and, by key, the origin of each
    value that is DeepSpeed's default.

    Raises:
        UserError: the file cannot be read. Otherwise lists everything in it that dstune cannot honour or that contradicts a value
            that the user gave.
    """
    if config.zero.path is None:
        return config, {}
    if not config.zero.path.strip():
        raise UserError(Problem("zero.path", "zero=file needs the name of the file", "zero.path=ds_config.json"))
    path = Path(config.zero.path)
    content = read(path)
    merge = _Merge(to_dict(config), given, str(path))
    for value in sorted(content.values, key=lambda value: "." in value.key):  # choices of groups come first
        merge.put(value)
    merge.put_start_rate(content)
    merge.say_schedule(content)
    merge.put_ranks(content)
    problems = content.problems + merge.problems
    if problems:
        raise UserError(problems)
    settings = merge.tree["zero"]["settings"]
    merge.tree["zero"]["settings"] = nested_merge(content.settings, settings)
    return from_dict(merge.tree, f"the values of {path}"), merge.origins


class _Merge:
    """Merges the values of a file into a configuration (nested dicts) and collects the problems."""

    def __init__(self, tree: dict[str, Any], given: Given, path: str):
        self.tree, self.given, self.path = tree, given, path
        self.problems: list[Problem] = []
        self.origins: dict[str, str] = {}
        self._taken: set[str] = set()

    def put(self, value: Value) -> None:
        section, _, name = value.key.partition(".")
        if not name:
            self._choose(value)
        elif name not in self._keys(section):
            choice = f"{section}={self.tree[section]['name']}"
            self._refuse(value, f"{choice} has no such key", "remove it")
        else:
            current_value, giver = self.tree[section][name], self.given(value.key)
            if giver and value.implied:
                return
            try:  # before comparing: a value of the wrong type must be corrected in the file
                taken = to_dict(convert(value.value, self._keys(section)[name], value.key))
            except UserError as error:
                self._refuse(value, error.problems[0].reason, 'correct it there, or write "auto"')
                return
            if value.excluded:
                if giver and current_value == taken:
                    self._refuse(value, f"{giver} sets {value.key}={format_value(current_value)}", "enable it there")
                return
            if giver and current_value != taken:
                self._add_contradiction(value, current_value, giver)
            if value.implied:
                self.add_origin(value)
            self.tree[section][name] = taken
            self._taken.add(value.key)

    def _choose(self, value: Value) -> None:
        group, current_name = value.key, self.tree[value.key]["name"]
        giver_by_name = {name: giver for name in self.tree[group] if (giver := self.given(f"{group}.{name}"))}
        if value.implied:
            giver = self.given(group) or next(iter(giver_by_name.values()), None)
            if giver is None:
                self.add_origin(replace(value, key=f"{group}.name"))
            elif self.given(group) != COMMAND_LINE:
                self.origins[f"{group}.name"] = (
                    f"{giver} decides, though {self.path} leaves out {value.source}: DeepSpeed's default is {value.value}"
                )
            if giver is not None:
                return
        if current_name == value.value:
            return
        if giver := self.given(group):
            self._add_contradiction(value, current_name, giver)
        field_names = type_hints(classes_of(group)[value.value])
        old = {name: self.tree[group][name] for name in giver_by_name if name in field_names}
        for name in giver_by_name.keys() - old.keys() if giver is None else ():
            reason = f"{group}={value.value}, which {value.source} in {self.path} chooses, has no such key"
            fix = f"leave it out, or choose {group}={current_name} and remove the section {value.source.split('.')[0]}"
            self.problems.append(Problem(f"{group}.{name}", reason, fix, format_value(self.tree[group][name])))
        defaults = to_dict(classes_of(group)[value.value]())
        self.tree[group] = {**defaults, **old, "name": value.value}

    def add_origin(self, value: Value) -> None:
        origin = f"DeepSpeed's default, since {self.path} leaves out {value.source}"
        self.origins[value.key] = f"{origin} {value.note}".rstrip()

    def say_schedule(self, content: Content) -> None:
        """Name the schedule as dstune's own where the file leaves rate and schedule to the script."""
        if content.leaves_schedule and not self.given("schedule"):
            reason = f"dstune's own, since {self.path} has no scheduler, which DeepSpeed leaves to the script"
            self.origins["schedule.name"] = reason

    def put_start_rate(self, content: Content) -> None:
        """Merge the rate that the schedule begins with, as a share of the peak rate, which the other values decide."""
        if (value := content.start_rate) is None or "start_lr_ratio" not in self._keys("schedule"):
            return
        peak = self.tree["optimizer"]["lr"]
        if not is_number(value.value):
            self._refuse(value, "expected a number: dstune's groups of parameters have one rate", "write one number")
        elif value.value and not peak:
            self._refuse(value, "the peak rate is 0", "write 0 there, or give optimizer.lr")
        else:
            self.put(replace(value, value=value.value / peak if value.value else 0.0))

    def put_ranks(self, content: Content) -> None:
        """Merge the number of ranks, and the sizes of batches that depend on it."""
        launch, trainer = self.tree["launch"], self.tree["trainer"]
        if content.processes and "processes" in launch and not self.given("launch.processes"):
            launch["processes"] = content.processes
        value = content.accumulation
        if value is None:
            return
        ranks, is_known = self._replicas(launch), bool(self.given(value.key)) or value.key in self._taken
        if content.derives_micro_batch and not self.given("trainer.micro_batch_size"):
            self._derive_micro_batch(value, ranks)
        elif value.implied and is_known:
            return  # the other two sizes are given
        else:
            self.problems += _accumulate(trainer, ranks, value, is_known, self.path)
            if value.implied and not is_known:
                self.add_origin(value)

    def _replicas(self, launch: Mapping[str, Any]) -> int | None:
        """Return the number of ranks that have rows of their own, if the configuration says it."""
        if launch.get("processes") is None or launch.get("hostfile") is not None:
            return None
        return max(1, launch["processes"] * launch.get("nodes", 1) // self.tree["parallel"].get("size", 1))

    def _derive_micro_batch(self, value: Value, ranks: int | None) -> None:
        """Set the rows of a micro-batch from the batch, the accumulation steps and the ranks, as DeepSpeed does. It stays while
        the number of ranks is unknown: a step trains the same rows."""
        trainer, steps = self.tree["trainer"], value.value
        where = "train_batch_size" if value.implied else value.source
        rows = trainer["global_batch_size"]
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            self._refuse(value, "expected a whole number", 'write "auto" there')
        elif ranks is None:
            reason = f"DeepSpeed's would be {rows} rows / ranks / {steps}, but launch.processes does not give the number of ranks"
            self.origins["trainer.micro_batch_size"] = reason
        elif not isinstance(rows, int) or rows % (ranks * steps):
            reason = f"{rows} rows are not divided by {ranks} ranks x {steps} micro-batches"
            fix = f"a train_batch_size of {ranks * steps * max(1, rows // (ranks * steps))}, or trainer.micro_batch_size=1"
            self.problems.append(Problem(f"{where} in {self.path}", reason, fix, format_value(rows)))
        else:
            trainer["micro_batch_size"] = rows // (ranks * steps)
            self.origins["trainer.micro_batch_size"] = (
                f"{rows} rows for {ranks} rank{'s' * (ranks != 1)} and {steps} micro-batch{'es' * (steps != 1)}, as in DeepSpeed"
            )

    def _keys(self, section: str) -> Mapping[str, Any]:
        choice = self.tree[section]["name"] if section in CHOICES else ""
        return type_hints(classes_of(section)[choice])

    def _add_contradiction(self, value: Value, current_value: Any, giver: str) -> None:
        reason = f"{giver} sets this, but {value.source} in {self.path} is {format_value(value.value)}"
        fix = f'{value.key}={format_value(value.value)}, or write "auto" in the file'
        self.problems.append(Problem(value.key, reason, fix, format_value(current_value)))

    def _refuse(self, value: Value, reason: str, fix: str) -> None:
        self.problems.append(Problem(f"{value.source} in {self.path}", reason, fix, format_value(value.value)))


def _accumulate(
    trainer: dict[str, Any], processes: int | None, value: Value, is_known: bool, path: str
) -> Iterator[Problem]:
    """Set the global batch to micro-batch x accumulation x ranks; if it is already known, yield a problem unless it equals that."""
    where, steps = f"{value.source} in {path}", value.value
    if not isinstance(steps, int) or steps < 1:
        yield Problem(where, "expected a whole number", 'write "auto" there', format_value(steps))
        return
    if not isinstance(trainer["micro_batch_size"], int):
        reason = (
            "accumulation steps decide nothing while trainer.micro_batch_size=auto measures the rows of a micro-batch"
        )
        yield Problem(where, reason, 'write "auto" there', format_value(steps))
        return
    rows, rows_per_rank = trainer["global_batch_size"], trainer["micro_batch_size"] * steps
    formula = f"{trainer['micro_batch_size']} rows x {steps} micro-batches"
    if is_known and (rows != rows_per_rank * processes if processes else rows % rows_per_rank):
        ranks = f"{formula} x {processes} ranks" if processes else f"{formula} a rank"
        fix = 'write "auto" there: dstune derives the accumulation steps from the number of ranks'
        yield Problem(where, f"{ranks} do not make trainer.global_batch_size={rows}", fix, format_value(steps))
    elif not is_known and processes:
        trainer["global_batch_size"] = rows_per_rank * processes
    elif not is_known:
        fix = f"launch.processes=8, or trainer.global_batch_size={rows_per_rank * 8} (for 8 ranks)"
        yield Problem(
            where, f"the global batch is {formula} x the number of ranks, which is not known", fix, format_value(steps)
        )


def nested_merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two nested mappings; values of `above` take precedence."""
    merged = dict(below)
    for key, value in above.items():
        are_mappings = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = nested_merge(merged[key], value) if are_mappings else value
    return merged


# ---- who gave a value ----


@dataclass(frozen=True)
class _Source:
    name: str
    keys: frozenset[str]


def given_by(hydra: Hydra, overrides: Sequence[str]) -> Given:
    """Return the function that says what set a key or chose a group in the composition of `overrides`."""
    texts = user_overrides.for_hydra(overrides)
    parsed, _ = user_overrides.parse(texts)
    given_keys = {override.key_or_group for override in parsed}
    default_files, chosen_files = _defaults(hydra, []), _defaults(hydra, texts)
    files = [
        _Source(f"{'='.join(path.split('/', 1))}", _keys_of(hydra, path, package))
        for path, package in chosen_files.items()
    ]
    groups = {path.split("/", 1)[0]: path for path in chosen_files if "/" in path}
    experiment = groups.get("experiment", "").replace("/", "=", 1)

    def given(key: str) -> str | None:
        if any(key == name or key.startswith(f"{name}.") for name in given_keys if "." in name or name == key):
            return COMMAND_LINE
        if "." not in key:
            return experiment if groups.get(key) not in default_files else None
        return next((file.name for file in reversed(files) if key in file.keys), None)

    return given


def keys_of_own_files(hydra: Hydra, overrides: Sequence[str]) -> frozenset[str]:
    """Return the keys that the user's own files set in this composition, and the groups that the user's own experiment chooses."""
    keys: set[str] = set()
    default_files, chosen_files = _defaults(hydra, []), _defaults(hydra, user_overrides.for_hydra(overrides))
    for path, package in chosen_files.items():
        loaded = hydra.config_loader.repository.load_config(path)
        if loaded is not None and loaded.provider != "main":
            keys |= _keys_of(hydra, path, package)
            if not package:
                keys |= {other.split("/", 1)[0] for other in chosen_files if other not in default_files}
    return frozenset(keys)


def _defaults(hydra: Hydra, texts: list[str]) -> dict[str, str]:
    """Return the files of a composition in order, each with the section that it fills; empty for files that fill several."""
    from hydra.types import RunMode

    defaults = hydra.config_loader.compute_defaults_list(ROOT_CONFIG, texts, RunMode.RUN).defaults
    own_entries = [
        entry for entry in defaults if not str(entry.config_path).startswith(("hydra/", "schema/", "run_schema"))
    ]
    return {str(entry.config_path): str(entry.package or "") for entry in own_entries}


def _keys_of(hydra: Hydra, path: str, package: str) -> frozenset[str]:
    from omegaconf import OmegaConf

    loaded = hydra.config_loader.repository.load_config(path)
    if loaded is None:
        return frozenset()
    content: Any = OmegaConf.to_container(loaded.config, resolve=False)
    return frozenset(key for key, _ in dotted(content, prefix=f"{package}." if package else ""))
