"""Preferences on rows with images: every loss on one and two ranks = a plain loop that knows one answer at a time, in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.parity.plain_sight import prefer_plainly
from tests.parity.test_sight import PROGRAM, RATE, SIZES, Shop, compare
from tests.support.ranks import run_ranks
from tests.support.sight import draw

SHOWN = (["a"], ["a"], ["b", "c"], ["c"], [], ["b"], ["a", "a"], ["c"])
"""Images of each row, which all ask the same."""
LOOSER = 10.0
"""A sum over an answer, of which the difference to another one counts, is rounded more than the mean over all tokens."""


def write_preferences(folder: Path, *, judged: bool) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate("abc"):
        draw(number, SIZES[number]).save(folder / f"{name}.png")
    with (folder / "rows.jsonl").open("w") as stream:
        for number, names in enumerate(SHOWN):
            content: list[dict[str, Any]] = [*({"type": "image"} for _ in names), {"type": "text", "text": "w1 w2"}]
            row: dict[str, Any] = {"images": [f"{name}.png" for name in names]}
            row["prompt"] = [{"role": "user", "content": content}]
            answers = [f"w{number + 3} w4", f"w{number + 5} w{number + 6} w7"]
            better, worse = ([{"role": "assistant", "content": answer}] for answer in answers)
            if judged:
                row |= {"completion": worse if number % 2 else better, "label": not number % 2}
            else:
                row |= {"chosen": better, "rejected": worse}
            stream.write(json.dumps(row) + "\n")
    return folder / "rows.jsonl"


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop(tmp_path_factory.mktemp("preference"))


def verify(shop: Shop, ranks: int, cases: list[tuple[str, str, int, bool]], monkeypatch: pytest.MonkeyPatch) -> None:
    """cases: family, loss, stage, and whether the tower is trained."""
    monkeypatch.setenv("DSTUNE_CACHE", str(shop.folder / "cache"))
    described, expected = [], []
    for family, loss, stage, sees in cases:
        rows = write_preferences(shop.folder / ("judged" if loss == "kto" else "compared"), judged=loss == "kto")
        changes = ["task=preference", f"task.loss={loss}", f"data.train={rows}", "trainer.global_batch_size=8"]
        described.append(shop.case(family, stage, packed=False, sees=sees, ranks=ranks, name=loss, changes=changes))
        expected.append(prefer_plainly(shop.model(family), rows, loss, steps=2, rate=RATE, sees=sees))
    run_ranks(PROGRAM, ranks, described)
    for case, reference in zip(described, expected, strict=True):
        assert abs(reference.losses[1] - reference.losses[0]) > 1e-3, "a step changes the loss"
        compare(reference, Path(case["run_dir"]), looser=LOOSER)


def test_compared_answers_on_one_rank(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    verify(shop, 1, [("llava", "dpo", 0, True)], monkeypatch)


@pytest.mark.ci
def test_every_loss_on_two_ranks(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some micro-batches have no image."""
    losses = {"dpo": ("qwen2_vl", 3, True), "kto": ("gemma3", 3, False), "orpo": ("llava", 3, True)}
    losses |= {"ipo": ("llava", 2, True), "simpo": ("qwen2_vl", 1, True)}
    verify(shop, 2, [(family, loss, stage, sees) for loss, (family, stage, sees) in losses.items()], monkeypatch)
