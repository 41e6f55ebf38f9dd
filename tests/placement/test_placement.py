"""Every task x method x stage takes its steps on an accelerator: nothing is mixed with the CPU, nothing waits unseen, and the
numbers are those of the CPU. The accelerator is simulated (`simulated_device.py`)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.placement.cells import GROUP, MICRO_BATCH, STAGES, STEP, Cell, Found, Server, cells
from tools import side_by_side

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
    if found.error:
        return [f"{found.error}\n{found.log[-1500:]}"]
    if expected.error:
        return [f"on the CPU: {expected.error}"]
    wrong = found.not_allowed()
    if not found.device.startswith("sim"):
        wrong.append(f"it was computed on {found.device}")
    if found.losses[0] != pytest.approx(expected.losses[0], rel=1e-5):
        wrong.append(f"first loss {found.losses[0]}, {expected.losses[0]} on the CPU")
    if found.norms[0] != pytest.approx(expected.norms[0], rel=1e-4):
        wrong.append(f"first gradient norm {found.norms[0]}, {expected.norms[0]} on the CPU")
    if found.losses[1] != pytest.approx(expected.losses[1], rel=2e-3):  # AdamW makes much of little gradients
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
    *("embedding-full-2", "token_classification-vera-1", "question_answering-oft-2", "seq2seq-prompt-3", "dora-2"),
    *(
        "classification-features-3",
        "chat-ulmfit-3",
        "causal_lm-freeze-1",
        "chat-importance-2",
        "classification-prefix-0",
    ),
    *("chat-p_tuning-2", "embedding-lora-3"),
)
"""Every task, method and stage at least once, within a few minutes."""


@pytest.mark.ci
def test_a_sample_of_the_matrix(server: Server) -> None:
    chosen = [cell for cell in cells(server.folder, list(side_by_side.TASKS), STAGES) if cell.name in SAMPLE]
    assert len(chosen) == len(SAMPLE)
    assert check(server, chosen) == len(SAMPLE)


def test_the_sample_leaves_nothing_out() -> None:
    words = {word for name in SAMPLE for word in name.split("-")}
    assert set(side_by_side.TASKS) <= words
    assert set(side_by_side.METHODS) - set(WITHOUT_KERNEL) <= words
    assert set(map(str, STAGES)) <= words


COMPUTED = {
    "chat": 52,
    "causal_lm": 44,
    "classification": 56,
    "preference": 36,
    "reward": 40,
    "embedding": 40,
    "token_classification": 40,
    "question_answering": 40,
    "seq2seq": 40,
}
"""Cells of each task that are not refused by the rules, variants included."""


@pytest.mark.slow
@pytest.mark.parametrize("task", side_by_side.TASKS)
def test_the_whole_matrix(server: Server, task: str) -> None:
    computed = check(server, list(cells(server.folder, [task], STAGES)))
    assert computed >= COMPUTED[task]


def cell(server: Server, name: str) -> Cell:
    return next(one for one in cells(server.folder, list(side_by_side.TASKS), STAGES) if one.name == name)


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
    found = server.run(Cell("waits", cell(server, "chat-full-2").argv))
    assert found.total(MICRO_BATCH) <= 4
    assert found.total(STEP) <= 8, (GROUP, found.waits)
