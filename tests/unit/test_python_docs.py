"""`docs/python.md` and `docs/plugins.md` say what is there."""

from __future__ import annotations

import inspect
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import dstune
from dstune import protocols
from dstune.config.compose import compose
from dstune.config.validate import validate
from dstune.core import plugins
from dstune.core.registry import Registry
from dstune.testing.scaffold import TEMPLATES

DOCS = Path(__file__).parents[2] / "docs"


def test_the_table_of_calls_has_every_argument():
    rows = re.findall(r"^\| `dstune\.(\w+)\((.*?)\)` \|", (DOCS / "python.md").read_text(), re.MULTILINE)
    assert {name for name, _ in rows} == {
        name for name in dstune.__all__ if inspect.isfunction(getattr(dstune, name)) and name == name.lower()
    }
    for name, arguments in rows:
        known = inspect.signature(getattr(dstune, name)).parameters
        options = "options" in known  # explained by the docstring
        for argument in re.findall(r"(\w+)=?(?:,|$)", arguments.replace("...", "")):
            assert argument in known or (options and f"`{argument}`" in getattr(dstune, name).__doc__), (name, argument)


def test_the_first_plugin_of_the_page_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (DOCS / "plugins.md").read_text()
    (code, *_) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (command, *_) = re.findall(r"^dstune train (.*)$", text, re.MULTILINE)
    Path("kappa.py").write_text(code)
    try:
        validate(compose(shlex.split(command)).config)
        kappa = protocols.METRICS["kappa"]()
        assert kappa.compute([0, 1, 1, 0], [0, 1, 1, 0], ("a", "b")) == 1.0
    finally:
        plugins.activate([])


def test_the_callback_of_the_page_ends_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (DOCS / "plugins.md").read_text()
    (code,) = (
        block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if block.startswith("# target.py")
    )
    Path("target.py").write_text(code)
    try:
        words = ["plugins=[./target.py]", "trainer.callbacks=[{target: {loss: 0.5}}]", "data=chitchat"]
        validate(compose(words).config)
        (make,) = (cls for name, cls in protocols.CALLBACKS.classes().items() if name == "target")
        below, above = (
            make(loss=0.5).on_evaluate(None, SimpleNamespace(metrics={"loss": loss})) for loss in (0.4, 0.6)
        )
    finally:
        plugins.activate([])
    assert below == dstune.Request(dstune.Action.SAVE | dstune.Action.STOP, "the held-out loss is below 0.5")
    assert above is None
    table = re.findall(r"^\| ((?:`[A-Z]+`(?:, )?)+) \| ", text, re.MULTILINE)
    assert {name for row in table for name in re.findall(r"[A-Z]+", row)} == {action.name for action in dstune.Action}


def test_every_kind_that_registers_is_in_the_table():
    text = (DOCS / "plugins.md").read_text()
    decorators = [
        name for name in dstune.__all__ if isinstance(getattr(getattr(dstune, name), "__self__", None), Registry)
    ]
    assert decorators
    for name in decorators:
        assert f"`@dstune.{name}`" in text or name == "parallelism"
    for link in re.findall(r"\]\(\.\./(examples/plugins/\w+\.py)\)", text):
        assert (DOCS.parent / link).is_file()
    assert set(TEMPLATES) <= set(decorators)
    assert f"`dstune.protocols.VERSION` is {protocols.VERSION}." in text


def test_the_page_names_fields_that_the_types_of_plugins_have():
    from dstune.data.tokenize.sample import Sample
    from dstune.inference.predictor import Predictor
    from dstune.models.heads.base import HeadOutput
    from dstune.protocols import launcher_options, method_options, task_options
    from dstune.protocols.callback import Evaluation as MeasuredRows
    from dstune.protocols.callback import Run, Step
    from dstune.trainer.measure import Evaluation, Totals

    text = (DOCS / "plugins.md").read_text()
    rows = re.findall(r"(?m)^\| `(\w+)`(?: \([^|]*\))? \| ((?:`\w+`(?:, )?)+) \|", text)
    named = [(name, re.findall(r"`(\w+)`", fields)) for name, fields in rows]
    known = {"Sample": Sample, "HeadOutput": HeadOutput, "Totals": Totals, "Predictor": Predictor}
    known |= {"Run": Run, "Step": Step}
    both = iter((Evaluation, MeasuredRows))
    assert {name for name, _ in named} == {*known, "Evaluation"}
    for name, fields in named:
        kind = known[name] if name in known else next(both)
        of_kind = {*dir(kind), *(field for base in kind.__mro__ for field in getattr(base, "__annotations__", ()))}
        assert set(fields) <= of_kind, name
    chapter = text.split("### Optional protocols")[1].split('<a id="hooks">')[0]
    options = re.findall(r"(?m)^\| `(\w+)` \| ", chapter)
    protocols = (*task_options.TASK_OPTIONS, *method_options.METHOD_OPTIONS, *launcher_options.LAUNCHER_OPTIONS)
    assert options == [option.__name__ for option in protocols]
