"""Training files as the job reads them: group 10 of the demands on the API, rows."""

from __future__ import annotations

import json

import pytest

from dstune.finetuning import row_images
from dstune.finetuning.rows import check_file, write_rows
from dstune.inference.reference_images import url_of
from tests.support.sight import draw
from tests.unit.test_image_rows import animation, bomb, file_of

ASKED = {"role": "user", "content": "a"}
ANSWER = {"role": "assistant", "content": "b"}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"at": 1}'}}
CALLED = {"role": "assistant", "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "c"}
PNG = url_of(file_of(draw(0)))
IMAGE = "messages[0].content[1]"
GOOD = {"messages": [ASKED, ANSWER]}
PAIR = {
    "input": {"messages": [ASKED]},
    "preferred_output": [ANSWER],
    "non_preferred_output": [{**ANSWER, "content": "c"}],
}


def chat(*messages, **beside):
    return {"messages": list(messages), **beside}


def seen(*urls, **beside):
    """A message that shows these images."""
    images = [{"type": "image_url", "image_url": {"url": url, **beside}} for url in urls]
    return {"role": "user", "content": [{"type": "text", "text": "a"}, *images]}


def checked(tmp_path, row, method="supervised", good=None, count=9):
    path = tmp_path / "rows.jsonl"
    good = good or {"supervised": GOOD, "dpo": PAIR}[method]
    lines = [json.dumps(good)] * count
    lines.insert(4, row if isinstance(row, str) else json.dumps(row))
    path.write_text("\n".join(lines) + "\n")
    return check_file(path, method)


@pytest.mark.parametrize(
    "row",
    [
        chat({"role": "developer", "content": "s"}, ASKED, ANSWER),
        chat({"role": "system", "content": "s"}, ASKED, {**ANSWER, "weight": 0}, ASKED, {**ANSWER, "weight": 1}),
        chat(ASKED, {**CALLED, "content": None}, RESULT, ANSWER, tools=[TOOL], parallel_tool_calls=False),
        chat(ASKED, ANSWER, functions=[{"name": "look"}]),
        chat({"role": "user", "content": [{"type": "text", "text": "a"}], "name": "ann"}, ANSWER),
        {"prompt": "a", "completion": "b"},
        chat(seen(PNG, url_of(file_of(draw(1), "JPEG")), url_of(file_of(draw(2), "WEBP")), detail="auto"), ANSWER),
        chat(seen(*[PNG] * 10, detail="high"), ANSWER),
        chat(ASKED, ASKED, ANSWER),  # the template of the model decides
    ],
)
def test_group_10_good_rows(tmp_path, row):
    assert checked(tmp_path, row).problems == []


BAD = [
    ("[]", "", "JSON object"),
    ("{", "", "not JSON"),
    ("[" * 200, "", ""),
    (chat(), "messages", "not empty"),
    ({"messages": "x"}, "messages", "list of messages"),
    ({}, "messages", "missing"),
    (chat(ASKED, ANSWER, extra=1), "extra", "no key"),
    (chat(ASKED, {**ANSWER, "extra": 1}), "messages[1].extra", "no key"),
    (chat(ASKED, {"role": "human", "content": "a"}), "messages[1].role", "one of"),
    (chat(ASKED, {"role": "assistant"}), "messages[1].content", "missing"),
    (chat({"role": "user", "content": None}, ANSWER), "messages[0].content", "null"),
    (chat(ASKED, {**ANSWER, "weight": 0.5}), "messages[1].weight", "0 or 1"),
    (chat(ASKED, {**ANSWER, "weight": True}), "messages[1].weight", "0 or 1"),
    (chat({**ASKED, "weight": 1}, ANSWER), "messages[0].weight", "assistant"),
    (chat(ASKED, {**ANSWER, "weight": 0}), "", "no trainable token"),
    (chat(ASKED), "", "no assistant message"),
    (chat(ASKED, {**ANSWER, "content": ""}), "messages[1]", "is empty"),
    (chat({**ASKED, "content": ""}, {**ANSWER, "content": " "}), "messages", "says anything"),
    (chat(ASKED, CALLED, RESULT, ANSWER), "messages[1].tool_calls[0].function.name", "not among the tools"),
    (chat(ASKED, {**CALLED, "tool_calls": [{**CALL, "function": {"name": "look", "arguments": {}}}]}, tools=[TOOL]),
     "messages[1].tool_calls[0].function.arguments", "as a text"),
    (chat(ASKED, {**CALLED, "tool_calls": [{**CALL, "function": {"name": "look", "arguments": "{"}}]}, tools=[TOOL]),
     "messages[1]", "not JSON"),
    (chat(ASKED, {"role": "assistant", "content": None, "function_call": {"name": "gone", "arguments": "{}"}},
          functions=[TOOL["function"]]), "messages[1].function_call.name", "not among the functions"),
    (chat(ASKED, {"role": "assistant", "content": None, "function_call": {"name": [], "arguments": "{}"}},
          functions=[TOOL["function"]]), "messages[1].function_call.name", "not among the functions"),
    (chat(ASKED, {**ANSWER, "content": "\ud83d"}), "", "half of a character"),
    (chat(ASKED, CALLED, {**RESULT, "tool_call_id": "x"}, ANSWER, tools=[TOOL]), "messages[2].tool_call_id", "no call"),
    (chat(ASKED, {**CALLED, "tool_calls": [CALL, {**CALL, "id": "2"}]}, RESULT, ANSWER, tools=[TOOL],
          parallel_tool_calls=False), "messages[1]", "calls 2 tools"),
    (chat(ASKED, ANSWER, tools=[{"name": "look"}]), "tools[0].type", "function"),
    (chat(seen("x"), ANSWER), f"{IMAGE}.image_url.url", "must be a data URL"),
    (chat(seen("https://x.y/a.png"), ANSWER), f"{IMAGE}.image_url.url", "is an address, and nothing is fetched for a job"),
    (chat(seen("/etc/passwd"), ANSWER), f"{IMAGE}.image_url.url", "must be a data URL"),
    (chat(seen("data:image/png;base64,iVBORw0KGgo="), ANSWER), f"{IMAGE}.image_url.url", "is no whole image"),
    (chat(seen(url_of(file_of(draw(0, (200, 200)), "JPEG")[:900])), ANSWER), f"{IMAGE}.image_url.url", "is no whole image"),
    (chat(seen(url_of(animation())), ANSWER), f"{IMAGE}.image_url.url", "is none of JPEG, PNG, WEBP"),
    (chat(seen(url_of(animation("WEBP"))), ANSWER), f"{IMAGE}.image_url.url", "has several frames"),
    (chat(seen(url_of(bomb(30_000, 30_000))), ANSWER), f"{IMAGE}.image_url.url", "decompression bomb"),
    (chat(seen(PNG, detail="low"), ANSWER), f"{IMAGE}.image_url.detail", "must be 'auto' or 'high'"),
    (chat(seen(PNG, size=3), ANSWER), f"{IMAGE}.image_url.size", "is no key of an image"),
    (chat(seen(*[PNG] * 11), ANSWER), "messages[0].content[11]", "is one image too many: a row may have 10"),
    (chat({**seen(PNG), "role": "system"}, ASKED, ANSWER), IMAGE, "this one is of the system"),
    (chat(ASKED, {**seen(PNG), "role": "assistant"}), "messages[1].content[1]", "this one is of the assistant"),
    (chat({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, ANSWER), "messages[0].content[0]",
     "holds audio; jobs train on text and on images as parts of the type image_url"),
    (chat({"role": "user", "content": [{"image": "/etc/passwd"}]}, ANSWER), "messages[0].content[0]", "an image"),
    (chat({"role": "user", "content": "<image>\nq"}, ANSWER), "", "the marker <image> stands for media"),
    ({"prompt": "a"}, "completion", "missing"),
    ({"prompt": "", "completion": "b"}, "prompt", "not empty"),
    (PAIR, "input", "no key"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "field", "reason"), BAD)
def test_group_10_a_bad_row_is_named(tmp_path, row, field, reason):
    found = checked(tmp_path, row)
    (problem,) = found.problems
    assert (problem.line, problem.field) == (5, field), problem
    assert reason in problem.reason, problem
    error = found.error("file-abc", "training_file")
    assert (error["code"], error["param"]) == ("invalid_training_file", "training_file")
    assert error["message"].startswith("Invalid file file-abc: line 5: ")
    assert str(tmp_path) not in error["message"]


@pytest.mark.parametrize(
    ("row", "field", "reason"),
    [
        (GOOD, "messages", "no key"),
        (
            {**PAIR, "input": {"messages": [{**ASKED, "content": [{"type": "input_image", "image_url": PNG}]}]}},
            "input.messages[0].content[0]",
            "jobs of this method train on text alone",
        ),
        ({**PAIR, "input": {"messages": [seen(PNG)]}}, "input." + IMAGE, "jobs of this method train on text alone"),
        (
            {**PAIR, "input": {"messages": [{**ASKED, "content": "<image>\nq"}]}},
            "",
            "the marker <image> stands for media",
        ),
        ({**PAIR, "preferred_completion": []}, "preferred_completion", "no key"),
        ({**PAIR, "input": {"messages": [ASKED, ANSWER]}}, "input.messages[1].role", "answer it"),
        ({**PAIR, "preferred_output": [ANSWER, ANSWER]}, "preferred_output", "one message"),
        ({**PAIR, "preferred_output": [ASKED]}, "preferred_output", "one message"),
        ({**PAIR, "non_preferred_output": [ANSWER]}, "", "the same"),
        ({"input": {"messages": [ASKED]}, "preferred_output": [ANSWER]}, "non_preferred_output", "missing"),
        ({**PAIR, "input": [ASKED]}, "input", "object"),
        (
            {
                **PAIR,
                "input": {"messages": [ASKED], "tools": [TOOL], "parallel_tool_calls": False},
                "preferred_output": [{**CALLED, "tool_calls": [CALL, {**CALL, "id": "2"}]}],
            },
            "preferred_output[0].tool_calls",
            "several calls",
        ),
    ],
)
def test_group_10_bad_pairs(tmp_path, row, field, reason):
    (problem,) = checked(tmp_path, row, "dpo").problems
    assert (problem.line, problem.field) == (5, field), problem
    assert reason in problem.reason


def test_images_are_of_models_that_see_and_of_so_many_rows(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([json.dumps(chat(seen(PNG), ANSWER))] * 12))
    (first, *_) = check_file(path, "supervised", blind="the model 'm' sees none").problems
    assert str(first) == f"line 1: {IMAGE}: holds an image; the model 'm' sees none"
    monkeypatch.setattr(row_images, "MOST_ROWS", 10)
    problems = check_file(path, "supervised").problems
    assert [problem.line for problem in problems] == [11, 12]
    assert "holds an image, as 10 rows before it do" in problems[0].reason
    monkeypatch.setattr(row_images, "MOST_BYTES", 100)
    assert "bytes, and none may have more than 100" in check_file(path, "supervised").problems[0].reason


def test_what_a_long_line_holds_is_counted_before_it_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr("dstune.finetuning.rows.UNCOUNTED_BYTES", 1000)
    nested = checked(tmp_path, '{"messages": [' + "[" * 100 + "0" * 2000 + "]" * 100 + "]}").problems[0].reason
    assert nested == "the line has more than 1000 bytes and is nested more than 64 deep"


@pytest.mark.parametrize(
    ("config", "settings", "reason"),
    [
        ({"model_type": "llama"}, True, "the model 'm' sees none: it has no tower"),
        ({"model_type": "other", "text_config": {}, "vision_config": {}}, True, "and the model 'm' is other"),
        ({"model_type": "llava", "text_config": {}, "vision_config": {}}, False, "has no processor_config.json"),
        ({"model_type": "llava", "text_config": {}, "vision_config": {}}, True, ""),
    ],
)
def test_which_models_see(tmp_path, config, settings, reason):
    (tmp_path / "config.json").write_text(json.dumps(config))
    if settings:
        (tmp_path / "processor_config.json").write_text("{}")
    found = row_images.why_blind(str(tmp_path), None, "m")
    assert (reason in found) if reason else not found


def test_group_10_nine_rows_are_too_few(tmp_path):
    assert checked(tmp_path, GOOD, count=9).problems == []
    error = checked(tmp_path, GOOD, count=8).error("file-a", "training_file")
    assert error == {
        "code": "invalid_n_examples",
        "message": "Training file has 9 example(s), but must have at least 10 examples",
        "param": "training_file",
    }
    path = tmp_path / "empty"
    path.write_text("\n")
    assert check_file(path, "supervised").error("file-a", "training_file")["code"] == "invalid_n_examples"


def test_group_10_marks_line_ends_and_what_is_no_text(tmp_path):
    path = tmp_path / "rows.jsonl"
    line = json.dumps(GOOD).encode()
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join([line] * 10) + b"\r\n\r\n")
    assert (check_file(path, "supervised").rows, check_file(path, "supervised").problems) == (10, [])
    written = tmp_path / "written.jsonl"
    assert write_rows(path, written, "supervised") == 10
    assert [json.loads(one) for one in written.read_text().splitlines()] == [GOOD] * 10
    path.write_bytes(b"\n".join([line, b"", line, b"\xff", *[line] * 8]))
    problems = check_file(path, "supervised").problems
    assert [(one.line, one.reason) for one in problems] == [(2, "the line is empty"), (4, "is not UTF-8, at byte 1")]
    path.write_bytes(b"{\n" * 100)
    assert len(check_file(path, "supervised").problems) == 20
    assert "; and 15 more" in check_file(path, "supervised").error("file-a", "training_file")["message"]


def test_a_line_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr("dstune.finetuning.rows.LINE_BYTES", 1000)
    path = tmp_path / "rows.jsonl"
    line = json.dumps(GOOD).encode()
    path.write_bytes(b"\n".join([line] * 5 + [b"x" * 5000] + [line] * 5))
    (problem,) = check_file(path, "supervised").problems
    assert (problem.line, problem.reason) == (6, "the line has more than 1000 bytes")


def test_pairs_as_dstune_reads_them(tmp_path):
    path, written = tmp_path / "pairs.jsonl", tmp_path / "written.jsonl"
    row = {**PAIR, "input": {"messages": [ASKED], "tools": [TOOL]}}
    path.write_text(json.dumps(row) + "\n")
    assert write_rows(path, written, "dpo") == 1
    assert json.loads(written.read_text()) == {
        "prompt": [ASKED], "chosen": PAIR["preferred_output"], "rejected": PAIR["non_preferred_output"], "tools": [TOOL],
    }  # fmt: skip


def test_dstune_reads_what_is_written(tmp_path):
    """The rows that this lets through are those that the job's own reader takes, values and all."""
    from dstune.data.messages import conversation_of, conversation_row

    row = chat(ASKED, {**CALLED, "content": None}, RESULT, {**ANSWER, "weight": 0}, ASKED, ANSWER, tools=[TOOL])
    path, written = tmp_path / "rows.jsonl", tmp_path / "written.jsonl"
    path.write_text(json.dumps(row) + "\n")
    write_rows(path, written, "supervised")
    read = json.loads(written.read_text())
    made = conversation_row(conversation_of(read["messages"], "messages"), read, needs_answer=True)
    assert made["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"at": 1}
    assert made["messages"][3]["weight"] == 0
