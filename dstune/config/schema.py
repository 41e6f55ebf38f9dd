"""The typed configuration tree: one definition for Hydra's schema and for the code.

Everything below is a frozen dataclass that the code reads. `compose.py` derives the mutable twin that Hydra needs
(a frozen dataclass raises while composing), and turns the composed result back into these classes.

A group whose choices have different keys (`task`, `method`, `optimizer`, `schedule`, `launch`) has one class per
choice, so `method=full method.rank=8` is an unknown key instead of a silently ignored one; the class is the key by which
the registry finds the room.
A line of documentation and the range of a field stand beside it: `documentation()` and `validate.py` read both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, make_dataclass
from enum import Enum
from functools import cache
from typing import Any

from dstune.config.data_schema import DataConfig
from dstune.config.fields import DOC, setting
from dstune.config.fields import Automatic as Automatic
from dstune.config.forgetting_schema import ForgettingConfig
from dstune.config.rope import RopeConfig
from dstune.config.sweep_schema import SWEEPS, GridConfig, SweepConfig
from dstune.core.registry import Registry
from dstune.protocols import LAUNCHERS, METHODS, OPTIMIZERS, PARALLELISMS, SCHEDULES, TASKS, TRACKERS
from dstune.protocols.launcher import LaunchConfig
from dstune.protocols.method import MethodConfig
from dstune.protocols.optimizer import OptimizerConfig, ScheduleConfig
from dstune.protocols.parallelism import ParallelConfig
from dstune.protocols.task import TaskConfig
from dstune.protocols.tracker import TrackingConfig


class Attention(Enum):
    auto = "auto"
    sdpa = "sdpa"
    eager = "eager"
    flash_attention_2 = "flash_attention_2"


class InitialWeights(Enum):
    pretrained = "pretrained"
    random = "random"


class UnreachedParts(Enum):
    frozen = "frozen"
    trained = "trained"


class Precision(Enum):
    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class GradientDtype(Enum):
    fp32 = "fp32"
    model = "model"


class Selective(Enum):
    selective = "selective"


class Offload(Enum):
    none = "none"
    cpu = "cpu"


class OptimizerOffload(Enum):
    none = "none"
    cpu = "cpu"
    nvme = "nvme"


SaveMode = Enum("SaveMode", ["sync", "async"])
"""`async` is a keyword of Python, so there is no class statement."""


class SpikeAction(Enum):
    none = "none"
    warn = "warn"
    skip = "skip"
    rollback = "rollback"


class Export(Enum):
    none = "none"
    last = "last"
    best = "best"


@dataclass(frozen=True)
class ModelConfig:
    path: str = "sample://smollm2"
    """Hub id, folder, or packaged sample (`sample://smollm2`, `sample://minilm`)."""
    revision: str | None = setting(None, example="main", needs="model.path=ORG/MODEL")
    """Branch, tag or commit on the hub; resolved to a commit before the ranks start."""
    weights: InitialWeights = InitialWeights.pretrained
    """`pretrained` loads the weights, `random` initialises the architecture from `trainer.seed`."""
    attention: Attention = Attention.auto
    """Attention implementation. For a language model, `auto` takes the GPU's kernel for packed rows, and on a CPU computes
    attention sample by sample; for others it is sdpa, or eager for an architecture without sdpa."""
    fused_norms: bool = True
    """On a GPU in half precision, compute RMS norms by torch's kernel where it is at least as exact as the model's own."""
    fused_activations: bool = False
    """Compile gated activations (SwiGLU, GeGLU) to one kernel, where that is at least as exact as the model's own; its gain was not
    measured yet."""
    fused_rotary: bool = False
    """The same for rotary positions."""
    trust_remote_code: bool = setting(False, signed=True)
    """Run Python code that comes with the model; off unless you trust its author."""
    chat_template: str | None = None
    """Replaces the tokenizer's chat template: a Jinja file, or `chatml`, `deepseek_r1`, `gemma`, `gemma4`, `gpt_oss`,
    `granite`, `llama3`, `mistral`, `mistral_tekken`, `phi3`, `phi4`."""
    prompt_template: str | None = setting(None, example="alpaca")
    """Plain text around questions and answers, for a base model without a chat template: `alpaca`, `llama2` or `vicuna`."""
    add_tokens: list[str] = setting([])
    """Control tokens of your own `chat_template`: added if the vocabulary lacks them, and trained even with adapters."""
    neftune_alpha: float = setting(0.0, at_least=0.0)
    """Noise on the embeddings of a causal language model while it trains (NEFTune, arXiv:2310.05914): at most
    `alpha / sqrt(tokens of the sample * width)`, 5 in the paper; 0 for none."""
    rope: RopeConfig = field(default_factory=RopeConfig)
    config_overrides: dict[str, Any] = setting({})
    """Values that replace those of the model's `config.json`, for example `{attention_dropout: 0.1}`."""
    train_vision: bool = False
    """Train the vision tower and its projector; by default both stay frozen. `optimizer.vision_lr` is their learning rate."""
    unreached_parts: UnreachedParts = UnreachedParts.frozen
    """Parts that rows of text never reach (towers of images and sound, projectors): `frozen` leaves them out of the optimizer and
    of adapters. With `trained`, as in runs of earlier versions, the optimizer has them, but only weight decay changes them."""


@dataclass(frozen=True)
class ZeroConfig:
    """What DeepSpeed ZeRO partitions over the ranks (Rajbhandari et al. 2020, arXiv:1910.02054)."""

    stage: int | Automatic = setting(Automatic.auto, at_least=0, at_most=3)
    """What the ranks partition: 0 nothing, 1 optimizer states, 2 gradients too, 3 parameters too; `auto` takes the fastest one that
    fits, by the plan, when a run begins."""
    offload_optimizer: OptimizerOffload = OptimizerOffload.none
    """Keep optimizer states and fp32 weights in host memory (`cpu`, stages 1 to 3) or on a disk (`nvme`, stage 3)."""
    offload_param: Offload = Offload.none
    """Keep partitioned parameters in host memory (stage 3)."""
    nvme_path: str = "/var/tmp"
    """Folder on a local disk of each node that `offload_optimizer=nvme` writes to; its files are deleted when the run ends."""
    reduce_bucket_size: int = setting(50_000_000, at_least=1)
    """Elements reduced at a time; a larger bucket communicates better and takes more memory."""
    overlap_comm: bool = True
    """Reduce gradients while the backward pass runs (stages 2 and 3, where GPUs have something to send)."""
    gradient_dtype: GradientDtype = GradientDtype.fp32
    """Gradients of a step's micro-batches are summed in `fp32`, or in the `model`'s own format: half the memory, less exact."""
    param_persistence_threshold: int = setting(100_000, at_least=0)
    """Stage 3 does not partition parameters with fewer elements."""
    hpz: bool = False
    """Stage 3 on several nodes: the ranks of each node also keep a copy of the weights among them, so that only the first pass
    after an update gathers from other nodes (hpZ of ZeRO++, Wang et al. 2023, arXiv:2306.10209). `stage=auto` chooses it too."""
    path: str | None = setting(None, example="ds_config.json", needs="zero=file")
    """With `zero=file`: an existing DeepSpeed configuration (JSON) or one of accelerate (YAML), read when a run is composed."""
    settings: dict[str, Any] = setting({})
    """DeepSpeed's settings that dstune has no key for, as in its JSON: `{zero_optimization: {sub_group_size: 1000000}}`."""


STAGES = (0, 1, 2, 3)
LEAST_MEMORY = 3
"""The stage that a run takes where nothing is known of what fits."""


def stage_of(zero: ZeroConfig) -> int:
    """Return the ZeRO stage; `LEAST_MEMORY` as long as none is chosen (`planning.stage`)."""
    return LEAST_MEMORY if isinstance(zero.stage, Automatic) else zero.stage


@dataclass(frozen=True)
class EarlyStoppingConfig:
    metric: str = "loss"
    """Evaluation metric that decides which checkpoint is best: `loss`, `perplexity`, `accuracy`, `f1_macro`, ..."""
    patience: int = setting(0, at_least=0)
    """Stop after this many evaluations without an improvement; 0 never stops."""
    min_delta: float = setting(0.0, at_least=0.0)
    """Smallest change that counts as an improvement."""
    max_gap: float | None = setting(None, above=0.0)
    """Stop when the held-out loss is this far above the training loss since the previous evaluation; never when not given."""


@dataclass(frozen=True)
class SpikeConfig:
    action: SpikeAction = SpikeAction.none
    """What to do when the loss spikes: `warn`, `skip` the update, or `rollback` to the last checkpoint and leave out the
    data since."""
    z_score: float = setting(8.0, above=0.0)
    """A loss is a spike if it is this many robust standard deviations above the median of the last losses."""
    window: int = setting(64, at_least=8)
    """Number of past losses to compare with; detection begins when half of them exist."""
    limit: int = setting(10, at_least=1)
    """Spikes that are skipped or rolled back before the run stops."""


UNTIMED_STEPS = 2
"""First steps of a launch that do not count for throughput, nor are profiled: allocators and caches fill up."""


def _by_module(callbacks: list[Any]) -> bool:
    """Return whether any of them is imported: a registered one is a name."""
    names = [str(name) for entry in callbacks for name in (entry if isinstance(entry, Mapping) else [entry])]
    return any(":" in name or "." in name for name in names)


@dataclass(frozen=True)
class TrainerConfig:
    max_steps: int | None = setting(None, at_least=1, example="100")
    """Optimizer steps; replaces `epochs` when given, with as many passes as that takes."""
    epochs: int = setting(1, at_least=1)
    """Passes over the training rows; ignored if `max_steps` is given."""
    micro_batch_size: int | Automatic = setting(4, at_least=1)
    """Rows in one forward and backward pass of one rank; `auto` measures before the first step what fits and is fastest."""
    global_batch_size: int = setting(16, at_least=1)
    """Rows in one optimizer step over all ranks; does not change with the number of ranks."""
    precision: Precision = Precision.auto
    """`auto` is bf16 where the hardware computes it fast, else fp32."""
    tf32: bool = False
    """Let GPUs round the factors of fp32 matrix products to 10 bits of mantissa: several times as fast."""
    grad_clip: float = setting(1.0, at_least=0.0)
    """Largest norm of the gradient; 0 is off."""
    activation_checkpointing: bool | Selective = False
    """Compute activations again in the backward pass instead of keeping them: all, or (`selective`) all but products of matrices
    and attention."""
    mlp_tiles: int = setting(1, at_least=1, at_most=1024)
    """Number of pieces in which feed-forward layers compute a row, each recomputed in the backward pass: for long rows."""
    seed: int = setting(0, at_least=0)
    """Seed of the data order, dropout and new weights."""
    deterministic: bool = False
    """Refuse operations whose result depends on timing; slower on GPUs."""
    length_grouping: bool = True
    """Without packing, put rows of similar length into one micro-batch."""
    max_nonfinite_steps: int = setting(10, at_least=0)
    """Steps with a non-finite loss or gradient that are skipped before the run stops."""
    stall_seconds: float | Automatic = setting(Automatic.auto, at_least=0.0)
    """A rank that makes no progress for this long (saving: ten times as long) ends, with its Python stacks in its log; 0 waits for
    ever. `auto`: in a step 20 times the slowest of the last 100 steps, and at least 120 s; 1800 s elsewhere."""
    profile_steps: int = setting(0, at_least=0, at_most=100)
    """Steps of each launch, after its first two, that torch's profiler records into `RUN/profile/`; 0 is off."""
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)
    spike: SpikeConfig = field(default_factory=SpikeConfig)
    callbacks: list[Any] = setting([], signed=_by_module, example="[NAME]", needs="plugins=[./plugin.py]")
    """Callbacks beside the built-in ones: names of registered ones, `module:Class` of installed packages, or NAME: {ARGUMENT:
    VALUE}."""

    @property
    def rows(self) -> int:
        """Rows of a micro-batch; one of them, which takes the least, as long as they are not measured."""
        return 1 if isinstance(self.micro_batch_size, Automatic) else self.micro_batch_size


@dataclass(frozen=True)
class CheckpointConfig:
    every: int | str = setting("25%", at_least=0)
    """How often to save: a number of optimizer steps, passes over the rows (`1 epoch`) or a share of the run (`25%`); 0 saves at
    the end (and when preempted) only."""
    keep: int = setting(2, at_least=1)
    """Number of newest checkpoints to keep; the best one is kept too."""
    weights_only: bool = False
    """Save weights without the optimizer's states, in a quarter of the space. Only a save when preempted can be continued."""
    mode: SaveMode = SaveMode["sync"]
    """`async` copies to host memory and writes in the background; the last save and one when preempted are waited for."""


@dataclass(frozen=True)
class EvaluateConfig:
    every: int | str = setting("auto", at_least=0)
    """How often to evaluate: a number of optimizer steps, passes over the rows (`1 epoch`) or a share of the run (`25%`); `auto` is
    25%, but at least 5 steps; 0 evaluates at the end only."""
    at_start: bool = True
    """Evaluate before the first step."""
    max_rows: int | None = setting(None, at_least=1)
    """Evaluate this many rows at most, always the same ones."""
    micro_batch_size: int | None = setting(None, at_least=1)
    """Rows in one forward pass of one rank; `trainer.micro_batch_size` when not given."""
    samples: int = setting(0, at_least=0)
    """Held-out prompts answered before and after training (chat, causal_lm, seq2seq)."""
    max_new_tokens: int = setting(48, at_least=1)
    """Longest answer to a sample prompt, in tokens."""
    slices: list[str] = setting([])
    """Columns for whose values metrics are reported separately, with the worst value and the gap."""
    slice_metric: str | None = setting(None, example="loss")
    """Metric that decides which slice is the worst; the task's own when not given (docs/evaluation.md)."""
    min_slice_rows: int = setting(10, at_least=1)
    """A slice with fewer rows is shown, but cannot be the worst or the best one."""
    counterfactual: str | None = None
    """File with terms to swap (columns `from` and `to`) in held-out rows, to measure how much predictions then change."""
    generate_rows: int | None = setting(100, at_least=0)
    """Number of seq2seq rows whose targets are generated and scored at an evaluation; 0 for none, null for all rows."""
    baseline_shots: list[int] = setting([], example="[0,4]")
    """Before training, ask the untuned model too, with this many worked examples (`[0,4]`), and report what it reaches."""
    safety: bool = False
    """Before and after training, ask the packaged probes (refusals, answers from a source, ...) and look for training rows that the
    model recites: docs/what-changed.md. About 240 answers of up to 32 tokens."""
    canaries: str | None = None
    """Rows that were planted among the training rows: `evaluate.safety` and `dstune evaluate --safety` look for them too."""


def tracking_class() -> type[TrackingConfig]:
    """Return the class of `tracking`: keys that all trackers share, and those of each tracker below its name."""
    return _with_trackers(tuple((room.name, room.Config or bool, room.switch) for room in TRACKERS.classes().values()))


@cache
def _with_trackers(trackers: tuple[tuple[str, type, str], ...]) -> type[TrackingConfig]:
    keys = [
        (name, cls, field(default_factory=cls, metadata={DOC: doc}))
        for name, cls, doc in trackers
        if doc or cls is not bool
    ]
    own_names = {"__module__": TrackingConfig.__module__, "__reduce__": _reduce_tracking}
    return make_dataclass("TrackingConfig", keys, bases=(TrackingConfig,), frozen=True, namespace=own_names)


def _reduce_tracking(self: TrackingConfig) -> tuple[Callable[[dict[str, Any]], TrackingConfig], tuple[dict[str, Any]]]:
    """Reduce for pickle, which finds no class of a module here."""
    return _tracking, ({tracking_field.name: getattr(self, tracking_field.name) for tracking_field in fields(self)},)


def _tracking(values: dict[str, Any]) -> TrackingConfig:
    return tracking_class()(**values)


PREEMPTION_SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGXCPU", "SIGURG")
"""What clusters send before they kill; other signals mean something else to the process that gets them."""


class DirectoryMode(Enum):
    umask = None
    group = 0o750
    private = 0o700


@dataclass(frozen=True)
class RunSection:
    name: str = "run"
    """First part of the run directory's path and the name in W&B."""
    dir: str | None = None
    """Run directory; `runs/NAME/DATE_TIME` when not given. One that holds a run is continued (see `resume`)."""
    mode: DirectoryMode = DirectoryMode.umask
    """Who may look into the run directory: as the `umask` says, the user's `group`, or nobody else (`private`)."""
    resume: str = "auto"
    """`auto` continues a run found in `dir`, `never` refuses to, a path starts from that run's newest checkpoint."""
    export: Export = Export.last
    """Weights written to `export/` at the end: the last, the best by evaluation, or none."""
    time_limit: float | None = setting(None, above=0.0)
    """Minutes after which the run saves and exits 75."""
    signals: list[str] = setting(["SIGTERM", "SIGINT", "SIGUSR1"])
    """Signals that ask the run to save and exit 75; a second one ends it at once."""
    accept_plugin_changes: bool = False
    """Continue a run although a plugin is not the one that it began with; its results may differ from there on."""
    force: bool = False
    """Start even if memory or disk space (for two checkpoints) is estimated to be too small; certain failures stay refused."""


class Choices(Mapping[str, Mapping[str, type]]):
    """Sections with choices; a registry's classes are asked for anew each time, since plugins add to them."""

    def __init__(self, sections: dict[str, Registry[Any] | dict[str, type]]):
        self._sections = sections

    def __getitem__(self, section: str) -> Mapping[str, type]:
        choices = self._sections[section]
        return choices.configs() if isinstance(choices, Registry) else choices

    def __contains__(self, section: object) -> bool:
        return section in self._sections

    def find(self, section: str, choice: str) -> type | None:
        """Return the class of one choice, None where there is no such choice; the rooms of the others are not imported."""
        choices = self._sections[section]
        if not isinstance(choices, Registry):
            return choices.get(choice)
        member = choices.find(choice)
        return None if member is None else member.Config

    def of_plugins(self, section: str) -> dict[str, Any]:
        """Return the members that plugins add to the choices of a section, by the choice."""
        choices = self._sections[section]
        members = choices.present() if isinstance(choices, Registry) else ()
        plugin_members = [member for member in members if not member.__module__.startswith("dstune.")]
        return {member.name: member for member in plugin_members}

    def __iter__(self) -> Iterator[str]:
        return iter(self._sections)

    def __len__(self) -> int:
        return len(self._sections)


@dataclass(frozen=True)
class RunConfig:
    """One run, fully resolved. Written to `run.yaml` and read by every rank."""

    model: ModelConfig
    data: DataConfig
    task: TaskConfig
    method: MethodConfig
    forgetting: ForgettingConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    zero: ZeroConfig
    trainer: TrainerConfig
    checkpoint: CheckpointConfig
    evaluate: EvaluateConfig
    launch: LaunchConfig
    tracking: TrackingConfig
    run: RunSection
    sweep: SweepConfig = field(default_factory=GridConfig)
    """What `dstune train -m` does with the others; the run.yaml of an earlier version has none."""
    parallel: ParallelConfig = field(default_factory=lambda: next(iter(PARALLELISMS.configs().values()))())
    """Also absent from earlier ones."""


CHOICES = Choices(
    {
        "task": TASKS,
        "method": METHODS,
        "optimizer": OPTIMIZERS,
        "schedule": SCHEDULES,
        "launch": LAUNCHERS,
        "sweep": SWEEPS,
        "parallel": PARALLELISMS,
    }
)
"""Classes of the groups whose choices have different keys, by the choice's `name`; those of registries as they are now."""
