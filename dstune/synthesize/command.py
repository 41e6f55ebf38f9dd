"""The verb `synthesize`."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dstune.core import files
from dstune.core.api_client import ApiClient, ServerUnreachable
from dstune.core.errors import EXIT_DONE, EXIT_PREEMPTED, DstuneError, Problem, UserError
from dstune.synthesize import card, options
from dstune.synthesize.grading import Graders
from dstune.synthesize.journal import Answer, Journal
from dstune.synthesize.pipeline import Settings, make_rows
from dstune.synthesize.requests import KINDS, Ask, Item, digest_of, make_requests


def main(argv: list[str]) -> int:
    """Run the verb and return the exit code. Raises DstuneError."""
    arguments = options.make_parser().parse_args(argv)
    options.check(arguments)
    kind = KINDS[arguments.kind]
    graders = Graders.of(arguments)
    rows = read_items(arguments.input, "--input")
    if unfit := [row for row in rows if not _fits(arguments.kind, row)]:
        reason = f"{len(unfit):,} of {len(rows):,} rows lack {kind.reads}; the first is {unfit[0].place}"
        raise UserError(Problem("--input", reason, "name the column so, or another kind", arguments.input))
    settings = Settings.of(arguments, read_texts(arguments.held_out))
    items = kind.items(rows, arguments.count, arguments.seed)
    requests = list(make_requests(kind, items, rows, arguments.samples, arguments.seed, arguments.system))
    journal = Journal(arguments.output, _identity(arguments, requests))
    ended: DstuneError | None = None
    try:
        stopped = ask_all(arguments, [ask for ask in requests if ask.key not in journal.answers], journal)
    except ServerUnreachable as error:
        ended, stopped = error, ""
    try:
        made = make_rows(kind, items, arguments.samples, journal.answers, settings, graders)
    finally:
        graders.close()
        journal.close()
    write_lines(arguments.output / "rows.jsonl", made.rows)
    write_lines(arguments.output / "left_out.jsonl", made.left_out)
    files.write(arguments.output / "card.md", card.write_card(arguments, made, journal, len(requests)))
    answered = sum(ask.key in journal.answers for ask in requests)
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in made.reasons.most_common())
    note = (
        f"{len(made.rows):,} rows in {arguments.output / 'rows.jsonl'}, from {answered:,} of {len(requests):,} answers"
    )
    print(note + (f"; left out: {reasons}" if reasons else ""))
    if ended is not None:
        raise ServerUnreachable(f"{ended} (the same command goes on with {len(requests) - answered:,} requests)")
    if stopped:
        print(f"dstune: {stopped}", file=sys.stderr)
        return EXIT_PREEMPTED
    return EXIT_DONE


def read_items(spec: str, key: str) -> list[Item]:
    """Return the rows of a file, folder, glob or sample. Raises UserError for invalid rows."""
    from dstune.data import sources
    from dstune.data.files import place

    items: list[Item] = []
    for file in sources.expand(spec, key):
        for row in sources.read(file):
            where = place(file, row.line)
            if row.fields is None:
                raise UserError(Problem(key, f"{where}: {row.error}", "repair the row, or leave it out", spec))
            items.append(Item(len(items), where, row.fields))
    if not items:
        raise UserError(Problem(key, "there are no rows", "give another file", spec))
    return items


def read_texts(specs: Sequence[str]) -> list[list[str]]:
    """Return the texts of each held-out row, and its prompt if that consists of several."""
    from dstune.synthesize.filters import texts_in
    from dstune.synthesize.requests import joined_texts, prompt_of

    items = [item for spec in specs for item in read_items(spec, "--held-out")]
    return [[*texts_in(item.fields), joined_texts(prompt_of(item) or [])] for item in items]


def _fits(kind: str, item: Item) -> bool:
    from dstune.synthesize.requests import prompt_of, text_of

    return bool(text_of(item) if kind in ("rewrites", "questions") else prompt_of(item))


def _identity(arguments: argparse.Namespace, requests: Sequence[Ask]) -> dict[str, Any]:
    """Return the settings that determine the answers. The address is not one of them: the same model may be served elsewhere
    later."""
    names = ("kind", "model", "temperature", "max_tokens", "seed", "samples", "system")
    digest = digest_of([[ask.key, ask.messages] for ask in requests])
    return {**{name: getattr(arguments, name) for name in names}, "requests": len(requests), "digest": digest}


def ask_all(arguments: argparse.Namespace, requests: Sequence[Ask], journal: Journal) -> str:
    """Ask the teacher for all of `requests`; why it stopped before the end, empty where it did not.

    Raises:
        ServerUnreachable: it gave no answer to one of them; the others that were under way are in the journal.
    """
    stop = threading.Event()
    teacher = ApiClient(options.address_of(arguments, "--teacher", arguments.teacher), stop.wait)
    remaining, reason = list(reversed(requests)), ""
    with _interruptible(stop), ThreadPoolExecutor(arguments.at_once) as pool:
        running: set[Future[Answer]] = set()
        try:
            while True:
                if stop.is_set():
                    reason = "stopped by a signal; the same command goes on"
                elif arguments.budget_tokens is not None and journal.tokens >= arguments.budget_tokens:
                    reason = f"--budget-tokens {arguments.budget_tokens:,} is used up; a larger one goes on"
                if not reason:
                    while remaining and len(running) < arguments.at_once:
                        running.add(pool.submit(answer_of, teacher, arguments, remaining.pop()))
                if not running:
                    return reason if remaining else ""
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    journal.add(future.result())
        except BaseException:
            teacher.close()
            stop.set()
            for future in wait(running).done:
                if future.exception() is None:
                    journal.add(future.result())
            raise


def answer_of(teacher: ApiClient, arguments: argparse.Namespace, ask: Ask) -> Answer:
    """Send the teacher one request and return its answer. Raises ServerUnreachable, UserError."""
    body = {
        "model": arguments.model,
        "messages": ask.messages,
        "temperature": arguments.temperature,
        "max_tokens": arguments.max_tokens,
        "seed": ask.seed,
    }
    answered = teacher.post("/chat/completions", body)
    try:
        choice = answered["choices"][0]
        text = choice["message"].get("content") or ""
        usage = answered.get("usage") or {}
        tokens = int(usage.get("total_tokens") or 0)
        finish, model = str(choice.get("finish_reason") or ""), str(answered.get("model") or arguments.model)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        reason = f"its answer is of another shape than that of /chat/completions ({type(error).__name__}: {error})"
        raise UserError(Problem("--teacher", reason, "an OpenAI-compatible address", arguments.teacher)) from None
    return Answer(ask.key, str(text), finish, model, str(answered.get("system_fingerprint") or ""), ask.seed, tokens)


@contextmanager
def _interruptible(stop: threading.Event) -> Iterator[None]:
    """Stop sending requests after a first SIGINT or SIGTERM; a second one ends the program."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler_by_signal = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask_no_more(number: int, frame: Any) -> None:
        stop.set()
        for number_, handler in handler_by_signal.items():
            signal.signal(number_, handler)

    for number in handler_by_signal:
        signal.signal(number, ask_no_more)
    try:
        yield
    finally:
        for number, handler in handler_by_signal.items():
            signal.signal(number, handler)


def write_lines(path: Path, rows: Sequence[Any]) -> None:
    files.write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
