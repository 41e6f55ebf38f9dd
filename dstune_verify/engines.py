"""The engines under test, each built and called as a user's training loop does it: DeepSpeed, DDP, FSDP2.

Each takes the tiny model, trains it by SGD, and gives back whole weights. None of its internals are read.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from dstune_verify.models import Batch, Experts, cast
from dstune_verify.world import World

if TYPE_CHECKING:
    from dstune_verify.training import TrainingCase

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


MakeOptimizer = Callable[[list[nn.Parameter], float], torch.optim.Optimizer]


def sgd(parameters: list[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    """Return the optimizer that moves weights by the gradient itself."""
    return torch.optim.SGD(parameters, lr=rate)


class Engine(Protocol):
    weight_dtype: torch.dtype
    """The type in which `weights` are held."""

    def step(self, batches: Sequence[Batch]) -> list[float]:
        """Train one optimizer step on the micro-batches of this rank, and return their losses."""

    def weights(self) -> dict[str, torch.Tensor]:
        """Return a copy of all weights, each complete, by name. Every rank must call it."""

    def close(self) -> None:
        """Release the engine."""


def copy_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a detached copy of the model's weights by name."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def import_deepspeed() -> Any:
    """Import DeepSpeed. On CPUs, its shared-memory collective is left out: compiling it takes a minute."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import logging

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed
    import deepspeed.ops

    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    return deepspeed


def deepspeed_config(case: TrainingCase) -> dict[str, Any]:
    """Return the DeepSpeed configuration of a case, as a user would write it."""
    if case.settings is not None:
        return case.settings
    zero: dict[str, Any] = {"stage": case.stage}
    if case.stage:
        zero |= {"reduce_bucket_size": case.bucket, "allgather_bucket_size": case.bucket}
    if case.stage == 3:
        zero |= {"stage3_prefetch_bucket_size": case.bucket, "stage3_param_persistence_threshold": 0}
    if case.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": case.accumulation,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    if case.precision != "fp32":
        config[case.precision] = {"enabled": True}
    if case.precision == "fp16":
        config["fp16"] |= {"loss_scale": 128}
    if case.clipping is not None:
        config["gradient_clipping"] = case.clipping
    return merged(config, case.config)


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with `changes` merged into it at every depth."""
    result = copy.deepcopy(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else copy.deepcopy(value)
    return result


class DeepSpeedEngine:
    """`deepspeed.initialize`, `backward` and `step` for each micro-batch."""

    def __init__(self, case: TrainingCase, model: nn.Module, rate: float, world: World, optimizer: MakeOptimizer = sgd):
        self.deepspeed = import_deepspeed()
        if not self.deepspeed.comm.is_initialized():
            self.deepspeed.init_distributed(torch.distributed.get_backend(), verbose=False)
        if case.zero_stage == 3 and case.model == "experts":  # as trainers of mixtures of experts do
            self.deepspeed.utils.set_z3_leaf_modules(model, [Experts])
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.model, self.weight_dtype = model, DTYPES[case.precision]
        self.engine, *_ = self.deepspeed.initialize(
            model=model, optimizer=optimizer(trained, rate), config=deepspeed_config(case)
        )

    def step(self, batches: Sequence[Batch]) -> list[float]:
        losses = []
        for batch in batches:
            loss = self.engine(batch)
            losses.append(float(loss))
            self.engine.backward(loss)
            self.engine.step()
        return losses

    def weights(self) -> dict[str, torch.Tensor]:
        with self._gathered():
            return copy_weights(self.model)

    @contextlib.contextmanager
    def _gathered(self) -> Iterator[None]:
        partitioned = [parameter for parameter in self.model.parameters() if hasattr(parameter, "ds_id")]
        with self.deepspeed.zero.GatheredParameters(partitioned) if partitioned else contextlib.nullcontext():
            yield

    def save(self, folder: str) -> None:
        """Write a checkpoint. Every rank must call it."""
        self.engine.save_checkpoint(folder, tag="step")

    def load(self, folder: str) -> None:
        """Load what `save` wrote. Every rank must call it."""
        self.engine.load_checkpoint(folder, tag="step")

    def close(self) -> None:
        self.engine.destroy()


class DDPEngine:
    """torch's DistributedDataParallel, with `no_sync` while micro-batches accumulate."""

    def __init__(self, case: TrainingCase, model: nn.Module, rate: float, world: World, optimizer: MakeOptimizer = sgd):
        devices = [world.device.index] if world.device.type != "cpu" else None
        self.weight_dtype = DTYPES[case.precision]
        self.model, self.case = cast(model, self.weight_dtype), case
        self.wrapped = nn.parallel.DistributedDataParallel(
            model, device_ids=devices, find_unused_parameters=case.model == "experts", bucket_cap_mb=1
        )
        self.optimizer = optimizer([p for p in model.parameters() if p.requires_grad], rate)

    def step(self, batches: Sequence[Batch]) -> list[float]:
        losses = []
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            with contextlib.nullcontext() if last else self.wrapped.no_sync():
                loss = self.wrapped(batch)
                losses.append(float(loss))
                (loss / len(batches)).backward()
        if self.case.clipping:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.case.clipping)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return losses

    def weights(self) -> dict[str, torch.Tensor]:
        return copy_weights(self.model)

    def close(self) -> None:
        del self.wrapped


class FSDP2Engine:
    """torch's `fully_shard` for each block and the whole model: weights in fp32, computed in the precision of the case."""

    def __init__(self, case: TrainingCase, model: Any, rate: float, world: World, optimizer: MakeOptimizer = sgd):
        module = find_fully_shard()
        assert module is not None
        self.model, self.case, self.weight_dtype = model, case, torch.float32
        mesh = torch.distributed.device_mesh.init_device_mesh(world.device.type, (world.size,))
        policy = module.MixedPrecisionPolicy(param_dtype=DTYPES[case.precision], reduce_dtype=torch.float32)
        for block in model.blocks:
            module.fully_shard(block, mesh=mesh, mp_policy=policy)
        module.fully_shard(model, mesh=mesh, mp_policy=policy)
        self.optimizer = optimizer([p for p in model.parameters() if p.requires_grad], rate)

    def step(self, batches: Sequence[Batch]) -> list[float]:
        losses = []
        for number, batch in enumerate(batches):
            self.model.set_requires_gradient_sync(number == len(batches) - 1)
            loss = self.model(batch)
            losses.append(float(loss))
            (loss / len(batches)).backward()
        if self.case.clipping:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.case.clipping)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return losses

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: parameter.full_tensor().detach().clone() for name, parameter in self.model.named_parameters()}

    def close(self) -> None:
        pass


def find_fully_shard() -> Any:
    """Return torch's module that has `fully_shard`, or None. Its place changed in torch 2.6."""
    for name in ("torch.distributed.fsdp", "torch.distributed._composable.fsdp"):
        module = importlib.import_module(name) if importlib.util.find_spec(name) else None
        if hasattr(module, "fully_shard"):
            return module
    return None


ENGINES: dict[str, type[Any]] = {"deepspeed": DeepSpeedEngine, "ddp": DDPEngine, "fsdp2": FSDP2Engine}
