"""The output of rank 0: on a terminal, a progress line that is redrawn in place; elsewhere, plain lines.

A transient line ends with a carriage return, never with a line feed. The process that started the ranks forwards such
lines to a terminal only and keeps them out of the log files.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TextIO

PLAIN_INTERVAL_SECONDS = 10.0
TERMINAL_INTERVAL_SECONDS = 0.1
BAR_CELLS = 20
MOST_COLUMNS = 119
"""Of a line on a terminal, however wide it is."""
COUNTS = ("rows", "targets", "tokens")
"""Metrics of an evaluation that are integers."""
SECONDS = "seconds"
PART_OF_REWARD = re.compile(r"rewards/(.+)/mean")
SHOWN_METRICS = 3
"""Of an evaluation on the console; `metrics.jsonl` has all of them."""
FEW_ROWS = 20
"""With fewer held-out rows a metric says little: with 20, one more right answer is 5 points."""

Metrics = Mapping[str, float | int | str]


class Console:
    """Progress, evaluations and messages on `stream` (stdout).

    The environment variable DSTUNE_CONSOLE decides: `tty:WIDTH` draws a progress line of at most WIDTH - 1 columns;
    anything else prints a plain line for the first and the last step and one every ten seconds.
    """

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic):
        self._stream = stream or sys.stdout
        self._clock = clock
        kind, _, width = os.environ.get("DSTUNE_CONSOLE", "plain").partition(":")
        self._columns = (int(width) if width.isdigit() else 80) - 1 if kind == "tty" else 0
        self._drawn = False
        self._printed_at = -float("inf")
        self._first: tuple[float, int] | None = None
        self._activity = ""
        # Trackers warn, and rows are counted, in other threads.
        self._lock = threading.RLock()

    def activity(self, text: str, done: int = 0, total: int = 0) -> None:
        """Show an activity before the first step. done, total: its progress, if it can be counted; shown as often as steps are."""
        with self._lock:
            now = self._clock()
            interval = TERMINAL_INTERVAL_SECONDS if self._columns else PLAIN_INTERVAL_SECONDS
            if text == self._activity and now - self._printed_at < interval and not 0 < total <= done:
                return
            self._activity, self._printed_at = text, now
            count = f"{done:>{len(f'{total:,}')},}/{total:,}" if total else f"{done:,}" if done else ""
            if self._columns:
                self._draw(f"{count} {_bar(done / total)} {text}" if total else f"{text} {count or '...'}")
            else:
                self._print(f"{text}  {count}".rstrip())

    def progress(self, step: int, total_steps: int, metrics: Metrics) -> None:
        """Show that `step` of `total_steps` is done."""
        with self._lock:
            self._progress(step, total_steps, metrics)

    def _progress(self, step: int, total_steps: int, metrics: Metrics) -> None:
        now = self._clock()
        if self._first is None:
            # The first step was finished right now: it began step_seconds ago.
            self._first = (now - float(metrics.get("step_seconds", 0.0)), step - 1)
            always = True
        else:
            always = step >= total_steps
        interval = TERMINAL_INTERVAL_SECONDS if self._columns else PLAIN_INTERVAL_SECONDS
        if not always and now - self._printed_at < interval:
            return
        self._printed_at = now
        began, steps_before = self._first
        seconds_left = (now - began) / max(step - steps_before, 1) * (total_steps - step)
        facts = "  ".join([*_facts(metrics), f"{_duration(seconds_left)} left"])
        count = f"{step:>{len(str(total_steps))}}/{total_steps}"
        if self._columns:
            bar = _bar(step / max(total_steps, 1))
            line = f"{count} {bar} {facts}"
            self._draw(line if len(line) <= self._columns else f"{count} {facts}")
        else:
            self._print(f"step {count}  {facts}")

    def evaluating(self, step: int, done: int, total: int) -> None:
        """Show the progress of an evaluation: on a terminal at once, elsewhere only if nothing was printed for ten seconds, so a
        short evaluation prints no progress."""
        with self._lock:
            now = self._clock()
            interval = TERMINAL_INTERVAL_SECONDS if self._columns else PLAIN_INTERVAL_SECONDS
            if now - self._printed_at >= interval and total:
                self.activity(f"evaluation after step {step}", done, total)

    def evaluation(self, step: int, metrics: Metrics, leading: Sequence[str] = (), rows: int | None = None) -> None:
        """Show one evaluation by at most three of its metrics: `leading` ones first, then the others in their order.

        metrics: by names eval/NAME. rows: number of measured rows, which is shown if it is small.
        """
        values = {name.removeprefix("eval/"): value for name, value in metrics.items()}
        names = [
            name for name in dict.fromkeys([*leading, *values]) if name in values and name not in (*COUNTS, SECONDS)
        ]
        facts = [_metric_text(name, values[name]) for name in names[:SHOWN_METRICS]]
        if rows is not None and rows < FEW_ROWS:
            facts.append(f"of {rows} row{'s' * (rows != 1)} only")
        if SECONDS in values:
            facts.append(_metric_text(SECONDS, values[SECONDS]))
        self.message(f"step {step}  evaluation  {'  '.join(facts)}")

    def message(self, text: str) -> None:
        """Print `text` on separate lines that stay; on a terminal they break between words."""
        with self._lock:
            self.close()
            for line in text.split("\n") if self._columns else ():
                width = min(self._columns, MOST_COLUMNS)
                self._print("\n".join(textwrap.wrap(line, width, subsequent_indent="    ", break_on_hyphens=False)))
            if not self._columns:
                self._print(text)

    def close(self) -> None:
        """Finish the current line, so that no half-overwritten one remains."""
        with self._lock:
            if self._drawn:
                self._draw("")
                self._drawn = False

    def _draw(self, line: str) -> None:
        # Padded to the full width so that nothing of a longer line before it stays visible.
        self._stream.write(f"{line[: self._columns]:<{self._columns}}\r")
        self._stream.flush()
        self._drawn = True

    def _print(self, text: str) -> None:
        self._stream.write(f"{text}\n")
        self._stream.flush()


def _facts(metrics: Metrics) -> list[str]:
    formats: dict[str, Callable[[float], str]] = {
        "loss": lambda value: f"loss {value:.4f}",
        "lr": lambda value: f"lr {value:.2e}",
        "tokens_per_second": lambda value: f"{value:,.0f} tokens/s",
        "peak_memory_gib": lambda value: f"{value:.2f} GiB",
    }
    facts = [format_metric(float(metrics[name])) for name, format_metric in formats.items() if name in metrics]
    if "reward" in metrics:  # says what the loss of a policy does not
        facts.insert(0, _reward(metrics))
    if "skipped" in metrics:
        facts.insert(0, f"skipped ({metrics['skipped']})")
    return facts


def _reward(metrics: Metrics) -> str:
    """Return the mean reward of a step; if it is the sum of several rewards, also the mean of each."""
    means = {match[1]: float(metrics[name]) for name in metrics if (match := PART_OF_REWARD.fullmatch(name))}
    parts = ", ".join(f"{name} {value:.3g}" for name, value in means.items())
    return f"reward {float(metrics['reward']):.3f}" + (f" ({parts})" if len(means) > 1 else "")


def _bar(share: float) -> str:
    filled = round(BAR_CELLS * min(max(share, 0.0), 1.0))
    return "[" + "#" * filled + "-" * (BAR_CELLS - filled) + "]"


def _metric_text(name: str, value: float | str) -> str:
    if isinstance(value, str):
        return f"{name} {value}"
    if name == "seconds":
        return f"{value:.1f} s"
    return f"{name} {value:,.0f}" if name in COUNTS else f"{name} {value:.4f}"


def _duration(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


class Activities(logging.Handler):
    """Shows what the packages below report through `logging`: `log.info("reading %s", file)`, and with
    `extra={"done": n, "total": m}` how far it is."""

    def __init__(self, console: Console):
        super().__init__(logging.INFO)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.levelno >= logging.WARNING:
            self._console.message(f"warning: {text}")
        else:
            self._console.activity(text, getattr(record, "done", 0), getattr(record, "total", 0))


@contextmanager
def console_activities(console: Console) -> Iterator[None]:
    """Let `console` show what dstune's own modules report, within the block."""
    logger = logging.getLogger("dstune")
    settings_before = logger.handlers, logger.level, logger.propagate
    show_activities(console)
    try:
        yield
    finally:
        console.close()
        logger.handlers, logger.level, logger.propagate = settings_before


def show_activities(console: Console) -> None:
    """Let `console` show what dstune's own modules report from now on in this process."""
    logger = logging.getLogger("dstune")
    logger.handlers = [Activities(console)]
    logger.setLevel(logging.INFO)
    logger.propagate = False
