"""`import dstune`: names, rows from memory and refusals, without training."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import datasets
import pandas
import pyarrow.parquet
import pytest
from support.runs import full_run, run_config
from support.tiny import save_classifier

import dstune
from dstune.api import rows, training
from dstune.api.launching import _ended
from dstune.checkpoint.export import check_free
from dstune.config.run_file import Composed, write_run
from dstune.core.errors import EXIT_PREEMPTED, UserError
from dstune.launch import records
from dstune.tasks.classification.config import ClassificationConfig


def test_the_import_is_light():
    program = (
        "import sys; before = set(sys.modules); import dstune; names = dir(dstune); "
        "print(len(set(sys.modules) - before), [n for n in ('torch', 'hydra', 'yaml', 'numpy') if n in sys.modules])"
    )
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert loaded == "1 []\n"


def test_every_public_name_is_there_and_typed():
    stub = (Path(dstune.__file__).with_suffix(".pyi")).read_text()
    for name in dstune.__all__:
        assert getattr(dstune, name) is not None
        assert f" as {name}\n" in stub or name == "__version__"
    assert set(dstune.__all__) <= set(dir(dstune))
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        dstune.trian  # noqa: B018


def test_train_stays_a_function_when_packages_below_are_imported():
    import dstune.evaluation.command
    import dstune.inference.generate

    assert all(
        inspect.isfunction(getattr(dstune, name)) for name in ("train", "evaluate", "predict", "generate", "plan")
    )


@pytest.mark.parametrize(
    "function", [dstune.train, dstune.predict, dstune.generate, dstune.evaluate, dstune.export, dstune.plan]
)
def test_help_explains_every_argument(function):
    text = inspect.getdoc(function) or ""
    for name, parameter in inspect.signature(function).parameters.items():
        assert f"    {name}: " in text
        assert parameter.annotation is not inspect.Parameter.empty
    assert "UserError" in text


# ---- rows from memory ----

ROWS = [{"text": "a great film", "label": "good", "year": 1999}, {"text": "dull", "label": "bad", "year": None}]


def test_mappings_become_json_lines(tmp_path):
    assert rows.file_name(ROWS, "train") == "data/train.jsonl"
    rows.write(ROWS, tmp_path / "data" / "train.jsonl", "train")
    assert [json.loads(line) for line in (tmp_path / "data/train.jsonl").read_text().splitlines()] == ROWS


@pytest.mark.parametrize("made", [datasets.Dataset.from_list, pandas.DataFrame])
def test_tables_become_parquet(tmp_path, made):
    table = made([row | {"year": 1} for row in ROWS])
    assert rows.file_name(table, "test") == "data/test.parquet"
    rows.write(table, tmp_path / "t.parquet", "test")
    assert pyarrow.parquet.read_table(tmp_path / "t.parquet").to_pylist() == [row | {"year": 1} for row in ROWS]


def test_conversations_to_answer_are_read_as_those_of_training():
    from dstune.api.models import _request

    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    given = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2"},
    ]
    system, asked, called, _ = _request(given, 1).messages
    assert (system["role"], asked["content"]) == ("system", "Hi")
    assert called["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    for wrong, reason in (
        (given[:3], "nothing to answer"),
        ([{"role": "user", "content": None}], "content must be text"),
    ):
        with pytest.raises(UserError, match=reason):
            _request(wrong, 1)


@pytest.mark.parametrize("made", [datasets.Dataset.from_list, pandas.DataFrame])
def test_objects_without_keys_are_kept(tmp_path, made):
    """Tools and calls without arguments, which Parquet cannot hold."""
    from dstune.data import sources

    row = {"tools": [{"name": "now", "parameters": {"type": "object", "properties": {}}}], "calls": [{"arguments": {}}]}
    table = made([row])
    assert rows.file_name(table, "train") == "data/train.arrow"
    rows.write(table, tmp_path / "train.arrow", "train")
    (file,) = sources.expand(str(tmp_path / "train.arrow"), "data.train")
    assert [found.fields for found in sources.read(file)] == [row]


def test_a_frame_whose_columns_mix_types_becomes_json_lines(tmp_path):
    given = [{"prompt": "Hi", "n": 1}, {"prompt": [{"role": "user", "content": "Hi"}], "n": None}]
    table = pandas.DataFrame(given)
    assert rows.file_name(table, "train") == "data/train.jsonl"
    rows.write(table, tmp_path / "train.jsonl", "train")
    assert [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()] == given
    assert list(rows.iterate_rows(table)) == given


def test_a_frame_with_two_columns_of_one_name_is_refused(tmp_path):
    table = pandas.DataFrame([["a", "b", 1]], columns=["text", "text", "n"])
    for call in (
        lambda: rows.file_name(table, "train"),
        lambda: rows.write(table, tmp_path / "train.jsonl", "train"),
        lambda: list(rows.iterate_rows(table)),
    ):
        with pytest.raises(UserError, match="=text: two columns have one name"):
            call()


def test_a_dataset_that_was_shuffled_keeps_its_order(tmp_path):
    table = (
        datasets.Dataset.from_list([{"text": str(number)} for number in range(50)]).shuffle(seed=1).select(range(20))
    )
    rows.write(table, tmp_path / "t.parquet", "train")
    assert pyarrow.parquet.read_table(tmp_path / "t.parquet")["text"].to_pylist() == table["text"][:]


def test_numbers_of_numpy_and_dates_are_written(tmp_path):
    import datetime

    import numpy as np

    held = [{"text": "a", "score": np.float32(0.5), "vector": np.arange(3), "day": datetime.date(2026, 1, 2)}]
    rows.write(held, tmp_path / "r.jsonl", "train")
    row = json.loads((tmp_path / "r.jsonl").read_text())
    assert row == {"text": "a", "score": 0.5, "vector": [0, 1, 2], "day": "2026-01-02"}


@pytest.mark.parametrize(
    ("given", "where", "reason"),
    [
        ([{"text": object()}], "train, row 1", "column 'text' holds a object"),
        ([{"text": "a"}, "b"], "train, row 2", "expected a mapping of columns, not str"),
        ([], "train", "there are no rows in it"),
        ({"text": "a"}, "train", "expected rows, not a dict"),
        (3, "train", "expected rows, not a int"),
    ],
)
def test_rows_that_cannot_be_written(tmp_path, given, where, reason):
    with pytest.raises(UserError) as error:
        rows.write(given, tmp_path / "data" / "train.jsonl", "train")
    assert error.value.problems[0].where == where
    assert reason in error.value.problems[0].reason
    assert list((tmp_path / "data").iterdir()) == []


def test_a_run_keeps_the_rows_that_it_has_trained_on(tmp_path):
    from dstune.checkpoint import store

    target = tmp_path / "data" / "train.jsonl"
    rows.write(ROWS, target, "train")
    rows.write(ROWS[:1], target, "train")  # nothing was saved yet
    saved = tmp_path / "checkpoints" / "step-00000001"
    saved.mkdir(parents=True)
    (saved / "state.json").write_text("{}")
    (saved / store.COMMITTED).write_text('{"files": {"weights": {"bytes": 2}}}')
    (saved / "weights").write_text("ab")
    rows.write(ROWS[:1], target, "train")
    with pytest.raises(UserError, match="began with other rows"):
        rows.write(ROWS, target, "train")
    assert len(target.read_text().splitlines()) == 1


# ---- what train makes of its arguments ----


def test_a_split_may_not_be_given_twice():
    with pytest.raises(UserError, match="is given as well as train"):
        training._with_rows(["data.train=a.jsonl"], [], {"train": ROWS})


def test_files_become_keys_and_rows_files_of_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words, write = training._with_rows(
        ["run.dir=mine", "task=classification"], [], {"train": ROWS, "test": "my rows.csv"}
    )
    assert words[2:] == ["data.test='my rows.csv'", f"data.train='{tmp_path}/mine/data/train.jsonl'"]
    write(Path("mine"))
    assert len(Path("mine/data/train.jsonl").read_text().splitlines()) == 2
    assert training._with_rows(["task=chat"], [], {"train": Path("a.jsonl")}) == (
        ["task=chat", "data.train='a.jsonl'"],
        None,
    )


def test_a_run_without_a_directory_gets_a_new_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words, _ = training._with_rows(["run.name=mine", "task=classification"], [], {"train": ROWS})
    assert words[2].startswith("run.dir='runs/mine/")


def test_a_callback_is_that_of_its_file_not_of_another_class_of_the_name(tmp_path, monkeypatch):
    for name in ("first", "second"):
        (tmp_path / f"{name}_printer.py").write_text(
            f"import dstune\n@dstune.callback\nclass Printer(dstune.Callback):\n    name = '{name}'\n"
        )
    monkeypatch.chdir(tmp_path)
    words = training._with_plugins((), ["./first_printer.py:Printer", "./second_printer.py:Printer"], ())
    assert words[-1] == "trainer.callbacks=[first,second]"


def test_flags_and_rows_among_the_overrides():
    with pytest.raises(UserError) as error:
        dstune.train("--cfg", ROWS, "trainer.max_steps=3")
    assert [problem.reason for problem in error.value.problems] == ["this is a flag", "expected a text"]


@pytest.mark.parametrize(
    "call",
    [
        lambda: dstune.evaluate("sample://tiny-chat", "--help"),
        lambda: dstune.evaluate("--help"),
        lambda: dstune.plan("--json", "model=llama3_8b"),
        lambda: dstune.predict("sample://tiny-chat", ["a"], "--json"),
    ],
)
def test_flags_are_refused_by_every_function(call):
    with pytest.raises(UserError, match="this is a flag"):
        call()


def test_one_text_where_a_list_belongs():
    with pytest.raises(UserError) as error:
        dstune.train(plugins="urgency", config_dirs=Path("foo"), callbacks=dstune.Callback, train=ROWS)
    fixes = {problem.where: problem.fix for problem in error.value.problems}
    assert fixes == {
        "plugins": "plugins=['urgency']",
        "config_dirs": "config_dirs=['foo']",
        "callbacks": "callbacks=[Callback]",
    }
    with pytest.raises(UserError, match=r"trust=\['plugins'\]"):
        dstune.load_run("nowhere", trust="plugins")


def test_every_problem_is_listed_and_nothing_left_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(dstune.UserError) as error:
        dstune.train("trainer.epoch=2", "optimizer.lr=high", "task=classification", train=ROWS)
    assert [problem.where for problem in error.value.problems] == ["trainer.epoch", "optimizer.lr"]
    assert list(tmp_path.iterdir()) == []


# ---- runs ----


def test_a_run_is_read_from_its_files(tmp_path):
    full_run(tmp_path / "run")
    run = dstune.load_run(tmp_path / "run")
    assert run.result["status"] == "completed" == run.status
    assert run.metrics[1]["step"] == 1
    assert len(pandas.DataFrame(run.metrics)) == len(run.metrics)
    assert "completed, 40 steps" in run._repr_html_()
    report = run.report()
    assert Path(report).name == "report.html"
    assert report._repr_html_().startswith("<iframe")


def test_only_keys_that_exist_can_be_trusted(tmp_path):
    full_run(tmp_path / "run")
    with pytest.raises(UserError) as error:
        dstune.load_run(tmp_path / "run", trust=["plugin", "model.trust_remote_code", "nonsense"])
    assert [problem.fix for problem in error.value.problems] == [
        "did you mean plugins?",
        "the keys that the refusal of the run names",
    ]
    dstune.load_run(tmp_path / "run", trust=["plugins", "links", "task.reference_model", "trainer.max_steps"])


@pytest.mark.parametrize("step", [2, "2"])
def test_a_step_is_a_number_or_a_text(tmp_path, step):
    run = dstune.load_run(full_run(tmp_path / "run"))
    classifier = full_run(tmp_path / "classifier")
    write_run(classifier / "run.yaml", Composed(run_config(task=ClassificationConfig(labels=("a", "b"))), []))
    for call in (
        lambda: dstune.predict(classifier, ["a"], checkpoint=step),
        lambda: run.export(tmp_path / "out", checkpoint=step),
        lambda: run.generate("a", checkpoint=step),
        lambda: run.evaluate(checkpoint=step),
    ):
        with pytest.raises(UserError, match="--checkpoint=2: there is no such whole checkpoint"):
            call()


def test_a_former_export_is_replaced_by_the_words_of_python_too(tmp_path):
    with pytest.raises(UserError, match=r"--force \(in Python force=True\) to replace it"):
        check_free(tmp_path, force=False)


def test_no_run(tmp_path):
    with pytest.raises(UserError, match="this folder holds no run"):
        dstune.load_run(tmp_path)


def test_a_launch_that_is_over_is_not_running_while_its_process_lives(tmp_path):
    from dstune.launch import records

    run = full_run(tmp_path / "run")
    records.note(run, "id", 2)
    lock = records.acquire_lock(run)
    assert dstune.load_run(run).status == "running"
    os.close(lock)
    assert dstune.load_run(run).status == "completed"


def test_how_to_go_on_after_a_preemption_is_python_that_works(tmp_path):
    run = full_run(tmp_path / "run")
    records.write_result(run, "preempted", "run.time_limit is over", 1)
    with pytest.raises(dstune.Preempted) as error:
        _ended(run, EXIT_PREEMPTED)
    words = re.search(r"(dstune\.\S+)\.resume\(\) continues", str(error.value))[1]
    assert eval(words).dir == run


def test_options_of_generate_have_names_and_ranges():
    with pytest.raises(UserError) as error:
        dstune.generate("nowhere", "Hi", temprature=0.5, top_x=1)
    assert [problem.where for problem in error.value.problems] == ["temprature", "top_x"]
    assert error.value.problems[0].fix == "did you mean temperature?"
    wrong = {"max_new_tokens": "3", "top_k": 2.5, "seed": True, "temperature": None, "top_p": "1", "stop": 3}
    for given in (wrong, {"max_new_tokens": 0, "top_k": -1, "temperature": -1, "top_p": 2}):
        with pytest.raises(UserError) as error:
            dstune.generate("nowhere", "Hi", **given)
        assert [problem.where for problem in error.value.problems] == list(given)
        assert all(name in problem.fix for name, problem in zip(given, error.value.problems, strict=True))
    with pytest.raises(UserError, match="top_p and top_k need a temperature above 0"):
        dstune.generate("nowhere", "Hi", top_k=3)
    with pytest.raises(UserError, match=r"prompt 2=.*expected a text that is not empty"):
        dstune.generate("nowhere", ["Hi", " "])


@pytest.mark.parametrize("size", [-1, 0, "8"])
def test_rows_computed_together_are_at_least_one(size):
    for call in (dstune.generate, dstune.predict):
        with pytest.raises(UserError, match=r"batch_size=.*at least 1"):
            call("nowhere", ["Hi"], batch_size=size)


def test_what_is_no_prompt():
    for given in (None, 5, {"role": "user", "content": "Hi"}):
        with pytest.raises(UserError, match="expected texts or conversations"):
            dstune.generate("nowhere", given)


def test_every_row_that_cannot_be_answered_is_listed(tmp_path):
    save_classifier(tmp_path)
    with pytest.raises(UserError) as error:
        dstune.predict(tmp_path, [{"text": "x"}, 3, {"txt": "x"}, {"text": {1}}], "task=classification")
    bad = [problem for problem in error.value.problems if problem.where.startswith("row ")]
    assert [problem.where for problem in bad] == ["row 2", "row 3", "row 4"]
    assert [problem.reason.split(",")[0] for problem in bad] == [
        "expected a mapping of columns",
        "missing column 'text'",
        "column 'text' holds a set",
    ]
    with pytest.raises(UserError, match="expected rows, not int"):
        dstune.predict(tmp_path, 5, "task=classification")


@pytest.mark.parametrize(("name", "value"), [("nodes", 0), ("price", 0), ("hardware", "")])
def test_a_plan_ignores_no_argument(name, value):
    with pytest.raises(UserError) as error:
        dstune.plan("model=llama3_8b", "task=chat", **{name: value})
    assert error.value.problems[0].where == name


def test_a_plan_is_a_table_and_a_mapping(tmp_path):
    found = dstune.plan("experiment=sentiment", hardware="2xL40S")
    assert {"choices", "recommended", "fits"} <= set(found)
    assert "L40S" in str(found)


class Frame:
    """What is used of a DataFrame of Spark: values as Spark gives them to Python."""

    __module__ = "pyspark.sql.dataframe"

    def __init__(self, rows, schema):
        self._rows, self._schema = rows, schema
        self.columns = schema.names

    def limit(self, count):
        return self

    def toArrow(self):
        import pyarrow

        return pyarrow.Table.from_batches([], self._schema)

    def toLocalIterator(self):
        from types import SimpleNamespace

        for row in self._rows:
            yield SimpleNamespace(asDict=lambda recursive, row=row: row)


def test_rows_of_spark_keep_their_moments_and_maps(tmp_path, monkeypatch):
    import time
    from datetime import UTC, datetime

    import pyarrow as pa
    import pyarrow.parquet

    from dstune.api import rows as api_rows

    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    moment = datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)
    here, naive = datetime.fromtimestamp(moment.timestamp()), datetime(2026, 3, 4, 5, 6, 7)
    zoned = pa.timestamp("us", tz="America/New_York")
    schema = pa.schema(
        [
            ("text", pa.string()),
            ("at", zoned),
            ("naive", pa.timestamp("us")),
            ("map", pa.map_(pa.string(), pa.int64())),
            ("all", pa.list_(pa.struct([("when", zoned)]))),
        ]
    )
    row = {"text": "a", "at": here, "naive": naive, "map": {"b": 2}, "all": [{"when": here}]}
    assert here != naive
    api_rows.write(Frame([row], schema), tmp_path / "run" / "data" / "train.parquet", "train")
    (found,) = pyarrow.parquet.read_table(tmp_path / "run" / "data" / "train.parquet").to_pylist()
    assert (found["at"], found["naive"], found["all"]) == (moment, naive, [{"when": moment}])
    assert dict(found["map"]) == {"b": 2}
    monkeypatch.undo()
    time.tzset()
    twice = pa.schema([("text", pa.string()), ("text", pa.string())])
    with pytest.raises(UserError, match="two columns have one name"):
        api_rows.write(Frame([], twice), tmp_path / "other.parquet", "train")
    wrong = Frame([{"text": 3}], pa.schema([("text", pa.string())]))
    with pytest.raises(UserError, match="Spark does not give the rows"):
        api_rows.write(wrong, tmp_path / "other.parquet", "train")
