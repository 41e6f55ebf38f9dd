"""RunConfig + world size -> DeepSpeed's dictionary, by table."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.configs import run_config

from dstune.config.schema import Offload, OptimizerOffload, Precision, TrainerConfig, ZeroConfig
from dstune.config.zero_rules import check_zero
from dstune.optim.adamw import AdamW
from dstune.zero.ds_config import deepspeed_config, micro_batches_per_rank


@pytest.mark.parametrize(
    ("global_batch", "micro_batch", "world", "per_rank"),
    [
        (16, 4, 1, 4),
        (16, 4, 2, 2),
        (16, 4, 3, 2),
        (16, 4, 4, 1),
        (16, 4, 8, 1),
        (10, 4, 1, 3),
        (10, 4, 2, 2),
        (1, 1, 4, 1),
    ],
)
def test_every_rank_gets_as_many_micro_batches_as_the_fullest(global_batch, micro_batch, world, per_rank):
    config = run_config(trainer=TrainerConfig(global_batch_size=global_batch, micro_batch_size=micro_batch))
    assert micro_batches_per_rank(config, world) == per_rank
    settings = deepspeed_config(config, world, Precision.fp32, on_gpu=False)
    assert settings["gradient_accumulation_steps"] == per_rank
    # DeepSpeed insists on this product.
    assert settings["train_batch_size"] == settings["train_micro_batch_size_per_gpu"] * per_rank * world


def test_what_deepspeed_would_choose_by_itself_is_written_out():
    settings = deepspeed_config(run_config(trainer=TrainerConfig(grad_clip=0.0)), 2, Precision.fp32, on_gpu=False)
    assert settings["gradient_clipping"] == 0.0  # absent means 1.0
    assert settings["zero_optimization"]["overlap_comm"] is False  # absent means true at stage 3
    assert settings["zero_optimization"]["stage"] == 3


@pytest.mark.parametrize(
    ("precision", "accumulates"), [(Precision.bf16, "fp32"), (Precision.fp16, "fp32"), (Precision.fp32, None)]
)
def test_half_precision_accumulates_gradients_in_fp32(precision, accumulates):
    settings = deepspeed_config(run_config(), 2, precision, on_gpu=True)
    assert settings.get("data_types", {}).get("grad_accum_dtype") == accumulates
    assert settings["bf16"]["enabled"] is (precision is Precision.bf16)
    assert settings["fp16"]["enabled"] is (precision is Precision.fp16)


@pytest.mark.parametrize(
    ("stage", "world", "offload", "expected"),
    [(2, 1, False, False), (2, 2, False, True), (2, 1, True, True), (3, 1, False, True), (1, 2, False, False)],
)
def test_reductions_overlap_where_there_is_something_to_send(stage, world, offload, expected):
    """Else DeepSpeed would hold a second bucket and wait for the device after each backward pass, for nothing."""
    kind = OptimizerOffload.cpu if offload else OptimizerOffload.none
    config = run_config(zero=ZeroConfig(stage=stage, offload_optimizer=kind))
    settings = deepspeed_config(config, world, Precision.bf16, on_gpu=True)
    assert settings["zero_optimization"]["overlap_comm"] is expected
    assert not deepspeed_config(config, world, Precision.bf16, on_gpu=False)["zero_optimization"]["overlap_comm"]
    assert settings["timers"]["throughput"]["enabled"] is False  # it waits twice for each micro-batch


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_stage_3_settings_stay_out_of_the_other_stages(stage):
    zero = deepspeed_config(run_config(zero=ZeroConfig(stage=stage)), 2, Precision.fp32, on_gpu=True)[
        "zero_optimization"
    ]
    assert not [key for key in zero if key.startswith(("stage3_", "offload_"))]


def test_offload():
    offload = ZeroConfig(offload_optimizer=OptimizerOffload.cpu, offload_param=Offload.cpu)
    zero = deepspeed_config(run_config(zero=offload), 2, Precision.bf16, on_gpu=True)["zero_optimization"]
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert zero["offload_param"] == {"device": "cpu", "pin_memory": True}


@pytest.mark.parametrize("stage", [1, 2])
def test_optimizer_states_may_be_offloaded_below_stage_3(stage):
    zero = deepspeed_config(
        run_config(zero=ZeroConfig(stage=stage, offload_optimizer=OptimizerOffload.cpu)),
        2,
        Precision.fp32,
        on_gpu=False,
    )["zero_optimization"]
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": False}


def test_states_on_a_disk_are_updated_in_small_parts_that_a_user_may_change():
    disk = ZeroConfig(offload_optimizer=OptimizerOffload.nvme, nvme_path="/scratch")
    zero = deepspeed_config(run_config(zero=disk), 2, Precision.bf16, on_gpu=True)["zero_optimization"]
    assert zero["offload_optimizer"]["nvme_path"] == "/scratch"
    assert zero["sub_group_size"] == 20_000_000
    own = replace(disk, settings={"zero_optimization": {"sub_group_size": 5}})
    assert (
        deepspeed_config(run_config(zero=own), 2, Precision.bf16, on_gpu=True)["zero_optimization"]["sub_group_size"]
        == 5
    )


def test_every_state_of_an_optimizer_gets_a_buffer_where_states_are_on_a_disk(monkeypatch):
    config = run_config(zero=ZeroConfig(offload_optimizer=OptimizerOffload.nvme, nvme_path="/scratch"))
    few = replace(config.zero, settings={"zero_optimization": {"offload_optimizer": {"buffer_count": 4}}})

    def buffers() -> int:
        settings = deepspeed_config(config, 2, Precision.bf16, on_gpu=True)
        return settings["zero_optimization"]["offload_optimizer"]["buffer_count"]

    assert buffers() == 4 and not list(check_zero(replace(config, zero=few)))
    monkeypatch.setattr(AdamW, "states_per_parameter", 3)
    assert buffers() == 5
    (problem,) = check_zero(replace(config, zero=few))
    assert problem.where.endswith("buffer_count") and problem.fix == "5 or more"
