"""Held-out metrics over every row exactly once, on any number of ranks, and answers to held-out prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import torch

from dstune.config.schema import RunConfig
from dstune.config.task_schema import ClassificationConfig
from dstune.data.build import PreparedData, Split
from dstune.data.collate import collate
from dstune.data.sampler import evaluation_batches, share
from dstune.data.stopping import stop_token_ids
from dstune.dist import World
from dstune.models.generation import generate_answers
from dstune.models.heads import Head
from dstune.train.metrics import classification_metrics, language_model_metrics, multi_label_metrics
from dstune.zero.engine import Engine, full_count


@dataclass(frozen=True)
class Evaluation:
    metrics: dict[str, float]
    confusion: list[list[int]] | None = None
    """Rows are true classes, columns predicted ones, in the order of the labels."""


def limited(split: Split, max_rows: int | None) -> Split:
    """The same `max_rows` rows of a split every time: evenly spaced, so that no part of it is left out."""
    if max_rows is None or len(split.lengths) <= max_rows:
        return split
    chosen = np.linspace(0, len(split.lengths) - 1, max_rows).round().astype(int)
    return Split(split.name, split.table.select(chosen), split.lengths[chosen], split.weights[chosen])


class Evaluator:
    """Evaluates one split with the task's head; holds no state between calls."""

    def __init__(
        self, config: RunConfig, data: PreparedData, engine: Engine, head: Head, world: World, pad_token_id: int
    ):
        self._config, self._data, self._engine, self._head, self._world = config, data, engine, head, world
        self._pad_token_id = pad_token_id
        self._classes = len(data.labels) if isinstance(config.task, ClassificationConfig) else 0
        self._multi_label = isinstance(config.task, ClassificationConfig) and config.task.multi_label

    def __call__(self, split: Split, progress: Callable[[int, int], None] | None = None) -> Evaluation:
        split = limited(split, self._config.evaluate.max_rows)
        batches = evaluation_batches(
            split.lengths,
            micro_batch_size=self._config.evaluate.micro_batch_size or self._config.trainer.micro_batch_size,
            max_length=self._config.data.max_length,
            packing=self._config.data.packing,
        )
        mine = share(batches, self._world.rank, self._world.size)
        loss_sum = weight = correct = 0.0
        rows: list[tuple[int, Any, Any]] = []
        self._engine.train(False)
        for number, micro_batch in enumerate(mine):
            batch = collate(
                split,
                micro_batch,
                pad_token_id=self._pad_token_id,
                packing=self._config.data.packing,
                classification=self._classes > 0,
            )
            on_device = {key: value.to(self._engine.device) for key, value in batch.items()}
            output = self._engine.evaluate(self._head, on_device)
            loss_sum += float(output.loss_sum)
            weight += float(output.weight)
            correct += float(output.correct)
            if output.predictions is not None and not micro_batch.filler:
                columns = (batch["index"], output.predictions.cpu(), batch["labels"])
                rows.extend(zip(*(column.tolist() for column in columns), strict=True))
            if progress:
                progress(number + 1, len(mine))
        self._engine.train(True)
        loss_sum, weight, correct = self._world.sum([loss_sum, weight, correct])
        if not self._classes:
            return Evaluation(language_model_metrics(loss_sum, weight, correct))
        everyone = sorted(row for part in self._world.gather(rows) for row in part)
        _, predictions, labels = zip(*everyone, strict=True)
        if self._multi_label:
            return Evaluation(multi_label_metrics(loss_sum, predictions, labels))
        metrics, confusion = classification_metrics(loss_sum, predictions, labels, self._classes)
        return Evaluation(metrics, confusion)


def answer_prompts(
    config: RunConfig, data: PreparedData, engine: Engine, tokenizer: Any, world: World
) -> list[dict[str, str]]:
    """The model's greedy answers to the run's held-out prompts: rows {prompt, reference, answer}, on rank 0.

    Rank 0 generates alone on whole weights while the others wait, where they fit into memory twice on every rank;
    else every rank generates the same text, in step, through ZeRO-3's hooks.
    """
    prompts = data.prompts[: config.evaluate.samples]
    if not prompts:
        return []
    stops = stop_token_ids(tokenizer)
    token_ids = [prompt.input_ids for prompt in prompts]

    def generate(module: torch.nn.Module) -> list[str]:
        return generate_answers(module, tokenizer, token_ids, config.evaluate.max_new_tokens, stops)

    engine.train(False)
    if engine.stage < 3 or world.gather_numbers([_whole_weights_fit(engine)]).all():
        with engine.whole_module() as module:
            answers = generate(module) if world.is_main else []
            world.barrier()
    else:
        answers = generate(engine.module)
    engine.train(True)
    if not world.is_main:
        return []
    return [
        {"prompt": prompt.text, "reference": prompt.reference, "answer": answer}
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def _whole_weights_fit(engine: Engine) -> bool:
    needed = sum(full_count(parameter) * parameter.element_size() for parameter in engine.module.parameters())
    free = torch.cuda.mem_get_info()[0] if engine.device.type == "cuda" else psutil.virtual_memory().available
    return 2 * needed < free
