"""The cases: what is run, and what the outcome is.

A case is run by all ranks at once. It has a name, a group (cases of a group share a process of each rank), a reason why it cannot
run here, and `run`, which returns the outcome of this rank.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import torch

from dstune_verify import engines, reference
from dstune_verify.models import TinyModel, fill, make_batches, to_device
from dstune_verify.world import World

RIGHT, WRONG, CRASHED, NOT_RUN = "right", "wrong", "crashed", "not run"
STATUSES = (RIGHT, WRONG, CRASHED, NOT_RUN)
"""`crashed`: an error, a dead process or no end in time. `not run`: the environment lacks what the case needs."""

STEPS = 2
"""Two, since some faults apply the gradient of the step before."""


@dataclass(frozen=True)
class Outcome:
    """What a case showed."""

    case: str
    status: str
    detail: str = ""
    """What is wrong, or why it did not run."""
    errors: dict[str, float] = field(default_factory=dict)
    bounds: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


class Case(Protocol):
    """What the runner needs of a case."""

    @property
    def name(self) -> str: ...

    @property
    def group(self) -> str:
        """Cases of a group share a process of each rank."""

    @property
    def seconds(self) -> float:
        """Time limit on an idle machine."""

    @property
    def short(self) -> bool:
        """Whether the case belongs to the short form."""

    def missing(self, device: str) -> str:
        """Return why the case cannot run on devices of this type, in this environment; empty if it can."""

    def run(self, world: World) -> Outcome:
        """Run the case in this rank and return its outcome."""


def installed(package: str) -> bool:
    """Return whether a package can be imported, without importing it."""
    return importlib.util.find_spec(package) is not None


@dataclass(frozen=True)
class TrainingCase:
    """Two steps of an engine on a tiny model, compared with the plain loop."""

    name: str
    engine: str = "deepspeed"
    stage: int = 0
    precision: str = "fp32"
    model: str = "plain"
    accumulation: int = 1
    clipping: float | None = 0.0
    """0 for none; None leaves the key out of the configuration, which must mean none."""
    recomputation: str = ""
    offload: bool = False
    lora: bool = False
    ban_experts: bool = False
    """On each rank, another expert gets no tokens."""
    bucket: int = 3000
    """Elements in a bucket: a third of the model, so that there are several."""
    config: dict[str, Any] = field(default_factory=dict)
    """Further keys of the DeepSpeed configuration."""
    rows: int = 2
    length: int = 9
    short: bool = False
    """The case belongs to the short form."""
    seconds: float = 60

    @property
    def group(self) -> str:
        return "deepspeed" if self.engine == "deepspeed" else "torch"

    def missing(self, device: str) -> str:
        if self.engine == "deepspeed" and not installed("deepspeed"):
            return "DeepSpeed is not installed"
        if self.engine == "fsdp2" and torch.__version__ < "2.4":
            return "torch is older than FSDP2"
        if self.precision == "bf16" and device == "cuda" and not torch.cuda.is_bf16_supported():
            return "this GPU has no bf16"
        if self.precision == "fp16" and device == "cpu":
            return "fp16 is not trained on CPUs"
        return ""

    def run(self, world: World) -> Outcome:
        dtype, bounds = engines.DTYPES[self.precision], reference.BOUNDS[self.precision]
        steps = [
            [
                [to_device(batch, world.device) for batch in of_rank]
                for of_rank in make_batches(
                    step, world.size, self.accumulation,
                    rows=self.rows, length=self.length, ban_experts=self.ban_experts,
                )
            ]
            for step in range(STEPS)
        ]  # fmt: skip
        plain = self.make_model(recomputation="").to(world.device, dtype)
        start = engines.copy_weights(plain)
        clipping = self.clipping or 0.0
        rate = reference.learning_rate(start, reference.plain_gradients(plain, start, steps[0], clipping)[1])
        engine = engines.ENGINES[self.engine](self, self.make_model().to(world.device), rate, world)
        errors = []
        try:
            for batches in steps:
                before = engine.weights()
                losses = engine.step(batches[world.rank])
                after = engine.weights()
                expected_losses, gradients = reference.plain_gradients(plain, before, batches, clipping)
                errors.append(
                    reference.compare(before, after, gradients, losses, expected_losses[world.rank], rate, dtype)
                )
        finally:
            engine.close()
        return judged(self.name, errors, bounds)

    def make_model(self, recomputation: str | None = None) -> torch.nn.Module:
        """Return the model at its start, in float32 on the CPU."""
        recomputation = self.recomputation if recomputation is None else recomputation
        return fill(TinyModel(self.model, lora=self.lora, recomputation=recomputation))


def judged(name: str, steps: Iterable[reference.Errors], bounds: reference.Bounds) -> Outcome:
    """Return the outcome of a case from the errors of its steps: those of the first that is wrong, else the largest."""
    steps = list(steps)
    for number, errors in enumerate(steps, 1):
        if reason := errors.exceeds(bounds):
            detail = f"step {number}: {reason}; the gradient's norm is {errors.norm_ratio:.4g} of the expected one"
            return Outcome(name, WRONG, detail, figures(errors), asdict(bounds))
    largest = max(steps, key=lambda errors: errors.gradient)
    return Outcome(name, RIGHT, "", figures(largest), asdict(bounds))


def figures(errors: reference.Errors) -> dict[str, float]:
    """Return the numbers among the errors."""
    return {name: value for name, value in asdict(errors).items() if isinstance(value, float)}


@dataclass(frozen=True)
class CheckCase:
    """A case that is a function: it returns what is wrong, empty if nothing is, and figures."""

    name: str
    group: str
    function: Callable[[World], tuple[str, dict[str, float], dict[str, float]]]
    needs: Callable[[str], str] = lambda device: ""
    short: bool = False
    seconds: float = 60

    def missing(self, device: str) -> str:
        return self.needs(device)

    def run(self, world: World) -> Outcome:
        wrong, errors, bounds = self.function(world)
        return Outcome(self.name, WRONG if wrong else RIGHT, wrong, errors, bounds)


SMALLEST = (
    TrainingCase("zero2-fp32-accumulation", stage=2, accumulation=3),
    TrainingCase("zero2-fp32-accumulation-offload", stage=2, accumulation=3, offload=True),
    TrainingCase("zero0-bf16", stage=0, precision="bf16"),
    TrainingCase(
        "zero1-bf16-accumulation-in-fp32", stage=1, precision="bf16", accumulation=3,
        config={"data_types": {"grad_accum_dtype": "fp32"}},
    ),
    TrainingCase("zero2-bf16-clipping-left-out", stage=2, precision="bf16", clipping=None),
    TrainingCase(
        "zero2-bf16-scattered-gradients", stage=2, precision="bf16", accumulation=3,
        config={"zero_optimization": {"contiguous_gradients": False}},
    ),
    TrainingCase("zero3-bf16-lora-recomputed", stage=3, precision="bf16", lora=True, recomputation="non-reentrant"),
    TrainingCase("zero3-fp32-repeated-reentrant", stage=3, model="repeated", recomputation="reentrant"),
    TrainingCase("zero2-fp32-uneven-experts", stage=2, model="experts", ban_experts=True, bucket=10**7),
)  # fmt: skip
"""One case for each known fault of DeepSpeed that a CPU shows; each is right on at least one published version."""


def all_cases() -> dict[str, Case]:
    """Return all cases by name, in the order in which they run."""
    cases: list[Case] = [replace(case, short=True) for case in SMALLEST]
    return {case.name: case for case in cases}
