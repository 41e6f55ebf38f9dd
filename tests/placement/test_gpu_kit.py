"""`make gpu-kit`: wheels for a machine without a network, rehearsed with another Python than the tests'."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks import gpu_kit, gpu_report, gpu_trace
from tests.support.tiny import save_decoder, write_dialogues

ROOT = Path(__file__).parents[2]
PYTHON = "/usr/bin/python3"
"""The distribution's newest. Its PyTorch is built for CPUs."""
NOT_REHEARSED = {"trl_lora_8b", "trl_full_1_5b", "half", "resume", "offload", "qlora"}
"""Cases that say on the simulated device why they measure nothing."""


def test_a_freeze_is_read() -> None:
    lines = ["# an image", "torch==2.11.0+cu130", "PyYAML", "hf_xet @ file:///wheels/x.whl", "", "-e git+x"]
    assert gpu_kit.read_present(lines) == {"torch": "2.11.0", "pyyaml": None, "hf-xet": None}


def test_what_is_too_old_for_dstune_is_brought() -> None:
    needed = [Requirement("transformers>=5.20,<6"), Requirement("peft>=0.18"), Requirement("torch>=2.6")]
    present = {"transformers": "5.17.0", "peft": None, "torch": "2.11.0"}
    assert gpu_kit.outdated(present, needed) == {"transformers"}


def test_small_packages_are_brought_where_they_may_be_too_old() -> None:
    present = {"torch": "2.11.0", "typing-extensions": "4.13.0", "tqdm": None, "pyarrow": None, "regex": "2026.11.19"}
    resolved = {
        "typing-extensions": "4.16.0",
        "tqdm": "4.70.1",
        "pyarrow": "26.0.1",
        "regex": "2026.1.1",
        "dill": "0.4.1",
    }
    brought = {name for name, version in resolved.items() if not gpu_kit.is_enough(name, version, present)}
    assert brought == {"typing-extensions", "tqdm", "dill"}
    assert gpu_kit.is_enough("nvidia-nccl-cu13", "2.28.9", present)


def test_a_command_fits_and_says_where_the_figures_go() -> None:
    line = gpu_kit.command(3, [Path("build/gpu-kit/wheels"), Path("build/gpu-kit/part-3")])
    assert len(line) < gpu_kit.COMMAND_CHARACTERS
    assert "build/gpu-kit/part-3/*.whl" in line and "gpu_report.py 3 --output" in line and "--no-index" in line


def test_a_kit_that_is_a_little_too_large_says_so_in_figures_that_differ() -> None:
    assert not gpu_kit.size_warning(50.0)
    assert "warning: 50.1 MiB is more than the 50 MiB" in gpu_kit.size_warning(50.01)


def test_libraries_for_other_cuda_versions_are_left_out(tmp_path: Path) -> None:
    wheel = tmp_path / "x-1-py3-none-any.whl"
    names = ["x/a_cuda118.so", "x/a_cuda130.so", "x/a_rocm70.so", "x/a_cpu.so", "x/__init__.py"]
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    gpu_kit.drop_other_accelerators(wheel, ["torch", "nvidia-cudnn-cu13"])
    assert zipfile.ZipFile(wheel).namelist() == ["x/a_cuda130.so", "x/a_cpu.so", "x/__init__.py"]


def event(name: str, begin: float, end: float, stream: int = 7, category: str = "kernel") -> dict:
    return {"ph": "X", "cat": category, "name": name, "ts": begin, "dur": end - begin, "args": {"stream": stream}}


def test_a_trace_says_what_is_idle_and_what_overlaps() -> None:
    step = {"ph": "X", "cat": "user_annotation", "name": "optimizer step 3", "ts": 0.0, "dur": 100.0}
    events = [
        step,
        event("flash_fwd", 0, 20),
        event("cutlass_gemm", 20, 60),
        event("vectorized_elementwise", 70, 80),
        event("Memcpy DtoD", 50, 75, stream=9, category="gpu_memcpy"),
    ]
    rows = list(gpu_trace.summarize({"traceEvents": events}))
    shares = {row["kind"]: row["share_of_step"] for row in rows if "kind" in row}
    assert shares == pytest.approx(
        {"products of matrices": 0.4, "copies": 0.25, "attention": 0.2, "elementwise and other": 0.1, "idle": 0.2}
    )
    [side] = [row for row in rows if "stream" in row]
    assert side == pytest.approx({"stream": 9, "share_of_step": 0.25, "beside_the_main_stream": 15 / 25})
    assert list(gpu_trace.summarize({"traceEvents": [step]})) == [{"trace": "no kernels on a device were recorded"}]


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_the_kit_alone_runs_all_three_parts(tmp_path: Path) -> None:
    """On a machine that has this environment's PyTorch and nothing else: resolved, installed without an index, simulated."""
    machine, version = tmp_path / "machine", ".".join(map(str, sys.version_info[:2]))
    subprocess.run([sys.executable, "-m", "venv", str(machine)], check=True)
    present = lend_packages(["torch", "numpy"], machine / "lib" / f"python{version}" / "site-packages")
    folders = gpu_kit.fill(tmp_path / "kit", version, present)
    for part, wheels in folders.items():
        done = run_command(
            tmp_path, gpu_kit.command(part, wheels, str(machine / "bin" / "python"), " --simulate --out report")
        )
        cases = measured(tmp_path / f"gpu-part-{part}.tar.gz", part)
        assert [case["case"] for case in cases] == list(gpu_report.PARTS[part])
        problems = [
            (case["case"], case["outcome"], case.get("last_lines")) for case in cases if case["outcome"] != "ok"
        ]
        assert not problems and done.returncode == 0, (problems, done.stderr[-2000:])
        for case in cases:
            failed = [row for row in case["rows"] if "failed" in row and "way" not in row and "kernel" not in row]
            assert not failed or case["case"] in NOT_REHEARSED | {"out_of_memory"}, failed


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_kit_for_another_python_trains_there(tmp_path: Path) -> None:
    """The distribution's newest Python and its PyTorch, on the CPU: the simulated device needs a newer PyTorch."""
    probe = "import sys, torch, ensurepip; print('.'.join(map(str, sys.version_info[:2])))"
    probed = subprocess.run([PYTHON, "-c", probe], capture_output=True, text=True)
    if probed.returncode:
        pytest.skip(f"{PYTHON} has no PyTorch (Debian: apt-get install python3-torch python3-venv)")
    version = probed.stdout.strip()
    assert version != ".".join(map(str, sys.version_info[:2])), "this test is about another Python than its own"
    machine = tmp_path / "machine"
    subprocess.run([PYTHON, "-m", "venv", "--system-site-packages", str(machine)], check=True)
    python = str(machine / "bin" / "python")
    freeze = subprocess.run([python, "-m", "pip", "freeze", "--all"], capture_output=True, text=True, check=True).stdout
    folders = gpu_kit.fill(tmp_path / "kit", version, gpu_kit.read_present(freeze.splitlines()))
    model, data = save_decoder(tmp_path / "model"), write_dialogues(tmp_path / "rows.jsonl", 20)
    install, _, _ = gpu_kit.command(1, folders[1], python).partition(" && ")
    words = f"data=files model.path={model} data.train={data} data.max_length=64 trainer.max_steps=2 launch.processes=1"
    rank = f"{python} benchmarks/gpu_run.py {tmp_path}/run --cpu {words} zero=stage2 run.export=none"
    train = f"PYTHONPATH=$TMPDIR/dstune-kit-1 {rank}"
    done = run_command(tmp_path, f"{install} && {train}")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 2


def lend_packages(names: list[str], site: Path) -> dict[str, str | None]:
    """Link packages of this environment, and what they require, into another one; their versions."""
    lent: dict[str, str | None] = {}
    pending = list(names)
    while pending:
        name = canonicalize_name(pending.pop())
        if name in lent:
            continue
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # of another platform
        lent[name] = distribution.version.partition("+")[0]
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(distribution.locate_file(top))))
        needed = map(Requirement, distribution.requires or ())
        pending += [one.name for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    return lent


def run_command(folder: Path, line: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "OUT": str(folder), "TMPDIR": str(folder)}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(["bash", "-c", line], cwd=checkout(folder), env=environment, capture_output=True, text=True)


def measured(archive: Path, part: int) -> list[dict]:
    with tarfile.open(archive) as opened:
        member = opened.extractfile(f"part-{part}.jsonl")
        assert member is not None
        return [json.loads(line) for line in member.read().splitlines()]


def checkout(folder: Path) -> Path:
    """A copy of what git would take to the machine."""
    copy = folder / "checkout"
    if not copy.exists():
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
        )
        for name in listed.stdout.splitlines():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).is_file():
                shutil.copy(ROOT / name, copy / name)
    return copy
