"""Generates targets for held-out sources on all ranks, and computes their metrics."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from dstune.config.schema import RunConfig
from dstune.core.distributed import World
from dstune.data.collate import NO_TARGET
from dstune.data.prepared import Split
from dstune.data.sampler import padded_batches, share
from dstune.data.special_tokens import decoder_prompt, first_special_tokens
from dstune.data.stopping import stop_token_ids
from dstune.generation.answers import generate_answers
from dstune.tasks.seq2seq.config import Seq2SeqConfig
from dstune.trainer.evaluate import Evaluator, limited
from dstune.trainer.generation import Generated, speaking
from dstune.trainer.measure import Evaluation
from dstune.zero.engine import Engine

log = logging.getLogger(__name__)

LONGER = 1.25
"""Limit of a generated target's length, as a multiple of the longest target of the rows."""


def generate_and_measure(
    evaluator: Evaluator,
    split: Split,
    measured: Evaluation,
    context: Sequence[int],
    *,
    one_line: bool,
    progress: Callable[[int, int], None] | None,
) -> Evaluation:
    """Return `measured` with targets that the model generates for `evaluate.generate_rows` rows. See `Task.extra_evaluation`."""
    config, world = evaluator.config, evaluator.world
    rows = limited(split, config.evaluate.generate_rows, config.task)
    generated = generate_targets(
        config, rows, evaluator.engine, evaluator.tokenizer, world, context, one_line=one_line, progress=progress
    )
    scores = world.broadcast(generation_metrics(generated) if world.is_main else {})
    return replace(measured, metrics=measured.metrics | scores, generated=tuple(generated))


def generate_targets(
    config: RunConfig,
    split: Split,
    engine: Engine,
    tokenizer: Any,
    world: World,
    context: Sequence[int] = (),
    *,
    one_line: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[Generated]:
    """Generate a target greedily for every row of `split`; all ranks get all of them, in the order of the rows.

    context: tokens in front of every prompt (worked examples). one_line: end an answer after its first line, unless a target
    has several lines. progress: called with the numbers of this rank's finished and total batches. Batches have
    rows of similar length, and ranks may get different numbers of rows.
    """
    assert isinstance(config.task, Seq2SeqConfig)
    batches = padded_batches(split.lengths, config)
    first = first_special_tokens(tokenizer) if context else []
    one_line = one_line and not any(
        "\n" in split.source_and_target(index)["target"].strip() for index in range(len(split.lengths))
    )
    longest = math.ceil(LONGER * int(split.weights.max()))
    local_answers: list[tuple[int, str]] = []
    with speaking(engine, world) as (module, in_step):
        local_batches = share(batches, world.rank, world.size)
        for number, batch in enumerate(local_batches):
            if progress:
                progress(number, len(local_batches))
            if batch.filler and not in_step:
                continue
            prompts = [decoder_prompt(split.sample(index), NO_TARGET) for index in batch.samples]
            prompts = [[*context, *ids[len(first) if ids[: len(first)] == first else 0 :]] for ids in prompts]
            answers = generate_answers(
                module,
                tokenizer,
                prompts,
                config.task.max_new_tokens or longest,
                stop_token_ids(tokenizer, config.task.chat_template_kwargs),
                batch_size=len(prompts),
                in_step=in_step,
                one_line=one_line,
            )
            if not batch.filler:
                local_answers += zip(batch.samples, answers, strict=True)
    all_answers = sorted(row for part in world.gather(local_answers) for row in part)
    return [Generated(**split.source_and_target(index), answer=answer) for index, answer in all_answers]


def generation_metrics(rows: Sequence[Generated]) -> dict[str, float]:
    """Compute BLEU, chrF and TER of sacrebleu (percent), and ROUGE F1 of rouge-score meaned over the rows (0 to 1).

    All with the libraries' defaults: BLEU (Papineni et al. 2002) with tokenizer 13a, chrF (Popović 2015) of characters up to
    6, TER (Snover et al. 2006), ROUGE (Lin 2004), whose tokens are Latin letters and digits without accents. A package that is
    not installed costs its metrics, with a warning.
    """
    return {**_sacrebleu(rows), **_rouge(rows), "generated": float(len(rows))}


def _sacrebleu(rows: Sequence[Generated]) -> dict[str, float]:
    try:
        from sacrebleu import corpus_bleu, corpus_chrf, corpus_ter
    except ImportError:
        _warn_without("sacrebleu", "BLEU, chrF and TER")
        return {}
    answers, targets = [row.answer for row in rows], [[row.target for row in rows]]
    scores = {"bleu": corpus_bleu, "chrf": corpus_chrf, "ter": corpus_ter}
    return {name: score(answers, targets).score for name, score in scores.items()}


def _rouge(rows: Sequence[Generated]) -> dict[str, float]:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        _warn_without("rouge-score", "ROUGE")
        return {}
    kinds = ["rouge1", "rouge2", "rougeL"]
    scored = [RougeScorer(kinds).score(row.target, row.answer) for row in rows]
    return {kind: sum(score[kind].fmeasure for score in scored) / len(scored) for kind in kinds}


@cache
def _warn_without(package: str, metrics: str) -> None:
    """Warn once in a process."""
    log.warning(
        "%s of generated targets are not computed: %s is missing (pip install '.[generation]' in a clone of dstune)",
        metrics,
        package,
    )
