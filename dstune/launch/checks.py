"""The checks of `dstune doctor` on this machine. Each yields its findings, with a fix if something is wrong."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from dstune.core.child_python import child_environment
from dstune.core.errors import UserError
from dstune.core.paths import cache_root
from dstune.launch import node_health, probe
from dstune.launch.commands import count_cores, free_port
from dstune.protocols import DATA_SOURCES, LAUNCHERS, TRACKERS
from dstune.protocols.launcher import FAIL, PASS, SKIP, WARN, Check

GIB = 2**30
FREE_GIB = 20
SLOW_SECONDS, MOST_SECONDS = 90, 900
"""An import of torch and DeepSpeed that takes longer than the first gets a warning; after the second it is given up."""

INSIDE = """
import json, sys
found = {}

def compiles(builder):
    try:
        return bool(builder.is_compatible(verbose=False))
    except Exception:  # some ask for the CUDA toolkit, which a machine that only trains does not need
        return False

try:
    import torch
    from dstune.zero import accelerator
    found |= {"cuda_build": torch.version.cuda or torch.version.hip, "gpus": [], "kind": accelerator.kind()}
    for number in range(accelerator.count()):
        free, total = accelerator.memory(torch.device(accelerator.kind(), number))
        found["gpus"].append([accelerator.name(number), free, total])
    if torch.cuda.is_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    found["rocm"] = bool(torch.version.hip)
except Exception as error:
    found["torch_error"] = f"{type(error).__name__}: {error}"
try:
    import contextlib, io, logging
    logging.disable(logging.CRITICAL)
    with contextlib.redirect_stdout(io.StringIO()):
        import deepspeed
        from deepspeed.ops.op_builder.all_ops import ALL_OPS
        found["ops"] = {name: compiles(builder) for name, builder in ALL_OPS.items() if builder}
except Exception as error:
    found["deepspeed_error"] = f"{type(error).__name__}: {error}"
try:
    from dstune.models import kernels
    found["kernels"] = kernels.of_machine()
except Exception as error:
    found["kernels_error"] = f"{type(error).__name__}: {error}"
print("FOUND " + json.dumps(found))
"""
"""Code that runs in a separate process, because importing torch and DeepSpeed takes seconds and may crash."""


SHOWS_USERS = {"cuda": "nvidia-smi", "ROCm": "rocm-smi", "xpu": "xpu-smi", "hpu": "hl-smi"}
"""By accelerator, the program that comes with it."""


def software() -> Iterator[Check]:
    """Yield Python, the packages that dstune needs in their ranges, PyTorch with its devices, DeepSpeed with its operators."""
    enough = sys.version_info >= (3, 11)
    fix = "" if enough else "install Python 3.11 or newer"
    yield Check("Python", PASS if enough else FAIL, f"{platform.python_version()} at {sys.executable}", fix)
    yield from _packages()
    env = {name: value for name, value in child_environment().items() if not name.startswith("PYTHONWARNINGS")}
    began, slow_fix = time.monotonic(), "is Python on a slow network disk, or the machine busy?"
    try:
        done = subprocess.run(
            [sys.executable, "-c", INSIDE], capture_output=True, text=True, timeout=MOST_SECONDS, env=env
        )
    except subprocess.TimeoutExpired:
        yield Check("PyTorch", FAIL, f"importing it and DeepSpeed took more than {MOST_SECONDS} s", slow_fix)
        return
    if (seconds := time.monotonic() - began) > SLOW_SECONDS:
        yield Check("start of Python", WARN, f"importing PyTorch and DeepSpeed took {seconds:.0f} s", slow_fix)
    line = next((line for line in done.stdout.splitlines() if line.startswith("FOUND ")), "")
    if not line:
        last = next(iter(done.stderr.strip().splitlines()[::-1]), f"exit code {done.returncode}")
        yield Check("PyTorch", FAIL, f"importing it crashes: {last}", "reinstall torch for this machine")
        return
    facts = json.loads(line.removeprefix("FOUND "))
    yield from _torch(facts)
    yield from _operators(facts)
    if "kernels" in facts:
        yield Check(
            "kernels",
            PASS,
            "; ".join(f"{name.replace('_', ' ')}: {kernel}" for name, kernel in facts["kernels"].items()),
        )
    elif "kernels_error" in facts:
        yield Check("kernels", FAIL, facts["kernels_error"], "reinstall torch and transformers")


def _packages() -> Iterator[Check]:
    from packaging.requirements import Requirement

    try:
        needed = [Requirement(text) for text in importlib.metadata.requires("dstune") or []]
    except importlib.metadata.PackageNotFoundError:
        yield Check("packages", WARN, "dstune runs from a checkout and is not installed", "pip install --editable .")
        return
    wrong = []
    names = [need for need in needed if need.marker is None or need.marker.evaluate({"extra": ""})]
    for need in names:
        try:
            version = importlib.metadata.version(need.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{need.name} is missing")
            continue
        if not need.specifier.contains(version, prereleases=True):
            wrong.append(f"{need.name} {version} is not {need.specifier}")
    fix = "pip install --upgrade dstune in this environment" if wrong else ""
    main = ", ".join(
        f"{name} {_version(name)}" for name in ("torch", "deepspeed", "transformers", "peft", "hydra-core")
    )
    yield Check("packages", FAIL if wrong else PASS, "; ".join(wrong) or main, fix)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _torch(facts: dict) -> Iterator[Check]:
    if "torch_error" in facts:
        yield Check("PyTorch", FAIL, facts["torch_error"], "reinstall torch for this machine")
        return
    build = f"for {facts['cuda_build']}" if facts["cuda_build"] else "for CPUs"
    yield Check(
        "PyTorch", PASS, f"{_version('torch')} {build}" + (f", NCCL {facts['nccl']}" if "nccl" in facts else "")
    )
    gpus = facts["gpus"]
    if gpus:
        free = ", ".join(f"{name} {free / GIB:.0f} of {total / GIB:.0f} GiB free" for name, free, total in gpus)
        busy = [name for name, free, total in gpus if free < 0.9 * total]
        kind = "ROCm" if facts.get("rocm") else facts.get("kind", "cuda")
        fix = f"{SHOWS_USERS.get(kind, 'its own program')} shows who uses them" if busy else ""
        yield Check("accelerators", WARN if busy else PASS, free, fix)
        if kind != "cuda":
            reason = f"no test of dstune has run on {kind}"
            yield Check("tests", WARN, reason, "make gpu-report PART=1 shows whether it computes")
    elif shutil.which("nvidia-smi") and not facts["cuda_build"]:
        yield Check(
            "accelerators",
            WARN,
            "there is an NVIDIA driver, but PyTorch is built for CPUs",
            "install a CUDA build of torch",
        )
    elif facts["cuda_build"] and shutil.which("nvidia-smi"):
        yield Check(
            "accelerators",
            WARN,
            "PyTorch sees no GPU",
            "nvidia-smi; CUDA_VISIBLE_DEVICES; a driver new enough for torch",
        )
    else:
        yield Check("accelerators", PASS, f"none: runs train on the CPU ({count_cores()} cores)")


def _operators(facts: dict) -> Iterator[Check]:
    if "deepspeed_error" in facts:
        yield Check("DeepSpeed", FAIL, facts["deepspeed_error"], "reinstall deepspeed")
        return
    compiler = shutil.which("c++") or shutil.which("g++")
    missing = [name for name, path in (("a C++ compiler", compiler), ("ninja", shutil.which("ninja"))) if not path]
    if facts.get("gpus") and not (shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists()):
        missing.append("nvcc")
    works = sorted(name for name, compatible in facts["ops"].items() if compatible)
    detail = f"{_version('deepspeed')}; operators that can be compiled here: {', '.join(works) or 'none'}"
    if missing:
        fix = "only for zero=stage3_nvme: apt-get install g++ ninja-build libaio-dev"
        yield Check(
            "DeepSpeed", WARN, f"{_version('deepspeed')}; no operator compiles without {', '.join(missing)}", fix
        )
    else:
        yield Check("DeepSpeed", PASS, detail)


def machine(*, several_nodes: bool) -> Iterator[Check]:
    """Yield memory, and what this machine's limits, clock, network, GPUs and kernel say. several_nodes: whether runs use it beside
    others."""
    memory = psutil.virtual_memory()
    short = memory.available < 4 * GIB
    detail = f"{memory.available / GIB:.0f} of {memory.total / GIB:.0f} GiB available, {count_cores()} cores"
    yield Check("memory", WARN if short else PASS, detail, "end other programs" if short else "")
    yield from node_health.judge(probe.health([os.getcwd()]), several_nodes=several_nodes)


def places() -> Iterator[Check]:
    """Yield free space, write permission and any quota of the folders for runs, samples and the hub's files."""
    hub = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    for name, folder in (("runs", Path.cwd()), ("cache", cache_root()), ("hub cache", hub)):
        existing = next(place for place in (folder, *folder.parents) if place.exists())
        free = shutil.disk_usage(existing).free / GIB
        where = f"{folder}: {free:.0f} GiB free"
        if not os.access(existing, os.W_OK):
            variable = {"cache": "DSTUNE_CACHE", "hub cache": "HF_HOME"}.get(name, "run.dir")
            yield Check(name, FAIL, f"{folder} cannot be written", f"set {variable} to a folder of yours")
        else:
            yield Check(name, WARN if free < FREE_GIB else PASS, where, "free some space" if free < FREE_GIB else "")
    if shutil.which("quota"):
        done = subprocess.run(
            ["quota", "--no-wrap", "--show-mntpoint"], capture_output=True, text=True, timeout=SLOW_SECONDS
        )
        over = done.returncode != 0 and "none" not in done.stdout
        quotas = " ".join(done.stdout.split())[:200]
        yield Check("quota", FAIL if over else PASS, quotas or "none", "you are over it: remove files" if over else "")


def network(*, hub: bool) -> Iterator[Check]:
    """Yield the loopback with a free port, this machine's name, the hub."""
    try:
        yield Check("ports", PASS, f"the loopback works, port {free_port()} is free")
    except UserError as error:
        yield Check("ports", FAIL, error.problems[0].reason, error.problems[0].fix)
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
        yield Check("host name", PASS, f"{name} is {address}")
    except OSError:
        fix = "add it to /etc/hosts (several nodes find each other by name unless launch.interface is given)"
        yield Check("host name", WARN, f"{name} cannot be resolved", fix)
    if hub:
        yield _hub()


def _hub() -> Check:
    import urllib.error
    import urllib.request

    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return Check("hub", SKIP, "HF_HUB_OFFLINE is set: models and data come from the cache")
    from huggingface_hub import constants

    began = time.perf_counter()
    try:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        with urllib.request.urlopen(request, timeout=5):
            pass
    except urllib.error.HTTPError:  # it answers
        pass
    except (OSError, ValueError) as error:
        fix = "HF_HUB_OFFLINE=1 with what is cached, a mirror in HF_ENDPOINT, or the packaged samples"
        return Check("hub", WARN, f"{constants.ENDPOINT} cannot be reached ({getattr(error, 'reason', error)})", fix)
    return Check("hub", PASS, f"{constants.ENDPOINT} answers in {(time.perf_counter() - began) * 1000:.0f} ms")


def launchers(*, needed: str) -> Iterator[Check]:
    """Yield whether each launcher can start ranks. needed: name of the configured launcher, whose absence is a failure."""
    for name, room in LAUNCHERS.classes().items():
        yield from room.probe(needed=name == needed)


def programs(choice: str, names: Sequence[str], packages: str, *, needed: bool) -> Check:
    """Check that the programs of a launcher are installed. packages: those of Debian that have them."""
    absent = [name for name in names if shutil.which(name) is None]
    if absent:
        fix = f"for launch={choice}: Debian's {packages}"
        return Check(choice, FAIL if needed else SKIP, f"{', '.join(absent)} not installed", fix)
    return Check(choice, PASS, ", ".join(shutil.which(name) or "" for name in names))


def trackers() -> Iterator[Check]:
    """Yield whether trackers can be used, as far as that shows on this machine."""
    for tracker in TRACKERS.classes().values():
        yield from tracker.probe()


def data_sources() -> Iterator[Check]:
    """Yield whether tables can be read, as far as that shows on this machine."""
    for source in DATA_SOURCES.classes().values():
        yield from source.probe()
