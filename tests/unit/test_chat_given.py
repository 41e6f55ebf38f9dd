"""What a row holds reaches the chat template as it was given: the order of its keys, and text that reads like control tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from unit.data_helpers import CHATML, byte_tokenizer, data_run, prepared, write_jsonl
from unit.templates import QWEN3
from unit.test_chat_proof import SWITCHED
from unit.test_data_render import assistant, call, refusal, tool, trained, user

from dstune.config.data_schema import SplitConfig
from dstune.data.clean.rows import map_texts, texts
from dstune.data.collate import NO_TARGET
from dstune.data.rows import RowError, normalise
from dstune.data.tokenize import RowTokenizer
from dstune.data.unread import Unread
from dstune.tasks.chat.config import ChatConfig, Reasoning
from dstune.tasks.preference.config import PreferenceConfig

CALLING = CHATML.replace(
    "message['content']",
    "(message.content or '') + (message.tool_calls | map(attribute='function') | list | tojson if message.tool_calls else '')",
)
WITH_TOOLS = "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}" + CALLING
AS_PYTHON = CHATML.replace("message['content']", "(message.content or '') + (message.tool_calls or '') | string")
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather",
        "parameters": {
            "type": "object",
            "properties": {"unit": {"type": "string"}, "city": {"type": "string"}},
            "required": ["unit", "city"],
        },
    },
}
ASKED = [user("Weather?"), assistant("", tool_calls=call("weather", {"unit": "C", "city": "Paris"}))]
ANSWERED = [*ASKED, tool("sunny"), assistant("It is sunny.")]


@pytest.mark.parametrize("task", [ChatConfig(), PreferenceConfig()], ids=["chat", "preference"])
@pytest.mark.parametrize("changed", [False, True], ids=["as it is", "cleaned"])
def test_schemas_and_arguments_keep_the_order_of_their_keys(tmp_path, task, changed):
    """Servers print them in the order in which a client sends them."""
    messages = [*ANSWERED[:-1], assistant("Cafe\u0301.")] if changed else ANSWERED
    row: dict[str, Any] = {"messages": messages}
    if task.name == "preference":
        row = {"prompt": messages[:-1], "chosen": messages[-1:], "rejected": [assistant("No idea.")]}
    path = write_jsonl(tmp_path / "rows.jsonl", [{**row, "tools": [WEATHER]}])
    config = data_run(path, task=task, split=SplitConfig(validation=0.0))
    tokenizer = byte_tokenizer(WITH_TOOLS)
    data = prepared(config, tokenizer, tmp_path / "cache")
    (sample,) = data.train.table
    found = tokenizer.decode(sample["input_ids"])
    whole = [*messages[:-1], assistant("Caf\u00e9.")] if changed else messages
    assert found == tokenizer.apply_chat_template(whole, tools=[WEATHER], tokenize=False)


def test_a_message_that_is_printed_as_a_whole_keeps_the_order_of_its_keys(tmp_path):
    """So do calls, with what they have beside a name and arguments."""
    tokenizer = byte_tokenizer(CHATML.replace("message['content']", "message | tojson"))
    function = {"arguments": {"unit": "C", "city": None}, "strict": True, "name": "weather"}
    asked = {"id": "c1", "function": function, "type": "function"}
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "tool_calls": [asked], "reasoning": "They ask."},
        {"content": "sunny", "role": "tool", "tool_call_id": "c1"},
        {"role": "assistant", "content": "It is sunny."},
    ]
    config = data_run(write_jsonl(tmp_path / "rows.jsonl", [{"messages": messages}]), split=SplitConfig(validation=0.0))
    (sample,) = prepared(config, tokenizer, tmp_path / "cache").train.table
    messages[1] |= {"reasoning_content": "They ask.", "thinking": "They ask."}
    assert tokenizer.decode(sample["input_ids"]) == tokenizer.apply_chat_template(messages, tokenize=False)


def test_a_schema_keeps_a_null_that_says_something():
    def schemas(**properties: Any) -> Any:
        given = {
            "messages": ANSWERED,
            "tools": [{**WEATHER, "function": {**WEATHER["function"], "parameters": properties}}],
        }
        return normalise(given, "messages", {})["tools"][0]["function"]["parameters"]

    optional = {"unit": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None}}
    assert schemas(type="object", properties=optional) == {"type": "object", "properties": optional}
    # The property of another tool: these objects were in a table once.
    of_table = {"unit": {"type": "string", "default": None}, "place": None}
    assert schemas(type="object", properties=of_table)["properties"] == {"unit": {"type": "string"}}


def test_both_answers_of_a_pair_have_one_prompt():
    """Qwen 3's prompt closes an empty block where the model is not to think, so two prompts would be compared."""
    tokenizer = byte_tokenizer(SWITCHED)
    encode = RowTokenizer(tokenizer, PreferenceConfig(), "preference", max_length=1000)
    thought, plain = "<think>\nHm.\n</think>\n\nYes", "No"
    for chosen, rejected in ((thought, plain), (plain, thought)):
        messages = {"prompt": [user("Hi")], "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}
        for row in ({"prompt": "Hi", "chosen": chosen, "rejected": rejected}, messages):
            (sample,) = encode.samples([row], [0])
            assert not sample.problem
            columns = {"input_ids": sample.input_ids, **sample.columns}
            prompts = [
                columns[f"{of}input_ids"][: int(np.argmax(columns[f"{of}labels"] != NO_TARGET))].tolist()
                for of in ("", "rejected_")
            ]
            assert prompts[0] == prompts[1]
            assert tokenizer.decode(prompts[0]) == tokenizer.apply_chat_template(
                [user("Hi")], tokenize=False, add_generation_prompt=True, enable_thinking=True
            )
            assert all("chat_template_kwargs" in one.row for one in encode.exchanges(row))


@pytest.mark.parametrize("name", ["role", "label", "tags", "city"])
@pytest.mark.parametrize("template", [CALLING, AS_PYTHON], ids=["as JSON", "as Python"])
def test_arguments_of_a_call_write_no_control_tokens(name, template):
    tokenizer = byte_tokenizer(template)
    messages = [user("Weather?"), assistant("", tool_calls=call("weather", {name: "a<|im_end|>b"}))]
    encode = RowTokenizer(tokenizer, ChatConfig(), "messages", max_length=100_000)
    (sample,) = encode.samples([{"messages": messages}], [0])
    assert not sample.problem
    written = sample.labels[sample.labels != NO_TARGET]
    ends = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert [at for at, token in enumerate(written) if token == ends] == [len(written) - 1]
    given = [encode.renderer.facts.adapted(message) for message in messages]
    whole = tokenizer.apply_chat_template(given, tokenize=False)
    assert tokenizer.decode(sample.input_ids) == whole
    prompt = tokenizer.apply_chat_template(given[:1], tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(written) == whole.removeprefix(prompt).rstrip()


def test_a_text_that_the_template_cuts_inside_of_what_reads_like_a_control_token_is_refused():
    cut = "(message['content'][:6] if message['content'].startswith('abc') else message['content'])"
    tokenizer = byte_tokenizer(CHATML.replace("message['content']", cut))
    assert trained(tokenizer, [user("Hi"), assistant("Yes")]) == ["Yes<|im_end|>"]
    assert "cuts or escapes a text that reads like a control token" in refusal(
        tokenizer, [user("abc<|im_end|>"), assistant("Yes")]
    )


def test_a_message_of_other_keys_alone_says_nothing():
    with pytest.raises(RowError, match=r"message 2 \(assistant\) is empty"):
        normalise(
            {"messages": [user("Hi"), assistant("", id="a1", language="en"), user("So"), assistant("No")]},
            "messages",
            {},
        )


def test_a_refusal_is_what_the_assistant_says():
    def of(**message: Any) -> Any:
        return normalise({"messages": [user("Hi"), {"role": "assistant", **message}]}, "messages", {})["messages"][1]

    for content in ({"content": None}, {"content": ""}, {}):
        assert of(**content, refusal="I cannot.") == assistant("I cannot.")
    assert of(content="Yes", refusal=None) == assistant("Yes")
    with pytest.raises(RowError, match="has a content and a refusal"):
        of(content="Yes", refusal="I cannot.")


def test_a_message_that_says_two_things_is_refused():
    with pytest.raises(RowError, match="a content and a value that say different things"):
        normalise({"messages": [{**user("Hi"), "value": "Bye"}, assistant("Yes")]}, "messages", {})


@pytest.mark.parametrize("column", ["system", "input"])
def test_the_white_space_of_a_column_is_kept(column):
    row = {"instruction": "Explain.", "output": "It returns.", column: "    return 1\n"}
    messages = normalise(row, "alpaca", {})["messages"]
    assert messages[0]["content"] == {"system": "    return 1\n", "input": "Explain.\n    return 1\n"}[column]


@pytest.mark.parametrize("name", ["name", "id", "city"])
def test_cleaning_reads_every_argument_of_a_call(name):
    row = {"messages": [user("Hi"), assistant("", tool_calls=call("find", {name: {"name": ["a@b.example"]}}))]}
    changed = map_texts(row, lambda text: text.replace("a@b.example", "<email>"))
    assert changed["messages"][1]["tool_calls"] == call("find", {name: {"name": ["<email>"]}})
    assert "a@b.example" in list(texts(row))


TAGS = "The tags are <think> and </think>. Mind them."


@pytest.mark.parametrize("reasoning", ["keep", "drop"])
def test_an_answer_about_the_tags_of_reasoning_is_kept(reasoning):
    messages = [user("Hi"), assistant(TAGS)]
    task = {"reasoning": Reasoning(reasoning)} if reasoning == "drop" else {}
    assert trained(byte_tokenizer(), messages, **task) == [f"{TAGS}<|im_end|>"]


@pytest.mark.parametrize("content", [TAGS, "<think>Hm.</think>It ends with </think> here."])
def test_an_answer_of_which_the_template_splits_off_what_it_takes_for_reasoning_is_refused(content):
    """Qwen's templates print what stands behind the last `</think>` as the answer."""
    assert "does not print its content" in refusal(byte_tokenizer(QWEN3), [user("Hi"), assistant(content)])


def test_what_a_message_says_beside_its_content_is_counted():
    unread = Unread("messages", {})
    unread.add({"messages": [user("Hi"), assistant("Yes", thought="Hm.", id="a1")]})
    unread.add({"messages": [user("Hi"), assistant("Yes", thought="", reasoning_content="Hm.")]})
    assert dict(unread.rows) == {"messages[].thought": 1}


def test_columns_of_prompts_are_for_the_rewards() -> None:
    unread = Unread("prompt", {})
    unread.add({"prompt": "What is 2 + 3?", "answer": 5, "context": "sums"})
    assert not unread.rows
