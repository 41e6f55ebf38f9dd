"""W&B through its real client: offline files read back by the client's own reader, and online on a loopback server."""

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.configs import run_config
from support.wandb_server import KEY, wandb_server

from dstune.config import schema
from dstune.protocols.tracker import Row
from dstune.tracking.background import Background
from dstune.tracking.log import RunLog
from dstune.tracking.trackers.wandb import WandbConfig, WandbMode

ROOT = Path(__file__).parents[2]
WANDB = Path(sys.executable).with_name("wandb")

LAUNCH = """
import json, sys
from pathlib import Path
from support.configs import run_config
from dstune.config.convert import EnvironmentText
from dstune.config import schema
from dstune.tracking.trackers import wandb as wandb_tracker
from dstune.tracking.log import RunLog
from dstune.tracking.trackers.wandb import WandbConfig, WandbMode

run_dir, mode, given = Path(sys.argv[1]), wandb_tracker.WandbMode[sys.argv[2]], json.loads(sys.argv[3])
wandb_tracker.INIT_TIMEOUT_SECONDS = given.get("timeout", 30.0)
config = run_config(
    run=schema.RunSection(name="trial"),
    tracking=schema.tracking_class()(
        project="proj", group="grp", notes="a note", wandb=wandb_tracker.WandbConfig(mode=mode),
        tags=["x", EnvironmentText("planted-value", "${oc.env:KEY}")],
    ),
)
first, last, status = given["from"], given["to"], given.get("status", "completed")
tracker = RunLog(config, run_dir, resumed_at_step=first or None)
if first == 0:
    tracker.samples(0, [{"prompt": "ask", "reference": "right", "answer": "before"}])
    tracker.log(0, {"eval/loss": 9.0, "eval/seconds": 0.5})
for step in range(first + 1, last + 1):
    loss = float("nan") if step == 2 else 1 / step
    tracker.log(step, {"epoch": step / 10, "loss": loss, "lr": 0.5, "step_seconds": 2.0, "tokens": 10 * step})
    if step % 2 == 0 and not (status == "preempted" and step == last):
        tracker.log(step, {"eval/loss": 2 / step, "eval/seconds": 0.5})
if status == "killed":
    import os, time
    time.sleep(5)  # the client's service has written what it was given
    os._exit(1)
tracker.samples(last, [{"prompt": "ask", "reference": "right", "answer": "after"}])
tracker.summary({"status": status, "steps": last, "eval_final": {"loss": 0.5}, "best": {"value": 0.25, "step": 8}})
tracker.finish(status)
"""


def launch(
    run_dir: Path, mode: str = "offline", *, variables: dict | None = None, program: str = LAUNCH, **given
) -> str:
    """One launch of a run that takes the steps after `from` up to `to`; what it printed."""
    run_dir.mkdir(exist_ok=True)
    home = run_dir.parent / "home"
    home.mkdir(exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"HOME": str(home), "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run(
        [sys.executable, "-c", program, str(run_dir), mode, json.dumps(given)],
        env=environment | (variables or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == (given.get("status") == "killed"), done.stdout
    return done.stdout


def records(folder: Path) -> list[dict]:
    """What the client's own reader finds in a run's file."""
    environment = os.environ | {"WANDB_MODE": "offline", "HOME": str(folder)}
    command = [str(WANDB), "leet", "inspect", "--json", str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def rows(found: list[dict]) -> dict[int, dict]:
    """The metrics by step; fails where a step comes twice."""
    table: dict[int, dict] = {}
    for record in found:
        if record["type"] == "history":
            step = record["history"]["step"]["num"] if "history" in record else record["step"]
            assert step not in table, f"step {step} is there twice"
            table[step] = record["history"]["item"]
    return table


def logged(run_dir: Path) -> dict[int, dict]:
    """What W&B is to have, from metrics.jsonl: the rows of a step in one."""
    table: dict[int, dict] = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        table.setdefault(row["step"], {}).update(row)
    return table


def metrics(row: dict) -> dict:
    return {name: value for name, value in row.items() if not name.startswith(("_", "samples"))}


def offline_folders(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "wandb").glob("offline-run-*"))


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """An offline run in three launches: killed after step 5, continued at 3, preempted at 6, continued to 10."""
    run_dir = tmp_path_factory.mktemp("wandb") / "run"
    printed = launch(run_dir, **{"from": 0, "to": 5, "status": "killed"})
    printed += launch(run_dir, **{"from": 3, "to": 6, "status": "preempted"})
    first_id = (run_dir / "wandb-id").read_text()
    printed += launch(run_dir, **{"from": 6, "to": 10})
    return run_dir, printed, first_id


def test_after_two_resumes_there_is_one_run_with_every_metric_once(resumed):
    run_dir, _, first_id = resumed
    (folder,) = offline_folders(run_dir)
    found = records(folder)
    (run,) = (record["run"] for record in found if record["type"] == "run")
    assert run["run_id"] == first_id == (run_dir / "wandb-id").read_text()
    table = rows(found)
    assert sorted(table) == list(range(11))
    assert {step: metrics(row) for step, row in table.items()} == logged(run_dir)
    assert table[4]["eval/loss"] == 0.5 and table[4]["loss"] == 0.25
    times = [table[step]["_timestamp"] for step in range(11)]
    # A step takes two seconds and an evaluation half a second, whenever the row was written.
    assert [round(after - before, 1) for before, after in itertools.pairwise(times[:7])] == pytest.approx(
        [2.0, 2.5, 2.0, 2.5, 2.0, 2.0], abs=0.11
    )


def test_samples_are_a_table_of_before_and_after(resumed):
    (folder,) = offline_folders(resumed[0])
    last = rows(records(folder))[10]
    table = json.loads((folder / "files" / last["samples.path"]).read_text())
    assert table["columns"] == ["step", "prompt", "reference", "answer"]
    assert [row[0] for row in table["data"]] == [0, 6, 10]
    assert table["data"][0][3] == "before" and table["data"][-1][3] == "after"


def test_the_run_has_its_names_configuration_axes_and_result(resumed):
    (folder,) = offline_folders(resumed[0])
    found = records(folder)
    (run,) = (record["run"] for record in found if record["type"] == "run")
    assert (run["project"], run["run_group"], run["display_name"]) == ("proj", "grp", "trial")
    assert (run["tags"], run["notes"], run["job_type"]) == (["x", "${oc.env:KEY}"], "a note", "train")
    config = run["config"]["update"]
    assert config["trainer"]["global_batch_size"] == 16
    axes = [record["metric"] for record in found if record["type"] == "metric"]
    assert ("*", "step") in {(axis.get("glob_name"), axis.get("step_metric")) for axis in axes}
    summary: dict = {}
    for record in found:
        if record["type"] == "summary":
            summary |= record["summary"]["update"]
    assert summary["status"] == "completed" and summary["steps"] == 10
    assert summary["eval_final"] == {"loss": 0.5} and summary["best"] == {"value": 0.25, "step": 8}
    assert found[-1]["exit"]["exit_code"] == 0


def test_nothing_about_machine_program_or_secret_is_recorded(resumed):
    run_dir, printed, _ = resumed
    (folder,) = offline_folders(run_dir)
    assert not {record["type"] for record in records(folder)} & {"stats", "output", "output_raw", "environment"}
    names = {path.name for path in (folder / "files").rglob("*")}
    assert not names & {"wandb-metadata.json", "requirements.txt", "output.log", "diff.patch", "code"}
    assert [line for line in printed.lower().splitlines() if "wandb" in line and not line.startswith("w&b: ")] == []
    assert printed.count("W&B") == printed.count("W&B: offline; upload it with `wandb sync ") == 3, "one line a launch"
    held = [path for path in run_dir.rglob("*") if path.is_file() and b"planted-value" in path.read_bytes()]
    assert held == []
    assert [path for path in (run_dir.parent / "home").rglob("*") if path.is_file()] == []


def sync(url: str, folder: Path, home: Path) -> None:
    variables = {"WANDB_BASE_URL": url, "WANDB_API_KEY": KEY, "HOME": str(home), "WANDB_ERROR_REPORTING": "false"}
    command = [str(WANDB), "sync", "--include-synced", str(folder)]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.ci
def test_wandb_sync_of_a_continued_run_replaces_what_was_synced_before(tmp_path):
    run_dir = tmp_path / "run"
    with wandb_server() as server:
        launch(run_dir, **{"from": 0, "to": 6, "status": "failed"})
        sync(server.url, offline_folders(run_dir)[0], tmp_path)
        launch(run_dir, **{"from": 4, "to": 8})
        (folder,) = offline_folders(run_dir)
        sync(server.url, folder, tmp_path)
        run = (run_dir / "wandb-id").read_text()
        assert list(server.runs) == [run]
        sent = server.history(run)
    assert [row["_step"] for row in sent] == list(range(9))
    assert {row["_step"]: metrics(row) for row in sent} == logged(run_dir)


def test_online_the_server_gets_every_step_once_through_two_resumes(tmp_path):
    run_dir = tmp_path / "run"
    with wandb_server() as server:
        variables = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}
        printed = launch(run_dir, "online", variables=variables, **{"from": 0, "to": 5, "status": "failed"})
        printed += launch(run_dir, "online", variables=variables, **{"from": 3, "to": 6, "status": "preempted"})
        printed += launch(run_dir, "online", variables=variables, **{"from": 6, "to": 8})
        run = (run_dir / "wandb-id").read_text()
        assert list(server.runs) == [run]
        sent, known = server.history(run), server.runs[run]
        assert known["exit_code"] == 0
        assert (known["sent"]["groupName"], known["sent"]["jobType"]) == ("grp", "train")
        assert not any("planted-value" in text for text in server.received)
    assert [row["_step"] for row in sent] == list(range(9))
    assert {row["_step"]: metrics(row) for row in sent} == logged(run_dir)
    assert "warning" not in printed and printed.count("W&B: http://127.0.0.1:") == 3


# -- faults -----------------------------------------------------------------------------------------------------------


def tracked_offline(run_dir: Path, printed: str, reason: str) -> None:
    assert printed.count("warning: ") == 1 and reason in printed, printed
    assert "wandb sync" in printed
    (folder,) = offline_folders(run_dir)
    assert {step: metrics(row) for step, row in rows(records(folder)).items()} == logged(run_dir)


def test_online_without_a_key_goes_on_offline_and_asks_nobody(tmp_path):
    printed = launch(tmp_path / "run", "online", variables={"WANDB_MODE": "online"}, **{"from": 0, "to": 3})
    tracked_offline(tmp_path / "run", printed, "no W&B key found")


@pytest.mark.ci
def test_a_broken_netrc_is_no_key(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".netrc").write_text('machine api.wandb.ai login user password "unfinished\n{{{')
    printed = launch(tmp_path / "run", "online", **{"from": 0, "to": 3})
    tracked_offline(tmp_path / "run", printed, "W&B cannot be used (API key")


@pytest.mark.ci
def test_a_server_that_is_not_there_leaves_an_offline_run(tmp_path):
    variables = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    printed = launch(tmp_path / "run", "online", variables=variables, timeout=3.0, **{"from": 0, "to": 3})
    tracked_offline(tmp_path / "run", printed, "W&B cannot be used (")


@pytest.mark.ci
def test_a_refused_key_leaves_an_offline_run(tmp_path):
    with wandb_server(key="b" * 40) as server:
        variables = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": server.url}
        printed = launch(tmp_path / "run", "online", variables=variables, timeout=3.0, **{"from": 0, "to": 3})
    tracked_offline(tmp_path / "run", printed, "W&B cannot be used (")
    assert KEY not in printed


@pytest.mark.ci
def test_a_run_that_began_offline_is_whole_on_the_server_once_that_answers(tmp_path):
    run_dir = tmp_path / "run"
    with wandb_server() as server:
        variables = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}
        launch(run_dir, "offline", **{"from": 0, "to": 4})
        launch(run_dir, "online", variables=variables, **{"from": 4, "to": 6})
        sent = server.history((run_dir / "wandb-id").read_text())
    assert {row["_step"]: metrics(row) for row in sent} == logged(run_dir)
    assert offline_folders(run_dir) == [], "it would be uploaded a second time"


@pytest.mark.ci
def test_a_start_from_nothing_is_another_run_on_the_server(tmp_path):
    run_dir = tmp_path / "run"
    with wandb_server() as server:
        variables = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}
        launch(run_dir, "online", variables=variables, **{"from": 0, "to": 2, "status": "failed"})
        launch(run_dir, "online", variables=variables, **{"from": 0, "to": 3})
        assert len(server.runs) == 2
        sent = server.history((run_dir / "wandb-id").read_text())
    assert {row["_step"]: metrics(row) for row in sent} == logged(run_dir)


def configuration(mode: str) -> schema.RunConfig:
    return run_config(tracking=schema.tracking_class()(wandb=WandbConfig(mode=WandbMode[mode])))


@pytest.mark.ci
def test_a_service_that_crashes_ends_wandb_and_not_the_run(tmp_path):
    crash = LAUNCH.replace(
        "tracker.samples(last",
        """import psutil, time
deadline = time.monotonic() + 60
while not (children := psutil.Process().children(recursive=True)) and time.monotonic() < deadline:
    time.sleep(0.1)
time.sleep(3)
for child in psutil.Process().children(recursive=True):
    child.kill()
time.sleep(1)
tracker.log(last + 1, {"loss": 0.0})
tracker.samples(last""",
    )
    began = time.monotonic()
    printed = launch(tmp_path / "run", program=crash, **{"from": 0, "to": 3})
    assert printed.count("warning: W&B is off for the rest of this run") == 1
    assert time.monotonic() - began < 120
    assert sorted(logged(tmp_path / "run")) == [0, 1, 2, 3, 4]


def test_a_disk_that_takes_no_more_warns_once(tmp_path, capsys):
    (tmp_path / "wandb").write_text("a file where W&B's folder should be")
    tracker = RunLog(configuration("offline"), tmp_path, resumed_at_step=None)
    for step in (1, 2, 3):
        tracker.log(step, {"loss": 1.0})
    tracker.finish("completed")
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    assert capsys.readouterr().out.count("warning: W&B is off for the rest of this run: FileExistsError") == 1


class Stuck:
    title = "W&B"
    rebuilds = False

    def start(self, past):
        time.sleep(60)


def test_a_tracker_that_hangs_holds_up_neither_a_step_nor_the_end():
    messages: list[str] = []
    began = time.monotonic()
    background = Background(Stuck(), lambda: iter(()), messages.append)
    for step in range(20_000):
        background.write(Row(step, {}, 0.0))
    background.finish("completed")
    background.wait(time.monotonic() + 0.2)
    assert time.monotonic() - began < 5
    assert messages == ["warning: W&B is off for the rest of this run: it is 10,000 rows behind"]


def test_disabled_never_imports_wandb(tmp_path):
    launch(tmp_path / "run", "disabled", program=LAUNCH + "\nassert 'wandb' not in sys.modules", **{"from": 0, "to": 1})
    assert not (tmp_path / "run" / "wandb").exists()
