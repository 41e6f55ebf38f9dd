"""`dstune data show` on each row format that other tools write: what the model reads of a row, and what it learns to write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from unit.data_helpers import byte_tokenizer

from dstune import cli

ASKED = "Is it warm in Paris?"
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = {"name": "weather", "description": "Looks.", "parameters": SCHEMA}
CHAT = f"<|im_start|>user\n{ASKED}<|im_end|>\n<|im_start|>assistant\n[[Yes.<|im_end|>]]"
SIGNATURE = json.dumps({"type": "function", "function": TOOL})
CALL = '[[<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>]]'
MESSAGES = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": "Yes."}]


def result(text: str) -> str:
    return f"<|im_start|>user\n<tool_response>\n{text}\n</tool_response><|im_end|>\n<|im_start|>assistant\n"


OPENAI_PAIR = {
    "input": {"messages": MESSAGES[:1], "tools": [], "parallel_tool_calls": True},
    "preferred_output": MESSAGES[1:],
    "non_preferred_output": [{"role": "assistant", "content": "No idea."}],
}
DOLLY = {"instruction": ASKED, "context": "Paris: 30 degrees.", "response": "Yes.", "category": "closed_qa"}
ANTHROPIC = {
    "system": "Be brief.",
    "tools": [{"name": "weather", "description": "Looks.", "input_schema": SCHEMA}],
    "messages": [
        {"role": "user", "content": ASKED},
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "a1", "name": "weather", "input": {"city": "Paris"}},
            ],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a1", "content": "30"}]},
        {"role": "assistant", "content": "Yes."},
    ],
}
GEMINI = {
    "systemInstruction": {"role": "system", "parts": [{"text": "Be brief."}]},
    "contents": [
        {"role": "user", "parts": [{"text": ASKED}]},
        {"role": "model", "parts": [{"functionCall": {"name": "weather", "args": {"city": "Paris"}}}]},
        {"role": "user", "parts": [{"functionResponse": {"name": "weather", "response": {"degrees": 30}}}]},
        {"role": "model", "parts": [{"text": "They say 30.", "thought": True}, {"text": "Yes."}]},
    ],
    "tools": [
        {
            "functionDeclarations": [
                {**TOOL, "parameters": {"type": "OBJECT", "properties": {"city": {"type": "STRING"}}}},
            ]
        }
    ],
}
PARAMETERS = {"city": {"type": "str", "description": "Which."}, "days": {"type": "List[int], optional"}}
XLAM = {
    "id": 7,
    "query": ASKED,
    "tools": json.dumps([{**TOOL, "parameters": PARAMETERS}]),
    "answers": json.dumps([{"name": "weather", "arguments": {"city": city}} for city in ("Paris", "Rome")]),
}
XLAM_SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "description": "Which."},
        "days": {"type": "array", "items": {"type": "integer"}},
    },
    "required": ["city"],
}
ANSWERED = {"question": ASKED, "id": "1", "answers": [{"text": "warm", "answer_start": 9}]}
CONTEXT = "Paris is warm today."
QUESTION = f"{ASKED}Paris is[[ warm]] today."
FLAT = {**ANSWERED, "context": CONTEXT, "answers": {"text": ["warm"], "answer_start": [9]}}
ARTICLES = {"version": "2", "data": [{"title": "t", "paragraphs": [{"context": CONTEXT, "qas": [ANSWERED]}]}]}
BGE = {"query": ASKED, "pos": ["It is 30.", "Warm."], "neg": ["Rome.", "Oslo.", "Bern."], "pos_scores": [1, 1]}
TSV = '# exported by hand\ntext\tlabel\n"say ""warm""\tnow"\tyes\n"half a quote\tno\n# a comment\n#warm in Paris\tyes\n'

CASES: list[tuple[str, str, Any, list[str], list[str]]] = [
    ("openai_preference", "rows.jsonl", OPENAI_PAIR, ["task=preference"], [CHAT, "[[No idea.<|im_end|>]]"]),
    ("dolly", "rows.jsonl", DOLLY, [], [CHAT.replace(ASKED, f"{ASKED}\nParis: 30 degrees.")]),
    (
        "anthropic",
        "rows.jsonl",
        ANTHROPIC,
        [],
        ["Be brief.", SIGNATURE, f"[[I look.\n{CALL[2:]}", result("30"), "[[Yes.<"],
    ),
    (
        "gemini",
        "rows.jsonl",
        GEMINI,
        [],
        [
            "Be brief.",
            SIGNATURE,
            CALL,
            result('{"degrees": 30}'),
            "[[<think>\nThey say 30.\n</think>\n\nYes.<|im_end|>]]",
        ],
    ),
    (
        "xlam",
        "rows.jsonl",
        XLAM,
        [],
        [json.dumps(XLAM_SCHEMA), f'{CALL[:-12]}\n<tool_call>\n{{"name": "weather", "arg'],
    ),
    ("squad", "rows.json", ARTICLES, ["task=question_answering"], [QUESTION]),
    ("squad in lines", "rows.jsonl", ARTICLES["data"][0], ["task=question_answering"], [QUESTION]),
    ("squad paragraphs", "rows.jsonl", ARTICLES["data"][0]["paragraphs"][0], ["task=question_answering"], [QUESTION]),
    ("squad flat in data", "rows.json", {"data": [FLAT]}, ["task=question_answering"], [QUESTION]),
    ("squad flat", "rows.jsonl", FLAT, ["task=question_answering"], [QUESTION]),
    (
        "bge",
        "rows.jsonl",
        BGE,
        ["task=embedding"],
        [
            f"{ASKED}\npositive:\nIt is 30.\nnegative:\nRome.\nnegative:\nBern.\n",
            f"{ASKED}\npositive:\nWarm.\nnegative:\nOslo.\n",
        ],
    ),
    ("a list in a line", "rows.jsonl", MESSAGES, [], [CHAT]),
    ("a list in a list", "rows.json", [MESSAGES], [], [CHAT]),
    ("a column without a name", "rows.jsonl", {"": MESSAGES, "id": 7}, [], [CHAT]),
    ("alpaca without instruction", "rows.jsonl", {"instruction": "", "input": ASKED, "output": "Yes."}, [], [CHAT]),
    (
        "tsv",
        "rows.tsv",
        TSV,
        ["task=classification"],
        ['label yes ---\nsay "warm"\tnow\n', 'label no ---\n"half a quote\n', "label yes ---\n#warm in Paris\n"],
    ),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model that has no weights."""
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("model")
    LlamaConfig(vocab_size=420, hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("name", "file", "content", "given", "expected"), CASES, ids=[case[0] for case in CASES])
def test_a_row_is_shown_as_the_model_reads_it(
    model, tmp_path, monkeypatch, capsys, name, file, content, given, expected
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DSTUNE_CACHE", str(tmp_path / "cache"))
    Path(file).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    command = ["data", "show", f"model.path={model}", f"data.train={file}", "data.split.validation=0", *given]
    template = [] if given else ["model.chat_template=chatml"]
    assert cli.main([*command, *template]) == 0, capsys.readouterr().err
    printed = capsys.readouterr()
    position = 0
    for text in expected:
        position = printed.out.find(text, position)
        assert position >= 0, f"{text!r} is not shown, in this order, of:\n{printed.out}"
    assert "occur more than once" not in printed.out
    assert "not read" not in printed.err
