"""The ladder of proof for each head beside that of language models: plain torch = any number of ranks = any stage.

A chunk of these tasks ends in a small micro-batch, rows differ in targets and weight, and dropout is on. Evaluation counts
every row once although no number of ranks divides the micro-batches, and a resumed run equals an undisturbed one.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as functional
from parity.reference import train_plainly
from seqeval.metrics import f1_score
from support.ranks import run_ranks
from support.tiny import save_encoder, write_labelled, write_questions, write_scored, write_tagged
from support.workshop import PLAIN, VOLATILE, Results
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    pipeline,
)

from dstune.config.compose import compose
from dstune.config.run_file import read_run
from dstune.core.rank_env import RankEnv
from dstune.data.build import prepare
from dstune.data.prepared import Split
from dstune.evaluation import command as evaluate
from dstune.tasks.question_answering.metrics import answer_metrics

PROGRAM = Path(__file__).with_name("train_cases.py")
STAGES = {1: (0, 3), 2: (1, 3), 3: (2, 3)}
"""ZeRO stages by number of ranks."""

BASE = [
    *PLAIN,
    "data.split.validation=0.3",
    "data.clean.leaks=false",
    "optimizer.lr=0.1",
    "trainer.micro_batch_size=2",
    "trainer.global_batch_size=9",
    "trainer.max_steps=3",
    "run.export=none",
]


def tag_loss(model, batch):
    labels, _ = batch.pop("labels"), batch.pop("word_start")
    logits = model(**batch).logits
    loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    return loss, int((labels != -100).sum())


def answer_loss(model, batch):
    """Row by row without padding, by the positions that have a token."""
    inputs = ("input_ids", "attention_mask", "token_type_ids")
    output = model(**{name: batch[name] for name in inputs if name in batch})
    total = torch.zeros((), dtype=torch.float64)
    for logits, positions in ((output.start_logits, "start_positions"), (output.end_logits, "end_positions")):
        for row, length in enumerate(batch["attention_mask"].sum(dim=1).tolist()):
            total = total + functional.cross_entropy(logits[row, :length][None], batch[positions][row][None]) / 2
    return total, len(batch["input_ids"])


def weighted_focal_loss(model, batch):
    weights = torch.where(batch["labels"] == 1, 3.0, 0.5).double()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    chance = logits.softmax(-1).gather(1, batch["labels"][:, None])[:, 0]
    return (-weights * (1 - chance) ** 1.5 * chance.log()).sum(), float(weights.sum())


def squared_loss(model, batch):
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return (logits[:, 0] - batch["labels"].double()).square().sum(), len(logits)


HEADS = {
    "tags": (
        AutoModelForTokenClassification,
        {"num_labels": 5},
        write_tagged,
        ["task=token_classification", "task.subwords=all", "task.stride=2", "data.max_length=12"],
        tag_loss,
    ),
    "answers": (
        AutoModelForQuestionAnswering,
        {},
        write_questions,
        ["task=question_answering", "task.stride=4", "data.max_length=16"],
        answer_loss,
    ),
    "weighted": (
        AutoModelForSequenceClassification,
        {"num_labels": 2},
        write_labelled,
        ["task=classification", "task.class_weights={left: 0.5, right: 3.0}", "task.focal_gamma=1.5"],
        weighted_focal_loss,
    ),
    "regression": (
        AutoModelForSequenceClassification,
        {"num_labels": 1},
        write_scored,
        ["task=classification", "task.regression=true", "optimizer.lr=0.01"],
        squared_loss,
    ),
}
"""Model class, its arguments, rows, overrides, and the loss by hand."""


class Workshop(Results):
    def __init__(self, folder: Path):
        self.folder = folder
        body = save_encoder(folder / "body")
        for name, (model_class, arguments, write_rows, _, _) in HEADS.items():
            torch.manual_seed(0)
            model_class.from_pretrained(body, **arguments).save_pretrained(folder / f"{name}-model")
            for file in body.glob("*token*"):
                (folder / f"{name}-model" / file.name).write_bytes(file.read_bytes())
            write_rows(folder / f"{name}.jsonl", 40)

    def learnable(self, head: str) -> Path:
        return self.folder / f"{head}-learnable.jsonl"

    def write_learnable(self) -> None:
        write_tagged(self.learnable("tags"), 250, seed=1)
        write_questions(self.learnable("answers"), 250, seed=1, unanswered=0.3)

    def held_out(self, name: str) -> Split:
        """The validation rows of a run."""
        config = read_run(self.folder / f"{name}.yaml").config
        tokenizer = AutoTokenizer.from_pretrained(config.model.path)
        split = prepare(config, tokenizer, RankEnv(0, 1, 0, 1, "test"), self.folder / "cache").validation
        assert split is not None
        return split

    def composed(self, head: str, name: str, *overrides: str):
        sources = [f"model.path={self.folder / f'{head}-model'}", f"data.train={self.folder / f'{head}.jsonl'}"]
        return compose([*sources, *BASE, *HEADS[head][3], f"run.dir={self.folder / name}", *overrides])

    def case(self, head: str, name: str, *overrides: str, directory: str | None = None) -> dict[str, str]:
        return self.written(name, self.composed(head, name, *overrides), directory)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heads")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSTUNE_CACHE", str(folder / "cache"))
        yield Workshop(folder)


@pytest.fixture(scope="module")
def references(workshop):
    return {
        head: train_plainly(workshop.composed(head, "reference").config, workshop.folder / "cache", model_class, loss)
        for head, (model_class, _, _, _, loss) in HEADS.items()
    }


@pytest.fixture(scope="module")
def trained(workshop, references):
    """All runs on one and on two ranks, in one process group for each number."""
    for size in (1, 2):
        cases = cases_of(workshop, size)
        if size == 2:
            adamw = ["zero=stage2", "optimizer=adamw", "optimizer.lr=1e-2"]
            limit = "run.time_limit=0.000001"  # over after the first step of each launch
            cases += [
                workshop.case("answers", "whole", *adamw),
                workshop.case("answers", "cut", *adamw, limit, directory="cut"),
                workshop.case("answers", "end", *adamw, directory="cut"),
            ]
            learn = ["zero=stage1", "optimizer=adamw", "optimizer.lr=6e-3", "schedule=cosine", "trainer.max_steps=100"]
            learn += ["trainer.global_batch_size=16", "trainer.micro_batch_size=8", "evaluate.at_start=true"]
            learn += ["model.config_overrides={hidden_dropout_prob: 0.0, attention_probs_dropout_prob: 0.0}"]
            learn += ["data.max_length=32", "run.export=last"]
            workshop.write_learnable()
            cases += [
                workshop.case(
                    "tags", "learn-tags", *learn, "data.max_length=128", f"data.train={workshop.learnable('tags')}"
                ),
                workshop.case(
                    "answers",
                    "learn-answers",
                    *learn,
                    "task.no_answer=true",
                    f"data.train={workshop.learnable('answers')}",
                ),
            ]
        run_ranks(PROGRAM, size, cases)
    return workshop


@pytest.fixture(scope="module")
def trained_on_three(workshop, trained):
    run_ranks(PROGRAM, 3, cases_of(workshop, 3))
    return trained


def cases_of(workshop: Workshop, size: int) -> list[dict[str, str]]:
    """Every head on `size` ranks."""
    return [
        workshop.case(head, f"{head}-s{stage}-n{size}", f"zero=stage{stage}")
        for stage in STAGES[size]
        for head in HEADS
    ]


@pytest.mark.parametrize("head", HEADS)
def test_any_stage_equals_the_plain_loop(trained, references, head):
    equals_the_plain_loop(trained, references[head], head, (1, 2))


@pytest.mark.ci
@pytest.mark.parametrize("head", HEADS)
def test_so_do_three_ranks(trained_on_three, references, head):
    equals_the_plain_loop(trained_on_three, references[head], head, (2, 3))


def equals_the_plain_loop(trained, expected, head, sizes):
    evaluations = []
    for size in sizes:
        for stage in STAGES[size]:
            name = f"{head}-s{stage}-n{size}"
            rows = [row for row in trained.rows(name) if "loss" in row]
            assert [row["loss"] for row in rows] == pytest.approx(expected.losses, rel=1e-5), name
            assert [row["grad_norm"] for row in rows] == pytest.approx(expected.grad_norms, rel=1e-5), name
            evaluations.append(trained.result(name)["eval_final"])
    for evaluation in evaluations:
        # A correlation near 0 is not known to five digits: 5e-7 apart on a processor without AVX-512.
        assert evaluation == pytest.approx(evaluations[0], rel=1e-5, abs=2e-6)


def test_a_resumed_run_equals_an_undisturbed_one(trained):
    whole, cut = (
        [{key: value for key, value in row.items() if key not in VOLATILE} for row in trained.rows(name)]
        for name in ("whole", "cut")
    )
    assert whole == cut and sum("loss" in row for row in whole) == 3  # trainer.max_steps


def test_a_tagger_learns_and_the_pipeline_of_transformers_gives_its_tags(trained):
    """The export alone, with the words as a text: entity F1 and accuracy of its tags are those that training measured."""
    result = trained.result("learn-tags")
    assert result["eval_initial"]["entity_f1"] < 0.3 and result["eval_final"]["entity_f1"] > 0.6
    tagger = pipeline("token-classification", str(trained.folder / "learn-tags" / "export"), ignore_labels=[])
    held_out = set()
    split = trained.held_out("learn-tags")
    tokenizer = tagger.tokenizer
    for number in range(len(split.origins)):
        held_out.add(tokenizer.decode(split.sample(number)["input_ids"]))
    true, found = [], []
    for line in dict.fromkeys(trained.learnable("tags").read_text().splitlines()):
        row = json.loads(line)
        text = " ".join(row["tokens"])
        if tokenizer.decode(tokenizer(text)["input_ids"]) in held_out:
            true.append(row["tags"])
            found.append([piece["entity"] for piece in tagger(text)])
    assert len(true) == len(split.lengths) > 50
    assert f1_score(true, found) == pytest.approx(result["eval_final"]["entity_f1"])
    right = [a == b for tags, of in zip(found, true, strict=True) for a, b in zip(tags, of, strict=True)]
    assert sum(right) / len(right) == pytest.approx(result["eval_final"]["token_accuracy"])


def test_answers_are_learned_and_the_export_gives_them(trained):
    """Plain transformers on the export's chunks: the best span of each question, by the official metrics."""
    result = trained.result("learn-answers")
    assert result["eval_final"]["f1"] > 0.65 > 0.3 > result["eval_initial"]["f1"]
    assert result["eval_final"]["exact_match_unanswerable"] > 0.5
    model = AutoModelForQuestionAnswering.from_pretrained(trained.folder / "learn-answers" / "export").eval()
    split = trained.held_out("learn-answers")
    best: dict[int, tuple[float, str]] = {}
    none: dict[int, float] = {}
    rows = [json.loads(row) for row in split.texts[:]["row"]]
    for number, row in enumerate(split.origins.tolist()):
        sample = split.sample(number)
        inputs = {
            name: torch.tensor(sample[name][None]).long() for name in ("input_ids", "token_type_ids") if name in sample
        }
        with torch.no_grad():
            output = model(**inputs)
        starts, ends = output.start_logits[0], output.end_logits[0]
        none[row] = min(none.get(row, torch.inf), float(starts[0] + ends[0]))
        inside = [at for at in range(len(starts)) if sample["char_end"][at] > sample["char_start"][at]]
        for first in inside:
            for last in inside:
                score = float(starts[first] + ends[last])
                if first <= last < first + 30 and score > best.get(row, (-torch.inf, ""))[0]:
                    best[row] = (score, rows[row]["context"][sample["char_start"][first] : sample["char_end"][last]])
    order = range(len(rows))
    found = answer_metrics(
        [best[row][1] for row in order],
        [[answer["text"] for answer in rows[row]["answers"]] for row in order],
        [none[row] - best[row][0] for row in order],
    )
    assert {name: result["eval_final"][name] for name in found} == pytest.approx(found, rel=1e-4)


def test_evaluate_gives_slices_and_what_swapped_terms_change(trained, tmp_path, capsys):
    """On two ranks, from the run: the whole as at its end, of which the slices are the parts."""
    (tmp_path / "terms.csv").write_text("from,to\nw3,w4\nw90,w91\n")
    options = ["evaluate.slices=[source]", f"evaluate.counterfactual={tmp_path / 'terms.csv'}", "launch.processes=2"]
    assert evaluate.main([str(trained.folder / "learn-answers"), *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = trained.result("learn-answers")["eval_final"]
    assert {name: found["metrics"][name] for name in expected} == pytest.approx(expected, rel=1e-4)
    slices = found["slices"]["source"]["values"]
    assert set(slices) == {"a", "b"} and sum(of["rows"] for of in slices.values()) == found["rows"]
    mean = sum(of["f1"] * of["rows"] for of in slices.values()) / found["rows"]
    assert mean == pytest.approx(expected["f1"])
    gap = abs(slices["a"]["f1"] - slices["b"]["f1"])
    assert found["metrics"]["slice_gap/source"] == pytest.approx(gap)
    changes = found["counterfactual"]
    rows = [json.loads(line) for line in trained.learnable("answers").read_text().splitlines()]
    terms = {"w3", "w4", "w90", "w91"}
    held_out = {json.loads(row)["context"] for row in trained.held_out("learn-answers").texts[:]["row"]}
    touched = [
        row for row in rows if row["context"] in held_out and terms & set(f"{row['context']} {row['question']}".split())
    ]
    assert changes["rows"] == len(touched) > 10
    assert 0 <= changes["flips"] < len(touched) / 2  # an answer with its own term swapped is the same answer
    assert set(changes["by_term"]) == {"w3 -> w4", "w4 -> w3", "w90 -> w91", "w91 -> w90"}
