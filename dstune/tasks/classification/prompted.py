"""Classify with a language model that is prompted instead of trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from dstune.config.schema import RunConfig
from dstune.core.distributed import World
from dstune.core.errors import Problem, UserError
from dstune.data.prepared import PreparedData, Split
from dstune.data.sampler import MicroBatch, share
from dstune.models.heads import Head
from dstune.models.load import load_config
from dstune.tasks.causal_lm.config import CausalLmConfig
from dstune.tasks.classification.config import ClassificationConfig
from dstune.tasks.classification.metrics import classification_metrics
from dstune.tasks.seq2seq.config import Seq2SeqConfig
from dstune.tasks.seq2seq.encode import ReplyEncoder
from dstune.trainer.baseline import draw, joined, refuse_too_long
from dstune.trainer.evaluate import limited
from dstune.trainer.measure import Evaluation
from dstune.zero.engine import Engine

WRITING = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""Endings of the names of architectures that write text."""

LABEL_PROMPT = "Classify the text as {labels}.\n\nText: {{source}}\n\nClass:"


def refuse_encoder(run: RunConfig) -> None:
    """Check that the run's model can write text. Raises UserError if it is an encoder."""
    architectures = load_config(run.model).architectures or []
    if architectures and not any(name.endswith(WRITING) for name in architectures):
        reason = f"{run.model.path} is a {architectures[0]}, an encoder, and answers no prompt"
        fix = "ask a language model instead: --prompted MODEL, for example --prompted sample://smollm2"
        raise UserError(Problem("--shots", reason, fix))


class PromptedLabels:
    """Classifies with a language model: predicts the label with the highest likelihood as the answer to a question."""

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
        context = joined(
            [self._answer(self._data.train, i, int(classes[i])).input_ids for i in chosen], self._tokenizer
        )
        refuse_too_long(self._key, engine, self._config, shots, len(context) + int(split.lengths.max()) + 64)
        split = limited(split, self._config.evaluate.max_rows, CausalLmConfig())
        numbers = [MicroBatch(index, ((index,),)) for index in range(len(split.lengths))]
        local_rows = share(numbers, world.rank, world.size)
        local_answers: list[tuple[int, int, list[float]]] = []
        engine.train(False)
        for place, row in enumerate(local_rows):
            (index,) = row.samples
            losses = [self._loss(engine, head, split, index, label, context) for label in range(len(self._data.labels))]
            if not row.filler:
                true = int(split.sample(index)["label"])
                # Probabilities are normalised over the labels only, so the loss is that of a classifier.
                local_answers.append(
                    (index, true, torch.softmax(-torch.tensor(losses, dtype=torch.float64), dim=0).tolist())
                )
            if progress:
                progress(place + 1, len(local_rows))
        engine.train(True)
        everyone = sorted(row for part in world.gather(local_answers) for row in part)
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
        """Return the negative log-likelihood of the label and of the end of the answer."""
        sample = self._answer(split, index, label)
        ids = joined([context, sample.input_ids], self._tokenizer) if context else sample.input_ids.tolist()
        labels = np.full(len(ids), -100)
        labels[len(ids) - len(sample.labels) :] = sample.labels[-len(ids) :]
        batch = {"input_ids": torch.tensor([ids]), "labels": torch.tensor(labels[None])}
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        on_device = {name: tensor.to(engine.device) for name, tensor in batch.items()}
        return float(engine.evaluate(head, on_device).loss_sum)
