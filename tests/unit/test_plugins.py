"""Plugins: found, loaded, refused; all in one process and without training."""

from __future__ import annotations

import os
import pickle
import shutil
import sys
from pathlib import Path

import pytest

from dstune.config.completion import complete
from dstune.config.compose import compose
from dstune.config.documentation import documentation, help_text
from dstune.config.project import candidates, write_record
from dstune.config.schema import CHOICES
from dstune.config.validate import find_problems
from dstune.core import plugins
from dstune.data.rows import RowError
from dstune.protocols import method_of, task_of
from dstune.protocols.method_options import TrainsInStages, UnfreezesLater
from dstune.protocols.task_options import NeedsReference, WeighsClasses
from tests.support.plugins import ROOT, SIGNUM, copy, folder_of_plugins, problems


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    yield from folder_of_plugins(tmp_path, monkeypatch)


# ---- where plugins are named ----


def test_three_places_add_up(folder):
    copy("a/signum.py")
    Path("one.py").write_text("")
    Path("two.py").write_text("")
    Path("dstune.yaml").write_text("plugins: [./one.py]\n")
    write_record(Path(), candidates(Path()))
    Path("mine/experiment").mkdir(parents=True)
    text = "# @package _global_\nplugins: [./two.py]\ndefaults:\n  - override /optimizer: signum\n  - override /data: chitchat\n"
    Path("mine/experiment/own.yaml").write_text(text)
    composed = compose(["experiment=own", "plugins=[./one.py,a/signum.py]"], ["mine"])
    assert [plugin.name for plugin in composed.plugins] == ["one", "two", "signum"]
    assert composed.plugins[2].registers == ("optimizer signum",)
    assert composed.config.optimizer.name == "signum"


@pytest.mark.parametrize(
    ("content", "where", "reason"),
    [
        ("plugin: [a.py]", "dstune.yaml: plugin", "dstune.yaml has no such key"),
        ("plugins: {a: b}", "dstune.yaml: plugins", "expected a list of files and modules"),
        ("plugins: [a", "dstune.yaml:1", "this is no YAML"),
    ],
)
def test_a_project_file_that_is_wrong(content, where, reason):
    Path("dstune.yaml").write_text(content)
    ((found, message, _),) = problems()
    assert found == where
    assert message.startswith(reason)


# ---- loading ----


def test_a_choice_with_the_defaults_of_the_class():
    copy()
    composed = compose(["data=chitchat", "plugins=[./signum.py]", "optimizer=signum", "optimizer.update_momentum=0.8"])
    assert (composed.config.optimizer.update_momentum, composed.config.optimizer.momentum) == (0.8, 0.99)
    assert composed.overrides[1] == "plugins=[./signum.py]"
    assert "signum" in CHOICES["optimizer"]


def test_keys_have_types_ranges_and_nearest_names():
    copy()
    signum = ["plugins=[./signum.py]", "optimizer=signum"]
    ((where, _, fix),) = problems(*signum, "optimizer.update_momentun=0.8")
    assert (where, fix) == ("optimizer.update_momentun", "did you mean optimizer.update_momentum=0.8?")
    ((where, reason, _),) = problems(*signum, "optimizer.momentum=much")
    assert (where, reason) == ("optimizer.momentum", "expected a number")
    config = compose(["data=chitchat", *signum, "optimizer.momentum=0.5"]).config
    assert [problem.where for problem in find_problems(config)] == ["optimizer.momentum"]  # of its own check
    config = compose(["data=chitchat", *signum, "optimizer.momentum=2"]).config
    assert [problem.where for problem in find_problems(config)] == ["optimizer.momentum"]  # of its range


def test_a_field_of_a_type_that_no_key_can_have():
    text = SIGNUM.read_text().replace(
        '"""Decay rate of the momentum (beta 2)."""', '"""Decay rate."""\n    extra: set[int] = None'
    )
    Path("signum.py").write_text(text)
    ((where, reason, _),) = problems("plugins=[./signum.py]", "optimizer=signum")
    assert (where, reason) == ("SignumConfig", "extra: Unexpected type annotation: set[int]")


CALLBACK = """
from __future__ import annotations
from typing import TYPE_CHECKING
import dstune

if TYPE_CHECKING:
    import torch


@dstune.callback
class Typed(dstune.Callback):
    name = "typed"

    def __init__(self, dtype: torch.dtype | None = None, number: int = 3):
        pass
"""


def test_an_argument_whose_type_is_imported_for_type_checkers():
    Path("typed.py").write_text(CALLBACK)
    config = compose(["data=chitchat", "plugins=[./typed.py]", "trainer.callbacks=[{typed: {number: 4}}]"]).config
    (problem,) = find_problems(config)
    assert problem.where == "trainer.callbacks[0]"
    assert "name 'torch' is not defined" in problem.reason and "TYPE_CHECKING" in problem.fix


TRACKER = """
from dataclasses import dataclass
import dstune

@dataclass(frozen=True)
class TableConfig:
    separator: str | None = None
    \"\"\"Between columns.\"\"\"

@dstune.tracker
class Table(dstune.Tracker):
    Config = TableConfig
    name = "table"

@dstune.tracker
class Bell(dstune.Tracker):
    name = "bell"
    switch = "Ring at the end."
"""


def test_the_keys_of_a_tracker(folder):
    Path("table.py").write_text(TRACKER)
    plugin, off = "plugins=[./table.py]", compose(["data=chitchat"]).config.tracking
    config = compose(["data=chitchat", plugin, "tracking.table.separator=x", "tracking.bell=true"]).config
    assert (config.tracking.table.separator, config.tracking.bell) == ("x", True)
    assert pickle.loads(pickle.dumps(config)) == config
    ((where, _, fix),) = problems(plugin, "tracking.table.seperator=x")
    assert (where, fix) == ("tracking.table.seperator", "did you mean tracking.table.separator=x?")
    compose(["data=chitchat", plugin])
    text = " ".join(help_text({}).split())
    assert "tracking.table.separator=null Between columns. tracking.bell=false Ring at the end." in text
    ((where, *_),) = problems("tracking.bell=true")
    assert where == "tracking.bell"
    assert compose(["data=chitchat"]).config.tracking == off


def test_help_and_its_absence():
    copy()
    compose(["data=chitchat", "plugins=[./signum.py]"])
    text = help_text({"optimizer": ["adamw", "signum"]})
    assert "optimizer.update_momentum=0.9 [optimizer=signum]" in text
    assert "beta 1 of the paper" in text
    assert "plugins=[]" in text
    compose(["data=chitchat"])
    assert "update_momentum" not in help_text({})


def test_help_needs_the_file_no_more():
    copy()
    compose(["data=chitchat", "plugins=[./signum.py]"])
    Path("signum.py").write_text("")
    assert "beta 1 of the paper" in help_text({"optimizer": ["adamw", "signum"]})
    Path("signum.py").unlink()
    documentation.cache_clear()
    assert "beta 1 of the paper" in help_text({"optimizer": ["adamw", "signum"]})


def test_completion_loads_no_file():
    copy()
    Path("signum.py").write_text("raise SystemExit('completion has run a file')")
    Path("dstune.yaml").write_text("plugins: [./signum.py]\n")
    write_record(Path(), candidates(Path()))
    found = complete("dstune train plugins=[./signum.py] optimizer=", {"train": lambda given: Behind})
    assert found == [f"optimizer={name}" for name in ("adamw", "adamw_8bit", "lion", "muon", "sgd")]


class Behind:
    words = ()
    overrides = True
    files = False


def test_the_same_file_is_executed_once_and_a_changed_one_again():
    copy()
    Path("signum.py").write_text(
        SIGNUM.read_text() + "\nimport builtins\nbuiltins.runs = getattr(builtins, 'runs', 0) + 1\n"
    )
    import builtins

    first = compose(["data=chitchat", "plugins=[./signum.py]", "optimizer=signum"]).config.optimizer
    compose(["data=chitchat"])
    again = compose(["data=chitchat", "plugins=[./signum.py]", "optimizer=signum"]).config.optimizer
    assert builtins.runs == 1
    assert type(first) is type(again)
    Path("signum.py").write_text(Path("signum.py").read_text().replace("= setting(0.9,", "= setting(0.95,"))
    changed = compose(["data=chitchat", "plugins=[./signum.py]", "optimizer=signum"]).config.optimizer
    assert (first.update_momentum, changed.update_momentum, builtins.runs) == (0.9, 0.95, 2)
    del builtins.runs


@pytest.mark.parametrize(
    ("content", "where", "reason", "fix"),
    [
        ("x = 1\nx = = 2\n", "bad.py:2", "this is no Python", "correct the line"),
        ("import os\n\nimport nonesuch\n", "bad.py:3", "ModuleNotFoundError", "install nonesuch"),
        ("import sys\nsys.exit(0)\n", "bad.py:2", "SystemExit: 0", "correct the line"),
        ("def f():\n    return 1 / 0\n\nf()\n", "bad.py:2", "ZeroDivisionError", "correct the line"),
        (
            "import dstune\n\n@dstune.task\nclass T(dstune.Task):\n    name = ''\n",
            "bad.py:3",
            "a task needs a `name`",
            "",
        ),
        (
            "import dstune\n\n@dstune.callback\nclass C:\n    name = 'c'\n",
            "bad.py:3",
            "derives from dstune.Callback",
            "",
        ),
        (
            "import dstune\n\n@dstune.metric\nclass M(dstune.Callback):\n    name = 'm'\n",
            "bad.py:3",
            "from dstune.Metric",
            "",
        ),
    ],
)
def test_a_file_that_cannot_be_imported(content, where, reason, fix):
    Path("bad.py").write_text(content)
    ((found, message, advice),) = problems("plugins=[./bad.py]")
    assert found == f"./{where}"
    assert reason in message
    assert fix in advice
    assert "dstune_plugins.bad" not in sys.modules


def test_what_a_broken_file_had_registered_is_gone():
    copy()
    Path("signum.py").write_text(SIGNUM.read_text() + "\nraise RuntimeError('too late')\n")
    ((where, _, _),) = problems("plugins=[./signum.py]", "optimizer=signum")
    assert where.startswith("./signum.py:")


def test_names_that_clash():
    copy("a/signum.py")
    copy("b/signum.py", "Share", "share")
    ((_, reason, _),) = problems("plugins=[a/signum.py,b/signum.py]")
    assert reason == "there are two plugins named signum: a/signum.py and b/signum.py"
    copy("other.py")
    ((_, reason, _),) = problems("plugins=[a/signum.py,./other.py]")
    assert "there are two optimizers named 'signum'" in reason
    copy("mine.py", 'name: str = "signum"', 'name: str = "adamw"')
    ((where, reason, _),) = problems("plugins=[./mine.py]")
    assert where.startswith("./mine.py:")
    assert "there are two optimizers named 'adamw'" in reason


def test_names_that_clash_with_a_plugin_of_an_earlier_configuration():
    copy()
    copy("other.py")
    for name in ("signum", "other"):
        compose(["data=chitchat", f"plugins=[./{name}.py]", "optimizer=signum"])
    ((where, reason, _),) = problems("plugins=[./signum.py,./other.py]")
    assert where == "./other.py"  # as without the earlier ones
    assert "there are two optimizers named 'signum'" in reason


@pytest.mark.parametrize(
    ("value", "reason", "fix"),
    [
        ("[./signums.py]", "there is no such file", "did you mean signum.py?"),
        ("[nonesuch.module]", "there is no such module", "plugins=[./file.py]"),
        ("[./my-signum.py]", "the name of a plugin file is a name in Python", "my_signum.py"),
        ("[/]", "the name of a plugin file is a name in Python", "give the path of a Python file"),
        ("[./signum.py:Tiger]", "./signum.py registers no class Tiger", "the plugin registers Signum"),
        ("3", "expected a list of files and modules", "plugins=[./file.py,package.module]"),
    ],
)
def test_plugins_that_are_none(value, reason, fix):
    copy()
    copy("my-signum.py")
    ((where, message, advice),) = problems(f"plugins={value}")
    assert (where, message) == ("plugins", reason)
    assert fix in advice


def test_a_module_beside_the_program_travels_as_a_file(monkeypatch, folder):
    copy()
    monkeypatch.syspath_prepend(str(folder))
    (plugin,) = compose(["data=chitchat", "plugins=[signum:Signum]"]).plugins
    assert plugin.is_file
    (folder / "package").mkdir()
    (folder / "package" / "__init__.py").write_text("")
    copy("package/signum.py")
    ((_, reason, fix),) = problems("plugins=[package.signum]")
    assert reason == "ranks cannot import it: it is not installed"
    assert "plugins=[package/signum.py]" in fix


def test_a_module_that_ranks_can_import_is_imported_by_name(monkeypatch, folder):
    (folder / "shelf").mkdir()
    (folder / "shelf" / "__init__.py").write_text("")
    copy("shelf/signum.py")
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{ROOT}")
    monkeypatch.syspath_prepend(str(folder))
    (plugin,) = compose(["data=chitchat", "plugins=[shelf.signum]"]).plugins
    assert (plugin.name, plugin.is_file, plugin.registers) == ("shelf.signum", False, ("optimizer signum",))


def test_a_plugin_says_for_which_version_it_was_written():
    Path("old.py").write_text("DSTUNE_PROTOCOLS = 0\n")
    ((where, reason, fix),) = problems("plugins=[./old.py]")
    assert (where, reason) == ("./old.py", "it was written for version 0 of the protocols, and this is version 2")
    assert "DSTUNE_PROTOCOLS = 2" in fix
    for version in (1, 2):
        Path("old.py").write_text(f"DSTUNE_PROTOCOLS = {version}\n")
        compose(["data=chitchat", "plugins=[./old.py]"])


VERSION_1 = """
from dataclasses import dataclass
import dstune
from dstune.tasks.chat import Chat
from dstune.tasks.chat.config import ChatConfig

DSTUNE_PROTOCOLS = 1

@dataclass(frozen=True)
class OldConfig(ChatConfig):
    name: str = "old"

@dstune.task
class Old(Chat):
    Config = OldConfig
"""


def test_a_task_of_version_1_has_all_methods_of_an_optional_protocol_or_is_told_of_it():
    hook = "    def before_training(self, run, data, *given):\n        return data\n"
    Path("old.py").write_text(VERSION_1 + hook)
    ((where, reason, _),) = problems("plugins=[./old.py]")
    assert where.startswith("./old.py:")
    assert "Old has before_training, which dstune.protocols.task_options.NeedsReference calls together with" in reason
    assert "further_models, caches_reference, before_loading; derive the class from it too" in reason
    derived = VERSION_1.replace("class Old(Chat)", "class Old(Chat, NeedsReference)") + hook
    Path("old.py").write_text("from dstune.protocols.task_options import NeedsReference\n" + derived)
    task = task_of(compose(["data=chitchat", "plugins=[./old.py]", "task=old"]).config.task)
    assert isinstance(task, NeedsReference)
    assert task.caches_reference(None) is False
    plugins.activate([])
    Path("old.py").write_text(VERSION_1 + "    def class_weights(self, labels, counts, rows):\n        return [1.0]\n")
    task = task_of(compose(["data=chitchat", "plugins=[./old.py]", "task=old"]).config.task)
    assert isinstance(task, WeighsClasses)
    assert not isinstance(task, NeedsReference)


OLD_METHOD = """
from dataclasses import dataclass
import dstune
from dstune.protocols.method import MethodConfig

DSTUNE_PROTOCOLS = 1

@dataclass(frozen=True)
class OldConfig(MethodConfig):
    name: str = "old"

@dstune.method
class Old(dstune.Method):
    Config = OldConfig
"""


def test_a_method_of_version_1_is_told_which_protocol_has_its_hooks():
    Path("old.py").write_text(OLD_METHOD + "    def parts(self, module):\n        return lambda name: 0\n")
    ((_, reason, _),) = problems("plugins=[./old.py]")
    assert (
        "Old has parts, which dstune.protocols.method_options.UnfreezesLater calls together with unfreezing" in reason
    )
    hook = "    def stages(self, run, run_dir):\n        return [*super().stages(run, run_dir)]\n"
    Path("old.py").write_text(OLD_METHOD + hook)
    ((_, reason, _),) = problems("plugins=[./old.py]")
    assert (
        "Old.stages calls super().stages, whose default is in dstune.protocols.method_options.TrainsInStages" in reason
    )
    Path("old.py").write_text(OLD_METHOD + "    def stages(self, run, run_dir):\n        return [run]\n")
    method = method_of(compose(["data=chitchat", "plugins=[./old.py]", "method=old"]).config.method)
    assert isinstance(method, TrainsInStages)
    assert not isinstance(method, UnfreezesLater)


def test_a_member_needs_a_config_of_its_own():
    text = "import dstune\nfrom dstune.optim.adamw import AdamW\n\n@dstune.optimizer\nclass Mine(AdamW):\n    name = 'mine'\n"
    Path("mine.py").write_text(text)
    ((where, reason, _),) = problems("plugins=[./mine.py]")
    assert where == "./mine.py:4"
    assert "Mine: the optimizer 'adamw' has this `Config`" in reason
    assert compose(["data=chitchat"]).config.optimizer.name == "adamw"


def test_a_plugin_may_offer_what_dstune_does_not():
    copy("adafactor.py", '"signum"', '"adafactor"')
    composed = compose(["data=chitchat", "plugins=[./adafactor.py]", "optimizer=adafactor"])
    assert composed.config.optimizer.name == "adafactor"
    ((where, reason, _),) = problems("optimizer=adafactor")
    assert where == "optimizer" and reason.startswith("is not offered: Adafactor")


def test_a_deepspeed_file_may_choose_the_optimizer_of_a_plugin():
    copy()
    Path("ds.json").write_text('{"optimizer": {"type": "Signum", "params": {"lr": 1e-4}}}')
    optimizer = compose(["data=chitchat", "plugins=[./signum.py]", "zero=file", "zero.path=ds.json"]).config.optimizer
    assert (optimizer.name, optimizer.lr) == ("signum", 1e-4)


# ---- metrics ----

METRICS = """
import dstune
from dataclasses import dataclass
from dstune.tasks.seq2seq import Seq2Seq
from dstune.tasks.seq2seq.config import Seq2SeqConfig


@dstune.metric
class Distance(dstune.Metric):
    name = "distance"
    tasks = ("chat", "seq2seq")

    def compute(self, predictions, targets, labels):
        return 0.0


@dataclass(frozen=True)
class OwnConfig(Seq2SeqConfig):
    name: str = "own"


@dstune.task
class Own(Seq2Seq):
    Config = OwnConfig
    metrics = ("loss", "emd")
"""


def invalid(*overrides: str) -> list[tuple[str, str]]:
    config = compose(["model.path=m", "data.train=rows.jsonl", "plugins=[./metrics.py]", *overrides]).config
    return [(problem.where, problem.reason) for problem in find_problems(config, ())]


def test_a_metric_is_refused_where_no_evaluation_has_it():
    Path("metrics.py").write_text(METRICS)
    reason = "the metric distance is computed from predictions, and evaluations of task=chat have none"
    assert ("task", reason) in invalid("task=chat")
    assert "trainer.early_stopping.metric" in dict(invalid("task=chat", "trainer.early_stopping.metric=distance"))
    seq2seq = ("task=seq2seq", "data.split.validation=0.1", "evaluate.every=5", "evaluate.slices=[lang]")
    stopping = (*seq2seq, "trainer.early_stopping.metric=distance", "trainer.early_stopping.patience=2")
    assert invalid(*stopping, "evaluate.generate_rows=9") == []
    (problem,) = invalid(*stopping, "evaluate.generate_rows=0")
    assert problem[1] == "distance needs generated targets, and evaluate.generate_rows is 0"
    for name in ("bleu", "distance"):
        (problem,) = invalid(*seq2seq, f"evaluate.slice_metric={name}")
        assert problem == (
            "evaluate.slice_metric",
            f"{name} needs generated targets, and none are generated for subgroups",
        )


def test_a_metric_of_a_task_that_may_be_better_either_way():
    Path("metrics.py").write_text(METRICS)
    own = ("task=own", "data.split.validation=0.1", "evaluate.every=5", "trainer.early_stopping.patience=2")
    assert invalid(*own) == []
    reason = "nothing says whether lower values of emd are better"
    assert invalid(*own, "trainer.early_stopping.metric=emd") == [("trainer.early_stopping.metric", reason)]
    with open("metrics.py", "a") as file:
        file.write('\n\n@dstune.metric\nclass Emd(dstune.Metric):\n    name = "emd"\n    lower_is_better = True\n')
    assert invalid(*own, "trainer.early_stopping.metric=emd") == []


# ---- rows to be predicted ----


def query_row(row: dict, *settings: str) -> dict:
    config = compose(["task=classification", "plugins=[./star_rating.py]", *settings]).config
    return task_of(config.task).question(("1", "2"), config.data).query(row, "row 1").row


@pytest.mark.parametrize("settings", [[], ["data.format=star_rating"]])
def test_rows_in_a_plugins_format_are_predicted_as_they_were_trained(settings):
    shutil.copy(ROOT / "examples" / "plugins" / "star_rating.py", ".")
    assert query_row({"title": "Good", "body": "It works."}, *settings)["text"] == "Good\nIt works."
    assert query_row({"title": "Good", "body": "It works.", "stars": "what is here is not read"}, *settings)["text"]
    assert query_row({"review": "Bad"}, "data.columns={body: review}", *settings)["text"] == "Bad"
    assert query_row({"text": "a bare text"}, *settings)["text"] == "a bare text"
    with pytest.raises(RowError, match="missing column"):
        query_row({"title": "Good", "stars": 4}, *settings)


def test_answers_that_are_no_roles():
    Path("own.py").write_text(
        "import dstune\n\n@dstune.row_format\nclass Own(dstune.RowFormat):\n"
        "    name = 'own'\n    required = ('a', 'b')\n    answers = ('c',)\n"
    )
    ((_, message, _),) = problems("plugins=[./own.py]")
    assert "answers names 'c', which is neither in required nor in optional" in message
