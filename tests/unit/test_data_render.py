"""Which tokens are trained: exact masks for templates of every kind, told from the decoded runs of targets."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
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

from dstune.core.errors import UserError
from dstune.data.chat.proof import Server, difference
from dstune.data.chat.targets import target_mask
from dstune.data.chat.template import ChatTemplate
from dstune.data.collate import NO_TARGET
from dstune.data.render import ChatRenderer, RenderError
from dstune.data.stopping import stop_token_ids
from dstune.data.template_date import freeze_date
from dstune.data.tokenize import RowTokenizer
from dstune.tasks.chat.config import ChatConfig, Reasoning, Turns


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


def encoded(tokenizer: Any, messages: list[dict[str, Any]], *, date: str = "2025-03-09", **task: Any) -> list[Any]:
    """The samples of a conversation; each turn is what a server would make the model write, told without our code."""
    encode = RowTokenizer(tokenizer, ChatConfig(template_date=date, **task), "messages", max_length=100_000)
    samples = encode.samples([{"messages": messages}], [0])
    assert encode.renderer is not None
    assert [sample.problem for sample in samples] == [""] * len(samples)
    stops = frozenset(stop_token_ids(tokenizer))
    server = Server(tokenizer, stops, date, task.get("chat_template_kwargs", {}), encode.renderer.facts)
    rows = [{"input_ids": sample.input_ids, "labels": sample.labels} for sample in samples]
    if stops_with_a_token(tokenizer) and not task:
        for turn in server.turns({"messages": messages}):
            assert difference(turn, rows, stops) is None
    return samples


def stops_with_a_token(tokenizer: Any) -> bool:
    return tokenizer.chat_template != PLAIN_LINES and "loop.last" not in tokenizer.chat_template.split("generation")[0]


def trained(tokenizer: Any, messages: list[dict[str, Any]], *, date: str = "2025-03-09", **task: Any) -> list[str]:
    """The runs of tokens that are targets, decoded."""
    runs = []
    for sample in encoded(tokenizer, messages, date=date, **task):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], sample.labels != NO_TARGET, [0]])))
        runs += [tokenizer.decode(sample.labels[start:end]) for start, end in edges.reshape(-1, 2)]
    return runs


def refusal(tokenizer: Any, messages: list[dict[str, Any]], **row: Any) -> str:
    """Why the row is not trained."""
    encode = RowTokenizer(tokenizer, ChatConfig(template_date="2025-03-09"), "messages", max_length=100_000)
    (sample,) = encode.samples([{"messages": messages, **row}], [0])
    return sample.problem


TWO_TURNS = [user("Hello"), assistant("Hello"), user("Hello"), assistant("I am fine, thanks.")]


@pytest.mark.parametrize("template", [CHATML, CHATML_DEFAULT_SYSTEM, QWEN3.replace("or reasoning", "and reasoning")])
def test_chatml_repeated_messages(template):
    expected = ["Hello<|im_end|>", "I am fine, thanks.<|im_end|>"]
    assert trained(byte_tokenizer(template), TWO_TURNS) == expected
    assert trained(byte_tokenizer(template), [system("Hello"), *TWO_TURNS]) == expected


def test_a_template_without_generation_prompt():
    """A server asks with nothing behind the question, so the model has to write the heading of its turn."""
    heading = "<|im_start|>assistant\n"
    assert trained(byte_tokenizer(CHATML_WITHOUT_PROMPT), TWO_TURNS) == [
        f"{heading}Hello<|im_end|>",
        f"{heading}I am fine, thanks.<|im_end|>",
    ]


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
    text = ChatTemplate(tokenizer, "2025-03-09").text(messages)
    assert text.startswith(
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday Date: 09 Mar 2025\n\nBe kind"
    )
    ids = ChatRenderer(tokenizer, "2025-03-09").prompt_ids(messages[:2])
    assert ids.count(tokenizer.bos_token_id) == 1


def test_frozen_date_formats():
    template = "{{ strftime_now('%Y-%m-%d %A %-d %H:%M %F %e %R') }}|{{ strftime_now is defined }}"
    renderer_text = byte_tokenizer().apply_chat_template(
        [user("Hi")], chat_template=freeze_date(template, "2025-03-09"), tokenize=False
    )
    assert renderer_text == "2025-03-09 Sunday 9 00:00 2025-03-09  9 00:00|True"
    assert freeze_date("\nno date", "2025-03-09") == "\nno date"
    begins_with_newline = freeze_date("\n x{{ strftime_now('%d') }}", "2025-03-09")
    assert (
        byte_tokenizer().apply_chat_template([user("Hi")], chat_template=begins_with_newline, tokenize=False)
        == "\n x09"
    )


def test_mistral_without_markers_of_roles():
    tokenizer = byte_tokenizer(MISTRAL, eos="</s>", bos="<s>")
    assert trained(tokenizer, TWO_TURNS) == [" Hello</s>", " I am fine, thanks.</s>"]
    # The system prompt is in the last message if that is a question: a server shows it, the finished turn does not.
    samples = encoded(tokenizer, [system("Be kind"), *TWO_TURNS])
    texts = [tokenizer.decode(sample.input_ids[sample.labels == NO_TARGET]) for sample in samples]
    assert ["Be kind" in text for text in texts] == [True, True]


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
    first, second = encoded(byte_tokenizer(QWEN3), messages)
    decode = byte_tokenizer().decode
    assert decode(first.labels[first.labels != NO_TARGET]) == "<think>\nHello?\n</think>\n\nHello<|im_end|>"
    assert decode(second.labels[second.labels != NO_TARGET]) == "<think>\nHm.\n</think>\n\nNo<|im_end|>"
    # What a server shows of the first turn when it asks for the second.
    assert "<|im_start|>assistant\nHello<|im_end|>" in decode(second.input_ids)
    assert trained(byte_tokenizer(QWEN3), messages, turns=Turns.last) == ["<think>\nHm.\n</think>\n\nNo<|im_end|>"]
    thoughtless = trained(byte_tokenizer(QWEN3), messages, reasoning=Reasoning.drop)
    assert thoughtless == [f"<think>\n\n</think>\n\n{answer}<|im_end|>" for answer in ("Hello", "No")]


def test_what_a_user_writes_in_think_tags_stays_where_a_template_takes_reasoning_from_a_field():
    field = "(('<think>' + message.reasoning_content + '</think>') if message.reasoning_content is defined else '')"
    tokenizer = byte_tokenizer(CHATML.replace("message['content'] +", f"{field} + message['content'] +"))
    (sample,) = encoded(tokenizer, [user("<think>Hm.</think> Why?"), assistant("<think>So.</think> Yes")])
    text = tokenizer.decode(sample.input_ids)
    assert "<|im_start|>user\n<think>Hm.</think> Why?<|im_end|>" in text
    assert "<|im_start|>assistant\n<think>So.</think>Yes<|im_end|>" in text


def test_qwen3_adds_empty_thinking_to_the_last_turn():
    """Each turn is the last one when it is written."""
    assert trained(byte_tokenizer(QWEN3), TWO_TURNS) == [
        "<think>\n\n</think>\n\nHello<|im_end|>",
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
    call_ = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>'
    nothing = "<think>\n\n</think>\n\n"
    assert trained(byte_tokenizer(QWEN3), messages) == [
        f"<think>\nLook.\n</think>\n\n{call_}",
        f"{nothing}It is sunny.<|im_end|>",
        f"{nothing}Yes<|im_end|>",
    ]
    # Both turns after the question share a sample, the one after the next question has its own.
    assert len(encoded(byte_tokenizer(QWEN3), messages)) == 2


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
    tool_call = {"role": "assistant", "tool_calls": call("weather", {"city": "Paris"})}
    messages = [user("Weather?"), tool_call, tool('say "sunny"\n'), assistant("It is sunny.")]
    assert trained(tokenizer, messages) == [
        '{"name": "weather", "parameters": {"city": "Paris"}}<|eom_id|>',
        "It is sunny.<|eot_id|>",
    ]


def test_generation_prompt_that_opens_thinking():
    """What the generation prompt opened is not the model's to write; a turn without it is never asked for in this way."""
    messages = [user("Hi"), assistant("Yes", weight=0), user("So"), assistant("<think>\nHm.\n</think>\nNo")]
    assert trained(byte_tokenizer(THINKING_PROMPT), messages) == ["Hm.\n</think>\nNo<|im_end|>"]
    reason = refusal(byte_tokenizer(THINKING_PROMPT), [user("Hi"), assistant("Yes")])
    assert "message 2 (assistant)" in reason
    assert "assistant\\n<think>\\n'" in reason
    assert "assistant\\nYes" in reason


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
    tokenizer = byte_tokenizer(PLAIN_LINES)
    assert trained(tokenizer, TWO_TURNS) == ["Hello\n", "I am fine, thanks.\n"]
    for sample in encoded(tokenizer, TWO_TURNS):
        first = np.flatnonzero(sample.labels != NO_TARGET)[0]
        context = tokenizer.decode(sample.input_ids[:first])
        assert context.endswith("assistant: ")
        assert sample.input_ids[:first].tolist() == tokenizer(context, add_special_tokens=False)["input_ids"]


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
        ChatRenderer(tokenizer, None).passages([user("Yes"), user("Hi"), assistant("No")])


def test_a_template_that_shortens_the_history():
    """Each turn is whole when it is written, and short where later ones see it."""
    short = "(message['content'] if message['content']|length < 10 or loop.last else '(long)')"
    tokenizer = byte_tokenizer(CHATML.replace("message['content']", short))
    messages = [user("Hi"), assistant("No, and no again."), user("So"), assistant("No")]
    assert trained(tokenizer, messages) == ["No, and no again.<|im_end|>", "No<|im_end|>"]


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

    assert names(byte_tokenizer(LLAMA3, eos="</s>")) == ["<|eot_id|>", "<|eom_id|>", "</s>"]
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


def test_two_renderings_a_turn():
    """One with the prompt and one with the answer; the last one is the whole conversation."""
    renderer = ChatRenderer(byte_tokenizer(), None)
    calls = []
    render = renderer._template.direct

    def counted(messages, **settings):
        calls.append(len(messages))
        return render(messages, **settings)

    renderer._template.direct = counted
    (passage,) = renderer.passages([user("Hi "), assistant("Yes"), user("So\n\n"), assistant("No")])
    assert calls == [4, 1, 2, 3, 4]  # the first one to be compared with transformers' own
    assert [passage.text[place.start : place.end] for place in passage.places] == ["Yes<|im_end|>", "No<|im_end|>"]


def test_an_answer_that_begins_with_line_breaks():
    """The tokenizer makes one token of the prompt's last line break and the answer's first; a server cannot."""
    tokenizer = line_break_tokenizer()
    assert "ĊĊ" in tokenizer.tokenize("assistant\n\nYes")
    (sample,) = encoded(tokenizer, [user("Hi"), assistant("\nYes")])
    first = np.flatnonzero(sample.labels != NO_TARGET)[0]
    assert tokenizer.decode(sample.input_ids[:first]).endswith("assistant\n")
    assert tokenizer.decode(sample.labels[sample.labels != NO_TARGET]) == "\nYes<|im_end|>"


def line_break_tokenizer() -> Any:
    """Two line breaks are one token, also in front of a letter, as Qwen's."""
    tokenizer = byte_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["vocab"]["ĊĊ"] = max(tokenizer.get_vocab().values()) + 1
    state["model"]["merges"] += [["Ċ", "Ċ"]]
    state["pre_tokenizer"]["use_regex"] = False  # GPT-2's pattern takes the two apart
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="<|im_end|>", chat_template=CHATML
    )


@pytest.mark.parametrize("name", ["add_generation_prompt", "continue_final_message", "tools"])
def test_arguments_of_rendering_are_none_of_the_template(name):
    with pytest.raises(UserError, match=f"task.chat_template_kwargs.{name}: is no argument of a template"):
        ChatRenderer(byte_tokenizer(), None, {"enable_thinking": True, name: True})
