"""Held-out metrics over every row exactly once, on any number of ranks, and answers to held-out prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from operator import itemgetter
from typing import Any

import numpy as np
import torch

from dstune.config.multi_task import tasks_of
from dstune.config.schema import RunConfig
from dstune.core.distributed import World
from dstune.data.batches import batch_of
from dstune.data.collate import NO_TARGET
from dstune.data.images.batch import prompt_inputs, with_images_everywhere
from dstune.data.prepared import PreparedData, Split
from dstune.data.sampler import MicroBatch, evaluation_batches, share
from dstune.data.special_tokens import first_special_tokens
from dstune.data.stopping import stop_token_ids
from dstune.metrics.language import language_model_metrics
from dstune.models.heads import GlobalBatchHead, Head, numbers, on_device, sums_of
from dstune.models.heads.base import indexed
from dstune.protocols import task_of
from dstune.protocols.task import TaskConfig
from dstune.protocols.task_options import EvaluatesRollouts, MeasuresFurther
from dstune.trainer.counterfactual import compare
from dstune.trainer.generation import Generated, answers_on_all_ranks
from dstune.trainer.measure import Evaluation, Totals, count_rows, whole_rows, with_registered
from dstune.trainer.prefetcher import needs_images
from dstune.trainer.subgroups import measure_slices
from dstune.trainer.whole_batch import joined
from dstune.zero.engine import Engine

Column = np.ndarray | list[np.ndarray]
"""One value for each row of a batch; a list if their lengths differ."""


def limited(split: Split, max_rows: int | None, task: TaskConfig) -> Split:
    """Return `max_rows` evenly spaced rows of a split, the same ones every time.

    A row is a sample, or, if the metrics are of complete rows (`count_rows`), a row with all its samples.
    """
    total = count_rows(split, task)
    if max_rows is None or total <= max_rows:
        return split
    chosen = np.linspace(0, total - 1, max_rows).round().astype(int)
    if split.origins is not None and whole_rows(split, task):
        chosen = np.flatnonzero(np.isin(split.origins, np.unique(split.origins)[chosen]))
    return split.select(chosen)


@dataclass(frozen=True)
class InContext(Split):
    """A split in which the same context, without targets, precedes each sample."""

    context: tuple[int, ...] = ()
    prefix: Sequence[int] = ()
    """The special tokens that begin a text, which are removed from each sample: the context has them already."""

    def sample(self, index: int) -> dict[str, Any]:
        sample = super().sample(index)
        ids = sample["input_ids"]
        cut = len(self.prefix) if ids[: len(self.prefix)].tolist() == list(self.prefix) else 0
        sample["input_ids"] = np.concatenate([self.context, ids[cut:]])
        sample["labels"] = np.concatenate([np.full(len(self.context), NO_TARGET), sample["labels"][cut:]])
        return sample


@dataclass(frozen=True)
class Evaluator:
    """Evaluates one split with the task's head; holds no state between calls."""

    config: RunConfig
    data: PreparedData
    engine: Engine
    head: Head
    world: World
    tokenizer: Any
    trainer_state: Callable[[], Mapping[str, Any]] = lambda: {"global_step": 0, "max_steps": 0, "epoch": 0.0}
    """Returns the values of `trainer_state` in TRL's reward functions."""

    def __call__(
        self,
        split: Split,
        progress: Callable[[int, int], None] | None = None,
        *,
        context: Sequence[int] = (),
        one_line: bool = False,
        slices: bool = True,
    ) -> Evaluation:
        """Return the task's metrics over the rows of `split`, and with `slices` also those of its slices.

        context: tokens in front of every row (worked examples; without packing). one_line: cut generated targets at the first
        line break, unless some target of the rows has several lines.
        """
        split = limited(split, self.config.evaluate.max_rows, self.config.task)
        if tasks := tasks_of(self.config):
            return self._evaluate_each_task(split, tasks, progress)
        return self._evaluate(split, progress, context, one_line=one_line, slices=slices)[1]

    def _evaluate(
        self,
        split: Split,
        progress: Callable[[int, int], None] | None,
        context: Sequence[int] = (),
        *,
        one_line: bool = False,
        slices: bool = True,
    ) -> tuple[Totals, Evaluation]:
        task = task_of(self.config.task)
        if isinstance(task, EvaluatesRollouts):
            return Totals(0.0, 0.0, 0.0), task.evaluate(self, split, progress)
        split_with_context: Split = split
        if context:
            values = {field.name: getattr(split, field.name) for field in fields(split)}
            split_with_context = InContext(
                **values, context=tuple(context), prefix=first_special_tokens(self.tokenizer)
            )
        totals, row_outputs = self._run(split_with_context, progress)
        evaluation = task.measure(self.data.labels, split, totals, row_outputs)
        if isinstance(task, MeasuresFurther):
            evaluation = task.extra_evaluation(self, split, evaluation, context, one_line=one_line, progress=progress)
        evaluation = with_registered(evaluation, task, self.data.labels)
        if not (slices and self.config.evaluate.slices):
            return totals, evaluation
        metrics, details = measure_slices(self.config, self.data.labels, split, row_outputs)
        return totals, replace(
            evaluation, metrics=evaluation.metrics | metrics, details=evaluation.details | {"slices": details}
        )

    def _evaluate_each_task(
        self, split: Split, tasks: Mapping[str, TaskConfig], progress: Callable[[int, int], None] | None
    ) -> Evaluation:
        """Return a language model's metrics over all rows, and the metrics of each task as NAME/METRIC."""
        assert split.sources is not None, "rows of several tasks come from a mixture"
        loss_sum = weight = correct = 0.0
        metrics: dict[str, float] = {}
        generated: tuple[Generated, ...] = ()
        for number, (name, task) in enumerate(tasks.items()):
            chosen = np.flatnonzero(split.sources == number)
            if not len(chosen):
                continue
            config = replace(self.config, task=task, data=replace(self.config.data, mixture={}))
            task_evaluator = replace(self, config=config)
            totals, evaluation = task_evaluator._evaluate(split.select(chosen), progress)
            loss_sum, weight = loss_sum + totals.loss_sum, weight + totals.weight
            correct += totals.correct
            metrics |= {f"{name}/{metric}": value for metric, value in evaluation.metrics.items()}
            generated += tuple(replace(row, task=name) for row in evaluation.generated)
        return Evaluation(language_model_metrics(loss_sum, weight, correct) | metrics, generated=generated)

    def counterfactual(self, split: Split) -> dict[str, Any] | None:
        """Measure how the answers change when terms are swapped (`evaluate.counterfactual`); None if no row of `split` contains
        such a term."""
        swapped = self.data.swapped.get(split.name)
        if swapped is None:
            return None
        split = limited(split, self.config.evaluate.max_rows, self.config.task)
        assert split.origins is not None and swapped.split.origins is not None
        chosen = np.flatnonzero(np.isin(swapped.of[swapped.split.origins], split.origins))
        changed = swapped.split.select(chosen)
        if not len(chosen):
            return None
        unswapped = split.select(np.flatnonzero(np.isin(split.origins, swapped.of[changed.origins])))
        _, outputs_before = self._run(unswapped, None)
        _, outputs_after = self._run(changed, None)
        return compare(self.config, swapped, (unswapped, outputs_before), (changed, outputs_after))

    def _run(self, split: Split, progress: Callable[[int, int], None] | None) -> tuple[Totals, list[dict[str, Any]]]:
        """Run the head over all rows on all ranks; return the sums, and the head's values of each sample in order."""
        evaluate = self.config.evaluate
        by_sample = bool(evaluate.slices or evaluate.counterfactual)
        # Values of single samples need a row for each sample. The sums are the same as with packing (checked at the start).
        packing = self.config.data.packing and not by_sample
        batches = evaluation_batches(
            split.lengths,
            micro_batch_size=evaluate.micro_batch_size or self.config.trainer.rows,
            max_length=self.config.data.max_length,
            packing=packing,
            padded=self.config.data.pads_rows,
        )
        batches = with_images_everywhere(batches, split, needed=needs_images(self.config, self.world))
        local_batches = share(batches, self.world.data_parallel_rank, self.world.data_parallel_size)
        sums: dict[str, torch.Tensor] = {}
        rows = RowCollector()
        by_sample = by_sample or not task_of(self.config.task).language
        self.engine.train(False)
        whole_batch_inputs = None
        if isinstance(self.head, GlobalBatchHead) and self.head.join_evaluation:
            whole_batch_inputs = joined(
                self.head,
                self.engine,
                (self._batch(split, part, packing, by_sample) for part in local_batches),
                self.world,
            )
        for number, micro_batch in enumerate(local_batches):
            batch = self._batch(split, micro_batch, packing, by_sample)
            extra_inputs = whole_batch_inputs[number] if whole_batch_inputs else {}
            output = self.engine.evaluate(self.head, batch | extra_inputs)
            for name, value in sums_of(output).items():
                sums[name] = sums.get(name, 0.0) + value.double()
            if by_sample and output.rows and self.world.counts and not micro_batch.filler:
                rows.add(batch["index"], output.rows)
            if progress:
                progress(number + 1, len(local_batches))
        self.engine.train(True)
        values = numbers(sums).values()
        totals = Totals.of(
            dict(zip(sums, self.world.sum([value if self.world.counts else 0.0 for value in values]), strict=True))
        )
        numbered_rows = [
            row
            for rank_batches in self.world.gather(rows.read())
            for indices, columns in rank_batches
            for row in zip(indices, _by_row(columns), strict=True)
        ]
        return totals, [row_outputs for _, row_outputs in sorted(numbered_rows, key=itemgetter(0))]

    def _batch(self, split: Split, micro_batch: MicroBatch, packing: bool, by_sample: bool) -> dict[str, torch.Tensor]:
        """Build a batch. by_sample: include the numbers of the samples, so that the head returns values for each of them."""
        config = replace(self.config, data=replace(self.config.data, packing=packing))
        batch = batch_of(config, split, micro_batch, self.tokenizer.pad_token_id, with_index=by_sample)
        return on_device(indexed(self.head, batch), self.engine.device)


class RowCollector:
    """Collects the head's values of each row. Batches stay on the device until `BATCHES_PER_READ` of them are read together, so
    that the host waits for the device less often."""

    BATCHES_PER_READ = 64

    def __init__(self) -> None:
        self._on_device: list[tuple[torch.Tensor, Mapping[str, torch.Tensor | Sequence[torch.Tensor]]]] = []
        self._on_host: list[tuple[list[int], dict[str, Column]]] = []

    def add(self, indices: torch.Tensor, columns: Mapping[str, torch.Tensor | Sequence[torch.Tensor]]) -> None:
        self._on_device.append((indices, columns))
        if len(self._on_device) == self.BATCHES_PER_READ:
            self.read()

    def read(self) -> list[tuple[list[int], dict[str, Column]]]:
        """Return, for each batch, the numbers of its rows and its columns."""
        self._on_host += [(indices.tolist(), _columns(columns)) for indices, columns in self._on_device]
        self._on_device.clear()
        return self._on_host


def _columns(columns: Mapping[str, torch.Tensor | Sequence[torch.Tensor]]) -> dict[str, Column]:
    """Copy the columns of a batch to the CPU."""
    return {
        name: column.cpu().numpy() if isinstance(column, torch.Tensor) else [part.cpu().numpy() for part in column]
        for name, column in columns.items()
    }


def _by_row(columns: Mapping[str, Column]) -> list[dict[str, np.ndarray]]:
    """Convert columns to one dictionary per row."""
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def answer_prompts(
    config: RunConfig, data: PreparedData, engine: Engine, tokenizer: Any, world: World
) -> list[dict[str, str]]:
    """Generate the model's greedy answers to the run's held-out prompts: rows {prompt, reference, answer}, on rank 0."""
    prompts = data.prompts[: config.evaluate.samples]
    with_images = [prompt for prompt in prompts if prompt.images]
    if with_images and engine.stage == 3 and world.size > 1:
        prompts = with_images  # ranks gather the vision tower together, so all of them need an image
    if not prompts:
        return []
    split = data.validation or data.train
    images = [prompt_inputs(split, prompt.input_ids, prompt.images) for prompt in prompts] if with_images else []
    stops = stop_token_ids(tokenizer, task_of(config.task).template_arguments)
    token_ids = [prompt.input_ids for prompt in prompts]

    answers = answers_on_all_ranks(engine, tokenizer, token_ids, config.evaluate.max_new_tokens, stops, world, images)
    if not world.is_main:
        return []
    return [
        {"prompt": prompt.text, "reference": prompt.reference, "answer": answer}
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
