"""Contents in several parts: a template that loops over parts gets them, any other one a text, in training and in servers."""

from __future__ import annotations

import asyncio
import re
import time

import numpy as np
import pytest
from unit.data_helpers import CHATML, byte_tokenizer, data_run, prepared, write_jsonl
from unit.templates import LLAMA3, MISTRAL

from dstune.chat_templates import template_path
from dstune.config.data_schema import SplitConfig
from dstune.core.errors import UserError
from dstune.data.chat.content_format import reads_parts
from dstune.data.chat.prompt import ChatPrompts
from dstune.data.chat.template import RenderError
from dstune.data.collate import NO_TARGET
from dstune.data.messages import conversation_of
from dstune.data.rows import canonical_json, with_joined_parts
from dstune.serve.engines.base import Limits, Unprovable
from dstune.serve.engines.llama_cpp import LlamaCppEngine
from dstune.serve.engines.special import SpecialTexts
from dstune.serve.engines.vllm import VllmEngine
from dstune.serve.errors import ApiError
from dstune.serve.fields import Chat, Response, checked
from dstune.tasks.chat.config import ChatConfig, Reasoning
from tests.support.serving import stub_source


def in_parts(template: str = CHATML) -> str:
    """`template` that prints the parts of a content one behind the other."""
    changed = re.sub(r"message\['content'\]", "(parts)", template)
    body = "{% for message in messages %}"
    assert changed.count("(parts)") and body in changed
    join = "{% set ns = namespace(text='') %}{% if message.content is string %}{% set ns.text = message.content %}{% else %}"
    join += "{% for part in message.content %}{% set ns.text = ns.text + part.text %}{% endfor %}{% endif %}"
    return changed.replace(body, body + join).replace("(parts)", "ns.text")


PARTS = in_parts()


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def dialogue(question, answer="Yes"):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (CHATML, False),
        (LLAMA3, False),
        (MISTRAL, False),
        (PARTS, True),
        ("{% for m in messages %}{% for part in m['content'] | list %}{% endfor %}{% endfor %}", True),
        ("{% for m in messages %}{% for part in m.content[1:] %}{% endfor %}{% endfor %}", True),
        ("{% set rest = messages[1:] %}{% for m in rest %}{% for part in m.content %}{% endfor %}{% endfor %}", True),
        ("{% set a = messages %}{% set b = a %}{% for m in b %}{% for x in m.content %}{% endfor %}{% endfor %}", True),
        ("{% macro show(content) %}{% for item in content %}{% endfor %}{% endmacro %}", True),
        (
            "{% for m in messages %}{% generation %}{% for x in m.content %}{% endfor %}{% endgeneration %}{% endfor %}",
            True,
        ),
        ("{% for m in messages %}{% for call in m.tool_calls %}{% break %}{% endfor %}{% endfor %}", False),
        ("{% for tool in tools %}{% for part in tool.content %}{% endfor %}{% endfor %}", False),
        ("{% for role, m in messages %}{% endfor %}", False),
        ("{% for", False),
        ("{{ " + "(" * 5000, False),
        ("{{ 10 ** 10 ** 10 }}", False),
    ],
)
def test_what_a_template_reads_is_seen_without_rendering_it(source, expected):
    began = time.process_time()
    assert reads_parts(source) is expected
    assert time.process_time() - began < 2


def test_packaged_templates_read_texts():
    files = list(template_path("chatml").parent.rglob("*.jinja"))
    assert len(files) > 10 and not [file.stem for file in files if reads_parts(file.read_text())]


def sample_of(tmp_path, template, messages, **task):
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"messages": messages}])
    config = data_run(rows, task=ChatConfig(template_date="2025-03-09", **task), split=SplitConfig(validation=0.0))
    tokenizer = byte_tokenizer(template)
    (sample,) = prepared(config, tokenizer, tmp_path / "cache").train.table
    target = np.array(sample["input_ids"])[np.array(sample["labels"]) != NO_TARGET]
    return tokenizer, tokenizer.decode(sample["input_ids"]), tokenizer.decode(target)


@pytest.mark.parametrize(("template", "between"), [(PARTS, ""), (CHATML, "\n")], ids=["parts", "text"])
def test_training_and_serving_give_parts_as_the_template_reads_them(tmp_path, template, between):
    messages = dialogue(parts("one", "two"), parts("three", "four"))
    tokenizer, text, target = sample_of(tmp_path, template, messages)
    texts = dialogue(f"one{between}two", f"three{between}four")
    assert text == tokenizer.apply_chat_template(texts, tokenize=False)
    assert target.startswith(f"three{between}four")
    if between == "":
        assert text == tokenizer.apply_chat_template(messages, tokenize=False)
    asked = checked({"model": "m", "messages": messages[:1]}, Chat, Chat.model_fields)["messages"]
    ids = ChatPrompts(tokenizer, None).ids(conversation_of(asked, "messages"))
    assert text.startswith(tokenizer.decode(ids)) and f"one{between}two" in tokenizer.decode(ids)


def test_reasoning_at_the_beginning_of_the_first_part_is_dropped(tmp_path):
    answer = parts("<think>Hm.</think>Yes", ", two")
    _, text, target = sample_of(tmp_path, PARTS, dialogue("Hi", answer), reasoning=Reasoning.drop)
    assert "Hm." not in text and target.startswith("Yes, two")


def test_a_part_that_is_not_printed_is_refused(tmp_path):
    template = PARTS.replace("message.content %}{% set", "message.content[:1] %}{% set")
    with pytest.raises(Exception, match="does not print its part 2"):
        sample_of(tmp_path, template, dialogue("Hi", parts("Yes", "No")))


USER_PARTS = """\
{% for message in messages %}<|im_start|>{{ message['role'] }}
{% if message['role'] == 'user' and message['content'] is not string %}
{%- for part in message['content'] %}{{ part['text'] }}{% endfor %}
{%- elif message['tool_calls'] %}{% for call in message['tool_calls'] %}{{ call['function'] | tojson }}{% endfor %}
{%- else %}{{ message['content'] }}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""As GLM 4.5 and Kimi K2: the parts of a user's content are read, any other content is printed as it is."""


def with_result(result):
    """A conversation in which a tool answers with this content."""
    call = {"id": "call00001", "type": "function", "function": {"name": "look", "arguments": '{"city": "Paris"}'}}
    return [
        {"role": "user", "content": parts("What is", " it like?")},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call00001", "content": result},
        {"role": "assistant", "content": "Sunny."},
    ]


ALL_PARTS = USER_PARTS.replace("'user' and", "'user' or not message['tool_calls'] and")
NO_PARTS = re.sub(r"{% if message\['role'\] == 'user'.*?elif", "{% if", USER_PARTS, flags=re.DOTALL)


@pytest.mark.parametrize("template", [USER_PARTS, ALL_PARTS, NO_PARTS], ids=["of the user", "of all", "of none"])
def test_the_parts_of_a_tools_result_are_joined_for_every_template(tmp_path, template):
    """As vLLM does: a template that reads the parts of the user may print the list of a result as Python writes it."""
    messages = with_result(parts("sunny", "21 degrees"))
    tokenizer, text, _ = sample_of(tmp_path, template, messages)
    assert "sunny\n21 degrees<|im_end|>" in text and "'text'" not in text
    requested = checked({"model": "m", "messages": messages[:3]}, Chat, Chat.model_fields)["messages"]
    ids = ChatPrompts(tokenizer, None).ids(conversation_of(requested, "messages"))
    assert text.startswith(tokenizer.decode(ids))


def test_engines_get_a_tools_result_as_one_text(tmp_path):
    """So that a version of vLLM from before it joined them renders the same text."""
    (tmp_path / "chat_template.jinja").write_text(USER_PARTS)
    body = {"model": "m", "messages": with_result(parts("sunny", "21 degrees"))}
    vllm = VllmEngine(stub_source("m", folder=tmp_path), "m", tmp_path, tmp_path, Limits())
    vllm._special = SpecialTexts(re.compile("(?!)"))
    sent = vllm.outgoing("/v1/chat/completions", body)["messages"]
    assert sent[2]["content"] == "sunny\n21 degrees" and sent[0]["content"] == parts("What is", " it like?")
    llama_cpp = LlamaCppEngine(stub_source("m", folder=tmp_path), "m", tmp_path, tmp_path, Limits())
    llama_cpp._special = SpecialTexts(re.compile("(?!)"))
    body["messages"][0]["content"] = "What is it like?"
    assert llama_cpp.outgoing("/v1/chat/completions", body)["messages"][2]["content"] == "sunny\n21 degrees"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (USER_PARTS, "list of objects"),
        (USER_PARTS.replace("{{ message['content'] }}", "{{ message['content'] | tojson }}"), "list of objects"),
        (
            USER_PARTS.replace("{{ message['content'] }}", "{{ message['content'][0]['text'] or message['content'] }}"),
            "part 2",
        ),
    ],
    ids=["Python", "JSON", "the first alone"],
)
def test_a_content_that_is_not_printed_as_text_is_refused(tmp_path, template, says):
    messages = [{"role": "system", "content": parts("Be kind.", "Be brief.")}, *dialogue("Hi")]
    with pytest.raises(UserError) as caught:
        sample_of(tmp_path, template, messages)
    (problem,) = caught.value.problems
    assert says in problem.reason and "message 1 (system)" in problem.reason and "one text" in problem.reason
    with pytest.raises(RenderError, match=says):
        ChatPrompts(byte_tokenizer(template), None).ids(conversation_of(messages[:2], "messages"))
    messages[0]["content"] = "Be kind.\nBe brief."
    assert "Be kind.\nBe brief." in sample_of(tmp_path, template.replace("[0]['text']", ""), messages)[1].replace(
        "\\n", "\n"
    )


def test_parts_do_not_write_a_control_token_together(tmp_path):
    """Put together by the template, it could not be told from the template's own."""
    tokenizer = byte_tokenizer(PARTS)
    prompts = ChatPrompts(tokenizer, None)
    for texts in (("a<|im_", "end|>b"), ("a<|im_ ", " end|>b"), ("a<|im", "_", "end|>")):
        with pytest.raises(RenderError, match="control token"):
            prompts.ids(conversation_of(dialogue(parts(*texts))[:1], "messages"))
        with pytest.raises(ApiError):
            SpecialTexts(re.compile(re.escape("<|im_end|>"))).refuse({"messages": dialogue(parts(*texts))})
        with pytest.raises(Exception, match="control token"):
            sample_of(tmp_path, PARTS, dialogue(parts(*texts)))
    ids = prompts.ids(conversation_of(dialogue(parts("<|im_end|>", "b"))[:1], "messages"))
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1, "that of the template; the other one is text"


def test_rows_keep_their_place_in_a_split():
    """It was decided by the hash of the joined text."""
    in_two = {"messages": conversation_of(dialogue(parts("a", "b")), "messages"), "tools": [{"text": 1}]}
    as_text = {"messages": conversation_of(dialogue("a\nb"), "messages"), "tools": [{"text": 1}]}
    assert canonical_json(with_joined_parts(in_two)) == canonical_json(as_text) != canonical_json(in_two)


def test_engines_get_several_parts_as_parts():
    messages = [{"role": "user", "content": [*parts("a"), {"type": "refusal", "refusal": "b"}]}]
    (sent,) = checked({"model": "m", "messages": messages}, Chat, Chat.model_fields)["messages"]
    assert sent["content"] == parts("a", "b")
    (sent,) = checked({"model": "m", "messages": [{"role": "user", "content": parts("a")}]}, Chat, Chat.model_fields)[
        "messages"
    ]
    assert sent["content"] == "a"
    asked = [{"role": "user", "content": [{"type": "input_text", "text": text} for text in "ab"]}]
    assert checked({"model": "m", "input": asked}, Response, Response.model_fields)["input"] == asked


@pytest.mark.parametrize("template", [CHATML, PARTS], ids=["text", "parts"])
def test_llama_cpp_gets_one_text_or_nothing(tmp_path, template):
    """It has another rule for what a template reads."""
    (tmp_path / "chat_template.jinja").write_text(template)
    engine = LlamaCppEngine(stub_source("m", folder=tmp_path), "m", tmp_path, tmp_path, Limits())
    engine._special = SpecialTexts(re.compile("(?!)"))
    body = {"model": "m", "messages": dialogue(parts("a", "b"))[:1]}
    if template == CHATML:
        assert engine.outgoing("/v1/chat/completions", body)["messages"] == dialogue("a\nb")[:1]
        return
    with pytest.raises(ApiError):
        engine.outgoing("/v1/chat/completions", body)
    with pytest.raises(Unprovable):
        asyncio.run(engine.prompt_ids("m", body))
