"""A package that only scores is no reason not to train; one that decides the run is asked for before the start."""

from __future__ import annotations

import logging
import sys
from importlib.util import find_spec

import pytest

from dstune.config.compose import compose
from dstune.launch.first_rows import task_problems
from dstune.tasks import seq2seq
from dstune.tasks.seq2seq import metrics
from dstune.trainer.generation import Generated

ROWS = [Generated(source="a", target="the cat sat", answer="the cat sat")]


def without(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)
        monkeypatch.setitem(sys.modules, f"{module}.{module.removesuffix('_score')}_scorer", None)
    monkeypatch.setattr(seq2seq, "find_spec", lambda name: None if name in modules else find_spec(name))
    metrics._warn_without.cache_clear()


def problems(*words: str) -> list[tuple[str, str]]:
    config = compose(["task=seq2seq", "model=smollm2", "data.train=rows.jsonl", *words]).config
    return [(problem.where, problem.fix) for problem in task_problems(config)]


def test_what_is_installed_is_computed_and_the_rest_is_named_once(monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    without(monkeypatch, "rouge_score")
    assert problems() == []
    found = metrics.generation_metrics(ROWS)
    assert set(found) == {"bleu", "chrf", "ter", "generated"}
    without(monkeypatch, "rouge_score", "sacrebleu")
    for _ in range(2):
        assert metrics.generation_metrics(ROWS) == {"generated": 1.0}
    warned = [record.message for record in caplog.records]
    assert warned == [
        "ROUGE of generated targets are not computed: rouge-score is missing (pip install '.[generation]' in a clone of dstune)",
        (
            "BLEU, chrF and TER of generated targets are not computed: sacrebleu is missing"
            " (pip install '.[generation]' in a clone of dstune)"
        ),
        "ROUGE of generated targets are not computed: rouge-score is missing (pip install '.[generation]' in a clone of dstune)",
    ]


def test_a_metric_that_decides_the_run_needs_its_package(monkeypatch):
    without(monkeypatch, "sacrebleu")
    fix = "pip install '.[generation]' in a clone of dstune, or another metric"
    assert problems("trainer.early_stopping.metric=chrf") == [("trainer.early_stopping.metric", fix)]
    assert problems("sweep.objective=[bleu]") == [("sweep.objective", fix)]
    assert problems("trainer.early_stopping.metric=rougeL") == []
