"""Several labels a row from the command line to the export, held against plain transformers and scikit-learn."""

from __future__ import annotations

import json

import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score
from support.command import Commands
from support.sources import pairs, write_jsonl
from support.tiny import save_encoder
from transformers import AutoModelForSequenceClassification, AutoTokenizer


@pytest.mark.ci
def test_from_training_to_the_export(tmp_path):
    commands = Commands(tmp_path)
    save_encoder(tmp_path / "model", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    rows = []
    for text, _ in pairs(60):
        words = text.split()
        labels = [name for name, holds in (("long", len(words) > 4), ("low", words[0] < "w5")) if holds]
        rows.append({"text": text, "labels": labels})
    write_jsonl(tmp_path / "train.jsonl", rows[:45])
    write_jsonl(tmp_path / "held.jsonl", rows[45:])
    run = ["model.path=model", "task=classification", "task.multi_label=true", "data.packing=false", "run.dir=run"]
    fp32 = "trainer.precision=fp32"  # to be compared to 1e-5
    data = [
        "data.train=train.jsonl",
        "data.validation=held.jsonl",
        "data.max_length=64",
        "evaluate.every=0",
        "checkpoint.every=0",
    ]
    more = ["trainer.max_steps=12", "trainer.global_batch_size=6", "trainer.micro_batch_size=2", "optimizer.lr=3e-3"]
    done = commands.run("train", *run, *data, *more, fp32, "launch.processes=2")
    assert done.returncode == 0, done.stderr + done.stdout
    result = json.loads((tmp_path / "run" / "result.json").read_text())

    export = tmp_path / "run" / "export"
    model = AutoModelForSequenceClassification.from_pretrained(export)
    assert model.config.problem_type == "multi_label_classification"
    assert model.config.id2label == {0: "long", 1: "low"}
    tokenizer = AutoTokenizer.from_pretrained(export)
    true, found, losses = [], [], []
    for row in rows[45:]:
        labels = [float(name in row["labels"]) for name in ("long", "low")]
        with torch.no_grad():
            output = model(**tokenizer(row["text"], return_tensors="pt"), labels=torch.tensor([labels]))
        losses.append(float(output.loss))
        true.append(labels)
        found.append((torch.sigmoid(output.logits[0]) > 0.5).float().tolist())
    expected = {
        "loss": sum(losses) / len(losses),
        "accuracy": accuracy_score(true, found),
        "f1_macro": f1_score(true, found, average="macro", zero_division=0.0),
        "f1_micro": f1_score(true, found, average="micro", zero_division=0.0),
    }
    assert {name: result["eval_final"][name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert result["eval_final"]["loss"] < result["eval_initial"]["loss"]

    # The export says itself that it has several labels.
    overrides = ["task=classification", "data.packing=false", "task.multi_label=true", fp32, *data]
    done = commands.run("evaluate", "run/export", *overrides, "launch.processes=1", "--json")
    assert done.returncode == 0, done.stderr + done.stdout
    evaluated = json.loads(done.stdout)
    assert evaluated["rows"] == 15
    assert {name: evaluated["metrics"][name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert "confusion" not in evaluated
