"""Training steps on the student's answers: sampled with the current weights, then compared with the teacher token by token."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dstune.config.schema import RunConfig
from dstune.core import files
from dstune.core.distributed import World
from dstune.core.errors import Problem, UserError
from dstune.data.batches import padded
from dstune.data.collate import NO_TARGET
from dstune.data.prepared import Split
from dstune.data.sampler import MicroBatch
from dstune.generation.answers import end_tokens
from dstune.generation.batch import below_adapters, pad
from dstune.generation.completions import Completion, sample_completions
from dstune.tasks.distillation.config import DistillationConfig
from dstune.trainer.generation import speaking
from dstune.trainer.prefetcher import RankBatch
from dstune.trainer.rollouts import RolloutRun, RolloutStep, batches_of_answers
from dstune.zero.engine import Engine

FOLDER = "rollouts"
"""Folder of a run directory with the sampled answers of such steps: `step-000001.jsonl`, ..., one answer a line."""


class OwnAnswers:
    """With probability `task.on_policy`, lets a step train on the model's answers to the prompts of its rows (GKD). See
    `trainer.rollouts.Rollouts`.

    The choice of steps and the noise of sampling depend only on the run's seed and the step: nothing has to be saved.
    """

    updates = 1

    def __init__(
        self,
        config: RunConfig,
        split: Split,
        engine: Engine,
        tokenizer: Any,
        world: World,
        run_dir: Path,
        stops: Sequence[int],
    ):
        assert isinstance(config.task, DistillationConfig)
        self._config, self._task, self._split = config, config.task, split
        self._engine, self._tokenizer, self._world, self._run_dir = engine, tokenizer, world, run_dir
        self._ends = frozenset(end_tokens(below_adapters(engine.module), stops))
        self._sums: dict[str, float] = {}

    def begin_step(self, run: RolloutRun, step: RolloutStep) -> RankBatch:
        """Return the rows of the step, or their prompts with the model's answers."""
        self._sums = {"own_answers": 0.0, "own_tokens": 0.0}
        if not self._is_own(step.number):
            return step.batch
        with run.around("generating"):
            answered = self._answer([part for part, _ in step.batch.batches], step.number)
        return self._training_batch(answered, step.batch, step.number)

    @contextmanager
    def several_updates(self) -> Iterator[Callable[[int], Sequence[Mapping[str, torch.Tensor]]]]:
        yield lambda number: ()

    def end_step(self, step: RolloutStep, sums: Mapping[str, float]) -> dict[str, float]:
        return self._sums

    def close(self) -> None:
        pass

    def _is_own(self, step: int) -> bool:
        """Return whether a step trains on the model's answers: the same on every rank and after a resume."""
        return random.Random(f"{self._config.trainer.seed}/{step}").random() < self._task.on_policy

    def _answer(self, parts: Sequence[MicroBatch], step: int) -> list[tuple[MicroBatch, list[Completion]]]:
        """Sample answers to the prompts of each micro-batch, including fillers, since ranks may have to sample in step."""
        answered = []
        with speaking(self._engine, self._world) as (module, in_step):
            for part in parts:
                numbers = [index for row in part.rows for index in row]
                prompts = [self._prompt(index).tolist() for index in numbers]
                completions = sample_completions(
                    module,
                    *pad(prompts, self._tokenizer.pad_token_id, self._engine.device),
                    numbers,
                    samples=1,
                    max_new_tokens=self._task.max_new_tokens,
                    temperature=self._task.sampling_temperature,
                    ends=self._ends,
                    padding=self._tokenizer.pad_token_id,
                    keys=(self._config.trainer.seed, step),
                    goes_on=self._world.any if in_step else bool,
                )
                answered.append((part, completions))
        return answered

    def _prompt(self, index: int) -> np.ndarray:
        """Return the tokens in front of a sample's last answer. Raises UserError if there are none."""
        sample = self._split.sample(index)
        non_targets = np.flatnonzero(sample["labels"] == NO_TARGET)
        end = int(np.flatnonzero(sample["labels"] != NO_TARGET)[-1])
        start = int(non_targets[non_targets < end][-1]) + 1
        if start < 2:
            reason = "a row is a plain text, which asks nothing that the model could answer"
            raise UserError(Problem("task.on_policy", reason, "task.on_policy=0, or rows with prompts and answers"))
        ids: np.ndarray = sample["input_ids"][:start]
        return ids

    def _training_batch(
        self, answered: Sequence[tuple[MicroBatch, list[Completion]]], batch: RankBatch, step: int
    ) -> RankBatch:
        """Return micro-batches of `trainer.micro_batch_size` answers; every rank has the same number of them."""
        world = self._world
        batches = batches_of_answers(answered, self._config.trainer.rows, world, self._tensors)
        counted = [completion for part, completions in answered if not part.filler for completion in completions]
        targets = sum(len(completion.ids) for completion in counted)
        tokens = targets + sum(len(self._prompt(completion.prompt)) for completion in counted)
        totals = world.gather_numbers([targets, tokens]).sum(axis=0).tolist()
        self._sums = {"own_answers": float(len(counted)), "own_tokens": float(targets)}
        self._write(step, counted)
        return RankBatch(totals[0] or 1.0, int(totals[1]), batch.epoch, batches)

    def _write(self, step: int, completions: Sequence[Completion]) -> None:
        """Write the answers of all ranks to a file, one a line."""
        rows = [
            {
                "prompt": completion.prompt,
                "ids": completion.ids,
                "ended": completion.ended,
                "text": self._tokenizer.decode(completion.ids),
            }
            for completion in completions
        ]
        all_rows = [row for rank in self._world.gather(rows) for row in rank]
        if self._world.is_main:
            folder = self._run_dir / FOLDER
            folder.mkdir(exist_ok=True)
            lines = [json.dumps(row, ensure_ascii=False) for row in sorted(all_rows, key=itemgetter("prompt"))]
            files.write(folder / f"step-{step:06d}.jsonl", "\n".join(lines) + "\n")

    def _tensors(self, chunk: Sequence[tuple[Completion, bool]]) -> dict[str, torch.Tensor]:
        ids, labels = [], []
        for completion, counts in chunk:
            prompt = self._prompt(completion.prompt)
            answer = completion.ids if counts else [NO_TARGET] * len(completion.ids)
            ids.append(np.concatenate([prompt, completion.ids]).astype(np.int64))
            labels.append(np.concatenate([np.full(len(prompt), NO_TARGET), answer]).astype(np.int64))
        arrays = padded(ids, labels, self._tokenizer.pad_token_id)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
