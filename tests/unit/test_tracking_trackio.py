"""Trackio: one run with every step once, over any number of launches; a stand-in has the calls of trackio 0.43."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dstune.config.compose import compose
from dstune.protocols.tracker import Row
from dstune.tracking.trackers.trackio import Trackio


class StoredRun:
    def __init__(self, module: Module, project: str, name: str, **given: Any):
        self.module, self.project, self.name, self.given = module, project, name, given
        self.rows: list[tuple[int, dict[str, Any]]] = []
        self.finished = False

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self.rows.append((step, metrics))

    def delete(self) -> None:
        self.module.stored.remove(self)

    def finish(self) -> None:
        self.finished = True


class Module(ModuleType):
    Markdown = str

    def __init__(self) -> None:
        super().__init__("trackio")
        self.stored: list[StoredRun] = []

    def init(self, project: str, *, name: str, **given: Any) -> StoredRun:
        self.stored.append(StoredRun(self, project, name, **given))
        return self.stored[-1]

    def Api(self) -> Module:
        return self

    def runs(self, project: str) -> list[StoredRun]:
        found = [run for run in self.stored if run.project == project]
        if not found:
            raise ValueError("no such project")
        return found


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Module:
    found = Module()
    monkeypatch.setitem(sys.modules, "trackio", found)
    return found


def launch(past: list[Row], rows: list[Row], folder: str) -> None:
    words = ["data=chitchat", "tracking.trackio=true", "tracking.project=shop", "tracking.group=week"]
    tracker = Trackio(compose(words).config, Path(folder), print, fresh=not past)
    tracker.start(iter(past))
    for row in rows:
        tracker.write(row)
    tracker.summary({"status": "completed"})
    tracker.finish("completed")


def row(step: int) -> Row:
    samples = ({"step": 1, "prompt": "Hi", "answer": "old"}, {"step": 2, "prompt": "Hi", "answer": "Yes\nno"})
    return Row(step, {"loss": 1.0 / step, "skipped": "spike"}, 0.0, samples if step == 2 else ())


def test_every_launch_writes_the_run_anew(module):
    launch([], [row(1), row(2), row(3)], "/runs/day/one")
    launch([], [row(1)], "/runs/day/two")
    launch([row(1), row(2)], [row(3), row(4)], "/runs/day/one")
    assert [(run.project, run.name) for run in module.stored] == [("shop", "day/two"), ("shop", "day/one")]
    one = module.stored[1]
    assert one.finished
    assert [(step, metrics.get("loss")) for step, metrics in one.rows] == [
        (1, 1.0),
        (2, 0.5),
        (2, None),
        (3, 1 / 3),
        (4, 0.25),
    ]
    assert one.rows[0][1] == {"loss": 1.0, "skipped": 1.0}
    assert one.rows[2][1] == {"samples/0": "**prompt**\n\n    Hi\n\n**answer**\n\n    Yes\n    no"}
    assert one.given["group"] == "week"
    assert one.given["config"]["tracking.project"] == "shop"


def test_a_package_that_is_not_there_is_named_before_the_start(monkeypatch):
    monkeypatch.setattr("dstune.tracking.trackers.trackio.find_spec", lambda name: None)
    tracking = compose(["data=chitchat", "tracking.trackio=true"]).config.tracking
    (problem,) = Trackio.missing(tracking)
    assert (problem.where, problem.fix) == ("tracking.trackio", "pip install '.[trackio]' in a clone of dstune")
