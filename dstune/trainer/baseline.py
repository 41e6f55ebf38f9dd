"""Measures the untuned model with worked examples in its prompts, as the alternative to training on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any, Protocol

import numpy as np

from dstune.config.schema import RunConfig
from dstune.core.distributed import World
from dstune.core.errors import Problem, UserError
from dstune.data.prepared import PreparedData, Split
from dstune.data.special_tokens import first_special_tokens
from dstune.models.heads import Head
from dstune.protocols import task_of
from dstune.protocols.task_options import AsksUntunedModel
from dstune.trainer.evaluate import Evaluator
from dstune.trainer.measure import Evaluation
from dstune.zero.engine import Engine


class Prompted(Protocol):
    """Evaluates a language model on rows, with worked examples in its prompts."""

    def evaluate(
        self,
        engine: Engine,
        head: Head,
        world: World,
        split: Split,
        shots: int,
        progress: Callable[[int, int], None] | None,
    ) -> Evaluation: ...


@dataclass(frozen=True)
class FewShotResult:
    """The untuned model's evaluation with `shots` worked examples."""

    shots: int
    evaluation: Evaluation


def as_language_model(config: RunConfig) -> RunConfig:
    """Return `config` with a language model's task: a classifier is replaced by the language model without its new head.

    Raises UserError for an encoder, which generates no text.
    """
    task = task_of(config.task)
    task_config = task.as_text_task(config) if isinstance(task, AsksUntunedModel) else config.task
    return replace(config, task=task_config, data=replace(config.data, packing=False))


def measure_prompted(
    config: RunConfig,
    data: PreparedData,
    engine: Engine,
    head: Head,
    tokenizer: Any,
    world: World,
    split: Split,
    shots: Sequence[int],
    progress: Callable[[int, int], None] | None = None,
    key: str = "--shots",
) -> list[FewShotResult]:
    """Measure the metrics of `split` for each number of worked examples in `shots`.

    Every row gets the same examples, drawn by the run's seed from the shorter half of the training rows. Language models are
    judged by the loss of the row's targets; seq2seq also by the text that it generates, up to the first line break unless some
    target has one; classification by which label is the most likely answer.

    engine: of a language model (`as_language_model`). key: the setting that errors name. Every rank must call it.
    Raises UserError if examples and rows are longer than the model's context, or the task has no prompts.
    """
    config = replace(config, data=replace(config.data, packing=False))
    task = task_of(config.task)
    if isinstance(task, AsksUntunedModel) and (prompted := task.prompted(config, data, tokenizer, key)):
        return [FewShotResult(n, prompted.evaluate(engine, head, world, split, n, progress)) for n in shots]
    results = []
    for count in shots:
        chosen = draw(data.train, count, config.trainer.seed)
        if count and "target_ids" in data.train.sample(chosen[0]):
            reason = "encoder-decoders are not trained to read worked examples"
            raise UserError(Problem(key, reason, "0 examples only", str(count)))
        context = joined([data.train.sample(index)["input_ids"] for index in chosen], tokenizer)
        refuse_too_long(key, engine, config, count, len(context) + int(split.lengths.max()))
        evaluator = Evaluator(config, data, engine, head, world, tokenizer)
        results.append(FewShotResult(count, evaluator(split, progress, context=context, one_line=True)))
    return results


def draw(split: Split, count: int, seed: int, classes: np.ndarray | None = None) -> list[int]:
    """Draw the numbers of `count` samples from the shorter half of `split`. classes: of each sample [samples]; the draw is then
    as balanced over the classes as possible."""
    if not count:
        return []
    half = np.flatnonzero(split.lengths <= np.median(split.lengths))
    order = half[np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed, 1]))).permutation(len(half))]
    if classes is None:
        return order[:count].tolist()
    by_class = [order[classes[order] == label] for label in np.unique(classes[order])]
    interleaved = [index for round_ in zip_longest(*by_class) for index in round_ if index is not None]
    return [int(index) for index in interleaved[:count]]


def joined(pieces: Sequence[Sequence[int]], tokenizer: Any) -> list[int]:
    """Concatenate the token ids of several samples; the special tokens that begin a text come only once, at the start."""
    first = first_special_tokens(tokenizer)
    token_ids: list[int] = []
    for piece in pieces:
        ids = list(map(int, piece))
        token_ids += ids[len(first) :] if token_ids and ids[: len(first)] == first else ids
    return token_ids


def refuse_too_long(key: str, engine: Engine, config: RunConfig, shots: int, longest: int) -> None:
    """Raise UserError if `longest`, the tokens of the examples and the longest row, exceeds the model's positions."""
    model: Any = engine.module
    max_positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if max_positions is not None and longest > max_positions:
        reason = (
            f"the examples and the longest row have {longest} tokens, and {config.model.path} reads {max_positions}"
        )
        raise UserError(Problem(key, reason, "fewer examples, or a smaller data.max_length", str(shots)))
