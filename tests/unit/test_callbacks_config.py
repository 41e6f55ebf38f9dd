"""`trainer.callbacks`: names, arguments, and what is wrong with them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.configs import run_config

from dstune.cli import main
from dstune.config.callbacks import check_callbacks, chosen_callbacks
from dstune.config.compose import compose
from dstune.config.schema import TrainerConfig
from dstune.core.errors import UserError
from dstune.protocols import CALLBACKS, Callback, callback


@pytest.fixture(autouse=True)
def printer():
    @callback
    class Printer(Callback):
        name = "printer"

        def __init__(self, text: str, *, every: int = 1):
            self.text, self.every = text, every

    yield Printer
    CALLBACKS.remove("printer")


def problems(*callbacks) -> list[str]:
    return [str(problem) for problem in check_callbacks(run_config(trainer=TrainerConfig(callbacks=list(callbacks))))]


def installed(file: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(file.parent))
    monkeypatch.syspath_prepend(str(file.parent))


def test_a_name_or_a_name_with_arguments(printer, tmp_path, monkeypatch):
    installed(
        tmp_path / "own_module.py",
        "from dstune.protocols import Callback\nclass Own(Callback): ...\nclass Other(Callback): ...\n",
        monkeypatch,
    )
    config = run_config(
        trainer=TrainerConfig(callbacks=[{"printer": {"text": "hi", "every": 2}}, "own_module:Own", "own_module.Other"])
    )
    assert list(check_callbacks(config)) == []
    first, second, third = chosen_callbacks(config)
    assert isinstance(first, printer) and (first.text, first.every) == ("hi", 2)
    assert (second.name, third.name) == ("Own", "Other")


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("prnter", "did you mean printer?"),
        ("spikes", "part of every run that needs it"),
        ("printer", "the callback printer needs text"),
        ({"printer": {"text": "a", "evry": 3}}, "did you mean every?"),
        ({"printer": {"text": "a"}, "other": {}}, "neither a name nor"),
        ("no_such_module:Own", "no_such_module is not a module of an installed package"),
        ("./file.py:Own", "plugins=[./file.py]"),
        ("json:JSONDecoder", "no subclass of dstune.Callback"),
    ],
)
def test_what_is_wrong_is_named(entry, words):
    [problem] = problems(entry)
    assert problem.startswith("trainer.callbacks[0]") and words in problem


def test_a_callback_that_refuses_its_arguments_is_named(tmp_path, monkeypatch):
    source = "from dstune.protocols import Callback\nclass Strict(Callback):\n    def __init__(self): raise ValueError('too low')\n"
    installed(tmp_path / "strict_module.py", source, monkeypatch)
    config = run_config(trainer=TrainerConfig(callbacks=["strict_module:Strict"]))
    with pytest.raises(UserError, match=r"\[0\]=strict_module:Strict: it cannot be made: ValueError: too low"):
        chosen_callbacks(config)


def test_a_callback_is_named_once():
    [problem] = problems({"printer": {"text": "a"}}, {"printer": {"text": "b"}})
    assert problem.startswith("trainer.callbacks[1]") and "already" in problem


def test_two_callbacks_of_one_name_are_refused(tmp_path, monkeypatch):
    """Each would load the other's state."""
    installed(
        tmp_path / "twins.py",
        "from dstune.protocols import Callback\n"
        "from dstune.trainer.callbacks.cadence import Cadence\n"
        "class One(Callback): name = 'twin'\n"
        "class Two(Callback): name = 'twin'\n"
        "class Slower(Cadence):\n"
        "    def __init__(self): ...\n",
        monkeypatch,
    )
    [problem] = problems("twins:One", "twins:Two")
    assert problem.startswith("trainer.callbacks[1]") and "twins.One has the name 'twin' too" in problem
    [problem] = problems("twins:Slower")
    assert "Cadence has the name 'cadence' too" in problem
    with pytest.raises(UserError, match="has the name 'twin' too"):
        chosen_callbacks(run_config(trainer=TrainerConfig(callbacks=["twins:One", "twins:Two"])))


def test_hydra_takes_the_list(tmp_path):
    overrides = [
        "experiment=quickstart",
        f"run.dir={tmp_path}",
        "trainer.callbacks=[printer,{printer:{text:a,every:2}}]",
    ]
    assert compose(overrides).config.trainer.callbacks == ["printer", {"printer": {"text": "a", "every": 2}}]


def test_the_names_of_callbacks_load_no_torch():
    program = "import sys; from dstune.protocols import CALLBACKS; print(len(list(CALLBACKS)), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    count, loaded = done.stdout.split()
    assert int(count) >= 14 and loaded == "False"


@pytest.mark.parametrize(
    ("method", "similar"),
    [
        ("on_steps_end", "on_step_end"),
        ("on_train_batch_end", "on_"),
        ("on_epoch_end", "on_"),
        ("step_end", "on_step_end"),
        ("before_updates", "before_update"),
        ("metric", "metrics"),
        ("load_statedict", "load_state_dict"),
    ],
)
def test_a_method_that_is_nearly_a_hook_is_refused_before_the_run(
    method: str, similar: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    source = "import dstune\n@dstune.callback\nclass Slip(dstune.Callback):\n    name = 'slip'\n    def {}(self, run, step): ...\n"
    (tmp_path / "slip.py").write_text(source.format(method))
    assert main(["train", "data=chitchat", "plugins=[slip.py]", "trainer.callbacks=[slip]", "--cfg", "job"]) == 2
    said = capsys.readouterr().err
    assert "slip.py" in said and "Slip" in said and method in said and f"did you mean {similar}" in said


def test_helpers_and_overridden_hooks_are_no_mistake():
    class Base(Callback):
        def report(self): ...
        def on_step_end(self, run, step): ...
        def _on_epoch_end(self): ...
        @property
        def on_time(self): ...

    class Derived(Base):
        def report(self): ...

    assert (Base.name, Derived.name) == ("", "")
