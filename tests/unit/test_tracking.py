"""What a run leaves behind for its reader: files that survive a crash and a resume, and lines on the console."""

import io
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from support.configs import run_config

from dstune.tracking import log as tracking
from dstune.tracking.console import Console, show_activities
from dstune.tracking.jsonl import JsonLines


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# -- files ------------------------------------------------------------------------------------------------------------


def test_rows_are_in_the_file_before_the_run_ends(tmp_path):
    tracker = tracking.RunLog(run_config(), tmp_path, resumed_at_step=None)
    tracker.log(1, {"epoch": 0.5, "loss": np.float32(2.5), "lr": 1e-4, "tokens": np.int64(7)})
    assert rows(tmp_path / "metrics.jsonl") == [{"step": 1, "epoch": 0.5, "loss": 2.5, "lr": 1e-4, "tokens": 7}]
    tracker.finish("completed")
    tracker.finish("completed")


def test_a_resume_keeps_rows_up_to_its_checkpoint_only(tmp_path):
    for name in ("metrics.jsonl", "samples.jsonl"):
        # The last line was torn by the crash; the one before it lies after the checkpoint.
        (tmp_path / name).write_text('{"step": 0}\n{"step": 4}\n{"step": 5}\n{"step": 4, "los')
    tracker = tracking.RunLog(run_config(), tmp_path, resumed_at_step=4)
    tracker.log(5, {"loss": 1.0})
    tracker.samples(5, [{"prompt": "p", "reference": "r", "answer": "a", "tokens": 3}])
    tracker.finish("completed")
    assert rows(tmp_path / "metrics.jsonl") == [{"step": 0}, {"step": 4}, {"step": 5, "loss": 1.0}]
    assert rows(tmp_path / "samples.jsonl")[2:] == [{"step": 5, "prompt": "p", "reference": "r", "answer": "a"}]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "samples.jsonl"]


def test_what_a_killed_launch_wrote_behind_its_last_save_is_there_once(tmp_path):
    """Killed between its last rows and its result, a run comes to them again; one that goes back writes its steps again."""
    question = [{"prompt": "p", "reference": "r", "answer": "a"}, {"prompt": "q", "reference": "r", "answer": "a"}]
    for resumed in (None, 4):
        tracker = tracking.RunLog(run_config(), tmp_path, resumed_at_step=resumed)
        if resumed is None:
            tracker.log(4, {"loss": 1.0})
        tracker.log(4, {"guard/loss": 2.0})
        tracker.samples(4, question[: 1 if resumed is None else 2])
        if resumed:
            tracker.log(4, {"ood/loss": 3.0})
            assert [row.get("loss") for row in rows(tmp_path / "metrics.jsonl")] == [1.0, None, None]
            assert [row["prompt"] for row in rows(tmp_path / "samples.jsonl")] == ["p", "q"]
            tracker.rewind(3)
            tracker.log(4, {"loss": 1.5})
            assert rows(tmp_path / "metrics.jsonl") == [{"step": 4, "loss": 1.5}]
        tracker.finish("completed" if resumed else "failed")


def test_a_start_from_nothing_drops_what_an_attempt_without_checkpoint_wrote(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
    tracking.RunLog(run_config(), tmp_path, resumed_at_step=None).finish("completed")
    assert rows(tmp_path / "metrics.jsonl") == []


def test_a_block_of_zeros_is_not_a_row(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + b"\0" * 40 + b"\n" + b'{"step": 2}\n')
    JsonLines(path, keep_until=9).close()
    assert rows(path) == [{"step": 1}, {"step": 2}]


def test_a_value_that_is_not_finite_is_null(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl", keep_until=None)
    lines.append({"step": 1, "loss": float("nan"), "grad_norm": np.float32("inf")})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON")) == {
        "step": 1,
        "loss": None,
        "grad_norm": None,
    }


# -- console ----------------------------------------------------------------------------------------------------------

METRICS = {
    "loss": 2.34567,
    "lr": 1.5e-5,
    "grad_norm": 1.0,
    "tokens_per_second": 1234.5,
    "peak_memory_gib": 1.25,
    "step_seconds": 2.0,
}


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


def make_console(monkeypatch, clock, kind):
    monkeypatch.setenv("DSTUNE_CONSOLE", kind)
    stream = io.StringIO()
    return Console(stream, clock), stream


def test_plain_lines_come_first_last_and_every_ten_seconds(monkeypatch, clock):
    console, stream = make_console(monkeypatch, clock, "plain")
    for step in range(1, 21):
        console.progress(step, 20, METRICS)
        clock.now += 2.0
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/20", "6/20", "11/20", "16/20", "20/20"]
    # Steps take two seconds: 19 are left after the first.
    assert lines[0] == "step  1/20  loss 2.3457  lr 1.50e-05  1,234 tokens/s  1.25 GiB  0:38 left"
    assert lines[-1].endswith("0:00 left")
    assert "\r" not in stream.getvalue()


def test_terminal_lines_are_drawn_over_and_cleared(monkeypatch, clock):
    console, stream = make_console(monkeypatch, clock, "tty:120")
    console.progress(10, 40, METRICS)
    clock.now += 1
    console.progress(11, 40, METRICS)
    console.evaluation(11, {"eval/loss": 2.0, "eval/targets": 1751.0, "eval/seconds": 0.5})
    console.close()
    first, second, erased, rest = stream.getvalue().split("\r")
    assert first.startswith("10/40 [#####---------------] loss 2.3457")
    assert {len(first), len(second), len(erased)} == {119}
    assert not erased.strip(), "the evaluation would be written over a longer line"
    assert rest == "step 11  evaluation  loss 2.0000  0.5 s\n"


def test_an_evaluation_is_one_short_line(monkeypatch, clock):
    console, stream = make_console(monkeypatch, clock, "plain")
    names = ["loss", "accuracy", "f1_macro", "f1_micro", "mcc", "a_metric_of_a_plugin_with_a_long_name", "targets"]
    metrics = {f"eval/{name}": 0.5 for name in names} | {"eval/seconds": 1.25}
    console.evaluation(3, metrics, ("mcc", "loss"), 12)
    console.evaluation(4, metrics, (), 20)
    first, second = stream.getvalue().splitlines()
    assert first == "step 3  evaluation  mcc 0.5000  loss 0.5000  accuracy 0.5000  of 12 rows only  1.2 s"
    assert second == "step 4  evaluation  loss 0.5000  accuracy 0.5000  f1_macro 0.5000  1.2 s"


@pytest.mark.parametrize(("terminal", "widest"), [("tty:300", 119), ("tty:60", 59)])
def test_messages_break_between_words_on_a_terminal(monkeypatch, clock, terminal, widest):
    console, stream = make_console(monkeypatch, clock, terminal)
    text = "warning: " + "some words about key.name=value-of-it, " * 12
    console.message(text.strip())
    lines = stream.getvalue().splitlines()
    assert len(lines) > 1
    assert max(map(len, lines)) <= widest
    assert " ".join(line.strip() for line in lines) == text.strip()
    plain, piped = make_console(monkeypatch, clock, "plain")
    plain.message(text.strip())
    assert piped.getvalue() == f"{text.strip()}\n", "programs read whole lines"


@pytest.mark.parametrize("width", [20, 60, 80])
def test_a_terminal_line_never_wraps(monkeypatch, clock, width):
    console, stream = make_console(monkeypatch, clock, f"tty:{width}")
    console.progress(1, 1000, METRICS)
    console.close()
    assert {len(line) for line in stream.getvalue().split("\r") if line} == {width - 1}


def test_a_fast_run_draws_at_most_ten_times_a_second(monkeypatch, clock):
    console, stream = make_console(monkeypatch, clock, "tty:80")
    for step in range(1, 1001):
        clock.now += 0.001
        console.progress(step, 1000, METRICS)
    assert 5 <= stream.getvalue().count("\r") <= 13


def test_time_left_counts_what_happens_between_steps(monkeypatch, clock):
    console, stream = make_console(monkeypatch, clock, "plain")
    console.progress(1, 4, METRICS | {"step_seconds": 0.0})
    clock.now += 3600.0
    console.progress(2, 4, METRICS)
    assert stream.getvalue().splitlines()[-1].endswith("1:00:00 left")


def test_a_skipped_step_says_so(monkeypatch, clock):
    console, stream = make_console(monkeypatch, clock, "plain")
    console.progress(1, 4, METRICS | {"skipped": "nonfinite"})
    assert "skipped (nonfinite)" in stream.getvalue()


def test_evaluation_rows_are_shown_and_training_rows_are_not(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("DSTUNE_CONSOLE", "plain")
    tracker = tracking.RunLog(run_config(), tmp_path, resumed_at_step=None)
    tracker.log(3, METRICS)
    tracker.log(3, {"eval/loss": 1.5, "eval/perplexity": 4.4817})
    tracker.finish("completed")
    assert capsys.readouterr().out == "step 3  evaluation  loss 1.5000  perplexity 4.4817\n"


def test_what_goes_on_before_the_first_step_is_shown_with_its_counts(monkeypatch, clock):
    console, stream = make_console(monkeypatch, clock, "plain")
    show_activities(console)
    log = logging.getLogger("dstune.data.anything")
    try:
        log.info("reading rows of %s", "a.jsonl")
        for done in range(0, 1001, 100):
            log.info("tokenizing train rows", extra={"done": done, "total": 1000})
            clock.now += 3.0
        log.warning("waiting for another process")
    finally:
        logging.getLogger("dstune").handlers = []
        logging.getLogger("dstune").propagate = True
    assert stream.getvalue().splitlines() == [
        "reading rows of a.jsonl",
        "tokenizing train rows      0/1,000",
        "tokenizing train rows    400/1,000",
        "tokenizing train rows    800/1,000",
        "tokenizing train rows  1,000/1,000",
        "warning: waiting for another process",
    ]


def test_an_activity_on_a_terminal_is_drawn_over(monkeypatch, clock):
    console, stream = make_console(monkeypatch, clock, "tty:80")
    console.activity("tokenizing train rows", 500, 1000)
    console.message("done")
    first, erased, rest = stream.getvalue().split("\r")
    assert first.rstrip() == "  500/1,000 [##########----------] tokenizing train rows"
    assert not erased.strip()
    assert rest == "done\n"


@pytest.mark.parametrize(("kind", "lines"), [("plain", 2), ("tty:80", 4)])
def test_a_long_evaluation_shows_how_far_it_is(monkeypatch, clock, kind, lines):
    """In a log only when ten seconds went by without a line."""
    console, stream = make_console(monkeypatch, clock, kind)
    console.progress(3, 20, METRICS)
    for done in range(1, 4):
        clock.now += 6
        console.evaluating(3, done, 3)
    printed = stream.getvalue().replace("\r", "\n").splitlines()
    assert len(printed) == lines
    assert [line for line in printed if "evaluation after step 3" in line and "2/3" in line]


def test_a_step_shows_its_reward_and_the_parts_of_it():
    stream = io.StringIO()
    console = Console(stream)
    rewards = {"reward": 0.75, "rewards/number/mean": 0.5, "rewards/overlong/mean": -0.25, "rewards/number/std": 0.1}
    console.progress(1, 2, {"loss": 0.0, **rewards})
    console.progress(2, 2, {"loss": 0.0, "reward": 0.5, "rewards/number/mean": 0.5})
    first, second = stream.getvalue().splitlines()
    assert first.startswith("step 1/2  reward 0.750 (number 0.5, overlong -0.25)  loss 0.0000")
    assert second.startswith("step 2/2  reward 0.500  loss")
