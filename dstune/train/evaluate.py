"""Held-out metrics over every row exactly once, on any number of ranks, and answers to held-out prompts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from operator import itemgetter
from typing import Any

import numpy as np
import psutil
import torch

from dstune.config.schema import RunConfig
from dstune.data.batches import batch_of
from dstune.data.build import PreparedData, Split
from dstune.data.sampler import MicroBatch, evaluation_batches, share
from dstune.data.stopping import stop_token_ids
from dstune.dist import World
from dstune.models.generation import generate_answers
from dstune.models.heads import Head, sums_of
from dstune.models.heads.embedding import EmbeddingHead
from dstune.train.measure import Evaluation, Totals, measure
from dstune.train.window import joined
from dstune.zero.engine import Engine, full_count


def limited(split: Split, max_rows: int | None) -> Split:
    """The same `max_rows` rows of a split every time: evenly spaced, so that no part of it is left out."""
    if max_rows is None or len(split.lengths) <= max_rows:
        return split
    chosen = np.linspace(0, len(split.lengths) - 1, max_rows).round().astype(int)
    return replace(split, lengths=split.lengths[chosen], weights=split.weights[chosen], rows=chosen, sources=None)


class Evaluator:
    """Evaluates one split with the task's head; holds no state between calls."""

    def __init__(
        self, config: RunConfig, data: PreparedData, engine: Engine, head: Head, world: World, pad_token_id: int
    ):
        self._config, self._data, self._engine, self._head, self._world = config, data, engine, head, world
        self._pad_token_id = pad_token_id

    def __call__(self, split: Split, progress: Callable[[int, int], None] | None = None) -> Evaluation:
        split = limited(split, self._config.evaluate.max_rows)
        packing = self._config.data.packing
        batches = evaluation_batches(
            split.lengths,
            micro_batch_size=self._config.evaluate.micro_batch_size or self._config.trainer.micro_batch_size,
            max_length=self._config.data.max_length,
            packing=packing,
        )
        mine = share(batches, self._world.rank, self._world.size)
        sums: dict[str, float] = defaultdict(float)
        rows: list[tuple[int, dict[str, Any]]] = []
        self._engine.train(False)
        shares = None
        if not isinstance(self._head, EmbeddingHead):  # whose metrics need the vectors themselves
            shares = joined(self._head, self._engine, (self._batch(split, part) for part in mine), self._world)
        for number, micro_batch in enumerate(mine):
            batch = self._batch(split, micro_batch)
            output = self._engine.evaluate(self._head, batch | (shares[number] if shares else {}))
            for name, value in sums_of(output).items():
                sums[name] += float(value)
            if output.rows and not micro_batch.filler:
                rows += zip(batch["index"].tolist(), _by_row(output.rows), strict=True)
            if progress:
                progress(number + 1, len(mine))
        self._engine.train(True)
        totals = Totals.of(dict(zip(sums, self._world.sum(list(sums.values())), strict=True)))
        everyone = sorted((row for part in self._world.gather(rows) for row in part), key=itemgetter(0))
        return measure(self._config.task, self._data.labels, totals, [kept for _, kept in everyone])

    def _batch(self, split: Split, micro_batch: MicroBatch) -> dict[str, torch.Tensor]:
        batch = batch_of(self._config, split, micro_batch, self._pad_token_id, with_index=not self._config.data.packing)
        return {key: value.to(self._engine.device) for key, value in batch.items()}


def _by_row(columns: Mapping[str, torch.Tensor | Sequence[torch.Tensor]]) -> list[dict[str, np.ndarray]]:
    """Columns of a batch as one dictionary a row, on the CPU."""
    arrays = {
        name: column.cpu().numpy() if isinstance(column, torch.Tensor) else [part.cpu().numpy() for part in column]
        for name, column in columns.items()
    }
    return [dict(zip(arrays, values, strict=True)) for values in zip(*arrays.values(), strict=True)]


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
