"""What was trained otherwise than served, or refused without need: a case for each fault, in the smallest template."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny import save_decoder
from unit.data_helpers import CHATML, byte_tokenizer, data_run, prepared, write_jsonl
from unit.templates import NO_END, QWEN3, THINKING_PROMPT
from unit.test_data_render import assistant, call, encoded, refusal, tool, trained, user

from dstune.config.data_schema import OnBadRow, SplitConfig
from dstune.config.schema import ModelConfig
from dstune.core.errors import UserError
from dstune.data.build import prove
from dstune.data.chat.factor import growth_of
from dstune.data.collate import NO_TARGET
from dstune.data.render import ChatRenderer, Choice
from dstune.launch.plan import growth
from dstune.rank.startup import conversations_of
from dstune.show.segments import segments, turns
from dstune.tasks.chat.config import ChatConfig, Turns
from dstune.tasks.preference.config import PreferenceConfig, PreferenceLoss
from dstune.tasks.reward.config import RewardConfig
from dstune.tasks.seq2seq.config import Seq2SeqConfig
from dstune.trainer.evaluate import limited
from dstune.trainer.measure import count_rows

DATE = "2025-03-09"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
OTHER_END = CHATML.replace(
    "'<|im_end|>'",
    "('<|eot_id|>' if loop.last and not add_generation_prompt and message.role == 'assistant' else '<|im_end|>')",
)
"""gpt-oss: the last turn ends with another token than those in the history."""
SWITCHED = CHATML.replace(
    PROMPT,
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' + ('' if enable_thinking else '<think></think>') }}{% endif %}",
).replace(
    "message['content'] +",
    "(('<think>' + (message.reasoning_content or '') + '</think>') if message.role == 'assistant' else '') + message['content'] +",
)
"""A switch brings an empty reasoning block into the prompt."""
QWQ = CHATML.replace("<|im_start|>assistant\n' }}{% endif", "<|im_start|>assistant\n<think>\n' }}{% endif").replace(
    "message['content']", "(message['content'] if loop.last else message['content'].split('</think>')[-1].lstrip())"
)
"""The prompt opens the reasoning, which is a part of the content."""
CALLS = "(message.tool_calls | tojson if message.tool_calls else '')"
TOOLS_ONLY = "{% for tool in tools %}{{ tool | tojson }}{% endfor %}" + CHATML.replace(
    "message['content']", "(message.content or '') + (message.tool_calls | tojson if message.tool_calls else '')"
)
TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "description": "The weather", "parameters": {"properties": {"city": {}}}},
    }
]
CALLING = [user("Weather?"), assistant("", tool_calls=call("weather", {"city": "Paris"}))]
REASONED = [
    user("Hi"),
    assistant("Yes", reasoning_content="Hm."),
    user("So"),
    assistant("No", reasoning_content="Well."),
]


def data_of(tmp_path: Path, template: str, rows: list[Any], task: Any = None, **data: Any) -> Any:
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    config = data_run(
        path, task=task or ChatConfig(template_date=DATE), **{"split": SplitConfig(validation=0.0)} | data
    )
    tokenizer = byte_tokenizer(template)
    return config, tokenizer, prepared(config, tokenizer, tmp_path / "cache")


# ---- section 1: turns as a server sees them ----


def test_a_stop_that_the_template_lacks_is_supplied():
    """After a call the token that opens a tool's result, else the one that opens the user's message."""
    assert trained(byte_tokenizer(NO_END, eos="</s>"), [user("Hi"), assistant("Yes")]) == ["Yes[INST]"]
    runs = trained(byte_tokenizer(NO_END, eos="</s>"), [*CALLING, tool("sunny"), assistant("It is sunny.")])
    assert [run.removeprefix('{"name": "weather", "arguments": {"city": "Paris"}}') for run in runs] == [
        "<s>",
        "It is sunny.[INST]",
    ]


def test_a_turn_that_ends_otherwise_in_the_history_learns_the_end_that_a_server_waits_for():
    tokenizer = byte_tokenizer(OTHER_END, eos="<|eot_id|>")
    (sample,) = encoded(tokenizer, [user("Hi"), assistant("Yes"), user("So"), assistant("No")])
    ends = np.flatnonzero(sample.labels == tokenizer.convert_tokens_to_ids("<|eot_id|>"))
    assert len(ends) == 2
    assert tokenizer.convert_ids_to_tokens(sample.input_ids[ends]) == ["<|im_end|>", "<|eot_id|>"]


def test_an_empty_reasoning_block_of_the_prompt_is_context_and_one_that_it_does_not_bring_is_a_target():
    tokenizer = byte_tokenizer(SWITCHED)
    assert trained(tokenizer, [user("Hi"), assistant("Yes")]) == ["Yes<|im_end|>"]
    given = {"chat_template_kwargs": {"enable_thinking": True}}
    assert trained(tokenizer, [user("Hi"), assistant("Yes")], **given) == ["<think></think>Yes<|im_end|>"]
    assert trained(tokenizer, REASONED[:2]) == ["<think>Hm.</think>Yes<|im_end|>"]


def test_a_prompt_asks_for_no_reasoning_that_is_dropped():
    for drops, end in ((True, "<think></think>"), (False, "assistant\n")):
        tokenizer = byte_tokenizer(SWITCHED)
        renderer = ChatRenderer(tokenizer, DATE, choice=Choice(drop_reasoning=drops))
        assert tokenizer.decode(renderer.prompt_ids(REASONED[:1], answer=REASONED[1])).endswith(end)


def test_reasoning_that_only_ends_in_the_content_is_reasoning():
    """As answers are logged behind a prompt that opens `<think>`."""
    splitting = SWITCHED.replace("message.reasoning_content or ''", "message['content'].split('</think>')[0]").replace(
        "message['content'] +", "message['content'].split('</think>')[-1] +"
    )
    messages = [user("Hi"), assistant("Hm.</think>Yes")]
    assert trained(byte_tokenizer(splitting), messages) == ["<think>Hm.</think>Yes<|im_end|>"]


def test_the_row_s_arguments_come_before_those_of_the_run(tmp_path):
    rows = [
        {"messages": [user("Hi"), assistant("Yes")], "chat_template_kwargs": {"enable_thinking": True}},
        {"messages": [user("So"), assistant("No")]},
    ]
    task = ChatConfig(template_date=DATE, chat_template_kwargs={"enable_thinking": False})
    _, tokenizer, data = data_of(tmp_path, SWITCHED, rows, task)
    found = [tokenizer.decode([label for label in row["labels"] if label != NO_TARGET]) for row in data.train.table]
    assert sorted(found) == ["<think></think>Yes<|im_end|>", "No<|im_end|>"]


LOUD = "{% if loud %}!{% endif %}" + CHATML
PAIR = {"prompt": "What is two and two?", "chosen": "The answer is four.", "rejected": "It is warm."}


@pytest.mark.parametrize(
    ("task", "row"),
    [
        (PreferenceConfig, PAIR),
        (lambda **given: PreferenceConfig(loss=PreferenceLoss.kto, **given), PAIR),
        (
            lambda **given: PreferenceConfig(loss=PreferenceLoss.kto, **given),
            {"prompt": "Two?", "completion": "Yes", "label": True},
        ),
        (RewardConfig, PAIR),
        (Seq2SeqConfig, {"source": "two and two", "target": "four"}),
    ],
    ids=["dpo", "kto pair", "kto", "reward", "seq2seq"],
)
def test_every_task_of_conversations_takes_arguments_from_the_row_and_from_the_run(tmp_path, task, row):
    for number, (of_row, of_run, expected) in enumerate(
        [
            ({"loud": True}, {}, True),
            ({"loud": False}, {"loud": True}, False),
            ({}, {"loud": True}, True),
            ({}, {}, False),
        ]
    ):
        given = {**row, "chat_template_kwargs": of_row} if of_row else row
        configured = task(template_date=DATE, chat_template_kwargs=of_run)
        (tmp_path / str(number)).mkdir()
        config, tokenizer, data = data_of(tmp_path / str(number), LOUD, [given], configured)
        for name in ("input_ids", "rejected_input_ids"):
            if name in data.train.table.column_names:
                assert tokenizer.decode(data.train.table[0][name]).startswith("!") is expected
        assert prove(config, tokenizer, data).turns > 0


def test_a_prompt_that_does_not_begin_the_conversation_is_refused_with_both_texts_and_what_mends_it():
    text = refusal(byte_tokenizer(THINKING_PROMPT), [user("Hi"), assistant("Yes")])
    assert "the prompt goes on" in text
    assert "<think>" in text
    assert "the conversation" in text
    assert "the prompt asks for reasoning, which this turn does not have" in text
    assert text.endswith("; model.chat_template=chatml fixes it")
    switched = CHATML.replace(
        PROMPT,
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' + ('' if thinking is false else '<think>') }}{% endif %}",
    )
    given = {"chat_template_kwargs": {"thinking": True}}
    assert "task.chat_template_kwargs={thinking: false} fixes it" in refusal(
        byte_tokenizer(switched), [user("Hi"), assistant("Yes")], **given
    )


def test_a_rewritten_history_becomes_samples_of_which_each_has_its_target_once(tmp_path):
    rows = [{"messages": [user(f"Hello {number}"), *REASONED[1:]]} for number in range(3)]
    config, tokenizer, data = data_of(tmp_path, QWEN3, [*rows, {"messages": REASONED[:2]}])
    report = data.report["train"]
    assert (report["conversations"], report["samples"]) == (4, 7)
    factor = report["tokens"] / report["tokens_once"]
    assert conversations_of(report) == f" of 4 conversations ({factor:.1f} times their tokens)"
    assert f"4 conversations make 7 samples with {factor:.1f} times the tokens" in prove(config, tokenizer, data).note
    growth = growth_of(config, tokenizer)  # what `dstune plan` tells
    assert (growth.conversations, growth.samples) == (4, 7)
    assert growth.factor == pytest.approx(factor)
    last = ChatConfig(template_date=DATE, turns=Turns.last)
    (tmp_path / "last").mkdir()
    assert conversations_of(data_of(tmp_path / "last", QWEN3, [{"messages": REASONED}], last)[2].report["train"]) == ""


def test_a_plan_counts_samples_and_tokens(tmp_path):
    model = save_decoder(tmp_path / "model")
    byte_tokenizer(QWEN3).save_pretrained(model)
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"messages": REASONED}, {"messages": REASONED[:2]}])
    config = replace(data_run(rows, task=ChatConfig(template_date=DATE)), model=ModelConfig(path=str(model)))
    found = growth(config)
    assert found is not None
    assert (found.conversations, found.samples) == (2, 3)
    assert found.factor > 1.0
    once = replace(config, task=ChatConfig(template_date=DATE, turns=Turns.last))
    assert growth(once) is None


def test_metrics_count_conversations(tmp_path):
    held_out = write_jsonl(
        tmp_path / "held.jsonl", [{"messages": REASONED}, {"messages": [user("Who"), *REASONED[1:]]}]
    )
    config, _, data = data_of(tmp_path, QWEN3, [{"messages": REASONED[:2]}], validation=str(held_out))
    assert len(data.validation.lengths) == 4
    assert count_rows(data.validation, config.task) == 2
    assert len(limited(data.validation, 1, config.task).lengths) == 2, "a conversation with all its samples"


def test_with_train_on_prompt_a_token_counts_at_its_first_appearance():
    tokenizer = byte_tokenizer(QWEN3)
    first, second = encoded(tokenizer, REASONED, train_on_prompt=True)
    common = int(np.argmax(first.input_ids[: len(second.input_ids)] != second.input_ids[: len(first.input_ids)]))
    assert np.all(second.labels[:common] == NO_TARGET) or np.all(first.labels[:common] == NO_TARGET)


def test_a_message_before_the_first_question_and_one_of_weight_0_are_context(tmp_path):
    opening = CHATML.replace(
        "{% for",
        "{% if messages[0].role == 'assistant' and messages | length == 1 %}{{ raise_exception('no') }}{% endif %}{% for",
        1,
    )
    messages = [assistant("Hello!"), user("Hi"), assistant("Wrong", weight=0), user("So"), assistant("Yes")]
    assert trained(byte_tokenizer(opening), messages) == ["Yes<|im_end|>"]
    rows = [{"messages": messages}, {"messages": [user('"role":"assistant"'), assistant("Yes")]}]
    note = prove(*data_of(tmp_path, opening, rows)).note
    assert note.startswith("1 of 2 conversations begin with the assistant")


@pytest.mark.parametrize(
    ("task", "row"),
    [
        (
            ChatConfig(template_date=DATE),
            {"prompt": [user("Hi"), assistant("I am")], "completion": [assistant(" fine")]},
        ),
        (
            PreferenceConfig(template_date=DATE),
            {
                "prompt": [user("Hi"), assistant("I am")],
                "chosen": [assistant(" fine")],
                "rejected": [assistant(" sad")],
            },
        ),
        (ChatConfig(template_date=DATE), {"messages": [user("Hi"), assistant("I am", prefix=True)]}),
    ],
    ids=["chat", "preference", "prefix"],
)
def test_rows_that_need_continue_final_message_are_refused(tmp_path, task, row):
    with pytest.raises(UserError, match="continue_final_message"):
        data_of(tmp_path, CHATML, [row], task)


def test_data_show_separates_context_and_target_turn_by_turn():
    tokenizer = byte_tokenizer(CHATML)
    (sample,) = encoded(tokenizer, [user("Hi"), assistant("Yes"), user("So"), assistant("No")])
    found, rest = turns(segments(tokenizer, sample.input_ids, sample.labels))
    texts = [turn.to_json() for turn in found]
    assert [turn["target"] for turn in texts] == ["Yes<|im_end|>", "No<|im_end|>"]
    assert texts[0]["context"] == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert texts[1]["context"] == "\n<|im_start|>user\nSo<|im_end|>\n<|im_start|>assistant\n"
    assert "".join(piece.text for piece in rest) == "\n"


# ---- refused today, and served ----


def test_reasoning_that_belongs_into_the_content_is_put_there():
    """QwQ: the prompt opens `<think>`, and the template reads no field."""
    runs = trained(byte_tokenizer(QWQ), REASONED)
    assert runs == ["Hm.\n</think>\n\nYes<|im_end|>", "Well.\n</think>\n\nNo<|im_end|>"]
    assert trained(byte_tokenizer(QWQ), [user("Hi"), assistant("<think>\nHm.\n</think>\n\nYes")]) == runs[:1]


def test_a_template_for_conversations_with_tools_alone_is_served():
    tokenizer = byte_tokenizer(TOOLS_ONLY)
    text = refusal(tokenizer, [user("Hi"), assistant("Yes")])
    assert text.startswith("the chat template refuses this conversation")
    assert refusal(tokenizer, CALLING, tools=TOOLS) == ""


def test_a_content_that_is_needed_in_the_history_alone_is_given():
    """QwQ: `message.content` of a call is read where something follows it."""
    template = CHATML.replace(
        "message['content']", f"((message['content'] if not loop.last else message['content'] or '') + {CALLS})"
    )
    without = {"role": "assistant", "tool_calls": CALLING[1]["tool_calls"]}
    runs = trained(byte_tokenizer(template), [CALLING[0], without, tool("sunny"), assistant("It is sunny.")])
    assert len(runs) == 2


@pytest.mark.parametrize(
    ("template", "reason", "fix"),
    [
        ("{{ functions + '' }}" + CHATML, "'functions' is undefined", "task.chat_template_kwargs='{functions: ...}'"),
        (
            CHATML.replace("message['content'] +", "message['content'][0]['text'] +"),
            "has no attribute 'text'",
            "model.chat_template",
        ),
    ],
)
def test_a_template_that_no_conversation_suits_says_why(template, reason, fix):
    with pytest.raises(UserError) as caught:
        refusal(byte_tokenizer(template), [user("Hi"), assistant("Yes")])
    (problem,) = caught.value.problems
    assert reason in problem.reason
    assert fix in problem.fix


# ---- section 2: what a template drops ----

FIELDS = {
    "system messages": {"messages": [{"role": "system", "content": "Be kind"}, *CALLING[:1], assistant("Yes")]},
    "tools that may be called": {"messages": [user("Hi"), assistant("Yes")], "tools": TOOLS},
    "what tools do": {"messages": [user("Hi"), assistant("Yes")], "tools": TOOLS},
    "tool calls": {"messages": CALLING},
    "more than one tool call": {"messages": [CALLING[0], assistant("", tool_calls=2 * CALLING[1]["tool_calls"])]},
    "results of tools": {"messages": [*CALLING, tool("sunny"), assistant("It is sunny.")]},
    "reasoning": {"messages": REASONED},
}
DROPPING = {
    "system messages": CHATML.replace(
        "{% for message in messages %}", "{% for message in messages if message.role != 'system' %}"
    ),
    "tools that may be called": CHATML,
    "what tools do": "{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}" + CHATML,
    "tool calls": CHATML,
    "more than one tool call": CHATML.replace(
        "message['content']", "(message.content or '') + (message.tool_calls[0] | tojson if message.tool_calls else '')"
    ),
    "results of tools": CHATML.replace(
        "{% for message in messages %}", "{% for message in messages if message.role != 'tool' %}"
    ).replace("message['content']", f"(message.content or '') + {CALLS}"),
    "reasoning": CHATML,
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_that_the_template_drops_is_one_refusal_with_template_field_rows_and_fix(tmp_path, field):
    plain = {"messages": [user("Hello"), assistant("I am fine")]}
    rows = [
        plain,
        FIELDS[field],
        {
            **FIELDS[field],
            "messages": [
                *FIELDS[field]["messages"][:-1],
                *FIELDS[field]["messages"][-1:],
                user("?"),
                assistant("Well"),
            ],
        },
    ]
    with pytest.raises(UserError) as caught:
        data_of(tmp_path, DROPPING[field], rows)
    (problem,) = caught.value.problems
    assert problem.where == "model.chat_template"
    assert problem.value.startswith("that of ")
    assert f"does not print {field}" in problem.reason
    assert "2 rows have" in problem.reason
    assert "rows.jsonl:2" in problem.reason
    assert "model.chat_template" in problem.fix
    assert "the packaged chatml does" in problem.fix


def test_rows_with_dropped_fields_can_be_skipped(tmp_path):
    rows = [{"messages": [user("Hello"), assistant("I am fine")]}, {"messages": CALLING}]
    silent = CHATML.replace("message['content']", "(message.content or '')")
    _, _, data = data_of(tmp_path, silent, rows, on_bad_row=OnBadRow.skip)
    assert (data.report["train"]["samples"], data.report["train"]["bad_rows"]) == (1, 1)


def test_a_call_of_which_the_name_or_an_argument_is_not_written_is_refused():
    unnamed = CHATML.replace(
        "message['content']",
        "(message.content or '') + (message.tool_calls | tojson | replace('weather', '') if message.tool_calls else '')",
    )
    assert "does not print its call of weather" in refusal(byte_tokenizer(unnamed), CALLING)
    early = byte_tokenizer(
        CHATML.replace("message['content']", f"(message.content or '') + {CALLS} | replace('city', '</s>')")
    )
    assert "does not print its argument city of weather" in refusal(early, CALLING)


def test_arguments_are_given_as_the_template_concatenates_them():
    """DeepSeek V3: JSON text."""
    template = CHATML.replace(
        "message['content']",
        "(message.content or '') + (function.name + ':' + function.arguments if message.tool_calls else '')",
    ).replace(
        "%}{{ '<|im_start|>' + message['role']",
        "%}{% set function = message.tool_calls[0].function if message.tool_calls %}{{ '<|im_start|>' + message['role']",
    )
    assert trained(byte_tokenizer(template), CALLING) == ['weather:{"city": "Paris"}<|im_end|>']
