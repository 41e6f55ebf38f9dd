"""Saving, loading and repeating: the weights must be equal to the bit."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from dstune_verify import engines
from dstune_verify.cases import RIGHT, WRONG, CannotRun, Outcome
from dstune_verify.models import make_batches, to_device
from dstune_verify.training import TrainingCase
from dstune_verify.world import World

STEPS = 2
RATE = 2.0**-6


@dataclass(frozen=True)
class ContinuityCase:
    """Four steps at once, twice; and two steps, a save, a new engine that loads it, and two more. All must end alike."""

    name: str
    trained: TrainingCase
    saves: bool = True
    group: str = "deepspeed"
    short: bool = False
    seconds: float = 90

    def missing(self, device: str) -> str:
        return self.trained.missing(device)

    def run(self, world: World) -> Outcome:
        whole, losses = self._train(world, range(2 * STEPS))
        again, losses_again = self._train(world, range(2 * STEPS))
        differences = {"second run": _different(whole, again) + (losses != losses_again)}
        if self.saves:
            differences["after load"] = self._continue(world, whole)
        wrong = [f"{what}: {count} tensors differ" for what, count in differences.items() if count]
        figures = {what: float(count) for what, count in differences.items()}
        return Outcome(self.name, WRONG if wrong else RIGHT, "; ".join(wrong), figures, dict.fromkeys(figures, 0.0))

    def _continue(self, world: World, whole: dict[str, torch.Tensor]) -> int:
        with tempfile.TemporaryDirectory(prefix="dstune-verify-") as own:
            folder = world.gather(own)[0]
            if not all(world.gather(Path(folder).is_dir())):
                raise CannotRun("ranks on several nodes need a shared folder: set TMPDIR to one")
            self._train(world, range(STEPS), save_to=folder)
            world.gather("saved")
            weights, _ = self._train(world, range(STEPS, 2 * STEPS), load_from=folder)
            world.gather("loaded")
        return _different(whole, weights)

    def _train(
        self, world: World, steps: range, *, save_to: str = "", load_from: str = ""
    ) -> tuple[dict[str, torch.Tensor], list[float]]:
        case = self.trained
        engine = engines.ENGINES[case.engine](case, case.make_model().to(world.device), RATE, world, adamw)
        losses: list[float] = []
        try:
            if load_from:
                engine.load(load_from)
            for step in steps:
                batches = make_batches(step, world.size, case.accumulation)[world.rank]
                losses += engine.step([to_device(batch, world.device) for batch in batches])
            if save_to:
                engine.save(save_to)
            return engine.weights(), losses
        finally:
            engine.close()


def adamw(parameters: list[torch.nn.Parameter], rate: float) -> torch.optim.Optimizer:
    """Return an optimizer that has a state to save."""
    return torch.optim.AdamW(parameters, lr=rate)


def _different(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> int:
    """Return how many tensors are not equal to the bit."""
    return sum(not torch.equal(one[name], other[name]) for name in one)


CASES = (
    ContinuityCase("resume-zero1-bf16", TrainingCase("", stage=1, precision="bf16", accumulation=2)),
    ContinuityCase("resume-zero2-fp32-offload", TrainingCase("", stage=2, offload=True)),
    ContinuityCase("resume-zero3-bf16-lora", TrainingCase("", stage=3, precision="bf16", lora=True)),
    ContinuityCase("repeat-ddp-fp32", TrainingCase("", engine="ddp"), saves=False, group="torch"),
    ContinuityCase("repeat-fsdp2-bf16", TrainingCase("", engine="fsdp2", precision="bf16"), saves=False, group="torch"),
)
