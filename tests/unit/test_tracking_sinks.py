"""TensorBoard and MLflow, read back by the libraries themselves."""

import json
from pathlib import Path

import pytest
from support.configs import run_config

from dstune.config import schema
from dstune.config.convert import EnvironmentText
from dstune.config.validate import validate
from dstune.core.errors import UserError
from dstune.launch.preflight import resolve_run
from dstune.tracking.log import RunLog
from dstune.tracking.trackers import mlflow as mlflow_tracker
from dstune.tracking.trackers import tensorboard as tensorboard_tracker

pytest.importorskip("tensorboard", reason="pip install '.[tensorboard]' in a clone of dstune")
pytest.importorskip("mlflow", reason="pip install '.[mlflow]' in a clone of dstune")


def configuration(store: Path | None = None) -> schema.RunConfig:
    mlflow = mlflow_tracker.MlflowConfig(uri=str(store) if store else None)
    tags = ["x", EnvironmentText("planted-value", "${oc.env:KEY}")]
    tracking = schema.tracking_class()("proj", "grp", tags, "a note", tensorboard=store is None, mlflow=mlflow)
    return run_config(run=schema.RunSection(name="trial"), tracking=tracking)


def launch(config: schema.RunConfig, run_dir: Path, first: int, last: int, status: str) -> RunLog:
    """One launch that takes the steps after `first` up to `last`, with an evaluation after every second one, and ends
    with `status` unless that is empty."""
    tracker = RunLog(config, run_dir, resumed_at_step=first or None)
    if first == 0:
        tracker.samples(0, [{"prompt": "ask", "reference": "right", "answer": "before"}])
    for step in range(first + 1, last + 1):
        tracker.log(step, {"loss": float("nan") if step == 2 else 1 / step, "lr": 0.5, "step_seconds": 2.0})
        if step % 2 == 0 and not (status == "preempted" and step == last):
            tracker.log(step, {"eval/loss": 2 / step, "eval/seconds": 0.5})
    if not status:
        return tracker
    tracker.samples(last, [{"prompt": "ask", "reference": "right", "answer": "after"}])
    tracker.summary({"status": status, "steps": last, "eval_final": {"loss": 0.5}})
    tracker.finish(status)
    return tracker


def continued(config: schema.RunConfig, run_dir: Path) -> None:
    """A run in four launches: crashed in the evaluation after step 4, continued at 3, preempted at 6 before its
    evaluation, and once more after it, finished."""
    tracker = launch(config, run_dir, 0, 3, "")
    tracker.log(4, {"loss": 1 / 4, "lr": 0.5, "step_seconds": 2.0})
    tracker.finish("failed", crashed=True)
    launch(config, run_dir, 3, 6, "preempted")
    tracker = RunLog(config, run_dir, resumed_at_step=6)
    tracker.log(6, {"eval/loss": 2 / 6, "eval/seconds": 0.5})
    tracker.finish("preempted")
    launch(config, run_dir, 6, 8, "completed")


def logged(run_dir: Path) -> dict[str, dict[int, float]]:
    """The numbers of metrics.jsonl by name and step."""
    found: dict[str, dict[int, float]] = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        for name, value in row.items():
            if name != "step" and value is not None:
                assert row["step"] not in found.setdefault(name, {})
                found[name][row["step"]] = value
    return found


# -- TensorBoard ------------------------------------------------------------------------------------------------------


def read_events(folder: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return events


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("tensorboard")
    continued(configuration(), run_dir)
    return run_dir, read_events(run_dir / "tensorboard")


def test_tensorboard_has_every_metric_once_after_two_resumes(board):
    run_dir, events = board
    scalars = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    expected = logged(run_dir)
    assert {tag: [step for step, _ in found] for tag, found in scalars.items()} == {
        tag: sorted(found) for tag, found in expected.items()
    }
    for tag, found in scalars.items():
        assert [value for _, value in found] == pytest.approx(list(expected[tag].values()), rel=1e-6)
    assert 2 not in dict(scalars["loss"]), "TensorBoard has no place for a loss that is not finite"


def test_a_tensorboard_that_watches_drops_what_comes_again(tmp_path):
    """The accumulator stays open over the resume, as the server's does."""
    launch(configuration(), tmp_path, 0, 5, "failed")
    events = read_events(tmp_path / "tensorboard")
    assert [event.step for event in events.Scalars("lr")] == [1, 2, 3, 4, 5]
    launch(configuration(), tmp_path, 3, 6, "completed")
    events.Reload()
    assert [event.step for event in events.Scalars("lr")] == [1, 2, 3, 4, 5, 6]


def test_tensorboard_shows_answers_configuration_and_hyperparameters(board):
    _, events = board
    texts = {
        tag: [event.tensor_proto.string_val[0].decode() for event in events.Tensors(tag)]
        for tag in events.Tags()["tensors"]
    }
    before, *_, after = texts["samples/0/text_summary"]
    assert "before" in before and "after" in after
    (configured,) = texts["configuration/text_summary"]
    assert "global_batch_size: 16" in configured and "${oc.env:KEY}" in configured and "planted-value" not in configured
    (started,) = (event for event in [events.summary_metadata["_hparams_/session_start_info"]])
    assert b"trainer.seed" in started.plugin_data.content


# -- MLflow -----------------------------------------------------------------------------------------------------------


def client(store: Path):
    from mlflow.tracking import MlflowClient

    return MlflowClient(str(store))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("mlflow")
    continued(configuration(run_dir / "store"), run_dir)
    return run_dir, client(run_dir / "store")


def test_mlflow_has_one_run_with_every_metric_once_after_two_resumes(recorded):
    run_dir, mlflow = recorded
    experiment = mlflow.get_experiment_by_name("proj")
    (run,) = mlflow.search_runs([experiment.experiment_id])
    assert run.info.run_id == (run_dir / "mlflow-id").read_text()
    expected = logged(run_dir)
    assert set(run.data.metrics) == set(expected)
    for name, values in expected.items():
        found = [(metric.step, metric.value) for metric in mlflow.get_metric_history(run.info.run_id, name)]
        assert found == list(values.items()), name


def test_mlflow_knows_the_run_its_parameters_and_result(recorded):
    _, mlflow = recorded
    (run,) = mlflow.search_runs([mlflow.get_experiment_by_name("proj").experiment_id])
    assert (run.info.run_name, run.info.status) == ("trial", "FINISHED")
    assert run.data.params["trainer.global_batch_size"] == "16"
    tags = run.data.tags
    assert (tags["dstune.group"], tags["dstune.tag.1"], tags["mlflow.note.content"]) == (
        "grp",
        "${oc.env:KEY}",
        "a note",
    )
    assert (tags["result.status"], tags["result.eval_final.loss"]) == ("completed", "0.5")
    assert not {name for name in tags if name.startswith(("mlflow.source", "mlflow.user"))}


def test_each_tracker_says_where_the_run_is(tmp_path, capsys):
    launch(configuration(tmp_path / "store"), tmp_path, 0, 1, "completed")
    (tmp_path / "board").mkdir()
    launch(configuration(), tmp_path / "board", 0, 1, "completed")
    printed = capsys.readouterr().out
    assert f"MLflow: run {(tmp_path / 'mlflow-id').read_text()} of experiment proj\n" in printed
    assert f"TensorBoard: tensorboard --logdir {tmp_path / 'board' / 'tensorboard'}\n" in printed
    assert str(tmp_path / "store") not in printed, "an address may hold a password"


def test_a_start_from_nothing_takes_the_place_of_the_attempt_before(tmp_path):
    config = configuration(tmp_path / "store")
    launch(config, tmp_path, 0, 3, "failed")
    launch(config, tmp_path, 0, 4, "completed")
    mlflow = client(tmp_path / "store")
    (run,) = mlflow.search_runs([mlflow.get_experiment_by_name("proj").experiment_id])
    assert [metric.step for metric in mlflow.get_metric_history(run.info.run_id, "lr")] == [1, 2, 3, 4]


def test_an_mlflow_server_that_is_not_there_warns_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracking = schema.tracking_class()(mlflow=mlflow_tracker.MlflowConfig("http://127.0.0.1:9"))
    tracker = RunLog(run_config(tracking=tracking), tmp_path, resumed_at_step=None)
    tracker.log(1, {"loss": 1.0})
    tracker.finish("completed")
    assert capsys.readouterr().out.count("warning: MLflow is off for the rest of this run") == 1


def test_no_planted_value_is_in_any_store(board, recorded):
    for run_dir in (board[0], recorded[0]):
        files = [path for path in run_dir.rglob("*") if path.is_file()]
        assert len(files) >= 3
        assert [path for path in files if b"planted-value" in path.read_bytes()] == []


# -- what is missing is told before the ranks start --------------------------------------------------------------------


def test_a_package_that_is_not_installed_is_reported_before_the_ranks_start(monkeypatch):
    for room in (mlflow_tracker, tensorboard_tracker):
        monkeypatch.setattr(room, "find_spec", lambda name: None)
    tracking = schema.tracking_class()(tensorboard=True, mlflow=mlflow_tracker.MlflowConfig("runs/mlflow"))
    config = run_config(tracking=tracking, model=schema.ModelConfig(path="/nowhere"))
    with pytest.raises(UserError) as caught:
        resolve_run(config)
    fixes = {problem.where: problem.fix for problem in caught.value.problems}
    assert fixes["tracking.tensorboard"] == "pip install '.[tensorboard]' in a clone of dstune"
    assert fixes["tracking.mlflow.uri"] == "pip install '.[mlflow]' in a clone of dstune"
    assert "model.path" in fixes, "all problems are told together"


def test_a_database_needs_the_whole_of_mlflow(monkeypatch):
    monkeypatch.setattr(mlflow_tracker, "find_spec", lambda name: object() if name == "mlflow" else None)
    (problem,) = mlflow_tracker.Mlflow.missing(
        schema.tracking_class()(mlflow=mlflow_tracker.MlflowConfig("sqlite:///runs.db"))
    )
    assert problem.fix == "pip install mlflow, or give a folder"


@pytest.mark.parametrize(
    "uri",
    ["runs/mlflow", "file:///tmp/x", "http://host:5000", "databricks", "databricks://me", "mysql+pymysql://u@h/d"],
)
def test_known_stores_are_allowed(uri):
    validate(run_config(tracking=schema.tracking_class()(mlflow=mlflow_tracker.MlflowConfig(uri))))


def test_an_unknown_store_is_refused():
    with pytest.raises(UserError, match=r"tracking\.mlflow\.uri=ftp://host: MLflow has no such store"):
        validate(run_config(tracking=schema.tracking_class()(mlflow=mlflow_tracker.MlflowConfig("ftp://host"))))


def test_databricks_is_a_store_and_no_folder():
    assert mlflow_tracker.absolute_store("databricks") == "databricks"
    assert mlflow_tracker.absolute_store("runs/store") == str(Path("runs/store").absolute())
    assert mlflow_tracker.absolute_store("http://h:1") == "http://h:1"
    assert mlflow_tracker.experiment_of("films", "databricks://profile") == "/Shared/films"
    assert mlflow_tracker.experiment_of("/Users/me/films", "databricks") == "/Users/me/films"
    assert mlflow_tracker.experiment_of("films", "http://h:1") == "films"
