"""`make gpu-report` rehearsed: every part runs through on the simulated device and leaves a report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_bench, gpu_cases, gpu_report
from dstune.trainer.callbacks.throughput import Throughput
from tests.gpu.test_report_cases import failures

ROOT = Path(__file__).parents[2]
NEEDS_A_DEVICE = {
    "half",
    "resume",
    "offload",
    "qlora",
    "trl_full_1_5b",
    "trl_lora_8b",
    "nccl",
    "ranks",
    "ulysses",
    "tensor",
}
"""Cases that say on a simulated device why they measure nothing."""


def test_every_case_is_in_one_part() -> None:
    named = [name for part in gpu_report.PARTS.values() for name in part]
    assert sorted(named) == sorted(set(named)) == sorted(gpu_cases.CASES)
    assert all(sum(part.values()) <= 540 for part in gpu_report.PARTS.values())


@pytest.mark.parametrize(
    ("torch", "arguments", "reason"),
    [
        ("", [], "torch cannot be imported"),
        ("", ["--simulate"], "torch cannot be imported"),
        ("__version__ = '2.13.0+cpu'\nclass cuda:\n    device_count = lambda: 0", [], "finds no GPU here"),
        ("__version__ = '2.13.0'\nclass cuda:\n    device_count = lambda: 2", ["--gpus", "8"], "finds 2 GPUs here"),
    ],
    ids=["no torch", "no torch to rehearse with", "no GPU", "too few GPUs"],
)
def test_what_no_case_can_do_without_is_said_once(
    tmp_path: Path, torch: str, arguments: list[str], reason: str
) -> None:
    (tmp_path / "torch.py").write_text(torch or "raise ModuleNotFoundError(\"No module named 'torch'\")")
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "gpu_report.py"),
        "1",
        "--out",
        str(tmp_path / "out"),
        *arguments,
    ]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 2
    said, fix = done.stderr.splitlines()
    assert said.startswith("gpu-report: ") and reason in said and fix.startswith("    fix: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.ci
@pytest.mark.parametrize("part", gpu_report.PARTS)
def test_a_part_on_the_simulated_device(tmp_path: Path, part: int) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_report.py"), str(part), "--simulate", "--out", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    lines = [json.loads(line) for line in (tmp_path / "out" / f"part-{part}.jsonl").read_text().splitlines()]
    assert [line["case"] for line in lines] == list(gpu_report.PARTS[part])
    wrong = [(line["case"], line["outcome"], line.get("last_lines")) for line in lines if line["outcome"] != "ok"]
    assert not wrong and done.returncode == 0, (wrong, done.stderr[-2000:])
    for line in lines:
        rows = line["rows"][1:]
        assert rows, line["case"]
        failed = [row["failed"] for row in rows if "failed" in row and row.get("way") is None]
        assert bool(failed) == (line["case"] in NEEDS_A_DEVICE) or line["case"] == "out_of_memory", (
            line["case"],
            failed,
        )
    report = (tmp_path / "out" / f"part-{part}.md").read_text()
    assert report.startswith(f"### dstune on a GPU, part {part}: simulated accelerator (8 GiB) (a rehearsal)")
    assert all(f"**{name}**: ok" in report for name in gpu_report.PARTS[part])


def test_what_was_measured_is_kept_and_not_measured_again_under_the_same_conditions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second case of a part is over its limit: the first one stays, and is not run again."""
    ran: list[str] = []

    def run_case(name: str, seconds: float, out: Path, options: object) -> dict[str, object]:
        ran.append(name)
        outcome = "ok" if name != "attention" else "over its 1 s"
        rows = [{"machine": "H100"}, {"ms": 1.25}] if name == "losses" else []
        return {
            "case": name,
            "seconds": 1,
            "outcome": outcome,
            "rows": rows,
            "conditions": gpu_report.conditions(options),
        }

    monkeypatch.setattr(gpu_report, "run_case", run_case)
    monkeypatch.setattr(gpu_report, "unmet_condition", lambda options: "")
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", "1", "--out", str(tmp_path)])
    assert gpu_report.main() == 1
    assert ran == list(gpu_report.PARTS[1])
    assert gpu_report.main() == 1
    assert ran[len(gpu_report.PARTS[1]) :] == ["attention"]
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", "1", "--out", str(tmp_path), "--simulate"])
    assert gpu_report.main() == 1
    assert ran[len(gpu_report.PARTS[1]) + 1 :] == list(gpu_report.PARTS[1])  # a rehearsal has no figures of a GPU
    report = (tmp_path / "part-1.md").read_text()
    assert "part 1: H100" in report and "| 1.25 |" in report and "**attention**: over its 1 s" in report


def test_the_report_has_what_a_run_has_written_of_itself(tmp_path: Path) -> None:
    """As callbacks and `environment.json` name it; without a known peak there is no utilisation."""
    rows = [{"step": 1, "loss": 2.5, "grad_norm": 1.0}, {"step": 1, "eval/loss": 2.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "environment.json").write_text(json.dumps({"kernels": {"attention": "varlen"}}))
    nobody: Any = None
    throughput = Throughput(nobody)
    throughput.timed = {"tokens": 100, "seconds": 2.0, "flops": 3.0, "capacity": 4.0}
    for expected in (0.75, None):
        ended = {"peak_memory_gib": 1.5, **throughput.results()}
        (tmp_path / "result.json").write_text(json.dumps(ended))
        found = gpu_bench.result(tmp_path)
        assert (found["utilization"], found["tokens_per_second"], found["losses"]) == (expected, 50.0, [2.5])
        throughput.timed["capacity"] = 0.0


def test_a_run_that_fails_within_a_case_fails_the_case_on_a_gpu() -> None:
    crashed = {"run": "importance", "failed": "RuntimeError: tensors on two devices"}
    for name, row in (("importance", crashed), ("attention", {"kernel": "torch 2.13 varlen", "failed": "no kernel"})):
        assert failures(name, [{"machine": "H100"}, row]) == [row]
    for name, row in (
        ("out_of_memory", {"run": "forced", "failed": "out of memory in training ... most first: zero=stage3"}),
        ("attention", {"kernel": "flash-attn 3", "failed": "undefined symbol"}),
        ("cross_entropy", {"way": "Liger", "failed": "not installed"}),
        ("ranks", {"run": "stage1", "failed": "needs several GPUs: GPUS=8"}),
    ):
        assert failures(name, [row]) == []
