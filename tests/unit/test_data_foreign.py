"""Rows as other tools have them (LLaMA-Factory, ms-swift, axolotl, TRL), read without mapping or refused by name; ours, in
the shapes that their files have. `benchmarks/foreign_data.py` reads the files themselves."""

from __future__ import annotations

import json
from typing import Any

import pytest
from unit.data_helpers import byte_tokenizer, data_run, prepared, write_jsonl
from unit.foreign_rows import A2, CALL, CHAT, JUDGED, NOTHING_HELD_OUT, PAIRS, SCHEMA, TEXT, U2, A, S, U, read, turn

from dstune.core.errors import UserError
from dstune.data.collate import NO_TARGET
from dstune.data.formats import check_task, recognise
from dstune.data.media import marker_in
from dstune.data.rows import RowError, normalise
from dstune.tasks.reward.config import RewardConfig


def parts(*given: tuple[str, str]) -> list[dict[str, str]]:
    """Content as LLaMA-Factory's v1 has it."""
    return [{"type": kind, "value": value} for kind, value in given]


V1 = [
    {"role": "system", "content": parts(("text", "Be brief.")), "loss_weight": 0.0},
    {"role": "user", "content": parts(("text", "Hi")), "loss_weight": 0.0},
    {"role": "assistant", "content": parts(("text", "Yes")), "loss_weight": 1.0},
]
V1_CALLS = [
    {"role": "user", "content": parts(("text", "Hi"))},
    {
        "role": "assistant",
        "content": parts(("reasoning", "Hm."), ("tool_call", '{"name": "f", "arguments": {"x": 1}}')),
    },
    {"role": "tool", "content": parts(("text", "2"))},
    {"role": "assistant", "content": parts(("reasoning", "So."), ("text", "Yes"))},
]
OF_CHAT: list[tuple[str, dict[str, Any], str, list[dict[str, Any]]]] = [
    ("LLaMA-Factory v1", {"messages": V1}, "messages", [S, U, A]),
    (
        "LLaMA-Factory v1, a turn that is not trained",
        {"messages": [*V1[:2], {**V1[2], "loss_weight": 0.0}, V1[1], V1[2]]},
        "messages",
        [S, U, {**A, "weight": 0}, U, A],
    ),
    (
        "LLaMA-Factory v1, reasoning and calls",
        {"messages": V1_CALLS, "tools": json.dumps([SCHEMA])},
        "messages",
        [
            U,
            {"role": "assistant", "reasoning_content": "Hm.", "tool_calls": [CALL]},
            turn("tool", "2"),
            {**A, "reasoning_content": "So."},
        ],
    ),
    ("ms-swift", {"query": "Hi", "response": "Yes", "system": "Be brief."}, "prompt_completion", [S, U, A]),
    (
        "ms-swift, history",
        {"query": "And now?", "response": "Still yes", "history": [["Hi", "Yes"]]},
        "prompt_completion",
        [U, A, U2, A2],
    ),
    (
        "ms-swift, history as JSON text",
        {"query": "And now?", "response": "Still yes", "history": '[["Hi", "Yes"]]', "system": None},
        "prompt_completion",
        [U, A, U2, A2],
    ),
    ("ms-swift, loss", {"messages": [U, {**A, "loss": False}, U2, A2]}, "messages", [U, {**A, "weight": 0}, U2, A2]),
    (
        "human and assistant",
        {
            "system": "Be brief.",
            "conversation": [{"human": "Hi", "assistant": "Yes"}, {"human": "And now?", "assistant": "Still yes"}],
        },
        "conversations",
        [S, U, A, U2, A2],
    ),
    ("a system column beside messages", {"messages": [U, A], "system": "Be brief."}, "messages", [S, U, A]),
    ("the system text twice", {"messages": [S, U, A], "system": "Be brief."}, "messages", [S, U, A]),
    (
        "Alpaca with tools",
        {"instruction": "Hi", "output": "Yes", "tools": [SCHEMA], "history": [["And now?", "Still yes"]]},
        "alpaca",
        [U2, A2, U, A],
    ),
    ("a prompt as messages", {"prompt": [S, U], "completion": [A]}, "prompt_completion", [S, U, A]),
    (
        "calls as ms-swift has them",
        {"messages": [U, turn("tool_call", '{"name": "f", "arguments": {"x": 1}}'), turn("tool_response", "2"), A]},
        "messages",
        [U, {"role": "assistant", "tool_calls": [CALL]}, turn("tool", "2"), A],
    ),
    (
        "several calls as ms-swift has them",
        {
            "messages": [
                U,
                turn("tool_call", '{"name": "f", "arguments": {"x": 1}}', loss=True),
                turn("tool_call", '{"name": "f", "arguments": {"x": 1}}'),
                turn("tool_response", "2"),
                turn("tool_response", "2"),
                A,
            ]
        },
        "messages",
        [U, {"role": "assistant", "tool_calls": [CALL, CALL]}, turn("tool", "2"), turn("tool", "2"), A],
    ),
    (
        "a text and a call behind it, as ms-swift has them",
        {
            "messages": [
                U,
                {**A, "loss": False},
                turn("tool_call", '{"name": "f", "arguments": {"x": 1}}', loss=0),
                U2,
                A2,
            ]
        },
        "messages",
        [U, {**A, "tool_calls": [CALL], "weight": 0}, U2, A2],
    ),
    (
        "an object of lists, as Sequence of datasets has it",
        {"conversations": {"from": ["human", "gpt"], "value": ["Hi", "Yes"]}},
        "conversations",
        [U, A],
    ),
    ("no tools, as JSON text", {"messages": [U, A], "tools": "null"}, "messages", [U, A]),
]


@pytest.mark.parametrize(("row", "fmt", "expected"), [case[1:] for case in OF_CHAT], ids=[case[0] for case in OF_CHAT])
def test_conversations_of_other_tools(row, fmt, expected):
    found, rendered = read(row, CHAT)
    assert (found, rendered["messages"]) == (fmt, expected)
    if row.get("tools") not in (None, "null"):
        assert rendered["tools"] == [{"type": "function", "function": SCHEMA}]


GPT, BAD = {"from": "gpt", "value": "Yes"}, {"from": "gpt", "value": "No"}
HUMAN = {"from": "human", "value": "Hi"}
NO = turn("assistant", "No")
OF_PAIRS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    (
        "LLaMA-Factory dpo",
        {"conversations": [HUMAN], "chosen": GPT, "rejected": BAD},
        {"prompt": [U], "chosen": [A], "rejected": [NO]},
    ),
    (
        "LLaMA-Factory dpo, several turns under a system text",
        {"conversations": [HUMAN, GPT, HUMAN], "chosen": GPT, "rejected": BAD, "system": "Be brief."},
        {"prompt": [S, U, A, U], "chosen": [A], "rejected": [NO]},
    ),
    (
        "LLaMA-Factory v1",
        {"chosen_messages": V1, "rejected_messages": [*V1[:2], {**V1[2], "content": parts(("text", "No"))}]},
        {"prompt": [S, U], "chosen": [A], "rejected": [NO]},
    ),
    (
        "ms-swift, messages",
        {"messages": [S, U, A], "rejected_response": "No"},
        {"prompt": [S, U], "chosen": [A], "rejected": [NO]},
    ),
    (
        "ms-swift, query and response",
        {"query": "Hi", "response": "Yes", "rejected_response": "No", "history": [["And now?", "Still yes"]]},
        {"prompt": [U2, A2, U], "chosen": [A], "rejected": [NO]},
    ),
    (
        "ms-swift, two conversations",
        {"messages": [U, A], "rejected_messages": [U, NO]},
        {"prompt": [U], "chosen": [A], "rejected": [NO]},
    ),
    (
        "Alpaca ranking",
        {"instruction": "Hi", "input": "you", "chosen": "Yes", "rejected": "No"},
        {"prompt": "Hi\nyou", "chosen": "Yes", "rejected": "No"},
    ),
    (
        "Alpaca ranking with history",
        {"instruction": "Hi", "input": "", "history": [["And now?", "Still yes"]], "chosen": "Yes", "rejected": "No"},
        {"prompt": [U2, A2, U], "chosen": [A], "rejected": [NO]},
    ),
    (
        "a question under a system text",
        {"system": "Be brief.", "question": "Hi", "chosen": "Yes", "rejected": "No"},
        {"prompt": [S, U], "chosen": [A], "rejected": [NO]},
    ),
    (
        "hh-rlhf",
        {
            "chosen": "\n\nHuman: And now?\n\nAssistant: Still yes\n\nHuman: Hi\n\nAssistant: Yes",
            "rejected": "\n\nHuman: And now?\n\nAssistant: Still yes\n\nHuman: Hi\n\nAssistant: No",
        },
        {"prompt": [U2, A2, U], "chosen": [A], "rejected": [NO]},
    ),
]


@pytest.mark.parametrize(("row", "expected"), [case[1:] for case in OF_PAIRS], ids=[case[0] for case in OF_PAIRS])
@pytest.mark.parametrize("task", [PAIRS, RewardConfig(template_date="2025-03-09")], ids=["preference", "reward"])
def test_pairs_of_other_tools(row, expected, task):
    assert read(row, task) == ("preference", expected)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [U, A], "label": False}, {"messages": [U, A], "desirable": False}),
        ({"conversations": [HUMAN, GPT], "kto_tag": True}, {"messages": [U, A], "desirable": True}),
        ({"messages": [U2, A2, U, A], "label": True}, {"messages": [U2, {**A2, "weight": 0}, U, A], "desirable": True}),
        (
            {"instruction": "Hi", "input": "you", "output": "Yes", "kto_tag": False},
            {"prompt": "Hi\nyou", "completion": "Yes", "desirable": False},
        ),
        (
            {"query": "Hi", "response": "Yes", "label": 1, "history": [["And now?", "Still yes"]]},
            {"messages": [U2, {**A2, "weight": 0}, U, A], "desirable": True},
        ),
    ],
)
def test_judged_answers_of_other_tools(row, expected):
    assert read(row, JUDGED)[1] == expected


def test_messages_as_json_text_are_messages_and_other_text_stays_text():
    of_csv = {"prompt": json.dumps([S, U]), "completion": json.dumps([A])}
    assert read(of_csv, CHAT)[1]["messages"] == [S, U, A]
    pair = {"prompt": json.dumps([U]), "chosen": json.dumps(A), "rejected": json.dumps([NO])}
    assert read(pair, PAIRS)[1] == {"prompt": [U], "chosen": [A], "rejected": [NO]}
    code = {"prompt": 'What is [{"value": 1}]?', "completion": '[{"value": 1}]'}
    assert read(code, CHAT)[1] == code


@pytest.mark.parametrize(
    ("row", "task"),
    [
        ({"prompt": str([U]), "completion": "Yes"}, CHAT),
        ({"prompt": "Hi", "chosen": f"[{A}\n {A}]", "rejected": "No"}, PAIRS),
    ],
)
def test_messages_as_python_writes_them_are_no_text(row, task):
    with pytest.raises(RowError, match=r"is a list that is not JSON: .*; json\.dumps writes it"):
        read(row, task)


# -- refused by name --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [U, A], "videos": ["a.mp4"], "audios": []}, "column 'videos' holds videos"),
        ({"query": "Hi", "response": "Yes", "audios": ["a.mp3"]}, "column 'audios' holds audio"),
        ({"messages": [U, A], "images": ["https://x.y/a.jpg"]}, "column 'images' is the address"),
        ({"messages": [U, A], "images": [7]}, "column 'images' holds 7, which is no image"),
        ({"messages": [{**U, "images": ["a.jpg"]}, A]}, r"message 1 \(user\): the key 'images' holds images"),
        ({"messages": [turn("user", "Who is it?<image>"), A]}, "the marker <image> stands for media"),
        ({"query": "<img>https://x.y/a.jpeg</img>Who?", "response": "Yes"}, "the marker <img> stands for media"),
        (
            {"messages": [U, {"role": "assistant", "content": parts(("image_url", "a.jpg"))}]},
            "see images and write none",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}, A], "images": ["a", "b"]},
            "2 images and 1 place for",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}, A]}, "holds a video"),
        ({"messages": [{"role": "user", "content": [5]}, A]}, "has a part of type 'int'; only text is trained on"),
        ({"messages": [{"role": "user", "content": [{"type": 7}]}, A]}, "has a part of type '7'; only text"),
        ({"messages": [{"role": "user", "content": [None]}, A]}, "has a part of type 'NoneType'; only text"),
        ({"prompt": [U], "completion": [A], "history": [["a", "b"]]}, "'history' stands beside a prompt"),
        ({"messages": [S, U, A], "system": "Be long."}, "a system text stands in the column 'system' and"),
    ],
)
def test_what_would_be_dropped_is_refused(row, reason):
    with pytest.raises(RowError, match=reason):
        read(row, CHAT)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [U, A], "images": []},
        {"messages": [U, A], "images": None, "image": {"path": None, "bytes": None}},
        {"messages": [turn("user", "Write `<image>` in XML: <image>a.png</image>, <img src='a.png'>"), A]},
        {"messages": [turn("user", "<video controls><source src='a.mp4'></video>"), A]},
    ],
)
def test_text_about_media_and_empty_columns_are_text(row):
    assert read(row, CHAT)[1]["messages"] == row["messages"]


@pytest.mark.parametrize(
    ("text", "marker"),
    [
        ("<image>", "<image>"),
        ("Compare <image> with <image>.", "<image>"),
        ("<video>Why is it funny?", "<video>"),
        ("<video><audio>What is it about?", "<video>"),
        ("What is that sound?<audio>", "<audio>"),
        ("Listen:\n<audio>\nWhat is it?", "<audio>"),
        ("<img> a.png</img>What is it?", "<img>"),
        ("What does the <video> tag of HTML do?", ""),
        ("What does an <image> element of SVG do?", ""),
        ("<video>\n<source src='a.mp4'>\n</video>", ""),
        ("`<image>` and <img src='a.png'>", ""),
    ],
)
def test_markers_and_what_is_none(text, marker):
    assert marker_in(text) == marker


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "completion": "Yes", "label": False},
        {"prompt": "Hi", "completion": "Yes", "label": 1},
        {"messages": [U, A], "label": "true"},
        {"conversations": [HUMAN, GPT], "kto_tag": True},
        {"instruction": "Hi", "output": "Yes", "kto_tag": False},
    ],
)
@pytest.mark.parametrize("named", [False, True])
def test_judged_answers_are_no_chats(row, named):
    fmt = recognise(row, {}, "auto", CHAT, "rows.jsonl:1")
    with pytest.raises(
        UserError, match=r"(?s)rows\.jsonl:1: .*of another task than chat.*task=preference task\.loss=kto"
    ):
        check_task(fmt, row, {}, fmt if named else "auto", CHAT, "rows.jsonl:1")


def test_a_class_beside_a_chat_is_no_verdict():
    assert read({"prompt": "Hi", "completion": "Yes", "label": "greeting"}, CHAT)[0] == "prompt_completion"


def test_pairs_are_no_chats_unless_the_format_is_named():
    row = {"messages": [U, A], "chosen": [U, A], "rejected": [U, NO]}
    for each in (row, {"messages": [U, A], "rejected_response": "No"}):
        with pytest.raises(UserError, match=r"(?s)of another task than chat.*task=preference or task=reward"):
            read(each, CHAT)
    check_task("messages", row, {}, "messages", CHAT, "rows.jsonl:1")


def test_schemas_that_are_text_are_given_as_they_are():
    x = {"type": "integer", "default": None, "title": None}
    schema = {"name": "f", "parameters": {"type": "object", "properties": {"x": x}}}
    (tool,) = read({"messages": [U, A], "tools": json.dumps([schema])}, CHAT)[1]["tools"]
    assert tool["function"] == schema


@pytest.mark.parametrize("key", ["train", "training", "trainable", "masked", "mask", "loss_mask"])
def test_marks_of_other_tools_for_what_is_trained_are_not_passed_over(key):
    with pytest.raises(RowError, match=f"message 2 has the key '{key}'"):
        read({"messages": [U, {**A, key: False}, U2, A2]}, CHAT)


def test_reasoning_is_given_once():
    inline = turn("assistant", "<think>\nHm.\n</think>\n\nYes", reasoning_content="Hm.")
    with pytest.raises(
        RowError, match=r"message 2 \(assistant\) has reasoning in its content and as reasoning_content"
    ):
        read({"messages": [U, inline]}, CHAT)
    twice = {**A, "reasoning": "Hm.", "reasoning_content": "Hm.\n", "thinking": None}
    assert read({"messages": [U, twice]}, CHAT)[1]["messages"][1]["reasoning_content"] == "Hm.\n"
    read({"messages": [U, turn("assistant", "A <think> tag is closed by </think>.", reasoning_content="Hm.")]}, CHAT)


@pytest.mark.parametrize(("given", "margin"), [("1.5", 1.5), ("-2", -2.0), (3, 3.0), ("", None)])
def test_a_margin_of_a_csv_file_is_a_number(given, margin):
    row = {"prompt": "Hi", "chosen": "Yes", "rejected": "No", "margin": given}
    assert read(row, RewardConfig(template_date="2025-03-09"))[1].get("margin") == margin


@pytest.mark.parametrize("given", [pytest.param(10**400, id="huge"), "much", "inf", True, [1]])
def test_a_margin_that_is_no_finite_number_is_refused(given):
    row = {"prompt": "Hi", "chosen": "Yes", "rejected": "No", "margin": given}
    with pytest.raises(RowError, match="column 'margin' must be a number"):
        read(row, RewardConfig(template_date="2025-03-09"))


def test_a_conversation_as_a_python_literal_is_named():
    with pytest.raises(
        RowError, match=r"not JSON: .* at character 3; Python's str\(\) wrote it, json\.dumps writes JSON"
    ):
        read({"messages": str([U, A])}, CHAT)


def test_a_default_that_is_null_is_rendered():
    def of(properties):
        return [{"type": "function", "function": {"name": "f", "description": None, "parameters": properties}}]

    def rendered(properties):
        tools = of({"type": "object", "properties": properties})
        (tool,) = read({"messages": [U, A], "tools": tools}, CHAT)[1]["tools"]
        return tool["function"]["parameters"]["properties"]

    optional = {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None}
    assert rendered({"x": optional, "default": {"type": "string"}}) == {"x": optional, "default": {"type": "string"}}
    assert rendered({"x": {"default": {"y": None}, "enum": [None, 1]}}) == {
        "x": {"default": {"y": None}, "enum": [None, 1]}
    }
    # Beside nulls that no JSON Schema has it is a key that another object of a table had.
    assert rendered({"x": optional, "y": None}) == {"x": {"anyOf": optional["anyOf"]}}
    assert rendered({"x": {**optional, "items": None}}) == {"x": {"anyOf": optional["anyOf"]}}
    assert rendered({"x": optional, "default": None}) == {"x": {"anyOf": optional["anyOf"]}}


@pytest.mark.parametrize(
    ("row", "task", "fix"),
    [
        ({"messages": [U, A], "label": True}, PAIRS, "task=preference task.loss=kto reads these columns"),
        (
            {"conversations": [HUMAN], "chosen": GPT, "rejected": BAD},
            TEXT,
            "task=preference and task=reward read these",
        ),
        ({"response": "Yes"}, TEXT, r"'data\.columns={text: response}'"),
        ({"response": "Yes"}, CHAT, r"'data\.columns={prompt: NAME}'"),
        ({"question": "Hi", "answer": "Yes"}, CHAT, r"'data\.columns={prompt: question, completion: answer}'"),
        (
            {"question": "Hi", "context": "c", "answer": "Yes"},
            CHAT,
            r"'data\.columns={instruction: question, output: answer, input: context}'",
        ),
        (
            {"question": "Hi", "context": " ", "answer": "Yes"},
            CHAT,
            r"'data\.columns={prompt: question, completion: answer}'$",
        ),
        (
            {"question": "Hi", "context": "c", "answer": "Yes", "rationale": "r"},
            CHAT,
            r"completion: answer}'; 'context', 'rationale' are not read then: move their text into one of the columns that are",
        ),
        (
            {"question": "Hi", "context": "c", "answers": [], "rationale": "r"},
            CHAT,
            "task=question_answering reads these columns; 'rationale' is not read then: move its text",
        ),
        ({"input": "Hi", "output": "Yes"}, CHAT, r"'data\.columns={prompt: input, completion: output}'"),
    ],
)
def test_the_fix_names_the_task_that_reads_the_rows(row, task, fix):
    with pytest.raises(UserError, match=f"(?s){fix}"):
        read(row, task)


def test_what_is_trained_of_rows_of_other_tools(tmp_path):
    rows = [case[1] for case in OF_CHAT if case[0] in ("LLaMA-Factory v1, a turn that is not trained",)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    tokenizer = byte_tokenizer()
    data = prepared(data_run(path, split=NOTHING_HELD_OUT), tokenizer, tmp_path / "cache")
    labels = data.train.table[0]["labels"]
    assert tokenizer.decode([label for label in labels if label != NO_TARGET]) == "Yes<|im_end|>"


def test_a_list_of_messages_needs_no_name_but_takes_no_other_column_away():
    assert read({"": [U, A], "id": 3}, CHAT) == ("messages", {"messages": [U, A]})
    for beside in ({"context": "c"}, {"also": [U, A]}):
        with pytest.raises(UserError, match="missing column"):
            read({"turns": [U, A], **beside}, CHAT)
    mapped = {"messages": "turns"}
    fmt = recognise({"turns": [U, A], "context": "c"}, mapped, "auto", CHAT, "rows.jsonl:1")
    assert normalise({"turns": [U, A], "context": "c"}, fmt, mapped, CHAT) == {"messages": [U, A]}


def test_parameters_of_gemini_may_be_named_type():
    properties = {"type": {"type": "STRING", "enum": ["TYPE"]}, "items": {"type": "ARRAY", "items": {"type": "NUMBER"}}}
    declared = {"name": "f", "parameters": {"type": "OBJECT", "properties": properties, "required": ["type"]}}
    content = [{"role": "user", "parts": [{"text": "Hi"}]}, {"role": "model", "parts": [{"text": "Yes"}]}]
    row = read({"contents": content, "tools": [{"function_declarations": [declared]}]}, CHAT)[1]
    (tool,) = row["tools"]
    assert tool["function"]["parameters"] == {
        "type": "object",
        "properties": {
            "type": {"type": "string", "enum": ["TYPE"]},
            "items": {"type": "array", "items": {"type": "number"}},
        },
        "required": ["type"],
    }
    assert row["messages"] == [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]


def test_ids_of_gemini_stay_with_their_calls():
    calls = [{"functionCall": {"id": at, "name": "f", "args": {"x": at}}} for at in ("1", "2")]
    results = [{"functionResponse": {"id": at, "name": "f", "response": {"y": at}}} for at in ("2", "1")]
    content = [{"parts": [{"text": "Hi"}]}, {"role": "model", "parts": calls}, {"role": "function", "parts": results}]
    row = read({"contents": [*content, {"role": "model", "parts": [{"text": "Yes"}]}]}, CHAT)[1]
    _, called, *answered, _ = row["messages"]
    assert [call["id"] for call in called["tool_calls"]] == ["1", "2"]
    assert [(message["tool_call_id"], message["content"]) for message in answered] == [
        ("2", '{"y": "2"}'),
        ("1", '{"y": "1"}'),
    ]
