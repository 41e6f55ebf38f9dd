"""`models.yaml`: which public model names jobs may name, what each stands for, and how jobs share the machine."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from dstune.core.errors import Problem, UserError, first_line
from dstune.core.parsing import parse_yaml
from dstune.planning.hardware import parse
from dstune.protocols import LAUNCHERS, METHODS, TASKS

FILE = "models.yaml"
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
"""Of a public model: without slash or colon, so that names of tuned models can be read."""
LOCAL = "local"
TASK_OF = {"supervised": "chat", "dpo": "preference"}
OWNED = (
    "data.train", "data.validation", "data.split", "data.packing", "data.max_length", "data.clean", "data.on_bad_row",
    "data.mixture", "data.streaming", "data.max_rows", "data.augment", "model.path", "model.revision",
    "model.trust_remote_code", "method", "task.name", "task.loss", "task.beta", "trainer.epochs", "trainer.max_steps",
    "trainer.global_batch_size", "trainer.seed", "trainer.early_stopping", "optimizer.lr", "checkpoint.every",
    "checkpoint.keep", "checkpoint.weights_only", "evaluate.every", "evaluate.at_start", "run", "tracking", "launch",
    "plugins", "defaults",
)  # fmt: skip
"""Keys that a job sets, or that a preset has a key of its own for; `settings` may not have them."""


@dataclass(frozen=True)
class Preset:
    """What a public model name stands for."""

    name: str
    path: str
    """Folder, hub id or sample of the base model."""
    revision: str | None = None
    methods: tuple[str, ...] = ("supervised", "dpo")
    adaptation: Mapping[str, Any] = field(default_factory=lambda: {"name": "lora"})
    """The choice of dstune's group `method`, with its keys."""
    learning_rate: Mapping[str, float] = field(default_factory=dict)
    """By the API's method; that of the adaptation and task where there is none."""
    max_length: int = 1024
    """Longest row in tokens; longer ones are cut."""
    devices: int = 1
    """Local devices that a job takes where they are free."""
    fewest_devices: int | None = None
    """Local devices that are enough to start; None for `devices`."""
    launch: Mapping[str, Any] = field(default_factory=lambda: {"name": LOCAL})
    """The choice of dstune's group `launch`, with its keys."""
    hardware: str | None = None
    """What its jobs run on, as `dstune plan` has it, where that is not this machine."""
    priority: int = 0
    """Jobs of a higher one start first."""
    most_rows: int = 1_000_000
    most_epochs: int = 50
    price: float = 0.0
    """Of an hour of one device."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Further keys of dstune's configuration."""

    @property
    def pool(self) -> str:
        """Whose devices its jobs take."""
        return str(self.launch["name"])

    @property
    def fewest(self) -> int:
        return self.devices if self.fewest_devices is None else self.fewest_devices

    def base_rate(self, method: str) -> float:
        """The learning rate at the multiplier 1."""
        if method in self.learning_rate:
            return float(self.learning_rate[method])
        rate = METHODS.classes()[str(self.adaptation["name"])].learning_rate
        return float(f"{rate / 10 if TASKS.classes()[TASK_OF[method]].low_learning_rate else rate:g}")


@dataclass(frozen=True)
class Limits:
    """Of the jobs of an organization or a key; None for none."""

    running: int | None = None
    waiting: int | None = None
    weight: float = 1.0
    """Of an organization: its part of the devices where several wait."""


@dataclass(frozen=True)
class QueueSettings:
    """How jobs share the machine."""

    devices: int | None = None
    """Local devices that jobs may take: all GPUs, or one where there is none."""
    submitted: int = 100
    """Jobs at a time in the queue of a cluster."""
    organization: Limits = Limits(running=None, waiting=1000)
    organizations: Mapping[str, Limits] = field(default_factory=dict)
    """By id, in place of `organization`."""
    key: Limits = Limits(running=None, waiting=200)
    share_hours: float = 24.0
    """How far back use counts where organizations share fairly."""

    def of(self, organization: str) -> Limits:
        return self.organizations.get(organization, self.organization)


@dataclass(frozen=True)
class Presets:
    """The content of `models.yaml`."""

    models: Mapping[str, Preset] = field(default_factory=dict)
    queue: QueueSettings = QueueSettings()
    prefix: tuple[str, ...] = ()
    """What starts a job's process in a control group of its own, such as `systemd-run --user --scope --quiet --collect`."""
    results: str = "plain"
    """The file of results as it is, or `base64`, as the hosted API gives it out."""


def read(path: Path) -> Presets:
    """Raises UserError with all that is wrong."""
    try:
        found = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(Problem("--presets", f"cannot be read: {error.strerror}", value=str(path))) from None
    except Exception as error:  # whatever the parser raises for a file that is none
        raise UserError(Problem(str(path), f"is no YAML: {first_line(error)}")) from None
    problems: list[Problem] = []
    made = _presets(found, path.name, problems)
    if problems:
        raise UserError(problems)
    return made


def _presets(found: Any, file: str, problems: list[Problem]) -> Presets:
    if not isinstance(found, Mapping):
        problems.append(Problem(file, "must be a mapping with the key `models`"))
        return Presets()
    keys = ("models", "queue", "prefix", "results")
    problems += [Problem(f"{file}: {key}", "there is no such key", ", ".join(keys)) for key in set(found) - set(keys)]
    models: dict[str, Preset] = {}
    named = found.get("models")
    if not isinstance(named, Mapping) or not named:
        problems.append(
            Problem(f"{file}: models", "must name one model at least", "models: {qwen3-4b: {path: Qwen/Qwen3-4B}}")
        )
        named = {}
    for name, given in named.items():
        where = f"{file}: models.{name}"
        if not isinstance(name, str) or not NAME.fullmatch(name):
            fix = "lower case letters, digits, and . _ - within; no slash, no colon"
            problems.append(Problem(where, "is no public name for a model", fix))
        if not isinstance(given, Mapping):
            problems.append(Problem(where, "must be a mapping with the key `path`"))
            continue
        made = _typed(Preset, {"name": str(name), **given}, where, problems)
        if made is not None:
            problems += _preset_problems(made, where)
            models[str(name)] = made
    queue = _queue(found.get("queue") or {}, f"{file}: queue", problems)
    prefix = found.get("prefix") or []
    if not isinstance(prefix, list) or not all(isinstance(word, str) for word in prefix):
        problems.append(Problem(f"{file}: prefix", "must be a list of words", "[systemd-run, --user, --scope]"))
        prefix = []
    results = found.get("results", "plain")
    if results not in ("plain", "base64"):
        problems.append(Problem(f"{file}: results", "must be plain or base64", value=str(results)))
    return Presets(models, queue, tuple(prefix), str(results))


def _queue(given: Any, where: str, problems: list[Problem]) -> QueueSettings:
    if not isinstance(given, Mapping):
        problems.append(Problem(where, "must be a mapping"))
        return QueueSettings()
    values = dict(given)
    for name in ("organization", "key"):
        if name in values:
            values[name] = _limits(values[name], f"{where}.{name}", problems)
    if isinstance(own := values.get("organizations"), Mapping):
        values["organizations"] = {
            str(name): _limits(limits, f"{where}.organizations.{name}", problems) for name, limits in own.items()
        }
    made = _typed(QueueSettings, values, where, problems) or QueueSettings()
    for name, value in (("devices", made.devices), ("submitted", made.submitted), ("share_hours", made.share_hours)):
        if value is not None and value <= 0:
            problems.append(Problem(f"{where}.{name}", "must be above 0", value=str(value)))
    return made


def _limits(given: Any, where: str, problems: list[Problem]) -> Limits:
    made = _typed(Limits, given, where, problems) if isinstance(given, Mapping) else None
    if made is None:
        problems.append(Problem(where, "must be a mapping", "{running: 4, waiting: 100, weight: 1}"))
        return Limits()
    for name, value in (("running", made.running), ("waiting", made.waiting)):
        if value is not None and value < 0:
            problems.append(Problem(f"{where}.{name}", "must be at least 0", value=str(value)))
    if made.weight <= 0:
        problems.append(Problem(f"{where}.weight", "must be above 0", value=str(made.weight)))
    return made


KINDS: Mapping[str, tuple[type, ...]] = {
    "str": (str,),
    "str | None": (str, type(None)),
    "int": (int,),
    "int | None": (int, type(None)),
    "float": (int, float),
    "tuple[str, ...]": (list, tuple),
    "Mapping[str, Any]": (Mapping,),
    "Mapping[str, float]": (Mapping,),
    "Mapping[str, Limits]": (Mapping,),
    "Limits": (Limits,),
}


def _typed(cls: type[Any], given: Mapping[str, Any], where: str, problems: list[Problem]) -> Any:
    """An object of a dataclass; None, with what is wrong added, where the values are of other types."""
    known = {one.name: str(one.type) for one in fields(cls)}
    before = len(problems)
    for name, value in given.items():
        if name not in known:
            problems.append(
                Problem(f"{where}.{name}", "there is no such key", ", ".join(n for n in known if n != "name"))
            )
        elif not isinstance(value, KINDS[known[name]]) or isinstance(value, bool):
            problems.append(Problem(f"{where}.{name}", "has another type", known[name], str(value)))
        elif isinstance(value, list) and not all(isinstance(item, str) for item in value):
            problems.append(Problem(f"{where}.{name}", "must be a list of words", value=str(value)))
    if cls is Preset and "path" not in given:
        problems.append(Problem(f"{where}.path", "this is missing", "path: Qwen/Qwen3-4B"))
    if len(problems) > before:
        return None
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


def _preset_problems(preset: Preset, where: str) -> Iterator[Problem]:
    for method in preset.methods:
        if method not in TASK_OF:
            yield Problem(f"{where}.methods", "there is no such method", ", ".join(TASK_OF), method)
    for method, rate in preset.learning_rate.items():
        number = isinstance(rate, int | float) and not isinstance(rate, bool) and rate > 0
        if method not in TASK_OF or not number:
            yield Problem(f"{where}.learning_rate.{method}", "must be a number above 0 of a method", value=str(rate))
    for key, registry in (("adaptation", METHODS), ("launch", LAUNCHERS)):
        name = getattr(preset, key).get("name")
        if name not in registry:
            fix = f"{{name: {', '.join(registry)}}}"
            yield Problem(f"{where}.{key}.name", "there is no such choice", fix, str(name))
    if preset.hardware is not None:
        try:
            parse(preset.hardware, {}, 1, f"{where}.hardware")
        except UserError as error:
            yield from error.problems
    for name, least in (("max_length", 8), ("devices", 1), ("most_rows", 10), ("most_epochs", 1), ("price", 0)):
        if getattr(preset, name) < least:
            yield Problem(f"{where}.{name}", f"must be at least {least}", value=str(getattr(preset, name)))
    if preset.devices >= 1 and not 1 <= preset.fewest <= preset.devices:
        reason = f"must be from 1 to devices, which is {preset.devices}"
        yield Problem(f"{where}.fewest_devices", reason, value=str(preset.fewest))
    if preset.launch.get("name") == LOCAL and "processes" in preset.launch:
        yield Problem(f"{where}.launch.processes", "is the number of devices", "devices: N")
    for key in _keys(preset.settings):
        if owner := next((one for one in OWNED if key == one or key.startswith(f"{one}.")), ""):
            yield Problem(f"{where}.settings.{key}", f"{owner} is set by the job", "leave it out")
    for key, value in _leaves(
        {name: getattr(preset, name) for name in ("path", "revision", "adaptation", "launch", "settings")}
    ):
        if isinstance(value, str) and "${" in value:
            yield Problem(f"{where}.{key}", "is read as it is, without references", "give the value", value)


def _keys(tree: Mapping[str, Any], before: str = "") -> Iterator[str]:
    for key, value in tree.items():
        yield f"{before}{key}"
        if isinstance(value, Mapping):
            yield from _keys(value, f"{before}{key}.")


def _leaves(tree: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, f"{before}.{key}" if before else str(key))
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _leaves(value, before)
    else:
        yield before, tree
