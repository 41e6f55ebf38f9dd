"""The ranks: who started them, this process's place among them, and messages between them that are not collectives."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

LAUNCHERS = (
    # launcher, rank, ranks, local rank, ranks of this node
    ("torchrun or deepspeed", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    ("mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("mpirun", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("srun", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
)  # fmt: skip
"""Variables by which a launcher tells a process its place, in the order in which they are believed."""


class LauncherError(Exception):
    """The launcher's variables do not say where the ranks can meet."""


@dataclass(frozen=True)
class Place:
    """A rank's place, as its launcher gives it."""

    launcher: str
    rank: int
    size: int
    local_rank: int
    address: str
    port: int


def place_from(variables: Mapping[str, str]) -> Place | None:
    """Return the place that a launcher gave this process, or None if no launcher started it. Raises LauncherError."""
    for launcher, rank, size, local_rank, _ in LAUNCHERS:
        if rank not in variables or size not in variables:
            continue
        if launcher == "srun" and "SLURM_STEP_ID" in variables and not _in_step(variables):
            continue
        ranks = int(variables[size])
        address = variables.get("MASTER_ADDR") or _first_host(launcher, variables, ranks)
        port = int(variables.get("MASTER_PORT") or _agreed_port(variables))
        return Place(launcher, int(variables[rank]), ranks, int(variables.get(local_rank, 0)), address, port)
    return None


def _in_step(variables: Mapping[str, str]) -> bool:
    """Return whether srun started this process. A batch script has the same variables, and is alone."""
    return variables.get("SLURM_STEP_ID", "").isdigit()


def _first_host(launcher: str, variables: Mapping[str, str], ranks: int) -> str:
    """Return where rank 0 is, if the launcher says so."""
    nodes = variables.get("SLURM_STEP_NODELIST") or variables.get("SLURM_JOB_NODELIST")
    if nodes:
        return first_of_nodelist(nodes)
    local = variables.get("OMPI_COMM_WORLD_LOCAL_SIZE") or variables.get("MPI_LOCALNRANKS")
    if local is not None and int(local) == ranks:
        return "127.0.0.1"
    raise LauncherError(
        f"{launcher} does not say on which host rank 0 runs. Set MASTER_ADDR to that host for all ranks "
        "(Open MPI: mpirun -x MASTER_ADDR=HOST)."
    )


def first_of_nodelist(nodes: str) -> str:
    """Return the first host of a list as SLURM writes it: `gpu[07-09,12],login1` begins with `gpu07`."""
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", re.split(r",(?![^[]*\])", nodes)[0])


def _agreed_port(variables: Mapping[str, str]) -> int:
    """Return a port that all ranks of this job compute alike."""
    job = variables.get("SLURM_JOB_ID") or variables.get("PMIX_NAMESPACE") or str(os.getppid())
    return 20000 + int(re.sub(r"\D", "", job) or 0) % 20000


def free_port() -> int:
    """Return a TCP port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


@dataclass
class World:
    """This rank among the others. Messages go through the store, not through collectives, which may be what is wrong."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    store: Any
    _messages: int = 0

    def gather(self, value: Any, seconds: float = 60) -> list[Any]:
        """Return every rank's `value`, which JSON must be able to hold. Raises torch's error if a rank does not come in time."""
        self._messages += 1
        keys = [f"message/{self._messages}/{rank}" for rank in range(self.size)]
        self.store.set(keys[self.rank], json.dumps(value))
        self.store.wait(keys, timedelta(seconds=seconds))
        return [json.loads(self.store.get(key)) for key in keys]

    def leave(self) -> None:
        """Let rank 0, whose process serves the store, end last."""
        self.store.set(f"left/{self.rank}", "")
        if self.rank == 0:
            with contextlib.suppress(Exception):
                self.store.wait([f"left/{rank}" for rank in range(self.size)], timedelta(seconds=10))


def device_type() -> str:
    """Return the type of the accelerator that torch sees, else `cpu`."""
    if torch.cuda.is_available():
        return "cuda"
    accelerator = getattr(torch, "accelerator", None)  # from torch 2.6
    if accelerator is not None and accelerator.is_available():
        return str(accelerator.current_accelerator().type)
    return "cpu"


def device_count(kind: str) -> int:
    """Return how many accelerators this process sees."""
    module = getattr(torch, kind, None)
    return int(module.device_count()) if kind != "cpu" and module is not None else 0


def join(rank: int, size: int, local_rank: int, address: str, port: int, seconds: float, file: str = "") -> World:
    """Choose the device of this rank and join the process group. seconds: limit of every collective. file: of the store, where all
    ranks are on this machine."""
    kind = device_type()
    device = torch.device("cpu")
    if kind != "cpu":
        device = torch.device(kind, local_rank % max(device_count(kind), 1))
        getattr(torch, kind).set_device(device)
    limit = timedelta(seconds=seconds)
    store = open_file_store(file, size) if file else open_store(address, port, rank == 0, seconds)
    backend = {"cpu": "gloo", "cuda": "nccl", "xpu": "xccl", "hpu": "hccl"}.get(kind)
    torch.distributed.init_process_group(
        backend, store=within(store, "group"), rank=rank, world_size=size, timeout=limit
    )
    return World(rank, size, local_rank, device, within(store, "world"))


def open_store(address: str, port: int, serves: bool, seconds: float) -> Any:
    """Connect to the key-value store at this address; `serves`: this process is its server."""
    limit = timedelta(seconds=seconds)
    return torch.distributed.TCPStore(address, port, None, serves, limit, wait_for_workers=False)  # type: ignore[attr-defined]


def open_file_store(file: str, size: int) -> Any:
    """Open the key-value store in a file that `size` processes of this machine share."""
    return torch.distributed.FileStore(file, size)  # type: ignore[attr-defined]


def within(store: Any, prefix: str) -> Any:
    """Return a view of the store whose keys begin with `prefix`."""
    return torch.distributed.PrefixStore(prefix, store)  # type: ignore[attr-defined]
