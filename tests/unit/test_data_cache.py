"""The cache of prepared data: keys, interruption, processes at once, errors of the one that makes it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from unit.data_helpers import byte_tokenizer, chats, data_run, exchange, prepared, write_jsonl

from dstune.config.data_schema import OnBadRow, SplitConfig
from dstune.core.errors import Problem, UserError
from dstune.data import builder, cache, parallel
from dstune.data.tokenize import RowTokenizer
from dstune.tasks.chat.config import ChatConfig


def test_the_second_call_reads_the_cache(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "rows.jsonl", chats(50))
    tokenizer = byte_tokenizer()
    first = prepared(data_run(path), tokenizer, tmp_path / "cache")

    def refuse(self, batch):
        raise AssertionError("tokenized again")

    monkeypatch.setattr(RowTokenizer, "__call__", refuse)
    tokenizer("a call with another setting", truncation=True, max_length=4)  # leaves its mark in the tokenizer
    second = prepared(data_run(path), tokenizer, tmp_path / "cache")
    assert second.fingerprint == first.fingerprint
    assert second.train.table["input_ids"][:] == first.train.table["input_ids"][:]
    assert second.report == first.report
    with pytest.raises(AssertionError, match="tokenized again"):
        prepared(data_run(path, max_length=100), tokenizer, tmp_path / "cache")


def test_the_cache_is_memory_mapped(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", chats(50))
    data = prepared(data_run(path), byte_tokenizer(), tmp_path / "cache")
    (cached,) = data.train.table.cache_files
    assert Path(cached["filename"]).is_relative_to(tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("work"))


DATED = "{{ strftime_now('%Y-%m-%d') }}"


def test_what_makes_another_cache_entry(tmp_path):
    rows = chats(50)
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    base, tokenizer = data_run(path), byte_tokenizer()
    dated = byte_tokenizer(DATED + tokenizer.chat_template)

    def key(config=base, tokenizer=tokenizer):
        return prepared(config, tokenizer, tmp_path / "cache").fingerprint

    known = key()
    other_day = replace(base, task=ChatConfig(template_date="2025-03-10"))
    changes = [
        key(replace(base, data=replace(base.data, max_length=64))),
        key(replace(base, data=replace(base.data, split=SplitConfig(seed=1)))),
        key(replace(base, task=ChatConfig(train_on_prompt=True, template_date="2025-03-09"))),
        key(tokenizer=byte_tokenizer(eos="</s>")),
        key(tokenizer=dated),
        key(other_day, dated),
        key(data_run(write_jsonl(tmp_path / "more.jsonl", [*rows, exchange("a", "b")]))),
    ]
    assert len({known, *changes}) == len(changes) + 1
    assert key() == known
    # The date counts only where the template prints it, and a file's name not at all.
    assert key(other_day) == known
    assert key(data_run(write_jsonl(tmp_path / "copy.jsonl", rows))) == known


def test_an_interrupted_entry_is_made_again(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "rows.jsonl", chats(50))
    with monkeypatch.context() as patched:

        def die(*arguments, **settings):
            raise KeyboardInterrupt

        patched.setattr(builder, "write_samples", die)
        with pytest.raises(KeyboardInterrupt):
            prepared(data_run(path), byte_tokenizer(), tmp_path / "cache")
    fingerprint = prepared(data_run(path), byte_tokenizer(), tmp_path / "cache").fingerprint
    # As a process that was killed leaves it: half an entry under the other name.
    folder = tmp_path / "cache" / "data" / fingerprint
    folder.rename(folder.with_suffix(".incomplete"))
    (folder.with_suffix(".incomplete") / "train.arrow").write_bytes(b"half")
    assert len(prepared(data_run(path), byte_tokenizer(), tmp_path / "cache").train.table) == 40
    assert not folder.with_suffix(".incomplete").exists()


def _make(root: Path, log: Path, seconds: float) -> None:
    def make(folder: Path) -> None:
        with log.open("a") as stream:
            stream.write(f"{os.getpid()}\n")
        time.sleep(seconds)
        (folder / "content").write_text("whole")

    assert (cache.entry(root, "key", make) / "content").read_text() == "whole"


def _process(*arguments):
    process = multiprocessing.get_context("fork").Process(target=_make, args=arguments)
    process.start()
    return process


def test_processes_at_once_make_an_entry_once(tmp_path):
    log = tmp_path / "log"
    processes = [_process(tmp_path / "cache", log, 0.5) for _ in range(4)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(log.read_text().split()) == 1


def test_those_who_wait_say_so(tmp_path, monkeypatch, caplog):
    log = tmp_path / "log"
    maker = _process(tmp_path / "cache", log, 1.0)
    while not log.exists():
        time.sleep(0.02)
    monkeypatch.setattr(cache, "POLL_SECONDS", 0.2)
    _make(tmp_path / "cache", log, 0.0)
    maker.join(60)
    assert "waiting for another process that prepares the data" in caplog.text


def test_a_killed_maker_is_followed_by_the_next(tmp_path, monkeypatch):
    log = tmp_path / "log"
    maker = _process(tmp_path / "cache", log, 60.0)
    while not log.exists():
        time.sleep(0.02)
    monkeypatch.setattr(cache, "POLL_SECONDS", 0.2)
    waiting = _process(tmp_path / "cache", log, 0.0)
    time.sleep(0.5)
    assert waiting.is_alive()
    assert maker.pid is not None
    os.kill(maker.pid, signal.SIGKILL)
    waiting.join(60)
    maker.join(60)
    assert waiting.exitcode == 0
    assert len(log.read_text().split()) == 2


def test_an_error_is_whole_or_not_there_for_those_who_look_without_the_lock(tmp_path, monkeypatch):
    genuine, seen = Path.write_text, []

    def in_two_parts(path: Path, text: str) -> int:
        genuine(path, text[:9])
        seen.append(cache.is_made(tmp_path, "key", 0.0))
        return genuine(path, text)

    monkeypatch.setattr(Path, "write_text", in_two_parts)

    def make(folder: Path) -> None:
        raise UserError(Problem(where="rows.jsonl:3", reason="broken"))

    for raised in (cache.entry, lambda root, key, make: cache.is_made(root, key, 0.0)):
        with pytest.raises(UserError, match=r"rows\.jsonl:3"):
            raised(tmp_path, "key", make)
    assert seen == [False]


def _failing(root: Path, log: Path, seen: Path) -> None:
    def make(folder: Path) -> None:
        with log.open("a") as stream:
            stream.write("made\n")
        time.sleep(0.5)
        raise UserError(Problem(where="rows.jsonl:3", reason="broken"))

    try:
        cache.entry(root, "key", make)
    except UserError as error:
        with seen.open("a") as stream:
            stream.write(str(error) + "\n")


def test_those_who_waited_get_the_makers_error(tmp_path):
    context = multiprocessing.get_context("fork")
    arguments = (tmp_path / "cache", tmp_path / "log", tmp_path / "seen")
    processes = [context.Process(target=_failing, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert (tmp_path / "seen").read_text().splitlines() == ["rows.jsonl:3: broken"] * 3
    assert (tmp_path / "log").read_text().splitlines() == ["made"]
    # A later call does not trust it: the file may have been mended under the same name, or the code.
    _failing(*arguments)
    assert len((tmp_path / "log").read_text().splitlines()) == 2


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "cache").write_text("a file")
    config = data_run(write_jsonl(tmp_path / "rows.jsonl", chats(5)))
    with pytest.raises(UserError, match="DSTUNE_CACHE"):
        prepared(config, byte_tokenizer(), tmp_path / "cache")


def test_several_processes_give_the_same_samples(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "rows.jsonl", [*chats(120), *[{"messages": []}] * 2])
    config = data_run(path, on_bad_row=OnBadRow.skip, workers=3, max_length=20)
    alone = prepared(config, byte_tokenizer(), tmp_path / "alone")
    monkeypatch.setattr(parallel, "MIN_ROWS_FOR_PROCESSES", 2)
    monkeypatch.setattr(parallel, "MIN_ROWS_PER_PROCESS", 2)
    several = prepared(config, byte_tokenizer(), tmp_path / "several")
    assert alone.report == several.report
    assert alone.train.table["input_ids"][:] == several.train.table["input_ids"][:]
    assert alone.train.table["labels"][:] == several.train.table["labels"][:]
    assert (alone.train.weights == several.train.weights).all()
