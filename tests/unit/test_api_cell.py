"""Settings from Python as a mapping, a file or a wrong argument, and callbacks whose class a cell or a script defines."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import dstune
from dstune.api.cell import file_of, source_of
from dstune.api.launching import words_of
from dstune.core.errors import UserError
from dstune.protocols import CALLBACKS

CELL = """
import math
from pathlib import Path as P
LIMIT = 3
GREETING = "hi"
class Helper: ...

@dstune.callback
class CellPrinter(dstune.Callback):
    name = "cell_printer"

    def on_step_agreed(self, run, step):
        words = [P(GREETING) for _ in range(LIMIT)]
        return dstune.Request() if math.isfinite(step.loss) else words

class Bare(dstune.Callback):
    name = "bare"

class Needy(dstune.Callback):
    name = "needy"
    def on_step_agreed(self, run, step):
        return Helper(), undefined
"""


@pytest.fixture
def cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The namespace of a notebook after `CELL` has run in it."""
    file = tmp_path / "cell.py"
    file.write_text(CELL)
    main = ModuleType("__main__")
    main.__file__ = str(file)
    monkeypatch.setitem(sys.modules, "__main__", main)
    main.dstune = dstune  # type: ignore[attr-defined]
    exec(compile(CELL, str(file), "exec"), vars(main))
    yield SimpleNamespace(**vars(main))
    if "cell_printer" in CALLBACKS:
        CALLBACKS.remove("cell_printer")


def test_a_class_of_a_cell_becomes_a_plugin_with_what_it_uses(cell):
    file = file_of(cell.CellPrinter)
    assert file.stem.startswith("cell_printer_") and file == file_of(cell.CellPrinter), (
        "the same source is the same plugin"
    )
    assert "cell_printer" not in CALLBACKS, "the name is the plugin's"
    namespace: dict[str, Any] = {"__name__": "elsewhere"}
    exec(file.read_text(), namespace)
    made = namespace["CellPrinter"]()
    assert made.on_step_agreed(None, SimpleNamespace(loss=math.inf)) == [Path("hi")] * 3


def test_a_class_without_its_decorator_is_registered_all_the_same(cell):
    assert "\n@dstune.callback\nclass Bare" in source_of(cell.Bare)


def test_what_only_this_process_has_is_named(cell):
    with pytest.raises(UserError, match="it uses Helper, undefined of this process"):
        source_of(cell.Needy)


def test_a_class_without_source_is_refused(cell):
    made = type("Made", (dstune.Callback,), {"__module__": "__main__"})
    with pytest.raises(UserError, match="cannot be read"):
        source_of(made)


def test_mappings_and_files_are_overrides_and_texts_win(tmp_path: Path):
    file = tmp_path / "my.yaml"
    file.write_text("trainer: {epochs: 5}\nmethod: lora\n")
    given = (
        {"method": {"name": "qlora", "rank": 8}, "optimizer": {"lr": 1e-4}},
        str(file),
        "optimizer.lr=2e-4",
        "trainer.seed=1",
    )
    assert words_of(given) == (
        "method=lora",
        "method.rank=8",
        "trainer.epochs=5",
        "optimizer.lr=2e-4",
        "trainer.seed=1",
    )
    assert words_of(("a=b",)) == ("a=b",)
    with pytest.raises(UserError, match="no name of a key"):
        words_of(({"a b": 1},))


@pytest.mark.parametrize(
    ("settings", "fix"),
    [
        ({"epochs": 3}, 'dstune.train("trainer.epochs=3")'),
        ({"learning_rate": 1e-4}, 'dstune.train("optimizer.lr=0.0001")'),
        ({"model": "gpt2"}, "model.path=openai-community/gpt2"),
        ({"optimizer": {"lr": 1e-4}}, "dstune.train({'optimizer': {'lr': 0.0001}})"),
        ({"bf16": True}, "trainer.precision=bf16"),
        ({"nonsense": 1}, "help(dstune.train) lists the arguments"),
    ],
)
def test_an_argument_that_is_a_setting_is_answered_by_its_key(settings: dict[str, Any], fix: str):
    with pytest.raises(UserError) as caught:
        dstune.train(**settings)
    assert fix in caught.value.problems[0].fix
