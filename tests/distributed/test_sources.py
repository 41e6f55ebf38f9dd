"""Rows of every format and from every kind of source train two steps and resume.

Each group says the same in other ways, so besides running every case has to have the losses of the first one.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.ranks import run_ranks
from support.sources import (
    CHATS,
    LABELLED,
    chat_formats,
    chat_sources,
    label_sources,
    pairs,
    text_sources,
    write_cached_hub,
    write_jsonl,
)
from support.tiny import save_decoder, save_encoder

from dstune.config.compose import compose
from dstune.config.run_file import write_run

PROGRAM = Path(__file__).parents[1] / "parity" / "train_cases.py"

BASE = [
    "data.max_length=64",
    "evaluate.every=0",
    "checkpoint.every=0",
    "data.packing=false",
    "data.split.validation=0",
    "trainer.micro_batch_size=4",
    "trainer.global_batch_size=8",
    "trainer.precision=fp32",
    "optimizer=sgd",
    "optimizer.lr=0.05",
    "schedule=constant",
    "zero=stage1",
    "checkpoint.keep=1",
    "run.export=none",
]


class Table:
    """The cases of a group, each trained two steps and then resumed for a third."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.cases: list[list[dict[str, str]]] = []
        self.directories: dict[tuple[str, str], Path] = {}

    def add(self, group: str, name: str, *overrides: str) -> None:
        directory = self.folder / "runs" / str(len(self.directories))
        self.directories[group, name] = directory
        self.cases.append([])
        for steps in (2, 3):
            path = directory.with_name(f"{directory.name}-{steps}.yaml")
            path.parent.mkdir(exist_ok=True)
            write_run(path, compose([*BASE, f"run.dir={directory}", f"trainer.max_steps={steps}", *overrides]))
            self.cases[-1].append({"run_yaml": str(path), "run_dir": str(directory)})

    def losses(self, group: str, name: str) -> list[tuple[int, float]]:
        lines = (self.directories[group, name] / "metrics.jsonl").read_text().splitlines()
        return [(row["step"], row["loss"]) for row in map(json.loads, lines) if "loss" in row]


def several(folder: Path) -> dict[str, str]:
    """Rows of which one or another is about more than one text or label."""
    questions = [question for question, _ in pairs()]
    lists = [["long", "odd"] if number % 3 else [] for number in range(len(questions))]
    many = [{"text": text, "labels": labels} for text, labels in zip(questions, lists, strict=True)]
    as_csv = "text,labels\n" + "".join(f'{row["text"]},"{",".join(row["labels"])}"\n' for row in many)
    (folder / "many.csv").write_text(as_csv)
    two = [
        {"text": question, "text_pair": answer, "label": row["label"]}
        for (question, answer), row in zip(pairs(), LABELLED, strict=True)
    ]
    return {
        "lists of labels": str(write_jsonl(folder / "many.jsonl", many)),
        "labels with commas": str(folder / "many.csv"),
        "pairs": str(write_jsonl(folder / "pairs.jsonl", two)),
    }


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Table:
    folder = tmp_path_factory.mktemp("sources")
    made = Table(folder)
    decoder = f"model.path={save_decoder(folder / 'decoder')}"
    encoder = f"model.path={save_encoder(folder / 'encoder')}"
    rows = folder / "rows"
    rows.mkdir()
    write_cached_hub(folder / "hub", "org/chats", {"train": CHATS, "train_sft": CHATS})
    for name, train in chat_sources(rows).items():
        made.add("chat", name, decoder, f"data.train='{train}'")
    for name, (train, overrides) in chat_formats(rows).items():
        made.add("chat", name, decoder, f"data.train='{train}'", *overrides)
    for name, (train, overrides) in text_sources(rows).items():
        made.add("text", name, decoder, "task=causal_lm", f"data.train='{train}'", *overrides)
    for name, (train, overrides) in label_sources(rows).items():
        made.add("label", name, encoder, "task=classification", f"data.train='{train}'", *overrides)
    for name, train in several(rows).items():
        group, more = ("pair", "false") if name == "pairs" else ("labels", "true")
        made.add(group, name, encoder, "task=classification", f"task.multi_label={more}", f"data.train='{train}'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSTUNE_CACHE", str(folder / "cache"))
        patch.setenv("HF_DATASETS_CACHE", str(folder / "hub"))
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        # One rank each, so that two cases run at once: how ranks share rows is tested elsewhere.
        halves = [[run for case in made.cases[start::2] for run in case] for start in (0, 1)]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda runs: run_ranks(PROGRAM, 1, runs), halves))
    return made


def test_every_source_trains_two_steps_and_resumes(table: Table) -> None:
    for group, name in table.directories:
        assert [step for step, _ in table.losses(group, name)] == [1, 2, 3], (group, name)
        result = json.loads((table.directories[group, name] / "result.json").read_text())
        assert (result["status"], result["steps"]) == ("completed", 3), (group, name)


def test_what_says_the_same_is_trained_the_same(table: Table) -> None:
    first: dict[str, list[tuple[int, float]]] = {}
    for group, name in table.directories:
        found = table.losses(group, name)
        assert found == first.setdefault(group, found), (group, name)
    assert len({tuple(losses) for losses in first.values()}) == len(first)
