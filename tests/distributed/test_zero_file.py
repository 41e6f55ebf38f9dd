"""Runs through `zero=file` at stages 1 to 3: the file's settings reach DeepSpeed's engine, and two steps are made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.command import metrics
from support.ranks import run_ranks
from support.tiny import save_decoder, write_dialogues

from dstune.config.compose import compose
from dstune.config.run_file import write_run
from dstune.config.validate import validate

PROGRAM = Path(__file__).with_name("zero_file_ranks.py")


def content(stage: int) -> dict:
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": 0.25,
        "bf16": {"enabled": False},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.003, "weight_decay": "auto"}},
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": 54321,
            "allgather_bucket_size": 65432,
            "sub_group_size": 20000,
            "round_robin_gradients": True,
            "contiguous_gradients": True,
            "stage3_prefetch_bucket_size": 7654,
            "stage3_param_persistence_threshold": "auto",
        },
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[int, tuple[dict, list[dict]]]:
    folder = tmp_path_factory.mktemp("zero_file")
    model = save_decoder(folder / "model")
    rows = write_dialogues(folder / "chats.jsonl", 24)
    directories = []
    for stage in (1, 2, 3):
        run_dir = folder / f"stage{stage}"
        run_dir.mkdir()
        file = folder / f"stage{stage}.json"
        file.write_text(json.dumps(content(stage)))
        values = [
            "trainer.max_steps=2",
            "trainer.global_batch_size=8",
            "data.max_length=64",
            "evaluate.every=0",
            "checkpoint.every=0",
            "data.packing=false",
        ]
        composed = compose(
            [
                f"model.path={model}",
                f"data.train={rows}",
                "zero=file",
                f"zero.path={file}",
                f"run.dir={run_dir}",
                "run.export=none",
                "evaluate.at_start=false",
                *values,
            ]
        )
        validate(composed.config)
        write_run(run_dir / "run.yaml", composed)
        file.unlink()  # the ranks do not look at it again
        directories.append(run_dir)
    output = run_ranks(PROGRAM, 2, [str(path) for path in directories])[0]
    engines = [json.loads(line.removeprefix("ENGINE ")) for line in output.splitlines() if line.startswith("ENGINE ")]
    return {stage: (engines[stage - 1], metrics(directories[stage - 1])) for stage in (1, 2, 3)}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_engine_has_the_settings_of_the_file(runs, stage):
    facts, _ = runs[stage]
    zero = facts["zero"]
    assert (zero["stage"], zero["reduce_bucket_size"], zero["allgather_bucket_size"]) == (stage, 54321, 65432)
    assert (zero["sub_group_size"], zero["round_robin_gradients"], zero["contiguous_gradients"]) == (20000, True, True)
    assert zero["prefetch_bucket_size"] == 7654
    assert zero["param_persistence_threshold"] == 100_000  # auto: dstune's own value
    assert (facts["clip"], facts["batch"]) == (0.25, 8)
    reduce, allgather, group = facts["buckets"]
    assert reduce == 54321
    assert (allgather == 65432) if stage < 3 else (group == 20000)


def test_two_steps_are_made_with_the_rate_of_the_file_alike_at_all_stages(runs):
    steps = {stage: [row for row in rows if "loss" in row] for stage, (_, rows) in runs.items()}
    for stage in (1, 2, 3):
        assert [row["step"] for row in steps[stage]] == [1, 2]
        assert max(row["lr"] for row in steps[stage]) == pytest.approx(0.003)
        for one, other in zip(steps[1], steps[stage], strict=True):
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
            assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
