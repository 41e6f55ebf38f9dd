"""From a `RunConfig` to the command line and environment of every rank on this machine.

A rank inherits a listed part of the environment only: what a shell or another launcher left behind (RANK, SLURM_*,
OMPI_*) cannot make it behave differently, and the same list serves launchers that carry variables to other nodes.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from dstune.config.convert import to_yaml
from dstune.config.run_file import variables_for_ranks
from dstune.config.schema import RunConfig
from dstune.core.child_python import SAFE_PATH, python_path
from dstune.core.errors import Problem, UserError
from dstune.core.rank_env import FORK_SERVER, LAUNCHER_PID
from dstune.core.secrets import is_secret
from dstune.protocols import LAUNCHERS, TRACKERS, launcher_of
from dstune.protocols.launcher import LaunchConfig

# fmt: off
EXPORTED_NAMES = {
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "NO_COLOR", "VIRTUAL_ENV",
    "TMPDIR", "TMP", "TEMP", "DYLD_LIBRARY_PATH", "CC", "CXX", "CPATH", "LIBRARY_PATH", "MAX_JOBS",
    "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "http_proxy", "https_proxy", "no_proxy", "all_proxy",
    "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY",
}
EXPORTED_PREFIXES = (
    "LC_", "LD_", "PYTHON", "CONDA_", "XDG_", "SSL_", "DSTUNE_", "DS_", "DEEPSPEED_",
    "TORCH_", "TORCHINDUCTOR_", "TORCHDYNAMO_", "PYTORCH_", "TRITON_", "CUDA_", "CUBLAS_", "NVIDIA_", "NCCL_", "HIP_", "ROCR_",
    "HSA_", "MIOPEN_", "ROCM_", "RCCL_", "ZE_", "SYCL_", "ONEAPI_", "CCL_", "HABANA_", "PT_HPU_", "HCCL_",
    "GLOO_", "UCX_", "FI_", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "MALLOC_",
    "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "TOKENIZERS_", "SAFETENSORS_", "WANDB_",
)
# fmt: on

NO_TELEMETRY = {"HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}
# The launching process has fetched everything: a rank that asks the hub is a mistake.
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
ALWAYS = {
    **NO_TELEMETRY,
    **OFFLINE,
    # `-m` would put the working directory in front of the import path, where a user's `datasets.py` or `wandb/` hides
    # the real package (Python 3.11 and later).
    **SAFE_PATH,
}
# Good defaults that the user's own setting replaces.
UNLESS_SET = {
    "TOKENIZERS_PARALLELISM": "false",  # tokenizers warn and switch themselves off in forked processes otherwise
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    # torch 2.13 repeats this at every collective of DeepSpeed, and buries the last lines of a log under it.
    "PYTHONWARNINGS": "ignore::FutureWarning:torch.distributed.c10d_logger",
    "PYTHONFAULTHANDLER": "1",  # a crash in native code leaves a Python stack in the rank's log
}

RANKS_PER_CORE = 8
"""More ranks than this without a GPU are a mistyped number: each takes about 0.5 GiB before it has a model, and they take
turns at the cores."""


@dataclass(frozen=True)
class Machine:
    """The properties of a machine that decide the number of ranks and threads."""

    gpus: int
    cores: int


@dataclass(frozen=True)
class LaunchPlan:
    """One command line and environment for each rank, in rank order."""

    argv: tuple[tuple[str, ...], ...]
    env: tuple[dict[str, str], ...]

    @property
    def size(self) -> int:
        return len(self.argv)


def local_plan(
    config: RunConfig,
    run_dir: Path,
    *,
    parent_env: Mapping[str, str] | None = None,
    machine: Machine | None = None,
    port: int | None = None,
    console: str = "plain",
) -> LaunchPlan:
    """Return the ranks of a run on this machine.

    A pure function of its arguments; the environment, hardware and a free port are looked up where not given.
    `console` tells rank 0 what it prints to: `tty:WIDTH` or `plain`.

    Raises:
        UserError: more processes than GPUs, or an unset variable in `launch.export_env`.
    """
    parent_env = os.environ if parent_env is None else parent_env
    machine = this_machine(parent_env) if machine is None else machine
    port = free_port() if port is None else port
    ranks = number_of_ranks(config, machine)
    shared = exported(parent_env, config.launch.export_env) | referenced(config, parent_env) | ALWAYS
    shared = {**UNLESS_SET, "OMP_NUM_THREADS": str(max(1, machine.cores // ranks))} | shared
    if _loopback_exists():
        # gloo otherwise picks the interface of the host name, which a VPN, a firewall or no network at all breaks.
        shared.setdefault("GLOO_SOCKET_IFNAME", "lo")
    shared |= variables_for_ranks(run_dir)
    shared |= {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DSTUNE_CONSOLE": console,
        LAUNCHER_PID: str(os.getpid()),
    }
    path = python_path(shared.get("PYTHONPATH", ""))
    if path:
        shared["PYTHONPATH"] = path
    command = (sys.executable, "-u", "-m", "dstune.worker", str(run_dir.absolute()))
    trackers = _tracker_keys(config, parent_env)
    envs = tuple(
        {**shared, **(trackers if rank == 0 else {}), "RANK": str(rank), "LOCAL_RANK": str(rank)}
        for rank in range(ranks)
    )
    return LaunchPlan(argv=(command,) * ranks, env=envs)


def number_of_ranks(config: RunConfig, machine: Machine) -> int:
    """Return `launch.processes`, else one rank a GPU, else two (one on a single core).

    Raises:
        UserError: there are GPUs, but fewer than processes, or far more processes than cores.
    """
    # The ranks of a launcher elsewhere are not known here, so assume what this machine would do.
    requested = launcher_of(config.launch).ranks
    if requested is None:
        return machine.gpus or min(2, machine.cores)
    if 0 < machine.gpus < requested:
        reason = f"this machine shows {machine.gpus} GPU(s) and every rank needs one of its own"
        fix = f"launch.processes={machine.gpus}, or CUDA_VISIBLE_DEVICES= to train on the CPU"
        raise UserError(Problem("launch.processes", reason, fix, str(requested)))
    if not machine.gpus and requested > RANKS_PER_CORE * machine.cores and not config.run.force:
        reason = (
            f"this machine has {machine.cores} core(s) and no GPU; more than {RANKS_PER_CORE} ranks a core "
            "only wait for each other"
        )
        fix = f"launch.processes={machine.cores}; run.force=true starts them all the same"
        raise UserError(Problem("launch.processes", reason, fix, str(requested)))
    return requested


def on_this_machine(launch: LaunchConfig) -> LaunchConfig:
    """Return `launch`, or the default launcher, whichever has its ranks here."""
    return launch if launcher_of(launch).here else LAUNCHERS[next(iter(LAUNCHERS))].Config()


def exported(env: Mapping[str, str], further: list[str]) -> dict[str, str]:
    """Return the part of `env` that ranks inherit: the built-in list without keys and tokens, and the names in `further`.

    Raises:
        UserError: a name in `further` is not set.
    """
    missing = [name for name in further if name not in env]
    if missing:
        reason, fix = "the variable is not set here", "export it first, or take it out of the list"
        raise UserError(Problem("launch.export_env", reason, fix, name) for name in missing)
    exported_names = EXPORTED_NAMES | set(further)
    return {
        name: value
        for name, value in env.items()
        # Ranks work offline: the launching process alone needs HF_TOKEN.
        if name in exported_names
        or (name.startswith(EXPORTED_PREFIXES) and name != FORK_SERVER and not is_secret(name))
    }


def inherited(config: RunConfig, env: Mapping[str, str]) -> dict[str, str]:
    """Return everything of `env` that the ranks of another launcher get, keys of trackers included: which of them is rank 0 is
    decided elsewhere.

    Raises:
        UserError: a name in `launch.export_env` is not set.
    """
    return exported(env, config.launch.export_env) | referenced(config, env) | _tracker_keys(config, env)


def interface_variables(interface: str | None) -> dict[str, str]:
    """Return the variables that make NCCL and gloo use one network interface."""
    return {} if interface is None else {"NCCL_SOCKET_IFNAME": interface, "GLOO_SOCKET_IFNAME": interface}


def is_tracker_key(name: str) -> bool:
    """Return whether the variable is a secret that only rank 0 needs."""
    trackers = TRACKERS.classes().values()
    return is_secret(name) and any(name.startswith(tracker.variables) for tracker in trackers if tracker.variables)


def _tracker_keys(config: RunConfig, env: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that only rank 0 needs, to reach the servers of its trackers."""
    trackers = TRACKERS.classes().values()
    prefixes = tuple(p for room in trackers if room.needs_variables(config.tracking) for p in room.variables)
    return {name: value for name, value in env.items() if prefixes and name.startswith(prefixes)}


def referenced(config: RunConfig, env: Mapping[str, str]) -> dict[str, str]:
    """Return variables that `run.yaml` refers to instead of holding their value; the ranks resolve them again."""
    names = re.findall(r"\$\{oc\.env:\s*(\w+)", to_yaml(config))
    return {name: env[name] for name in names if name in env}


def free_port() -> int:
    """Return a TCP port that nobody listens on at 127.0.0.1 now.

    Raises:
        UserError: 127.0.0.1 cannot be reached, where ranks would wait for each other until a time-out.
    """
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", 0))
            probe.listen()
            socket.create_connection(probe.getsockname(), timeout=5.0).close()
        except OSError as error:
            reason = f"this machine cannot connect to itself ({error.strerror or error}), and the ranks have to"
            fix = "bring the loopback interface up (ip link set lo up)"
            raise UserError(Problem("network", reason, fix, "127.0.0.1")) from None
        return probe.getsockname()[1]


def this_machine(env: Mapping[str, str]) -> Machine:
    return Machine(gpus=count_gpus(env), cores=count_cores())


def count_gpus(env: Mapping[str, str], kfd: Path = Path("/sys/class/kfd/kfd/topology/nodes")) -> int:
    """Count the GPUs of NVIDIA, or of AMD where torch is built for them, that a rank would see; without importing torch (2 s)."""
    rocm = "rocm" in _torch_version()
    names = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES") if rocm else ()
    visible = [_listed(env[name]) for name in (*names, "CUDA_VISIBLE_DEVICES") if name in env]
    if visible:
        return min(visible)  # HIP counts among those that ROCR shows
    if rocm:
        return sum(_computes(node) for node in kfd.glob("*/properties"))
    try:
        command = ["nvidia-smi", "--list-gpus"]
        listing = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        return sum(line.startswith("GPU ") for line in listing.splitlines())
    except (OSError, subprocess.SubprocessError):
        pass
    try:
        return len(list(Path("/proc/driver/nvidia/gpus").iterdir()))
    except OSError:
        return 0


def idle_gpus(env: Mapping[str, str]) -> Iterator[str]:
    """Yield a warning about GPUs that the run does not use, because PyTorch is built for CPUs."""
    version = _torch_version()
    if version.endswith("+cpu") and (gpus := count_gpus(env)):
        yield (
            f"this machine shows {gpus} GPU(s), but PyTorch {version} is built for CPUs, so ranks train on the CPU "
            "(a build for GPUs uses them; CUDA_VISIBLE_DEVICES= says that it is meant)"
        )


def _torch_version() -> str:
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _listed(visible: str) -> int:
    """Count the devices that are listed. CUDA ignores the list from the first invalid entry on, so "-1" and "" hide all."""
    devices = [device.strip() for device in visible.split(",")]
    bad = next((place for place, device in enumerate(devices) if not device or device.startswith("-")), None)
    return len(devices[:bad])


def _computes(node: Path) -> bool:
    """Return whether this node of AMD's driver is a GPU of this process: a CPU has no SIMD units, one of others cannot be read."""
    try:
        values = dict(line.split(maxsplit=1) for line in node.read_text().splitlines() if " " in line)
    except OSError:
        return False
    return int(values.get("simd_count", 0)) > 0


def count_cores(cgroup_limit: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Count the cores that this process may use: its affinity, and the quota of its container (at least 1)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = cgroup_limit.read_text().split()
        if quota != "max":
            cores = min(cores, round(int(quota) / int(period)))
    except (OSError, ValueError):
        pass
    return max(1, cores)


def _loopback_exists() -> bool:
    return Path("/sys/class/net/lo").exists()
