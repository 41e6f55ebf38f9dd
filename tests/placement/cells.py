"""The placement matrix: task x method x stage as `tools/case_matrix.py` has them, and what may wait for the device in a step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools import case_matrix
from tools.case_server import ENVIRONMENT

PROGRAM = Path(__file__).with_name("program.py")
ROOT = Path(__file__).parents[2]
SHORT = [
    "trainer.max_steps=2",
    "trainer.global_batch_size=4",
    "evaluate.every=2",
    "evaluate.samples=0",
    "evaluate.at_start=false",
]
STAGES = case_matrix.STAGES


@dataclass(frozen=True)
class Cell:
    name: str
    argv: tuple[str, ...]


def cells(folder: Path, tasks: Sequence[str], stages: Sequence[int], *, rotate: bool = False) -> Iterator[Cell]:
    """Every method of these tasks, and the variants, at each stage; with `rotate` at one of them. folder: of models and data."""
    for case in case_matrix.pairs((), stages, 1, folder, rotate=rotate):
        task = next(word for word in case.argv if word.startswith("task=")).removeprefix("task=")
        if task in tasks:
            words = [word for word in case.argv[1:] if word.partition("=")[0] not in REPLACED]
            yield Cell(case.name, (*words, *SHORT))


REPLACED = {word.partition("=")[0] for word in SHORT} | {"checkpoint.every", "trainer.epochs"}

MICRO_BATCH, GROUP, STEP = "micro-batch", "group", "step"
"""How often something may wait: once in each micro-batch, for each group of the optimizer, in each step."""


@dataclass
class Found:
    """What a cell came to."""

    name: str
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    micro_batches: list[int] = field(default_factory=list)
    groups: int = 0
    waits: list[list[list[Any]]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    error: str = ""
    log: str = ""
    device: str = ""
    kernels: dict[str, str] = field(default_factory=dict)
    rows: int = 0
    engines: int = 0
    """Of DeepSpeed, that live when the run's own is built."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of DeepSpeed."""
    products: str = ""
    """How torch multiplies matrices in fp32."""
    evaluations: list[list[Any]] = field(default_factory=list)
    """Of each, its micro-batches and what waited in it."""

    def not_allowed(self) -> list[str]:
        """What made the host wait in the last step and is not in `ALLOWED`, or more often."""
        often = {MICRO_BATCH: self.micro_batches[-1], GROUP: self.groups, STEP: 1}
        wrong = []
        for operation, place, count in self.waits[-1]:
            times, unit = ALLOWED.get(place, (0, STEP))
            if count > times * often[unit]:
                wrong.append(f"{operation} at {place}: {count} times")
        return wrong

    def total(self, unit: str) -> int:
        """How many waits of the last step come once in each micro-batch, or else."""
        found: dict[str, int] = defaultdict(int)
        for _, place, count in self.waits[-1]:
            found[ALLOWED.get(place, (0, STEP))[1]] += count
        if unit == MICRO_BATCH:
            return found[MICRO_BATCH] // self.micro_batches[-1]
        return found[STEP] + found[GROUP]


ALLOWED: dict[str, tuple[int, str]] = {
    # The sums of a step where they did not come with the norm, and a norm that was not read for the decision.
    "dstune/models/heads/base.py:numbers": (1, STEP),
    "dstune/zero/engine.py:update": (1, STEP),
    # The norm by which DeepSpeed decides whether to update, with the sums of the step; what it writes where a norm is none.
    "dstune/zero/fewer_reads.py:_read": (1, STEP),
    "deepspeed/runtime/zero/stage3.py:get_grad_norm_direct": (2, GROUP),
    "deepspeed/runtime/utils.py:clip_grad_norm_": (2, STEP),
    "deepspeed/runtime/utils.py:clip_tensors_by_global_norm": (1, STEP),
    "deepspeed/runtime/zero/stage_1_and_2.py:has_overflow": (1, STEP),
    # The stream of reductions ends with each backward pass.
    "deepspeed/runtime/zero/stage3.py:independent_gradient_partition_epilogue": (1, MICRO_BATCH),
    # Stage 3 compares the order of fetches between ranks, in the first passes through a model that it has not seen.
    "deepspeed/runtime/zero/utils.py:assert_lst_len_same_as_other_ranks": (9, STEP),
    "deepspeed/runtime/zero/utils.py:get_lst_from_rank0": (9, STEP),
    # Masks of rows without a kernel for packed ones, in fp32: where they restart, whether padding hides anything.
    "transformers/masking_utils.py:find_packed_sequence_indices": (1, MICRO_BATCH),
    "transformers/masking_utils.py:_ignore_causal_mask_sdpa": (4, MICRO_BATCH),
    "transformers/masking_utils.py:_ignore_bidirectional_mask_sdpa": (2, MICRO_BATCH),
    # Trained prompts and prefixes are copied in front of each row.
    "peft/peft_model.py:forward": (1, MICRO_BATCH),
    "peft/peft_model.py:get_prompt": (1, MICRO_BATCH),
    "transformers/cache_utils.py:lazy_initialization": (4, MICRO_BATCH),
    # Which positions of answers have a target: preferences are padded anew in the head, and once more for the reference.
    "dstune/tasks/preference/head.py:__call__": (2, MICRO_BATCH),
    "dstune/tasks/preference/head.py:_keep_targets": (2, MICRO_BATCH),
    "main": (1, MICRO_BATCH),
    # A spike is vetoed between the last forward and backward pass; a penalty's value is read with the step's row.
    "dstune/trainer/loop.py:veto": (1, STEP),
    "dstune/trainer/forgetting.py:collect": (1, STEP),
    # A loss of the whole global batch: vectors of every micro-batch go through the host to all ranks.
    # From Python 3.12 on a comprehension is part of its function.
    **dict.fromkeys((f"dstune/trainer/whole_batch.py:{name}" for name in ("<dictcomp>", "joined")), (5, MICRO_BATCH)),
    **dict.fromkeys((f"dstune/tasks/embedding/head.py:{name}" for name in ("<listcomp>", "join")), (1, MICRO_BATCH)),
}
"""By the place that waits: how often, and in what."""


class Server:
    """Computes cells in children of one process (`program.py`)."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._found: dict[str, Found] = {}
        case_matrix.make_inputs(folder)
        self._process = subprocess.Popen(
            [sys.executable, str(PROGRAM), str(folder)],
            cwd=folder,
            env={
                **{name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")},
                **ENVIRONMENT,
                "PYTHONPATH": str(ROOT),
                "DSTUNE_CACHE": str(folder / "cache"),
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, cell: Cell, *, simulated: bool = True, plant: str = "") -> Found:
        """plant: see `program.PLANTED`. A cell that was computed before is not computed again."""
        assert self._process.stdin is not None and self._process.stdout is not None
        name = cell.name + ("" if simulated else "-on-cpu") + plant
        if name in self._found:
            return self._found[name]
        request = {"name": name, "argv": cell.argv, "simulated": simulated, "plant": plant}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"the program ended with {self._process.wait()}"
        self._found[name] = Found(**json.loads(answer))
        return self._found[name]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
