"""`dstune doctor`: verdicts on figures, checks of this machine, its table and its JSON."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from types import ModuleType

import pytest

from dstune.launch import attempt, checks, doctor
from dstune.launch.checks import FAIL, PASS, SKIP, WARN, Check
from dstune.launch.openmpi import nodes
from dstune_verify.known_faults import KNOWN


def figures(device="NVIDIA H100 80GB HBM3", ranks=8, hosts=("a",), bandwidth=400.0, sockets=False, wrong=()):
    rows = [{"bytes": 2**24, "seconds": 1.0, "bus_gb_per_second": bandwidth / 2 if ranks > 1 else None}]
    rows.append({"bytes": 2**30, "seconds": 1.0, "bus_gb_per_second": bandwidth if ranks > 1 else None})
    found = {"latency_seconds": 3e-5, "sizes": rows, "ranks": ranks, "hosts": list(hosts), "device": device}
    return found | {"nccl_over_sockets": sockets, "wrong": list(wrong)}


@pytest.mark.parametrize(
    ("found", "status", "detail"),
    [
        (figures(), PASS, "bus bandwidth 400.00 GB/s"),
        (figures(bandwidth=359), WARN, "the link of a NVIDIA H100 80GB HBM3 has 450 GB/s"),
        (
            figures(device="CPU", bandwidth=1.5, ranks=2),
            PASS,
            "2 ranks on 1 host: bus bandwidth 1.50 GB/s, latency 30 us",
        ),
        (figures(hosts=("a", "b"), bandwidth=40), PASS, "8 ranks on 2 hosts"),
        (figures(hosts=("a", "b"), bandwidth=4, sockets=True), WARN, "NCCL uses TCP sockets"),
        (figures(ranks=1), PASS, "nothing to measure"),
    ],
)
def test_the_measured_bandwidth_is_compared_with_the_link(found, status, detail):
    check = doctor.judge(found)
    assert check.status == status
    assert detail in check.detail
    assert bool(check.fix) == (status == WARN)


def test_a_wrong_sum_fails_whatever_the_bandwidth():
    check = doctor.judge(figures(wrong=["rank 1: 1,023 float32: 1 wrong value, the first at 7: 3, expected 5"]))
    assert check.status == FAIL
    assert "8 ranks on 1 host: wrong sums: rank 1: 1,023 float32" in check.detail
    assert "dstune verify --cases collective" in check.fix


def case(name, status="right", fault="", remedy=""):
    known = {"name": fault, "remedy": remedy} if fault else None
    return {"case": name, "status": status, "detail": "error 0.7" if status != "right" else "", "known": known}


@pytest.mark.parametrize(
    ("cases", "status", "detail", "fix"),
    [
        ([case("a"), case("b")], PASS, "2 right", ""),
        ([case("a"), case("b", "wrong", "clipping-default")], PASS, "1 right; 1 known faults", ""),
        ([case("a"), case("b", "wrong")], FAIL, "1 right, 1 wrong. b: error 0.7", "`dstune verify` shows more"),
        ([case("b", "wrong", "zero2-accumulation", "upgrade DeepSpeed")], FAIL, "b: error 0.7", "upgrade DeepSpeed"),
        ([case("a"), case("b", "crashed")], WARN, "1 right, 1 crashed. b: error 0.7", "`dstune verify` shows more"),
    ],
)
def test_gradients_are_judged_by_the_cases_of_verify(cases, status, detail, fix):
    check = doctor.judge_gradients(cases)
    assert (check.status, check.fix) == (status, fix)
    assert detail in check.detail


def test_faults_that_runs_avoid_are_known_ones():
    assert set(doctor.AVOIDED) <= {fault.name for fault, _ in KNOWN}


def test_a_failed_check_is_the_exit_code_and_has_its_fix(capsys, monkeypatch):
    found = [Check("a", PASS, "fine"), Check("b", FAIL, "broken", "repair it"), Check("c", WARN, "slow", "faster")]
    monkeypatch.setattr(doctor, "_checks", lambda *_: iter(found))
    assert doctor.main([]) == 1
    printed = capsys.readouterr().out
    assert "FAIL  b" in printed and "fix: repair it" in printed and "3 checks: 1 failed, 1 warning" in printed
    assert doctor.main(["--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert result == {"ok": False, "checks": [vars(check) for check in found]}
    found[1] = Check("b", SKIP, "absent")
    assert doctor.main([]) == 0


def test_an_import_that_takes_too_long_is_a_failed_check(monkeypatch):
    def run(*arguments, timeout=None, **more):
        raise subprocess.TimeoutExpired(arguments[0], timeout)

    monkeypatch.setattr(subprocess, "run", run)
    last = list(checks.software())[-1]
    assert (last.name, last.status) == ("PyTorch", FAIL)
    assert "more than 900 s" in last.detail and last.fix


def test_an_import_on_a_loaded_machine_is_slow_and_does_not_fail(monkeypatch):
    seconds = iter([0.0, 130.0])
    facts = {"gpus": [], "cuda_build": None, "ops": {}, "kernels": {}}
    done = subprocess.CompletedProcess([], 0, "FOUND " + json.dumps(facts), "")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **more: done)
    monkeypatch.setattr(checks.time, "monotonic", lambda: next(seconds))
    found = {check.name: check for check in checks.software()}
    assert found["start of Python"].status == WARN and "took 130 s" in found["start of Python"].detail
    assert found["PyTorch"].status == PASS


def test_operators_that_ask_for_a_cuda_toolkit_are_not_a_broken_deepspeed(monkeypatch, capsys):
    """A wheel of torch for CUDA brings no nvcc, and several of DeepSpeed's builders raise without."""

    class Raises:
        def is_compatible(self, verbose):
            raise RuntimeError("CUDA_HOME does not exist, unable to compile CUDA op(s)")

    stub = ModuleType("all_ops")
    stub.ALL_OPS = {"fp_quantizer": Raises(), "nothing": None}
    monkeypatch.setitem(sys.modules, "deepspeed.ops.op_builder.all_ops", stub)
    monkeypatch.setattr("dstune.models.kernels.of_machine", dict)
    exec(checks.INSIDE, {})
    logging.disable(logging.NOTSET)
    found = json.loads(capsys.readouterr().out.partition("FOUND ")[2])
    assert found["ops"] == {"fp_quantizer": False} and "deepspeed_error" not in found


def test_places_without_permission_or_room(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DSTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", "/proc/no-such-place")
    monkeypatch.setattr(os, "access", lambda place, mode: not str(place).startswith("/proc"))
    found = {check.name: check for check in checks.places()}
    assert found["runs"].status in (PASS, WARN)
    assert found["hub cache"].status == FAIL
    assert "HF_HOME" in found["hub cache"].fix
    monkeypatch.setattr(checks, "FREE_GIB", 10**9)
    assert {check.name: check.status for check in checks.places()}["cache"] == WARN


def test_the_hub_and_few_open_files(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert {check.name: check.status for check in checks.network(hub=True)}["hub"] == WARN
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert {check.name: check.status for check in checks.network(hub=True)}["hub"] == SKIP
    monkeypatch.setattr("resource.getrlimit", lambda _: (1024, 4096))
    few = next(check for check in checks.machine(several_nodes=False) if check.name == "open files")
    assert (few.status, few.fix) == (WARN, "ulimit -n 65536")


def test_a_launcher_that_is_requested_and_missing_fails(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(nodes, "mpirun_path", lambda _: "/usr/bin/mpirun")
    assert {check.name: check.status for check in checks.launchers(needed="local")}["slurm"] == SKIP
    assert {check.name: check.status for check in checks.launchers(needed="slurm")}["slurm"] == FAIL
    assert {check.name: check.status for check in checks.launchers(needed="hostfile")}["hostfile"] == FAIL


def test_what_never_ran_on_databricks_says_so(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda package: "4.2")
    for room in ("lakehouse.spark", "tracking.trackers.mlflow"):
        monkeypatch.setattr(f"dstune.{room}.find_spec", lambda name: name)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setenv("JAVA_HOME", "/java")
    found = {check.name: check for check in (*checks.launchers(needed=""), *checks.trackers(), *checks.data_sources())}
    for name in ("spark", "mlflow", "delta"):
        assert (
            found[name].status == PASS and "never" in found[name].detail and "Databricks itself" in found[name].detail
        )
    for room in ("lakehouse.spark", "tracking.trackers.mlflow"):
        monkeypatch.setattr(f"dstune.{room}.find_spec", lambda name: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for check in (*checks.trackers(), *checks.data_sources()):
        assert check.name == "W&B" or (check.status == SKIP and check.fix.startswith("pip install"))


def test_who_waited_for_whom(tmp_path):
    """The last words of the watchdogs of a launch, joined."""
    (tmp_path / "logs").mkdir()
    words = "dstune: rank {} made no progress for 3 s (trainer.stall_seconds) in step 7: it {}; the stacks of its threads:\n"
    states = {
        0: "waits in the collective all_gather",
        2: "waits in the collective all_gather",
        3: "is in read (files.py:7)",
    }
    for rank, state in states.items():
        (tmp_path / "logs" / f"rank-{rank}.log").write_text("earlier\n" + words.format(rank, state) + "File x\n")
    (tmp_path / "logs" / "rank-1.log").write_text(words.format(1, "waits in the collective barrier"))
    # Rank 1 has written nothing in this launch.
    starts = {
        0: 0,
        1: (tmp_path / "logs" / "rank-1.log").stat().st_size,
        2: 0,
        3: 0,
    }
    assert attempt.stalled(tmp_path, 4, starts) == (
        "ranks 0, 2 waited in the collective all_gather (step 7); rank 3 was in read (files.py:7); "
        "rank 1 did not come to it and said nothing"
    )
    assert attempt.stalled(tmp_path, 2, {0: 10**6, 1: 10**6}) == ""
