"""`models.yaml`: the model names that jobs may use, their settings, and how jobs share the machine."""

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
"""Pattern of a public model name. It has no slash or colon, so that names of tuned models can be parsed."""
LOCAL = "local"
TASK_OF = {"supervised": "chat", "dpo": "preference", "reinforcement": "reinforcement"}
RESERVED_KEYS = (
    "data.train", "data.validation", "data.split", "data.packing", "data.max_length", "data.clean", "data.on_bad_row",
    "data.mixture", "data.streaming", "data.max_rows", "data.augment", "model.path", "model.revision",
    "model.trust_remote_code", "method", "task.name", "task.loss", "task.beta", "task.graders", "task.samples",
    "trainer.epochs", "trainer.max_steps",
    "trainer.global_batch_size", "trainer.seed", "trainer.early_stopping", "optimizer.lr", "checkpoint.every",
    "checkpoint.keep", "checkpoint.weights_only", "evaluate.every", "evaluate.at_start", "run", "tracking", "launch",
    "plugins", "defaults",
)  # fmt: skip
"""Keys that a job sets, or that a preset has its own key for; not allowed in `settings`."""


@dataclass(frozen=True, config=CLOSED)
class Preset:
    """The settings of a public model name."""

    name: StrictStr
    path: StrictStr
    """Folder, hub id or sample of the base model."""
    revision: StrictStr | None = None
    methods: tuple[StrictStr, ...] = ("supervised", "dpo")
    """The fine-tuning methods that jobs may use. `reinforcement` lets clients choose the grader that a job learns from."""
    python_graders: StrictBool = False
    """Whether clients' graders may be Python, which runs in a namespace sandbox on the job's machine."""
    adaptation: Mapping[StrictStr, Any] = field(default_factory=lambda: {"name": "lora"})
    """The choice of dstune's config group `method`, with its keys."""
    learning_rate: Mapping[str, Annotated[float, Field(strict=True, gt=0)]] = field(default_factory=dict)
    """By the API's method; the default is that of the adaptation and task."""
    max_length: Annotated[int, Field(strict=True, ge=8)] = 1024
    """Longest row in tokens; longer ones are truncated."""
    devices: Annotated[int, Field(strict=True, ge=1)] = 1
    """Local devices that a job uses if they are free."""
    fewest_devices: StrictInt | None = None
    """The fewest local devices that a job starts with; None means `devices`."""
    launch: Mapping[StrictStr, Any] = field(default_factory=lambda: {"name": LOCAL})
    """The choice of dstune's config group `launch`, with its keys."""
    hardware: StrictStr | None = None
    """The hardware of its jobs, in the form of `dstune plan`, if it is not this machine."""
    priority: StrictInt = 0
    """Jobs with a higher priority start first."""
    most_rows: Annotated[int, Field(strict=True, ge=10)] = 1_000_000
    most_epochs: Annotated[int, Field(strict=True, ge=1)] = 50
    price: Annotated[float, Field(strict=True, ge=0)] = 0.0
    """Price of one device-hour."""
    settings: Mapping[StrictStr, Any] = field(default_factory=dict)
    """Further keys of dstune's configuration."""

    @property
    def pool(self) -> str:
        """The pool from which its jobs take devices."""
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
    """Limits for the jobs of an organization or a key; None means unlimited."""

    running: Annotated[int, Field(strict=True, ge=0)] | None = None
    waiting: Annotated[int, Field(strict=True, ge=0)] | None = None
    weight: Annotated[float, Field(strict=True, gt=0)] = 1.0
    """For an organization: its share of the devices when several wait."""


@dataclass(frozen=True, config=CLOSED)
class QueueSettings:
    """How jobs share the machine."""

    devices: Annotated[int, Field(strict=True, gt=0)] | None = None
    """Local devices that jobs may use; by default all GPUs, or one device if there are none."""
    validation_seconds: Annotated[float, Field(strict=True, gt=0)] = 3600.0
    """A job whose files take longer to validate fails: a validation occupies a core."""
    submitted: Annotated[int, Field(strict=True, gt=0)] = 100
    """The most jobs at once in a cluster's queue."""
    organization: Limits = field(default_factory=lambda: Limits(waiting=1000))
    organizations: Mapping[str, Limits] = field(default_factory=dict)
    """By organization id, replacing `organization`."""
    key: Limits = field(default_factory=lambda: Limits(waiting=200))
    share_hours: Annotated[float, Field(strict=True, gt=0)] = 24.0
    """How far back usage counts for fair sharing between organizations."""

    def of(self, organization: str) -> Limits:
        return self.organizations.get(organization, self.organization)


@dataclass(frozen=True, config=CLOSED)
class Presets:
    """The content of `models.yaml`."""

    models: Mapping[str, Preset] = field(default_factory=dict)
    queue: QueueSettings = field(default_factory=QueueSettings)
    prefix: tuple[StrictStr, ...] = ()
    """The command that puts a job's process into its own control group, such as `systemd-run --user --scope --quiet --collect`."""
    results: Literal["plain", "base64"] = "plain"
    """The form of the results file: `plain`, or `base64` as the hosted API returns it."""


def read(path: Path) -> Presets:
    """Read presets from a file. Raises UserError with every problem."""
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(Problem("--presets", f"cannot be read: {error.strerror}", value=str(path))) from None
    except Exception as error:  # a YAML parser may raise anything for an invalid file
        raise UserError(Problem(str(path), f"is no YAML: {first_line(error)}")) from None
    problems: list[Problem] = []
    made = _read_presets(content, path.name, problems)
    if problems:
        raise UserError(problems)
    return made


def _read_presets(content: Any, file: str, problems: list[Problem]) -> Presets:
    """Return everything that is valid; add the rest to `problems`."""
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
    parsed, wrong = read_tree(Presets, tree, f"{file}: ", keys)
    problems += wrong
    if parsed is None:  # the valid parts may still have other problems
        for name, value in tree["models"].items():
            preset = read_tree(Preset, value, "")[0]
            problems += _preset_problems(preset, f"{file}: models.{name}") if preset is not None else ()
        return Presets()
    for name, preset in parsed.models.items():
        problems += _preset_problems(preset, f"{file}: models.{name}")
    return parsed


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
        if owner := next(
            (owned_key for owned_key in RESERVED_KEYS if key == owned_key or key.startswith(f"{owned_key}.")), ""
        ):
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
