"""The planner's memory and time against arithmetic by hand, and the refusal of a run that cannot fit."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from dstune.config.compose import compose
from dstune.config.schema import Precision
from dstune.core.errors import UserError
from dstune.launch import machine, preflight, room
from dstune.launch import plan as plan_verb
from dstune.launch.commands import Machine
from dstune.planning import activations, host
from dstune.planning.architecture import architecture
from dstune.planning.flops import forward_flops
from dstune.planning.hardware import DEVICES, GIB, Cluster
from dstune.planning.memory import memory
from dstune.planning.published import CONFIGS
from dstune.planning.setup import Setup, _dropout, setup
from dstune.planning.stage import resolved_precision
from dstune.planning.time import communication, speed_of, step_time

P = 8_030_261_248  # weights of Llama 3.1 8B
WORDS = 128256 * 4096


def llama(*overrides: str, ranks: int = 8, precision: Precision = Precision.bf16) -> Setup:
    config = compose(["model=llama3_8b", "task=causal_lm", "data=files", "zero=stage3", *overrides]).config
    model = architecture(CONFIGS["meta-llama/Llama-3.1-8B"])
    return setup(config, model, ranks=ranks, ranks_per_node=8, on_gpu=True, precision=precision, values={})


@pytest.mark.parametrize(
    ("stage", "weights", "optimizer", "sums"),
    [
        (1, 2 * P, 12 * P / 8, 4 * P),  # fp32 sums of all gradients
        (2, 2 * P, 12 * P / 8, 4 * P / 8),
        (3, 2 * P / 8, 12 * P / 8, 4 * P / 8),
    ],
)
def test_what_every_stage_partitions(stage: int, weights: float, optimizer: float, sums: float) -> None:
    # A global batch of several micro-batches.
    parts = memory(llama(f"zero.stage={stage}", "trainer.global_batch_size=64")).moments["forward"]
    norms = 65 * 4096  # too small to be partitioned: whole on every rank
    assert parts["weights"] == pytest.approx(weights + (2 * norms if stage == 3 else 0), abs=1e5)
    assert parts["optimizer"] == pytest.approx(optimizer, abs=10)
    assert parts["gradient sums"] == pytest.approx(sums, abs=10)


def test_fp32_at_stage_0_is_16_bytes_a_weight_and_the_copy_that_is_reduced() -> None:
    found = memory(llama("zero.stage=0", precision=Precision.fp32))
    step = found.moments["reduction"]
    assert step["weights"] + step["optimizer"] + step["gradients"] == 16 * P
    assert step["communication"] == 4 * 500_000_000
    alone = memory(llama("zero.stage=0", precision=Precision.fp32, ranks=1)).moments["reduction"]
    assert not alone["communication"], "nothing is reduced, so nothing is copied for it"


def test_a_layer_keeps_41_times_its_positions_and_width() -> None:
    # Of a layer of Llama 8B, in units of positions x 4096 bytes: the inputs of two norms 2 x 2, inputs of the
    # projections 2 x 2, four tensors of the feed-forward layer 4 x 2 x 3.5, query, keys and values 1.5 x 2, output 2.
    s = llama("data.max_length=1024", "trainer.micro_batch_size=1")
    expected = (2 * 2 + 4 + 28 + 3 + 2) * 1024 * 4096
    sums, scales = 4 * 32 * 1024, 2 * 4 * 1024
    assert activations.layer(s).saved == expected + sums + scales


def test_a_rate_of_dropout_that_is_no_number_is_none() -> None:
    assert _dropout({"hidden_dropout_prob": "x", "dropout": 0.1}) == 0.1
    assert _dropout({"hidden_dropout_prob": 0.0, "dropout_rate": ["x"]}) == 0.0


def test_checkpointing_keeps_inputs_of_layers_and_one_layer() -> None:
    plain, again = (
        memory(llama("data.max_length=4096", f"trainer.activation_checkpointing={word}")) for word in ("false", "true")
    )
    inputs = 32 * 4 * 4096 * 4096 * 2
    assert again.moments["forward"]["activations"] == pytest.approx(inputs, rel=0.1)
    assert plain.moments["forward"]["activations"] > 20 * inputs
    assert again.moments["backward"]["activations"] > again.moments["forward"]["activations"]


def test_selective_checkpointing_keeps_products_and_attention() -> None:
    # In units of positions x 4096 bytes: the input 2, query, key and value 2 x 1.5, attended and projected 2 x 2, gate and up
    # 2 x 2 x 3.5, down 2: 25 of the 44 that are kept without it.
    s = llama("data.max_length=4096", "trainer.micro_batch_size=1", "trainer.activation_checkpointing=selective")
    sums = 4 * 32 * 4096
    assert activations.layer(s).kept_bytes(s.checkpointing) == (2 + 3 + 4 + 14 + 2) * 4096 * 4096 + sums
    held = memory(s).moments["forward"]["activations"]
    others = [memory(replace(s, checkpointing=kind)).moments["forward"]["activations"] for kind in (True, False)]
    assert others[0] < held < others[1]
    speed = speed_of(Cluster(DEVICES["H100-80G"], 8), 2)
    times = [step_time(replace(s, checkpointing=kind), speed).compute for kind in (True, s.checkpointing, False)]
    assert times[0] > times[1] == times[2]  # no product is computed twice


def test_feed_forward_layers_in_pieces_keep_nothing_of_themselves() -> None:
    long = ["data.max_length=4096", "trainer.micro_batch_size=1"]
    whole, pieces = (llama(*long, f"trainer.mlp_tiles={count}") for count in (1, 4))
    saved = [activations.layer(s).saved for s in (whole, pieces)]
    assert saved[0] - saved[1] == 4 * 4096 * 14336 * 2
    # A piece of 1,024 positions: four tensors again and two gradients, where the whole has two gradients beside what it keeps.
    working = [activations.layer(s).working for s in (whole, pieces)]
    assert working[0] - working[1] == (2 * 4096 - 6 * 1024) * 14336 * 2
    speed = speed_of(Cluster(DEVICES["H100-80G"], 8), 2)
    again = step_time(pieces, speed).compute - step_time(whole, speed).compute
    products = 2 * 4096 * 32 * 3 * 4096 * 14336
    assert again * speed.flops == pytest.approx(whole.micro_batches * products, rel=1e-3)


def test_lora_trains_two_matrices_beside_each_linear_layer() -> None:
    s = llama("method=lora", "method.rank=16", "zero.stage=2", ranks=1)
    assert s.trained_count == 32 * (16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)))
    parts = memory(s).moments["forward"]
    assert parts["weights"] == 2 * P + 2 * s.trained_count
    assert parts["optimizer"] == 12 * s.trained_count


def test_offloading_moves_optimizer_states_to_the_host() -> None:
    found = memory(llama("zero.offload_optimizer=cpu"))
    assert "optimizer" not in found.parts
    assert found.host == pytest.approx(16 * P / 8, rel=1e-6)
    assert memory(llama("zero.offload_optimizer=cpu", "zero.offload_param=cpu")).parts["weights"] < 10 * 2**20


def test_on_a_disk_the_host_keeps_gradients_and_four_buffers() -> None:
    # Llama 8B on 8 ranks: 4 bytes of gradients for each of its weights, and buffers of the embedding's share and 20 million more.
    buffers = 4 * 4 * (128256 * 4096 / 8 + 20e6)
    assert memory(llama("zero.offload_optimizer=nvme")).host == pytest.approx(4 * P / 8 + buffers, rel=1e-3)
    more = memory(replace(llama("zero.offload_optimizer=nvme"), moments=3)).host
    assert more == pytest.approx(4 * P / 8 + buffers * 5 / 4, rel=1e-3)
    own = "zero.settings={zero_optimization:{sub_group_size:1000}}"
    assert memory(llama("zero.offload_optimizer=nvme", own)).host < memory(llama("zero.offload_optimizer=nvme")).host


def test_communication_of_a_step_by_stage() -> None:
    around = 7 / 8
    batches = ["trainer.micro_batch_size=1", "trainer.global_batch_size=16"]  # two micro-batches of a rank
    assert communication(llama("zero.stage=2", *batches)) == pytest.approx((2 * 2 + 1) * around * 2 * P)
    assert communication(llama("zero.stage=3", *batches)) == pytest.approx(2 * around * 3 * 2 * P)


def test_a_step_of_arithmetic_alone_is_six_operations_a_weight_and_token() -> None:
    s = llama("data.max_length=1024", "trainer.micro_batch_size=1", "trainer.global_batch_size=8")
    linear, attention, head = forward_flops(s)
    assert linear + head == 2 * 1024 * (P - WORDS - 65 * 4096)  # without the embedding and the norms
    assert attention == 4 * 32 * 4096 * 1024 * 1024
    time = step_time(s, speed_of(Cluster(DEVICES["H100-80G"], 8), 2))
    operations = 3 * (linear + head + attention)
    assert time.compute == pytest.approx(operations / (989e12 * DEVICES["H100-80G"].share_of_peak))


# Published: torchtitan, benchmarks/llama3_h100_202412_torchtitan.md, tables 1 and 3: Llama 3.1 8B, FSDP, fp32 weights,
# gradients and AdamW states (16 bytes), on 8 and 128 GPUs otherwise alike.
def test_what_more_ranks_save_agrees_with_torchtitans_tables() -> None:
    eight, many = (memory(llama("data.max_length=8192", ranks=ranks)).moments["forward"] for ranks in (8, 128))
    ours = sum(eight.values()) - sum(many.values())
    theirs = ours * 16 / 18 / GIB  # DeepSpeed holds bf16 weights beside fp32 ones
    for published in (82.4 - 67.0, 77.0 - 62.0, 76.8 - 61.8):
        assert theirs == pytest.approx(published, rel=0.1)


# ---- the check before a launch ----


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A model of 4 GiB in fp32 whose weights are random, with a tokenizer's file."""
    values = CONFIGS["meta-llama/Llama-3.2-1B"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    return tmp_path


def run(folder: Path, *more: str) -> list[str]:
    rows = f"data.train={folder / 'rows.jsonl'}"
    return [f"model.path={folder}", "model.weights=random", "task=causal_lm", "data=files", rows, *more]


def gpu(monkeypatch: pytest.MonkeyPatch, free_gib: float) -> None:
    cluster = Cluster(replace(DEVICES["A100-40G"], memory_gib=39.4), 1, host_gib=0.0)
    monkeypatch.setattr(machine, "here", lambda config, env=None, ranks=None: machine.Here(cluster, free_gib))


def test_a_run_that_cannot_fit_is_refused_with_what_would(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, 16.0)  # 1.24B weights x 18 bytes take 20.7 GiB
    config = compose(run(small, "trainer.precision=bf16", "zero=stage2", "data.max_length=512")).config
    with pytest.raises(UserError, match="a rank takes at least") as caught:
        preflight.resolve_run(config)
    assert "run.force=true" in str(caught.value)
    (problem,) = caught.value.problems
    assert "no choice fits here" in problem.fix
    preflight.resolve_run(replace(config, run=replace(config.run, force=True)))


def test_the_advice_fits(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, 26.0)
    (small / "rows.jsonl").write_text('{"text": "' + "word " * 200 + '"}\n')
    wide = ["trainer.precision=bf16", "zero=stage1", "data.max_length=4096", "trainer.micro_batch_size=8"]
    config = compose(run(small, *wide)).config
    assert room.memory_problems(config) == []  # one short row: nothing is certain
    (small / "rows.jsonl").write_text(('{"text": "' + "word " * 2000 + '"}\n') * 4000)
    (problem,) = room.memory_problems(config)
    words = [word for word in problem.fix.split(" (")[0].split() if "=" in word]
    assert any(word.startswith("trainer.micro_batch_size=") for word in words)
    assert room.memory_problems(compose(run(small, *wide, *words)).config) == []


def test_a_micro_batch_that_is_measured_is_planned_as_large_as_it_fits(small: Path) -> None:
    auto = run(small, "trainer.precision=bf16", "zero=stage2", "trainer.micro_batch_size=auto", "data.max_length=512")
    config = compose([*auto, "trainer.global_batch_size=64"]).config
    cluster = Cluster(replace(DEVICES["A100-40G"], memory_gib=39.4), 1, host_gib=0.0)
    found = plan_verb.planned(config, cluster).plan
    (same,) = [row for row in found.choices if (row.zero, row.offload, row.checkpointing) == ("stage2", "none", False)]
    assert found.configured.fits and found.configured.setup.micro_batch_size == same.setup.micro_batch_size > 1


def test_a_measured_micro_batch_is_compared_with_the_memory_of_one_row(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (small / "rows.jsonl").write_text(('{"text": "' + "word " * 2000 + '"}\n') * 4000)
    long = ["trainer.precision=bf16", "zero=stage1", "data.max_length=4096"]
    gpu(monkeypatch, 27.0)
    assert room.memory_problems(compose(run(small, *long, "trainer.micro_batch_size=8")).config)
    assert room.memory_problems(compose(run(small, *long, "trainer.micro_batch_size=auto")).config) == []
    gpu(monkeypatch, 12.0)
    assert room.memory_problems(compose(run(small, *long, "trainer.micro_batch_size=auto")).config)


@pytest.mark.parametrize("more", [["method=lora"], ["zero=stage2"], ["trainer.precision=fp32", "zero=stage0"]])
def test_what_fits_is_not_refused(small: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]) -> None:
    gpu(monkeypatch, 24.0)
    assert room.memory_problems(compose(run(small, "trainer.precision=bf16", *more)).config) == []


def test_an_architecture_that_the_planner_does_not_know_is_let_through(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(monkeypatch, 0.1)
    (small / "config.json").write_text('{"model_type": "unheard-of"}')
    assert room.memory_problems(compose(run(small)).config) == []


# ---- what is free on this machine ----


def listing(monkeypatch: pytest.MonkeyPatch, *lines: str, **env: str) -> machine.Here:
    """What `machine.here` makes of the driver's tool's answer, for one rank."""

    def run(command: list[str], **options: object) -> SimpleNamespace:
        columns = command[1].count(",")
        if any(line.count(",") != columns for line in lines):  # a driver that does not know the key
            raise subprocess.CalledProcessError(2, command)
        return SimpleNamespace(stdout="\n".join(lines) + "\n")

    monkeypatch.setattr(machine.subprocess, "run", run)
    monkeypatch.setattr(machine, "this_machine", lambda env: Machine(gpus=1, cores=2))
    return machine.here(compose(["experiment=quickstart"]).config, env)


FULL, FREE = (f"NVIDIA H100 80GB HBM3, GPU-{name}, 81559, {free}" for name, free in (("aa11", 1024), ("bb22", 80000)))


def test_a_gpu_that_the_run_does_not_use_may_be_full(monkeypatch: pytest.MonkeyPatch) -> None:
    assert listing(monkeypatch, FULL, FREE, CUDA_VISIBLE_DEVICES="1").free_gib == 80000 / 1024
    assert listing(monkeypatch, FULL, FREE, CUDA_VISIBLE_DEVICES="GPU-bb").free_gib == 80000 / 1024
    assert listing(monkeypatch, FREE, FULL).free_gib == 80000 / 1024  # one rank takes the first
    assert listing(monkeypatch, FULL, FREE).free_gib == 1.0
    assert listing(monkeypatch, FULL, FREE, CUDA_VISIBLE_DEVICES="MIG-cc33").free_gib == float("inf")
    other = FREE.replace("H100 80GB HBM3", "GeForce RTX 4090")
    assert listing(monkeypatch, FULL, other).free_gib == float("inf")  # CUDA may count them the other way round
    assert listing(monkeypatch, FULL, other, CUDA_DEVICE_ORDER="PCI_BUS_ID").free_gib == 1.0


@pytest.mark.parametrize(
    ("capability", "stage", "expected"),
    [
        ("9.0", 2, Precision.bf16),
        ("9.0", 0, Precision.fp32),
        ("7.5", 2, Precision.fp16),
        ("7.0", 0, Precision.fp32),
        ("6.1", 2, Precision.fp32),
        ("[N/A]", 2, Precision.bf16),
        (None, 2, Precision.bf16),
    ],
)
def test_the_plan_computes_in_what_the_ranks_will(
    capability: str | None, stage: int, expected: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = listing(monkeypatch, FREE if capability is None else f"{FREE}, {capability}")
    assert found.free_gib == 80000 / 1024
    config = compose(["experiment=quickstart", f"zero=stage{stage}"]).config
    assert resolved_precision(config, found.cluster.device) is expected


def test_without_the_drivers_tool_nothing_is_known_of_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert listing(monkeypatch, "").free_gib == float("inf")


def test_ranks_of_another_launcher_share_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "this_machine", lambda env: Machine(gpus=0, cores=8))
    config = compose(["experiment=quickstart"]).config
    assert machine.here(config, {}, 1).free_gib == pytest.approx(2 * machine.here(config, {}).free_gib, rel=0.1)


def test_what_files_take_of_a_containers_memory_is_free(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 200\nfile 700\nshmem 50\ninactive_file 400\nactive_file 250\n")
    assert host.container_limit(tmp_path) == 750


def test_what_does_not_train_needs_no_memory_to_train(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, 1.0)
    preflight.resolve_run(compose(run(small)).config, trains=False)
    with pytest.raises(UserError, match="a rank takes at least"):
        preflight.resolve_run(compose(run(small)).config)


def test_states_of_an_optimizer_are_those_of_each_kind_of_weight() -> None:
    """Llama 3.1 8B: an embedding and a head of 525,336,576 elements each, 65 norms of 4,096, the rest in matrices of layers."""
    norms = 65 * 4096
    matrices = P - 2 * WORDS - norms
    expected = {
        "adamw": 8 * P,
        "lion": 4 * P,
        "muon": 4 * matrices + 8 * (2 * WORDS + norms),
        "adamw_8bit": (2 + 8 / 256) * (matrices + WORDS) + 8 * (WORDS + norms),
    }
    for name, size in expected.items():
        setup = llama(f"optimizer={name}")
        assert setup.state_bytes * setup.trained_count == pytest.approx(size, rel=1e-12)
        states = memory(setup).parts["optimizer"] - memory(replace(setup, state_bytes=0.0)).parts.get("optimizer", 0)
        assert states == pytest.approx(size / setup.ranks, rel=1e-6), name
