"""`trainer.profile_steps`: which steps are recorded, what is written, and that nothing of it stops a run."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dstune.config.compose import compose
from dstune.config.validate import validate
from dstune.core.errors import UserError
from dstune.trainer.callbacks.profiler import StepProfiler, as_table

RUN = ("model=smollm2", "task=chat", "data=chitchat")


def recorded(file: Path) -> set[str]:
    names = {event["name"] for event in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]}
    return {name for name in names if name.startswith("optimizer step") or name in ("aten::mm", "aten::tanh")}


def test_steps_are_recorded_and_what_lies_between_them_is_not(tmp_path: Path) -> None:
    messages: list[str] = []
    profiler = StepProfiler(3, tmp_path, 0, messages.append)
    weight = torch.ones(8, 8)
    disturbed = []
    for step in range(3, 9):
        profiler._before_step(step)
        weight @ weight
        disturbed.append(profiler.disturbs)
        profiler._after_step(pause=step == 4)
        if step == 4:
            weight.tanh()  # an evaluation
        profiler.write()
    # Recorded 3 and 4, behind the evaluation 5; the one behind a recording may wait for a rank that writes.
    assert disturbed == [True, True, True, True, False, False]
    names = ["steps-3-4.rank-0.json.gz", "steps-3-4.rank-0.txt", "steps-5-5.rank-0.json.gz", "steps-5-5.rank-0.txt"]
    assert sorted(file.name for file in (tmp_path / "profile").iterdir()) == names
    assert recorded(tmp_path / "profile" / names[0]) == {"optimizer step 3", "optimizer step 4", "aten::mm"}
    assert recorded(tmp_path / "profile" / names[2]) == {"optimizer step 5", "aten::mm"}
    assert "aten::mm" in (tmp_path / "profile" / names[1]).read_text()
    assert [line.split(":")[0] for line in messages] == ["profile of steps 3 to 4", "profile of step 5"]


def test_what_the_end_of_a_run_cuts_short_is_written(tmp_path: Path) -> None:
    profiler = StepProfiler(100, tmp_path, 1, pytest.fail)
    profiler._before_step(3)
    profiler._after_step(pause=False)
    profiler.close()
    assert recorded(tmp_path / "profile" / "steps-3-3.rank-1.json.gz") == {"optimizer step 3"}
    profiler.close()


def test_off_records_nothing(tmp_path: Path) -> None:
    profiler = StepProfiler(0, tmp_path, 0, pytest.fail)
    profiler._before_step(3)
    assert not profiler.disturbs
    profiler._after_step(pause=True)
    profiler.write()
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fails_costs_the_profile_alone(tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("no folder")
    messages: list[str] = []
    profiler = StepProfiler(5, tmp_path, 0, messages.append)
    profiler._before_step(3)
    profiler._after_step(pause=True)
    profiler.write()
    assert messages[0].startswith("warning: no profile: ")
    profiler._before_step(4)
    assert not profiler._steps_left


def operation(name: str, cpu: float, device: float, calls: int, **more: Any) -> SimpleNamespace:
    kind = SimpleNamespace(name=more.pop("kind", "CPU"))
    return SimpleNamespace(
        key=name, self_cpu_time_total=cpu, self_device_time_total=device, count=calls, device_type=kind, **more
    )


def test_the_table_is_sorted_by_what_is_short() -> None:
    found = [
        operation("aten::mm", 1000, 9000, 4),
        operation("aten::copy_", 3000, 1000, 7),
        operation("sm90_gemm", 0, 9000, 4, kind="CUDA"),  # counted with what has started it
        operation("optimizer step 3", 50000, 0, 1, is_user_annotation=True),
    ]
    lines = as_table(found, "step 3 of rank 0", on_gpu=False).splitlines()
    assert lines[0] == "step 3 of rank 0: 0.004 s of self CPU time"
    assert [line.split() for line in lines[3:]] == [
        ["3.00", "75.0%", "7", "aten::copy_"],
        ["1.00", "25.0%", "4", "aten::mm"],
    ]
    lines = as_table(found, "step 3 of rank 0", on_gpu=True).splitlines()
    assert lines[0] == "step 3 of rank 0: 0.010 s of device time"
    assert [line.split() for line in lines[3:]] == [
        ["9.00", "90.0%", "4", "aten::mm"],
        ["1.00", "10.0%", "7", "aten::copy_"],
    ]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["trainer.profile_steps=-1"], "must be at least 0 and at most 100"),
        (["trainer.profile_steps=1000"], "must be at least 0 and at most 100"),
        (["trainer.profile_steps=4", "trainer.max_steps=2"], "trainer.max_steps=6, or trainer.profile_steps=0"),
    ],
)
def test_what_cannot_be_profiled_is_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=r"trainer\.profile_steps") as refused:
        validate(compose([*RUN, *overrides]).config)
    assert words in str(refused.value)
    validate(compose([*RUN, "trainer.profile_steps=4", "trainer.max_steps=3"]).config)
