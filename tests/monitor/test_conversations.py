"""What is one conversation: of requests, of rows, and of a server's logs."""

from __future__ import annotations

import asyncio
import datetime
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dstune.config.compose import compose
from dstune.config.forgetting import with_replay
from dstune.config.run_file import write_run
from dstune.core.errors import UserError
from dstune.cycle.settings import CycleSettings
from dstune.cycle.steps import Cycle
from dstune.data.run_rows import read_run_parts
from dstune.monitor import row_files
from dstune.monitor.check import iso
from dstune.monitor.conversations import Conversation, asked_texts, digest_of, joined, one_per, sampled
from dstune.monitor.gather import Reference, _add_model_signals, read_live, read_reference
from dstune.monitor.row_files import conversation_of_row, read_file_rows
from dstune.monitor.server_logs import _conversation, _with_feedback, log_folder, read_log
from dstune.monitor.signals import SignalTable
from dstune.serve.gateway.request_log import RequestLog
from dstune.tasks.classification.config import ClassificationConfig
from tests.support.configs import run_config
from tests.support.serving import chat, served
from tests.support.tiny import write_labelled
from tests.unit.test_image_rows import PNG

CHAT = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "x"}]


@pytest.mark.parametrize(
    ("row", "texts"),
    [
        ({"messages": [*CHAT, {"role": "user", "content": [{"type": "text", "text": "b"}]}]}, ("a", "b")),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "x"}]}, ("a",)),
        ({"prompt": "a", "completion": "x"}, ("a",)),
        ({"prompt": CHAT, "chosen": "x"}, ("a",)),
        ({"text": "a", "label": "x"}, ("a",)),
        ({"text": "a", "text_pair": "b"}, ("a\nb",)),
        ({"question": "a", "context": "b", "answers": []}, ("a\nb",)),
        ({"tokens": ["a", "b"], "tags": ["O", "O"]}, ("a b",)),
        ({"input": ["same", "same"]}, ("same",)),
        ({"input": [{"role": "user", "content": "a"}]}, ("a",)),
        ({"label": "x"}, ()),
        ({"messages": "no list", "prompt": 3}, ()),
        ({"messages": [{"role": "user"}]}, ()),
    ],
)
def test_what_is_asked(row: dict, texts: tuple[str, ...]) -> None:
    assert asked_texts(row) == texts


def turn(place: str, *texts: str, user: str = "u", **more: object) -> Conversation:
    return Conversation(place, texts, time=float(len(place)), user=user, requests=(place,), **more)  # type: ignore[arg-type]


def test_requests_that_repeat_earlier_turns_are_one_conversation() -> None:
    found = joined(
        [
            turn("1", "a", rating=1.0),
            turn("22", "a", "b", rating=-1.0),
            turn("333", "a", "c"),  # another one, from the first turn on
            turn("4444", "a", "b", user="v"),
            turn("55555", "z"),
            turn("666666", "z"),  # the same again: a retry, a health check
        ]
    )
    assert [(one.place, one.texts) for one in found] == [
        ("1", ("a", "b")),
        ("333", ("a", "c")),
        ("4444", ("a", "b")),
        ("55555", ("z",)),
    ]
    assert found[0].rating == -1.0
    assert found[0].requests == ("1", "22")


def test_of_one_user_all_conversations_are_alike() -> None:
    rows = [turn(str(number), f"text {number}", user="often") for number in range(50)] + [turn("x", "y", user="once")]
    assert sorted(row.user or "" for row in one_per(rows, "user")) == ["often", "once"]
    assert one_per(rows, "user") == one_per([*reversed(rows)], "user")[:0] + one_per(rows, "user")
    assert {row.place for row in one_per(rows, "user")} == {row.place for row in one_per([*reversed(rows)], "user")}


@pytest.mark.parametrize("moment", [1_767_323_045, 1_767_323_045_000, 1_767_323_045 * 10**6, 1_767_323_045 * 10**9])
def test_numbers_are_times_in_seconds_or_smaller_units(moment: float) -> None:
    row = conversation_of_row({"text": "a", "time": moment}, "f:1")
    assert row is not None and iso(row.time) == "2026-01-02T03:04:05+00:00"


@pytest.mark.parametrize("moment", [10**400, 1e300, math.inf, math.nan, -1e300, 1e20, "soon", True])
def test_numbers_that_no_calendar_has_are_no_times(moment: object) -> None:
    row = conversation_of_row({"text": "a", "time": moment}, "f:1")
    assert row is not None and row.time is None


def test_a_sample_is_the_same_each_time_and_whatever_else_is_there() -> None:
    rows = [turn(str(number), f"text {number}") for number in range(100)]
    few = sampled(rows, 10)
    assert few == sampled(rows, 10) and len(few) == 10
    assert digest_of(few) == digest_of([*reversed(few)]) != digest_of(few[1:])


def test_rows_of_a_file_with_a_conversation_are_joined(tmp_path: Path) -> None:
    rows = [
        {"conversation_id": 1, "text": "a", "created": "2026-01-02T03:04:05+00:00"},
        {"conversation_id": 2, "text": "b", "created": 1767323045},
        {"conversation_id": 1, "text": "c", "created": 1767323045000, "rating": 1},
        {"nothing": "that is read"},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    found = read_file_rows(str(file), "--data").rows
    assert [row.texts for row in found] == [("a", "c"), ("b",)]
    assert found[0].time == found[1].time == datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC).timestamp()
    file.write_text('{"nothing": 1}')
    with pytest.raises(UserError, match="has a question"):
        read_file_rows(str(file), "--data")


def write_lines(file: Path, rows: list[dict]) -> str:
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


@pytest.mark.parametrize("user", [{}, {"user": "ann"}])
def test_a_request_that_a_file_repeats_counts_once(tmp_path: Path, user: dict) -> None:
    rows = [{"text": f"t {number}", "created": 1767323045 + number, **user} for number in range(10)]
    repeated = [row | {"created": row["created"] + 60} for row in rows[:2] for _ in range(3)]
    other = [rows[0] | {"user": "ben"}] if user else []
    live = read_live(
        write_lines(tmp_path / "rows.jsonl", [*rows, *repeated, *other]), None, None, store=None, per=None, most=99
    )
    assert sorted(row.text for row in live.rows) == sorted(row["text"] for row in [*rows, *other])
    assert min(row.time or 0 for row in live.rows) == 1767323045  # the time of the first request, not of a retry


def test_turns_that_a_client_sends_again_in_a_file_count_once(tmp_path: Path) -> None:
    """By the name of the conversation or by that of the user, as in a server's logs."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "x"}, {"role": "user", "content": "b"}]
    for name in ("conversation_id", "user"):
        rows = [{"messages": messages, name: "c"} for messages in (turns[:1], turns[:1], turns, turns)]
        (conversation,) = read_file_rows(write_lines(tmp_path / "rows.jsonl", rows), "--data").rows
        assert conversation.texts == ("a", "b")
    rows = [{"text": text, "conversation_id": 1} for text in ("a", "b", "b", "a")]
    (conversation,) = read_file_rows(write_lines(tmp_path / "rows.jsonl", rows), "--data").rows
    assert conversation.texts == ("a", "b", "a")


def test_rows_of_a_run_count_as_those_of_a_file(tmp_path: Path) -> None:
    rows = write_labelled(tmp_path / "rows.jsonl", 40)
    lines = rows.read_text().splitlines()
    rows.write_text("\n".join([*lines, *lines[:20]]) + "\n")
    words = ["model.path=/nowhere", "data=files", f"data.train={rows}", "data.split.validation=0.25"]
    (tmp_path / "run").mkdir()
    write_run(tmp_path / "run" / "run.yaml", compose([*words, "task=classification", "task.labels=[left,right]"]))
    reference = read_reference(tmp_path / "run", None, 1000, mask=False)
    assert len({row.text for row in reference.rows}) == len(reference.rows) == 40


@pytest.mark.parametrize("newest", [False, True])
def test_a_conversation_is_read_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, newest: bool
) -> None:
    """Its turns lie apart in the file, each among those of others."""
    monkeypatch.setattr(row_files, "READ_ROWS", 7)
    rows = [
        {"text": f"{number} {turn}", "conversation_id": number, "created": 1767323045 + 100 * turn + number}
        for turn in range(3)
        for number in range(40)
    ]
    read = read_file_rows(write_lines(tmp_path / "rows.jsonl", rows), "--data", newest=newest)
    assert {len(row.texts) for row in read.rows} == {3} and (len(read.rows), read.left_out) == (7, 3 * 33)
    if newest:
        assert [row.key for row in read.rows] == [str(number) for number in range(33, 40)]


def test_times_ahead_of_now_are_left_out_of_a_window_and_counted(tmp_path: Path) -> None:
    rows = [{"text": f"t {number}", "created": 1767323045 + number} for number in range(30)]
    ahead = [{"text": "when?", "created": "2100-01-01T00:00:00+00:00"}]
    file = write_lines(tmp_path / "rows.jsonl", [*rows, *ahead])
    live = read_live(file, "1h", None, store=None, per=None, most=99)
    assert (len(live.rows), live.end, live.ahead_of_now) == (30, rows[-1]["created"], 1)
    live = read_live(file, None, None, store=None, per=None, most=99)
    assert (len(live.rows), live.end, live.ahead_of_now) == (31, rows[-1]["created"], 0)
    with pytest.raises(UserError, match="1 row has a time ahead of now"):
        read_live(write_lines(tmp_path / "ahead.jsonl", ahead), "1h", None, store=None, per=None, most=99)


def test_the_largest_user_of_many_rows(tmp_path: Path) -> None:
    rows = [{"text": f"t {number}", "user": "often" if number % 4 == 0 else number} for number in range(24_000)]
    live = read_live(write_lines(tmp_path / "rows.jsonl", rows), None, None, store=None, per=None, most=99)
    assert live.largest_user == 0.25


def test_of_many_rows_the_newest_or_a_sample_of_all_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_files, "READ_ROWS", 40)
    file = tmp_path / "rows.jsonl"
    rows = [{"text": f"t {number}", "created": 1767323045 + number} for number in range(400)]
    file.write_text("\n".join(map(json.dumps, rows)))
    newest = read_file_rows(str(file), "--data", newest=True)
    assert newest.left_out == 360
    assert [row.text for row in newest.rows] == [row["text"] for row in rows[-40:]]
    live = read_live(str(file), "1h", None, store=None, per=None, most=20)
    assert live.left_out == 360 and live.end == rows[-1]["created"] and len(live.rows) == 20

    sample = read_file_rows(str(file), "--data")
    assert sample == read_file_rows(str(file), "--data") and (len(sample.rows), sample.left_out) == (40, 360)
    times = [row.time for row in sample.rows]
    assert times == sorted(times) and times[0] < rows[100]["created"] and times[-1] > rows[300]["created"]
    assert read_live(str(file), None, None, store=None, per=None, most=20).left_out == 360
    with file.open("a") as stream:
        stream.write('\n{"text": "when"}')
    with pytest.raises(UserError, match="without a time"):
        read_live(str(file), "1h", None, store=None, per=None, most=20)


def test_rows_that_have_labels_count_for_the_loss_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Labelled rows are often others than the rest, so what the model makes of all rows is not read of them."""

    def measure(run: Path, config: object, asked: list[Conversation]) -> dict[str, np.ndarray]:
        losses = [math.nan if row.label is None else 0.5 + len(row.text) for row in asked]
        return {"confidence": np.array([float(len(row.text)) for row in asked]), "loss": np.array(losses)}

    monkeypatch.setattr("dstune.monitor.model_signals.measure", measure)
    validation = [replace(turn(str(number), "v" * (number + 1)), label="a") for number in range(30)]
    live = [
        replace(turn(str(number), "l" * (number + 1)), label="a" if number % 5 == 0 else None) for number in range(300)
    ]
    config = run_config(task=ClassificationConfig())
    table = SignalTable()
    _add_model_signals(table, Reference(validation, validation, config), live, Path("run"), 50)
    confidence, loss = ({signal.name: signal for signal in table.signals}[name] for name in ("confidence", "loss"))
    asked = {row.text for row in sampled(live, 50)}
    assert {int(value) for value in confidence.values[confidence.is_live]} == {len(text) for text in asked}
    assert sum(loss.is_live) == 50  # of the 60 labelled ones


def test_an_answer_is_no_question() -> None:
    row = conversation_of_row({"text": "a", "label": "b", "completion": "c"}, "here")
    assert row is not None
    assert (row.label, dict(row.fields)) == ("b", {"text": "a"})


def test_the_logs_of_a_server_are_read_where_they_lie(tmp_path: Path) -> None:
    """With ratings, corrections and the guard's decisions; another user's and failed requests are apart."""
    state = tmp_path / "state"
    state.mkdir(mode=0o700)

    async def test() -> None:
        async with served(state, log=RequestLog(state / "requests", str)) as found:
            client = found.client()
            first = await client.post("/v1/chat/completions", json=chat("one", user="u"))
            later = chat("one", user="u")
            later["messages"] += [{"role": "assistant", "content": "x"}, {"role": "user", "content": "two"}]
            second = await client.post("/v1/chat/completions", json=later)
            await client.post("/v1/chat/completions", json=chat("three", user="v"))
            await client.post("/v1/chat/completions", json=chat("bad", temperature=99))
            body = {"id": second.headers["x-request-id"], "rating": -1, "correction": "better"}
            assert (await client.post("/v1/feedback", json=body)).is_success
            guard = state / "guard"
            guard.mkdir()
            line = {"request": first.headers["x-request-id"], "decision": "flagged"}
            (guard / "audit-2026-01-01.jsonl").write_text(json.dumps(line) + '\n{"cut')

    asyncio.run(test())
    assert log_folder(str(state)) == log_folder(str(state / "requests")) == state / "requests"
    assert log_folder(str(tmp_path)) is None
    conversation, other = read_log(state / "requests", 0.0)
    assert (conversation.texts, conversation.rating, conversation.correction) == (("one", "two"), -1.0, "better")
    assert (conversation.is_flagged is True and other.is_flagged is None) or other.is_flagged is False
    assert other.texts == ("three",) and other.user != conversation.user
    assert conversation.answer is not None and conversation.version
    assert read_log(state / "requests", 4e9) == []


def test_rows_that_a_run_replayed_are_among_those_that_it_was_trained_on(tmp_path: Path) -> None:
    """As runs of `dstune cycle` do: `run.yaml` has a mixture of both."""
    rows, old = write_labelled(tmp_path / "rows.jsonl", 40), write_labelled(tmp_path / "old.jsonl", 30, seed=1)
    words = ["model.path=/nowhere", "data=files", f"data.train={rows}", "data.split.validation=0.25"]
    words += ["task=classification", "task.labels=[left,right]", "forgetting.replay=0.5", f"forgetting.general={old}"]
    (tmp_path / "run").mkdir()
    composed = compose(words)
    write_run(tmp_path / "run" / "run.yaml", replace(composed, config=with_replay(composed.config)))
    config, parts = read_run_parts(tmp_path / "run", fix="")
    assert config.data.train == str(rows) and not config.data.mixture
    texts = [{json.loads(line)["text"] for line in path.read_text().splitlines()} for path in (rows, old)]
    train, validation = ({row["text"] for _, row in parts[part]} for part in ("train", "validation"))
    assert train | validation == texts[0] | texts[1] and texts[1] <= train and validation <= texts[0]
    assert len(read_run_parts(tmp_path / "run", 25, fix="")[1]["train"]) == 25


def test_rows_of_a_run_on_images_are_read_with_their_texts(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}
    row = {"messages": [asked, {"role": "assistant", "content": "a cat"}], "images": ["a.png"]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    words = ["model.path=/nowhere", "data=files", f"data.train={tmp_path / 'rows.jsonl'}", "data.split.validation=0"]
    (tmp_path / "run").mkdir()
    write_run(tmp_path / "run" / "run.yaml", compose([*words, "task=chat"]))
    ((_, read),) = read_run_parts(tmp_path / "run", fix="")[1]["train"]
    assert asked_texts(read) == ("what is it?",) and read["images"][0]["size"] == [32, 32]
    settings = CycleSettings(tmp_path / "run", tmp_path / "cycle", "feedback.jsonl")
    with pytest.raises(UserError, match="shows an image, which the log"):
        Cycle(settings).run()


@pytest.mark.parametrize(
    ("body", "answer", "label", "text"),
    [
        ({"input": "a"}, {}, "good", None),
        ({"input": ["a"]}, {}, "good", None),
        ({"input": ["a", "b"]}, {}, None, None),
        ({"messages": CHAT[:2], "n": 2}, {"choices": [{"message": {"content": "x"}}, {"message": {}}]}, "good", None),
        ({"messages": CHAT[:2]}, {"choices": [{"message": {"content": "x"}}]}, "good", "x"),
    ],
)
def test_what_is_said_of_several_texts_at_once_is_said_of_none(
    body: dict, answer: dict, label: str | None, text: str | None
) -> None:
    row = {"id": "r", "created": datetime.datetime.now(datetime.UTC), "status": 200, "request": json.dumps(body)}
    conversation = _conversation(row | {"answer": json.dumps(answer)})
    assert conversation is not None
    said = _with_feedback(conversation, {"r": {"label": "good", "rating": 1.0}}, {})
    assert (said.label, said.rating, said.answer) == (label, 1.0, text)
