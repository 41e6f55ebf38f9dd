"""`dstune train` on every GPU of this machine: stages, precisions, methods, resume, and a real model.

Each case is one command, as a user types it. The model is a random decoder of 60M parameters, large enough that its
parameters are partitioned for real; all cases take about five minutes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny import save_decoder, write_dialogues

ROOT = Path(__file__).parents[2]
Record = Callable[[str, object], None]

pytestmark = pytest.mark.gpu

STEPS = 8


def gpus() -> int:
    import torch

    return torch.cuda.device_count()


@dataclass(frozen=True)
class Run:
    result: dict[str, Any]
    losses: list[float]
    grad_norms: list[float]


class Workshop:
    def __init__(self, folder: Path):
        self.folder = folder
        wide = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 12}
        self.model = save_decoder(folder / "model", **wide, num_key_value_heads=4, initializer_range=0.02)
        self.data = write_dialogues(folder / "dialogues.jsonl", 400)

    def train(self, name: str, *overrides: str) -> Run:
        """Train on all GPUs into the run directory `name` and read what was written there."""
        command = [sys.executable, "-m", "dstune", "train", f"run.dir={self.folder / name}", *overrides]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        lines = (self.folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [row for row in map(json.loads, lines) if "loss" in row]
        result = json.loads((self.folder / name / "result.json").read_text(encoding="utf-8"))
        return Run(result, [row["loss"] for row in rows], [row["grad_norm"] for row in rows])

    def train_random(self, name: str, *overrides: str) -> Run:
        """The random decoder on random dialogues, `STEPS` steps of the same rows on any number of GPUs."""
        common = (
            f"model.path={self.model}",
            "data=files",
            f"data.train={self.data}",
            "data.max_length=128",
            "optimizer.lr=3e-4",
            "schedule=constant",
            "trainer.micro_batch_size=2",
            "trainer.global_batch_size=8",
            f"trainer.max_steps={STEPS}",
            "trainer.epochs=4",
        )
        return self.train(name, *common, *overrides)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    if gpus() == 0:
        pytest.skip("no CUDA GPU on this machine")
    return Workshop(tmp_path_factory.mktemp("gpu"))


@pytest.fixture(scope="module")
def reference(workshop: Workshop) -> Run:
    """fp32, nothing partitioned: what every other case is compared with."""
    return workshop.train_random("stage0-fp32", "zero=stage0", "trainer.precision=fp32")


def record_result(record: Record, run: Run) -> None:
    record("ranks", run.result["world_size"])
    record("tokens/s", round(run.result["tokens_per_second"]))
    record("peak GiB", round(run.result["peak_memory_gib"], 2))
    record("loss", f"{run.losses[0]:.4f} -> {run.losses[-1]:.4f}")


CASES = {
    # (overrides, how far a loss may be from the fp32 reference; 8-bit mantissas of bf16 give about 1 in 100)
    "stage1-fp32": (("zero=stage1", "trainer.precision=fp32"), 1e-4),
    "stage2-fp32": (("zero=stage2", "trainer.precision=fp32"), 1e-4),
    "stage3-fp32": (("zero=stage3", "trainer.precision=fp32"), 1e-4),
    "stage2-bf16": (("zero=stage2", "trainer.precision=bf16"), 2e-2),
    "stage3-bf16": (("zero=stage3", "trainer.precision=bf16"), 2e-2),
    "stage3-bf16-checkpointing": (
        ("zero=stage3", "trainer.precision=bf16", "trainer.activation_checkpointing=true"),
        2e-2,
    ),
}


def test_the_reference_learns_on_every_gpu(reference: Run, record_property: Record) -> None:
    record_result(record_property, reference)
    assert reference.result["status"] == "completed"
    assert reference.result["world_size"] == gpus()
    assert len(reference.losses) == STEPS
    assert reference.losses[-1] < reference.losses[0] - 0.1
    assert reference.result["peak_memory_gib"] > 0.2  # the device's allocator, not an empty reading


@pytest.mark.parametrize("case", CASES)
def test_stages_and_precisions_follow_the_reference(
    workshop: Workshop, reference: Run, case: str, record_property: Record
) -> None:
    overrides, tolerance = CASES[case]
    run = workshop.train_random(case, *overrides)
    record_result(record_property, run)
    assert run.losses == pytest.approx(reference.losses, rel=tolerance)
    assert run.grad_norms[0] == pytest.approx(reference.grad_norms[0], rel=5 * tolerance)


def test_fp16_learns(workshop: Workshop, reference: Run, record_property: Record) -> None:
    """The first steps may be skipped while the loss scale is found, so the curve is not compared step by step."""
    run = workshop.train_random("stage2-fp16", "zero=stage2", "trainer.precision=fp16")
    record_result(record_property, run)
    assert run.result["status"] == "completed"
    assert run.losses[0] == pytest.approx(reference.losses[0], rel=1e-2)


def test_lora_at_stage_3(workshop: Workshop, record_property: Record) -> None:
    run = workshop.train_random(
        "stage3-lora", "zero=stage3", "method=lora", "optimizer.lr=3e-3", "trainer.precision=bf16"
    )
    record_result(record_property, run)
    assert run.losses[-1] < run.losses[0]


def test_resumed_equals_uninterrupted(workshop: Workshop, record_property: Record) -> None:
    """Stage 3 in bf16 with a stop after half of the steps. Reductions on GPUs may differ in their last bits."""
    options = ("zero=stage3", "trainer.precision=bf16", "trainer.deterministic=true")
    whole = workshop.train_random("whole", *options)
    workshop.train_random("halves", *options, f"trainer.max_steps={STEPS // 2}")
    resumed = workshop.train_random("halves", *options)
    record_result(record_property, resumed)
    assert len(resumed.losses) == STEPS
    assert resumed.losses == pytest.approx(whole.losses, rel=1e-3)


def test_a_real_model(workshop: Workshop, record_property: Record) -> None:
    """SmolLM2-135M on the dialogues, bf16 at stage 2, as far as the samples are in the cache or can be fetched."""
    from dstune import samples
    from dstune.core.errors import UserError

    try:
        for name in ("smollm2", "chitchat"):
            samples.resolve(f"sample://{name}")
    except UserError as error:
        pytest.skip(f"the samples cannot be fetched here: {error}")
    run = workshop.train(
        "smollm2",
        "experiment=quickstart",
        "zero=stage2",
        "trainer.precision=bf16",
        "trainer.micro_batch_size=8",
        "trainer.global_batch_size=32",
        "trainer.max_steps=30",
        "data.max_length=512",
    )
    record_result(record_property, run)
    assert run.result["eval_final"]["loss"] < run.result["eval_initial"]["loss"] - 0.1
