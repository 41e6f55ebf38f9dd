"""Rows of Anthropic's API: blocks of a content that call tools and bring their results."""

from __future__ import annotations

from typing import Any

import pytest
from unit.test_data_render import assistant, user

from dstune.data.rows import RowError, normalise

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
USE = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Paris"}}
CALL = {"id": "toolu_1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
RESULT = {"role": "tool", "tool_call_id": "toolu_1", "content": "sunny"}


def read(*messages: Any, **row: Any) -> dict[str, Any]:
    return normalise({"messages": list(messages), **row}, "messages", {})


def result(content: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": "toolu_1", "content": content}


@pytest.mark.parametrize("content", ["sunny", [{"type": "text", "text": "sunny"}]])
def test_calls_and_results_are_those_of_openai(content):
    said = [
        {"type": "thinking", "thinking": "Look."},
        {"type": "text", "text": "Let me see."},
        USE,
    ]
    asked = {"role": "user", "content": [result(content), {"type": "text", "text": "Well?"}]}
    tools = [{"name": "weather", "description": "The weather", "input_schema": SCHEMA}]
    row = read(user("Hi"), {"role": "assistant", "content": said}, asked, assistant("Sun."), tools=tools)
    assert row["messages"] == [
        user("Hi"),
        {"role": "assistant", "content": "Let me see.", "reasoning_content": "Look.", "tool_calls": [CALL]},
        RESULT,
        user("Well?"),
        assistant("Sun."),
    ]
    function = {"name": "weather", "description": "The weather", "parameters": SCHEMA}
    assert row["tools"] == [{"type": "function", "function": function}]


def test_a_message_of_results_alone_has_no_question_behind_them():
    row = read(user("Hi"), {"role": "assistant", "content": [USE]}, {"role": "user", "content": [result("sunny")]})
    assert row["messages"] == [user("Hi"), {"role": "assistant", "tool_calls": [CALL]}, RESULT]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([{"type": "text", "text": "Well?"}, result("sunny")], "where results come first"),
        ([result(7)], "must be text, it is 7"),
        ([result([{"type": "image", "source": {}}])], "0 images and 1 place"),
    ],
)
def test_blocks_that_cannot_be_read_are_refused(content, reason):
    with pytest.raises(RowError, match=reason):
        read(user("Hi"), {"role": "assistant", "content": [USE]}, {"role": "user", "content": content}, assistant("A"))
