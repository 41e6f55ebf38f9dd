"""Several tasks in one run, from the command line to the export: what each row becomes, and the metrics of each task."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from sacrebleu import corpus_chrf
from support.command import Commands, exact, result
from support.sources import write_jsonl
from support.tiny import save_decoder, write_dialogues
from transformers import AutoModelForCausalLM

from dstune.config.compose import compose
from dstune.core.rank_env import RankEnv
from dstune.data.build import prepare
from dstune.data.collate import NO_TARGET
from dstune.data.prepared import PreparedData
from dstune.models.load import load_tokenizer

TASKS = {
    "talk": ["task=chat", "data.train=talk.jsonl"],
    "books": ["task=causal_lm", "data.train=books.jsonl"],
    "turn": ["task=seq2seq", "data.train=pairs.jsonl", "task.prompt='turn: {source}'"],
    "again": ["task=seq2seq", "data.train=copies.jsonl", "task.prompt='again: {source}'"],
}
DATE = "task.template_date=2026-01-01"
SEVERAL = [
    *(
        "task=chat",
        DATE,
        "model.path=model",
        "data.max_length=64",
        "evaluate.every=0",
        "checkpoint.every=0",
        "trainer.precision=fp32",
    ),
    "data.mixture.talk.path=talk.jsonl",
    *("data.mixture.books.path=books.jsonl", "data.mixture.books.task=causal_lm", "data.mixture.books.weight=2"),
    *("data.mixture.turn.path=pairs.jsonl", "data.mixture.turn.task=seq2seq"),
    *("data.mixture.again.path=copies.jsonl", "data.mixture.again.task=seq2seq"),
    *("data.mixture.turn.prompt='turn: {source}'", "data.mixture.again.prompt='again: {source}'"),
    "data.split.validation=0.3",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("several")
    save_decoder(folder / "model")
    write_dialogues(folder / "talk.jsonl", 30)
    words = [f"w{number}" for number in range(40)]
    texts = [" ".join(words[start % 30 : start % 30 + 9]) for start in range(30)]
    write_jsonl(folder / "books.jsonl", [{"text": f"{text} w{number % 50}"} for number, text in enumerate(texts)])
    pairs = [(text, " ".join(text.split()[::-1])) for text in texts]
    write_jsonl(folder / "copies.jsonl", [{"source": text, "target": f"{text} w1"} for text in texts])
    write_jsonl(folder / "pairs.jsonl", [{"source": source, "target": target} for source, target in pairs])
    return folder


def prepared(folder: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> PreparedData:
    monkeypatch.chdir(folder)
    config = compose(list(overrides)).config
    return prepare(config, load_tokenizer(config.model), RankEnv(0, 1, 0, 1, "alone"), folder / "cache")


def contents(data: PreparedData, source: int | None = None) -> list[tuple[bytes, bytes]]:
    """Tokens and labels of the samples of all parts, of those of one source."""
    found = []
    for split in filter(None, (data.train, data.validation)):
        for number in range(len(split.lengths)):
            if source is None or split.sources[number] == source:
                sample = split.sample(number)
                found.append((sample["input_ids"].tobytes(), sample["labels"].tobytes()))
    return sorted(found)


def test_each_row_becomes_what_its_task_alone_makes_of_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together = prepared(folder, monkeypatch, *SEVERAL)
    for number, (name, overrides) in enumerate(TASKS.items()):
        more = [] if name == "books" else [DATE]
        common = ["model.path=model", "data.max_length=64", *more]
        alone = prepared(folder, monkeypatch, *overrides, *common)
        assert contents(together, number) == contents(alone), name
        assert len(contents(alone)) == 30
    prompt_texts = [prompt.text for prompt in together.prompts]
    assert any(text.startswith("turn: ") for text in prompt_texts)
    assert any(text.startswith("again: ") for text in prompt_texts)
    # In the order of the rows, whatever their tasks: held-out rows come by hash, so that the first are a fair sample.
    assert together.validation is not None
    assert together.validation.origins is not None
    assert together.validation.origins.tolist() == sorted(together.validation.origins.tolist())
    assert len(set(together.validation.sources[:12].tolist())) > 2


def test_metrics_of_each_task_are_those_of_a_plain_pass(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At ZeRO-3, where rank 0 writes sample answers right behind the generated targets of all ranks."""
    commands = Commands(folder)
    run = [*SEVERAL, "zero=stage3", "launch.processes=2", "trainer.global_batch_size=8", "optimizer.lr=1e-3"]
    run += ["evaluate.samples=3", "evaluate.max_new_tokens=8", "run.export=last", "checkpoint.every=2"]
    done = commands.run("train", *run, "trainer.max_steps=5", "run.dir=whole")
    assert done.returncode == 0, done.stderr + done.stdout
    found = result(folder / "whole")["eval_final"]

    held_out = prepared(folder, monkeypatch, *SEVERAL).validation
    assert held_out is not None
    assert held_out.sources is not None
    model = AutoModelForCausalLM.from_pretrained(folder / "whole" / "export").eval()
    losses = dict.fromkeys(TASKS, 0.0)
    targets = dict.fromkeys(TASKS, 0)
    for number in range(len(held_out.lengths)):
        sample = held_out.sample(number)
        name = list(TASKS)[held_out.sources[number]]
        ids, labels = (torch.tensor(sample[key].astype("int64"))[None] for key in ("input_ids", "labels"))
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        own = torch.nn.functional.cross_entropy(logits, labels[0, 1:], ignore_index=NO_TARGET, reduction="sum")
        losses[name] += float(own)
        targets[name] += int((labels != NO_TARGET).sum())
    for name in TASKS:
        assert targets[name] > 10
        assert found[f"{name}/loss"] == pytest.approx(losses[name] / targets[name], rel=1e-5)
        assert found[f"{name}/targets"] == targets[name]
    assert found["loss"] == pytest.approx(sum(losses.values()) / sum(targets.values()), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]), rel=1e-6)
    assert {"turn/chrf", "again/chrf", "talk/bits_per_byte"} <= found.keys()
    assert not {"talk/chrf", "books/chrf", "chrf"} & found.keys()

    # Evaluated by itself: the same, and the generated targets score what sacrebleu says of them.
    done = commands.run("evaluate", "whole", "launch.processes=1", "--json", "--output", "rows.jsonl")
    assert done.returncode == 0, done.stderr + done.stdout
    again = json.loads(done.stdout)["metrics"]
    measured = {name: value for name, value in found.items() if name not in ("seconds", "gap")}
    assert again.keys() == measured.keys()
    assert again == pytest.approx(measured, rel=1e-5)
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == again["turn/generated"] + again["again/generated"]
    turned = [row for row in rows if row["task"] == "turn"]
    assert len(turned) == again["turn/generated"]
    score = corpus_chrf([row["answer"] for row in turned], [[row["target"] for row in turned]]).score
    assert again["turn/chrf"] == pytest.approx(score)

    # Stopped after its first step and continued, it is the same run.
    limit = "run.time_limit=0.000001"
    assert commands.run("train", *run, "trainer.max_steps=5", "run.dir=cut", limit).returncode == 75
    done = commands.run("train", "cut", "run.time_limit=null")
    assert done.returncode == 0, done.stderr + done.stdout
    assert exact(folder / "cut") == exact(folder / "whole")
