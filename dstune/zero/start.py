"""Starts a rank: imports DeepSpeed, chooses the rank's device, and joins the process group."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch

from dstune.core import environment
from dstune.core.distributed import World
from dstune.core.errors import Problem, UserError
from dstune.core.rank_env import STORE, RankEnv
from dstune.zero import accelerator


def start_process_group(env: RankEnv) -> World:
    """Join the process group of this run: gloo on CPUs, nccl on GPUs. Sets the device of this rank."""
    os.environ.update(
        RANK=str(env.rank),
        WORLD_SIZE=str(env.world_size),
        LOCAL_RANK=str(env.local_rank),
        LOCAL_WORLD_SIZE=str(env.local_size),
    )
    import_deepspeed()
    from deepspeed import init_distributed
    from deepspeed.accelerator import get_accelerator

    if accelerator.present():
        use_expandable_segments(os.environ)
        accelerator.choose(_device_of(env))
    backend = get_accelerator().communication_backend_name()
    store = os.environ.get(STORE)
    with _explained_duplicates(env):
        init_distributed(
            backend,
            auto_mpi_discovery=False,
            timeout=timedelta(minutes=30),
            verbose=False,
            init_method=f"file://{store}" if store else None,
            rank=env.rank,
            world_size=env.world_size,
        )
    world = World(env)
    if accelerator.present():
        refuse_shared_devices(world, accelerator.identity())
    return world


def import_deepspeed() -> None:
    """Import DeepSpeed without the parts that no run needs."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # peft imports bitsandbytes if it is installed, and it warns about libraries that nobody needs.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not accelerator.present():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed warns that it found no accelerator
    with _without("mlflow"):
        import deepspeed
        import deepspeed.ops

        _import_muon()
    # DeepSpeed compiles its shared-memory collective for CPUs at first use: 30 to 60 s with a compiler, an error without one. It
    # was not measurably faster than gloo. The complete table is replaced: otherwise each rank probes every operator, and prints
    # a line for each CUDA operator if nvcc is not installed.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}


ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Either sets torch's allocator; where both are there, torch 2.13 reads the first."""


def leave_process_group() -> None:
    """Leave the process group, so that another run may start in this process."""
    if torch.distributed.is_initialized():
        from deepspeed.utils import groups

        torch.distributed.destroy_process_group()
        groups._WORLD_GROUP = None  # its copy of the group, which the next engine would use
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # those of `node_copies`


def use_expandable_segments(variables: MutableMapping[str, str]) -> None:
    """Let CUDA's allocator extend its segments, which leaves fewer gaps if micro-batches differ in size, unless the user has
    configured the allocator. To be called before the first tensor on the device."""
    if accelerator.kind() == "cuda" and not torch.version.hip and not any(name in variables for name in ALLOCATOR):
        variables[ALLOCATOR[0]] = "expandable_segments:True"


def _device_of(env: RankEnv) -> int:
    """Return the index of this rank's GPU, and set LOCAL_RANK to it for DeepSpeed. Raises UserError if there are fewer GPUs than
    ranks."""
    visible = accelerator.count()
    # If each rank sees only its own GPU (srun --gpus-per-task=1, Kubernetes, a wrapper around each rank of mpirun), that GPU is
    # number 0 for each. `refuse_shared_devices` distinguishes this from a single GPU for all ranks.
    device = 0 if visible == 1 else env.local_rank
    if device >= visible:
        raise UserError(
            Problem(
                "launch",
                value=f"{env.local_size} ranks",
                reason=f"this node shows {visible} GPU(s), and every rank needs one of its own",
                fix="start fewer ranks on a node, or CUDA_VISIBLE_DEVICES= to train on the CPU",
            )
        )
    os.environ["LOCAL_RANK"] = str(device)
    return device


def refuse_shared_devices(world: World, identity: str) -> None:
    """Raise UserError on all ranks if two ranks of a node use the same device, which NCCL does not support."""
    ranks_by_device: dict[tuple[str, str], list[int]] = {}
    for rank, (host, device) in enumerate(world.gather([environment.host(), identity])):
        ranks_by_device.setdefault((host, device), []).append(rank)
    shared = [(place, ranks) for place, ranks in ranks_by_device.items() if place[1] and len(ranks) > 1]
    if shared:
        (host, device), ranks = shared[0]
        raise _shared_device_error(
            f"ranks {', '.join(map(str, ranks))} of {host} see one GPU, {device}", world.local_size
        )


def _shared_device_error(reason: str, ranks: int) -> UserError:
    fix = "start one rank for each GPU, or show each rank a GPU of its own (CUDA_VISIBLE_DEVICES)"
    return UserError(Problem("launch", f"{reason}, and every rank needs one of its own", fix, f"{ranks} ranks"))


@contextmanager
def _explained_duplicates(env: RankEnv) -> Iterator[None]:
    """Raise UserError in place of NCCL's error about two ranks on one device: NCCL connects as soon as ranks meet, before
    `refuse_shared_devices` can check them."""
    try:
        yield
    except torch.distributed.DistBackendError as error:
        if "Duplicate GPU" not in str(error):
            raise
        reason = f"rank {env.rank} of {environment.host()} sees the GPU of another rank"
        raise _shared_device_error(reason, env.local_size) from error


def _import_muon() -> None:
    """Import DeepSpeed's Muon without compiling it. DeepSpeed's engines import it and its functions are compiled on definition,
    which takes 1.5 s of each rank's 11 s, for an implementation that dstune does not use."""
    from deepspeed.runtime import compiler

    compile_function = getattr(compiler, "compile", None)
    compiler.compile = lambda *_, **__: lambda function: function
    try:
        with suppress(ImportError):  # another version has it in another module
            import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    finally:
        if compile_function is not None:
            compiler.compile = compile_function


@contextmanager
def _without(module: str) -> Iterator[None]:
    """Prevent the import of `module` within the block. DeepSpeed's autotuner, which dstune does not use, imports MLflow if it is
    installed: 0.7 s of each rank's 7 s."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]
