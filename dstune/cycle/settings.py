"""Read the settings file of a cycle: what it trains, on which rows, and which gates a candidate has to pass."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from dstune.core.errors import Problem, UserError, first_line
from dstune.core.parsing import parse_yaml, read_file
from dstune.protocols import PROBES


@dataclass(frozen=True)
class Gates:
    """What a candidate has to pass, each time against the current version on the same rows."""

    margin: float = 0.02
    """Mean loss on a set that is allowed: 0.02 are 2 percentage points of right labels, or 0.02 nats a token of an answer."""
    error: float = 0.025
    """Chance with which all gates together refuse a candidate that is within every margin, and with which they let one pass that
    is not."""
    tests: tuple[str, ...] = ()
    """Test sets beside the validation rows of the first run, which are always one."""
    slices: tuple[str, ...] = ()
    """Columns of the test sets; no value with enough rows may become worse by more than `slice_margin`."""
    slice_margin: float = 0.05
    swaps: tuple[tuple[str, str], ...] = ()
    """Pairs of words (he, she): how often an answer changes when they are exchanged may not grow."""
    key_gap: float = 0.3
    """Of a classifier: how much rarer the candidate may give the labels of one key than those of the others."""
    safety: str | None = None
    """Prompts with `expected` or a `pattern` (a regular expression); each that the current version answers right has to stay so."""
    canaries: str | None = None
    """The same, for prompts of another kind."""
    probes: tuple[str, ...] = ()
    """Packaged probes (`refusals`, ...) and those of plugins, for models that write text."""
    probe_margin: float = 0.05
    memorised: float | None = None
    """How much more of the rest of its training rows a candidate that writes text may recite; not looked at when not given."""
    bootstrap: int = 2000
    """Resamples of the interval of a key."""


@dataclass(frozen=True)
class AutoPromote:
    """Bounds within which no person is asked."""

    least_gain: float = 0.0
    """The lower end of the interval on new rows has to lie above it."""
    least_new_rows: int = 100
    """Held-out new rows that the gain was measured on."""


@dataclass(frozen=True)
class CycleSettings:
    """A cycle."""

    run: Path
    """The run whose model is the first version."""
    folder: Path
    """Where rows, runs, versions and the ledger are kept."""
    data: str
    """The folder of `dstune serve --log-requests`, or rows with `id` and what people said of them."""
    store: str | None = None
    """URL of the server's database, where it is not beside its logs."""
    alias: str = "live"
    """The name under which versions share the traffic."""
    least_rows: int = 50
    """New rows below which nothing is trained."""
    least_rating: float = 1.0
    """From which a person has accepted an answer."""
    share_per_key: float = 0.2
    """Of the new rows, at most so many from one key: nobody can teach the model alone."""
    exclude_keys: tuple[str, ...] = ()
    """Keys whose rows are not learned."""
    hold_out: float = 0.2
    """Of the new rows, those that are never trained on: the candidate is measured on them."""
    replay: float = 0.5
    """Share of an epoch's rows that are old ones."""
    l2sp: float = 0.0
    ewc: float = 0.0
    share: float = 0.1
    """Of the traffic, for a candidate that passed the gates."""
    overrides: tuple[str, ...] = ()
    """Settings of the training, as of `dstune train`."""
    gates: Gates = field(default_factory=Gates)
    auto_promote: AutoPromote | None = None


RANGES = {
    "share_per_key": (0.0, 1.0),
    "hold_out": (0.0, 0.9),
    "replay": (0.0, 0.99),
    "share": (0.0, 1.0),
    "l2sp": (0.0, 1e9),
    "ewc": (0.0, 1e9),
    "least_rating": (-1.0, 1.0),
    "margin": (0.0, 100.0),
    "slice_margin": (0.0, 100.0),
    "probe_margin": (0.0, 1.0),
    "memorised": (0.0, 1.0),
    "key_gap": (0.0, 1.0),
    "error": (0.0001, 0.25),
    "least_gain": (-100.0, 100.0),
    "least_rows": (1, 10**9),
    "least_new_rows": (1, 10**9),
    "bootstrap": (100, 100_000),
}
NESTED = {"gates": Gates, "auto_promote": AutoPromote}
REQUIRED = ("run", "folder", "data")


def read_settings(path: Path) -> CycleSettings:
    """Return the settings in a file; relative paths start at its folder. Raises UserError with all problems."""
    try:
        content = parse_yaml(read_file(path).decode())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(Problem("CONFIG", f"cannot be read as YAML: {first_line(error)}", value=str(path))) from None
    problems: list[Problem] = []
    if not isinstance(content, dict):
        raise UserError(Problem(str(path), "holds no settings", "run: RUN, folder: FOLDER, data: LOGS"))
    values = _values(content, CycleSettings, "", problems)
    problems += [Problem(name, "this is missing", f"{name}: ...") for name in REQUIRED if name not in content]
    if problems:
        raise UserError(problems)
    base = path.absolute().parent
    settings = CycleSettings(**{**values, "run": base / values["run"], "folder": base / values["folder"]})
    settings = dataclasses.replace(settings, data=_below(base, settings.data), gates=_located(settings.gates, base))
    if not (settings.run / "run.yaml").is_file():
        raise UserError(Problem("run", "this folder holds no run (no run.yaml)", "a run directory", str(settings.run)))
    return settings


def _below(base: Path, spec: str) -> str:
    """Return a relative path joined to the settings file's folder, `base`; absolute paths, addresses and samples are unchanged."""
    return spec if "://" in spec or Path(spec).is_absolute() else str(base / spec)


def _located(gates: Gates, base: Path) -> Gates:
    return dataclasses.replace(
        gates,
        tests=tuple(_below(base, spec) for spec in gates.tests),
        safety=None if gates.safety is None else _below(base, gates.safety),
        canaries=None if gates.canaries is None else _below(base, gates.canaries),
    )


def _values(content: Mapping[str, Any], kind: Any, prefix: str, problems: list[Problem]) -> dict[str, Any]:
    field_by_name = {entry.name: entry for entry in fields(kind)}
    values = {}
    for name, value in content.items():
        where = f"{prefix}{name}"
        if name not in field_by_name:
            near = difflib.get_close_matches(str(name), field_by_name, n=1)
            problems.append(
                Problem(where, "there is no such key", f"did you mean {near[0]}?" if near else ", ".join(field_by_name))
            )
        elif name in NESTED:
            if value is None and name == "auto_promote":
                continue
            if not isinstance(value, dict):
                problems.append(Problem(where, "has keys of its own", f"{name}: {{}}", str(value)))
            else:
                inner = _values(value, NESTED[name], f"{name}.", problems)
                values[name] = NESTED[name](**inner)
        else:
            values[name] = _checked(where, str(field_by_name[name].type), value, problems)
    return values


def _checked(where: str, kind: str, value: Any, problems: list[Problem]) -> Any:
    """Return the value in the type of its field; append a problem if it is invalid."""
    name = where.rpartition(".")[2]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if name in RANGES:
        if value is None and "None" in kind:
            return value
        low, high = RANGES[name]
        if not is_number or not low <= value <= high or (kind == "int" and not isinstance(value, int)):
            problems.append(Problem(where, f"must be a number from {low:g} to {high:g}", value=str(value)))
        return value
    if name == "swaps":
        if not (isinstance(value, list) and all(_is_pair(entry) for entry in value)):
            problems.append(Problem(where, "must be pairs of words", "swaps: [[he, she], [his, her]]", str(value)))
            return ()
        return tuple((str(first), str(second)) for first, second in value)
    if name == "probes":
        return _probes(where, value, problems)
    if kind.startswith("tuple"):
        if not (isinstance(value, list) and all(isinstance(entry, str) for entry in value)):
            problems.append(Problem(where, "must be a list of texts", f"{name}: [TEXT, TEXT]", str(value)))
            return ()
        return tuple(value)
    if not (isinstance(value, str) and value) and not (value is None and "None" in kind):
        problems.append(Problem(where, "must be a text", value=str(value)))
    return value


def _probes(where: str, value: Any, problems: list[Problem]) -> tuple[str, ...]:
    names = value if isinstance(value, list) else [value]
    if unknown := [str(name) for name in names if name not in PROBES]:
        problems += [Problem(where, "there is no such probe", f"one of {', '.join(PROBES)}", name) for name in unknown]
        return ()
    return tuple(names)


def _is_pair(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and all(isinstance(word, str) and word for word in entry)
