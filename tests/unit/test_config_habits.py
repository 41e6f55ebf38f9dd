"""Keys and flags of other tools, and common slips: each is answered with the words to type here."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from dstune.config import habits, preset_names
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
    "model=qwen3_4bb": "did you mean model=qwen3_4b (Qwen/Qwen3-4B)?",
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
        ("Llama 3.1 8B", "meta-llama/Llama-3.1-8B"),
        ("meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"),
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"),
        ("Meta-Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("https://huggingface.co/Qwen/Qwen3-8B", "Qwen/Qwen3-8B"),
        ("hf.co/qwen/qwen3-8b", "Qwen/Qwen3-8B"),
        ("qwen3-4b", "Qwen/Qwen3-4B"),
        ("Qwen3.5-4B", "Qwen/Qwen3.5-4B"),
        ("qwen3_5_4b", "Qwen/Qwen3.5-4B"),
        ("gpt-oss-20b", "openai/gpt-oss-20b"),
        ("Gemma4-31B-it", "google/gemma-4-31B-it"),
        ("gemma-4-31b-it", "google/gemma-4-31B-it"),
        ("Mistral-7B-v0.3", "mistralai/Mistral-7B-v0.3"),
        # Ollama's names, whose models are chat models.
        ("llama3.1:8b", "meta-llama/Llama-3.1-8B-Instruct"),
        ("qwen3:8b", "Qwen/Qwen3-8B"),
        ("gemma4:e4b", "google/gemma-4-E4B-it"),
        ("gemma2:9b", "google/gemma-2-9b-it"),
        ("mistral:7b", "mistralai/Mistral-7B-Instruct-v0.3"),
        ("embeddinggemma:300m", "google/embeddinggemma-300m"),
    ],
)
def test_a_preset_is_known_by_any_usual_spelling(spelling: str, path: str) -> None:
    assert compose([f"model={spelling}", "data.train=x.jsonl"]).config.model.path == path


@pytest.mark.parametrize(
    ("name", "named", "unnamed"),
    [
        ("llama3.1", ["llama3_8b", "llama3_8b_instruct", "llama3_70b"], ["llama3_1b"]),
        ("llama3:8b", ["llama3_8b", "llama3_8b_instruct"], []),  # Llama 3 is not Llama 3.1
        ("meta-llama-3-8b", ["llama3_8b"], []),
        ("qwen3", ["qwen3_4b", "qwen3_8b"], ["qwen3.5_4b"]),
        ("gemma4", ["gemma4_31b_it"], ["gemma3_1b"]),
        ("gemma-4-31b", ["gemma4_31b_it"], ["gemma3_1b"]),
        ("smollm3", ["smollm3_3b", "smollm3_3b_base"], ["smollm2"]),
        ("qwen3:30b", ["qwen3_30b_a3b"], ["qwen3_32b"]),
        ("phi4-mini", ["phi4_mini_instruct"], ["phi4"]),
        ("olmo-3-7b", ["olmo3_7b_instruct"], []),  # the base model has another name
        ("deepseek-r1:8b", ["deepseek_r1_llama_8b"], ["deepseek_r1_qwen_7b"]),
        ("gwen3-8b", ["qwen3_8b"], []),
        ("lama3_8b", ["llama3_8b"], []),
    ],
)
def test_an_incomplete_name_is_refused_with_the_presets_that_it_may_mean(
    name: str, named: list[str], unnamed: list[str]
) -> None:
    with pytest.raises(UserError) as refused:
        compose([f"model={name}", "data.train=x.jsonl"])
    offered_presets = re.findall(r"model=([\w.]*\w)", refused.value.problems[0].fix)
    assert set(named) <= set(offered_presets) and not set(unnamed) & set(offered_presets)


def test_another_size_is_no_slip() -> None:
    with pytest.raises(UserError) as refused:
        compose(["model=gemma2:3b", "data.train=x.jsonl"])
    assert refused.value.problems[0].fix.startswith("presets of this family: model=gemma2_27b, ")


def test_no_two_presets_have_one_spelling() -> None:
    names = [preset_names.parts_of(preset.name) for preset in preset_names.presets()]
    assert len(set(names)) == len(names)
    assert habits.with_preset_names(["model=llama", "model=org/qwen3-4b", "task=chat"]) == [
        "model=llama",
        "model=org/qwen3-4b",
        "task=chat",
    ]


def test_a_choice_of_the_user_is_no_other_spelling(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "qwen3-4b.yaml").write_text("path: sample://minilm\n")
    for overrides, folders in ([], [tmp_path]), ([f"hydra.searchpath=[file://{tmp_path}]"], []):
        composed = compose([*overrides, "model=qwen3-4b", "data.train=x.jsonl"], folders)
        assert composed.config.model.path == "sample://minilm"
