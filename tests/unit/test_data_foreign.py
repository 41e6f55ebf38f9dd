"""Rows as other tools have them (LLaMA-Factory, ms-swift, axolotl, TRL), read without mapping or refused by name; ours, in
the shapes that their files have. `benchmarks/foreign_data.py` reads the files themselves."""

from __future__ import annotations

import datetime
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from unit.data_helpers import byte_tokenizer, data_run, prepared, refusal_of, write_jsonl

from dstune.config.data_schema import SourceConfig, SplitConfig
from dstune.core.errors import UserError
from dstune.core.rank_env import RankEnv
from dstune.data import sources
from dstune.data.build import prepare
from dstune.data.collate import NO_TARGET
from dstune.data.formats import check_task, recognise
from dstune.data.media import marker_in
from dstune.data.rows import RowError, normalise, stored
from dstune.data.tokenize import RowTokenizer
from dstune.launch.first_rows import first_row_problems
from dstune.protocols.task import TaskConfig
from dstune.tasks.causal_lm.config import CausalLmConfig
from dstune.tasks.chat.config import ChatConfig
from dstune.tasks.preference.config import PreferenceConfig, PreferenceLoss
from dstune.tasks.reward.config import RewardConfig

CHAT, TEXT = ChatConfig(template_date="2025-03-09"), CausalLmConfig()
PAIRS = PreferenceConfig(template_date="2025-03-09")
JUDGED = PreferenceConfig(loss=PreferenceLoss.kto, template_date="2025-03-09")
NOTHING_HELD_OUT = SplitConfig(validation=0.0)


def said(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


S, U, A = said("system", "Be brief."), said("user", "Hi"), said("assistant", "Yes")
U2, A2 = said("user", "And now?"), said("assistant", "Still yes")
SCHEMA = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def parts(*given: tuple[str, str]) -> list[dict[str, str]]:
    """Content as LLaMA-Factory's v1 has it."""
    return [{"type": kind, "value": value} for kind, value in given]


def read(row: dict[str, Any], task: TaskConfig) -> tuple[str, dict[str, Any]]:
    fmt = recognise(row, {}, "auto", task, "rows.jsonl:1")
    check_task(fmt, row, {}, "auto", task, "rows.jsonl:1")
    return fmt, normalise(row, fmt, {}, task)


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
            said("tool", "2"),
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
        {
            "messages": [
                U,
                said("tool_call", '{"name": "f", "arguments": {"x": 1}}'),
                said("tool_response", "2"),
                A,
            ]
        },
        "messages",
        [U, {"role": "assistant", "tool_calls": [CALL]}, said("tool", "2"), A],
    ),
    (
        "several calls as ms-swift has them",
        {
            "messages": [
                U,
                said("tool_call", '{"name": "f", "arguments": {"x": 1}}', loss=True),
                said("tool_call", '{"name": "f", "arguments": {"x": 1}}'),
                said("tool_response", "2"),
                said("tool_response", "2"),
                A,
            ]
        },
        "messages",
        [U, {"role": "assistant", "tool_calls": [CALL, CALL]}, said("tool", "2"), said("tool", "2"), A],
    ),
    (
        "a text and a call behind it, as ms-swift has them",
        {
            "messages": [
                U,
                {**A, "loss": False},
                said("tool_call", '{"name": "f", "arguments": {"x": 1}}', loss=0),
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
NO = said("assistant", "No")
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
        (
            {"messages": [U2, A2, U, A], "label": True},
            {"messages": [U2, {**A2, "weight": 0}, U, A], "desirable": True},
        ),
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
        ({"messages": [U, A], "images": ["a.jpg"]}, "column 'images' holds images"),
        ({"messages": [U, A], "videos": ["a.mp4"], "audios": []}, "column 'videos' holds videos"),
        ({"query": "Hi", "response": "Yes", "audios": ["a.mp3"]}, "column 'audios' holds audio"),
        (
            {"prompt": "Hi", "completion": "Yes", "image": {"path": "a.jpg", "bytes": None}},
            "column 'image' holds images",
        ),
        ({"messages": [{**U, "images": ["a.jpg"]}, A]}, r"message 1 \(user\): the key 'images' holds images"),
        ({"messages": [said("user", "Who is it?<image>"), A]}, "the marker <image> stands for media"),
        ({"query": "<img>https://x.y/a.jpeg</img>Who?", "response": "Yes"}, "the marker <img> stands for media"),
        ({"messages": [{"role": "user", "content": parts(("image_url", "a.jpg"))}, A]}, "holds an image"),
        ({"messages": [{"role": "user", "content": [{"image": "a.jpg"}, {"text": "Who?"}]}, A]}, "holds an image"),
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
        {"messages": [said("user", "Write `<image>` in XML: <image>a.png</image>, <img src='a.png'>"), A]},
        {"messages": [said("user", "<video controls><source src='a.mp4'></video>"), A]},
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


def test_a_pair_of_ms_swift_is_read_whole(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": [U, A], "rejected_response": "No"}] * 3)
    config = data_run(path, task=PAIRS, split=NOTHING_HELD_OUT)
    data = prepared(config, byte_tokenizer(), tmp_path / "cache")
    assert data.report["train"].get("unread_columns", {}) == {}
    tokenizer = byte_tokenizer()
    for name, text in (("labels", "Yes<|im_end|>"), ("rejected_labels", "No<|im_end|>")):
        assert tokenizer.decode([one for one in data.train.table[0][name] if one != NO_TARGET]) == text


FUNCTION = {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}, "y": {}}}}


@pytest.mark.parametrize("task", [CHAT, PAIRS], ids=["chat", "pairs"])
def test_an_argument_that_is_null_is_trained_where_the_function_has_it(tmp_path, task):
    def called(arguments):
        call = {"type": "function", "id": None, "function": {"name": "f", "arguments": arguments}}
        return {"role": "assistant", "content": None, "tool_calls": [call]}

    def arguments_of(row):
        row = normalise(row, recognise(row, {}, "auto", task, "x"), {}, task)
        (call,) = (row["messages"] if "messages" in row else row["chosen"])[-1]["tool_calls"]
        assert "id" not in call
        return call["function"]["arguments"]

    def row_of(arguments, **more):
        if task is CHAT:
            return {"messages": [U, called(arguments)], **more}
        return {"prompt": [U], "chosen": [called(arguments)], "rejected": [called({"x": 9})], **more}

    given = {"x": 1, "y": None, "of another function": None}
    assert arguments_of(row_of(given)) == given
    assert arguments_of(row_of(given, tools=[FUNCTION])) == {"x": 1, "y": None}
    assert arguments_of(row_of(json.dumps(given))) == given
    # A table gives each object the keys of all.
    rows = [row_of({"x": 1, "y": None}), row_of({"x": None, "y": 2})]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (file,) = sources.expand(str(tmp_path / "rows.parquet"), "data.train")
    assert [arguments_of(row.fields) for row in sources.read(file)] == [{"x": 1}, {"y": 2}]


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
    inline = said("assistant", "<think>\nHm.\n</think>\n\nYes", reasoning_content="Hm.")
    with pytest.raises(
        RowError, match=r"message 2 \(assistant\) has reasoning in its content and as reasoning_content"
    ):
        read({"messages": [U, inline]}, CHAT)
    twice = {**A, "reasoning": "Hm.", "reasoning_content": "Hm.\n", "thinking": None}
    assert read({"messages": [U, twice]}, CHAT)[1]["messages"][1]["reasoning_content"] == "Hm.\n"
    read({"messages": [U, said("assistant", "A <think> tag is closed by </think>.", reasoning_content="Hm.")]}, CHAT)


@pytest.mark.parametrize(("given", "margin"), [("1.5", 1.5), ("-2", -2.0), (3, 3.0), ("", None)])
def test_a_margin_of_a_csv_file_is_a_number(given, margin):
    row = {"prompt": "Hi", "chosen": "Yes", "rejected": "No", "margin": given}
    assert read(row, RewardConfig(template_date="2025-03-09"))[1].get("margin") == margin


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


def test_json_in_a_table_is_what_it_says(tmp_path):
    """As `datasets` stores objects that differ from row to row."""
    from datasets import Dataset, Features, Json, List, Value

    call = {"type": "function", "function": {"name": "f", "arguments": {"x": None, "y": [1, {"z": "1"}]}}}
    schemas = [
        {"name": "f", "parameters": {"type": "object", "properties": {"x": {"default": None}, "y": {"type": "array"}}}},
        {"name": "g", "parameters": {"type": "object", "properties": {}}},
    ]
    row = {
        "messages": [{**U, "tool_calls": None}, {"role": "assistant", "content": None, "tool_calls": [call]}],
        "tools": [{"type": "function", "function": schema} for schema in schemas],
    }
    deep = {"type": Value("string"), "function": {"name": Value("string"), "arguments": Json()}}
    deep_tool = {"type": Value("string"), "function": {"name": Value("string"), "parameters": Json()}}
    as_text = {
        "messages": [U, {**row["messages"][1], "tool_calls": [json.dumps(call)]}],
        "tools": [*map(json.dumps, row["tools"])],
    }
    _, rendered = read(as_text, CHAT)  # as a pyarrow reads it that has no type for JSON
    assert (rendered["messages"][1]["tool_calls"], rendered["tools"]) == ([call], row["tools"])
    for calls, tools in ((Json(), Json()), (List(Json()), List(Json())), (List(deep), List(deep_tool))):
        message = {"role": Value("string"), "content": Value("string"), "tool_calls": calls}
        data = Dataset.from_list([row], features=Features({"messages": List(message), "tools": tools}))
        data.to_parquet(str(tmp_path / "rows.parquet"))
        data.save_to_disk(str(tmp_path / "saved"))
        for name in ("rows.parquet", "saved"):
            (file,) = sources.expand(str(tmp_path / name), "data.train")
            (found,) = sources.read(file)
            _, rendered = read(found.fields, CHAT)
            assert rendered["messages"][1]["tool_calls"] == [call], (name, calls)
            assert rendered["tools"] == row["tools"], (name, tools)


def test_a_map_in_a_table_is_an_object(tmp_path):
    properties = pa.map_(pa.string(), pa.struct([("type", pa.string()), ("items", pa.map_(pa.string(), pa.string()))]))
    table = pa.table(
        {
            "messages": [[U, A]],
            "tools": pa.array(
                [
                    [
                        {
                            "name": "f",
                            "parameters": {"properties": [("x", {"type": "array", "items": [("type", "null")]})]},
                        }
                    ]
                ],
                pa.list_(pa.struct([("name", pa.string()), ("parameters", pa.struct([("properties", properties)]))])),
            ),
        }
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    (file,) = sources.expand(str(tmp_path / "rows.parquet"), "data.train")
    (found,) = sources.read(file)
    schema = {"properties": {"x": {"type": "array", "items": {"type": "null"}}}}
    assert read(found.fields, CHAT)[1]["tools"] == [
        {"type": "function", "function": {"name": "f", "parameters": schema}}
    ]


def test_times_that_a_table_has_inside_of_messages_are_text(tmp_path):
    at = datetime.datetime(2023, 4, 9, 0, 2, 53, tzinfo=datetime.UTC)
    pq.write_table(
        pa.Table.from_pylist([{"messages": [{**U, "timestamp": at}, {**A, "day": at.date()}]}]), tmp_path / "a.parquet"
    )
    (file,) = sources.expand(str(tmp_path / "a.parquet"), "data.train")
    (found,) = sources.read(file)
    expected = [{**U, "timestamp": "2023-04-09T00:02:53+00:00"}, {**A, "day": "2023-04-09"}]
    assert json.loads(stored(read(found.fields, CHAT)[1]))["messages"] == expected


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
        ({"input": "Hi", "output": "Yes"}, CHAT, r"'data\.columns={prompt: input, completion: output}'"),
    ],
)
def test_the_fix_names_the_task_that_reads_the_rows(row, task, fix):
    with pytest.raises(UserError, match=f"(?s){fix}"):
        read(row, task)


# -- told or refused in a run -----------------------------------------------------------------------------------------


def test_a_column_that_looks_like_content_and_is_not_read_is_counted(tmp_path):
    rows = [{"prompt": f"{n}?", "completion": "Yes", "context": "c" if n < 3 else "", "id": n} for n in range(5)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    report = prepared(data_run(path, split=NOTHING_HELD_OUT), byte_tokenizer(), tmp_path / "cache").report["train"]
    assert report["unread_columns"] == {"context": 3}


def test_a_mapped_column_that_the_format_does_not_read_is_counted(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "Hello", "stars": 3}])
    config = data_run(path, task=TEXT, split=NOTHING_HELD_OUT, columns={"label": "stars"})
    assert prepared(config, byte_tokenizer(), tmp_path / "cache").report["train"]["unread_columns"] == {"stars": 1}


def test_a_mapped_column_that_no_row_has_is_refused_where_another_format_fits_too(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": [U, A], "question": "Hi", "reply": "Yes"}])
    columns = {"prompt": "question", "completion": "replay"}
    (problem,) = refusal_of(data_run(path, columns=columns, split=NOTHING_HELD_OUT), byte_tokenizer(), tmp_path)
    assert (problem.where, problem.value) == ("data.columns.completion", "replay")
    assert problem.fix == "'data.columns={prompt: question, completion: reply}'"
    columns = {"system": "persona"}  # an optional role, in a later row alone
    rows = [{"prompt": "Hi", "completion": "Yes"}, {"prompt": "Hi", "completion": "Yes", "persona": "Be brief."}]
    path = write_jsonl(tmp_path / "more.jsonl", rows)
    assert prepared(data_run(path, columns=columns, split=NOTHING_HELD_OUT), byte_tokenizer(), tmp_path / "cache")
    config = data_run(path, columns={"system": "character"}, split=NOTHING_HELD_OUT)
    (problem,) = refusal_of(config, byte_tokenizer(), tmp_path)
    assert problem.where == "data.columns.system"
    # Rows that a finished run is evaluated on, or one row alone, may lack it.
    assert prepare(config, byte_tokenizer(), RankEnv(0, 1, 0, 1, "environment"), tmp_path / "cache", trains=False)


def test_columns_of_a_mixture_name_a_column_of_a_source(tmp_path):
    paths = {
        "faq": write_jsonl(tmp_path / "faq.jsonl", [{"question": "Hi", "reply": "Yes"}]),
        "chat": write_jsonl(tmp_path / "chat.jsonl", [{"messages": [U2, A2]}]),
    }
    shared = {"prompt": "question", "completion": "reply"}
    mixture = {name: SourceConfig(path=str(path)) for name, path in paths.items()}
    config = data_run("x", columns=shared, mixture=mixture, split=NOTHING_HELD_OUT)
    assert len(prepared(config, byte_tokenizer(), tmp_path / "cache").train.table) == 2
    own = {**mixture, "chat": SourceConfig(path=str(paths["chat"]), columns={"tools": "schemas"})}
    config = data_run("x", columns=shared, mixture=own, split=NOTHING_HELD_OUT)
    (problem,) = refusal_of(config, byte_tokenizer(), tmp_path)
    assert (problem.where, problem.value) == ("data.mixture.chat.columns.tools", "schemas")


def test_a_table_without_the_mapped_column_is_refused_before_any_rank_starts(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,completion\nHi,Yes\n")
    config = data_run(tmp_path / "rows.csv", columns={"system": "persona"})
    (problem,) = first_row_problems(config, "train", "data.train")
    assert problem.where == "data.columns.system"
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "Hi", "completion": "Yes"}])  # later rows may have it
    assert first_row_problems(data_run(path, columns={"system": "persona"}), "train", "data.train") == []


def test_data_columns_choose_the_format():
    row = {"messages": [U, A], "question": "Hi", "reply": "Yes"}
    columns = {"prompt": "question", "completion": "reply"}
    assert recognise(row, columns, "auto", CHAT, "rows.jsonl:1") == "prompt_completion"


def test_what_is_trained_of_rows_of_other_tools(tmp_path):
    rows = [case[1] for case in OF_CHAT if case[0] in ("LLaMA-Factory v1, a turn that is not trained",)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    tokenizer = byte_tokenizer()
    data = prepared(data_run(path, split=NOTHING_HELD_OUT), tokenizer, tmp_path / "cache")
    labels = data.train.table[0]["labels"]
    assert tokenizer.decode([label for label in labels if label != NO_TARGET]) == "Yes<|im_end|>"


# -- calls as a template takes them -----------------------------------------------------------------------------------

HEAD = "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
TAIL = (
    "<|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALLS = "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ARGUMENTS}}]{% endfor %}"
REFUSE = "{{ raise_exception('calls and a content') }}"
WITHOUT = (
    HEAD + "{% if m.tool_calls and m.content is defined %}" + REFUSE + "{% endif %}{{ m.content or '' }}" + CALLS + TAIL
)
EMPTY = HEAD + "{{ '' + m.content }}" + CALLS + TAIL


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}], ids=["absent", "null", "empty"])
@pytest.mark.parametrize("arguments", [{"x": 1}, '{"x": 1}'], ids=["object", "text"])
@pytest.mark.parametrize("template", [WITHOUT, EMPTY], ids=["without", "with"])
@pytest.mark.parametrize("printed", ["{ c.function.arguments | tojson }", "{ '' + c.function.arguments }"])
def test_the_template_gets_content_and_arguments_as_it_takes_them(content, arguments, template, printed):
    tokenizer = byte_tokenizer(template.replace("{ARGUMENTS}", printed))
    encode = RowTokenizer(tokenizer, CHAT, "messages", 1000)
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [U, {"role": "assistant", **content, "tool_calls": [call]}, said("tool", "2", tool_call_id="1"), A]
    (sample,) = encode.samples([normalise({"messages": messages}, "messages", {})], [0])
    assert sample.problem == ""
    assert tokenizer.decode(sample.labels[sample.labels != NO_TARGET]) == '[f {"x": 1}]<|im_end|>Yes<|im_end|>'


def test_arguments_of_a_call_are_written_once():
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1, "x": 2}'}}
    with pytest.raises(RowError, match="the key 'x' stands twice in an object"):
        read({"messages": [U, {"role": "assistant", "tool_calls": [call]}]}, CHAT)
