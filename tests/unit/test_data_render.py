"""Which tokens are trained: exact masks for templates of every kind, told from the decoded runs of targets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from unit.data_helpers import CHATML, byte_tokenizer, metaspace_tokenizer
from unit.templates import (
    CHATML_DEFAULT_SYSTEM,
    CHATML_WITHOUT_PROMPT,
    LLAMA3,
    MARKED_WITH_END,
    MARKED_WITHOUT_END,
    MISTRAL,
    PLAIN_LINES,
    QWEN3,
    THINKING_PROMPT,
)

from dstune.config.task_schema import ChatConfig
from dstune.data.collate import NO_TARGET
from dstune.data.render import ChatRenderer, RenderError, target_mask
from dstune.data.stopping import stop_token_ids
from dstune.data.template_date import freeze_date
from dstune.data.tokenize import RowTokenizer
from dstune.errors import UserError


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def tool(content: str) -> dict[str, Any]:
    return {"role": "tool", "content": content}


def call(name: str, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": name, "arguments": arguments}}]


def trained(tokenizer: Any, messages: list[dict[str, Any]], *, date: str = "2025-03-09") -> list[str]:
    """The runs of tokens that are targets, decoded; checks the token ids against the whole rendered text."""
    encode = RowTokenizer(tokenizer, ChatConfig(template_date=date), "messages", max_length=100_000)
    (sample,) = encode.samples([{"messages": messages}], [0])
    assert sample.problem == ""
    assert encode.renderer is not None
    text = encode.renderer.text(messages)
    assert sample.input_ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert (sample.labels[sample.labels != NO_TARGET] == sample.input_ids[sample.labels != NO_TARGET]).all()
    edges = np.flatnonzero(np.diff(np.concatenate([[0], sample.labels != NO_TARGET, [0]])))
    return [tokenizer.decode(sample.input_ids[start:end]) for start, end in edges.reshape(-1, 2)]


TWO_TURNS = [user("Hello"), assistant("Hello"), user("Hello"), assistant("I am fine, thanks.")]


@pytest.mark.parametrize(
    "template", [CHATML, CHATML_DEFAULT_SYSTEM, CHATML_WITHOUT_PROMPT, QWEN3.replace("or reasoning", "and reasoning")]
)
def test_chatml_repeated_messages(template):
    expected = ["Hello<|im_end|>", "I am fine, thanks.<|im_end|>"]
    assert trained(byte_tokenizer(template), TWO_TURNS) == expected
    assert trained(byte_tokenizer(template), [system("Hello"), *TWO_TURNS]) == expected


def test_text_that_looks_like_a_turn_stays_where_it_is():
    messages = [user("assistant\nYes"), assistant("assistant\nYes"), user("Yes\nassistant"), assistant("user\nNo")]
    assert trained(byte_tokenizer(), messages) == ["assistant\nYes<|im_end|>", "user\nNo<|im_end|>"]


def test_white_space_of_messages_is_kept_or_trimmed_as_the_template_does():
    messages = [user(" Hi \n"), assistant("  Yes \n\n"), user("So\t"), assistant("\nNo")]
    assert trained(byte_tokenizer(), messages) == ["  Yes \n\n<|im_end|>", "\nNo<|im_end|>"]
    llama = byte_tokenizer(LLAMA3, eos="<|eot_id|>", bos="<|begin_of_text|>")
    assert trained(llama, messages) == ["Yes<|eot_id|>", "No<|eot_id|>"]


def test_an_empty_answer_trains_its_end():
    assert trained(byte_tokenizer(), [user("Hi"), assistant(""), user("So"), assistant("No")]) == [
        "<|im_end|>",
        "No<|im_end|>",
    ]


def test_an_empty_question():
    assert trained(byte_tokenizer(), [user(""), assistant("Yes")]) == ["Yes<|im_end|>"]


def test_characters_that_serve_as_marks():
    assert trained(byte_tokenizer(), [user("\U000f0001"), assistant("\U000f0002 yes")]) == ["\U000f0002 yes<|im_end|>"]


def test_characters_of_several_bytes():
    messages = [user("Größe?"), assistant("大きい 🙂"), user("🙂"), assistant("é")]
    assert trained(byte_tokenizer(), messages) == ["大きい 🙂<|im_end|>", "é<|im_end|>"]


def test_llama3_has_one_bos_and_a_frozen_date():
    tokenizer = byte_tokenizer(LLAMA3, eos="<|eot_id|>", bos="<|begin_of_text|>")
    messages = [system("Be kind"), *TWO_TURNS]
    assert trained(tokenizer, messages) == ["Hello<|eot_id|>", "I am fine, thanks.<|eot_id|>"]
    text = ChatRenderer(tokenizer, "2025-03-09").text(messages)
    assert text.startswith(
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday Date: 09 Mar 2025\n\nBe kind"
    )
    ids = ChatRenderer(tokenizer, "2025-03-09").prompt_ids(messages[:2])
    assert ids.count(tokenizer.bos_token_id) == 1


def test_frozen_date_formats():
    template = "{{ strftime_now('%Y-%m-%d %A %-d %H:%M') }}|{{ strftime_now is defined }}"
    renderer_text = byte_tokenizer().apply_chat_template(
        [user("Hi")], chat_template=freeze_date(template, "2025-03-09"), tokenize=False
    )
    assert renderer_text == "2025-03-09 Sunday 9 00:00|True"
    assert freeze_date("\nno date", "2025-03-09") == "\nno date"
    begins_with_newline = freeze_date("\n x{{ strftime_now('%d') }}", "2025-03-09")
    assert (
        byte_tokenizer().apply_chat_template([user("Hi")], chat_template=begins_with_newline, tokenize=False)
        == "\n x09"
    )


def test_mistral_without_markers_of_roles():
    tokenizer = byte_tokenizer(MISTRAL, eos="</s>", bos="<s>")
    assert trained(tokenizer, TWO_TURNS) == [" Hello</s>", " I am fine, thanks.</s>"]
    # The system prompt moves into the last question.
    assert trained(tokenizer, [system("Be kind"), *TWO_TURNS]) == [" Hello</s>", " I am fine, thanks.</s>"]


def test_tokens_that_begin_with_the_space_before_a_word():
    tokenizer = metaspace_tokenizer(MISTRAL)
    assert trained(tokenizer, TWO_TURNS) == ["Hello</s>", "I am fine, thanks.</s>"]
    encode = RowTokenizer(tokenizer, ChatConfig(), "messages", 1000)
    (sample,) = encode.samples([{"messages": TWO_TURNS}], [0])
    targets = sample.labels[sample.labels != NO_TARGET]
    assert tokenizer.convert_ids_to_tokens(targets)[0].startswith("▁H")


def test_qwen3_removes_thinking_from_the_history():
    messages = [
        user("Hi"),
        assistant("<think>\nHello?\n</think>\n\nHello"),
        user("So"),
        assistant("<think>\nHm.\n</think>\n\nNo"),
    ]
    assert trained(byte_tokenizer(QWEN3), messages) == ["Hello<|im_end|>", "<think>\nHm.\n</think>\n\nNo<|im_end|>"]


def test_qwen3_adds_empty_thinking_to_the_last_turn():
    assert trained(byte_tokenizer(QWEN3), TWO_TURNS) == [
        "Hello<|im_end|>",
        "<think>\n\n</think>\n\nI am fine, thanks.<|im_end|>",
    ]


def test_qwen3_tool_turns():
    messages = [
        user("Weather?"),
        assistant("<think>\nLook.\n</think>\n\n", tool_calls=call("weather", {"city": "Paris"})),
        tool("sunny"),
        tool("warm"),
        assistant("It is sunny."),
        user("And now?"),
        assistant("Yes"),
    ]
    first = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>'
    last = "<think>\n\n</think>\n\nYes<|im_end|>"
    assert trained(byte_tokenizer(QWEN3), messages) == [first, "It is sunny.<|im_end|>", last]


def test_qwen3_looks_at_how_a_user_message_starts():
    """Marks at the edges of `<tool_response>` would change which turns keep their thinking."""
    messages = [
        user("Weather?"),
        assistant("<think>\nLook.\n</think>\n\nLet me see"),
        user("<tool_response>\nsunny\n</tool_response>"),
        assistant("It is sunny."),
    ]
    assert trained(byte_tokenizer(QWEN3), messages) == [
        "<think>\nLook.\n</think>\n\nLet me see<|im_end|>",
        "<think>\n\n</think>\n\nIt is sunny.<|im_end|>",
    ]


def test_llama3_tool_call_ends_with_a_token_of_its_own():
    tokenizer = byte_tokenizer(LLAMA3, eos="<|eot_id|>", bos="<|begin_of_text|>")
    asked = {"role": "assistant", "tool_calls": call("weather", {"city": "Paris"})}
    messages = [user("Weather?"), asked, tool('say "sunny"\n'), assistant("It is sunny.")]
    assert trained(tokenizer, messages) == [
        '{"name": "weather", "parameters": {"city": "Paris"}}<|eom_id|>',
        "It is sunny.<|eot_id|>",
    ]


def test_generation_prompt_that_opens_thinking():
    """What the generation prompt opened is not the model's to write; where it is left out, the answer follows."""
    messages = [user("Hi"), assistant("Yes"), user("So"), assistant("<think>\nHm.\n</think>\nNo")]
    expected = ["Yes<|im_end|>", "Hm.\n</think>\nNo<|im_end|>"]
    assert trained(byte_tokenizer(THINKING_PROMPT), messages) == expected


@pytest.mark.parametrize("template", [MARKED_WITH_END, MARKED_WITHOUT_END])
def test_marks_of_the_template(template):
    assert trained(byte_tokenizer(template), [system("Be kind"), *TWO_TURNS]) == [
        "Hello<|im_end|>",
        "I am fine, thanks.<|im_end|>",
    ]


def test_marks_of_the_template_are_obeyed_where_they_leave_a_turn_out():
    template = MARKED_WITH_END.replace("message['role'] == 'assistant'", "message['role'] == 'assistant' and loop.last")
    assert trained(byte_tokenizer(template), TWO_TURNS) == ["I am fine, thanks.<|im_end|>"]


def test_a_template_that_ends_turns_with_a_line_break():
    # The space belongs to the heading, but the tokenizer makes one token of it and the first word.
    assert trained(byte_tokenizer(PLAIN_LINES), TWO_TURNS) == [" Hello\n", " I am fine, thanks.\n"]


def test_a_template_whose_turns_have_no_end_is_refused():
    template = "{% for message in messages %}{{ '\n' + message['role'] + ': ' + message['content'] }}{% endfor %}"
    with pytest.raises(UserError, match=r"model\.chat_template.*never learn to stop"):
        ChatRenderer(byte_tokenizer(template), None)


def test_a_template_that_forgets_the_assistant_is_refused():
    template = (
        "{% for message in messages if message['role'] == 'user' %}{{ message['content'] + '<|im_end|>' }}{% endfor %}"
    )
    with pytest.raises(UserError, match=r"model\.chat_template"):
        ChatRenderer(byte_tokenizer(template), None)


def test_a_broken_template_is_refused():
    with pytest.raises(UserError, match=r"model\.chat_template"):
        ChatRenderer(byte_tokenizer("{% for message in messages %}"), None)


def test_no_template_says_what_to_set():
    with pytest.raises(UserError, match=r"model\.chat_template: the model has no chat template"):
        ChatRenderer(byte_tokenizer(None), None)


def test_a_conversation_that_the_template_refuses():
    tokenizer = byte_tokenizer(MISTRAL, eos="</s>")
    with pytest.raises(RenderError, match="roles must alternate"):
        ChatRenderer(tokenizer, None).spans([assistant("Yes"), user("Hi")])


def test_a_mask_that_cannot_be_told_is_an_error_and_no_guess():
    """The template shortens long answers of the history, so no beginning and no mark shows where they went."""
    short = "(message['content'] if message['content']|length < 10 or loop.last else '(long)')"
    tokenizer = byte_tokenizer(CHATML.replace("message['content']", short))
    assert trained(tokenizer, [user("Hi"), assistant("Yes"), user("So"), assistant("No, and no again.")])
    with pytest.raises(RenderError, match="generation"):
        ChatRenderer(tokenizer, None).spans([user("Hi"), assistant("No, and no again."), user("So"), assistant("No")])


def test_tools_reach_the_template():
    template = "{% if tools %}<|im_start|>tools\n{{ tools[0].function.name }}<|im_end|>\n{% endif %}" + CHATML
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    tokenizer = byte_tokenizer(template)
    encode = RowTokenizer(tokenizer, ChatConfig(), "messages", 1000)
    (sample,) = encode.samples([{"messages": [user("Hi"), assistant("Yes")], "tools": tools}], [0])
    assert tokenizer.decode(sample.input_ids).startswith("<|im_start|>tools\nweather<|im_end|>\n<|im_start|>user\nHi")
    assert tokenizer.decode(sample.labels[sample.labels != NO_TARGET]) == "Yes<|im_end|>"


def test_tokens_that_end_an_answer():
    """The end of the text and the end of a turn, which are two tokens in many chat models."""

    def names(tokenizer):
        return tokenizer.convert_ids_to_tokens(stop_token_ids(tokenizer))

    assert names(byte_tokenizer(LLAMA3, eos="</s>")) == ["<|eot_id|>", "</s>"]
    assert names(byte_tokenizer()) == ["<|im_end|>"]
    assert names(byte_tokenizer(None)) == ["<|im_end|>"]
    assert names(byte_tokenizer(PLAIN_LINES)) == ["<|im_end|>"]


def test_train_on_prompt_counts_every_token_but_the_first():
    encode = RowTokenizer(byte_tokenizer(), ChatConfig(train_on_prompt=True), "messages", max_length=1000)
    (sample,) = encode.samples([{"messages": TWO_TURNS}], [0])
    assert sample.labels[0] == NO_TARGET
    assert (sample.labels[1:] == sample.input_ids[1:]).all()


def test_target_mask_by_hand():
    offsets = np.array([[0, 3], [3, 5], [5, 5], [5, 9], [9, 12], [12, 13]])
    mask = target_mask(offsets, [(4, 9), (12, 13)])
    # [3, 5) reaches over the edge at 4 and counts; the empty token at 5 lies inside.
    assert mask.tolist() == [False, True, True, True, False, True]
    assert not target_mask(offsets, []).any()


def test_two_renderings_a_conversation():
    """What the template prints between messages is learnt once; white space after a message does not change that."""
    renderer = ChatRenderer(byte_tokenizer(), None)
    renderer.spans(TWO_TURNS)
    calls = []
    render = renderer.text

    def counted(messages, **settings):
        calls.append(len(messages))
        return render(messages, **settings)

    renderer.text = counted
    renderer.spans([user("Hi "), assistant("Yes"), user("So\n\n"), assistant("No")] * 5)
    assert calls == [20, 20]


def test_both_ways_agree_with_rendering_every_beginning():
    """For templates that only append, the marks must find what the beginnings of the conversation show."""
    for template, eos in ((CHATML_DEFAULT_SYSTEM, "<|im_end|>"), (LLAMA3, "<|eot_id|>"), (MISTRAL, "</s>")):
        renderer = ChatRenderer(byte_tokenizer(template, eos=eos, bos="<s>"), "2025-03-09")
        text, spans = renderer.spans(TWO_TURNS)
        assert spans == renderer._spans_by_prefixes(text, TWO_TURNS, None)
