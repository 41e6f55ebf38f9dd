"""The untuned model, asked with worked examples in front of each row instead of being trained on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import numpy as np
import torch

from dstune.config.schema import RunConfig
from dstune.config.task_schema import CausalLmConfig, ClassificationConfig, Seq2SeqConfig
from dstune.data.prepared import PreparedData, Split
from dstune.data.sampler import MicroBatch, share
from dstune.data.special_tokens import first_special_tokens
from dstune.dist import World
from dstune.errors import Problem, UserError
from dstune.models.heads import Head
from dstune.models.load import load_config
from dstune.tasks.classification.metrics import classification_metrics
from dstune.tasks.seq2seq.encode import ReplyEncoder
from dstune.train.evaluate import Evaluator, limited
from dstune.train.measure import Evaluation
from dstune.zero.engine import Engine

WRITING = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""How the names of architectures end that write text."""

LABEL_PROMPT = "Classify the text as {labels}.\n\nText: {{source}}\n\nClass:"


@dataclass(frozen=True)
class Prompted:
    """What the untuned model reaches with so many worked examples."""

    shots: int
    evaluation: Evaluation


def as_language_model(config: RunConfig) -> RunConfig:
    """`config` for the model that is asked: a classifier's place is taken by the language model itself.

    Raises UserError for an encoder, which writes nothing.
    """
    if isinstance(config.task, ClassificationConfig):
        architectures = load_config(config.model).architectures or []
        if architectures and not any(name.endswith(WRITING) for name in architectures):
            reason = f"{config.model.path} is a {architectures[0]}, an encoder, and answers no prompt"
            fix = "ask a language model instead: --prompted MODEL, for example --prompted sample://smollm2"
            raise UserError(Problem("--shots", reason, fix))
        return replace(config, task=CausalLmConfig(), data=replace(config.data, packing=False))
    return replace(config, data=replace(config.data, packing=False))


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
) -> list[Prompted]:
    """The metrics of `split` for each number of worked examples; the same examples for every row, drawn by the run's seed
    from the shorter half of the training rows.

    Language models are judged by the loss of the row's targets, seq2seq by what they generate too (up to the first line
    break where no target has one), classification by which label is the most likely answer.
    engine: of a language model (`as_language_model`). key: what asked for it. Every rank must call it.
    Raises UserError where examples and rows are longer than the model's context, or the task cannot be asked.
    """
    config = replace(config, data=replace(config.data, packing=False))
    if isinstance(config.task, ClassificationConfig):
        asked = _Labels(key, config, config.task, data, tokenizer)
        return [Prompted(n, asked.evaluate(engine, head, world, split, n, progress)) for n in shots]
    results = []
    for count in shots:
        chosen = draw(data.train, count, config.trainer.seed)
        if count and "target_ids" in data.train.sample(chosen[0]):
            reason = "an encoder-decoder has not learnt to read worked examples"
            raise UserError(Problem(key, reason, "0 examples only", str(count)))
        context = _joined([data.train.sample(index)["input_ids"] for index in chosen], tokenizer)
        _refuse_too_long(key, engine, config, count, len(context) + int(split.lengths.max()))
        evaluator = Evaluator(config, data, engine, head, world, tokenizer)
        results.append(Prompted(count, evaluator(split, progress, context=context, one_line=True)))
    return results


def draw(split: Split, count: int, seed: int, classes: np.ndarray | None = None) -> list[int]:
    """`count` sample numbers from the shorter half of `split`; with `classes` [samples] as many of each class as possible."""
    if not count:
        return []
    half = np.flatnonzero(split.lengths <= np.median(split.lengths))
    order = half[np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed, 1]))).permutation(len(half))]
    if classes is None:
        return order[:count].tolist()
    by_class = [order[classes[order] == kind] for kind in np.unique(classes[order])]
    turns = [index for turn in zip_longest(*by_class) for index in turn if index is not None]
    return [int(index) for index in turns[:count]]


def _joined(pieces: Sequence[Sequence[int]], tokenizer: Any) -> list[int]:
    """Token ids of several samples, one behind the other; what begins a text stands at the beginning only."""
    first = first_special_tokens(tokenizer)
    joined: list[int] = []
    for piece in pieces:
        ids = list(map(int, piece))
        joined += ids[len(first) :] if joined and ids[: len(first)] == first else ids
    return joined


def _refuse_too_long(key: str, engine: Engine, config: RunConfig, shots: int, longest: int) -> None:
    model: Any = engine.module
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and longest > most:
        reason = f"the examples and the longest row have {longest} tokens, and {config.model.path} reads {most}"
        raise UserError(Problem(key, reason, "fewer examples, or a smaller data.max_length", str(shots)))


class _Labels:
    """Classification by a language model: the label with the highest likelihood as the answer to a question."""

    def __init__(self, key: str, config: RunConfig, task: ClassificationConfig, data: PreparedData, tokenizer: Any):
        if task.regression:
            reason = "the most likely label is a name, and the rows have numbers"
            raise UserError(Problem("task.regression", reason, "task.regression=false", "true"))
        if task.multi_label:
            reason = "the most likely label is one label, and a row may have several"
            raise UserError(Problem("task.multi_label", reason, "task.multi_label=false", "true"))
        self._key, self._config, self._data, self._tokenizer = key, config, data, tokenizer
        names = [*data.labels[:-2], " or ".join(data.labels[-2:])]
        question = Seq2SeqConfig(prompt=LABEL_PROMPT.format(labels=", ".join(names)), separator=" ")
        self._encode = ReplyEncoder(tokenizer, question, config.data.max_length + 256)

    def evaluate(
        self,
        engine: Engine,
        head: Head,
        world: World,
        split: Split,
        shots: int,
        progress: Callable[[int, int], None] | None,
    ) -> Evaluation:
        classes = np.array(self._data.train.table["label"])
        chosen = draw(self._data.train, shots, self._config.trainer.seed, classes)
        context = _joined(
            [self._answer(self._data.train, i, int(classes[i])).input_ids for i in chosen], self._tokenizer
        )
        _refuse_too_long(self._key, engine, self._config, shots, len(context) + int(split.lengths.max()) + 64)
        split = limited(split, self._config.evaluate.max_rows, CausalLmConfig())
        numbers = [MicroBatch(index, ((index,),)) for index in range(len(split.lengths))]
        mine = share(numbers, world.rank, world.size)
        found: list[tuple[int, int, list[float]]] = []
        engine.train(False)
        for place, row in enumerate(mine):
            (index,) = row.samples
            losses = [self._loss(engine, head, split, index, label, context) for label in range(len(self._data.labels))]
            if not row.filler:
                true = int(split.sample(index)["label"])
                # Probabilities over the labels alone, so that the loss is that of a classifier.
                found.append((index, true, torch.softmax(-torch.tensor(losses, dtype=torch.float64), dim=0).tolist()))
            if progress:
                progress(place + 1, len(mine))
        engine.train(True)
        everyone = sorted(row for part in world.gather(found) for row in part)
        true_labels, probabilities = [row[1] for row in everyone], np.array([row[2] for row in everyone])
        predicted = probabilities.argmax(axis=1).tolist()
        metrics, confusion = classification_metrics(predicted, true_labels, probabilities)
        surprise = -np.log(np.maximum(probabilities[np.arange(len(true_labels)), true_labels], 1e-300))
        pairs = tuple(zip(true_labels, predicted, strict=True))
        return Evaluation({"loss": float(surprise.mean())} | metrics, {"confusion": confusion}, predictions=pairs)

    def _answer(self, split: Split, index: int, label: int) -> Any:
        text = self._tokenizer.decode(split.sample(index)["input_ids"], skip_special_tokens=True)
        (sample,) = self._encode([{"source": text, "target": self._data.labels[label]}], [index])
        return sample

    def _loss(self, engine: Engine, head: Head, split: Split, index: int, label: int, context: list[int]) -> float:
        """Negative log-likelihood of the label and of the end behind it."""
        sample = self._answer(split, index, label)
        ids = _joined([context, sample.input_ids], self._tokenizer) if context else sample.input_ids.tolist()
        labels = np.full(len(ids), -100)
        labels[len(ids) - len(sample.labels) :] = sample.labels[-len(ids) :]
        batch = {"input_ids": torch.tensor([ids]), "labels": torch.tensor(labels[None])}
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        on_device = {name: tensor.to(engine.device) for name, tensor in batch.items()}
        return float(engine.evaluate(head, on_device).loss_sum)
