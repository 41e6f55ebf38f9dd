"""Rows of other tools in files, tables and whole runs: what is trained, counted or refused, and calls as templates take them."""

from __future__ import annotations

import datetime
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from unit.data_helpers import byte_tokenizer, data_run, prepared, refusal_of, write_jsonl
from unit.foreign_rows import A2, CHAT, NOTHING_HELD_OUT, PAIRS, TEXT, U2, A, U, read, turn

from dstune.config.data_schema import SourceConfig
from dstune.core.rank_env import RankEnv
from dstune.data import sources
from dstune.data.build import prepare
from dstune.data.collate import NO_TARGET
from dstune.data.formats import recognise
from dstune.data.messages import conversation_of
from dstune.data.rows import RowError, json_text, normalise
from dstune.data.tokenize import RowTokenizer
from dstune.launch.first_rows import first_row_problems


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
    # In JSON text somebody wrote it, and a server prints what its clients send.
    assert arguments_of(row_of(json.dumps(given), tools=[FUNCTION])) == given
    if task is CHAT:
        sent = row_of(json.dumps(given), tools=[FUNCTION])
        assert read(sent, CHAT)[1]["messages"] == conversation_of(sent["messages"], "messages"), "as a server reads it"
        as_text = json.dumps(row_of(given)["messages"])
        assert arguments_of({"messages": as_text, "tools": [FUNCTION]}) == given
        call = {"name": "f", "arguments": given}
        for conversation in (
            [{"role": "user", "value": "Hi"}, {"role": "function_call", "value": json.dumps(call)}],
            [U, {"role": "assistant", "content": [{"type": "tool_call", "value": json.dumps(call)}]}],
            [U, {"role": "assistant", "content": None, "tool_calls": [json.dumps(call)]}],
        ):
            assert arguments_of({"messages": conversation, "tools": [FUNCTION]}) == given
        answered = {"query": "Hi", "answers": json.dumps([call]), "tools": json.dumps([FUNCTION])}
        assert arguments_of(answered) == given
    # A table gives each object the keys of all.
    rows = [row_of({"x": 1, "y": None}), row_of({"x": None, "y": 2})]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (file,) = sources.expand(str(tmp_path / "rows.parquet"), "data.train")
    assert [arguments_of(row.fields) for row in sources.read(file)] == [{"x": 1}, {"y": 2}]


def test_a_null_that_somebody_wrote_in_a_table_is_trained(tmp_path):
    """In a map, and in a column that stores JSON; the function's schema lacks the argument, as in a row that a model made."""
    from datasets import Dataset, Features, Json, List, Value

    arguments = {"x": 1, "of another function": None}
    call = {"function": {"name": "f", "arguments": arguments}}
    row = {
        "messages": [U, {"role": "assistant", "content": None, "tool_calls": [call]}],
        "tools": json.dumps([FUNCTION]),
    }
    message = {"role": Value("string"), "content": Value("string"), "tool_calls": Json()}
    features = Features({"messages": List(message), "tools": Value("string")})
    Dataset.from_list([row], features=features).to_parquet(str(tmp_path / "json.parquet"))
    function = pa.struct([("name", pa.string()), ("arguments", pa.map_(pa.string(), pa.int64()))])
    calls = pa.list_(pa.struct([("function", function)]))
    kind = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string()), ("tool_calls", calls)]))
    call["function"]["arguments"] = list(arguments.items())
    table = pa.table({"messages": pa.array([row["messages"]], kind), "tools": [row["tools"]]})
    pq.write_table(table, tmp_path / "map.parquet")
    for name in ("json.parquet", "map.parquet"):
        (file,) = sources.expand(str(tmp_path / name), "data.train")
        (found,) = sources.read(file)
        (found_call,) = read(found.fields, CHAT)[1]["messages"][1]["tool_calls"]
        assert found_call["function"]["arguments"] == arguments, name


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
    assert json.loads(json_text(read(found.fields, CHAT)[1]))["messages"] == expected


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
    messages = [U, {"role": "assistant", **content, "tool_calls": [call]}, turn("tool", "2", tool_call_id="1"), A]
    (sample,) = encode.samples([normalise({"messages": messages}, "messages", {})], [0])
    assert sample.problem == ""
    assert tokenizer.decode(sample.labels[sample.labels != NO_TARGET]) == '[f {"x": 1}]<|im_end|>Yes<|im_end|>'


def test_arguments_of_a_call_are_written_once():
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1, "x": 2}'}}
    with pytest.raises(RowError, match="the key 'x' stands twice in an object"):
        read({"messages": [U, {"role": "assistant", "tool_calls": [call]}]}, CHAT)
