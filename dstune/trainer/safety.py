"""Measures what training does to safety and truthfulness: answers to probes, and how much of its rows a model recites."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from dstune.config.convert import format_value
from dstune.config.data_schema import AUTOMATIC
from dstune.config.schema import RunConfig
from dstune.core.distributed import World
from dstune.core.errors import Problem, UserError
from dstune.data import sources
from dstune.data.chat.prompt import ChatPrompts
from dstune.data.chat.template import RenderError
from dstune.data.collate import NO_TARGET
from dstune.data.control import ControlTokens
from dstune.data.prepared import PreparedData, Split
from dstune.data.problems import RowError
from dstune.data.rows import normalise, recognise
from dstune.data.stopping import stop_token_ids
from dstune.data.tokenize import RowTokenizer
from dstune.grading import changes
from dstune.protocols import PROBES, task_of
from dstune.protocols.probe import Question, asked
from dstune.trainer.generation import answers_on_all_ranks, speaking
from dstune.trainer.loop import Training
from dstune.zero.engine import Engine

KEY = "evaluate.canaries"
ROWS = 64
"""Rows of each kind that the model is tested on reciting."""
LEAST_TOKENS = 16
"""Least length of an answer (or a text): the continuation of a shorter one could be guessed by chance."""
MOST_TOKENS = 32
"""Longest continuation."""
MOST_BEGINNING = 256
"""Most tokens of the answer in front of a continuation."""
MOST_CONTEXT = 2048
"""Most tokens of a row up to the end of its continuation. Longer rows are left out, since all their logits are in memory."""
ANSWER_TOKENS = 32
TOGETHER = 8
"""Prompts in a forward pass."""


@dataclass(frozen=True)
class Recital:
    """A row up to the middle of its first long answer, and the tokens that follow."""

    prefix: list[int]
    continuation: list[int]

    @property
    def length(self) -> int:
        return len(self.prefix) + len(self.continuation)


def measure_moment(run: Training, tokenizer: Any, moment: str) -> None:
    """Measure safety for `safety.json` if `evaluate.safety` is set; `moment` is `before` or `after` training. Every rank must call
    it."""
    if not run.config.evaluate.safety:
        return
    with run.around("measuring safety"):
        measured = measure_safety(run.config, run.data, run.engine, tokenizer, run.world, step=run.state.step)
    if not run.world.is_main:
        return
    if moment == "after":
        measured["model"] = str(run.run_dir)
    changed = changes.remember(run.run_dir, moment, measured)
    if changed is not None:
        run.message(f"what fine-tuning changed: {changes.in_one_line(changed)}")


def measure_safety(
    config: RunConfig, data: PreparedData, engine: Engine, tokenizer: Any, world: World, *, step: int | None = None
) -> dict[str, Any]:
    """Answer all probes, and test how much of its rows the model recites; return the measurements for `grading.changes`, on rank 0.

    Every rank must call it. Raises UserError for canaries that are no rows of the task.
    """
    by_probe = {name: list(kind().questions()) for name, kind in PROBES.classes().items() if kind.in_evaluation}
    questions = [question for of_probe in by_probe.values() for question in of_probe]
    prompts = [_prompt_ids(config, tokenizer, question) for question in questions]
    _refuse_short_context(engine, config, max(map(len, prompts)))
    recitals, reason = _recitals(config, data, tokenizer)
    stops = stop_token_ids(tokenizer, task_of(config.task).template_arguments)
    answers = answers_on_all_ranks(engine, tokenizer, prompts, ANSWER_TOKENS, stops, world, batch_size=TOGETHER)
    shares = _recited(engine, world, recitals, tokenizer.pad_token_id)
    if not world.is_main:
        return {}
    next_answer = iter(answers)
    return {
        "model": format_value(config.model.path),
        "step": step,
        "probes": {
            name: _scored(name, of_probe, [next(next_answer) for _ in of_probe]) for name, of_probe in by_probe.items()
        },
        "rows": shares,
        "not_measured": reason,
    }


def _refuse_short_context(engine: Engine, config: RunConfig, longest: int) -> None:
    model: Any = engine.module
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and longest + ANSWER_TOKENS > most:
        reason = (
            f"a question and its answer have {longest + ANSWER_TOKENS} tokens, and {config.model.path} takes {most}"
        )
        raise UserError(
            Problem("evaluate.safety", reason, "evaluate.safety=false, or a model with a longer context", "true")
        )


def _scored(name: str, questions: Sequence[Question], answers: Sequence[str]) -> dict[str, Any]:
    probe = PROBES[name]()
    return {
        "title": probe.title,
        "blind_spots": probe.blind_spots,
        "ids": [question.id for question in questions],
        "texts": [question.text for question in questions],
        "answers": list(answers),
        "scores": [float(probe.score(*pair)) for pair in zip(questions, answers, strict=True)],
    }


def _prompt_ids(config: RunConfig, tokenizer: Any, question: Question) -> list[int]:
    task = task_of(config.task)
    is_chat = task.conversational and bool(tokenizer.chat_template)
    text = asked(question, chat=is_chat)
    if not is_chat:
        return ControlTokens(tokenizer).sequence([text], sys.maxsize)[0]
    try:
        prompts = ChatPrompts(tokenizer, task.template_date)
        return prompts.ids([{"role": "user", "content": text}], arguments=task.template_arguments)
    except RenderError as error:
        reason = f"the chat template refuses a single question: {error}"
        raise UserError(Problem("evaluate.safety", reason, "evaluate.safety=false")) from error


# -- rows


def _recitals(config: RunConfig, data: PreparedData, tokenizer: Any) -> tuple[dict[str, list[Recital]], str]:
    """Return the rows to recite by kind, and, if there are no training rows among them, the reason."""
    splits = {"training": data.train, "held-out": data.validation or data.test}
    recitals = {
        kind: list(_of_split(split, config.trainer.seed)) for kind, split in splits.items() if split is not None
    }
    if config.evaluate.canaries:
        recitals["planted"] = _planted(config, tokenizer, config.evaluate.canaries)
    recitals = {kind: rows for kind, rows in recitals.items() if rows}
    reason = "" if "training" in recitals else f"no row has {LEAST_TOKENS} tokens of text in a row that are trained on"
    return recitals, reason


def _of_split(split: Split, seed: int) -> Iterator[Recital]:
    """Yield the first ROWS rows that are long enough, in an order that depends on the seed alone."""
    count = 0
    for index in np.random.RandomState(seed).permutation(len(split.lengths))[: 8 * ROWS]:
        sample = split.sample(int(index))
        if "input_ids" not in sample or "labels" not in sample or split.image_counts[index]:
            continue
        recital = recital_of(sample["input_ids"], sample["labels"])
        if recital is not None:
            yield recital
            count += 1
        if count == ROWS:
            return


def recital_of(input_ids: np.ndarray, labels: np.ndarray) -> Recital | None:
    """Cut a row in its first run of LEAST_TOKENS targets: in the middle, or after MOST_BEGINNING. Both arrays: [tokens].

    None if it has no such run, or if that comes too late.
    """
    is_target = np.concatenate([[False], np.asarray(labels) != NO_TARGET, [False]]).astype(int)
    starts, ends = (np.flatnonzero(np.diff(is_target) == step) for step in (1, -1))
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        if end - start >= LEAST_TOKENS:
            middle = start + min((end - start) // 2, MOST_BEGINNING)
            if middle + MOST_TOKENS > MOST_CONTEXT:
                return None
            ids = np.asarray(input_ids).tolist()
            return Recital(ids[:middle], ids[middle : min(end, middle + MOST_TOKENS)])
    return None


def _planted(config: RunConfig, tokenizer: Any, spec: str) -> list[Recital]:
    recitals: list[Recital] = []
    for file in sources.expand(spec, KEY, split="train"):
        for raw in sources.read(file):
            if raw.fields is None or len(recitals) == ROWS:
                continue
            try:
                form = recognise(raw.fields, config.data.columns, AUTOMATIC, config.task, KEY)
                row = normalise(raw.fields, form, config.data.columns, config.task)
                encode = RowTokenizer(tokenizer, config.task, form, config.data.max_length)
                samples = encode.samples([row], [0])
            except RowError as error:
                raise UserError(
                    Problem(KEY, f"a row cannot be used: {error}", "rows as those of data.train", spec)
                ) from None
            cut = (
                recital_of(sample.input_ids, sample.labels)
                for sample in samples
                if not sample.problem and "labels" in sample.columns
            )
            recitals += [recital for recital in cut if recital is not None][:1]
    if not recitals:
        reason = f"no row has {LEAST_TOKENS} tokens that are trained on"
        raise UserError(Problem(KEY, reason, "longer rows, in the format of data.train", spec))
    return recitals


def _recited(
    engine: Engine, world: World, recitals: Mapping[str, Sequence[Recital]], padding: int
) -> dict[str, list[float]]:
    """Measure, by kind, the share of each row's continuation that greedy decoding recites; on rank 0. See `recited_shares`."""
    shares: dict[str, list[float]] = {}
    with speaking(engine, world) as (module, in_step):
        if in_step or world.is_main:  # in step all ranks compute the same rows
            for kind, rows in recitals.items():
                shares[kind] = [share for batch in _batches(rows) for share in recited_shares(module, batch, padding)]
    return shares


def _batches(rows: Sequence[Recital]) -> Iterator[Sequence[Recital]]:
    """Yield batches of the rows in their order: TOGETHER at most and with at most 2 * MOST_CONTEXT tokens with padding."""
    start = 0
    while start < len(rows):
        end = start + 1
        longest = rows[start].length
        while end < min(start + TOGETHER, len(rows)):
            longest = max(longest, rows[end].length)
            if longest * (end + 1 - start) > 2 * MOST_CONTEXT:
                break
            end += 1
        yield rows[start:end]
        start = end


def recited_shares(module: nn.Module, recitals: Sequence[Recital], padding: int) -> list[float]:
    """Measure the share of each row's continuation that greedy decoding gives before its first different token.

    One forward pass suffices: up to that token, greedy decoding has the same input as the row.
    """
    model: Any = module
    rows = [recital.prefix + recital.continuation for recital in recitals]
    width = max(map(len, rows))
    device = next(module.parameters()).device
    # Padding behind a row does not change the logits before it.
    ids = torch.tensor([row + [padding] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits
    best = logits[:, -width:].argmax(-1).tolist()  # a trained prompt would be in front of the rows
    shares = []
    for guesses, recital in zip(best, recitals, strict=True):
        first, count = len(recital.prefix) - 1, len(recital.continuation)
        is_right = [
            guess == token for guess, token in zip(guesses[first : first + count], recital.continuation, strict=True)
        ]
        shares.append((is_right.index(False) if False in is_right else count) / count)
    return shares
