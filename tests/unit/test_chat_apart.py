"""Turns whose prompt does not begin the conversation: each is trained behind the prompt of a server, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from unit.data_helpers import CHATML, byte_tokenizer
from unit.templates import FIRST_OF_TWO, MARKED_WITH_END, MISTRAL, THINKING_PROMPT
from unit.test_chat_faults import CALLING, DATE, REASONED, data_of
from unit.test_data_render import assistant, line_break_tokenizer, refusal, system, tool, user

from dstune.core.errors import UserError
from dstune.data.build import prove
from dstune.data.chat.prompt import ChatPrompts
from dstune.data.collate import NO_TARGET
from dstune.data.rows import normalise
from dstune.data.tokenize import RowTokenizer
from dstune.tasks.chat import Chat
from dstune.tasks.chat.config import ChatConfig, Reasoning

EMPTY_THOUGHT = CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>\n\n</think>\n\n' }}{% endif")
"""Gemma 4 31B, MiniCPM5: the prompt closes an empty thought, which the conversation does not show."""
CALLS_AND_THOUGHT = CHATML.replace(
    "message['content'] +",
    "('<think>' + message.reasoning_content + '</think>' if message.reasoning_content and not message.tool_calls"
    " else '<think>' + message.reasoning_content + '</think>' if message.reasoning_content and messages[-1].role == 'tool'"
    " or (message.reasoning_content and loop.last) else '') + (message.content or '') + "
    "(message.tool_calls | map(attribute='function') | list | tojson if message.tool_calls else '') +",
)
"""gpt-oss: the reasoning of a call is shown until its result is answered."""
REASONED_CALL = [{**CALLING[0]}, {**CALLING[1], "reasoning_content": "Look."}, tool("sunny"), assistant("It is sunny.")]


def proven(tmp_path: Path, template: str, rows: list[Any], **task: Any) -> list[tuple[str, str]]:
    """The context and the target of each sample, decoded, once they are proven against transformers' own rendering."""
    config, tokenizer, data = data_of(tmp_path, template, rows, ChatConfig(template_date=DATE, **task))
    assert prove(config, tokenizer, data).turns > 0
    texts = []
    for row in data.train.table:
        start = next(at for at, label in enumerate(row["labels"]) if label != NO_TARGET)
        texts.append((tokenizer.decode(row["input_ids"][:start]), tokenizer.decode(row["input_ids"][start:])))
    return sorted(texts, key=lambda pair: len(pair[0]))


def prompted(template: str, messages: list[Any], **arguments: Any) -> str:
    return byte_tokenizer(template).apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **arguments
    )


@pytest.mark.parametrize("content", ["Yes", "<tool_call>\n{}\n</tool_call>", "<b>No</b>"])
def test_an_answer_is_trained_behind_an_empty_thought_that_the_conversation_does_not_show(tmp_path, content):
    messages = [user("Hi"), assistant("Yes"), user("So"), assistant(content)]
    first, second = proven(tmp_path, EMPTY_THOUGHT, [{"messages": messages}])
    assert first == (prompted(EMPTY_THOUGHT, messages[:1]), "Yes<|im_end|>\n")
    assert second == (prompted(EMPTY_THOUGHT, messages[:3]), f"{content}<|im_end|>\n")


def test_a_history_that_hides_the_reasoning_of_an_answered_call_is_no_obstacle(tmp_path):
    """What a server reads for the answer holds the call as it was trained, so both are one sample."""
    ((context, rest),) = proven(tmp_path, CALLS_AND_THOUGHT, [{"messages": REASONED_CALL}])
    prompt = prompted(CALLS_AND_THOUGHT, REASONED_CALL[:3])
    assert "<think>Look.</think>" in prompt
    assert context + rest == f"{prompt}It is sunny.<|im_end|>\n"
    assert context == prompted(CALLS_AND_THOUGHT, REASONED_CALL[:1])


def test_a_system_text_that_stands_in_the_last_question_alone_is_trained_where_a_server_has_it(tmp_path):
    messages = [system("Be kind"), user("Hi"), assistant("Yes")]
    ((context, target),) = proven(tmp_path, MISTRAL, [{"messages": messages}])
    assert (context, target) == (prompted(MISTRAL, messages[:2]), " Yes<|im_end|>")
    assert "Be kind" in context


@pytest.mark.parametrize(
    ("beyond", "message"),
    [
        ("<think>\n", assistant("Yes")),  # it would have to close the thought
        ("<think>\n", CALLING[1]),
        ("<think></think>", assistant("Yes", reasoning_content="Hm.")),  # it would think behind its thought
        ("Answer: ", assistant("Yes")),
    ],
)
def test_an_answer_that_does_not_go_on_from_its_prompt_is_refused(beyond, message):
    template = CALLS_AND_THOUGHT.replace("assistant\n' }}{% endif", f"assistant\n{beyond}' }}}}{{% endif")
    assert "than a server would prompt with" in refusal(byte_tokenizer(template), [user("Hi"), message])


def test_an_answer_that_opens_a_thought_behind_one_that_the_prompt_has_closed_is_refused():
    message = assistant("<think></think>Yes")
    assert "than a server would prompt with" in refusal(byte_tokenizer(EMPTY_THOUGHT), [user("Hi"), message])


def test_the_proof_fails_where_the_prompt_of_such_a_turn_is_another(tmp_path):
    rows = [{"messages": [user("Hi"), assistant("Yes")]}]
    config, _, data = data_of(tmp_path, EMPTY_THOUGHT, rows, ChatConfig(template_date=DATE))
    with pytest.raises(UserError, match="not trained as a server would render it"):
        prove(config, byte_tokenizer(EMPTY_THOUGHT.replace("<think>\n\n<", "<think>\n<")), data)


def test_an_answer_behind_an_open_thought_names_the_remedies():
    text = refusal(byte_tokenizer(THINKING_PROMPT), [user("Hi"), assistant("Yes")])
    assert "reasoning_content" in text
    assert "model.chat_template=chatml" in text


BRACKETS = CHATML.replace("message['content'] +", "message['content'] + ('' if true else '[THINK][/THINK]') +")


@pytest.mark.parametrize(
    ("template", "task", "first"),
    [
        (CHATML, {"reasoning_marks": ["<think>", "</think>"]}, "<think>\nHm.\n</think>\n\nYes<|im_end|>"),
        (CHATML, {"reasoning_marks": ["A:", "B:"]}, "A:Hm.B:Yes<|im_end|>"),
        (BRACKETS, {}, "[THINK]Hm.[/THINK]Yes<|im_end|>"),
    ],
)
def test_reasoning_is_written_inline_where_the_template_has_no_field_for_it(tmp_path, template, task, first):
    rows = [{"messages": REASONED}]
    ((context, rest),) = proven(tmp_path, template, rows, reasoning=Reasoning.inline, **task)
    assert context == prompted(template, REASONED[:1])
    assert rest.startswith(f"{first}\n<|im_start|>user\nSo<|im_end|>\n<|im_start|>assistant\n")
    assert rest.count("Well.") == 1


def test_the_local_engine_renders_the_context_that_inline_reasoning_was_trained_behind():
    """An answer comes back from a client as the model wrote it."""
    tokenizer = byte_tokenizer(BRACKETS)
    task = ChatConfig(template_date=DATE, reasoning=Reasoning.inline)
    (sample,) = RowTokenizer(tokenizer, task, "messages", max_length=1000).samples([{"messages": REASONED}], [0])
    answered = [user("Hi"), assistant("[THINK]Hm.[/THINK]Yes"), user("So")]
    prompt = ChatPrompts(tokenizer, DATE).ids(answered)
    assert sample.input_ids[: len(prompt)].tolist() == prompt
    assert sample.columns["labels"][len(prompt)] != NO_TARGET


def test_the_local_engine_renders_the_prompt_of_an_answer_behind_an_empty_thought():
    tokenizer = byte_tokenizer(EMPTY_THOUGHT)
    messages = [user("Hi"), assistant("Yes"), user("So"), assistant("No")]
    encode = RowTokenizer(tokenizer, ChatConfig(template_date=DATE), "messages", max_length=1000)
    for sample, asked in zip(encode.samples([{"messages": messages}], [0]), (messages[:1], messages[:3]), strict=True):
        prompt = ChatPrompts(tokenizer, DATE).ids(asked)
        assert sample.input_ids[: len(prompt)].tolist() == prompt
        assert (sample.columns["labels"] != NO_TARGET).argmax() == len(prompt)


@pytest.mark.parametrize(("template", "remedy"), [(BRACKETS, "[THINK]...[/THINK]"), (CHATML, "task.reasoning_marks=")])
def test_a_refusal_of_reasoning_proposes_to_write_it_inline(template, remedy):
    text = refusal(byte_tokenizer(template), REASONED)
    assert "task.reasoning=inline" in text
    assert remedy in text


def test_marks_are_read_from_how_the_tokenizer_takes_an_answer_apart():
    tokenizer = byte_tokenizer(CHATML)
    tokenizer.response_schema = {"x-regex": "(?:<reasoning>(?P<thinking>.*?)</reasoning>)?(?P<content>.*)"}
    task = ChatConfig(template_date=DATE, reasoning=Reasoning.inline)
    (sample,) = RowTokenizer(tokenizer, task, "messages", max_length=1000).samples([{"messages": REASONED}], [0])
    assert "<reasoning>\nHm.\n</reasoning>\n\nYes" in tokenizer.decode(sample.input_ids)


@pytest.mark.parametrize("marks", [[], ["<think>"], ["", "</think>"]])
def test_inline_reasoning_needs_two_marks(marks):
    task = ChatConfig(template_date=DATE, reasoning=Reasoning.inline, reasoning_marks=marks)
    with pytest.raises(UserError, match=r"task\.reasoning_marks"):
        RowTokenizer(byte_tokenizer(CHATML), task, "messages", max_length=1000)


def test_inline_reasoning_that_the_template_strips_is_refused():
    stripping = CHATML.replace("message['content']", "message['content'].split('</think>')[-1]")
    task = ChatConfig(template_date=DATE, reasoning=Reasoning.inline)
    encode = RowTokenizer(byte_tokenizer(stripping), task, "messages", max_length=1000)
    (sample,) = encode.samples([{"messages": REASONED}], [0])
    assert "does not print reasoning" in sample.problem
    assert "task.reasoning=inline" not in sample.problem


TURNS_OF_ONE_ROLE = [user("Hi"), user("You there?"), assistant("Yes"), assistant("What is it?")]
LAST_SYSTEM_ALONE = (
    "{% set ns = namespace(text='') %}{% for message in messages if message.role == 'system' %}"
    "{% set ns.text = message.content %}{% endfor %}{{ ns.text }}"
    + CHATML.replace("for message in messages", "for message in messages if message.role != 'system'")
)
ALTERNATING = (
    "{% for message in messages %}{% if loop.previtem and loop.previtem.role == message.role %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + CHATML
)


def row_of(messages: list[Any]) -> dict[str, Any]:
    return normalise({"messages": messages}, "messages", {})


@pytest.mark.parametrize(
    "messages",
    [
        TURNS_OF_ONE_ROLE,
        [system("Be kind"), system("Be short"), user("Hi"), assistant("Yes"), assistant("Sure")],
        [user("Hi"), assistant("Yes"), system("Be short"), user("So"), assistant("No"), assistant("Never")],
        [*CALLING, tool("sunny"), user("Quick!"), assistant("Sun."), assistant("All day.")],
    ],
)
def test_the_template_decides_on_the_order_of_roles(tmp_path, messages):
    ((context, rest),) = proven(tmp_path, CALLS_AND_THOUGHT, [row_of(messages)])
    expected = byte_tokenizer(CALLS_AND_THOUGHT).apply_chat_template(messages, tokenize=False)
    assert context + rest == expected
    answers = [f"{message['content']}<|im_end|>" for message in messages[-2:]]
    encode = RowTokenizer(
        byte_tokenizer(CALLS_AND_THOUGHT), ChatConfig(template_date=DATE), "messages", max_length=1000
    )
    (sample,) = encode.samples([row_of(messages)], [0])
    labels = sample.columns["labels"]
    assert encode.renderer is not None
    assert byte_tokenizer().decode(labels[labels != NO_TARGET]).endswith("".join(answers))


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        (ALTERNATING, TURNS_OF_ONE_ROLE, "roles must alternate"),
        (FIRST_OF_TWO, TURNS_OF_ONE_ROLE, "message 2 has the role user after user"),
        (
            LAST_SYSTEM_ALONE,
            [system("Be kind"), user("Hi"), assistant("Yes"), system("Be short"), user("So"), assistant("No")],
            "message 4 has the role system after assistant",
        ),
    ],
)
def test_an_order_of_roles_that_the_template_refuses_or_of_which_it_drops_a_message_is_refused(
    template, messages, reason
):
    assert reason in refusal(byte_tokenizer(template), row_of(messages)["messages"])


def printing_reasoning(condition: str) -> str:
    """ChatML that prints the reasoning of messages for which `condition` holds, and calls."""
    thought = (
        f"('<think>' + message.reasoning_content + '</think>' if message.reasoning_content and {condition} else '')"
    )
    calls = "(message.tool_calls | map(attribute='function') | list | tojson if message.tool_calls else '')"
    return CHATML.replace("message['content'] +", f"{thought} + (message.content or '') + {calls} +")


REASONS_IN_CALLS = printing_reasoning("message.tool_calls")
"""Gemma 4 31B, Command R7B: an answer's reasoning is dropped."""
DROPS_TEXT_OF_CALLS = CHATML.replace(
    "message['content'] +",
    "(message.tool_calls | map(attribute='function') | list | tojson if message.tool_calls else message.content) +",
)
"""Llama 3.1, Mistral 7B: a message with calls shows nothing else."""
AGENT = [
    CALLING[0],
    {**CALLING[1], "reasoning_content": "Look."},
    tool("sunny"),
    {**assistant("It is sunny."), "reasoning_content": "So."},
]


@pytest.mark.parametrize(
    ("template", "task", "trained", "context"),
    [
        (REASONS_IN_CALLS, {}, "<think>Look.</think>", "It is sunny."),
        (
            DROPS_TEXT_OF_CALLS,
            {"reasoning": Reasoning.inline, "reasoning_marks": ["<think>", "</think>"]},
            "<think>\nSo.\n</think>\n\nIt is sunny.",
            "weather",
        ),
    ],
)
def test_only_turns_whose_reasoning_is_printed_are_trained_and_the_others_are_counted(
    tmp_path, template, task, trained, context
):
    rows = [{"messages": AGENT}, {"messages": [user("Again?"), *AGENT]}]
    config, tokenizer, data = data_of(tmp_path, template, rows, ChatConfig(template_date=DATE, **task))
    assert "2 turns of the assistant are context" in prove(config, tokenizer, data).note
    for row in data.train.table:
        target = tokenizer.decode([label for label in row["labels"] if label != NO_TARGET])
        assert trained in target
        assert context not in target
        assert context in tokenizer.decode(row["input_ids"])


def test_a_row_whose_reasoning_is_never_printed_is_refused_with_the_remedies():
    text = refusal(byte_tokenizer(REASONS_IN_CALLS), REASONED)
    assert "reasoning (reasoning_content, reasoning, thinking) of turns that call no tool" in text
    assert "task.reasoning=inline" in text


def test_inline_reasoning_takes_the_place_of_a_field_that_is_read_in_calls_alone(tmp_path):
    task = {"reasoning": Reasoning.inline, "reasoning_marks": ["<think>", "</think>"]}
    ((_, rest),) = proven(tmp_path, REASONS_IN_CALLS, [{"messages": AGENT}], **task)
    assert rest.startswith("<think>Look.</think>")
    assert "<think>\nSo.\n</think>\n\nIt is sunny.<|im_end|>" in rest


def test_inline_reasoning_behind_an_empty_thought_of_the_template_is_refused():
    """A client sends both back, and the template would write a third thought in front of them."""
    template = CHATML.replace(
        "message['content'] +", "('<think></think>' if message.role == 'assistant' else '') + message['content'] +"
    )
    task = ChatConfig(template_date=DATE, reasoning=Reasoning.inline)
    encode = RowTokenizer(byte_tokenizer(template), task, "messages", max_length=1000)
    (sample,) = encode.samples([{"messages": REASONED}], [0])
    assert "does not print reasoning" in sample.problem


IN_PARTS = CHATML.replace(
    "message['content'] +",
    "'' }}{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{{ '[THINK]' + part.thinking + '[/THINK]' if part.type == 'thinking' else part.text }}{% endfor %}{% endif %}{{ '' +",
)
"""Ministral 3: reasoning is a part of the content."""


def test_reasoning_that_a_template_reads_as_a_part_of_the_content_is_given_as_one(tmp_path):
    ((context, rest),) = proven(tmp_path, IN_PARTS, [{"messages": REASONED}])
    assert context == prompted(IN_PARTS, REASONED[:1])
    assert rest.startswith("[THINK]Hm.[/THINK]Yes<|im_end|>")
    tokenizer = byte_tokenizer(IN_PARTS)
    prompt = tokenizer.decode(ChatPrompts(tokenizer, DATE).ids(REASONED[:3]))
    assert prompt == context + rest[: len(prompt) - len(context)]


LINE_BREAK_BEHIND_A_RESULT = CHATML.replace("{% for", "{% set last = messages | length %}{% for").replace(
    "message['content'] +",
    "(message.content or '') + ('\\n' if message.role == 'tool' and loop.index < last else '') + "
    "(message.tool_calls | map(attribute='function') | list | tojson if message.tool_calls else '') +",
)
"""Hermes 3: a tool's result ends with a line break as soon as a message follows."""


def test_an_answer_is_trained_where_a_server_asks_for_it_if_the_history_differs_in_white_space(tmp_path):
    messages = [*CALLING, tool("sunny"), assistant("Warm.")]
    ((context, rest),) = proven(tmp_path, LINE_BREAK_BEHIND_A_RESULT, [{"messages": messages}])
    asked = prompted(LINE_BREAK_BEHIND_A_RESULT, messages[:-1])
    assert "sunny<|im_end|>" in asked
    assert context + rest == f"{asked}Warm.<|im_end|>\n"


@pytest.mark.parametrize("marks", [["<think>", "</think>"], ["A:", "B:"]])
@pytest.mark.parametrize("template", [CHATML, REASONS_IN_CALLS], ids=["no field", "a field in calls"])
def test_an_export_renders_reasoning_from_a_field_as_it_was_trained_inline(template, marks):
    """A client may send back what a server told apart; the base model's template would drop it."""
    task = ChatConfig(template_date=DATE, reasoning=Reasoning.inline, reasoning_marks=marks)
    messages = AGENT if template is REASONS_IN_CALLS else REASONED[:2]
    row = {"messages": [*messages, user("So"), {**assistant("No"), "reasoning_content": "Well."}]}
    (sample,) = RowTokenizer(byte_tokenizer(template), task, "messages", max_length=1000).samples([row], [0])
    exported = byte_tokenizer(template)
    Chat(task).rewrite_template(exported)
    prompt = ChatPrompts(exported, DATE).ids(row["messages"][:-1])
    assert sample.input_ids[: len(prompt)].tolist() == prompt
    assert f"{marks[0]}Well.{marks[1]}" in exported.decode(sample.input_ids[len(prompt) :]).replace("\n", "")
    assert exported.apply_chat_template(row["messages"][:-1], return_dict=False, add_generation_prompt=True) == prompt


MARKS_BEHIND_A_THOUGHT = MARKED_WITH_END.replace(
    "assistant\n' }}{% endif", "assistant\n<think>\n\n</think>\n\n' }}{% endif"
)


def test_marks_are_obeyed_behind_a_prompt_that_does_not_begin_the_conversation(tmp_path):
    messages = [user("Hi"), assistant("Yes"), user("So"), assistant("No")]
    samples = proven(tmp_path, MARKS_BEHIND_A_THOUGHT, [{"messages": messages}])
    assert [target for _, target in samples] == ["Yes<|im_end|>\n", "No<|im_end|>\n"]
    assert samples[1][0] == prompted(MARKS_BEHIND_A_THOUGHT, messages[:3])
    encode = RowTokenizer(
        byte_tokenizer(MARKS_BEHIND_A_THOUGHT), ChatConfig(template_date=DATE), "messages", max_length=1000
    )
    trained = [sample.labels[sample.labels != NO_TARGET] for sample in encode.samples([{"messages": messages}], [0])]
    assert [byte_tokenizer().decode(labels) for labels in trained] == ["Yes<|im_end|>", "No<|im_end|>"]


def test_a_run_says_how_many_turns_a_template_marks(tmp_path):
    template = MARKED_WITH_END.replace("message['role'] == 'assistant'", "message['role'] == 'assistant' and loop.last")
    rows = [{"messages": [user("Hi"), assistant("Yes"), user("So"), assistant("No")]}]
    config, tokenizer, data = data_of(tmp_path, template, rows, ChatConfig(template_date=DATE))
    assert "of 2 turns that were compared 1 have a mark" in prove(config, tokenizer, data).note


def test_a_turn_that_ends_with_text_is_split_where_it_is_one_token_with_what_follows(tmp_path):
    """A server stops behind the first line break; the model never writes the token of two."""
    tokenizer = line_break_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.role + ': ' + message.content + '\n' }}{{ '\n' if not loop.last else '' }}"
        "{% endfor %}{{ '\nassistant: ' if add_generation_prompt else '' }}"
    )
    messages = [user("Hi"), assistant("Yes"), user("So"), assistant("No")]
    encode = RowTokenizer(tokenizer, ChatConfig(template_date=DATE), "messages", max_length=1000)
    samples = encode.samples([{"messages": messages}], [0])
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert "ĊĊ" in tokenizer.tokenize(whole[: whole.rindex("user")])
    targets = [tokenizer.convert_ids_to_tokens(sample.labels[sample.labels != NO_TARGET]) for sample in samples]
    assert ["".join(target) for target in targets] == ["NoĊ", "YesĊ"]
    for sample, end in zip(samples, (4, 2), strict=True):
        asked = tokenizer.apply_chat_template(messages[: end - 1], tokenize=False, add_generation_prompt=True)
        ids = tokenizer(asked, add_special_tokens=False)["input_ids"]
        assert sample.input_ids[: len(ids)].tolist() == ids
