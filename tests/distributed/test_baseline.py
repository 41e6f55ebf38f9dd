"""The untuned model, prompted: `dstune evaluate --shots` on two ranks against a plain loop, `evaluate.baseline_shots`, what a
report says of it; rows with their answers; and the public harness."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as functional

from dstune.config.compose import compose
from dstune.config.run_file import write_run
from dstune.core.errors import UserError
from dstune.core.rank_env import RankEnv
from dstune.data.build import prepare
from dstune.evaluation import command as evaluate
from dstune.evaluation import harness
from dstune.models.load import load_tokenizer
from dstune.report.command import main as report
from dstune.tasks.classification.prompted import LABEL_PROMPT
from dstune.trainer.baseline import as_language_model, draw
from tests.support.ranks import run_ranks
from tests.support.tiny import save_decoder, save_encoder, write_labelled, write_pairs

PROGRAM = Path(__file__).parents[1] / "parity" / "train_cases.py"

SHARED = [
    "data=files",
    "data.max_length=64",
    "evaluate.every=0",
    "checkpoint.every=0",
    "data.split.validation=0.3",
    "trainer.precision=fp32",
    "trainer.micro_batch_size=2",
    "trainer.global_batch_size=4",
    "trainer.max_steps=3",
    "evaluate.max_rows=7",
]


class Bench:
    def __init__(self, folder: Path):
        self.folder = folder
        # So likely to say any word that its first answer does not decide everything.
        self.model = save_decoder(folder / "decoder", max_position_embeddings=512)
        pairs, labels = write_pairs(folder / "pairs.jsonl", 40), write_labelled(folder / "labels.jsonl", 40)
        self.pairs = [*SHARED, "task=seq2seq", f"data.train={pairs}"]
        self.labels = [*SHARED, "task=classification", f"data.train={labels}"]

    def data(self, overrides: list[str]):
        config = compose([f"model.path={self.model}", *overrides]).config
        tokenizer = load_tokenizer(config.model)
        return config, tokenizer, prepare(config, tokenizer, RankEnv(0, 1, 0, 1, "test"), self.folder / "cache")


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    bench = Bench(tmp_path_factory.mktemp("baseline"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSTUNE_CACHE", str(bench.folder / "cache"))
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield bench


def plain_model(bench: Bench):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(bench.model).eval()


def loss_of(model, ids: list[int], answer: list[int]) -> float:
    """Negative log-likelihood of `answer` behind `ids`."""
    tokens = torch.tensor([[*ids, *answer]])
    with torch.no_grad():
        logits = model(tokens).logits[0, len(ids) - 1 : -1]
    return float(functional.cross_entropy(logits, torch.tensor(answer), reduction="sum"))


def test_seq2seq_is_prompted_with_worked_examples_on_every_rank(bench, capsys, tmp_path):
    from dstune.trainer.evaluate import limited

    out = tmp_path / "rows.jsonl"
    arguments = [str(bench.model), *bench.pairs, "zero=stage3", "launch.processes=2", "--shots", "0,2"]
    assert evaluate.main([*arguments, "--output", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    config, tokenizer, data = bench.data(bench.pairs)
    split, model = limited(data.validation, 7, config.task), plain_model(bench)
    examples = [
        token for index in draw(data.train, 2, config.trainer.seed) for token in data.train.sample(index)["input_ids"]
    ]
    most = -(-5 * int(split.weights.max()) // 4)
    for prompted, context in zip(found["prompted"], ([], examples), strict=True):
        losses, answers = [], []
        for index in range(7):
            sample = split.sample(index)
            first = int((sample["labels"] != -100).argmax())
            ids, targets = sample["input_ids"].tolist(), sample["labels"][sample["labels"] != -100].tolist()
            losses.append(loss_of(model, [*context, *ids[:first]], targets))
            prompt = torch.tensor([[*context, *ids[:first]]])
            written = model.generate(prompt, max_new_tokens=most, do_sample=False)[0, prompt.shape[1] :]
            answers.append(tokenizer.decode(written, skip_special_tokens=True).strip().partition("\n")[0].strip())
        assert prompted["metrics"]["loss"] == pytest.approx(sum(losses) / split.weights.sum(), rel=1e-5)
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        mine = [row for row in rows if row["shots"] == prompted["shots"]]
        # Written in the order of the file, though rows of a length are evaluated together.
        everywhere = json.loads(split.places.read_text())
        lines = [int(everywhere[number].rpartition(":")[2]) for number in split.origins]
        in_file = sorted(range(7), key=lines.__getitem__)
        assert [row["answer"] for row in mine] == [answers[index] for index in in_file]
        assert [row["target"] for row in mine] == [split.source_and_target(index)["target"] for index in in_file]
    zero, two = (prompted["metrics"]["loss"] for prompted in found["prompted"])
    assert (found["rows"], found["world_size"]) == (7, 2) and zero != pytest.approx(two, rel=1e-3)


@pytest.mark.ci
def test_labels_are_judged_by_their_likelihood(bench, capsys):
    arguments = [str(bench.model), *bench.labels, "zero=stage2", "launch.processes=2", "--shots", "0,2", "--json"]
    assert evaluate.main(arguments) == 0
    found = json.loads(capsys.readouterr().out)["prompted"]
    config, tokenizer, data = bench.data(bench.labels)
    from dstune.trainer.evaluate import limited

    split, model = limited(data.validation, 7, config.task), plain_model(bench)
    ask = LABEL_PROMPT.format(labels=" or ".join(data.labels))

    def prompt_text(sample) -> str:
        text = ask.replace("{source}", tokenizer.decode(sample["input_ids"]))
        messages = [{"role": "user", "content": text}]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    classes = [int(data.train.sample(index)["label"]) for index in range(len(data.train.lengths))]
    import numpy as np

    chosen = draw(data.train, 2, config.trainer.seed, np.array(classes))
    assert {classes[index] for index in chosen} == {0, 1}
    context: list[int] = []
    for index in chosen:
        context += ids(f"{prompt_text(data.train.sample(index))}{data.labels[classes[index]]}<|im_end|>\n")
    for prompted, before in zip(found, ([], context), strict=True):
        right, surprise = 0, 0.0
        for index in range(7):
            sample = split.sample(index)
            losses = torch.tensor(
                [
                    loss_of(model, [*before, *ids(prompt_text(sample))], ids(f"{label}<|im_end|>"))
                    for label in data.labels
                ]
            )
            right += int(losses.argmin()) == int(sample["label"])
            surprise -= float(torch.log_softmax(-losses, dim=0)[int(sample["label"])])
        assert prompted["metrics"]["accuracy"] == pytest.approx(right / 7)
        assert prompted["metrics"]["loss"] == pytest.approx(surprise / 7, rel=1e-4)


def test_a_run_keeps_its_baseline_and_the_report_compares(bench, capsys, tmp_path):
    run_dir = tmp_path / "run"
    overrides = [f"model.path={bench.model}", *bench.pairs, f"run.dir={run_dir}", "optimizer.lr=0.01", "method=lora"]
    write_run(tmp_path / "run.yaml", compose([*overrides, "evaluate.baseline_shots=[0]", "zero=stage2"]))
    run_ranks(PROGRAM, 2, [{"run_yaml": str(tmp_path / "run.yaml"), "run_dir": str(run_dir)}])
    (row,) = json.loads((run_dir / "baseline.json").read_text())
    result = json.loads((run_dir / "result.json").read_text())
    assert (row["shots"], row["split"], row["rows"]) == (0, "validation", 7)
    assert row["metrics"]["loss"] == pytest.approx(result["eval_initial"]["loss"], rel=1e-6)
    assert evaluate.main([str(run_dir), "--shots", "2", "launch.processes=1"]) == 0
    assert "2 examples" in capsys.readouterr().out
    rows = json.loads((run_dir / "baseline.json").read_text())
    assert sorted(row["shots"] for row in rows) == [0, 2]
    assert report([str(run_dir)]) == 0
    page = (run_dir / "report.html").read_text()
    best = min(row["metrics"]["loss"] for row in rows)
    verdict = "better than prompting" if result["eval_final"]["loss"] < best else "no better than prompting"
    assert "untuned held-out loss" in page and verdict in page


TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{source}}}}"
doc_to_choice: ["w1 w4", "w2 w3"]
doc_to_target: 0
metric_list:
  - metric: acc
"""


@pytest.mark.ci
def test_the_public_harness_measures_what_a_plain_loop_does(bench, capsys, tmp_path):
    rows = tmp_path / "rows.jsonl"
    texts = [f"w{number} w{number + 1} w{2 * number}" for number in range(12)]
    rows.write_text("".join(json.dumps({"source": text}) + "\n" for text in texts))
    (tmp_path / "mine.yaml").write_text(TASK.format(name="mine", rows=rows))
    arguments = [str(bench.model), "evaluate.max_rows=10", "--harness-path", str(tmp_path), "--json"]
    assert evaluate.main([*arguments, "--harness", "mine"]) == 0
    found = json.loads(capsys.readouterr().out)["harness"]["mine"]
    _, tokenizer, _ = bench.data(bench.pairs)
    model, right = plain_model(bench), 0
    for text in texts[:10]:
        ids = tokenizer(text)["input_ids"]
        first, second = (loss_of(model, ids, tokenizer(choice)["input_ids"]) for choice in ("w1 w4", "w2 w3"))
        right += first < second
    assert 0 < right < 10, "a constant would be right"
    assert found["acc"] == pytest.approx(right / 10)
    with pytest.raises(UserError, match="no such task"):
        evaluate.main([*arguments, "--harness", "theirs"])


def test_what_cannot_be_evaluated_is_refused(bench, monkeypatch):
    with pytest.raises(UserError, match="--prompted"):
        evaluate.main([str(bench.model), *bench.pairs, "--prompted", "x", "--shots", "0"])
    with pytest.raises(UserError, match="worked examples come from training rows"):
        evaluate.main([str(bench.model), "task=seq2seq", "data=files", "data.validation=x.jsonl", "--shots", "4"])
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"(?s)lm-eval is not installed.*'\.\[harness\]'"):
        evaluate.main([str(bench.model), "--harness", "mine"])


def test_an_encoder_cannot_be_evaluated(tmp_path):
    config = compose([f"model.path={save_encoder(tmp_path / 'encoder')}", "task=classification", "data.train=x"]).config
    with pytest.raises(UserError, match="an encoder, and answers no prompt"):
        as_language_model(config)
