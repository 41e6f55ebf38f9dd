"""Keys and flags of other tools, and common slips: each is answered with the words to type here."""

from __future__ import annotations

import re
import shlex

import pytest

from dstune.config import habits
from dstune.config.compose import compose
from dstune.config.flags import hydra_flags
from dstune.config.habits import ANSWERS, HUB_NAMES, METHODS, SCHEDULES, TASK_WORDS, TRACKERS, answer, as_fix
from dstune.config.names import OTHER_TOOLS, all_keys, suggest_key
from dstune.config.validate import validate
from dstune.config.words import packaged_choices
from dstune.core.errors import UserError

HUB = "another model of the hub is model.path=OWNER/NAME"
SLIPS = {
    "launch.gpus=2": "write launch.processes=2",
    "gpus=2": "write launch.processes=2",
    "device=cuda": "leave it out: GPUs are used where there are some; launch.processes=N takes N of them",
    "tracking.wandb=true": "write tracking.wandb.mode=online",
    "tracking.wandb=false": "write tracking.wandb.mode=disabled",
    "tracking=wandb": "write tracking.wandb.mode=online",
    "report_to=tensorboard": "write tracking.tensorboard=true",
    "report_to=none": "leave it out",
    "task=sentiment": "write task=classification, or experiment=sentiment, a prepared one",
    "task=dpo": "write task=preference",
    "task=orpo": "write task=preference task.loss=orpo",
    "method=peft": "write method=lora",
    "method=4bit": "write method=qlora",
    "optimizer.lr=[1e-4,1e-3]": "a run for each of them: dstune train --multirun optimizer.lr=0.0001,0.001",
    "trainer.seed=[1,2]": "a run for each of them: dstune train --multirun trainer.seed=1,2",
    "model=gpt2": "write model.path=openai-community/gpt2",
    "model=qwen3_4bb": "did you mean model=qwen3_4b?",
    "model=nothing-like-it": "write model.path=OWNER/nothing-like-it for a model of the hub",
    "epochs=3": "did you mean trainer.epochs=3?",
    "per_device_train_batch_size=4": "did you mean trainer.micro_batch_size=4?",
    "gradient_accumulation_steps=4": "write trainer.global_batch_size=ROWS, the rows of a step: devices x trainer.",
    "num_train_epochs=3": "did you mean trainer.epochs=3?",
    "learning_rate=1e-4": "did you mean optimizer.lr=0.0001?",
    "bf16=true": "write trainer.precision=bf16",
    "fp16=true": "write trainer.precision=fp16",
    "load_in_4bit=true": "write method=qlora",
    "lr_scheduler_type=cosine": "write schedule=cosine",
    "optim=adamw_torch": "write optimizer=adamw",
    "deepspeed=ds.json": "write zero=file zero.path=ds.json",
    "push_to_hub=true": "`dstune export RUN --push OWNER/NAME` after the training",
    "optimizer.wd=0.1": "did you mean optimizer.weight_decay=0.1?",
    "trainer.report_to=wandb": "write tracking.wandb.mode=online",
    "r=16": "did you mean method.rank=16?",
    "launch=torchrun": "write launch=local, which starts a rank for each GPU",
}  # fmt: skip


@pytest.fixture(scope="module")
def fixes() -> dict[str, str]:
    """The fix of each slip: as many in a command as there are with another key and section each."""
    found: dict[str, str] = {}
    rest = list(SLIPS)
    while rest:
        batch = {slip.partition("=")[0].partition(".")[0]: slip for slip in reversed(rest)}
        with pytest.raises(UserError) as caught:
            validate(compose(["data.train=x.jsonl", *batch.values()]).config)
        by_key = {problem.where: problem.fix for problem in caught.value.problems}
        found |= {slip: by_key[slip.partition("=")[0]] for slip in batch.values()}
        rest = [slip for slip in rest if slip not in found]
    return found


@pytest.mark.parametrize(("slip", "fix"), SLIPS.items(), ids=list(SLIPS))
def test_a_slip_is_answered(fixes: dict[str, str], slip: str, fix: str):
    assert fixes[slip].startswith(fix)


@pytest.mark.parametrize(
    ("flag", "fix"),
    [
        (["--model", "gpt2"], "write model.path=openai-community/gpt2"),
        (["--model", "OWNER/NAME"], "write model.path=OWNER/NAME"),
        (["--model_name_or_path=qwen/x"], "write model.path=qwen/x"),
        (["--model", "qwen3_4b"], "write model=qwen3_4b"),
        (["--data", "my.jsonl"], "write data.train=my.jsonl"),
        (["--data", "chitchat"], "write data=chitchat"),
        (["--lr", "1e-4"], "write optimizer.lr=1e-4"),
        (["--device", "cuda"], "leave it out"),
        (["--gpus", "2"], "write launch.processes=2"),
        (["--epochs", "3"], "write trainer.epochs=3"),
        (["--per_device_train_batch_size", "4"], "write trainer.micro_batch_size=4"),
        (["--bf16"], "write trainer.precision=bf16"),
        (["--use-lora"], "write method=lora"),
    ],
)
def test_a_flag_is_answered(flag: list[str], fix: str):
    with pytest.raises(UserError) as caught:
        hydra_flags(flag)
    assert caught.value.problems[0].fix.startswith(fix)


@pytest.mark.parametrize(
    "key", ["trainer.notez", "launch.modelz", "model", "data.projct", "optimizer.epochz", "run.rank_"]
)
def test_no_fix_comes_from_another_section_by_similarity(key: str):
    meant = suggest_key(key, all_keys())
    assert meant is None or meant.partition(".")[0] == key.partition(".")[0]


def offered() -> list[str]:
    """Every answer that is words to type, with a value put in."""
    values = {
        "stage": "3",
        "lr_scheduler_type": "cosine",
        "lr_scheduler": "linear",
        "report_to": "wandb",
        "logger": "mlflow",
    }
    found = [answer(key, values.get(key, "2")) or "" for key in ANSWERS]
    found += [*TASK_WORDS.values(), *TRACKERS.values(), *SCHEDULES.values(), *METHODS.values()]
    found += [f"model.path={path}" for path in HUB_NAMES.values()]
    return sorted({words for words in found if as_fix(words) != words})


@pytest.mark.parametrize("words", offered())
def test_every_answer_is_of_keys_and_choices_that_exist(words: str):
    settings = [word.partition("=") for word in shlex.split(re.split(r"[;(]|, ", words)[0]) if "=" in word]
    assert settings
    for key, _, value in settings:
        if key not in all_keys() and not key.startswith("data.columns."):
            assert value in packaged_choices()[key]


def test_keys_of_other_tools_exist_here():
    assert set(OTHER_TOOLS.values()) <= set(all_keys())
    assert not set(OTHER_TOOLS) & set(ANSWERS)


@pytest.mark.parametrize(
    ("spelling", "path"),
    [
        ("Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"),
        ("llama-3.1-8b", "meta-llama/Llama-3.1-8B"),
        ("qwen3-4b", "Qwen/Qwen3-4B"),
        ("Qwen3.5-4B", "Qwen/Qwen3.5-4B"),
        ("gpt-oss-20b", "openai/gpt-oss-20b"),
        ("Gemma4-31B-it", "google/gemma-4-31B-it"),
        ("gemma-4-31b-it", "google/gemma-4-31B-it"),
    ],
)
def test_a_preset_is_known_by_any_usual_spelling(spelling: str, path: str) -> None:
    assert compose([f"model={spelling}", "data.train=x.jsonl"]).config.model.path == path


def test_no_two_presets_have_one_spelling() -> None:
    names = [habits._letters(name) for name, _ in habits._preset_paths()]
    assert len(set(names)) == len(names)
    assert habits.with_preset_names(["model=llama", "model=org/qwen3-4b", "task=chat"]) == [
        "model=llama",
        "model=org/qwen3-4b",
        "task=chat",
    ]
