"""Conversations of every kind in one shape, weights in the loss mask, several labels and pairs of texts as tokens."""

from __future__ import annotations

import json

import datasets
import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score
from torch import nn
from unit.data_helpers import CHATML, byte_tokenizer, data_run, prepared, write_jsonl

from dstune.config.data_schema import SourceConfig, SplitConfig
from dstune.core.errors import UserError
from dstune.data.chat.template import ChatTemplate
from dstune.data.collate import NO_TARGET, collate
from dstune.data.formats import check_columns, recognise
from dstune.data.rows import RowError, normalise
from dstune.data.sampler import MicroBatch
from dstune.data.tokenize import RowTokenizer
from dstune.protocols import task_of
from dstune.tasks.chat.config import ChatConfig
from dstune.tasks.classification import Classification
from dstune.tasks.classification.config import ClassificationConfig
from dstune.tasks.classification.encode import ClassificationEncoder
from dstune.tasks.classification.metrics import multi_label_metrics

S = {"role": "system", "content": "s"}
U, A = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
RESULT = {"role": "tool", "content": "2"}
AS_TEXT = {"name": "f", "arguments": '{"x": 1}'}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


@pytest.mark.parametrize(
    ("row", "fmt", "expected"),
    [
        # OpenAI
        ({"messages": [{"role": "developer", "content": "s"}, U, A]}, "messages", [S, U, A]),
        ({"messages": [U, {**A, "weight": 1}]}, "messages", [U, A]),
        ({"messages": [{**U, "weight": 0}, A]}, "messages", [U, A]),
        ({"messages": [U, {**A, "weight": 0}, U, A]}, "messages", [U, {**A, "weight": 0}, U, A]),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "H"}, {"text": "i"}]}, A]},
            "messages",
            [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}, A],
        ),
        ({"messages": [U, {"role": "assistant", "content": None, "refusal": "Yes"}]}, "messages", [U, A]),
        (
            {
                "messages": [
                    U,
                    {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": AS_TEXT}]},
                    {"role": "tool", "tool_call_id": "1", "content": "2"},
                    A,
                ]
            },
            "messages",
            [
                U,
                {"role": "assistant", "tool_calls": [{"id": "1", **CALL}]},
                {"role": "tool", "tool_call_id": "1", "content": "2"},
                A,
            ],
        ),
        (
            {"messages": [U, {"role": "assistant", "function_call": AS_TEXT}, {**RESULT, "role": "function", "name": "f"}, A]},
            "messages",
            [U, {"role": "assistant", "tool_calls": [CALL]}, {**RESULT, "name": "f"}, A],
        ),
        # ShareGPT
        (
            {
                "conversations": [
                    {"from": "human", "value": "Hi"},
                    {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                    {"from": "observation", "value": "2"},
                    {"from": "gpt", "value": "Yes"},
                ],
                "system": "s",
                "tools": json.dumps([TOOL]),
            },
            "conversations",
            [S, U, {"role": "assistant", "tool_calls": [CALL]}, RESULT, A],
        ),
        (
            {"conversation": [{"from": "user", "value": "Hi"}, {"from": "chatgpt", "value": "Yes"}]},
            "conversations",
            [U, A],
        ),
        # Alpaca
        ({"instruction": "Hi", "input": "", "output": "Yes"}, "alpaca", [U, A]),
        ({"instruction": "Hi", "input": "you", "output": "Yes"}, "alpaca", [{"role": "user", "content": "Hi\nyou"}, A]),
        (
            {"instruction": "Hi", "output": "Yes", "system": "s", "history": [["a", "b"]]},
            "alpaca",
            [S, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, U, A],
        ),
        ({"instruction": " ", "input": "Hi", "output": "Yes"}, "alpaca", [U, A]),
        ({"instruction": None, "input": "Hi", "output": "Yes"}, "alpaca", [U, A]),
        # Dolly
        ({"instruction": "Hi", "context": "", "response": "Yes", "category": "open_qa"}, "dolly", [U, A]),
        (
            {"instruction": "Hi", "context": "you", "response": "Yes", "category": "closed_qa"},
            "dolly",
            [{"role": "user", "content": "Hi\nyou"}, A],
        ),
        # Prompt and completion as messages: what the prompt's assistant said is not trained
        ({"prompt": [U], "completion": [A]}, "prompt_completion", [U, A]),
        ({"prompt": [U], "response": "Yes"}, "prompt_completion", [U, A]),
        ({"prompt": [U, A, U], "completion": [A]}, "prompt_completion", [U, {**A, "weight": 0}, U, A]),
        ({"prompt": "Hi", "completion": "Yes", "system": "s"}, "prompt_completion", [S, U, A]),
    ],
)  # fmt: skip
def test_conversations_in_one_shape(row, fmt, expected):
    assert recognise(row, {}, "auto", ChatConfig(), "rows.jsonl:1") is fmt
    found = normalise(row, fmt, {})
    assert found["messages"] == expected
    assert found.get("tools", []) == ([TOOL] if "tools" in row else [])


def test_prompt_and_completion_as_texts_stay_texts():
    row = {"prompt": "Hi", "completion": "Yes", "system": None, "tools": []}
    assert normalise(row, "prompt_completion", {}) == {"prompt": "Hi", "completion": "Yes"}


def test_a_misspelt_role_or_column_is_corrected_by_the_fix():
    with pytest.raises(UserError, match=r"'data\.columns={messages: talk}'"):
        check_columns({"message": "talk"})
    mapping = {"text": "reviw", "label": "stars"}
    with pytest.raises(UserError) as caught:
        recognise(["review", "stars"], mapping, "auto", ClassificationConfig(), "rows.csv:2")
    (problem,) = caught.value.problems
    assert (problem.where, problem.value) == ("data.columns.text", "reviw")
    assert problem.fix == "'data.columns={text: review, label: stars}'"
    with pytest.raises(UserError, match=r"data\.columns\.text=reviw"):
        recognise(["review", "stars"], mapping, "text_label", ClassificationConfig(), "rows.csv:2")


# -- weight: 0 --------------------------------------------------------------------------------------------------------

TALK = [U, {**A, "content": "No one", "weight": 0}, U, {**A, "content": "Two"}]
GENERATION = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|>assistant\n{% generation %}{{ m['content'] }}"
    "<|im_end|>{% endgeneration %}\n{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ONE_MARK = "{% generation %}" + CHATML + "{% endgeneration %}"
# The marks make "No one" longer than what is printed as it is, so beginnings of the conversation have to tell.
LONGER = "(message['content'] if message['content']|length < 8 else message['content'] + '!')"
PREFIXES = CHATML.replace("message['content']", LONGER)


def targets(encode, messages):
    (sample,) = encode.samples([{"messages": messages}], [0])
    assert sample.problem == ""
    return sample.labels[sample.labels != NO_TARGET]


@pytest.mark.parametrize(
    "template", [CHATML, GENERATION, ONE_MARK, PREFIXES], ids=["edges", "marks", "one", "prefixes"]
)
def test_messages_of_weight_0_are_rendered_and_not_trained(template):
    tokenizer = byte_tokenizer(template)
    encode = RowTokenizer(tokenizer, ChatConfig(), "messages", 1000)
    trained_text = tokenizer.decode(targets(encode, TALK))
    assert trained_text.startswith("Two") and trained_text.endswith("<|im_end|>")
    assert "No one" not in trained_text
    plain = [{key: value for key, value in message.items() if key != "weight"} for message in TALK]
    (weighted,), (whole,) = (encode.samples([{"messages": rows}], [0]) for rows in (TALK, plain))
    assert weighted.input_ids.tolist() == whole.input_ids.tolist()
    if template is not ONE_MARK:
        assert "No one" in tokenizer.decode(targets(encode, plain))


def test_no_template_sees_the_weight():
    tokenizer = byte_tokenizer("{% for m in messages %}{% if m.weight is defined %}W{% endif %}{% endfor %}" + CHATML)
    assert not ChatTemplate(tokenizer, None).text(TALK).startswith("W")


def test_weight_0_stays_out_where_prompts_are_trained_too():
    tokenizer = byte_tokenizer()
    encode = RowTokenizer(tokenizer, ChatConfig(train_on_prompt=True), "messages", 1000)
    trained_text = tokenizer.decode(targets(encode, TALK))
    assert "No one" not in trained_text
    assert "user\nHi<|im_end|>" in trained_text and "Two<|im_end|>" in trained_text


def test_weights_reach_the_samples_of_a_run(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": TALK}])
    tokenizer = byte_tokenizer()
    data = prepared(data_run(path, split=SplitConfig(validation=0.0)), tokenizer, tmp_path / "cache")
    labels = data.train.table[0]["labels"]
    assert tokenizer.decode([label for label in labels if label != NO_TARGET]) == "Two<|im_end|>"
    assert data.train.weights.tolist() == [sum(label != NO_TARGET for label in labels)]


# -- labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "labels"),
    [
        (["b", "a", "b"], ["a", "b"]),
        ([], []),
        ("", []),
        ("a, b", ["a", "b"]),
        ('["a,b"]', ["a,b"]),
        (3, ["3"]),
        ([1.0], ["1"]),
    ],
)
def test_any_number_of_labels(value, labels):
    row = normalise({"text": "x", "labels": value}, "text_label", {}, ClassificationConfig(multi_label=True))
    assert row == {"text": "x", "labels": labels}


def test_several_labels_where_there_should_be_one_name_the_key():
    with pytest.raises(RowError, match=r"has 2 labels .*task\.multi_label=true"):
        normalise({"text": "x", "labels": ["a", "b"]}, "text_label", {})
    assert normalise({"text": "x", "labels": ["a"]}, "text_label", {}) == {"text": "x", "label": "a"}


def test_several_labels_become_ones_and_zeros(tmp_path):
    rows = [{"text": "x y", "labels": ["b"]}, {"text": "z", "labels": ["c", "a"]}, {"text": "none", "labels": []}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    task = ClassificationConfig(multi_label=True)
    config = data_run(path, task=task, packing=False, split=SplitConfig(validation=0.0))
    data = prepared(config, byte_tokenizer(), tmp_path / "cache")
    assert data.labels == ("a", "b", "c")
    assert data.train.table["label"][:] == [[0, 1, 0], [1, 0, 1], [0, 0, 0]]
    batch = collate(data.train, MicroBatch(0, ((1,), (2,))), pad_token_id=0, packing=False)
    assert batch["labels"].tolist() == [[1, 0, 1], [0, 0, 0]]
    filler = collate(data.train, MicroBatch(0, ((1,),), filler=True), pad_token_id=0, packing=False)
    assert filler["labels"].tolist() == [[NO_TARGET] * 3]


def test_a_label_that_only_rows_held_out_have_is_still_known(tmp_path):
    rows = [{"text": f"row {number}", "labels": [f"only-{number}", "all"]} for number in range(20)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    task = ClassificationConfig(multi_label=True)
    config = data_run(path, task=task, packing=False, split=SplitConfig(validation=0.3))
    data = prepared(config, byte_tokenizer(), tmp_path / "cache")
    assert len(data.labels) == 21
    assert data.validation is not None and len(data.validation.table) + len(data.train.table) == 20


def test_the_head_is_the_mean_of_binary_cross_entropies():
    """Against torch's own loss as transformers uses it for `multi_label_classification`; a filler adds nothing."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3, generator=generator)
    labels = (torch.rand(4, 3, generator=generator) > 0.5).long()
    labels[3] = NO_TARGET

    class Model(nn.Module):
        def forward(self, input_ids):
            return type("Output", (), {"logits": logits})

    batch = {"input_ids": torch.zeros(4, 1), "labels": labels, "index": torch.arange(4)}
    with torch.no_grad():
        output = task_of(ClassificationConfig(multi_label=True)).head(Model())(Model(), batch)
    expected = nn.BCEWithLogitsLoss()(logits[:3], labels[:3].float())
    assert output.weight == 3
    assert output.loss_sum / output.weight == pytest.approx(expected)
    assert output.rows["prediction"].tolist() == (torch.sigmoid(logits) > 0.5).long().tolist()
    assert output.correct == (output.rows["prediction"][:3] == labels[:3]).all(dim=1).sum()


@pytest.mark.parametrize("classes", [1, 4])
def test_metrics_of_several_labels_are_those_of_scikit_learn(classes):
    random = np.random.default_rng(0)
    labels, found = random.integers(0, 2, (50, classes)), random.integers(0, 2, (50, classes))
    found[:25] = labels[:25]
    chances = random.random((50, classes))
    metrics = multi_label_metrics(found.tolist(), labels.tolist(), chances)
    true, guess = (labels, found) if classes > 1 else (labels[:, 0], found[:, 0])
    kind = {} if classes > 1 else {"average": "binary"}
    assert metrics == {
        "accuracy": pytest.approx(accuracy_score(true, guess)),
        "f1_macro": pytest.approx(f1_score(true, guess, **{"average": "macro", **kind})),
        "f1_micro": pytest.approx(f1_score(true, guess, **{"average": "micro", **kind})),
        "auroc": pytest.approx(roc_auc_score(labels, chances, average="macro")),
        "targets": 50.0,
    }
    rows_all_right = float((labels == found).all(axis=1).mean())
    assert metrics["accuracy"] == pytest.approx(rows_all_right)


# -- pairs ------------------------------------------------------------------------------------------------------------


def bert_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{number}" for number in range(20))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


PAIRS = [
    {"text": "w1 w2", "text_pair": "w3", "label": "same"},
    {"text": "w1", "text_pair": "w4 w5 w6 w7 w8 w9 w10 w11", "label": "other"},
]


@pytest.mark.parametrize("max_length", [64, 8])
def test_pairs_are_joined_as_the_tokenizer_does_it(tmp_path, max_length):
    tokenizer = bert_tokenizer()
    path = write_jsonl(tmp_path / "rows.jsonl", PAIRS)
    task = ClassificationConfig()
    config = data_run(path, task=task, packing=False, max_length=max_length, split=SplitConfig(validation=0.0))
    data = prepared(config, tokenizer, tmp_path / "cache")
    for number, row in enumerate(PAIRS):
        expected = tokenizer(row["text"], row["text_pair"], truncation=True, max_length=max_length)
        assert data.train.table[number]["input_ids"] == expected["input_ids"]
        assert data.train.table[number]["token_type_ids"] == expected["token_type_ids"]
    assert data.report["train"]["truncated"] == (1 if max_length == 8 else 0)
    batch = collate(data.train, MicroBatch(0, ((0,), (1,))), pad_token_id=0, packing=False)
    whole = tokenizer([row["text"] for row in PAIRS], [row["text_pair"] for row in PAIRS], truncation=True,
                      max_length=max_length, padding=True, pad_to_multiple_of=8, return_tensors="pt")  # fmt: skip
    for name in ("input_ids", "token_type_ids", "attention_mask"):
        assert batch[name].tolist() == whole[name].tolist()


def test_pairs_for_a_model_without_segments_have_none(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", PAIRS)
    tokenizer = byte_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    config = data_run(path, task=ClassificationConfig(), packing=False, split=SplitConfig(validation=0.0))
    data = prepared(config, tokenizer, tmp_path / "cache")
    assert set(data.train.table.column_names) == {"input_ids", "label"}


@pytest.mark.parametrize("order", [("texts", "pairs"), ("pairs", "texts"), ("texts",)])
def test_single_texts_stand_beside_pairs(tmp_path, order):
    """Sources in any order; the third time only the validation rows are pairs."""
    tokenizer = bert_tokenizer()
    texts = [{"text": f"w{number}", "label": label} for number, label in ((5, "same"), (6, "other"))]
    paths = {
        "texts": write_jsonl(tmp_path / "texts.jsonl", texts),
        "pairs": write_jsonl(tmp_path / "pairs.jsonl", PAIRS),
    }
    held_out = str(write_jsonl(tmp_path / "held.jsonl", [{"text": "w1", "text_pair": "w2 w3", "label": "same"}]))
    mixture = {name: SourceConfig(path=str(paths[name])) for name in order}
    config = data_run("", task=ClassificationConfig(), mixture=mixture, packing=False, validation=held_out)
    data = prepared(config, tokenizer, tmp_path / "cache")
    given = [tokenizer(row["text"], row.get("text_pair")) for row in [*texts, *PAIRS * (len(order) == 2)]]
    for split, expected in ((data.train, given), (data.validation, [tokenizer("w1", "w2 w3")])):
        found = [(row["input_ids"], row["token_type_ids"]) for row in split.table]
        assert sorted(found) == sorted((one["input_ids"], one["token_type_ids"]) for one in expected)


def test_a_text_without_a_token_is_a_problem_of_its_row():
    encode = RowTokenizer(byte_tokenizer(), ClassificationConfig(), "text_label", 64, ("a", "b"))
    empty, text = encode.samples([{"text": "", "label": "a"}, {"text": "w", "label": "b"}], [0, 1])
    assert (empty.problem, text.problem) == ("the text has no token", "")


def test_columns_that_no_batch_gets_are_refused_unless_the_task_makes_its_own_batches(monkeypatch):
    columns = ClassificationEncoder.columns.fget
    added = property(lambda encoder: {**columns(encoder), "margin": datasets.Value("float32")})
    monkeypatch.setattr(ClassificationEncoder, "columns", added)
    task = ClassificationConfig(labels=["a", "b"])
    with pytest.raises(UserError) as refused:
        RowTokenizer(byte_tokenizer(), task, "text_label", 64, ("a", "b"))
    (problem,) = refused.value.problems
    assert problem.where == "task" and problem.reason.endswith(": margin") and "collate" in problem.fix
    monkeypatch.setattr(Classification, "collate", lambda *given, **options: None, raising=False)
    assert "margin" in RowTokenizer(byte_tokenizer(), task, "text_label", 64, ("a", "b")).features
