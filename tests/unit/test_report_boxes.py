"""No text of a report lies over another one, at any width, light or dark: measured in a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dstune.report import command
from tests.support.boxes import OVERLAPS, SHOWN, overlaps
from tests.support.browser import probe
from tests.support.runs import DATA, RESULT, full_run, metrics_rows, write_run_directory, write_sweep_directory

pytestmark = pytest.mark.slow


def trial(number: int, loss: float, **more: Any) -> dict[str, Any]:
    values = {
        "optimizer.lr": 10.0 ** -(2 + number % 5),
        "method.rank": 2 ** (2 + number % 4),
        "trainer.global_batch_size": (8, 32, 128)[number % 3],
        "data.clean.near_threshold": round(0.5 + number / 37, 4),
        "schedule": ("cosine", "warmup_stable_decay", "slanted_triangular")[number % 3],
    }
    return {"name": f"{number:03d}-x", "number": number, "values": values, "objective": {"loss": loss}, **more}


def pages(folder: Path) -> dict[str, Path]:
    """A report of each kind, with everything that it can have."""
    overfitting = {"overfitting": {"gap": 0.123456, "training_loss": 1.23456}}
    numbers = {
        "tokens": 1_234_567_890,
        "seconds": 3e5,
        "tokens_per_second": 123456.7,
        "peak_memory_gib": 1234.56,
        "world_size": 1024,
    }
    confusion = {"confusion": [[12345, 2, 3, 4]] * 4, "labels": ["a long label of a class", "b", "c", "d"]}
    full_run(folder / "one", result={**RESULT, **numbers, **overfitting, **confusion}, data_report=DATA)
    for number in range(10):
        write_run_directory(
            folder / "several" / str(number), name=f"{number}-run-with-a-name", lr=1e-5 * (number + 1), result=RESULT
        )
    trials = [trial(number, 1.5 + number / 7, files={"metrics": metrics_rows(40)}) for number in range(24)]
    trials[3] |= {"status": "pruned", "reason": "pruned (asha) at step 10"}
    trials[5] |= {"status": "failed", "reason": "not finite " * 20, "run": False}
    write_sweep_directory(folder / "sweep", trials)
    for name in ("one", "several", "sweep"):
        assert command.main([str(folder / name)]) == 0
    return {name: folder / name / "report.html" for name in ("one", "several", "sweep")}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return pages(tmp_path_factory.mktemp("reports"))


@pytest.mark.parametrize("shown", SHOWN)
@pytest.mark.parametrize("name", ["one", "several", "sweep"])
def test_no_text_lies_over_another(written: dict[str, Path], tmp_path: Path, name: str, shown: str) -> None:
    assert overlaps(written[name], tmp_path, shown) == {}


def test_the_probe_sees_an_overlap(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    words = "".join(f"<p>word {number}</p>" for number in range(60))
    page.write_text(
        f"<html><style></style><body>{words}<p style='margin-top:-1.6em'>over it</p></body></html>", encoding="utf-8"
    )
    assert probe(page, OVERLAPS, tmp_path, width=400)["overlaps"] == ["word 59 / over it"]
