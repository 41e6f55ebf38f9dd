"""Several tasks in one run: what each source's task is, and what is refused with its reason."""

from __future__ import annotations

import pytest

from dstune.config.compose import compose
from dstune.config.multi_task import is_multi_task, tasks_of
from dstune.config.validate import find_problems
from dstune.metrics import improves
from dstune.tasks.causal_lm.config import CausalLmConfig
from dstune.tasks.chat.config import ChatConfig
from dstune.tasks.seq2seq.config import Seq2SeqConfig
from dstune.tracking.trials import less_is_better

TWO = ["data.mixture.a.path=a.jsonl", "data.mixture.b.path=b.jsonl"]


def problems(*overrides: str) -> dict[str, str]:
    return {problem.where: str(problem) for problem in find_problems(compose([*TWO, *overrides]).config)}


def test_a_mixture_is_of_one_task_unless_a_source_says_otherwise() -> None:
    assert not is_multi_task(compose(TWO).config)
    assert tasks_of(compose(TWO).config) == {}
    given = ["task=chat", "task.template_date=2026-01-01", "data.mixture.b.task=seq2seq"]
    config = compose([*TWO, *given, "data.mixture.b.prompt='Q: {source}'"]).config
    date = "2026-01-01"
    assert tasks_of(config) == {
        "a": ChatConfig(template_date=date),
        "b": Seq2SeqConfig(template_date=date, prompt="Q: {source}"),
    }
    plain = compose([*TWO, "data.mixture.a.task=causal_lm"]).config
    assert tasks_of(plain)["a"] == CausalLmConfig()


def test_every_task_renders_with_the_arguments_of_the_run() -> None:
    given = ["task.chat_template_kwargs={tone: calm}", "data.mixture.a.task=seq2seq", "data.mixture.b.task=causal_lm"]
    found = tasks_of(compose([*TWO, "task=chat", *given]).config)
    assert found["a"] == Seq2SeqConfig(template_date=found["a"].template_date, chat_template_kwargs={"tone": "calm"})
    assert found["b"] == CausalLmConfig()


def test_a_prompt_alone_makes_several_tasks_of_one_kind() -> None:
    config = compose([*TWO, "task=seq2seq", "data.packing=false", "data.mixture.b.prompt='Q: {source}'"]).config
    assert [task.prompt for task in tasks_of(config).values()] == ["{source}", "Q: {source}"]  # type: ignore[union-attr]
    assert not find_problems(config)


@pytest.mark.parametrize("metric", ["b/chrf", "b/loss", "a/bits_per_byte", "loss"])
def test_a_metric_of_a_task_may_decide(metric: str) -> None:
    given = ["task=chat", "data.mixture.b.task=seq2seq", f"trainer.early_stopping.metric={metric}"]
    assert not problems(*given)
    assert "trainer.early_stopping.metric" in problems(*given[:2], "trainer.early_stopping.metric=a/chrf")


def test_only_what_is_measured_may_decide_and_less_of_a_loss_is_better() -> None:
    given = ["task=chat", "data.mixture.b.task=seq2seq"]
    key = "trainer.early_stopping.metric"
    for metric in ("bits_per_byte", "chrf", "c/loss"):
        assert key in problems(*given, f"{key}={metric}")
    assert "generated targets" in problems(*given, f"{key}=b/chrf", "evaluate.generate_rows=0")[key]
    assert improves("b/loss", 1.0, 2.0)
    assert improves("b/chrf", 2.0, 1.0)
    assert less_is_better("b/ter")
    assert not less_is_better("b/chrf")


@pytest.mark.parametrize(
    ("overrides", "where", "reason"),
    [
        (["task=causal_lm", "data.mixture.b.task=chat"], "task", "language model that writes every answer"),
        (["task=classification", "data.packing=false", "data.mixture.b.task=chat"], "task", "a label is a target too"),
        (["data.mixture.b.prompt='Q: {source}'"], "data.mixture.b.prompt", "data.mixture.b.task=seq2seq"),
        (
            ["data.mixture.b.task=seq2seq", "data.mixture.b.prompt=Translate"],
            "data.mixture.b.prompt",
            "must contain {source} exactly once",
        ),
        (["data.mixture.b.task=seq2seq", "data.validation=v.jsonl"], "data.validation", "which of them the rows"),
        (["data.mixture.b.task=seq2seq", "evaluate.slices=[lang]"], "evaluate.slices", "each with its own metrics"),
        (["data.mixture.b.task=seq2seq", "evaluate.baseline_shots=[0]"], "evaluate.baseline_shots", "several"),
    ],
)
def test_what_is_refused(overrides: list[str], where: str, reason: str) -> None:
    task = [] if any(text.startswith("task=") for text in overrides) else ["task=chat"]
    assert reason in problems(*task, *overrides)[where]
