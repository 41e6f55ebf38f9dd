"""Classifiers trained by methods with a head of their own: at ZeRO 0 to 3 alike, resumed to the bit, loaded as they were."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from parity.test_ladder import exact, monkeypatch_module  # noqa: F401 (fixture)
from safetensors.torch import load_file
from support.ranks import run_ranks
from support.tiny import save_decoder, save_encoder, write_labelled
from support.workshop import Results

from dstune.config.compose import compose
from dstune.config.run_file import read_run

PROGRAM = Path(__file__).with_name("train_cases.py")
STAGES = {"head": (0, 1, 2, 3), "features": (0, 3), "entries": (0, 1, 2, 3), "tensors": (0, 2)}
METHODS = {
    "head": ["method=head", "method.pooling=last", "method.layers=1", "method.dropout=0.1"],
    "features": ["method=features", "method.layers=1", "method.random_forest=true", "method.logistic_regression=true"],
    "entries": ["method=importance", "method.score_steps=2", "optimizer.weight_decay=0.1"],
    "tensors": ["method=importance", "method.unit=tensors", "method.share=0.3", "method.selection=squared_gradient"],
}
COMMON = [
    "task=classification",
    "data=files",
    "data.max_length=32",
    "data.split.validation=0.2",
    "data.packing=false",
    "trainer.precision=fp32",
    "trainer.micro_batch_size=4",
    "trainer.global_batch_size=20",
    "trainer.max_steps=4",
    "zero.param_persistence_threshold=0",
    "optimizer.lr=1e-2",
    "evaluate.every=2",
]


class Runs(Results):
    def __init__(self, folder: Path):
        self.folder = folder
        self.model = save_encoder(folder / "model", hidden_dropout_prob=0.1)
        self.data = write_labelled(folder / "rows.jsonl", 100)

    def case(self, name: str, *overrides: str, directory: str | None = None) -> dict[str, str]:
        run_dir = self.folder / (directory or name)
        given = [f"model.path={self.model}", f"data.train={self.data}", *COMMON, f"run.dir={run_dir}", *overrides]
        return self.written(name, compose(given), directory)

    def json(self, name: str, file: str) -> dict:
        return json.loads((self.folder / name / file).read_text())


@pytest.fixture(scope="module")
def runs(tmp_path_factory, monkeypatch_module) -> Runs:  # noqa: F811
    folder = tmp_path_factory.mktemp("methods")
    monkeypatch_module.setenv("DSTUNE_CACHE", str(folder / "cache"))
    runs = Runs(folder)
    whole, cut, end = [], [], []
    limit = "run.time_limit=0.000001"  # over after the first step of the launch
    for method, overrides in METHODS.items():
        for stage in STAGES[method]:
            name, given = f"{method}-{stage}", [*overrides, f"zero=stage{stage}"]
            whole.append(runs.case(name, *given))
            if stage == STAGES[method][-1]:
                cut.append(runs.case(f"{name}-cut", *given, limit))
                end.append(runs.case(f"{name}-end", *given, directory=f"{name}-cut"))
    ablated = ["method=importance", "method.unit=tensors", "method.selection=ablation", "method.ablation_rows=8"]
    whole.append(runs.case("ablated", *ablated, "zero=stage3", "trainer.max_steps=1", "evaluate.every=0"))
    run_ranks(PROGRAM, 2, [*whole, *cut])
    run_ranks(PROGRAM, 2, end)
    return runs


@pytest.mark.parametrize("method", METHODS)
def test_all_stages_agree_and_resume_to_the_bit(runs: Runs, method: str):
    reference = exact(runs.folder / f"{method}-0")
    for stage in STAGES[method]:
        found = exact(runs.folder / f"{method}-{stage}")
        for expected, row in zip(reference, found, strict=True):
            assert row == pytest.approx(expected, rel=2e-4), (stage, row)
        if stage != STAGES[method][-1]:
            continue
        assert found == exact(runs.folder / f"{method}-{stage}-cut")
        left, right = runs.weights(f"{method}-{stage}"), runs.weights(f"{method}-{stage}-cut")
        assert left.keys() == right.keys() and left
        assert all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("method", METHODS)
def test_frozen_weights_keep_every_bit_and_the_others_move(runs: Runs, method: str):
    start = load_file(runs.model / "model.safetensors")
    for stage in STAGES[method]:
        trained = {name.removeprefix("bert."): weight for name, weight in runs.weights(f"{method}-{stage}").items()}
        share = runs.json(f"{method}-{stage}", "environment.json")["model"]
        body = start.keys() & trained.keys()
        equal = {name: trained[name] == start[name] for name in body}
        moved = sum(int((~same).sum()) for same in equal.values())
        if method in ("head", "features"):
            assert moved == 0
            assert share["parameters"] == sum(weight.numel() for weight in trained.values())
            assert share["trained"] == 32 * 32 + 32 + 2 * 32 + 2
            continue
        report = runs.json(f"{method}-{stage}", "importance.json")
        chosen = {row["name"].removeprefix("bert."): row["trained"] for row in report["tensors"]}
        assert 0 < report["trained_share"] <= report["share"]
        for name, same in equal.items():
            assert int((~same).sum()) <= chosen.get(name, same.numel()), name
        if method == "entries":  # of rows that come, nearly every chosen entry gets a gradient
            assert moved > 0.9 * sum(chosen.values())
        assert share["trained"] == sum(chosen.values()) + 2 * 32 + 2


def test_scores_are_those_of_every_stage(runs: Runs):
    reports = [runs.json(f"entries-{stage}", "importance.json") for stage in STAGES["entries"]]
    for report in reports:
        names = [row["name"] for row in report["tensors"]]
        assert len(names) == len(reports[0]["tensors"]) > 30
        first, other = ({row["name"]: row for row in one["tensors"]} for one in (reports[0], report))
        for name, row in first.items():
            assert other[name]["scores"] == pytest.approx(row["scores"], rel=1e-3, abs=1e-7)


def test_ablation_is_the_loss_without_the_tensor_and_leaves_it_as_it_was(runs: Runs):
    report = runs.json("ablated", "importance.json")
    lost = {row["name"]: row["lost"]["loss"] for row in report["tensors"]}
    assert len(lost) > 30 and list(lost.values()) == sorted(lost.values(), reverse=True)
    # A bias of keys shifts all attention scores of a query alike, so nothing is lost without it.
    keys = [value for name, value in lost.items() if name.endswith("key.bias")]
    assert keys and max(map(abs, keys)) < 1e-6 < max(map(abs, lost.values()))
    assert report["correlation"].keys() == {"squared_gradient", "gradient_weight", "movement"}
    assert 0 < report["trained_share"] <= 0.1


def test_features_are_computed_once(runs: Runs):
    """By two runs, of whole and of partitioned weights, and one in two launches."""
    entries = list((runs.folder / "cache" / "features").iterdir())
    assert len(entries) == 1
    assert sorted(file.name for file in entries[0].iterdir()) == [
        "meta.json",
        "train-0-of-2.arrow",
        "train-1-of-2.arrow",
        "validation-0-of-2.arrow",
        "validation-1-of-2.arrow",
    ]
    result = runs.json("features-3", "result.json")["classifiers"]
    assert result["logistic_regression"]["validation"]["accuracy"] > 0.5
    ranking = result["random_forest"]["ranking"]
    assert len(ranking) == 20 and ranking[0]["impurity"] >= ranking[-1]["impurity"] > 0


@pytest.mark.parametrize("method", ["head", "features"])
def test_exports_load_in_dstune_and_in_transformers_with_equal_outputs(runs: Runs, method: str):
    from dataclasses import replace

    from transformers import AutoModelForSequenceClassification

    from dstune.checkpoint import store
    from dstune.checkpoint.shards import Weights
    from dstune.methods.full import FullConfig
    from dstune.models.load import load_model, load_tokenizer

    config = read_run(runs.folder / f"{method}-3.yaml").config
    path = str(runs.folder / f"{method}-3" / "export")
    again = replace(config, model=replace(config.model, path=path), method=FullConfig())
    tokenizer = load_tokenizer(again.model)
    ours = load_model(again, tokenizer, ("left", "right"), torch.float32).eval()
    theirs = AutoModelForSequenceClassification.from_pretrained(path, trust_remote_code=True).eval()
    rows = [json.loads(line) for line in runs.data.read_text().splitlines()[:40]]
    batch = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    with torch.no_grad():
        left, right = ours(**batch).logits, theirs(**batch).logits
    assert torch.equal(left, right)
    newest = store.newest(runs.folder / f"{method}-3")
    assert newest is not None
    trained = Weights(newest)
    for name, weight in ours.classifier.named_parameters():
        assert torch.equal(weight, trained[f"classifier.{name}"]), name


@pytest.mark.ci
def test_the_language_model_stage_feeds_the_classifier(runs: Runs):
    """Stopped in the first stage, then finished. The layers that never train are those of the language model, to the bit."""
    decoder = save_decoder(runs.folder / "decoder")
    given = [f"model.path={decoder}", "method=ulmfit", "method.language_model_epochs=1", "method.unfreeze_steps=3"]
    limit = "run.time_limit=0.000001"
    cut = runs.case("domain-cut", *given, "zero=stage3", limit, directory="domain")
    run_ranks(PROGRAM, 2, [cut, runs.case("domain-end", *given, "zero=stage3", directory="domain")])
    folder = runs.folder / "domain"
    assert runs.json("domain/language_model", "result.json")["status"] == "completed"
    assert runs.json("domain", "result.json")["steps"] == 4
    start, language = (
        load_file(path / "model.safetensors") for path in (decoder, folder / "language_model" / "export")
    )
    trained = runs.weights("domain")
    assert "score.weight" in trained and "lm_head.weight" in language
    below = "model.layers.0.mlp.up_proj.weight"  # begins with the 7th step, which this run does not have
    assert torch.equal(trained[below], language[below]) and not torch.equal(trained[below], start[below])
    assert not torch.equal(trained["model.norm.weight"], language["model.norm.weight"])
