"""Losses and metrics of classification, bits per byte, slices and swapped terms, against scikit-learn and by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, matthews_corrcoef, roc_auc_score
from sklearn.utils.class_weight import compute_class_weight
from support.configs import run_config
from torch import nn
from torch.nn import functional
from unit.data_helpers import byte_tokenizer, data_run, prepared, refusal_of, wordpiece, write_jsonl

from dstune.config.data_schema import CleanConfig, DataConfig, SplitConfig
from dstune.config.schema import EvaluateConfig, RunConfig
from dstune.config.validate import find_problems
from dstune.core.errors import UserError
from dstune.data.collate import collate
from dstune.data.sampler import MicroBatch
from dstune.data.swaps import Swaps
from dstune.data.tokenize import RowTokenizer
from dstune.metrics import improves
from dstune.protocols import METRICS, Metric, metric, task_of
from dstune.tasks.causal_lm.config import CausalLmConfig
from dstune.tasks.chat.config import ChatConfig
from dstune.tasks.classification.config import ClassificationConfig
from dstune.tasks.classification.metrics import classification_metrics, regression_metrics
from dstune.tasks.question_answering.config import QuestionAnsweringConfig
from dstune.tasks.token_classification.config import TokenClassificationConfig
from dstune.trainer.counterfactual import compare
from dstune.trainer.data_loader import order_of
from dstune.trainer.measure import Evaluation, Totals, with_registered
from dstune.trainer.subgroups import measure_slices

NOTHING_HELD_OUT = SplitConfig(validation=0.0)


class Constant(nn.Module):
    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.logits = logits

    def forward(self, **inputs):
        return type("Output", (), {"logits": self.logits})


def classified(tmp_path, task: ClassificationConfig, labels: list, **more) -> RunConfig:
    rows = [{"text": f"a{'b' * number}", "label": label} for number, label in enumerate(labels)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    return data_run(path, task=task, packing=False, split=NOTHING_HELD_OUT, **more)


# ---- losses ----


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_class_weights_and_focal_loss(tmp_path, gamma):
    """The global batch's weight is known from the data, and a filler counts for nothing, whatever its gradient would be."""
    labels = ["rare", "often", "often", "often", "often"]
    config = classified(tmp_path, ClassificationConfig(balanced=True, focal_gamma=gamma), labels)
    config = replace(config, trainer=replace(config.trainer, micro_batch_size=5, global_batch_size=5))
    data = prepared(config, wordpiece(), tmp_path / "cache")
    assert data.labels == ("often", "rare") and data.report["train"]["labels"] == {"often": 4, "rare": 1}
    balanced = compute_class_weight("balanced", classes=np.array(data.labels), y=labels)
    global_batch = order_of(config, data.train).global_batch(0, 0)
    assert global_batch.weight == pytest.approx(5.0) and data.train.weights.dtype == np.float64
    (micro_batch,) = global_batch.micro_batches
    batch = collate(data.train, micro_batch, pad_token_id=0, packing=False)
    logits = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), requires_grad=True)
    head = task_of(config.task).head(Constant(logits))
    output = head(Constant(logits), batch)
    assert float(output.weight) == pytest.approx(global_batch.weight)
    chance = logits.softmax(-1).gather(1, batch["labels"][:, None])[:, 0]
    weights = torch.tensor(balanced)[batch["labels"]]
    expected = (-weights * (1 - chance) ** gamma * chance.log()).sum()
    assert float(output.loss_sum.detach()) == pytest.approx(float(expected.detach()))
    sure = torch.tensor([[100.0, 0.0]], requires_grad=True)  # the probability rounds to 1
    for of in (replace(micro_batch, rows=((1,),)), MicroBatch(0, ((0,),), filler=True)):
        loss = head(Constant(sure), collate(data.train, of, pad_token_id=0, packing=False)).loss_sum
        (gradient,) = torch.autograd.grad(loss, sure, retain_graph=True)
        assert torch.isfinite(gradient).all()
        assert not of.filler or (loss == 0 and not gradient.any())


def test_weights_by_name(tmp_path):
    task = ClassificationConfig(class_weights={"a": 2.5})
    data = prepared(classified(tmp_path, task, ["a", "b", "b"]), wordpiece(), tmp_path / "cache")
    assert data.train.weights.tolist() == [2.5, 1.0, 1.0]
    wrong = classified(tmp_path, ClassificationConfig(class_weights={"c": 2.0}), ["a", "b"])
    (problem,) = refusal_of(wrong, wordpiece(), tmp_path)
    assert (problem.where, "a, b" in problem.reason) == ("task.class_weights.c", True)


def test_regression(tmp_path):
    task = ClassificationConfig(regression=True)
    config = classified(tmp_path, task, [1, "2.5", -100.0, 0])
    data = prepared(config, wordpiece(), tmp_path / "cache")
    assert data.labels == ()
    batch = collate(data.train, MicroBatch(0, ((0,), (1,), (2,), (3,))), pad_token_id=0, packing=False)
    assert sorted(batch["labels"].tolist()) == [-100.0, 0.0, 1.0, 2.5]
    logits = torch.tensor([[1.0], [2.0], [3.0], [4.0]], requires_grad=True)
    output = task_of(task).head(Constant(logits))(Constant(logits), batch)
    assert output.weight == 4  # -100 is a number like any other
    expected = functional.mse_loss(logits[:, 0], batch["labels"], reduction="sum")
    assert float(output.loss_sum.detach()) == pytest.approx(float(expected.detach()))
    filler = collate(data.train, MicroBatch(0, ((0,),), filler=True), pad_token_id=0, packing=False)
    output = task_of(task).head(Constant(logits[:1]))(Constant(logits[:1]), filler)
    assert (output.loss_sum, output.weight) == (0, 0)
    assert torch.autograd.grad(output.loss_sum, logits)[0].tolist() == [[0.0]] * 4
    (problem, *_) = refusal_of(classified(tmp_path, task, ["much", 1]), wordpiece(), tmp_path)
    assert problem.where.endswith("rows.jsonl:1") and "must be a number" in problem.reason


def test_a_language_model_reports_the_loss_of_each_row():
    """As the rows have it alone; without `index` nothing is kept, so that logits need not exist whole."""

    class Tiny(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.lm_head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)

        def get_output_embeddings(self):
            return self.lm_head

        def forward(self, input_ids, attention_mask, use_cache):
            return type("Output", (), {"logits": self.lm_head(self.embed(input_ids))})

    model = Tiny()
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 0], [8, 8, 8, 8]])
    labels = torch.tensor([[-100, 2, 3, 4], [-100, -100, 7, -100], [-100, 8, 8, -100]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    head = task_of(CausalLmConfig()).head(model)
    with torch.no_grad():
        assert not head(model, batch).rows
        rows = head(model, {**batch, "index": torch.arange(3)}).rows
        alone = [head(model, {name: value[row : row + 1] for name, value in batch.items()}) for row in range(3)]
    assert rows["loss"].tolist() == pytest.approx([float(of.loss_sum) for of in alone])
    assert rows["weight"].tolist() == [3, 1, 2]
    assert rows["correct"].tolist() == [float(of.correct) for of in alone]


# ---- metrics ----


def test_metrics_of_classes_are_those_of_scikit_learn():
    random = np.random.default_rng(0)
    for classes in (2, 4):
        chances = random.dirichlet(np.ones(classes), 60)
        labels = random.integers(0, classes, 60).tolist()
        found = chances.argmax(axis=1).tolist()
        metrics, _ = classification_metrics(found, labels, chances)
        assert metrics["mcc"] == pytest.approx(matthews_corrcoef(labels, found))
        assert metrics["f1_macro"] == pytest.approx(f1_score(labels, found, average="macro"))
        area = (
            roc_auc_score(labels, chances[:, 1])
            if classes == 2
            else roc_auc_score(labels, chances, multi_class="ovr", average="macro")
        )
        assert metrics["auroc"] == pytest.approx(area)
    assert "auroc" not in classification_metrics([0], [0], np.array([[0.9, 0.1]]))[0]  # one class only: no curve
    all_right, confusion = classification_metrics([0, 2], [0, 2], np.eye(4)[[0, 2]])
    assert all_right["f1_macro"] == 1.0, "classes without a row say nothing"
    assert len(confusion) == 4
    diverged = classification_metrics([0, 0], [0, 1], np.full((2, 2), np.nan))[0]
    assert np.isnan(diverged["auroc"])
    assert diverged["accuracy"] == 0.5
    found = regression_metrics([1.0, 2.0, 4.0], [1.0, 3.0, 5.0])
    assert found["pearson"] == pytest.approx(np.corrcoef([1, 2, 4], [1, 3, 5])[0, 1]) and found["spearman"] == 1.0
    assert found["mae"] == pytest.approx(2 / 3) and found["rmse"] == pytest.approx(math.sqrt(2 / 3))
    assert regression_metrics([1.0, 1.0], [1.0, 2.0])["pearson"] == 0.0


def test_bits_per_byte_count_the_bytes_of_the_targets(tmp_path):
    """Of documents all that they say, in whatever pieces; of a chat what the assistant says."""
    texts = ["na\xefve caf\xe9 \U0001f642 two and two", "<|im_end|> is text here", "plain"]
    for max_length in (8, 4096):
        encode = RowTokenizer(byte_tokenizer(bos="<s>"), CausalLmConfig(), "text", max_length)
        samples = encode.samples([{"text": text} for text in texts], [0, 1, 2])
        for number, text in enumerate(texts):
            found = sum(sample.columns["bytes"] for sample in samples if sample.row == number)
            assert found == len(text.encode()), (max_length, text)
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "caf\xe9 \u20ac"}]
    encode = RowTokenizer(byte_tokenizer(), ChatConfig(template_date="2025-03-09"), "messages", 4096)
    (sample,) = encode.samples([{"messages": messages}], [0])
    assert sample.columns["bytes"] == len("caf\xe9 \u20ac".encode())
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": text} for text in texts])
    data = prepared(data_run(path, task=CausalLmConfig(), max_length=8), byte_tokenizer(), tmp_path / "cache")
    split = data.validation or data.train
    size = int(split.column("bytes").sum())
    found = task_of(CausalLmConfig()).measure((), split, Totals(10.0, 5.0, 1.0), []).metrics
    assert found["bits_per_byte"] == pytest.approx(10 / math.log(2) / size)


# ---- slices ----


def test_slices_and_their_gap(tmp_path):
    rows = [{"text": "a" * (1 + number), "label": "yn"[number % 2], "from": "xy"[number >= 4]} for number in range(8)]
    rows[7]["from"] = None
    held = write_jsonl(tmp_path / "held.jsonl", rows)
    config = classified(tmp_path, ClassificationConfig(), ["y", "n"], validation=str(held))
    config = replace(
        config,
        evaluate=EvaluateConfig(slices=["from"], min_slice_rows=2),
        data=replace(config.data, clean=CleanConfig(leaks=False)),
    )
    data = prepared(config, wordpiece(), tmp_path / "cache")
    split = data.validation
    origin = [json.loads(split.texts[int(number)]["slices"])["from"] for number in split.origins]
    kept = []
    for sample in range(8):
        label = int(split.table[sample]["label"])
        right = origin[sample] == "x"  # of the others all are wrong
        chance = np.eye(2)[label if right else 1 - label]
        kept.append(
            {
                "prediction": np.array(label if right else 1 - label),
                "label": np.array(label),
                "probability": chance,
                "loss": np.array(0.5 if right else 2.0),
                "weight": np.array(1),
                "correct": np.array(right),
            }
        )
    metrics, details = measure_slices(config, data.labels, split, kept)
    assert metrics == {"slice_worst/from": 0.0, "slice_gap/from": 1.0}
    assert {name: of["rows"] for name, of in details["from"]["values"].items()} == {"x": 4, "y": 3, "(none)": 1}
    assert details["from"]["worst"] == "y" and details["from"]["values"]["x"]["loss"] == 0.5
    # Which rows are held out, and everything else of them, does not depend on the columns looked at.
    half = replace(config.data, validation=None, train=str(held), split=SplitConfig(validation=0.5))
    without = replace(config, evaluate=EvaluateConfig(), data=half)
    with_them = replace(without, evaluate=config.evaluate)
    parts = [prepared(of, wordpiece(), tmp_path / "cache").validation.table.to_list() for of in (without, with_them)]
    assert parts[0] == parts[1]
    missing = replace(config, evaluate=EvaluateConfig(slices=["nowhere"]))
    data = prepared(missing, wordpiece(), tmp_path / "cache")
    with pytest.raises(UserError, match="no validation row has a column of this name"):
        measure_slices(missing, data.labels, data.validation, kept)


# ---- swapped terms ----


def test_terms_are_swapped_both_ways(tmp_path):
    swaps = Swaps([("he", "she"), ("his", "her"), ("him", "her"), ("New York", "Lagos")])
    assert swaps.text("He gave HIS the theme to her, in New York.") == "She gave HER the theme to his, in Lagos."
    assert swaps.names({"text": "He saw Lagos", "label": "he"}) == ["he -> she", "lagos -> new york"]
    assert swaps.row({"text": "nothing"}) is None
    row = {"question": "who?", "context": "so he and she", "answers": [{"text": "she", "start": 10}]}
    assert swaps.row(row)["answers"] == [{"text": "he", "start": 11}]
    table = write_jsonl(tmp_path / "terms.jsonl", [{"from": "he", "to": "she"}, {"from": "x"}])
    with pytest.raises(UserError, match=r"terms.jsonl:2"):
        Swaps.read(str(table))


def test_letters_that_only_the_pattern_takes_for_others_are_left():
    swaps = Swaps([("ali", "veli"), ("his", "her"), ("he", "she"), ("İsmail", "Ayşe")])
    text = "ALİ geldi, h\u0131s, \u017fhe"
    assert swaps.text(text) == text and swaps.row({"text": text}) is None and swaps.names({"text": text}) == []
    assert swaps.text("Ali, İsmail, ismail, AYŞE") == "Veli, Ayşe, ismail, İSMAIL"


def swapped_run(tmp_path, task, rows: list[dict]) -> RunConfig:
    (tmp_path / "terms.csv").write_text("from,to\nhe,she\nbig,small\n")
    held = write_jsonl(tmp_path / "held.jsonl", rows)
    train = write_jsonl(tmp_path / "train.jsonl", rows)
    config = data_run(train, task=task, packing=False, validation=str(held))
    return replace(
        config,
        evaluate=EvaluateConfig(counterfactual=str(tmp_path / "terms.csv")),
        data=replace(config.data, clean=CleanConfig(leaks=False)),
    )


def test_what_swapped_terms_change(tmp_path):
    rows = [
        {"text": "he is big", "label": "a"},
        {"text": "it is red", "label": "b"},
        {"text": "she ran", "label": "a"},
        {"text": "so big", "label": "b"},
    ]
    config = swapped_run(tmp_path, ClassificationConfig(), rows)
    data = prepared(config, wordpiece(), tmp_path / "cache")
    swapped = data.swapped["validation"]
    before = [json.loads(row)["text"] for row in data.validation.texts[:]["row"]] if data.validation.texts else None
    assert before is None and len(swapped.of) == 3
    after = [json.loads(row)["text"] for row in swapped.split.texts[:]["row"]]
    assert sorted(after) == ["he ran", "she is small", "so small"]

    def kept(count: int, predictions: dict[int, int], loss: float) -> list[dict]:
        return [
            {"prediction": np.array(predictions.get(row, 0)), "loss": np.array(loss), "weight": np.array(1)}
            for row in range(count)
        ]

    ran = after.index("he ran")
    changes = compare(config, swapped, (data.validation, kept(4, {}, 0.5)), (swapped.split, kept(3, {ran: 1}, 0.75)))
    assert changes["rows"] == 3 and changes["flips"] == 1 and changes["loss_change"] == pytest.approx(0.25)
    assert changes["by_term"]["she -> he"] == {
        "rows": 1,
        "loss_change": 0.25,
        "loss_change_abs": 0.25,
        "flips": 1,
        "flip_rate": 1.0,
    }
    assert changes["by_term"]["big -> small"]["rows"] == 2 and changes["by_term"]["big -> small"]["flips"] == 0


# ---- metrics from outside ----


@pytest.fixture
def distance():
    """How many classes a prediction is beside its label on average, as a plugin would add it."""

    @metric
    class Distance(Metric):
        name = "distance"
        lower_is_better = True
        tasks = ("classification",)

        def compute(self, predictions, targets, labels):
            return sum(abs(one - other) for one, other in zip(predictions, targets, strict=True)) / len(targets)

    yield Distance
    METRICS.remove("distance")


@pytest.mark.parametrize("value", [None, "high", {"x": 1.0}])
def test_a_registered_metric_that_is_no_number_is_named(distance, monkeypatch, value):
    monkeypatch.setattr(METRICS["distance"], "compute", lambda *unused: value)
    evaluation = Evaluation({"loss": 1.0}, predictions=((0, 1),))
    with pytest.raises(UserError, match=f"of the metric distance returned {type(value).__name__} instead of a number"):
        with_registered(evaluation, task_of(ClassificationConfig()), ("a", "b"))


def test_a_registered_metric_is_measured_over_all_rows_and_slices(tmp_path, distance):
    held = write_jsonl(
        tmp_path / "held.jsonl", [{"text": f"x{'b' * n}", "label": "abc"[n % 3], "from": "xy"[n % 2]} for n in range(6)]
    )
    config = classified(tmp_path, ClassificationConfig(), ["a", "b", "c"], validation=str(held))
    config = replace(config, evaluate=EvaluateConfig(slices=["from"], slice_metric="distance", min_slice_rows=1))
    assert not find_problems(config)
    data = prepared(config, wordpiece(), tmp_path / "cache")
    split = data.validation
    true = [int(split.sample(index)["label"]) for index in range(6)]
    kept = [
        {"prediction": np.array(0), "label": np.array(label), "probability": np.array([1.0, 0, 0])}
        | {"loss": np.array(0.0), "weight": np.array(1), "correct": np.array(label == 0)}
        for label in true
    ]
    task = task_of(config.task)
    whole = with_registered(task.measure(data.labels, split, Totals(0.0, 6.0, 2.0), kept), task, data.labels)
    assert whole.metrics["distance"] == 1.0  # of 0, 1, 2, 0, 1, 2
    metrics, details = measure_slices(config, data.labels, split, kept)
    values = {name: of["distance"] for name, of in details["from"]["values"].items()}
    assert metrics["slice_worst/from"] == max(values.values()), "the largest distance is the worst one"
    stopping = replace(config.trainer.early_stopping, metric="distance")
    assert not find_problems(replace(config, trainer=replace(config.trainer, early_stopping=stopping)))
    assert improves("distance", 1.0, 2.0) and not improves("distance", 2.0, 1.0)
    other = replace(config, task=TokenClassificationConfig())
    assert {problem.where for problem in find_problems(other)} == {"evaluate.slice_metric"}


def test_a_metric_that_is_not_registered_is_refused(tmp_path):
    config = classified(tmp_path, ClassificationConfig(), ["a", "b"], validation="x.jsonl")
    config = replace(config, evaluate=EvaluateConfig(slices=["from"], slice_metric="distance"))
    assert [problem.where for problem in find_problems(config)] == ["evaluate.slice_metric"]


# ---- refusals ----


def test_what_is_refused():
    def keys(task, evaluate=None, **data) -> set[str]:
        data = {"train": "x.jsonl", "packing": False} | data
        config = run_config(task=task, data=DataConfig(**data), evaluate=evaluate or EvaluateConfig())
        return {problem.where for problem in find_problems(config)}

    assert not keys(ClassificationConfig(regression=True))
    assert keys(ClassificationConfig(regression=True, labels=["a", "b"], balanced=True)) == {
        "task.labels",
        "task.balanced",
    }
    assert keys(ClassificationConfig(multi_label=True, class_weights={"a": 1.0})) == {"task.class_weights"}
    assert keys(ClassificationConfig(balanced=True, class_weights={"a": 1.0})) == {"task.balanced"}
    assert keys(ClassificationConfig(class_weights={"a": 0.0})) == {"task.class_weights.a"}
    assert keys(QuestionAnsweringConfig(), packing=True) == {"data.packing"}
    assert keys(TokenClassificationConfig(), EvaluateConfig(slice_metric="bleu")) == {"evaluate.slice_metric"}
    held = {"split": NOTHING_HELD_OUT}
    assert keys(TokenClassificationConfig(), EvaluateConfig(slices=["x"]), **held) == {"evaluate.slices"}
