"""Streams: every row once a pass, positions that mean the same rows whenever they are entered, blocks, what is refused."""

from __future__ import annotations

import gzip
import json
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from unit.data_helpers import byte_tokenizer, chats, data_run, prepared, write_jsonl
from unit.test_chat_faults import SWITCHED

from dstune.config.data_schema import DataConfig, OnBadRow, SourceConfig, SplitConfig
from dstune.config.schema import TrainerConfig
from dstune.config.validate import validate
from dstune.core.errors import UserError
from dstune.data import sources
from dstune.data.blocks import Blocks
from dstune.data.build import prove
from dstune.data.builder import block_builder
from dstune.data.files import DataFile
from dstune.data.stream import FileShard, Position, Stream
from dstune.data.tokenize import conversations
from dstune.tasks.classification.config import ClassificationConfig
from dstune.trainer.data_loader import StreamingLoader

ROWS = 23


def write_shard(folder: Path, number: int, ending: str) -> Path:
    rows = [{"text": f"shard {number} row {row}"} for row in range(ROWS)]
    path = folder / f"shard-{number}{ending}"
    match ending:
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" + "\n" * (n % 3 == 0) for n, row in enumerate(rows)))
        case ".jsonl.gz":
            with gzip.open(path, "wt") as stream:
                stream.writelines(json.dumps(row) + "\n" for row in rows)
        case ".csv":
            path.write_text("text\n" + "".join(row["text"] + "\n" for row in rows))
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=5)
    return path


def stream_of(files: list[Path], seed: int = 0) -> Stream:
    return Stream([FileShard(DataFile(file)) for file in files], seed)


def blocks_from(stream: Stream, begin: Position, count: int, size: int) -> tuple[list[list[str]], list[Position]]:
    texts, positions = [], [begin]
    for _ in range(count):
        texts.append([f"{raw.place}: {raw.fields['text']}" for _, raw in stream.take(positions[-1], size)])
        positions.append(stream.position)
    return texts, positions


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".csv", ".parquet"])
def test_a_position_means_the_same_rows_whenever_it_is_entered(tmp_path, ending):
    files = [write_shard(tmp_path, number, ending) for number in range(3)]
    texts, positions = blocks_from(stream_of(files), Position(), 20, size=8)
    for number, position in enumerate(positions[:-1]):
        written = Position(**json.loads(json.dumps(position.to_dict())))  # as a checkpoint holds it
        again, _ = blocks_from(stream_of(files), written, 2, size=8)
        assert again[0] == texts[number]
    first_pass = [text for block in texts[:9] for text in block]
    assert len(first_pass) == len(set(first_pass)) == 3 * ROWS
    assert [len(block) for block in texts[:9]] == [8] * 8 + [5]  # a block ends with its pass
    assert [position.passes for position in positions[8:11]] == [0, 1, 1]


def test_a_byte_position_reads_no_row_before_it(tmp_path, monkeypatch):
    file = write_shard(tmp_path, 0, ".jsonl")
    stream = stream_of([file])
    list(stream.take(Position(), 10))
    content = bytearray(file.read_bytes())
    content[: stream.position.mark["offset"]] = b"#" * stream.position.mark["offset"]
    file.write_bytes(content)  # what comes before is not looked at any more
    assert [raw.fields["text"] for _, raw in stream.take(stream.position, 2)] == ["shard 0 row 10", "shard 0 row 11"]


def test_a_row_group_before_the_position_is_not_read(tmp_path, monkeypatch):
    file = write_shard(tmp_path, 0, ".parquet")
    read: list[list[int]] = []
    genuine = pq.ParquetFile.iter_batches

    def noted(self, *arguments, **options):
        read.append(list(options["row_groups"]))
        return genuine(self, *arguments, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", noted)
    (_, raw), *_ = stream_of([file]).take(Position(row=12), 1)
    assert (raw.fields["text"], raw.line) == ("shard 0 row 12", 13)
    assert read == [[2, 3, 4]]


def test_shards_come_in_another_order_in_each_pass_and_for_each_seed(tmp_path):
    stream = stream_of([tmp_path / str(number) for number in range(6)])
    orders = [stream.order(number) for number in range(4)]
    assert all(sorted(order) == list(range(6)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert stream_of([tmp_path / str(number) for number in range(6)], seed=1).order(0) != orders[0]


def test_a_pass_without_rows_ends(tmp_path):
    file = tmp_path / "empty.csv"
    file.write_text("text\n")
    assert list(stream_of([file]).take(Position(), 5)) == []


def test_a_changed_shard_is_another_stream(tmp_path):
    file = write_shard(tmp_path, 0, ".jsonl")
    before = stream_of([file]).identity()
    assert stream_of([file]).identity() == before
    file.write_text(file.read_text() + '{"text": "one more"}\n')
    assert stream_of([file]).identity() != before


# -- blocks -------------------------------------------------------------------------------------------------------------


def streaming(folder: Path, rows: int = 60, **data: object):
    for number in range(2):
        write_jsonl(folder / f"s{number}.jsonl", chats(rows)[number::2])
    config = data_run(f"{folder}/s*.jsonl", streaming=True, stream_rows=20, packing=False, **data)
    return replace(config, trainer=TrainerConfig(max_steps=30, micro_batch_size=2, global_batch_size=4))


@pytest.fixture
def opened(tmp_path):
    """Blocks of a stream, closed at the end of the test."""
    made: list[Blocks] = []

    def open_blocks(config) -> Blocks:
        data = prepared(config, byte_tokenizer(), tmp_path / "cache")
        made.append(
            Blocks(config, byte_tokenizer(), data, tmp_path / "run", tmp_path / "cache", arguments={}, leader=True)
        )
        return made[-1]

    yield open_blocks
    for blocks in made:
        blocks.close(remove=False)


def test_rows_held_out_of_the_first_block_are_in_no_block(tmp_path):
    config = streaming(tmp_path, split=SplitConfig(validation=0.2))
    data = prepared(config, byte_tokenizer(), tmp_path / "cache")
    assert data.validation is not None
    held_out = {tuple(data.validation.sample(index)["input_ids"]) for index in range(len(data.validation.lengths))}
    assert held_out
    known, begin, samples = np.load(data.stream.held_out), Position(**data.stream.end), []
    for number in range(1, 5):  # to the second pass, which has other blocks
        folder = tmp_path / f"block-{number}"
        folder.mkdir()
        block_builder(config, byte_tokenizer(), begin, known, data.stream.shards, {})(folder)
        meta = json.loads((folder / "meta.json").read_text())
        assert meta["report"]["train"]["rows_read"] == 20
        begin = Position(**meta["stream"]["end"])
        table = pa.ipc.open_stream((folder / "train.arrow").read_bytes()).read_all()
        samples += [tuple(ids) for ids in table["input_ids"].to_pylist()]
    assert begin.passes == 1
    assert not held_out & set(samples)
    first = {tuple(data.train.sample(index)["input_ids"]) for index in range(len(data.train.lengths))}
    assert len(first | set(samples)) == 60 - len(held_out)


def test_later_blocks_are_proven_too(tmp_path, monkeypatch):
    config = streaming(tmp_path)
    data = prepared(config, byte_tokenizer(), tmp_path / "cache")
    begin, held_out = Position(**data.stream.end), np.load(data.stream.held_out)
    monkeypatch.setattr(conversations, "target_mask", lambda offsets, spans: np.ones(len(offsets), dtype=bool))
    (tmp_path / "block").mkdir()
    with pytest.raises(UserError, match="not trained as a server would render it"):
        block_builder(config, byte_tokenizer(), begin, held_out, data.stream.shards, {})(tmp_path / "block")


def test_a_later_block_with_other_arguments_is_reported(tmp_path, caplog):
    """Its turns have reasoning, and those of the first block have none: an export thinks of no answer."""
    thought = {"role": "assistant", "content": "Yes", "reasoning_content": "Hm."}
    rows = [*chats(20), *({"messages": [{"role": "user", "content": f"Is {n} odd?"}, thought]} for n in range(20))]
    (tmp_path / "shards").mkdir()
    write_jsonl(tmp_path / "shards" / "0.jsonl", rows)
    config = streaming(tmp_path)
    config = replace(config, data=replace(config.data, train=str(tmp_path / "shards" / "0.jsonl")))
    data = prepared(config, byte_tokenizer(SWITCHED), tmp_path / "cache")
    served = prove(config, byte_tokenizer(SWITCHED), data)
    assert served.arguments == {"enable_thinking": False}
    begin, held_out = Position(**data.stream.end), np.load(data.stream.held_out)
    (tmp_path / "block").mkdir()
    build = block_builder(config, byte_tokenizer(SWITCHED), begin, held_out, data.stream.shards, served.arguments)
    build(tmp_path / "block")
    assert 'with {"enable_thinking": true}, and those of the first with {"enable_thinking": false}' in caplog.text


def test_the_disk_holds_two_blocks_beside_the_first_and_a_cursor_finds_its_place(tmp_path, opened):
    config = streaming(tmp_path)
    blocks = opened(config)
    data_loader = StreamingLoader(config, blocks, None)
    seen, drawn, cursors = 0, [], []
    for step in range(30):
        batch = data_loader.load(step)
        data_loader.begin(step)
        cursors.append(data_loader.cursor(step + 1))
        drawn.append(
            [batch.split.sample(s)["input_ids"].tolist() for m in batch.global_batch.micro_batches for s in m.samples]
        )
        seen = max(seen, len([path for path in blocks.root.glob("block-*") if path.is_dir()]))
    assert cursors[-1]["block"] > 5
    assert seen <= 2
    for stopped in (3, 14, 22):
        again = StreamingLoader(config, blocks, json.loads(json.dumps(cursors[stopped - 1])))
        batch = again.load(stopped)
        found = [
            batch.split.sample(s)["input_ids"].tolist() for m in batch.global_batch.micro_batches for s in m.samples
        ]
        assert found == drawn[stopped]


def test_a_bad_row_of_a_later_block_is_named_when_training_comes_to_it(tmp_path, opened):
    config = streaming(tmp_path)
    for number in range(2):
        rows = [json.loads(line) for line in (tmp_path / f"s{number}.jsonl").read_text().splitlines()]
        write_jsonl(tmp_path / f"s{number}.jsonl", [*rows[:24], {"messages": []}, *rows[25:]])
    blocks = opened(config)
    data_loader = StreamingLoader(config, blocks, None)
    done: list[int] = []

    def train() -> None:
        for step in range(30):
            data_loader.load(step)
            data_loader.begin(step)
            done.append(step)

    with pytest.raises(UserError, match=r"s[01]\.jsonl:25") as raised:
        train()
    assert "data.on_bad_row=skip" in str(raised.value)
    assert len(done) > 3


CHANGES = {
    "new: s2.jsonl": lambda folder: write_jsonl(folder / "s2.jsonl", chats(5)),
    "gone: s0.jsonl": lambda folder: (folder / "s0.jsonl").unlink(),
    "changed: s1.jsonl": lambda folder: write_jsonl(folder / "s1.jsonl", chats(64)[1::2]),
}


@pytest.mark.parametrize(
    "change", [name if "new" in name else pytest.param(name, marks=pytest.mark.ci) for name in CHANGES]
)
def test_files_that_change_during_training_are_named(tmp_path, opened, change):
    data_loader = StreamingLoader(streaming(tmp_path), opened(streaming(tmp_path)), None)
    CHANGES[change](tmp_path)

    def train() -> None:
        for step in range(30):
            data_loader.load(step)
            data_loader.begin(step)

    with pytest.raises(UserError, match="changed while the run trains") as raised:
        train()
    assert [problem.where for problem in raised.value.problems] == ["data.train"]
    assert f"({change})" in str(raised.value)


def test_files_that_change_while_a_block_is_read_are_named(tmp_path):
    config = streaming(tmp_path)
    data = prepared(config, byte_tokenizer(), tmp_path / "cache")
    begin, held_out = Position(**data.stream.end), np.load(data.stream.held_out)
    build = block_builder(config, byte_tokenizer(), begin, held_out, data.stream.shards, {})
    CHANGES["changed: s1.jsonl"](tmp_path)
    (tmp_path / "block").mkdir()
    with pytest.raises(UserError, match=r"changed: s1\.jsonl"):
        build(tmp_path / "block")


@pytest.mark.ci
def test_an_empty_block_is_kept_until_every_rank_has_passed_it(tmp_path, opened):
    config = streaming(tmp_path)
    held_out = prepared(config, byte_tokenizer(), tmp_path / "cache").stream
    rows = chats(60)
    write_jsonl(tmp_path / "held_out.jsonl", rows[10:40])  # of the six blocks of 10 rows some have no other ones
    config = replace(config, data=replace(config.data, validation=str(tmp_path / "held_out.jsonl"), stream_rows=5))
    assert held_out is not None
    blocks = opened(config)
    other = Blocks(
        config, byte_tokenizer(), blocks._first, tmp_path / "run", tmp_path / "cache", arguments={}, leader=False
    )
    leads, follows = StreamingLoader(config, blocks, None), StreamingLoader(config, other, None)
    skipped = 0
    for step in range(30):
        before = leads._segments[-1].block.number
        batch = leads.load(step)
        leads.begin(step)  # all ranks are done with the step before, but only this one has drawn `step`
        skipped += leads._segments[-1].block.number - before > 1
        timer = threading.Timer(20, follows.interrupt)
        timer.start()
        assert follows.load(step).global_batch == batch.global_batch
        timer.cancel()
    assert skipped


def test_the_preparing_process_prints_references_instead_of_secrets(tmp_path, opened, monkeypatch, capfd):
    monkeypatch.setenv("CORPUS_TOKEN", "s2-of-the-secret")
    folder = tmp_path / "s2-of-the-secret"
    folder.mkdir()
    config = streaming(folder, on_bad_row=OnBadRow.skip)
    for number in range(2):
        rows = [json.loads(line) for line in (folder / f"s{number}.jsonl").read_text().splitlines()]
        write_jsonl(folder / f"s{number}.jsonl", [*rows[:24], {"messages": []}, *rows[25:]])
    data_loader = StreamingLoader(config, opened(config), None)
    for step in range(15):
        data_loader.load(step)
        data_loader.begin(step)
    printed = capfd.readouterr().err
    assert "${oc.env:CORPUS_TOKEN}/s" in printed
    assert "s2-of-the-secret" not in printed


def test_a_preparing_process_that_hangs_does_not_hold_up_the_end(tmp_path, opened, monkeypatch):
    blocks = opened(streaming(tmp_path))
    monkeypatch.setattr("dstune.data.blocks.CLOSE_SECONDS", 0.5)
    os.kill(blocks._process.pid, signal.SIGSTOP)
    began = time.monotonic()
    blocks.close(remove=False)
    assert time.monotonic() - began < 5


def test_waiting_for_a_block_can_be_interrupted(tmp_path, opened, monkeypatch):
    config = streaming(tmp_path)
    blocks = opened(config)
    monkeypatch.setattr(blocks, "_request", lambda number, begin: None)  # it never comes
    blocks.interrupt()
    began = time.monotonic()
    with pytest.raises(InterruptedError):
        blocks.get(1, blocks.get(0, None).end)
    assert time.monotonic() - began < 5


# -- what is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "trainer", "task", "where"),
    [
        ({}, {"max_steps": None}, None, "trainer.max_steps"),
        ({"mixture": {"a": SourceConfig(path="a.jsonl")}}, {}, None, "data.streaming"),
        ({"max_rows": 5}, {}, None, "data.max_rows"),
        ({"packing": False}, {}, ClassificationConfig(), "task.labels"),
    ],
)
def test_what_a_stream_cannot_do_is_refused_with_the_reason(data, trainer, task, where):
    config = data_run("rows.jsonl", streaming=True, task=task, **data)
    config = replace(config, trainer=TrainerConfig(**({"max_steps": 5} | trainer)))
    with pytest.raises(UserError) as raised:
        validate(config)
    assert [problem.where for problem in raised.value.problems] == [where]
    assert raised.value.problems[0].fix
    assert isinstance(config.data, DataConfig)


def test_a_mixture_needs_paths_names_and_positive_weights(tmp_path):
    mixture = {"a b": SourceConfig(path="a.jsonl"), "empty": SourceConfig(), "none": SourceConfig(path="b", weight=0)}
    with pytest.raises(UserError) as raised:
        validate(data_run("", mixture=mixture))
    wheres = {problem.where for problem in raised.value.problems}
    assert wheres == {"data.mixture", "data.mixture.empty.path", "data.mixture.none.weight"}
    (tmp_path / "a.jsonl").write_text("{}")
    assert sources.has_lines(DataFile(tmp_path / "a.jsonl"))
