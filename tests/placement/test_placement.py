"""Every task x method x stage takes its steps on an accelerator: nothing is mixed with the CPU, nothing waits unseen, and the
numbers are those of the CPU. The accelerator is simulated (`simulated_device.py`)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.placement.cells import MICRO_BATCH, STAGES, STEP, Cell, Found, Server, cells
from tools import case_matrix

WITHOUT_KERNEL = {"qlora": "bitsandbytes has no kernels for a device that it does not know"}
"""Methods that a simulated device cannot compute."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("placement"))
    yield server
    server.close()


def problems(found: Found, expected: Found) -> list[str]:
    """What is wrong with a cell on the device; expected: the same on the CPU."""
    if found.refused:
        return [] if expected.refused else [f"refused on the device alone: {found.refused}"]
    if found.error.startswith("UserError") and found.error == expected.error:
        return []  # refused by the ranks, on either device
    if found.error:
        return [f"{found.error}\n{found.log[-1500:]}"]
    if expected.error:
        return [f"on the CPU: {expected.error}"]
    wrong = found.not_allowed()
    if found.engines != 1:
        wrong.append(f"{found.engines} engines live when the run's own is built")
    if not found.device.startswith("sim"):
        wrong.append(f"it was computed on {found.device}")
    half = 100 if found.name.startswith("bf16") else 1  # its kernels round otherwise
    if found.losses[0] != pytest.approx(expected.losses[0], rel=half * 1e-5):
        wrong.append(f"first loss {found.losses[0]}, {expected.losses[0]} on the CPU")
    if found.norms[0] != pytest.approx(expected.norms[0], rel=half * 1e-4):
        wrong.append(f"first gradient norm {found.norms[0]}, {expected.norms[0]} on the CPU")
    # AdamW amplifies differences of small gradients.
    if found.losses[1] != pytest.approx(expected.losses[1], rel=max(half * 1e-4, 2e-3)):
        wrong.append(f"second loss {found.losses[1]}, {expected.losses[1]} on the CPU")
    return wrong


def check(server: Server, chosen: list[Cell]) -> int:
    """How many cells were computed; fails with all that is wrong."""
    wrong, computed = [], 0
    for cell in chosen:
        if any(f"-{method}-" in cell.name for method in WITHOUT_KERNEL):
            continue
        found = server.run(cell)
        computed += not found.refused
        wrong += [f"{cell.name}: {problem}" for problem in problems(found, server.run(cell, simulated=False))]
    assert not wrong, f"{len(wrong)} of {computed} computed cells:\n" + "\n".join(wrong)
    return computed


SAMPLE = (
    *("chat-full-2", "chat-full-0", "causal_lm-lora-3", "classification-head-1", "preference-full-3", "reward-ia3-0"),
    *("embedding-full-2", "token_classification-vera-1", "question_answering-oft-2", "seq2seq-lora-3", "dora-2"),
    *("classification-features-3", "chat-ulmfit-3", "causal_lm-freeze-1", "chat-importance-2", "preference-prefix-0"),
    *("chat-p_tuning-2", "embedding-lora-3", "causal_lm-prompt-3"),
)
"""Every task, method and stage at least once, within a few minutes."""


@pytest.mark.ci
def test_a_sample_of_the_matrix(server: Server) -> None:
    chosen = [cell for cell in cells(server.folder, list(case_matrix.TASKS), STAGES) if cell.name in SAMPLE]
    assert len(chosen) == len(SAMPLE)
    assert check(server, chosen) == len(SAMPLE)


def test_the_sample_leaves_nothing_out() -> None:
    words = {word for name in SAMPLE for word in name.split("-")}
    assert set(case_matrix.TASKS) <= words
    assert set(case_matrix.METHODS) - set(WITHOUT_KERNEL) <= words
    assert set(map(str, STAGES)) <= words


COMPUTED = {
    "chat": 13,
    "causal_lm": 11,
    "classification": 14,
    "preference": 9,
    "reward": 10,
    "embedding": 8,
    "token_classification": 9,
    "question_answering": 9,
    "seq2seq": 9,
}
"""Cells of each task at a stage that are not refused by the rules, variants included, at least."""


@pytest.mark.slow
@pytest.mark.parametrize("task", case_matrix.TASKS)
@pytest.mark.parametrize("stage", STAGES)
def test_the_whole_matrix(server: Server, stage: int, task: str) -> None:
    computed = check(server, list(cells(server.folder, [task], [stage])))
    assert computed >= COMPUTED[task]


def cell(server: Server, name: str) -> Cell:
    return next(one for one in cells(server.folder, list(case_matrix.TASKS), STAGES) if one.name == name)


@pytest.mark.ci
def test_a_mix_of_devices_and_a_read_are_seen(server: Server) -> None:
    """Planted in the head: a mask that stays on the CPU, and a loss that is read in every micro-batch."""
    full = cell(server, "chat-full-2")
    mixed = server.run(full, plant="mix")
    assert mixed.error.startswith("MIXED mul of tensors on sim and on the CPU") and mixed.error.endswith("tests:_mix")
    read = server.run(full, plant="read")
    assert not read.error
    assert read.not_allowed() == ["_local_scalar_dense at tests:_read: 2 times"]


@pytest.mark.ci
def test_how_often_a_step_waits(server: Server) -> None:
    """In bf16, whose packed rows have a kernel: nothing in a micro-batch below stage 3, where the backward pass is waited for, and
    twice or three times for what decides of a step."""
    for stage in (1, 2, 3):
        # Without an evaluation, after which stage 3 looks at the order of its fetches anew.
        longer = ("evaluate.at_start=false", "evaluate.every=100", "trainer.max_steps=3")
        words = [
            word
            for word in cell(server, f"bf16-{stage}").argv
            if not word.startswith(("evaluate.every", "trainer.max"))
        ]
        found = server.run(Cell(f"waits-{stage}", (*words, *longer)))
        assert found.kernels["attention"].endswith("varlen"), found.kernels
        assert not found.not_allowed()
        assert found.total(MICRO_BATCH) == (stage == 3), found.waits[-1]
        assert found.total(STEP) <= 3, found.waits[-1]


@pytest.mark.ci
def test_a_run_is_set_up_for_its_device(server: Server) -> None:
    """What stage 3 gathers ahead is of this model, and norms are one kernel unless they are not to be."""
    words = cell(server, "bf16-3").argv
    found = server.run(Cell("set-up", (*words, "trainer.tf32=true")))
    own = found.settings["zero_optimization"]
    assert 0 < own["stage3_prefetch_bucket_size"] < own["stage3_max_live_parameters"]
    assert found.kernels["norms"] == "torch's kernel" and found.products == "high"
    plain = server.run(Cell("plain-norms", (*words, "model.fused_norms=false")))
    assert plain.kernels["norms"] == "blocks of rows" and plain.products == "highest"


@pytest.mark.ci
@pytest.mark.parametrize(
    ("name", "further"),
    [
        ("chat-importance-2", ()),
        ("ulmfit-language-model-3", ("model.path=models/decoder",)),
        ("classification-features-3", ()),
        ("ewc-2", ()),
        ("preference-full-3", ("task.reference_model=models/decoder",)),
    ],
)
def test_what_came_before_is_gone_when_the_engine_is_built(server: Server, name: str, further: tuple[str, ...]) -> None:
    """An engine that scored weights, trained a stage or computed references: its memory is free, and it waits in no step."""
    words = cell(server, name).argv
    found = server.run(Cell(f"before-{name}{len(further)}", (*words, *further)))
    assert not found.error and found.engines == 1, found.error


@pytest.mark.ci
def test_an_evaluation_waits_for_its_sums_alone(server: Server) -> None:
    words = cell(server, "bf16-2").argv
    found = server.run(
        Cell("evaluated", (*words, "evaluate.micro_batch_size=1", "data.packing=false", "data.split.validation=0.25"))
    )
    ((micro_batches, waits),) = found.evaluations
    assert micro_batches > 4
    assert sum(count for *_, count in waits) < 4, waits


@pytest.mark.ci
def test_packed_rows_in_one_kernel_learn_what_they_learn_on_the_cpu(server: Server) -> None:
    packed = cell(server, "bf16-2")
    found, expected = server.run(Cell("packed", packed.argv)), server.run(Cell("packed", packed.argv), simulated=False)
    assert found.kernels["attention"].endswith("varlen")  # the proof at the start has found nothing wrong with it
    assert found.losses == pytest.approx(expected.losses, rel=1e-2)
    assert found.norms == pytest.approx(expected.norms, rel=3e-2)


@pytest.mark.ci
@pytest.mark.parametrize(("stage", "where"), [(0, "full"), (2, "full"), (2, "full_behind")])
def test_a_size_that_runs_out_of_memory_is_left(server: Server, stage: int, where: str) -> None:
    """With room for two rows the run takes no more, and goes on as if no other size had been tried. (An error within a backward
    pass ends the process of a simulated device: that one is of the CPU.)"""
    full = cell(server, f"chat-full-{stage}").argv
    words = [word for word in full if not word.startswith("trainer.micro_batch_size=")]
    automatic = Cell(f"auto-{stage}", (*words, "trainer.micro_batch_size=auto", "data.packing=false"))
    simulated = where == "full"
    found = server.run(automatic, simulated=simulated, plant=where)
    assert not found.error and found.rows in (1, 2), found.error  # whichever is faster
    fixed = Cell(
        f"fixed-{stage}-{found.rows}", (*words, f"trainer.micro_batch_size={found.rows}", "data.packing=false")
    )
    expected = server.run(fixed, simulated=simulated)
    assert (found.losses, found.norms) == (expected.losses, expected.norms)


@pytest.mark.ci
def test_out_of_memory_names_what_frees_most(server: Server) -> None:
    rows = [word for word in cell(server, "chat-full-2").argv if not word.startswith("trainer.micro_batch_size=")]
    found = server.run(Cell("oom", (*rows, "trainer.micro_batch_size=4")), plant="full")
    assert found.error.startswith("TrainingFailed: out of memory in training (simulated: out of memory.")
    for words in ("trainer.micro_batch_size=2", "trainer.activation_checkpointing=true", "data.max_length="):
        assert words in found.error
    assert "zero=stage3" not in found.error  # which frees nothing on one rank
