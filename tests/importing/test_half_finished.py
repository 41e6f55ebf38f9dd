"""`dstune import CHECKPOINT`: a checkpoint of transformers' Trainer becomes a run. tests/parity/test_half_finished.py trains on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.trainer_checkpoints import ROWS, elements, shapes_of, write_checkpoint, write_rows

from dstune.cli import main
from dstune.config.run_file import read_run
from dstune.core.errors import UserError
from dstune.importing.sampler_order import TrainerSampler


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trainer")
    write_checkpoint(folder)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(original, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


TOKENS = ["task=causal_lm", "data.format=tokens", "data.train=rows.jsonl", "data.tokenizer=model"]


def imported(*words: str) -> int:
    return main(["import", "checkpoint-8", "--output", "run", *TOKENS, *words])


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert imported(*words) == 2
    assert not Path("run").exists(), "nothing is left behind"
    return capsys.readouterr().err


def rewrite(edit: Callable[[dict[str, Any]], None]) -> None:
    file = Path("checkpoint-8/trainer_state.json")
    state = json.loads(file.read_text())
    edit(state)
    file.write_text(json.dumps(state))


def rewrite_shards(edit: Callable[[dict[str, Any]], None], pattern: str = "*_optim_states.pt") -> None:
    for file in Path("checkpoint-8/global_step8").glob(pattern):
        content = torch.load(file, weights_only=True)
        edit(content.get("optimizer_state_dict") or content)
        torch.save(content, file)


def rewrite_arguments(**settings: Any) -> None:
    file = Path("checkpoint-8/training_args.bin")
    arguments = torch.load(file, weights_only=False)
    for name, value in settings.items():
        setattr(arguments, name, value)
    torch.save(arguments, file)


# ---- what is carried ----


def test_a_checkpoint_becomes_a_run(folder, capsys):
    from dstune.checkpoint import store
    from dstune.checkpoint.shards import Shards

    assert imported() == 0
    output = capsys.readouterr().out
    assert "step 8 of 16, written by 2 ranks at ZeRO stage 2" in output
    assert "next: dstune train run" in output
    config = read_run(Path("run/run.yaml")).config
    assert (config.optimizer.name, config.optimizer.lr, config.optimizer.weight_decay) == ("adamw", 1e-2, 0.1)
    assert (config.schedule.name, config.schedule.warmup_steps) == ("cosine", 3)
    assert (config.trainer.max_steps, config.trainer.global_batch_size, config.trainer.micro_batch_size) == (16, 8, 2)
    assert (config.trainer.seed, config.trainer.precision.value, config.zero.stage) == (7, "fp32", 2)
    checkpoint = store.newest(Path("run"))
    assert checkpoint is not None
    shards = Shards(checkpoint)
    for number, shapes in enumerate(shapes_of(Path("model"))):
        for kind, seed in (("weight", 10), ("exp_avg", 20), ("exp_avg_sq", 30)):
            read = torch.cat([shards.read(name, kind) for name in shapes])
            assert torch.equal(read, elements(seed + number, shapes))
        assert all(float(shards.scalars(name)["step"]) == 8 for name in shapes)
    state = store.read_state(checkpoint)
    assert (state["step"], state["train"]["planned_steps"]) == (8, 16)


def test_no_row_twice_and_none_left_out(folder):
    assert imported() == 0
    lines = [json.loads(line) for line in Path("run/order.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0] * 6 + [1] * 6 + [2] * 6
    for epoch in range(3):
        rows = [row for line in lines if line["epoch"] == epoch for row in line["rows"]]
        assert sorted(rows[:ROWS]) == list(range(ROWS))
        assert rows[ROWS:] == rows[: -ROWS % 4], "accelerate fills the last batches of an epoch with its first rows"


def trainers_rows(count: int, ranks: int, size: int, *, drop_last: bool, seed: int, epochs: int) -> list[list[int]]:
    """Return the rows of each epoch, as accelerate's loaders hand them to the ranks."""
    from accelerate.data_loader import prepare_data_loader
    from torch.utils.data import DataLoader, RandomSampler

    torch.manual_seed(seed)
    rows = list(range(count))
    loaders = [
        prepare_data_loader(
            DataLoader(rows, batch_size=size, sampler=RandomSampler(rows), drop_last=drop_last),
            num_processes=ranks,
            process_index=rank,
            put_on_device=False,
            use_seedable_sampler=True,
            data_seed=seed,
        )
        for rank in range(ranks)
    ]
    result = []
    for epoch in range(epochs):
        batches = []
        for loader in loaders:
            loader.set_epoch(epoch)
            batches.append(
                [batch.tolist() for batch in loader.base_dataloader] if ranks == 1 else list(loader.batch_sampler)
            )
        result.append([row for together in zip(*batches, strict=True) for batch in together for row in batch])
    return result


@pytest.mark.parametrize("count", [45, 48, 3, 101])
@pytest.mark.parametrize(("ranks", "size"), [(1, 2), (2, 2), (3, 4)])
@pytest.mark.parametrize("drop_last", [False, True])
def test_the_order_is_that_of_accelerate(count, ranks, size, drop_last):
    if drop_last and count < ranks * size:
        pytest.skip("no batch")
    sampler = TrainerSampler(count, 7, size, 2, ranks, drops_last=drop_last)
    expected = trainers_rows(count, ranks, size, drop_last=drop_last, seed=7, epochs=3)
    assert [sampler.epoch(number) for number in range(3)] == expected
    steps = [step for epoch in sampler.epochs(3 * sampler.steps) for step in epoch]
    assert [row for step in steps for row in step] == [row for epoch in expected for row in epoch]
    assert len(steps) == 3 * sampler.steps


def test_values_of_the_command_win_and_the_run_keeps_them(folder):
    assert imported("model.path=model", "evaluate.every=0", "zero=stage3") == 0
    config = read_run(Path("run/run.yaml")).config
    assert (config.model.path, config.zero.stage) == ("model", 3)


# ---- what is refused ----

REFUSED_ARGUMENTS = {
    "adafactor": ({"optim": "adafactor"}, "optim=adafactor: only AdamW"),
    "8 bits": ({"optim": "adamw_bnb_8bit"}, "optim=adamw_bnb_8bit: only AdamW"),
    "schedule": ({"lr_scheduler_type": "polynomial"}, "lr_scheduler_type=polynomial"),
    "smoothing": ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1"),
    "grouped": ({"train_sampling_strategy": "group_by_length"}, "the order of its rows cannot be computed"),
    "means of ranks": ({"average_tokens_across_devices": False}, "each rank took the mean of its own tokens"),
    "warm-up": ({"warmup_steps": 12}, "continue from a checkpoint of step 12 or later"),
    "other micro-batch": ({"per_device_train_batch_size": 4}, "train_micro_batch_size_per_gpu is 2"),
}


@pytest.mark.parametrize("case", REFUSED_ARGUMENTS)
def test_what_would_be_another_run_is_refused(case, folder, capsys):
    settings, message = REFUSED_ARGUMENTS[case]
    rewrite_arguments(**settings)
    assert message in refusal(capsys)


def test_an_order_by_random_states_is_refused(folder, capsys):
    file = Path("checkpoint-8/training_args.bin")
    arguments = torch.load(file, weights_only=False)
    arguments.accelerator_config.use_seedable_sampler = False
    torch.save(arguments, file)
    assert "use_seedable_sampler=false: the order of its rows cannot be computed" in refusal(capsys)


def test_other_parameter_groups_are_refused(folder, capsys):
    def decay_everywhere(state):
        for group in state["base_optimizer_state"]["param_groups"]:
            group["weight_decay"] = 0.1

    rewrite_shards(decay_everywhere)
    assert "norm.weight has weight decay there; in dstune norms, biases and other vectors have none" in refusal(capsys)


def test_other_moments_are_refused(folder, capsys):
    def one_moment(state):
        for moments in state["base_optimizer_state"]["state"].values():
            del moments["exp_avg_sq"]

    rewrite_shards(one_moment)
    assert "its optimizer keeps exp_avg for" in refusal(capsys)


def test_other_rows_are_refused(folder, capsys):
    write_rows(Path("rows.jsonl"), 90)
    assert "90 rows are 12 steps an epoch, and after step 8 its run was at epoch 1.3333" in refusal(capsys)


def test_rows_that_make_no_sample_are_refused(folder, capsys):
    rows = Path("rows.jsonl").read_text().splitlines(keepends=True)
    Path("rows.jsonl").write_text("".join([*rows[:-1], rows[0]]))
    assert imported("data.clean.duplicates=exact") == 2
    assert "its 45 rows make 44 samples" in capsys.readouterr().err


def test_a_schedule_that_the_arguments_do_not_have_is_refused(folder, capsys):
    rewrite(lambda state: state.update(log_history=[{"step": 8, "learning_rate": 1e-3}]))
    assert "at step 8 it trained with a rate of 0.001" in refusal(capsys)


def test_other_tokens_are_refused(folder, capsys):
    lengths = np.array([len(json.loads(line)["input_ids"]) for line in Path("rows.jsonl").read_text().splitlines()])
    steps = [step for epoch in TrainerSampler(ROWS, 7, 2, 2, 2).epochs(8) for step in epoch]
    tokens = np.cumsum([lengths[step].sum() for step in steps]).tolist()
    log = [{"step": step, "num_tokens": tokens[step - 1] + 1000} for step in (4, 8)]
    rewrite(lambda state: state.update(log_history=log))
    assert imported() == 0
    shutil.rmtree("run")
    log[1]["num_tokens"] -= 1
    rewrite(lambda state: state.update(log_history=log))
    assert "it made other tokens of them" in refusal(capsys)


def test_folders_that_are_no_such_checkpoint(folder, capsys):
    def refused(path: str) -> str:
        assert main(["import", path, "--output", "run", *TOKENS]) == 2
        return capsys.readouterr().err

    assert "give checkpoint-8" in refused(".").replace("./", "")
    shards = Path("checkpoint-8/global_step8")
    (shards / "zero_pp_rank_0_mp_rank_00_optim_states.pt").rename("away")
    assert "the shards of rank 0 are missing" in refused("checkpoint-8")
    Path("away").rename(shards / "zero_pp_rank_1_mp_rank_01_optim_states.pt")
    assert "only runs without tensor, pipeline or expert parallelism" in refused("checkpoint-8")
    Path("checkpoint-8/latest").unlink()
    assert "it has no DeepSpeed shards" in refused("checkpoint-8")
    rewrite(lambda state: state.update(global_step=16))
    assert "no step left: 16 of 16" in refused("checkpoint-8")


def test_the_command_line(folder, capsys):
    assert main(["import", "checkpoint-8", *TOKENS]) == 2
    assert "--output" in capsys.readouterr().err
    assert main(["import", "checkpoint-8", "--output", "model", *TOKENS]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["import", "checkpoint-8", "--output", "run", "--ranks", "2", *TOKENS]) == 2
    assert "a checkpoint says it itself" in capsys.readouterr().err
    shutil.rmtree("model")
    Path("checkpoint-8/model.safetensors").unlink()
    assert "model.path=MODEL" in refusal(capsys)


# ---- the order in a file ----


def order_of(tmp_path: Path, *lines: object, rows: int = 4, most: int = 2):
    from dstune.data.order_file import read_order

    path = tmp_path / "order.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return read_order(str(path), rows, most)


def test_a_run_trains_the_rows_of_the_file(tmp_path):
    from dstune.data.sampler import WrittenOrder

    lines = [{"epoch": 0, "rows": [3, 0]}, {"epoch": 0, "rows": [1]}, {"epoch": 1, "rows": [2, 2]}]
    order = WrittenOrder(np.array([5, 6, 7, 8]), np.array([1, 2, 3, 4]), order_of(tmp_path, *lines), micro_batch_size=1)
    steps = [order.global_batch(*order.locate(step)) for step in range(3)]
    assert [[part.samples for part in step.micro_batches] for step in steps] == [[[3], [0]], [[1]], [[2], [2]]]
    assert [(step.weight, step.tokens) for step in steps] == [(5, 13), (2, 6), (6, 14)]
    assert (order.steps(1), order.steps(2)) == (2, 3)
    with pytest.raises(UserError, match=r"the file has 3 steps, and the run is longer"):
        order.locate(3)
    with pytest.raises(UserError, match=r"the file has 2 passes over the rows"):
        order.steps(3)


def test_numbers_of_rows_that_make_no_sample_are_refused(tmp_path):
    """Where sample 3 is not row 3, because a row before it was a duplicate."""
    from types import SimpleNamespace

    from support.configs import run_config

    from dstune.config.schema import DataConfig
    from dstune.data.prepared import PreparedData, Split
    from dstune.trainer.data_loader import PreparedLoader

    (tmp_path / "order.jsonl").write_text('{"epoch": 0, "rows": [3, 0]}\n')
    config = run_config(data=DataConfig(train="rows.jsonl", packing=False, order=str(tmp_path / "order.jsonl")))
    split: Any = Split("train", SimpleNamespace(), np.array([5, 6, 7, 8]), np.array([1, 2, 3, 4]))
    assert PreparedLoader(config, PreparedData(split, None, None, report={"train": {"rows_read": 4}})).steps(1) == 1
    with pytest.raises(UserError, match="its 5 rows make 4 samples, so the numbers are off"):
        PreparedLoader(config, PreparedData(split, None, None, report={"train": {"rows_read": 5}}))


@pytest.mark.parametrize(
    ("config", "state", "version", "clip"),
    [
        ({"gradient_clipping": 0.5}, {}, None, 0.5),
        ({}, {"clip_grad": 0.0}, "0.19.8", 0.0),
        ({}, {}, "0.19.8", 1.0),
        ({}, {}, "0.18.2", 0.0),
    ],
)
def test_gradients_are_clipped_as_before(folder, config, state, version, clip):
    def edit(content):
        del content["ds_config"]["gradient_clipping"]
        content["ds_config"].update(config)
        content["ds_version"] = version

    rewrite_shards(edit, "*_model_states.pt")
    rewrite_shards(lambda content: content.update(state))
    assert imported() == 0
    assert read_run(Path("run/run.yaml")).config.trainer.grad_clip == clip


WRONG_LINES = {
    "no row": ([{"epoch": 0, "rows": [4]}], r"order.jsonl:1.*there is no row 4: 4 rows are trained"),
    "negative": ([{"epoch": 0, "rows": [-1]}], "there is no row -1"),
    "too many": ([{"epoch": 0, "rows": [1, 2, 3]}], "a step of 3 rows, where trainer.global_batch_size is 2"),
    "a gap": ([{"epoch": 0, "rows": [1]}, {"epoch": 2, "rows": [1]}], r"order.jsonl:2.*epoch 2 follows epoch 0"),
    "begins late": ([{"epoch": 1, "rows": [1]}], "the first epoch is 0"),
    "no number": ([{"epoch": 0, "rows": [True]}], "expected whole numbers"),
    "no rows": ([{"epoch": 0, "rows": []}], "expected whole numbers"),
    "other keys": ([{"epoch": 0, "rows": [1], "weight": 2}], "expected whole numbers"),
    "no JSON": (["{"], "this is no JSON"),
    "deep": (["[" * 200000], "this is no JSON"),
    "empty": ([], "the file is empty"),
}


@pytest.mark.parametrize("case", WRONG_LINES)
def test_wrong_lines_of_an_order(case, tmp_path):
    lines, message = WRONG_LINES[case]
    with pytest.raises(UserError, match=message):
        order_of(tmp_path, *lines)


def test_what_an_order_cannot_be_combined_with():
    from dstune.config.compose import compose
    from dstune.config.validate import validate

    overrides = ["data.train=rows.jsonl", "model.path=m", "data.order=order.jsonl", "zero=stage1"]
    with pytest.raises(UserError, match=r"data.packing=true: data.order numbers the rows of one file"):
        validate(compose(overrides).config)
    with pytest.raises(UserError, match="steps that are trained again"):
        validate(compose([*overrides, "data.packing=false", "trainer.spike.action=rollback"]).config)
    validate(compose([*overrides, "data.packing=false"]).config)
