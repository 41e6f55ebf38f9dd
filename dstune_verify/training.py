"""Cases that train a tiny model for two steps by an engine and compare each step with the plain loop."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from dstune_verify import engines, reference
from dstune_verify.cases import RIGHT, WRONG, Outcome, installed
from dstune_verify.models import TinyModel, cast, fill, make_batches, to_device
from dstune_verify.world import World

STEPS = 2
"""Two, since some faults apply the gradient of the step before."""


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
    """Elements in a bucket of DeepSpeed: a third of the model, so that there are several."""
    config: dict[str, Any] = field(default_factory=dict)
    """Further keys of the DeepSpeed configuration."""
    settings: dict[str, Any] | None = None
    """The whole DeepSpeed configuration, in place of one made from these fields."""
    network: dict[str, Any] | None = None
    """The config.json of a model of transformers, in place of a tiny model."""
    unsupported: str = ""
    """Why the settings cannot be compared."""
    rows: int = 2
    length: int = 9
    short: bool = False
    """The case belongs to the short form."""
    seconds: float = 60

    @property
    def group(self) -> str:
        return "deepspeed" if self.engine == "deepspeed" else "torch"

    @property
    def deepspeed(self) -> dict[str, Any]:
        """The DeepSpeed configuration of the case."""
        return engines.deepspeed_config(self)

    @property
    def zero_stage(self) -> int:
        return int(self.deepspeed.get("zero_optimization", {}).get("stage", 0))

    @property
    def clips_unasked(self) -> bool:
        """Whether the configuration says nothing about clipping."""
        return "gradient_clipping" not in self.deepspeed

    @property
    def offloads(self) -> bool:
        return "offload_optimizer" in self.deepspeed.get("zero_optimization", {})

    @property
    def scatters_gradients(self) -> bool:
        return self.deepspeed.get("zero_optimization", {}).get("contiguous_gradients") is False

    def missing(self, device: str) -> str:
        if self.unsupported:
            return self.unsupported
        for package in ("transformers", *(["peft"] if self.lora else [])) if self.network is not None else ():
            if not installed(package):
                return f"{package} is not installed"
        if self.engine == "deepspeed" and not installed("deepspeed"):
            return "DeepSpeed is not installed"
        if self.engine == "fsdp2" and engines.find_fully_shard() is None:
            return "torch is older than FSDP2 (2.4)"
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
        plain = cast(self.make_model(recomputation="").to(world.device), dtype)
        start = engines.copy_weights(plain)
        clipping = self.clipping or 0.0
        first = reference.plain_gradients(plain, start, steps[0], clipping)[1]
        rate = reference.learning_rate(start, first)
        if self.network is not None and dtype != torch.float32:
            exact = reference.plain_gradients(
                self.make_model(recomputation="").to(world.device), start, steps[0], clipping
            )[1]
            bounds = bounds.raised_to(reference.distance(first, exact))
        engine = engines.ENGINES[self.engine](self, self.make_model().to(world.device), rate, world)
        errors = []
        try:
            for batches in steps:
                before = engine.weights()
                losses = engine.step(batches[world.rank])
                after = engine.weights()
                expected_losses, gradients = reference.plain_gradients(plain, before, batches, clipping)
                errors.append(
                    reference.compare(
                        before, after, gradients, losses, expected_losses[world.rank], rate, engine.weight_dtype
                    )
                )
        finally:
            engine.close()
        return judged(self.name, errors, bounds)

    def make_model(self, recomputation: str | None = None) -> torch.nn.Module:
        """Return the model at its start, in float32 on the CPU."""
        recomputation = self.recomputation if recomputation is None else recomputation
        if self.network is not None:
            from dstune_verify.network import Network

            return fill(Network(self.network, lora=self.lora, recomputation=recomputation))
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


KNOWN_FAULTS = (
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

TORCH = (
    TrainingCase("ddp-fp32-accumulation-clipped", engine="ddp", accumulation=3, clipping=0.5),
    TrainingCase("ddp-fp32-uneven-experts", engine="ddp", model="experts", ban_experts=True),
    TrainingCase("ddp-bf16-repeated-recomputed", engine="ddp", precision="bf16", model="repeated", recomputation="non-reentrant"),
    TrainingCase("fsdp2-fp32-accumulation-clipped", engine="fsdp2", accumulation=3, clipping=0.5),
    TrainingCase("fsdp2-fp32-repeated-recomputed", engine="fsdp2", model="repeated", recomputation="non-reentrant"),
    TrainingCase("fsdp2-bf16-lora", engine="fsdp2", precision="bf16", lora=True),
)  # fmt: skip
"""torch's engines, for those who use no DeepSpeed."""

DEEPSPEED = (
    *(TrainingCase(f"zero{stage}-fp32-clipped", stage=stage, clipping=0.5, accumulation=2) for stage in range(4)),
    *(TrainingCase(f"zero{stage}-bf16-accumulation", stage=stage, precision="bf16", accumulation=3) for stage in range(4)),
    *(TrainingCase(f"zero{stage}-fp16-clipped", stage=stage, precision="fp16", clipping=0.5) for stage in range(4)),
    *(TrainingCase(f"zero{stage}-fp32-repeated", stage=stage, model="repeated") for stage in range(4)),
    *(
        TrainingCase(f"zero{stage}-fp32-two-inputs-recomputed", stage=stage, model="two-inputs", recomputation="non-reentrant")
        for stage in range(4)
    ),
    *(TrainingCase(f"zero{stage}-fp32-lora-reentrant", stage=stage, lora=True, recomputation="reentrant") for stage in range(4)),
    *(TrainingCase(f"zero{stage}-fp32-experts", stage=stage, model="experts", rows=4, length=17) for stage in (0, 3)),
    TrainingCase("zero3-fp32-uneven-experts", stage=3, model="experts", ban_experts=True),
    TrainingCase("zero1-fp32-offload", stage=1, offload=True, accumulation=2),
    TrainingCase("zero3-bf16-offload", stage=3, precision="bf16", offload=True, accumulation=2),
    TrainingCase(
        "zero3-fp32-offload-parameters", stage=3, accumulation=2,
        config={"zero_optimization": {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}},
    ),
    TrainingCase("zero2-fp32-overlapped", stage=2, accumulation=2, config={"zero_optimization": {"overlap_comm": True}}),
    TrainingCase(
        "zero1-fp32-round-robin", stage=1, accumulation=2, config={"zero_optimization": {"round_robin_gradients": True}}
    ),
)  # fmt: skip
"""What people train with: stages, precisions, accumulation, clipping, recomputation, offload, LoRA, experts."""
