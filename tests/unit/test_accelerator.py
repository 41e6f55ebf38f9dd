"""What is asked of the accelerator: precision, the device of a rank, memory; on stand-ins for devices that are not here."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from support.configs import run_config

from dstune.config.schema import GradientDtype, Precision, TrainerConfig, ZeroConfig
from dstune.core.errors import TrainingFailed, UserError
from dstune.core.rank_env import RankEnv
from dstune.models.heads import numbers
from dstune.parallel.tensor import TensorConfig
from dstune.planning.architecture import architecture
from dstune.planning.setup import LIVE, PREFETCH, prefetch
from dstune.rank import worker
from dstune.trainer import generation, out_of_memory
from dstune.trainer.evaluate import RowCollector
from dstune.zero import accelerator, fewer_gathers, fewer_reads, precision, start
from dstune.zero.ds_config import deepspeed_config


def device(monkeypatch, *, bf16: bool, capability: tuple[int, int] | None, count: int = 1) -> None:
    monkeypatch.setattr(accelerator, "present", lambda: True)
    monkeypatch.setattr(accelerator, "has_bf16", lambda: bf16)
    monkeypatch.setattr(accelerator, "capability", lambda: capability)
    monkeypatch.setattr(accelerator, "count", lambda: count)
    monkeypatch.setattr(accelerator, "name", lambda index=None: "Tesla V100")


@pytest.mark.parametrize(
    ("bf16", "capability", "stage", "expected"),
    [
        (True, (9, 0), 2, Precision.bf16),
        (True, (9, 0), 0, Precision.fp32),
        (False, (7, 0), 2, Precision.fp16),
        (False, (7, 5), 3, Precision.fp16),
        (False, (7, 5), 0, Precision.fp32),
        (False, (6, 1), 2, Precision.fp32),
        (True, None, 1, Precision.bf16),
    ],
)
def test_auto_is_what_the_tensor_cores_know(monkeypatch, bf16, capability, stage, expected):
    device(monkeypatch, bf16=bf16, capability=capability)
    assert precision.resolve(run_config(zero=ZeroConfig(stage=stage))) is expected
    if expected is Precision.fp16:  # which slices of weights are not trained in
        config = run_config(zero=ZeroConfig(stage=2), parallel=TensorConfig())
        assert precision.resolve(config) is Precision.fp32


def test_bf16_is_refused_where_it_is_emulated(monkeypatch):
    device(monkeypatch, bf16=False, capability=(7, 0))
    config = run_config(trainer=TrainerConfig(precision=Precision.bf16))
    with pytest.raises(UserError, match="Tesla V100 has no bf16"):
        precision.resolve(config)


@pytest.mark.parametrize(
    ("tf32", "deterministic", "gpu", "products"),
    [(True, False, True, "high"), (True, False, False, "highest"), (False, True, True, "highest")],
)
def test_arithmetic_that_a_run_asks_for(monkeypatch, tf32, deterministic, gpu, products):
    monkeypatch.setattr(accelerator, "present", lambda: gpu)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        precision.set_arithmetic(TrainerConfig(tf32=tf32, deterministic=deterministic))
        assert torch.get_float32_matmul_precision() == products
        assert torch.are_deterministic_algorithms_enabled() == deterministic
        assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if deterministic else None)
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.use_deterministic_algorithms(False)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


@pytest.mark.parametrize(
    ("version", "names"),
    [
        ("2.13.0+cu130", ["TORCH_FR_BUFFER_SIZE", "TORCH_FR_DUMP_TEMP_FILE"]),
        ("2.8.0", ["TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"]),
    ],
)
def test_the_last_collectives_are_recorded_unless_the_user_has_set_it(tmp_path, monkeypatch, version, names):
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(accelerator, "present", lambda: True)
    variables = {names[0]: "7"}
    worker.record_collectives(variables, tmp_path)
    place = str(tmp_path / "logs" / "nccl_trace_rank_")
    assert variables == {names[0]: "7", names[1]: place, "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
    monkeypatch.setattr(accelerator, "present", lambda: False)
    nothing: dict[str, str] = {}
    worker.record_collectives(nothing, tmp_path)
    assert not nothing


def test_collectives_are_recorded_inside_other_launchers_too(tmp_path, monkeypatch):
    """Ranks meet there before they know where the run is."""
    monkeypatch.setattr(accelerator, "present", lambda: True)
    names = ("TORCH_FR_BUFFER_SIZE", "TORCH_FR_DUMP_TEMP_FILE")
    seen: list[list[str | None]] = []
    see = lambda: seen.append([os.environ.get(name) for name in names])  # noqa: E731
    world = SimpleNamespace(is_main=True, broadcast=lambda value: value)
    monkeypatch.setattr(worker, "start_process_group", lambda env: see() or world)
    monkeypatch.setattr(worker, "refuse_unshared", lambda *unused: None)
    monkeypatch.setattr(worker, "train", lambda *unused: see())
    for name in ("redact_output", "answer_with_stacks"):
        monkeypatch.setattr(worker, name, lambda: None)
    monkeypatch.setattr(worker, "rendezvous", MagicMock())
    (tmp_path / "run.yaml").write_text("")
    env = RankEnv(0, 1, 0, 1, "torchrun")
    worker.main_inside(env, lambda: (run_config(), tmp_path, tmp_path))
    assert seen == [["2000", None], ["2000", str(tmp_path / "logs" / "nccl_trace_rank_")]]


@pytest.mark.parametrize(("visible", "rank", "expected"), [(8, 3, 3), (1, 0, 0), (1, 3, 0), (2, 3, None)])
def test_a_rank_takes_its_own_device_or_the_only_visible_one(monkeypatch, visible, rank, expected):
    device(monkeypatch, bf16=True, capability=(9, 0), count=visible)
    env = RankEnv(rank, 4, rank, 4, "openmpi")
    if expected is None:
        with pytest.raises(UserError, match=r"shows 2 GPU\(s\)"):
            start._device_of(env)
    else:
        assert start._device_of(env) == expected


def test_ranks_that_share_a_device_are_refused():
    def world(identities):
        return SimpleNamespace(gather=lambda mine: identities, local_size=2)

    start.refuse_shared_devices(world([("a", "GPU-1"), ("a", "GPU-2"), ("b", "GPU-1")]), "GPU-1")
    start.refuse_shared_devices(world([("a", ""), ("a", "")]), "")
    with pytest.raises(UserError, match=r"ranks 0, 1 of a see one GPU, MIG-7"):
        start.refuse_shared_devices(world([("a", "MIG-7"), ("a", "MIG-7")]), "MIG-7")


def test_a_rank_sets_its_allocator_first_and_refuses_a_device_of_another(monkeypatch):
    import deepspeed

    chosen: list[tuple[int, str | None]] = []
    device(monkeypatch, bf16=True, capability=(9, 0), count=2)
    monkeypatch.setattr(accelerator, "kind", lambda: "cuda")
    monkeypatch.setattr(accelerator, "choose", lambda index: chosen.append((index, os.environ.get(start.ALLOCATOR[0]))))
    monkeypatch.setattr(accelerator, "identity", lambda: "GPU-1")
    monkeypatch.setattr(deepspeed, "init_distributed", lambda *unused, **more: None)
    monkeypatch.setattr(start, "World", lambda env: SimpleNamespace(gather=lambda mine: [mine, mine], local_size=2))
    for name in start.ALLOCATOR:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=r"ranks 0, 1 of .* see one GPU"):
        start.start_process_group(RankEnv(1, 2, 1, 2, "torchrun"))
    assert chosen == [(1, "expandable_segments:True")]


def test_no_operator_is_probed_when_a_rank_starts(monkeypatch):
    """Without nvcc each of CUDA's would have a line on the console of every rank."""
    import deepspeed

    def probe():
        raise AssertionError("operators are probed")

    device(monkeypatch, bf16=True, capability=(9, 0))
    monkeypatch.setattr(accelerator, "kind", lambda: "cuda")
    monkeypatch.setattr(accelerator, "choose", lambda index: None)
    monkeypatch.setattr(accelerator, "identity", lambda: "")
    monkeypatch.setattr(deepspeed, "init_distributed", lambda *unused, **more: None)
    monkeypatch.setattr(deepspeed.ops, "_probe_compatible_ops", probe, raising=False)
    monkeypatch.delattr(deepspeed.ops, "__compatible_ops__", raising=False)
    monkeypatch.setattr(start, "World", lambda env: SimpleNamespace(gather=lambda mine: [mine], local_size=1))
    monkeypatch.setattr(os, "environ", dict(os.environ))
    start.start_process_group(RankEnv(0, 1, 0, 1, "alone"))
    assert not deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"]


def test_nccl_finds_two_ranks_on_one_device_when_they_meet():
    env = RankEnv(1, 2, 1, 2, "slurm")
    duplicate = (
        "NCCL error, invalid usage.\nLast error:\nDuplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000"
    )
    with pytest.raises(UserError, match=r"rank 1 of .* sees the GPU of another rank"), start._explained_duplicates(env):
        raise torch.distributed.DistBackendError(duplicate)
    with pytest.raises(torch.distributed.DistBackendError, match="after 30 minutes"), start._explained_duplicates(env):
        raise torch.distributed.DistBackendError("nobody came after 30 minutes")


@pytest.mark.parametrize(("kind", "ranks", "room"), [("cpu", 4, 2), ("cuda", 4, 13)])
def test_room_for_weights_is_what_a_rank_may_take(monkeypatch, kind, ranks, room):
    """Ranks share a CPU's memory; on a device what the allocator has kept of freed tensors is free."""
    own = {"memory_reserved": lambda device: 30, "memory_allocated": lambda device: 10}
    monkeypatch.setattr(accelerator, "module", lambda: SimpleNamespace(mem_get_info=lambda device: (6, 80), **own))
    monkeypatch.setattr(generation, "available_bytes", lambda: 16.0)
    engine: Any = SimpleNamespace(device=torch.device(kind))
    world: Any = SimpleNamespace(local_size=ranks)
    assert generation.room_for_weights(engine, world) == room


@pytest.mark.parametrize(
    ("given", "kind", "expected"),
    [
        ({}, "cuda", {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, "cuda", {}),
        ({"PYTORCH_CUDA_ALLOC_CONF": ""}, "cuda", {}),
        ({}, "xpu", {}),
    ],
)
def test_the_allocator_grows_its_segments_unless_the_user_has_set_it(monkeypatch, given, kind, expected):
    monkeypatch.setattr(accelerator, "kind", lambda: kind)
    variables = dict(given)
    start.use_expandable_segments(variables)
    assert variables == given | expected


@pytest.mark.parametrize(
    ("stage", "on_gpu", "dtype", "accumulates", "immediate"),
    [
        (1, True, GradientDtype.fp32, "fp32", True),
        (1, False, GradientDtype.fp32, "fp32", None),
        (2, True, GradientDtype.fp32, "fp32", None),
        (1, True, GradientDtype.model, "bf16", None),
        (2, True, GradientDtype.model, "bf16", None),
    ],
)
def test_where_gradients_are_summed(stage, on_gpu, dtype, accumulates, immediate):
    config = run_config(zero=ZeroConfig(stage=stage, gradient_dtype=dtype))
    settings = deepspeed_config(config, 2, Precision.bf16, on_gpu=on_gpu)
    assert settings["data_types"]["grad_accum_dtype"] == accumulates
    assert settings["bf16"].get("immediate_grad_update") is immediate


LLAMA = {"model_type": "llama", "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False}
SIZES = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}


@pytest.mark.parametrize(
    ("size", "layer", "embeddings"),
    [("1B", 60_821_504, 525_338_624), ("8B", 218_112_000, 1_050_677_248), ("70B", 855_654_400, 2_101_354_496)],
)
def test_stage_3_gathers_a_layer_ahead_and_holds_three(size, layer, embeddings):
    """Elements of a layer (attention, feed-forward, two norms) and outside of layers, by hand."""
    found = prefetch(architecture(LLAMA | SIZES[size]))
    assert found == (max(PREFETCH, layer), max(LIVE, 3 * layer + embeddings))
    config = run_config(zero=ZeroConfig(stage=3))
    zero = deepspeed_config(config, 8, Precision.bf16, on_gpu=True, prefetch=found)["zero_optimization"]
    assert (zero["stage3_prefetch_bucket_size"], zero["stage3_max_live_parameters"]) == found
    for other in (
        deepspeed_config(config, 8, Precision.bf16, on_gpu=False, prefetch=found),
        deepspeed_config(replace(config, zero=ZeroConfig(stage=2)), 8, Precision.bf16, on_gpu=True, prefetch=found),
    ):
        assert "stage3_prefetch_bucket_size" not in other["zero_optimization"]


def test_memory_that_runs_out_names_keys_in_the_order_of_what_they_free(monkeypatch):
    monkeypatch.setattr(accelerator, "present", lambda: True)
    config = run_config(trainer=TrainerConfig(micro_batch_size=8, global_batch_size=16), zero=ZeroConfig(stage=2))
    found = out_of_memory.advice(config, LLAMA | SIZES["1B"], Precision.bf16, 8, 8)
    freed = [float(text.partition("(")[2].partition(" ")[0]) for text in found if "(" in text]
    assert len(found) == 5 and freed == sorted(freed, reverse=True) and freed[0] > 1
    assert {text.partition("=")[0] for text in found} == {
        "trainer.micro_batch_size", "trainer.activation_checkpointing", "zero", "data.max_length", "method",
    }  # fmt: skip
    sliced = replace(config, parallel=TensorConfig())
    advised = [
        text.partition(" ")[0] for text in out_of_memory.advice(sliced, LLAMA | SIZES["1B"], Precision.bf16, 8, 8)
    ]
    assert "trainer.micro_batch_size=4" in advised and "zero=stage3" not in advised, "slices are for stages 0 to 2"
    pulled = replace(config, forgetting=replace(config.forgetting, l2sp=0.1))  # which adapters cannot be
    assert "method=lora" not in out_of_memory.advice(pulled, LLAMA | SIZES["1B"], Precision.bf16, 8, 8)
    with (
        pytest.raises(TrainingFailed, match=r"out of memory in training \(CUDA out of memory.*most first: a, b\."),
        out_of_memory.explained(lambda: "training", lambda: ["a", "b"]),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
    with pytest.raises(RuntimeError, match="shapes"), out_of_memory.explained(lambda: "", list):
        raise RuntimeError("shapes do not fit")


def test_a_norm_is_read_once(monkeypatch):
    reads = fewer_reads.NormReads()
    monkeypatch.setattr(fewer_reads, "reads", reads)
    norm = torch.tensor(3.0)
    assert not fewer_reads.is_invalid_grad_norm(norm) and reads.last == 3.0
    reads._value = 4.0  # what was read is remembered ...
    assert not fewer_reads.is_invalid_grad_norm(norm) and reads.last == 4.0
    norm.fill_(-1.0)  # ... until the norm is another
    assert fewer_reads.is_invalid_grad_norm(norm) and reads.last == -1.0
    reads.begin_step()
    assert reads.last is None
    for value in (float("inf"), float("nan"), -1.0):
        assert fewer_reads.is_invalid_grad_norm(torch.tensor(value)) and fewer_reads.is_invalid_grad_norm(value)
        masked = torch.tensor(value)
        fewer_reads.mask_nan_or_inf_with_val_inplace(masked)
        assert float(masked) == -1.0
    assert fewer_reads.is_invalid_grad_norm(torch.tensor([1.0, -1.0]))


class OnDevice:
    """A scalar of a device; reading it alone is not foreseen."""

    is_cpu, _version = False, 0

    def __init__(self, value: float, device: str = "sim:0"):
        self.value, self.device = value, device

    def double(self) -> torch.Tensor:
        return torch.tensor(self.value, dtype=torch.float64)


def test_the_sums_of_a_step_are_read_with_the_norm():
    reads = fewer_reads.NormReads()
    third = float(torch.tensor(1 / 3))
    reads.begin_step({"loss_sum": OnDevice(third), "weight": torch.tensor(7), "elsewhere": OnDevice(1.0, "sim:1")})
    assert reads.beside == {}
    assert reads.value(norm := OnDevice(2.5)) == 2.5 == reads.value(norm)
    assert reads.beside == {"loss_sum": third}
    reads.begin_step()
    assert reads.value(OnDevice(3.5).double()) == 3.5 and reads.beside == {}
    assert numbers({"loss_sum": torch.tensor(9.0), "weight": torch.tensor(7)}, {"loss_sum": third}) == {
        "loss_sum": third,
        "weight": 7.0,
    }


def test_deepspeed_looks_both_functions_up_where_they_are_replaced():
    """Also a warning of a version that has moved them: every step would wait more often."""
    fewer_reads.install()
    for name in fewer_reads.MODULES:
        module = sys.modules[f"deepspeed.runtime.{name}"]
        assert module.is_invalid_grad_norm is fewer_reads.is_invalid_grad_norm, name
    assert sys.modules["deepspeed.runtime.zero.stage_1_and_2"].mask_nan_or_inf_with_val_inplace is (
        fewer_reads.mask_nan_or_inf_with_val_inplace
    )


@pytest.mark.parametrize(("kept_on", "waits"), [("cpu", 0), ("meta", 1)])
@pytest.mark.parametrize("several", [False, True])
def test_a_single_rank_waits_at_stage_3_for_weights_from_elsewhere_only(monkeypatch, kept_on, waits, several):
    from deepspeed.runtime.zero import partition_parameters as theirs

    waited: list[int] = []
    stream = SimpleNamespace(synchronize=lambda: waited.append(1))
    device = SimpleNamespace(
        resolves_data_dependency=lambda: False, current_stream=lambda: stream, current_device_name=lambda: kept_on
    )
    monkeypatch.setattr(theirs, "get_accelerator", lambda: device)
    fewer_gathers.wait_for_copies_only()
    fewer_gathers.wait_for_copies_only()
    weight = SimpleNamespace(ds_status=theirs.ZeroParamStatus.INFLIGHT, ds_tensor=torch.ones(2, device=kept_on))
    weight.ds_shape, weight.device, weight.ds_summary = (2,), torch.device("cpu"), dict
    handle = theirs.NoGatherCoalescedHandle([weight]) if several else theirs.NoGatherHandle(weight)
    handle.wait()
    assert weight.ds_status is theirs.ZeroParamStatus.AVAILABLE and len(waited) == waits
    weight.ds_status = theirs.ZeroParamStatus.NOT_AVAILABLE
    handle.wait()  # of a gather that is over: the weight was given back since
    assert weight.ds_status is theirs.ZeroParamStatus.NOT_AVAILABLE and len(waited) == waits


def test_rows_of_an_evaluation_are_read_many_batches_at_a_time(monkeypatch):
    read: list[int] = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda indices: read.append(1) or tolist(indices))
    rows, often = RowCollector(), RowCollector.BATCHES_PER_READ
    for number in range(often + 1):
        rows.add(torch.tensor([number]), {"score": torch.tensor([0.5 * number]), "parts": [torch.tensor([number])]})
        assert len(read) == (0 if number < often - 1 else often)
    found = rows.read()
    assert [indices for indices, _ in found] == [[number] for number in range(often + 1)] and len(read) == often + 1
    assert all(columns["score"] == [0.5 * number] for number, (_, columns) in enumerate(found))
    assert rows.read() == found
