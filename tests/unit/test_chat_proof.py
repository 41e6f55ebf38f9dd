"""The proof that a run trains what a server renders: it holds for every kind of row, and fails for a change of one token."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from tokenizers import decoders, pre_tokenizers
from unit.data_helpers import CHATML, byte_tokenizer, chats, data_run, metaspace_tokenizer, prepared, write_jsonl
from unit.templates import LLAMA3, MARKED_WITH_END, MARKED_WITHOUT_END, NO_END, PLAIN_LINES, QWEN3

from dstune.config.architectures import mark_stops
from dstune.config.data_schema import SplitConfig
from dstune.core.errors import UserError
from dstune.data.build import prove
from dstune.data.builder import prove_samples
from dstune.data.chat import evidence
from dstune.data.chat.template import with_arguments
from dstune.data.collate import NO_TARGET
from dstune.protocols.task import TaskConfig
from dstune.tasks.chat.config import ChatConfig, Reasoning, Turns
from dstune.tasks.preference.config import PreferenceConfig, PreferenceLoss
from dstune.tasks.reward.config import RewardConfig
from dstune.tasks.seq2seq.config import Seq2SeqConfig
from dstune.tasks.seq2seq.sources import Sources

DATE = "2025-03-09"
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
ROWS = [
    *chats(8),
    {
        "messages": [
            {"role": "system", "content": "Be kind"},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Yes", "reasoning_content": "Hm."},
            {"role": "user", "content": "So"},
            {"role": "assistant", "content": "No", "reasoning_content": "Well."},
        ]
    },
    {
        "messages": [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "sunny"},
            {"role": "assistant", "content": "It is sunny."},
        ]
    },
]
PAIR = {"prompt": "What is two and two?", "chosen": "The answer is four.", "rejected": "It is warm."}


def data_of(tmp_path: Any, tokenizer: Any, task: TaskConfig, rows: list[Any]) -> Any:
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    config = data_run(path, task=task, split=SplitConfig(validation=0.0))
    return config, prepared(config, tokenizer, tmp_path / "cache")


def test_rows_of_every_kind_are_proven(tmp_path):
    tokenizer = byte_tokenizer(QWEN3)
    config, data = data_of(tmp_path, tokenizer, ChatConfig(template_date=DATE), ROWS)
    kinds = [entry["row"] for entry in json.loads(data.evidence.read_text())["rows"]]
    assert any("tool_calls" in str(row) for row in kinds)
    assert any("reasoning_content" in str(row) for row in kinds)
    assert "10 conversations make 12 samples" in prove(config, tokenizer, data).note
    # One of an exchange, two of each other row, and those of the longest once more.
    assert prove(config, tokenizer, data).turns == 7


@pytest.mark.parametrize(
    ("task", "row"),
    [
        (PreferenceConfig(template_date=DATE), PAIR),
        (PreferenceConfig(loss=PreferenceLoss.kto, template_date=DATE), PAIR),
        (RewardConfig(template_date=DATE), PAIR),
        (Seq2SeqConfig(template_date=DATE), {"source": "two and two", "target": "four"}),
        (ChatConfig(template_date=DATE, train_on_prompt=True), ROWS[0]),
    ],
    ids=["dpo", "kto", "reward", "seq2seq", "train_on_prompt"],
)
def test_every_task_of_conversations_is_proven(tmp_path, task, row):
    tokenizer = byte_tokenizer()
    config, data = data_of(tmp_path, tokenizer, task, [row])
    assert prove(config, tokenizer, data).turns > 0
    other = byte_tokenizer(CHATML.replace("'<|im_start|>' + message", "'<|im_start|>.' + message"))
    with pytest.raises(UserError, match="not trained as a server would render it"):
        prove(config, other, data)


CHANGES = {
    "a word of the template": (CHATML.replace("<|im_start|>assistant\n", "<|im_start|>assistant \n"), {}, None),
    "the generation prompt": (CHATML.split("{% if add_generation_prompt")[0], {}, None),
    "the end of a turn": (CHATML.replace("'<|im_end|>'", "'</s>'"), {}, None),
    "a stop": (CHATML, {}, ["."]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_proof_fails_where_one_token_is_another(tmp_path, change):
    config, data = data_of(tmp_path, byte_tokenizer(), ChatConfig(template_date=DATE), ROWS[:8])
    template, _, stops = CHANGES[change]
    tokenizer = byte_tokenizer(template)
    if stops is not None:
        tokenizer.add_tokens(stops)
        mark_stops(tokenizer, tokenizer.convert_tokens_to_ids(stops))
    with pytest.raises(UserError, match=r"not trained as a server would render it.*message 2"):
        prove(config, tokenizer, data)


@pytest.mark.parametrize("template", [CHATML, MARKED_WITH_END], ids=["plain", "marks"])
@pytest.mark.parametrize(("at", "place"), [(-1, 0), (-1, 1), (0, 0)], ids=["prompt", "answer", "all"])
def test_the_proof_fails_where_a_server_refuses_the_conversation(tmp_path, at, place, template):
    config, data = data_of(tmp_path, byte_tokenizer(template), ChatConfig(template_date=DATE), ROWS[:8])
    text = ROWS[0]["messages"][place]["content"]
    refusing = (
        f"{{% if messages[{at}].content == '{text}' %}}{{{{ raise_exception('not today') }}}}{{% endif %}}" + template
    )
    with pytest.raises(UserError, match="not trained as a server would render it"):
        prove(config, byte_tokenizer(refusing), data)


@pytest.mark.parametrize("row", [ROWS[0], {"messages": ROWS[9]["messages"][:2]}], ids=["an answer", "a call"])
def test_the_proof_knows_the_stop_that_a_template_lacks(tmp_path, row):
    """GLM: a call ends with the marker of a tool's result, and else a turn with the user's; the other one is refused."""
    tokenizer = byte_tokenizer(NO_END, eos="</s>")
    config, data = data_of(tmp_path, tokenizer, ChatConfig(template_date=DATE), [row])
    (sample,) = data.train.table
    assert prove(config, tokenizer, data).turns > 0
    stops = tokenizer.convert_tokens_to_ids(["[INST]", "<s>"])
    (other,) = {*stops} - {sample["labels"][-1]}
    changed = {key: [*sample[key][:-1], other] for key in ("input_ids", "labels")}
    with pytest.raises(UserError, match="where the turn ends"):
        prove_samples(config, tokenizer, (), [changed], data.evidence)


def test_the_proof_fails_where_an_argument_is_another(tmp_path):
    template = "{% if loud %}!{% endif %}" + CHATML
    task = ChatConfig(template_date=DATE, chat_template_kwargs={"loud": True})
    config, data = data_of(tmp_path, byte_tokenizer(template), task, ROWS[:8])
    assert prove(config, byte_tokenizer(template), data).turns > 0
    quiet = replace(config, task=replace(task, chat_template_kwargs={}))
    with pytest.raises(UserError, match="a server reads"):
        prove(quiet, byte_tokenizer(template), data)


def test_the_stop_of_a_template_that_needs_an_argument_is_known(tmp_path):
    template = "{{ functions + '' }}" + CHATML
    task = ChatConfig(template_date=DATE, chat_template_kwargs={"functions": "none"})
    config, data = data_of(tmp_path, byte_tokenizer(template, eos="</s>"), task, ROWS[:8])
    assert prove(config, byte_tokenizer(template, eos="</s>"), data).turns > 0


def test_the_proof_sees_the_date(tmp_path):
    tokenizer = byte_tokenizer(LLAMA3, eos="<|eot_id|>", bos="<|begin_of_text|>")
    config, data = data_of(tmp_path, tokenizer, ChatConfig(template_date=DATE), ROWS[:8])
    assert prove(config, tokenizer, data).turns > 0
    with pytest.raises(UserError, match="of the context is"):
        prove(replace(config, task=ChatConfig(template_date="2025-04-01")), tokenizer, data)


def test_other_tasks_have_nothing_to_prove(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}] * 3)
    config = data_run(path, format="prompt_completion", split=SplitConfig(validation=0.0))
    tokenizer = byte_tokenizer(None)
    assert prove(config, tokenizer, prepared(config, tokenizer, tmp_path / "cache")).turns == 0


SWITCHED = CHATML.replace(
    "assistant\n' }}{% endif",
    "assistant\n' }}{% if enable_thinking is false %}{{ '<think></think>' }}{% endif %}{% endif",
).replace(
    "message['content'] +",
    "(('<think>' + (message.reasoning_content or '') + '</think>') if loop.last and message.role == 'assistant' else '') + "
    "message['content'] +",
)


@pytest.mark.parametrize(
    ("rows", "expected"), [(ROWS[:8], {"enable_thinking": False}), (ROWS[8:9], {"enable_thinking": True})]
)
def test_an_exported_template_has_the_arguments_built_in(tmp_path, rows, expected):
    """A server that is told nothing renders the context that was trained."""
    tokenizer = byte_tokenizer(SWITCHED)
    config, data = data_of(tmp_path, tokenizer, ChatConfig(template_date=DATE), rows)
    served = prove(config, tokenizer, data)
    assert served.arguments == expected
    plain = byte_tokenizer(with_arguments(SWITCHED, served.arguments))
    messages = rows[0]["messages"]
    prompt = messages[: [message["role"] for message in messages].index("assistant")]
    context = plain.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    begins = [
        next(at for at, label in enumerate(sample["labels"]) if label != NO_TARGET) for sample in data.train.table
    ]
    assert context in [sample["input_ids"][:at] for sample, at in zip(data.train.table, begins, strict=True)]
    text = plain.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False, enable_thinking=True)
    assert text.endswith("assistant\n")
    assert ("<think></think>" in plain.decode(context)) is (expected["enable_thinking"] is False)


def test_a_seq2seq_prompt_is_rendered_as_in_training(tmp_path):
    """By the exported template, where nobody knows the target, and by the run's where it stands in the row."""
    task = Seq2SeqConfig(template_date=DATE)
    row = {"source": "two and two", "target": "<think>Hm.</think>four"}
    config, data = data_of(tmp_path, byte_tokenizer(SWITCHED), task, [row])
    served = prove(config, byte_tokenizer(SWITCHED), data)
    assert served.arguments == {"enable_thinking": True}
    exported = byte_tokenizer(with_arguments(SWITCHED, served.arguments))
    (sample,) = data.train.table
    context = sample["input_ids"][: next(at for at, label in enumerate(sample["labels"]) if label != NO_TARGET)]
    assert Sources(exported, task, encoder_decoder=False).prompt_ids(row["source"]) == context
    own = Sources(byte_tokenizer(SWITCHED), task, encoder_decoder=False)
    assert own.prompt_ids(row["source"], target=row["target"]) == context


def test_both_kinds_of_turns_are_reported(tmp_path):
    tokenizer = byte_tokenizer(SWITCHED)
    config, data = data_of(tmp_path, tokenizer, ChatConfig(template_date=DATE), ROWS[:9])
    served = prove(config, tokenizer, data)
    assert served.arguments == {}
    assert served.note.startswith("1 of 9 rows have reasoning")


QUOTED = {"messages": [{"role": "user", "content": 'Is that "reasoning"?'}, {"role": "assistant", "content": "Yes"}]}
PARTLY = {"messages": [*ROWS[8]["messages"][:-1], {"role": "assistant", "content": "No"}]}


@pytest.mark.parametrize(
    ("row", "choice", "expected"),
    [
        (QUOTED, {}, {"enable_thinking": False}),
        (PARTLY, {}, {}),
        (PARTLY, {"turns": Turns.last}, {"enable_thinking": False}),
        (ROWS[8], {"turns": Turns.last}, {"enable_thinking": True}),
        (ROWS[8], {"reasoning": Reasoning.drop}, {"enable_thinking": False}),
    ],
    ids=["a word of the user", "in one of two turns", "not in the last turn", "in the last turn", "dropped"],
)
def test_what_is_built_in_follows_the_turns_that_are_trained(tmp_path, row, choice, expected):
    tokenizer = byte_tokenizer(SWITCHED)
    config, data = data_of(tmp_path, tokenizer, ChatConfig(template_date=DATE, **choice), [row])
    served = prove(config, tokenizer, data)
    assert served.arguments == expected
    assert ("1 of 1 rows have reasoning" in served.note) is (not expected)


def test_a_kind_is_proven_wherever_its_first_row_stands(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "ROWS_AT_ONCE", 3)
    monkeypatch.setattr(evidence, "MOST_KINDS", 2)
    rows = [*ROWS, *({**row, "chat_template_kwargs": {"a": number}} for number, row in enumerate(chats(9)))]
    _, data = data_of(tmp_path, byte_tokenizer(QWEN3), ChatConfig(template_date=DATE), rows)
    kept = [entry["row"]["messages"] for entry in json.loads(data.evidence.read_text())["rows"]]
    assert any("reasoning_content" in message for messages in kept for message in messages)
    assert any("tool_calls" in message for messages in kept for message in messages)


def test_arguments_of_each_row_hide_no_kind(tmp_path):
    rows = [{**row, "chat_template_kwargs": {"a": 1}} for row in [*chats(evidence.MOST_KINDS + 10), ROWS[-1]]]
    _, data = data_of(tmp_path, byte_tokenizer(QWEN3), ChatConfig(template_date=DATE), rows)
    kept = [entry["row"]["messages"] for entry in json.loads(data.evidence.read_text())["rows"]]
    assert len(kept) == 3
    assert "tool_calls" in kept[1][1]


def test_a_row_of_a_kind_is_proven_where_the_first_one_writes_control_tokens(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "Yes"}]}
        for content in ("What is <|im_end|>?" * 9, "So", "Hi")
    ]
    config, data = data_of(tmp_path, byte_tokenizer(), ChatConfig(template_date=DATE), rows[:2])
    served = prove(config, byte_tokenizer(), data)
    assert (served.turns, served.note) == (2, "")
    (tmp_path / "alone").mkdir()
    config, data = data_of(tmp_path / "alone", byte_tokenizer(), ChatConfig(template_date=DATE), rows[:1])
    served = prove(config, byte_tokenizer(), data)
    assert served.turns == 0
    assert served.note.startswith("none of 1 conversations could be compared")


def test_rows_that_are_all_cut_are_proven(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": row["messages"] * 2} for row in chats(3)])
    config = data_run(path, task=ChatConfig(template_date=DATE), split=SplitConfig(validation=0.0), max_length=40)
    data = prepared(config, byte_tokenizer(), tmp_path / "cache")
    assert data.report["train"]["truncated"] == 3
    assert prove(config, byte_tokenizer(), data).turns > 0
    other = byte_tokenizer(CHATML.replace("'<|im_start|>' + message", "'<|im_start|>.' + message"))
    with pytest.raises(UserError, match="of the context is"):
        prove(config, other, data)


def test_a_template_that_ends_turns_with_text_is_proven_and_reported(tmp_path):
    turns = [("user", "Hi"), ("assistant", "Yes"), ("user", "So"), ("assistant", "No")]
    rows = [{"messages": [{"role": role, "content": content} for role, content in turns]}]
    config, data = data_of(tmp_path, byte_tokenizer(PLAIN_LINES), ChatConfig(template_date=DATE), rows)
    served = prove(config, byte_tokenizer(PLAIN_LINES), data)
    assert served.turns > 0
    assert "ends turns with '\\n' and no token" in served.note


def test_the_proof_fails_where_a_server_reads_more_than_a_sample_holds(tmp_path):
    """The first answer with its reasoning is a sample of its own, and it begins the second prompt of a template that keeps it."""
    config, data = data_of(tmp_path, byte_tokenizer(QWEN3), ChatConfig(template_date=DATE), [ROWS[8]])
    keeping = QWEN3.replace("loop.index0 > ns.last_query_index and ", "")
    assert keeping != QWEN3
    with pytest.raises(UserError, match=r"not trained as a server would render it.*message 5"):
        prove(config, byte_tokenizer(keeping), data)


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_an_answer_that_begins_inside_a_word_is_proven(tmp_path, scheme):
    """The prompt ends with a space; as Llama 2's, a tokenizer puts another one in front of every text behind an added token."""
    spaced = PLAIN_LINES.replace("'\n'", "'</s>'")
    tokenizer = metaspace_tokenizer(spaced)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=True)
    tokenizer.backend_tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme, split=True)
    turns = [("user", "Hello"), ("assistant", "I am fine"), ("user", "Hello"), ("assistant", "Hello")]
    rows = [{"messages": [{"role": role, "content": content} for role, content in turns]}]
    config, data = data_of(tmp_path, tokenizer, ChatConfig(template_date=DATE), rows)
    assert prove(config, tokenizer, data).turns == 4
    trained = [[label for label in sample["labels"] if label != NO_TARGET] for sample in data.train.table]
    assert tokenizer.convert_ids_to_tokens(trained[0])[:2] == ["I", "▁am"]


@pytest.mark.parametrize(
    "template", [CHATML, MARKED_WITH_END, MARKED_WITHOUT_END], ids=["plain", "marks", "no stop marked"]
)
def test_the_proof_fails_where_any_token_of_a_sample_is_another(tmp_path, template):
    """Up to the last stop: what a sample reads, and what it trains."""
    turns = [("user", "Hi"), ("assistant", "Yes"), ("user", "So"), ("assistant", "No")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    tokenizer = byte_tokenizer(template)
    config, data = data_of(tmp_path, tokenizer, ChatConfig(template_date=DATE), [row])
    (sample,) = data.train.table
    assert prove(config, tokenizer, data).turns > 0
    ids, labels = sample["input_ids"], sample["labels"]
    last = max(at for at, label in enumerate(labels) if label != NO_TARGET)
    proven = []
    for at in range(1, last + 1):
        other = ids[at] + 1 if ids[at] < 300 else ids[at] - 1
        read = {"input_ids": [*ids[:at], other, *ids[at + 1 :]], "labels": labels}
        label = ids[at] if labels[at] == NO_TARGET else NO_TARGET
        trained = {"input_ids": ids, "labels": [*labels[:at], label, *labels[at + 1 :]]}
        for changed in [trained, *([read] if at < last else [])]:
            try:
                prove_samples(config, tokenizer, (), [changed], data.evidence)
                proven.append((at, changed is read))
            except UserError:
                continue
    assert proven == []


@pytest.mark.parametrize("of", [0, 1])
def test_the_proof_fails_where_a_further_token_is_trained(tmp_path, of):
    """One of the system's text, in either sample of a conversation."""
    config, data = data_of(tmp_path, byte_tokenizer(QWEN3), ChatConfig(template_date=DATE), [ROWS[8]])
    assert len(data.train.table) == 2

    def changed(sample: dict[str, Any], index: int) -> dict[str, Any]:
        labels = [*sample["labels"]]
        if index == of:
            labels[3] = sample["input_ids"][3]
        return {"labels": labels}

    table = data.train.table.map(changed, with_indices=True)
    with pytest.raises(UserError, match="tokens are trained, a server would have the model write"):
        prove_samples(config, byte_tokenizer(QWEN3), (), table, data.evidence)


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ([{"enable_thinking": True}] * 8, {"enable_thinking": True}),
        ([{"enable_thinking": True}, *[{}] * 7], {}),
        ([{"loud": number} for number in range(8)], {"enable_thinking": False}),
        ([{"loud": 1}] * 8, {"enable_thinking": False, "loud": 1}),
    ],
    ids=["all the same", "one other", "each another", "of another name"],
)
def test_arguments_of_the_rows_are_built_in_where_all_have_them(tmp_path, monkeypatch, own, expected):
    monkeypatch.setattr(evidence, "MOST_ARGUMENTS", 3)
    rows = [{**row, "chat_template_kwargs": given} for row, given in zip(ROWS[:8], own, strict=True)]
    config, data = data_of(tmp_path, byte_tokenizer(SWITCHED), ChatConfig(template_date=DATE), rows)
    served = prove(config, byte_tokenizer(SWITCHED), data)
    assert served.arguments == expected
    assert ("which a server has to be given" in served.note) is (len(set(map(str, own))) > 1)


def test_arguments_of_every_kind_are_built_in():
    arguments = {"a": 1, "b": 'it\'s "x"\n', "c": [True, None], "d": {"e": 0.5}}
    template = with_arguments("\n{{ a }}|{{ b }}|{{ c }}|{{ d.e }}", arguments)
    assert byte_tokenizer(template).apply_chat_template([{}], tokenize=False) == '\n1|it\'s "x"\n|[True, None]|0.5'
    assert with_arguments("x", {}) == "x"
