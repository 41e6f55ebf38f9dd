"""`zero=file`: a run has the rates, clipping, precision and batches of DeepSpeed's own engine with the same file, or the file is
refused."""

from __future__ import annotations

import copy
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from support import deepspeed_files
from support.ranks import run_ranks

from dstune.config.compose import compose
from dstune.config.convert import to_dict
from dstune.config.run_file import Composed
from dstune.config.schema import Precision
from dstune.config.validate import validate
from dstune.core.errors import UserError
from dstune.protocols import schedule_of
from dstune.zero.ds_config import micro_batches_per_rank

STEPS = 40
PROGRAM = Path(__file__).with_name("deepspeed_file_ranks.py")


def composed(folder: Path, content: dict[str, Any], *overrides: str) -> Composed:
    path = folder / "ds.json"
    path.write_text(json.dumps(content))
    result = compose(
        [
            "data=chitchat",
            "zero=file",
            f"zero.path={path}",
            "launch.processes=1",
            f"trainer.max_steps={STEPS}",
            *overrides,
        ]
    )
    validate(result.config)
    return result


def without_auto(content: dict[str, Any], run: Composed) -> dict[str, Any]:
    """Return the file with the run's values for `auto`, as transformers' trainer puts those of its arguments there."""
    config, filled = run.config, copy.deepcopy(content)
    of_run: dict[str, Any] = {
        "train_batch_size": config.trainer.global_batch_size,
        "train_micro_batch_size_per_gpu": config.trainer.micro_batch_size,
        "gradient_accumulation_steps": micro_batches_per_rank(config, 1),
        "gradient_clipping": config.trainer.grad_clip,
        "lr": config.optimizer.lr,
        "betas": list(getattr(config.optimizer, "betas", ())),
        "eps": getattr(config.optimizer, "eps", 0),
        "weight_decay": config.optimizer.weight_decay,
        "warmup_min_lr": 0,
        "warmup_max_lr": config.optimizer.lr,
        "warmup_num_steps": -(-int(100 * getattr(config.schedule, "warmup_ratio", 0)) * STEPS // 100),
        "total_num_steps": STEPS,
    }

    def fill(section: dict[str, Any]) -> None:
        for key, value in list(section.items()):
            if isinstance(value, dict):
                fill(value)
            elif value == "auto":
                section[key] = of_run.get(key, False if key == "enabled" else None)
                if section[key] is None:
                    del section[key]

    fill(filled)
    if filled.get("optimizer", {}).get("type", "").lower() in ("adam", "adamw", "muon"):
        filled["optimizer"].setdefault("params", {})["torch_adam"] = True  # DeepSpeed's own is compiled first
        filled["optimizer"]["params"].pop("bias_correction", None)  # which torch's always does
    return filled


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Composed]:
    folder = tmp_path_factory.mktemp("files")
    return {name: composed(folder, content) for name, content in deepspeed_files.SAME.items()}


@pytest.fixture(scope="module")
def engines(runs, tmp_path_factory) -> dict[str, dict[str, Any]]:
    path = tmp_path_factory.mktemp("engines") / "files.json"
    path.write_text(
        json.dumps({name: without_auto(content, runs[name]) for name, content in deepspeed_files.SAME.items()})
    )
    output = run_ranks(PROGRAM, 1, str(path))[0]
    lines = [line.removeprefix("FACTS ") for line in output.splitlines() if line.startswith("FACTS ")]
    return dict(map(json.loads, lines))


@pytest.mark.parametrize("name", deepspeed_files.SAME)
def test_a_run_is_what_deepspeed_makes_of_the_file(name, runs, engines):
    config, engine, content = runs[name].config, engines[name], deepspeed_files.SAME[name]
    trainer = config.trainer
    assert engine["batch"] == [trainer.global_batch_size, trainer.micro_batch_size, micro_batches_per_rank(config, 1)]
    assert trainer.grad_clip == engine["clip"]
    if "auto" not in (content.get("bf16", {}).get("enabled"), content.get("fp16", {}).get("enabled")):
        assert trainer.precision is Precision[engine["precision"]]
    if engine["muon"]:
        for key, value in engine["muon"].items():
            assert to_dict(getattr(config.optimizer, key)) == value, key
    elif "scheduler" in content or "optimizer" in content:  # otherwise the script's optimizer has the rates
        schedule = schedule_of(config.schedule)
        rates = [config.optimizer.lr * schedule.factor(step, STEPS) for step in range(STEPS)]
        assert rates == pytest.approx(engine["rates"], rel=1e-12, abs=1e-18)


def test_why_rates_of_muon_are_refused(engines):
    """DeepSpeed clips what it has orthogonalized: a loss that is 100 times as large makes updates of matrices as much smaller."""
    small_loss, large_loss = engines["updates of Muon"]
    assert large_loss < small_loss / 50


@pytest.mark.parametrize("name", deepspeed_files.REFUSED)
def test_a_file_that_a_run_cannot_follow_is_refused(name, tmp_path: Path):
    content, key, words = deepspeed_files.REFUSED[name]
    with pytest.raises(UserError) as error:
        composed(tmp_path, content)
    problems = {problem.where.split(" in ")[0]: problem for problem in error.value.problems}
    assert list(problems) == [key]
    assert words in str(problems[key])
    assert problems[key].fix


def test_defaults_of_deepspeed_s_own_optimizers():
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
    from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion

    from dstune.config.deepspeed_training import DEFAULTS

    for name, classes in {"adamw": (FusedAdam, DeepSpeedCPUAdam), "lion": (FusedLion, DeepSpeedCPULion)}.items():
        for cls in classes:
            parameters = inspect.signature(cls.__init__).parameters
            for key, value in DEFAULTS[name].items():
                default = parameters[key].default
                assert (list(default) if isinstance(default, tuple) else default) == value, (cls, key)
