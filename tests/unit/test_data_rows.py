"""Reading files of every kind, what a row must hold, and which rows are held out."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from unit.data_helpers import exchange, write_jsonl

from dstune.core.errors import UserError
from dstune.data.rows import RowError, canonical_json, check_columns, normalise, recognise, sort_labels
from dstune.data.sources import DataFile, count, expand, fingerprint, read
from dstune.data.split import TEST, TRAIN, VALIDATION, assign, content_hash, lowest
from dstune.tasks.causal_lm.config import CausalLmConfig
from dstune.tasks.chat.config import ChatConfig
from dstune.tasks.classification.config import ClassificationConfig
from dstune.tasks.reinforcement.config import ReinforcementConfig

ROWS = [{"text": "one, two", "label": "a"}, {"text": 'three "3"\nfour', "label": "b"}, {"text": "né", "label": "a"}]


def found(path):
    """Line, fields and error of each row."""
    return [(row.line, row.fields, row.error) for row in read(DataFile(path))]


def test_jsonl_with_blank_lines_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROWS[0]).encode() + b"\n\n" + json.dumps(ROWS[1]).encode())
    assert found(path) == [(1, ROWS[0], ""), (3, ROWS[1], "")]


def test_broken_jsonl_lines_keep_their_numbers(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": \n[1]\n{"text": "\xff"}\nnull\n{"text": "b"}\n')
    lines = found(path)
    assert [line for line, _, _ in lines] == [1, 2, 3, 4, 5, 6]
    assert [fields is None for _, fields, _ in lines] == [False, True, True, True, True, False]
    assert "broken JSON: Expecting value at column" in lines[1][2]
    assert "a row is a JSON object, this is an array" in lines[2][2]
    assert "not UTF-8: byte 11 of the line is 0xff" in lines[3][2]


def test_json_array_gives_the_line_of_each_row(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text("\n[\n " + ",\n ".join(json.dumps(row, indent=1) for row in ROWS) + "\n]\n")
    assert found(path) == [(3, ROWS[0], ""), (7, ROWS[1], ""), (11, ROWS[2], "")]
    path.write_text(json.dumps(ROWS))
    assert [fields for _, fields, _ in found(path)] == ROWS
    path.write_text("[]")
    assert found(path) == []


def test_json_that_is_jsonl(tmp_path):
    path = write_jsonl(tmp_path / "rows.json", ROWS)
    assert [(line, fields) for line, fields, _ in found(path)] == [(1, ROWS[0]), (2, ROWS[1]), (3, ROWS[2])]


@pytest.mark.parametrize(
    ("text", "line", "error"),
    [
        ('[\n{"text": "a"},\n{"text": }\n]', 3, "broken JSON"),
        ('[\n{"text": "a"}\n{"text": "b"}]', 3, "no comma"),
        ('[\n{"text": "a"},\n', 2, "not closed"),
        (
            '[\n{"text": "a"}\n]\n \n[{"text": "b"}]\n',
            5,
            "more after the end of the array; the rest of the file, to line 5",
        ),
    ],
)
def test_broken_json_array(tmp_path, text, line, error):
    path = tmp_path / "rows.json"
    path.write_text(text)
    last = found(path)[-1]
    assert last[0] == line
    assert error in last[2]
    assert count(DataFile(path)) == len(found(path))


def test_csv_and_tsv(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('text,label\n"one, two",a\n"three ""3""\nfour",b\nné,a\n', encoding="utf-8")
    assert found(path) == [(2, ROWS[0], ""), (3, ROWS[1], ""), (5, ROWS[2], "")]
    path = tmp_path / "rows.tsv"
    path.write_text("text\tlabel\none, two\ta\n", encoding="utf-8")
    assert found(path) == [(2, ROWS[0], "")]


def tsv(tmp_path, text):
    path = tmp_path / "rows.tsv"
    path.write_text(text, encoding="utf-8")
    return found(path)


@pytest.mark.parametrize(
    ("line", "fields"),
    [
        ('"a"\tb', ("a", "b")),
        ('"say ""a"""\tb', ('say "a"', "b")),
        ('"two\ttabs"\tb', ("two\ttabs", "b")),
        ('"two\nlines"\tb', ("two\nlines", "b")),
        ('a\t"two\n\nlines"', ("a", "two\n\nlines")),
        ('"half a quote\tb', ('"half a quote', "b")),
        ('a "word" here\tb "', ('a "word" here', 'b "')),
        ('"a" and "b"\t""', ('"a" and "b"', "")),
        ('a\t"half a quote', ("a", '"half a quote')),
        ("#a\tb", ("#a", "b")),
    ],
)
def test_quotes_of_a_tsv_file(tmp_path, line, fields):
    rows = tsv(tmp_path, f"x\ty\n{line}\nnext\trow\n")
    expected = dict(zip(("x", "y"), fields, strict=True))
    assert rows == [(2, expected, ""), (3 + line.count("\n"), {"x": "next", "y": "row"}, "")]


def test_comments_of_a_tsv_file(tmp_path, caplog):
    caplog.set_level("INFO")
    rows = tsv(tmp_path, "# made by hand\n# x\ty\na\tb\n# and so on\n\nc\td\n")
    assert rows == [(3, {"x": "a", "y": "b"}, ""), (6, {"x": "c", "y": "d"}, "")]
    assert "2 comment lines passed over" in caplog.text
    assert tsv(tmp_path, "text\n#one\n") == [(2, {"text": "#one"}, "")]


def test_broken_lines_of_a_tsv_file_spoil_no_other_row(tmp_path):
    rows = tsv(tmp_path, 'x\ty\n"never closed\nfew\na\tb\tc\nok\tb\n')
    reasons = ["1 fields where the header has 2"] * 2 + ["3 fields where the header has 2", ""]
    assert [(line, error) for line, _, error in rows] == list(zip((2, 3, 4, 5), reasons, strict=True))


def test_broken_csv(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('text,label\nok,a\ntoo,many,fields\nfew\n"never closed,a\n')
    lines = found(path)
    assert [line for line, _, _ in lines] == [2, 3, 4, 5]
    assert lines[1][2] == "3 fields where the header has 2"
    assert lines[2][2] == "1 fields where the header has 2"
    assert lines[3][2] == (
        "broken CSV: a quote that opens here is never closed; lines 5 to 5, the end of the file, are lost"
    )


def test_parquet(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([*ROWS, {"text": None, "label": "a"}]), path)
    assert found(path)[:2] == [(1, ROWS[0], ""), (2, ROWS[1], "")]
    path.write_bytes(b"PAR1 is not enough")
    with pytest.raises(UserError, match=r"rows\.parquet: no readable Parquet file"):
        found(path)


def test_a_table_with_a_column_twice_is_refused(tmp_path):
    table = pa.table([["a"], ["b"]], names=["text", "text"])
    pq.write_table(table, tmp_path / "rows.parquet")
    with pa.ipc.new_file(str(tmp_path / "rows.arrow"), table.schema) as writer:
        writer.write_table(table)
    for name in ("rows.parquet", "rows.arrow"):
        with pytest.raises(UserError, match=f"{name}: more than one column is named 'text'"):
            found(tmp_path / name)


def test_expand_globs_are_sorted(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.csv"):
        write_jsonl(tmp_path / name, ROWS)
    assert [file.path.name for file in expand(f"{tmp_path}/*.jsonl", "data.train")] == ["a.jsonl", "b.jsonl"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("absent.jsonl", "data.train=.*: no such file"),
        ("absent-*.jsonl", "data.train=.*: no file matches"),
        ("rows.xlsx", "unknown ending '.xlsx'"),
        ("empty.jsonl", r"empty\.jsonl: the file is empty \(named by data\.train\)"),
    ],
)
def test_expand_refuses(tmp_path, name, reason):
    (tmp_path / "rows.xlsx").write_text("x")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match=reason):
        expand(str(tmp_path / name), "data.train")


def test_fingerprint_is_of_the_content(tmp_path):
    one, other = write_jsonl(tmp_path / "one.jsonl", ROWS), write_jsonl(tmp_path / "other.jsonl", ROWS)
    assert fingerprint(DataFile(one)) == fingerprint(DataFile(other))
    write_jsonl(other, ROWS[:2])
    assert fingerprint(DataFile(one)) != fingerprint(DataFile(other))


CHAT, TEXT, CLASSES, PROMPTS = ChatConfig(), CausalLmConfig(), ClassificationConfig(), ReinforcementConfig()


@pytest.mark.parametrize(
    ("columns", "mapping", "task", "expected"),
    [
        (["messages", "id"], {}, CHAT, "messages"),
        (["prompt", "completion"], {}, CHAT, "prompt_completion"),
        (["question", "answer"], {"prompt": "question", "completion": "answer"}, CHAT, "prompt_completion"),
        (["text"], {}, TEXT, "text"),
        (["text", "label"], {}, TEXT, "text"),
        (["label", "text"], {}, CLASSES, "text_label"),
        (["review", "stars"], {"text": "review", "label": "stars"}, CLASSES, "text_label"),
    ],
)
def test_recognise(columns, mapping, task, expected):
    assert recognise(columns, mapping, "auto", task, "rows.jsonl:1") is expected


@pytest.mark.parametrize(
    ("columns", "task", "message"),
    [
        (["review"], CLASSES, r"rows\.jsonl:1: missing column: task=classification needs 'text' \+ 'label'.*'review'"),
        (["messages"], TEXT, "task=chat and task=distillation read these columns"),
        (["text"], CHAT, "task=causal_lm and task=distillation read these columns"),
        (["body"], CHAT, r"data\.columns="),
        (["conversations", "answer"], PROMPTS, r"for example 'data\.columns=\{prompt: "),
    ],
)
def test_recognise_refuses(columns, task, message):
    with pytest.raises(UserError, match=f"(?s){message}"):
        recognise(columns, {}, "auto", task, "rows.jsonl:1")


def test_named_formats():
    assert recognise(["x"], {}, "messages", CHAT, "f:1") == "messages"
    assert recognise(["x"], {}, "text_label", TEXT, "f:1") == "text"
    with pytest.raises(UserError, match=r"data\.format=text: task=chat does not read this format"):
        recognise(["x"], {}, "text", CHAT, "f:1")
    with pytest.raises(UserError, match=r"data\.columns\.texts=review: no such role"):
        check_columns({"texts": "review"})


def message_row(*roles: str) -> dict:
    return {"messages": [{"role": role, "content": role} for role in roles]}


@pytest.mark.parametrize(
    "roles",
    [
        ("user", "assistant"),
        ("system", "user", "assistant", "user"),
        ("user", "assistant", "tool", "tool", "assistant", "user", "assistant"),
        ("system", "system", "user", "user", "assistant", "assistant", "system", "user", "assistant"),
    ],
)
def test_orders_of_roles_that_are_fine(roles):
    assert len(normalise(message_row(*roles), "messages", {})["messages"]) == len(roles)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (message_row("user", "bot"), "message 2 has the unknown role 'bot'; roles are system, user, assistant, tool"),
        (
            message_row("tool", "assistant"),
            "message 1 has the role tool at the start, where system or user or assistant",
        ),
        (message_row("user", "user"), "no trainable token: the conversation has no assistant message"),
        (message_row("system", "tool"), "message 2 has the role tool after system"),
        (message_row("user", "tool"), "message 2 has the role tool after user"),
        (message_row("system", "user"), "no trainable token: the conversation has no assistant message"),
        ({"messages": []}, "'messages' must be a list of messages that is not empty"),
        ({"messages": "hello"}, "text but not JSON"),
        ({"messages": ["hello"]}, "message 1 must be an object with role and content"),
        ({"messages": [{"role": "user"}]}, "message 1 (user): content must be text, it is empty"),
        ({"messages": [{"role": "user", "content": 3}]}, "message 1 (user): content must be text, it is 3"),
        ({"messages": [{"content": "a"}]}, "message 1 has the unknown role None"),
        ({"message": []}, "missing column 'messages', the columns here are 'message'"),
        ({"messages": exchange("a", "b")["messages"], "tools": "x"}, "tools are not JSON"),
    ],
)
def test_conversations_that_are_refused(row, reason):
    with pytest.raises(RowError) as caught:
        normalise(row, "messages", {})
    assert reason in str(caught.value)


def test_messages_as_json_text_and_keys_without_a_value():
    row = {"messages": json.dumps(exchange("a", "b")["messages"])}
    assert normalise(row, "messages", {}) == exchange("a", "b")
    tool_call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "x": None}}]}
    row = {"messages": [{"role": "user", "content": "a", "name": None}, tool_call], "tools": None}
    assert normalise(row, "messages", {}) == {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]},
        ]
    }


def test_a_conversation_without_an_answer_where_prompts_are_trained():
    assert normalise(message_row("user"), "messages", {}, ChatConfig(train_on_prompt=True))


@pytest.mark.parametrize(
    ("value", "label"), [("a", "a"), (" a ", "a"), (3, "3"), (3.0, "3"), (True, "true"), ("3", "3")]
)
def test_labels(value, label):
    assert normalise({"text": "x", "label": value}, "text_label", {})["label"] == label


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "x", "label": None}, "column 'label' must be a label (text or an integer), it is empty"),
        ({"text": "x", "label": 0.5}, "it is 0.5"),
        ({"text": " \n", "label": "a"}, "column 'text' is empty"),
        ({"text": 7, "label": "a"}, "column 'text' must be text, it is int"),
        ({"text": "x"}, "missing column 'label'"),
    ],
)
def test_labelled_texts_that_are_refused(row, reason):
    with pytest.raises(RowError) as caught:
        normalise(row, "text_label", {})
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("tokens", "tags"),
    [("['EU', 'rejects']", "O O"), ("['EU' 'rejects']", "O O"), ("EU rejects", "[3 0]"), ("EU rejects", '["O", O]')],
)
def test_lists_as_pandas_writes_them_are_no_words(tokens, tags):
    with pytest.raises(RowError, match="is a list that is not JSON"):
        normalise({"tokens": tokens, "tags": tags}, "tokens_tags", {})


def test_words_in_brackets_are_words():
    row = normalise({"tokens": "[ laughter ]", "tags": "O B-X O"}, "tokens_tags", {})
    assert row == {"tokens": ["[", "laughter", "]"], "tags": ["O", "B-X", "O"]}


def test_sort_labels():
    assert sort_labels(["10", "2", "1"]) == ("1", "2", "10")
    assert sort_labels(["b", "a", "a", "10"]) == ("10", "a", "b")
    equal = [f"{'0' * zeros}1" for zeros in range(20)]  # so many that a set has them in order by chance never
    assert sort_labels(equal) == tuple(reversed(equal))


def test_canonical_depends_on_content_only():
    assert canonical_json({"a": 1, "b": "é"}) == canonical_json({"b": "é", "a": 1})
    with pytest.raises(RowError, match="half of a surrogate pair"):
        canonical_json({"text": "\ud83d"})


def hashes(count: int, seed: int = 0) -> np.ndarray:
    return np.array([content_hash(f"row {number}".encode(), seed) for number in range(count)], dtype=np.uint64)


def test_split_depends_on_each_row_alone():
    whole = assign(hashes(4000), None, validation=0.1, test=0.05)
    assert (assign(hashes(2000), None, validation=0.1, test=0.05) == whole[:2000]).all()
    shares = [np.mean(whole == part) for part in (TRAIN, VALIDATION, TEST)]
    assert shares == pytest.approx([0.85, 0.1, 0.05], abs=0.02)
    other = assign(hashes(4000, seed=1), None, validation=0.1, test=0.05)
    assert not (other == whole).all()
    assert (assign(hashes(100), None, validation=0.0, test=0.0) == TRAIN).all()


def test_equal_rows_stay_together():
    twice = np.concatenate([hashes(500), hashes(500)])
    labels = np.array(["a", "b"] * 500)
    for chosen in (assign(twice, None, validation=0.3, test=0.1), assign(twice, labels, validation=0.3, test=0.1)):
        assert (chosen[:500] == chosen[500:]).all()


def test_equal_rows_stay_together_where_the_share_ends_among_them():
    thrice = np.repeat(hashes(5), 3)  # 30 % of 15 rows is 4, which would cut the second three
    parts = assign(thrice, np.array(["a"] * 15), validation=0.3, test=0.0)
    assert sorted(parts.reshape(5, 3).tolist()) == [[TRAIN] * 3] * 3 + [[VALIDATION] * 3] * 2


def test_every_label_stays_in_training():
    parts = assign(hashes(7), np.array(["a"] * 6 + ["b"]), validation=0.6, test=0.3)
    assert parts[6] == TRAIN
    assert (parts[:6] == TRAIN).any()


def test_split_is_stratified_for_labels():
    labels = np.array(["often"] * 900 + ["rare"] * 20 + ["once"])
    parts = assign(hashes(921), labels, validation=0.1, test=0.05)
    assert [int((parts[labels == "often"] == part).sum()) for part in (TRAIN, VALIDATION, TEST)] == [765, 90, 45]
    assert [int((parts[labels == "rare"] == part).sum()) for part in (TRAIN, VALIDATION, TEST)] == [17, 2, 1]
    assert parts[-1] == TRAIN


def test_small_data_still_holds_out_a_row():
    assert (assign(hashes(3), None, validation=0.01, test=0.0) == VALIDATION).sum() == 1
    assert (assign(hashes(1), None, validation=0.99, test=0.0) == TRAIN).all()
    labels = np.array(["a", "a", "b"])
    parts = assign(hashes(3), labels, validation=0.01, test=0.0)
    assert parts[2] == TRAIN
    assert (parts == VALIDATION).sum() == 1


def test_lowest():
    assert lowest(np.array([5, 1, 9, 3], dtype=np.uint64), 2).tolist() == [1, 3]
    assert lowest(np.array([5, 1], dtype=np.uint64), 10).tolist() == [0, 1]
