"""The parsers of run directories, checkpoints, sweeps, other tools' configurations and what launchers print (`fuzz.py`)."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import yaml
from hypothesis import strategies as st

from benchmarks.fuzz_common import configuration, jsonl, later
from benchmarks.fuzz_inputs import (
    DATA_REPORT,
    ENVIRONMENT,
    LAUNCH,
    METRICS,
    RESULT,
    SAMPLES,
    damaged,
    fixed,
    json_file,
    like,
    lists,
    mapped,
    one_of,
    yaml_file,
    yaml_text,
)
from dstune.core.errors import UserError


def imported(content: bytes, folder: Path) -> None:
    from dstune.importing import convert as conversion
    from dstune.importing.files import read, tool_of

    file = folder / "config.yaml"
    file.write_bytes(content)
    raw = read(file)
    # Composing the experiment takes 100 times as long, and Hydra's parser is not ours: one in so many.
    composes = hash(content) % 50 == 0
    with mock.patch.object(conversion, "problems_of", conversion.problems_of if composes else lambda text: []):
        experiment = conversion.convert(raw, tool_of(raw, None, str(file)), file)
    yaml.safe_load(experiment.text)


def imported_script(content: bytes, folder: Path) -> None:
    from dstune.importing.files import read

    (folder / "train.sh").write_bytes(content)
    read(folder / "train.sh")


def deepspeed(name: str) -> Callable[[bytes, Path], None]:
    def parse(content: bytes, folder: Path) -> None:
        from dstune.config.deepspeed_file import read

        (folder / name).write_bytes(content)
        read(folder / name)

    return parse


def hostfile(content: bytes, folder: Path) -> None:
    from dstune.launch.host_slots import read_hostfile, select_slots

    (folder / "hostfile").write_bytes(content)
    text = content.decode("utf-8", "replace")
    hosts = read_hostfile(str(folder / "hostfile"))
    select_slots(hosts, text[:60] or None, None)


@cache
def run_yaml() -> dict[str, Any]:
    from dstune.config.convert import to_dict

    return {"format": 2, "dstune_version": "0.1", "overrides": ["a=b"], "config": to_dict(configuration())}


run_yaml_file = later(lambda: yaml_file(run_yaml()))


@cache
def good_run_yaml() -> bytes:
    return yaml_text(run_yaml())


run_files = fixed(
    {
        "launch.json": json_file(LAUNCH),
        "result.json": json_file(RESULT),
        "metrics.jsonl": one_of(mapped(lists(one_of(*map(like, METRICS)), 4), jsonl), damaged(jsonl(METRICS))),
        "samples.jsonl": mapped(lists(like(SAMPLES[0]), 3), jsonl),
        "environment.json": json_file(ENVIRONMENT),
        "data_report.json": json_file(DATA_REPORT),
        "run.yaml": one_of(run_yaml_file, st.builds(good_run_yaml)),
    }
)


def in_run(files: dict[str, bytes], folder: Path) -> Path:
    run = folder / "run"
    run.mkdir()
    for name, content in files.items():
        (run / name).write_bytes(content)
    return run


def records_of_run(files: dict[str, bytes], folder: Path) -> None:
    from dstune.launch import attempt, records
    from dstune.launch.manage import status_of

    run = in_run(files, folder)
    records.read_launch(run)
    records.read_result(run)
    records.read_metrics(run)
    status_of(run).to_json(run)
    attempt.judge_files(run, 2, "none")


def runs_verb(files: dict[str, bytes], folder: Path) -> None:
    from dstune.launch.runs import as_text, listed

    in_run(files, folder)
    lines = listed(folder)
    assert len(lines) == 1, "a bad directory is listed too"
    as_text(lines, [folder])


def report(files: dict[str, bytes], folder: Path) -> None:
    from dstune.report.page import write

    write([in_run(files, folder)], folder / "report.html")


def summary_of(files: dict[str, bytes], folder: Path) -> None:
    from dstune.launch.summary import summary

    summary(in_run(files, folder))


def sweep(files: dict[str, Any], folder: Path) -> None:
    from dstune.launch.runs import as_text, listed
    from dstune.report.sweep_page import write

    (folder / "trials").mkdir()
    (folder / "sweep.yaml").write_bytes(files["sweep.yaml"])
    for number, content in enumerate(files["trials"]):
        (folder / "trials" / f"t{number}.json").write_bytes(content)
    as_text(listed(folder), [folder])
    write(folder, folder / "sweep.html")


def stored_run(content: bytes, folder: Path) -> None:
    from dstune.config.convert import from_dict
    from dstune.config.run_file import read_run_content

    (folder / "run.yaml").write_bytes(content)
    from_dict(read_run_content(folder / "run.yaml")["config"], "run.yaml")


def checkpoint(files: dict[str, bytes], folder: Path) -> None:
    from dstune.checkpoint import store
    from dstune.trainer.state import TrainState

    place = folder / "checkpoints" / "step-00000003"
    place.mkdir(parents=True)
    for name, content in files.items():
        (place / name).write_bytes(content)
    store.listing(folder)
    store.newest(folder)
    # As if its marker were right.
    (place / "COMMITTED").write_text(json.dumps({"files": {"state.json": {"bytes": len(files["state.json"])}}}))
    store.listing(folder)
    store.damaged_files(place)
    saved = store.read_state(place).get("train")
    if isinstance(saved, dict):
        TrainState.from_dict(saved)


def rank_error(content: bytes, folder: Path) -> None:
    from dstune.launch.attempt import read_errors

    (folder / "logs").mkdir()
    (folder / "logs" / "rank-0.error").write_bytes(content)
    read_errors(folder, 1)


def slurm(output: str, folder: Path) -> None:
    from dstune.launch.slurm import jobs
    from dstune.protocols.launcher import Unreachable

    done = subprocess.CompletedProcess([], 0, output, "")
    with mock.patch.object(subprocess, "run", return_value=done), mock.patch.object(jobs, "require"):
        for call in (
            lambda: [str(job) for job in jobs.ask(["12", "12_3"])],
            lambda: jobs.submit(folder / "x", "#!/bin/sh\n", {}),
            lambda: jobs.probe(needed=False),
        ):
            try:
                call()
            except (UserError, Unreachable):
                continue


def probed(output: str, folder: Path) -> None:
    from dstune.launch.hosts import _facts, explain

    _facts(output)
    explain("host", 255, output)


def error_of(text: str) -> bytes:
    return json.dumps(
        {"type": text, "message": "m", "problems": [{"where": "w", "reason": "r", "fix": "f", "value": "v"}]}
    ).encode()
