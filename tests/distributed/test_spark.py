"""Ranks in the tasks of Spark: how a run ended is told as everywhere else, nothing is left behind, and no secret is seen."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from distributed.test_runs import overrides, undisturbed, workplace  # noqa: F401 (fixtures)
from support.command import ROOT, Commands, at_step, exact, metrics, ranks_of, result, wait_until
from support.configs import run_config

from dstune.core.errors import UserError
from dstune.core.rank_env import from_environment
from dstune.core.rendezvous import free_port

pyspark = pytest.importorskip("pyspark", reason="pip install '.[spark]' in a clone of dstune")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SECRET = "planted-secret-7b1e"


@pytest.fixture(scope="module", autouse=True)
def java():
    if shutil.which("java") is None:
        pytest.skip("there is no Java runtime (Debian: apt-get install openjdk-17-jre-headless)")


@pytest.fixture(scope="module")
def session(tmp_path_factory) -> Iterator[object]:
    """A small session of this process, with an event log."""
    from pyspark.sql import SparkSession

    folder = tmp_path_factory.mktemp("spark")
    (folder / "events").mkdir()
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "SPARK_LOCAL_IP", "PYSPARK_PYTHON")}
    os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    os.environ |= {"SPARK_LOCAL_IP": "127.0.0.1", "PYSPARK_PYTHON": sys.executable}
    builder = SparkSession.builder.master("local[2]").appName("tests").config("spark.ui.enabled", "false")
    builder = builder.config("spark.driver.memory", "1g").config("spark.local.dir", str(folder / "local"))
    builder = builder.config("spark.eventLog.enabled", "true").config(
        "spark.eventLog.dir", f"file://{folder / 'events'}"
    )
    found = builder.config("spark.driver.host", "127.0.0.1").getOrCreate()
    found.folder = folder
    yield found
    found.stop()
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def launch(session, run_dir: Path, how: str) -> int:
    from dstune.lakehouse.spark import stage
    from dstune.lakehouse.spark.config import SparkConfig
    from dstune.launch.console import Console

    run_dir.mkdir()
    (run_dir / "run.yaml").write_text("")
    spark = SparkConfig(processes=2, grace_seconds=2.0, export_env=["PLANTED_TOKEN"])
    os.environ["PLANTED_TOKEN"] = SECRET
    config = run_config(launch=spark)
    return stage.run(config, run_dir, spark, Console(), ["support.spark_rank", how, str(run_dir)])


def test_how_a_run_ended(session, tmp_path, capfd):
    assert launch(session, tmp_path / "completes", "completes") == 0
    seen = [json.loads((tmp_path / "completes" / f"seen-{rank}.json").read_text()) for rank in range(2)]
    ranks = [from_environment(one) for one in seen]
    assert [(one.rank, one.world_size, one.local_rank, one.local_size) for one in ranks] == [(0, 2, 0, 2), (1, 2, 1, 2)]
    assert all(one["PLANTED_TOKEN"] == SECRET for one in seen)
    assert "rank 0 of 2" in (tmp_path / "completes" / "logs" / "rank-0.log").read_text()
    assert launch(session, tmp_path / "preempted", "preempted") == 75
    with pytest.raises(UserError, match=r"data\.train.*is wrong"):
        launch(session, tmp_path / "mistaken", "mistaken")
    assert launch(session, tmp_path / "fails", "fails") == 1
    assert "loss was not finite" in result(tmp_path / "fails")["reason"]
    assert launch(session, tmp_path / "killed", "killed") == 1
    assert "rank 1 was killed by SIGKILL" in result(tmp_path / "killed")["reason"]
    threading.Timer(3.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    assert launch(session, tmp_path / "stopped", "waits for STOP") == 75
    assert not [one for one in psutil.process_iter(["cmdline"]) if "support.spark_rank" in (one.info["cmdline"] or [])]
    hidden = [session.folder, *tmp_path.glob("*/logs"), *tmp_path.glob("*/launch*")]
    for place in hidden:
        for file in [place] if place.is_file() else place.rglob("*"):
            assert not file.is_file() or SECRET.encode() not in file.read_bytes(), file
    assert SECRET not in str(session.sparkContext.getConf().getAll())


def test_more_ranks_than_slots_and_an_unshared_folder_are_refused(session, tmp_path):
    from dstune.lakehouse.spark import refusals, stage
    from dstune.lakehouse.spark.config import SparkConfig
    from dstune.launch.console import Console

    (tmp_path / "run.yaml").write_text("")
    spark = SparkConfig(processes=3)
    with pytest.raises(UserError, match="Spark has 2 slots, and all ranks have to run at once"):
        stage.run(
            run_config(launch=spark), tmp_path, spark, Console(), ["support.spark_rank", "completes", str(tmp_path)]
        )
    hello = {"host": "h", "sees": "other", "gpus": [], "unused": 0, "dstune": "0.0", "address": "a", "port": 1}
    with pytest.raises(UserError) as caught:
        refusals.check({0: hello}, tmp_path)
    assert "the workers do not share this file system" in str(caught.value)
    assert "the workers have dstune 0.0" in str(caught.value)


def test_rows_of_a_data_frame_of_spark_from_a_notebook(session, tmp_path, workplace, monkeypatch):  # noqa: F811
    import dstune

    monkeypatch.chdir(workplace.folder)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("DSTUNE_CACHE", str(tmp_path / "cache"))
    rows = [json.loads(line) for line in (workplace.folder / "dialogues.jsonl").read_text().splitlines()][:60]
    frame = session.createDataFrame([{"text": json.dumps(row)} for row in rows])
    words = [
        word
        for word in overrides("frame", "trainer.max_steps=2", "evaluate.every=0", "task=causal_lm")
        if "data.train" not in word
    ]
    run = dstune.train(*words, train=frame, launch="spark", progress=False)
    assert run.result["status"] == "completed"
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(workplace.folder / "frame" / "data" / "train.parquet")
    assert sorted(table["text"].to_pylist()) == sorted(json.dumps(row) for row in rows)
    session.range(3).count()  # it is still there


def test_a_session_that_another_thread_made_stays(session):
    from dstune.lakehouse.spark.config import SparkConfig
    from dstune.lakehouse.spark.session import session_of
    from dstune.launch.console import Console

    def use() -> None:
        with session_of(SparkConfig(), Console()) as found:
            assert found.sparkContext is session.sparkContext

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert session.range(3).count() == 3


# -- whole commands ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spark_place(workplace) -> Commands:  # noqa: F811
    workplace.env |= {
        "SPARK_LOCAL_IP": "127.0.0.1",
        "PYSPARK_PYTHON": sys.executable,
        "PLANTED_TOKEN": SECRET,
        "PYSPARK_SUBMIT_ARGS": "--driver-memory 1g --conf spark.ui.enabled=false --conf spark.driver.host=127.0.0.1 pyspark-shell",
    }
    return workplace


def spark_overrides(name: str, *further: str) -> list[str]:
    return overrides(name, "launch=spark", 'launch.master="local[2]"', "launch.export_env=[PLANTED_TOKEN]", *further)


def test_the_curve_is_that_of_local_ranks_and_a_killed_driver_leaves_nothing(spark_place, undisturbed):  # noqa: F811
    run_dir = spark_place.folder / "spark"
    command = spark_place.start("train", *spark_overrides("spark"))
    wait_until(lambda: at_step(run_dir, 12), timeout=300)
    ranks = ranks_of(run_dir)
    assert len(ranks) == 2
    command.kill()
    killed = time.monotonic()
    command.wait()
    wait_until(
        lambda: not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks), timeout=60
    )
    print(f"no rank {time.monotonic() - killed:.1f} s after the driver was killed")
    done = spark_place.run("train", *spark_overrides("spark"), timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "continues from" in done.stderr
    assert exact(run_dir) == undisturbed


def test_a_notebook_trains_on_its_data_frame(spark_place):
    """The session that is there is used, and stays."""
    import nbformat
    from nbclient import NotebookClient

    rows = [json.loads(line) for line in (spark_place.folder / "dialogues.jsonl").read_text().splitlines()][:60]
    (spark_place.folder / "rows.jsonl").write_text(
        "".join(f"{json.dumps({'text': json.dumps(row)})}\n" for row in rows)
    )
    words = [
        word for word in overrides("notebook", "trainer.max_steps=2", "task=causal_lm") if "data.train" not in word
    ]
    cells = [
        "from pyspark.sql import SparkSession",
        "spark = SparkSession.builder.master('local[2]').config('spark.driver.memory', '1g').getOrCreate()",
        "frame = spark.read.json('rows.jsonl')",
        f"import dstune\nrun = dstune.train(*{words!r}, train=frame, launch='spark')\nrun",
        "print(run.result['status'], run.result['world_size'], spark.range(3).count())",
    ]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in spark_place.env.items():
            patch.setenv(name, value)
        where = {"metadata": {"path": str(spark_place.folder)}}
        NotebookClient(book, timeout=600, kernel_name="python3", resources=where).execute()
    assert "completed 2 3" in str(book.cells[-1].outputs)
    assert "completed, 2 steps" in str(book.cells[-2].outputs), "the run's own table"
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(spark_place.folder / "notebook" / "data" / "train.parquet")
    assert sorted(table["text"].to_pylist()) == sorted(json.dumps(row) for row in rows)


class Cluster:
    """A standalone master, and workers of one core each, on this machine."""

    def __init__(self, folder: Path, env: dict[str, str]):
        self.folder, self._daemons = folder, []
        home = Path(pyspark.__file__).parent
        self._program = str(home / "bin" / "spark-class")
        self._env = {
            **env,
            "SPARK_HOME": str(home),
            "SPARK_WORKER_DIR": str(folder / "work"),
            "SPARK_DAEMON_MEMORY": "512m",
        }
        self._log = folder / "daemons.log"
        port = free_port()
        self.master = f"spark://127.0.0.1:{port}"
        self._start("master.Master", "--port", str(port))
        wait_until(lambda: b"I have been elected leader" in self._log.read_bytes(), timeout=180)

    def add_worker(self) -> None:
        before = self._log.read_text().count("Registering worker")
        self._start("worker.Worker", "--cores", "1", "--memory", "1g", self.master)
        wait_until(lambda: self._log.read_text().count("Registering worker") > before, timeout=180)

    def _start(self, name: str, *words: str) -> None:
        command = [self._program, f"org.apache.spark.deploy.{name}", "--host", "127.0.0.1", "--webui-port", "0", *words]
        with self._log.open("ab") as log:
            daemon = subprocess.Popen(command, env=self._env, stdout=log, stderr=log, start_new_session=True)
        self._daemons.append(daemon)

    def lose_worker(self, rank: psutil.Process) -> None:
        """At once and for good, as a machine that is switched off: its worker, and the executor that runs a rank's task."""
        family = rank.parents()
        executor = next(one for one in family if "CoarseGrainedExecutorBackend" in " ".join(one.cmdline()))
        worker = next(one for one in family if "deploy.worker.Worker" in " ".join(one.cmdline()))
        worker.kill()
        executor.kill()

    def stop(self) -> None:
        for daemon in self._daemons:
            daemon.kill()
            daemon.wait()


@pytest.fixture(scope="module")
def cluster(spark_place, tmp_path_factory) -> Iterator[Cluster]:
    env = {name: value for name, value in spark_place.env.items() if name != "PLANTED_TOKEN"}
    found = Cluster(tmp_path_factory.mktemp("standalone"), env)
    try:
        for _ in range(2):
            found.add_worker()
        yield found
    finally:
        found.stop()


def rank_of(run_dir: Path, number: int) -> psutil.Process:
    return next(rank for rank in ranks_of(run_dir) if rank.environ()["RANK"] == str(number))


def texts_of_ui(port: int) -> Iterator[str]:
    for page in ("environment", "jobs", "stages", "executors"):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/{page}/") as answer:
            yield answer.read().decode()


def on_cluster(cluster: Cluster, processes: int = 2) -> list[str]:
    words = [f"launch.master={cluster.master}", f"launch.processes={processes}"]
    return ["launch=spark", "launch.export_env=[PLANTED_TOKEN]", *words]


def started(place: Commands, name: str, words: list[str], further: int) -> subprocess.Popen:
    """A launch that has come `further` steps beyond all before it."""
    run_dir = place.folder / name
    rows = metrics(run_dir)
    step = (rows[-1]["step"] if rows else 0) + further
    command = place.start("train", *overrides(name, *words))
    wait_until(lambda: at_step(run_dir, step) or command.poll() is not None, timeout=400)
    assert command.poll() is None, place.log
    return command


def test_a_standalone_cluster_on_which_a_run_ends_in_every_way(spark_place, cluster, undisturbed):  # noqa: F811
    """Asked to stop, a killed rank, a killed driver: each is told rightly, the curve is that of a run that was never disturbed,
    and nothing that Spark keeps or shows has the secret."""
    name, port, events = "standalone", free_port(), cluster.folder / "events"
    run_dir, words = spark_place.folder / name, on_cluster(cluster)
    events.mkdir()
    submit = spark_place.env["PYSPARK_SUBMIT_ARGS"].replace("spark.ui.enabled=false", f"spark.ui.port={port}")
    submit = f"--conf spark.eventLog.enabled=true --conf spark.eventLog.dir=file://{events} {submit}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(spark_place.env, "PYSPARK_SUBMIT_ARGS", submit)
        command = started(spark_place, name, words, 6)
        assert rank_of(run_dir, 1).environ()["PLANTED_TOKEN"] == SECRET
        assert not [text for text in texts_of_ui(port) if SECRET in text]
        command.terminate()
        assert command.wait(timeout=120) == 75, spark_place.log
        assert result(run_dir)["status"] == "preempted"

        command = started(spark_place, name, words, 2)
        rank_of(run_dir, 1).kill()
        assert command.wait(timeout=120) == 1, spark_place.log
        assert "rank 1 was killed by SIGKILL" in result(run_dir)["reason"]
        assert not ranks_of(run_dir)

        command = started(spark_place, name, words, 2)
        ranks = ranks_of(run_dir)
        assert len(ranks) == 2
        command.kill()
        command.wait()
        killed = time.monotonic()
        wait_until(lambda: not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks), 60)
        print(f"no rank {time.monotonic() - killed:.1f} s after the driver was killed")

        done = spark_place.run("train", *overrides(name, *words), timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
    assert exact(run_dir) == undisturbed
    assert not ranks_of(run_dir)
    assert list(events.iterdir())
    for file in cluster.folder.rglob("*"):
        assert not file.is_file() or SECRET.encode() not in file.read_bytes(), file


def test_a_worker_that_is_lost_while_ranks_train(spark_place, cluster, undisturbed):  # noqa: F811
    """Spark starts the stage again with the worker that came instead: one launch, and the curve of an undisturbed run."""
    run_dir = spark_place.folder / "lost"
    command = started(spark_place, "lost", on_cluster(cluster), 6)
    cluster.lose_worker(rank_of(run_dir, 1))
    cluster.add_worker()
    assert command.wait(timeout=600) == 0, spark_place.log
    assert "the task of rank 1 on" in spark_place.log
    assert "Spark starts the stage again" in spark_place.log
    assert exact(run_dir) == undisturbed
    assert not ranks_of(run_dir)


def test_more_ranks_than_the_cluster_has_slots(spark_place, cluster):
    refused = spark_place.run("train", *overrides("too-many"), *on_cluster(cluster, processes=3))
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert "Spark has 2 slots" in refused.stderr
    assert not (spark_place.folder / "too-many").exists()
