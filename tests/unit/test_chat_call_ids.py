"""Ids of tool calls: a template gets them in the form that it takes, the same in a call and in its result."""

from __future__ import annotations

from typing import Any

import pytest
from unit.data_helpers import CHATML, byte_tokenizer
from unit.test_chat_apart import proven
from unit.test_chat_faults import DATE
from unit.test_data_render import assistant, user

from dstune.data.chat.call_ids import CallIds, with_call_ids
from dstune.data.chat.prompt import ChatPrompts
from dstune.data.rows import normalise
from dstune.data.tokenize import RowTokenizer
from dstune.tasks.chat.config import ChatConfig

PRINTED = (
    "{% for call in message.tool_calls or [] %}CHECK{{ '[' + call.id + ']' + NAME + (call.function.arguments | tojson) }}"
    "{% endfor %}{{ '[' + message.tool_call_id + ']' if message.role == 'tool' else '' }}"
)
CALLING = CHATML.replace("message['content'] +", "(message.content or '') }}" + PRINTED + "{{")
NINE = CALLING.replace(
    "CHECK", "{% if call.id is not defined or call.id | length != 9 %}{{ raise_exception('nine') }}{% endif %}"
).replace("NAME", "call.function.name")
FUNCTIONS = CALLING.replace("CHECK", "").replace("NAME", "''")
ANY = CALLING.replace("CHECK", "").replace("NAME", "call.function.name")


def function(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def conversation(*ids: str | None) -> list[dict[str, Any]]:
    """Two calls at once and a third one, with these ids, and their results."""
    calls = [
        {**function(name, city="Paris"), **({"id": of} if of else {})}
        for name, of in zip(("weather", "time", "news"), ids, strict=True)
    ]
    results = [
        {"role": "tool", "content": text, **({"tool_call_id": of} if of else {})}
        for text, of in zip(("sunny", "noon", "none"), ids, strict=True)
    ]
    return [
        user("Paris?"),
        {"role": "assistant", "content": "", "tool_calls": calls[:2]},
        *results[:2],
        {"role": "assistant", "content": "", "tool_calls": calls[2:]},
        results[2],
        assistant("Sunny."),
    ]


LONG = ("call_Aaaaaaaaaaaaaaaaaaaa1", "call_Aaaaaaaaaaaaaaaaaaaa2", "chatcmpl-tool-00000000003")
NONE = (None, None, None)


def ids_of(messages: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    calls = [call["id"] for message in messages for call in message.get("tool_calls", [])]
    return calls, [message["tool_call_id"] for message in messages if message["role"] == "tool"]


@pytest.mark.parametrize(
    ("form", "ids", "expected"),
    [
        (CallIds.nine, LONG, ["aaaaaaaa1", "aaaaaaaa2", "000000003"]),
        (CallIds.nine, NONE, ["000000000", "000000001", "000000002"]),
        (CallIds.nine, ("abcdefghi", "abcdefghj", "abcdefghk"), ["abcdefghi", "abcdefghj", "abcdefghk"]),
        (CallIds.nine, ("x-1", "1-aaaaaaaaa", "2-aaaaaaaaa"), ["000000000", "aaaaaaaaa", "000000002"]),
        (CallIds.functions, LONG, ["functions.weather:0", "functions.time:1", "functions.news:2"]),
        (CallIds.functions, NONE, ["functions.weather:0", "functions.time:1", "functions.news:2"]),
    ],
)
def test_ids_get_the_form_and_results_go_with_their_calls(form, ids, expected):
    messages = conversation(*ids)
    changed = with_call_ids(messages, form)
    assert ids_of(changed) == (expected, expected)
    for end in range(len(messages)):
        assert with_call_ids(messages[:end], form) == changed[:end]
    assert with_call_ids(changed, form) == changed


def test_a_result_of_another_order_goes_with_its_call():
    messages = conversation(*LONG)
    messages[2], messages[3] = messages[3], messages[2]
    changed = with_call_ids(messages, CallIds.functions)
    assert [(message["tool_call_id"], message["content"]) for message in changed[2:4]] == [
        ("functions.time:1", "noon"),
        ("functions.weather:0", "sunny"),
    ]


@pytest.mark.parametrize("ids", [LONG, NONE], ids=["long", "none"])
@pytest.mark.parametrize(
    ("template", "form", "written"),
    [
        (NINE, CallIds.nine, {LONG: "[aaaaaaaa1]weather", NONE: "[000000000]weather"}),
        (FUNCTIONS, CallIds.functions, dict.fromkeys((LONG, NONE), '[functions.weather:0]{"city"')),
    ],
    ids=["nine", "functions"],
)
def test_calls_are_trained_with_the_ids_that_a_template_takes(tmp_path, template, form, written, ids):
    row = normalise({"messages": conversation(*ids)}, "messages", {})
    ((context, rest),) = proven(tmp_path, template, [row])
    assert written[ids] in context + rest
    tokenizer = byte_tokenizer(template)
    encode = RowTokenizer(tokenizer, ChatConfig(template_date=DATE), "messages", max_length=10_000)
    assert encode.renderer is not None
    assert encode.renderer.facts.call_ids is form
    (sample,) = encode.samples([row], [0])
    prompt = ChatPrompts(tokenizer, DATE).ids(row["messages"][:-1])
    assert sample.input_ids[: len(prompt)].tolist() == prompt


def test_a_template_that_takes_any_id_gets_those_of_the_row(tmp_path):
    row = normalise({"messages": conversation(*LONG)}, "messages", {})
    ((context, rest),) = proven(tmp_path, ANY, [row])
    assert f"[{LONG[0]}]weather" in context + rest
