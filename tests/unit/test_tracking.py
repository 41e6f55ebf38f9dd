"""What a run leaves behind for its reader: files that survive a crash and a resume, console lines, the W&B run."""

import io
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dstune.config import schema
from dstune.tracking import log as tracking
from dstune.tracking.console import Console
from dstune.tracking.jsonl import JsonLines
from dstune.tracking.wandb_sink import without_secrets


def configuration(**tracking_changes) -> schema.RunConfig:
    return schema.RunConfig(
        model=schema.ModelConfig(),
        data=schema.DataConfig(),
        task=schema.ChatConfig(),
        method=schema.LoraConfig(),
        optimizer=schema.AdamWConfig(),
        schedule=schema.CosineConfig(),
        zero=schema.ZeroConfig(),
        trainer=schema.TrainerConfig(),
        checkpoint=schema.CheckpointConfig(),
        evaluate=schema.EvaluateConfig(),
        launch=schema.LocalConfig(),
        tracking=schema.TrackingConfig(**tracking_changes),
        run=schema.RunSection(name="trial"),
    )


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# -- files ------------------------------------------------------------------------------------------------------------


def test_rows_are_in_the_file_before_the_run_ends(tmp_path):
    tracker = tracking.Tracker(configuration(), tmp_path, resumed_at_step=None)
    tracker.log(1, {"epoch": 0.5, "loss": np.float32(2.5), "lr": 1e-4, "tokens": np.int64(7)})
    assert rows(tmp_path / "metrics.jsonl") == [{"step": 1, "epoch": 0.5, "loss": 2.5, "lr": 1e-4, "tokens": 7}]
    tracker.finish("completed")
    tracker.finish("completed")


def test_a_resume_keeps_rows_up_to_its_checkpoint_only(tmp_path):
    for name in ("metrics.jsonl", "samples.jsonl"):
        # The last line was torn by the crash; the one before it lies after the checkpoint.
        (tmp_path / name).write_text('{"step": 0}\n{"step": 4}\n{"step": 5}\n{"step": 4, "los')
    tracker = tracking.Tracker(configuration(), tmp_path, resumed_at_step=4)
    tracker.log(5, {"loss": 1.0})
    tracker.samples(5, [{"prompt": "p", "reference": "r", "answer": "a", "tokens": 3}])
    tracker.finish("completed")
    assert rows(tmp_path / "metrics.jsonl") == [{"step": 0}, {"step": 4}, {"step": 5, "loss": 1.0}]
    assert rows(tmp_path / "samples.jsonl")[2:] == [{"step": 5, "prompt": "p", "reference": "r", "answer": "a"}]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "samples.jsonl"]


def test_a_start_from_nothing_drops_what_an_attempt_without_checkpoint_wrote(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
    tracking.Tracker(configuration(), tmp_path, resumed_at_step=None).finish("completed")
    assert rows(tmp_path / "metrics.jsonl") == []


def test_a_block_of_zeros_is_not_a_row(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + b"\0" * 40 + b"\n" + b'{"step": 2}\n')
    JsonLines(path, keep_until=9).close()
    assert rows(path) == [{"step": 1}, {"step": 2}]


def test_a_value_that_is_not_finite_is_null(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl", keep_until=None)
    lines.append({"step": 1, "loss": float("nan"), "grad_norm": np.float32("inf")})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON")) == {
        "step": 1,
        "loss": None,
        "grad_norm": None,
    }


# -- console ----------------------------------------------------------------------------------------------------------

METRICS = {
    "loss": 2.34567,
    "lr": 1.5e-5,
    "grad_norm": 1.0,
    "tokens_per_second": 1234.5,
    "peak_memory_gib": 1.25,
    "step_seconds": 2.0,
}


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


def console(monkeypatch, clock, kind):
    monkeypatch.setenv("DSTUNE_CONSOLE", kind)
    stream = io.StringIO()
    return Console(stream, clock), stream


def test_plain_lines_come_first_last_and_every_ten_seconds(monkeypatch, clock):
    shown, stream = console(monkeypatch, clock, "plain")
    for step in range(1, 21):
        shown.progress(step, 20, METRICS)
        clock.now += 2.0
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/20", "6/20", "11/20", "16/20", "20/20"]
    # Steps take two seconds: 19 are left after the first.
    assert lines[0] == "step  1/20  loss 2.3457  lr 1.50e-05  1,234 tokens/s  1.25 GiB  0:38 left"
    assert lines[-1].endswith("0:00 left")
    assert "\r" not in stream.getvalue()


def test_terminal_lines_are_drawn_over_and_cleared(monkeypatch, clock):
    shown, stream = console(monkeypatch, clock, "tty:120")
    shown.progress(10, 40, METRICS)
    clock.now += 1
    shown.progress(11, 40, METRICS)
    shown.evaluation(11, {"eval/loss": 2.0, "eval/seconds": 0.5})
    shown.close()
    first, second, erased, rest = stream.getvalue().split("\r")
    assert first.startswith("10/40 [#####---------------] loss 2.3457")
    assert {len(first), len(second), len(erased)} == {119}
    assert not erased.strip(), "the evaluation would be written over a longer line"
    assert rest == "step 11  evaluation  loss 2.0000  seconds 0.5000\n"


@pytest.mark.parametrize("width", [20, 60, 80])
def test_a_terminal_line_never_wraps(monkeypatch, clock, width):
    shown, stream = console(monkeypatch, clock, f"tty:{width}")
    shown.progress(1, 1000, METRICS)
    shown.close()
    assert {len(line) for line in stream.getvalue().split("\r") if line} == {width - 1}


def test_a_fast_run_draws_at_most_ten_times_a_second(monkeypatch, clock):
    shown, stream = console(monkeypatch, clock, "tty:80")
    for step in range(1, 1001):
        clock.now += 0.001
        shown.progress(step, 1000, METRICS)
    assert 5 <= stream.getvalue().count("\r") <= 13


def test_time_left_counts_what_happens_between_steps(monkeypatch, clock):
    shown, stream = console(monkeypatch, clock, "plain")
    shown.progress(1, 4, METRICS | {"step_seconds": 0.0})
    clock.now += 3600.0
    shown.progress(2, 4, METRICS)
    assert stream.getvalue().splitlines()[-1].endswith("1:00:00 left")


def test_a_skipped_step_says_so(monkeypatch, clock):
    shown, stream = console(monkeypatch, clock, "plain")
    shown.progress(1, 4, METRICS | {"skipped": "nonfinite"})
    assert "skipped (nonfinite)" in stream.getvalue()


def test_evaluation_rows_are_shown_and_training_rows_are_not(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("DSTUNE_CONSOLE", "plain")
    tracker = tracking.Tracker(configuration(), tmp_path, resumed_at_step=None)
    tracker.log(3, METRICS)
    tracker.log(3, {"eval/loss": 1.5, "eval/perplexity": 4.4817})
    tracker.finish("completed")
    assert capsys.readouterr().out == "step 3  evaluation  loss 1.5000  perplexity 4.4817\n"


# -- W&B --------------------------------------------------------------------------------------------------------------

OFFLINE_RUN = """
import json, sys
from pathlib import Path
sys.path.insert(0, "tests/unit")
from test_tracking import METRICS, configuration
from dstune.config import schema
from dstune.tracking.log import Tracker

run_dir, resumed, mode = Path(sys.argv[1]), json.loads(sys.argv[2]), schema.WandbMode[sys.argv[3]]
config = configuration(project="proj", group="grp", tags=["x", "y"], wandb=schema.WandbConfig(mode=mode))
tracker = Tracker(config, run_dir, resumed_at_step=resumed)
first = (resumed or 0) + 1
tracker.log(first, METRICS)
tracker.log(first, {"eval/loss": 2.0})
tracker.log(first + 1, METRICS | {"loss": float("nan")})
tracker.samples(first + 1, [{"prompt": "ask", "reference": "right", "answer": "said"}])
tracker.summary({"status": "completed", "steps": first + 1})
tracker.finish("completed")
"""


def run_offline(run_dir: Path, home: Path, resumed=None, mode="offline", program=OFFLINE_RUN, **variables: str) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    finished = subprocess.run(
        [sys.executable, "-c", program, str(run_dir), json.dumps(resumed), mode],
        cwd=Path(__file__).parents[2],
        env=environment | {"HOME": str(home)} | variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout
    return finished.stdout


def records(path: Path) -> list:
    """The records of a W&B transaction log: LevelDB's log format (blocks of 32 KiB, chunks of crc, length, type)."""
    from wandb.proto import wandb_internal_pb2

    data, position, parts, found = path.read_bytes(), 7, [], []
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        left_in_block = 32768 - position % 32768
        if left_in_block < 7:
            position += left_in_block
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        parts.append(data[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last chunk of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(b"".join(parts))
            found.append(record)
            parts = []
    return found


def history(found: list) -> dict[int, dict]:
    table = {}
    for record in found:
        if record.HasField("history"):
            items = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            row = {key: json.loads(value) for key, value in items.items()}
            assert row["_step"] not in table, "one row a step"
            table[row["_step"]] = row
    return table


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """One offline run in two launches: what was printed, and the records of each."""
    base = tmp_path_factory.mktemp("wandb")
    run_dir = base / "run"
    run_dir.mkdir()
    printed = run_offline(run_dir, base / "home")
    printed += run_offline(run_dir, base / "home", resumed=2)
    logs = sorted(run_dir.glob("wandb/offline-run-*/*.wandb"))
    return base, printed, [records(path) for path in logs]


def test_wandb_gets_each_metric_once(offline):
    first, second = (history(found) for found in offline[2])
    metrics = {key: value for key, value in first[1].items() if not key.startswith("_")}
    assert metrics == METRICS | {"eval/loss": 2.0}
    assert first[2]["loss"] is None
    assert sorted(first) == [1, 2] and sorted(second) == [3, 4]
    path = next((offline[0] / "run").glob(f"wandb/offline-run-*/files/{first[2]['samples/path']}"))
    assert json.loads(path.read_text()) == {
        "columns": ["prompt", "reference", "answer"],
        "data": [["ask", "right", "said"]],
    }


def test_wandb_knows_the_run_and_keeps_its_identity(offline):
    runs = [record.run for found in offline[2] for record in found if record.HasField("run")]
    assert {(run.project, run.run_group, run.display_name, tuple(run.tags)) for run in runs} == {
        ("proj", "grp", "trial", ("x", "y"))
    }
    assert {run.run_id for run in runs} == {(offline[0] / "run" / "wandb-id").read_text()}
    config = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert config["method"]["rank"] == 16 and config["tracking"]["wandb"]["mode"] == "offline"


def test_wandb_gets_the_summary_and_nothing_about_the_machine(offline):
    summary = {}
    for record in offline[2][0]:
        for item in record.summary.update if record.HasField("summary") else ():
            summary["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
        assert not record.HasField("stats") and not record.HasField("output") and not record.HasField("output_raw")
        assert not record.HasField("environment")
    assert summary["status"] == "completed" and summary["steps"] == 2
    names = {path.name for path in (offline[0] / "run").glob("wandb/offline-run-*/files/**/*")}
    assert not names & {"wandb-metadata.json", "requirements.txt", "output.log"}


def test_wandb_says_nothing_and_leaves_the_home_alone(offline):
    assert "wandb" not in offline[1].lower() and "W&B" not in offline[1]
    home = offline[0] / "home"
    assert [path for path in home.rglob("*") if path.is_file()] == []


def test_online_without_a_key_goes_on_offline(tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    printed = run_offline(run_dir, tmp_path / "home", mode="online")
    assert printed.count("warning: no W&B key found") == 1
    assert len(list(run_dir.glob("wandb/offline-run-*/*.wandb"))) == 1


def test_a_failing_wandb_warns_once_and_is_off(monkeypatch, tmp_path, capsys):
    import wandb

    class Broken:
        step = 0

        def log(self, *_, **__):
            raise RuntimeError("the service died\nwith details")

    monkeypatch.setattr(wandb, "init", lambda **_: Broken())
    config = configuration(wandb=schema.WandbConfig(mode=schema.WandbMode.offline))
    tracker = tracking.Tracker(config, tmp_path, resumed_at_step=None)
    for step in (1, 2, 3):
        tracker.log(step, {"loss": 1.0})
    tracker.samples(3, [{"prompt": "p"}])
    tracker.summary({"status": "completed"})
    tracker.finish("completed")
    assert len(rows(tmp_path / "metrics.jsonl")) == 3
    assert capsys.readouterr().out == "warning: W&B is off for the rest of this run: RuntimeError: the service died\n"


def test_a_wandb_that_does_not_start_is_off(monkeypatch, tmp_path, capsys):
    import wandb

    def refuse(**_):
        raise wandb.errors.CommError("no route to host")

    monkeypatch.setattr(wandb, "init", refuse)
    config = configuration(wandb=schema.WandbConfig(mode=schema.WandbMode.offline))
    tracker = tracking.Tracker(config, tmp_path, resumed_at_step=None)
    tracker.log(1, {"loss": 1.0})
    tracker.finish("failed")
    assert "CommError: no route to host" in capsys.readouterr().out


def test_a_server_that_does_not_answer_leaves_an_offline_run(tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    unreachable = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    impatient = "from dstune.tracking import wandb_sink; wandb_sink.INIT_TIMEOUT_SECONDS = 3.0\n" + OFFLINE_RUN
    printed = run_offline(run_dir, tmp_path / "home", mode="online", program=impatient, **unreachable)
    assert printed.count("warning: W&B's server does not answer") == 1
    assert "wandb:" not in printed
    (path,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    assert sorted(history(records(path))) == [1, 2]


def test_a_resumed_online_run_skips_what_the_server_has(monkeypatch, tmp_path):
    import wandb

    sent = []

    class Resumed:
        step = 6  # the server's next step

        def log(self, metrics, step):
            sent.append((step, metrics))

        def finish(self, exit_code):
            sent.append(("finish", exit_code))

        def mark_preempting(self):
            sent.append("preempting")

    asked = {}
    monkeypatch.setattr(wandb, "init", lambda **given: asked.update(given) or Resumed())
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    config = configuration(wandb=schema.WandbConfig(mode=schema.WandbMode.online))
    tracker = tracking.Tracker(config, tmp_path, resumed_at_step=4)
    for step in (5, 6):
        tracker.log(step, {"loss": float(step)})
    tracker.finish("preempted")
    assert sent == [(6, {"loss": 6.0}), "preempting", ("finish", 1)]
    assert asked["resume"] == "allow" and asked["settings"].mode == "online"


def test_disabled_never_imports_wandb(tmp_path):
    program = OFFLINE_RUN + "\nassert 'wandb' not in sys.modules"
    environment = os.environ | {"HOME": str(tmp_path)}
    command = [sys.executable, "-c", program, str(tmp_path), "null", "disabled"]
    subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, check=True, timeout=60)


def test_values_from_the_environment_do_not_reach_wandb():
    config = {"a": "${oc.env:TOKEN}", "b": {"c": ["x", "${oc.env:KEY,none}"], "d": 1}, "e": "prefix-${oc.env:SECRET}"}
    assert without_secrets(config) == {"b": {"c": ["x"], "d": 1}}
