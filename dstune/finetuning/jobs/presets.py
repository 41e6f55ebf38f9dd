"""`models.yaml`: which public model names jobs may name, what each stands for, and how jobs share the machine."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, StrictInt, StrictStr
from pydantic.dataclasses import dataclass

from dstune.core.errors import Problem, UserError, first_line
from dstune.core.parsing import parse_yaml
from dstune.planning.hardware import parse
from dstune.protocols import LAUNCHERS, METHODS, TASKS
from dstune.serve.validation import CLOSED, read_tree

FILE = "models.yaml"
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
"""Of a public model: without slash or colon, so that names of tuned models can be read."""
LOCAL = "local"
TASK_OF = {"supervised": "chat", "dpo": "preference", "reinforcement": "reinforcement"}
OWNED = (
    "data.train", "data.validation", "data.split", "data.packing", "data.max_length", "data.clean", "data.on_bad_row",
    "data.mixture", "data.streaming", "data.max_rows", "data.augment", "model.path", "model.revision",
    "model.trust_remote_code", "method", "task.name", "task.loss", "task.beta", "task.graders", "task.samples",
    "trainer.epochs", "trainer.max_steps",
    "trainer.global_batch_size", "trainer.seed", "trainer.early_stopping", "optimizer.lr", "checkpoint.every",
    "checkpoint.keep", "checkpoint.weights_only", "evaluate.every", "evaluate.at_start", "run", "tracking", "launch",
    "plugins", "defaults",
)  # fmt: skip
"""Keys that a job sets, or that a preset has a key of its own for; `settings` may not have them."""


@dataclass(frozen=True, config=CLOSED)
class Preset:
    """What a public model name stands for."""

    name: StrictStr
    path: StrictStr
    """Folder, hub id or sample of the base model."""
    revision: StrictStr | None = None
    methods: tuple[StrictStr, ...] = ("supervised", "dpo")
    """`reinforcement` beside these lets clients choose graders by which its jobs learn."""
    python_graders: StrictBool = False
    """Whether graders of clients may be Python, which runs in a sandbox of namespaces on the machine of the job."""
    adaptation: Mapping[StrictStr, Any] = field(default_factory=lambda: {"name": "lora"})
    """The choice of dstune's group `method`, with its keys."""
    learning_rate: Mapping[str, Annotated[float, Field(strict=True, gt=0)]] = field(default_factory=dict)
    """By the API's method; that of the adaptation and task where there is none."""
    max_length: Annotated[int, Field(strict=True, ge=8)] = 1024
    """Longest row in tokens; longer ones are cut."""
    devices: Annotated[int, Field(strict=True, ge=1)] = 1
    """Local devices that a job takes where they are free."""
    fewest_devices: StrictInt | None = None
    """Local devices that are enough to start; None for `devices`."""
    launch: Mapping[StrictStr, Any] = field(default_factory=lambda: {"name": LOCAL})
    """The choice of dstune's group `launch`, with its keys."""
    hardware: StrictStr | None = None
    """What its jobs run on, as `dstune plan` has it, where that is not this machine."""
    priority: StrictInt = 0
    """Jobs of a higher one start first."""
    most_rows: Annotated[int, Field(strict=True, ge=10)] = 1_000_000
    most_epochs: Annotated[int, Field(strict=True, ge=1)] = 50
    price: Annotated[float, Field(strict=True, ge=0)] = 0.0
    """Of an hour of one device."""
    settings: Mapping[StrictStr, Any] = field(default_factory=dict)
    """Further keys of dstune's configuration."""

    @property
    def pool(self) -> str:
        """Whose devices its jobs take."""
        return str(self.launch["name"])

    @property
    def fewest(self) -> int:
        return self.devices if self.fewest_devices is None else self.fewest_devices

    def base_rate(self, method: str) -> float:
        """Return the learning rate at the multiplier 1."""
        if method in self.learning_rate:
            return float(self.learning_rate[method])
        rate = METHODS.classes()[str(self.adaptation["name"])].learning_rate
        return float(f"{rate / 10 if TASKS.classes()[TASK_OF[method]].low_learning_rate else rate:g}")


@dataclass(frozen=True, config=CLOSED)
class Limits:
    """Of the jobs of an organization or a key; None for none."""

    running: Annotated[int, Field(strict=True, ge=0)] | None = None
    waiting: Annotated[int, Field(strict=True, ge=0)] | None = None
    weight: Annotated[float, Field(strict=True, gt=0)] = 1.0
    """Of an organization: its part of the devices where several wait."""


@dataclass(frozen=True, config=CLOSED)
class QueueSettings:
    """How jobs share the machine."""

    devices: Annotated[int, Field(strict=True, gt=0)] | None = None
    """Local devices that jobs may take: all GPUs, or one where there is none."""
    validation_seconds: Annotated[float, Field(strict=True, gt=0)] = 3600.0
    """After which a job whose files are still read has failed: a validation takes a core from those of others."""
    submitted: Annotated[int, Field(strict=True, gt=0)] = 100
    """Jobs at a time in the queue of a cluster."""
    organization: Limits = field(default_factory=lambda: Limits(waiting=1000))
    organizations: Mapping[str, Limits] = field(default_factory=dict)
    """By id, in place of `organization`."""
    key: Limits = field(default_factory=lambda: Limits(waiting=200))
    share_hours: Annotated[float, Field(strict=True, gt=0)] = 24.0
    """How far back use counts where organizations share fairly."""

    def of(self, organization: str) -> Limits:
        return self.organizations.get(organization, self.organization)


@dataclass(frozen=True, config=CLOSED)
class Presets:
    """The content of `models.yaml`."""

    models: Mapping[str, Preset] = field(default_factory=dict)
    queue: QueueSettings = field(default_factory=QueueSettings)
    prefix: tuple[StrictStr, ...] = ()
    """What starts a job's process in a control group of its own, such as `systemd-run --user --scope --quiet --collect`."""
    results: Literal["plain", "base64"] = "plain"
    """The file of results as it is, or `base64`, as the hosted API gives it out."""


def read(path: Path) -> Presets:
    """Return the presets in a file. Raises UserError with all that is wrong."""
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(Problem("--presets", f"cannot be read: {error.strerror}", value=str(path))) from None
    except Exception as error:  # whatever the parser raises for a file that is none
        raise UserError(Problem(str(path), f"is no YAML: {first_line(error)}")) from None
    problems: list[Problem] = []
    made = _read_presets(content, path.name, problems)
    if problems:
        raise UserError(problems)
    return made


def _read_presets(content: Any, file: str, problems: list[Problem]) -> Presets:
    """Return everything that can be read; what cannot is added to `problems`."""
    if not isinstance(content, Mapping):
        problems.append(Problem(file, "must be a mapping with the key `models`"))
        return Presets()
    models = content.get("models")
    tree = {**content, "models": models if isinstance(models, Mapping) else {}}
    tree["models"] = {
        str(name): {"name": str(name), **value} if isinstance(value, Mapping) else value
        for name, value in tree["models"].items()
    }
    if not tree["models"]:
        fix = "models: {qwen3-4b: {path: Qwen/Qwen3-4B}}"
        problems.append(Problem(f"{file}: models", "must name one model at least", fix))
    for name in tree["models"]:
        if not NAME.fullmatch(name):
            fix = "lower case letters, digits, and . _ - within; no slash, no colon"
            problems.append(Problem(f"{file}: models.{name}", "is no public name for a model", fix))
        problems += _references(tree["models"][name], f"{file}: models.{name}")
    keys = {preset_field.name for cls in (Presets, Preset, QueueSettings, Limits) for preset_field in fields(cls)} - {
        "name"
    }
    tree = {key: value for key, value in tree.items() if value is not None}
    made, wrong = read_tree(Presets, tree, f"{file}: ", keys)
    problems += wrong
    if made is None:  # what is right of it may be wrong in other ways
        for name, value in tree["models"].items():
            preset = read_tree(Preset, value, "")[0]
            problems += _preset_problems(preset, f"{file}: models.{name}") if preset is not None else ()
        return Presets()
    for name, preset in made.models.items():
        problems += _preset_problems(preset, f"{file}: models.{name}")
    return made


def _preset_problems(preset: Preset, where: str) -> Iterator[Problem]:
    for method in preset.methods:
        if method not in TASK_OF:
            yield Problem(f"{where}.methods", "there is no such method", ", ".join(TASK_OF), method)
    for method, rate in preset.learning_rate.items():
        if method not in TASK_OF:
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
    if not 1 <= preset.fewest <= preset.devices:
        reason = f"must be from 1 to devices, which is {preset.devices}"
        yield Problem(f"{where}.fewest_devices", reason, value=str(preset.fewest))
    if preset.launch.get("name") == LOCAL and "processes" in preset.launch:
        yield Problem(f"{where}.launch.processes", "is the number of devices", "devices: N")
    for key in _keys(preset.settings):
        if owner := next((owned_key for owned_key in OWNED if key == owned_key or key.startswith(f"{owned_key}.")), ""):
            yield Problem(f"{where}.settings.{key}", f"{owner} is set by the job", "leave it out")


def _references(preset: Any, where: str) -> Iterator[Problem]:
    for key, value in _leaves(preset):
        if isinstance(value, str) and "${" in value:
            yield Problem(f"{where}.{key}", "is read as it is, without references", "give the value", value)


def _keys(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _keys(value, f"{prefix}{key}.")


def _leaves(tree: Any, key_above: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, f"{key_above}.{key}" if key_above else str(key))
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _leaves(value, key_above)
    else:
        yield key_above, tree
