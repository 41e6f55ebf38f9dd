"""Rules of `validate`, ranges and `check_resume`: each has a configuration that breaks it and one beside it that does not."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from dstune.config.compose import compose
from dstune.config.names import classes_of, sections
from dstune.config.ranges import TESTS, check_ranges
from dstune.config.resume import MAY_CHANGE_KEYS, check_resume
from dstune.config.run_overrides import apply_overrides
from dstune.config.schema import RunConfig
from dstune.config.validate import validate
from dstune.core.errors import Problem, UserError
from dstune.protocols import TASKS

CHAT = ("data=chitchat",)
LABELS = ("data=sentiment", "task=classification")
TEXT = ("data.train=x.jsonl", "task=causal_lm")
LORA = (*CHAT, "method=lora")
DISK = (*CHAT, "zero=stage3_nvme")
WSD = (*CHAT, "schedule=warmup_stable_decay")
HELD_OUT = ("data.split.validation=0.1",)
NOTHING_HELD_OUT = ("data.split.validation=0",)


def problems(overrides: tuple[str, ...]) -> list[Problem]:
    try:
        validate(compose(list(overrides)).config)
    except UserError as error:
        return error.problems
    return []


RULES: list[tuple[str, tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = [
    # key, base, what breaks the rule, what does not
    ("data.train", (), ("data=files",), ("data=files", "data.train=x.jsonl")),
    ("data.train", ("data=files",), ("data.train=''",), ("data.train=x",)),
    ("optimizer.vision_lr", (*CHAT, "optimizer.lr=0"), ("optimizer.vision_lr=1e-5",), ("optimizer.vision_lr=0",)),
    ("data.format", CHAT, ("data.format=text",), ("data.format=prompt_completion",)),
    ("data.format", TEXT, ("data.format=messages",), ("data.format=text",)),
    ("data.format", TEXT, ("data.format=text_label",), ("data.format=auto",)),
    ("data.format", LABELS, ("data.format=text",), ("data.format=text_label",)),
    ("data.packing", LABELS, ("data.packing=true",), ("data.packing=false",)),
    (
        "data.split.validation + data.split.test",
        CHAT,
        ("data.split.validation=0.5", "data.split.test=0.5"),
        ("data.split.validation=0.5", "data.split.test=0.4"),
    ),
    (
        "data.split.validation + data.split.test",
        (*CHAT, "data.split.validation=0.5", "data.split.test=0.5"),
        (),
        ("data.test=t.jsonl",),  # the share for the test is not taken when test rows are given
    ),
    ("task.template_date", CHAT, ("task.template_date=2024-13-01",), ("task.template_date=2024-12-01",)),
    ("task.template_date", CHAT, ("task.template_date=20241201",), ()),
    ("task.template_date", CHAT, ("task.template_date=today",), ()),
    ("task.labels", LABELS, ("task.labels=[a,b,a]",), ("task.labels=[a,b,c]",)),
    ("task.labels", LABELS, ("task.labels=[a]",), ("task.labels=[]",)),
    ("task.labels", LABELS, ("task.labels=[a,'']",), ("task.labels=[a,b]",)),
    ("model.path", CHAT, ("model.path=''",), ("model.path=x",)),
    ("model.add_tokens", CHAT, ("model.add_tokens=[TOOL,'']",), ("model.add_tokens=[TOOL]",)),
    ("model.neftune_alpha", LABELS, ("model.neftune_alpha=5",), ("model.neftune_alpha=0",)),
    ("model.revision", CHAT, ("model.revision=main",), ("model.revision=main", "model.path=x/y")),
    (
        "model.attention",
        (*CHAT, "model.attention=flash_attention_2", "data.packing=false"),
        ("trainer.precision=fp32",),
        ("trainer.precision=bf16",),
    ),
    ("method", CHAT, ("method=head",), ("method=lora",)),
    ("method", TEXT, ("method=head",), ("method=full",)),
    ("method.target_modules", LORA, ("method.target_modules=[]",), ("method.target_modules=[q_proj]",)),
    (
        "method.target_modules",
        LORA,
        ("method.target_modules=[all-linear,q_proj]",),
        ("method.target_modules=[all-linear]",),
    ),
    ("optimizer.betas", CHAT, ("optimizer.betas=[0.9,1.0]",), ("optimizer.betas=[0,0.999]",)),
    ("optimizer.betas", CHAT, ("optimizer.betas=[-0.1,0.9]",), ("optimizer=sgd",)),
    ("trainer.micro_batch_size", CHAT, ("trainer.micro_batch_size=17",), ("trainer.micro_batch_size=16",)),
    ("schedule.warmup_steps", (*CHAT, "schedule.warmup_steps=10"), ("trainer.max_steps=9",), ("trainer.max_steps=10",)),
    (
        "schedule.warmup_ratio + schedule.decay_ratio",
        WSD,
        ("schedule.warmup_ratio=0.5", "schedule.decay_ratio=0.6"),
        ("schedule.warmup_ratio=0.4", "schedule.decay_ratio=0.6"),
    ),
    (
        "schedule.warmup_steps",
        (*WSD, "schedule.decay_ratio=0.6", "trainer.max_steps=10"),
        ("schedule.warmup_steps=5",),
        ("schedule.warmup_steps=4",),
    ),
    ("zero.stage", (*CHAT, "zero=stage0"), ("trainer.precision=bf16",), ("trainer.precision=fp32",)),
    ("zero.stage", (*CHAT, "trainer.precision=fp16"), ("zero=stage0",), ("zero=stage1",)),
    ("zero.offload_param", CHAT, ("zero=stage2", "zero.offload_param=cpu"), ("zero.offload_param=cpu",)),
    ("zero.offload_param", CHAT, ("zero=stage1", "zero.offload_param=cpu"), ("zero=stage3_offload",)),
    ("zero.offload_optimizer", CHAT, ("zero=stage2", "zero.offload_optimizer=nvme"), ("zero=stage3_nvme",)),
    ("zero.nvme_path", DISK, ("zero.nvme_path=''",), ("zero.nvme_path=/scratch",)),
    ("method", DISK, ("method=importance",), ("method=lora",)),
    ("forgetting.l2sp", DISK, ("forgetting.l2sp=0.1",), ("forgetting.l2sp=0",)),
    ("forgetting.ewc", DISK, ("forgetting.ewc=0.1",), ("forgetting.ewc=0",)),
    ("trainer.precision", DISK, ("trainer.precision=fp16",), ("trainer.precision=bf16",)),
    ("checkpoint.mode", DISK, ("checkpoint.mode=async",), ("checkpoint.mode=sync",)),
    (
        "trainer.early_stopping.metric",
        CHAT,
        ("trainer.early_stopping.metric=accuracy",),
        ("trainer.early_stopping.metric=perplexity",),
    ),
    (
        "trainer.early_stopping.metric",
        LABELS,
        ("trainer.early_stopping.metric=perplexity",),
        ("trainer.early_stopping.metric=f1_macro",),
    ),
    (
        "trainer.early_stopping.patience",
        (*CHAT, *HELD_OUT, "trainer.early_stopping.patience=2"),
        ("evaluate.every=0",),
        ("evaluate.every=5",),
    ),
    (
        "trainer.early_stopping.patience",
        (*CHAT, *NOTHING_HELD_OUT, "trainer.early_stopping.patience=2"),
        (),
        ("evaluate.every=5", "data.validation=v.jsonl"),
    ),
    (
        "trainer.early_stopping.max_gap",
        (*CHAT, *HELD_OUT, "evaluate.every=5", "trainer.early_stopping.max_gap=0.3"),
        ("task=embedding",),
        ("task=chat",),
    ),
    ("run.export", (*CHAT, "run.export=best"), ("evaluate.every=0",), ("evaluate.every=5",)),
    ("run.export", (*CHAT, "run.export=best"), ("evaluate.every=0",), ()),
    ("run.export", (*CHAT, "run.export=best", *NOTHING_HELD_OUT), (), ("evaluate.every=5", "data.validation=v.jsonl")),
    ("evaluate.every", (*CHAT, "evaluate.every=5"), NOTHING_HELD_OUT, HELD_OUT),
    ("evaluate.samples", CHAT, ("evaluate.samples=1", *NOTHING_HELD_OUT), ("evaluate.samples=1",)),
    ("evaluate.samples", LABELS, ("evaluate.samples=1",), ("evaluate.samples=0",)),
    ("data.clean.toxicity", LABELS, ("data.clean.toxicity=drop",), ("data.clean.toxicity=keep",)),
    ("evaluate.safety", LABELS, ("evaluate.safety=true",), ("evaluate.safety=false",)),
    ("evaluate.safety", ("task=seq2seq", "data.train=r.jsonl"), ("evaluate.safety=true",), ("evaluate.safety=false",)),
    ("launch.export_env", CHAT, ("launch.export_env=[A-B]",), ("launch.export_env=[A_B,_c1]",)),
    ("launch.export_env", CHAT, ("launch.export_env=['A=secret']",), ("launch.export_env=[A]",)),
    ("run.name", CHAT, ("run.name=a/b",), ("run.name=a.b-c",)),
    ("run.name", CHAT, ("run.name=..",), ("run.name=x..y",)),
    ("run.name", CHAT, ("run.name=''",), ()),
    ("run.dir", CHAT, ("run.dir=''",), ("run.dir=runs/x",)),
    ("run.resume", CHAT, ("run.resume=''",), ("run.resume=never",)),
]


@pytest.mark.parametrize(("key", "base", "broken", "kept"), RULES)
def test_rule(key: str, base: tuple[str, ...], broken: tuple[str, ...], kept: tuple[str, ...]):
    found = problems((*base, *broken))
    assert key in {problem.where for problem in found}
    assert all(problem.reason and problem.fix and problem.value for problem in found if problem.where == key)
    # Where nothing beside the base makes it right, the rule's other case is the base of another row.
    if kept:
        assert problems((*base, *kept)) == []


def test_head_without_classification_is_refused():
    [problem] = problems((*CHAT, "method=head"))
    assert problem.where == "method"
    assert "method=full" in problem.fix


def test_all_problems_at_once():
    found = problems(
        (
            "model=minilm",  # no quickstart, so no rows
            "data.split.validation=1.5",
            "task=classification",
            "data.packing=true",
            "zero=stage0",
            "trainer.precision=fp16",
            "zero.offload_param=cpu",
            "optimizer.lr=-1",
            "run.name=a/b",
        )
    )
    assert {problem.where for problem in found} >= {
        "data.train",
        "data.split.validation",
        "data.packing",
        "zero.stage",
        "zero.offload_param",
        "optimizer.lr",
        "run.name",
    }


def test_a_secret_given_as_a_value_is_not_repeated():
    [problem] = problems((*CHAT, "launch.export_env=['TOKEN=hunter2']"))
    assert "hunter2" not in str(problem)


@pytest.mark.parametrize("name", list(TASKS))
def test_a_task_names_its_formats_and_metrics(name: str):
    task = TASKS[name](TASKS[name].Config())
    assert task.read_formats
    assert set(task.read_formats) <= set(task.formats)
    assert task.metrics[0] == ("reward" if name == "reinforcement" else "loss")
    assert set(task.generation_metrics) <= set(task.metrics)


# ---- ranges ----


def bounded_fields() -> list[tuple[str, type, dataclasses.Field[Any]]]:
    found = []

    def walk(cls: type, prefix: str) -> None:
        for field in dataclasses.fields(cls):
            if field.metadata:
                found.append((f"{prefix}.{field.name}", cls, field))
            elif dataclasses.is_dataclass(field.default_factory):
                walk(field.default_factory, f"{prefix}.{field.name}")  # type: ignore[arg-type]

    for section in sections():
        for cls in classes_of(section).values():
            walk(cls, section)
    return found


BOUNDED = bounded_fields()


def test_the_schema_has_ranges():
    assert len(BOUNDED) > 40


@pytest.mark.parametrize(("key", "cls", "field"), BOUNDED, ids=[f"{cls.__name__}.{f.name}" for _, cls, f in BOUNDED])
def test_range(key: str, cls: type, field: dataclasses.Field[Any]):
    prefix = key.rpartition(".")[0] + "."
    for kind, bound in ((kind, field.metadata[kind]) for kind in TESTS if kind in field.metadata):
        outside = {"at_least": bound - 1, "above": bound, "at_most": bound + 1, "below": bound}[kind]
        [problem] = check_ranges(cls(**{field.name: outside}), prefix)
        assert problem.where == key
        assert f"{bound:g}" in problem.reason
        assert problem.fix.startswith(f"{key}=")
        if kind in ("at_least", "at_most"):
            assert list(check_ranges(cls(**{field.name: bound}), prefix)) == []
    assert list(check_ranges(cls(), prefix)) == []  # defaults, None among them, are inside


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_numbers_are_finite(value: str):
    assert [problem.where for problem in problems((*CHAT, f"optimizer.lr={value}"))] == ["optimizer.lr"]


# ---- resume ----


@pytest.fixture(scope="module")
def old() -> RunConfig:
    return compose(["data=chitchat", "method=lora", "trainer.max_steps=10", "trainer.epochs=2"]).config


@pytest.mark.parametrize(
    "override",
    [
        "launch.processes=3",
        "tracking.project=other",
        "checkpoint.every=7",
        "evaluate.every=7",
        "evaluate.max_rows=3",
        "run.dir=elsewhere",
        "run.export=none",
        "run.time_limit=5",
        "zero.reduce_bucket_size=7",
        "zero.offload_optimizer=cpu",
        "zero.stage=2",
        "trainer.max_steps=11",
        "trainer.epochs=1",
        *(f"{key}=3" for key in MAY_CHANGE_KEYS if key.endswith(("workers", "steps", "patience"))),
        "trainer.activation_checkpointing=true",
        "trainer.profile_steps=3",
    ],
)
def test_resume_may_change(old: RunConfig, override: str):
    check_resume(old, apply_overrides(old, [override]))


@pytest.mark.parametrize(
    ("override", "fix"),
    [
        ("model.path=x", "model.path=sample://smollm2"),
        ("data.train=x", "data.train=sample://chitchat"),
        ("data.max_length=64", "data.max_length=1024"),
        ("data.packing=false", "data.packing=true"),
        ("data.split.seed=1", "data.split.seed=0"),
        ("data.columns.text=a", "data.columns={}"),
        ("task.template_date=2000-01-01", "task.template_date="),
        ("method.rank=3", "method.rank=16"),
        ("optimizer.lr=1", "optimizer.lr=0.0002"),
        ("optimizer.betas=[0.1,0.2]", "optimizer.betas=[0.9,0.999]"),
        ("schedule.warmup_steps=3", "schedule.warmup_steps=null"),
        ("trainer.global_batch_size=8", "trainer.global_batch_size=16"),
        ("trainer.micro_batch_size=2", "trainer.micro_batch_size=4"),
        ("trainer.seed=1", "trainer.seed=0"),
        ("trainer.precision=bf16", "trainer.precision=auto"),
        ("trainer.early_stopping.metric=perplexity", "trainer.early_stopping.metric=loss"),
        ("trainer.max_steps=9", "trainer.max_steps=10"),
        ("trainer.epochs=3", "trainer.max_steps=20"),
        ("trainer.max_steps=null", "trainer.max_steps=10"),
    ],
)
def test_resume_may_not_change(old: RunConfig, override: str, fix: str):
    with pytest.raises(UserError) as caught:
        check_resume(old, apply_overrides(old, [override]))
    key = override.split("=")[0]
    [problem] = caught.value.problems
    assert key.startswith(problem.where)
    assert fix in problem.fix


def test_a_model_folder_may_be_written_so_that_it_cannot_be_a_hub_id(old: RunConfig):
    old = apply_overrides(old, ["model.path=runs/a"])
    check_resume(old, apply_overrides(old, ["model.path=./runs/a"]))
    for begun, path in ((old, "./runs/b"), (apply_overrides(old, ["model.revision=abc"]), "./runs/a")):
        with pytest.raises(UserError):
            check_resume(begun, apply_overrides(begun, [f"model.path={path}"]))


def test_resume_lists_every_changed_key(old: RunConfig):
    changed = ["method=full", "optimizer.lr=2e-4", "schedule=linear", "trainer.seed=3", "trainer.max_steps=10"]
    new = compose(["data=chitchat", *changed]).config
    with pytest.raises(UserError) as caught:
        check_resume(old, new)
    found = {problem.where: problem.fix for problem in caught.value.problems}
    assert set(found) == {"method", "schedule", "trainer.seed"}
    assert found["method"] == "method=lora"


def test_steps_and_epochs_cannot_be_swapped():
    by_epochs = compose(["data=chitchat"]).config
    with pytest.raises(UserError, match=r"trainer\.max_steps"):
        check_resume(by_epochs, apply_overrides(by_epochs, ["trainer.max_steps=1000"]))
    longer = apply_overrides(by_epochs, ["trainer.epochs=2"])
    check_resume(by_epochs, longer)
    with pytest.raises(UserError, match=r"trainer\.epochs=1: a run can become longer, not shorter than 2"):
        check_resume(longer, by_epochs)


def test_a_wrong_word_of_an_optional_choice_gets_one_that_exists() -> None:
    (problem,) = problems((*CHAT, "model.rope.type=longrope"))
    assert problem.fix == "for example model.rope.type=yarn"


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("optimizer=adafactor", "Adafactor"),
        ("optimizer=schedule_free", "schedule-free"),
        ("trainer.precision=fp8", "fp8"),
        ("zero=zeropp", "ZeRO++ is three settings: hpZ, which changes no result, is zero.hpz"),
        ("zero=mics", "MiCS was removed from DeepSpeed in 0.19"),
        ("zero.deepcompile=true", "DeepCompile"),
        ("zero=zenflow", "ZenFlow"),
        ("zero=superoffload", "SuperOffload"),
        ("zero.offload_param=nvme", "NVMe"),
        ("parallel=expert", "expert parallelism"),
        ("trainer.torch_compile=true", "torch.compile"),
        ("model.attention=flex_attention", "flex attention"),
        ("trainer.liger=true", "Liger"),
        ("trainer.activation_checkpointing=offload", "activations in host memory"),
        ("task=ppo", "PPO with a critic"),
        ("data.curriculum=difficulty", "a curriculum"),
    ],
)
def test_what_is_known_and_not_offered_is_refused_by_its_name(word: str, name: str) -> None:
    with pytest.raises(UserError) as caught:
        compose(["model=smollm2", "data=chitchat", word])
    (problem,) = caught.value.problems
    assert problem.where == word.partition("=")[0]
    assert f"is not offered: {name}" in problem.reason
    assert problem.fix


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("task.loss=ppo", "PPO with a critic"),
        ("task.value_model=judge", "PPO with a critic"),
        ("task.sync_ref_model=true", "a reference model that follows the policy"),
        ("task.kl.sync_every=100", "a reference model that follows the policy"),
        ("task.curriculum=adaptive", "a curriculum"),
        ("task.rollout=async", "rollouts that overlap with training"),
        ("task.max_staleness=4", "rollouts that overlap with training"),
    ],
)
def test_what_reinforcement_does_not_offer_is_refused_by_its_name(word: str, name: str) -> None:
    with pytest.raises(UserError) as caught:
        compose(["model=smollm2", "data.train=rows.jsonl", "task=reinforcement", "task.rewards=[number]", word])
    (problem,) = caught.value.problems
    assert problem.where == word.partition("=")[0]
    assert f"is not offered: {name}" in problem.reason
    assert problem.fix


def test_a_key_that_switches_off_what_is_not_offered_is_only_unknown() -> None:
    with pytest.raises(UserError) as caught:
        compose(
            [
                "model=smollm2",
                "data.train=rows.jsonl",
                "task=reinforcement",
                "task.rewards=[number]",
                "task.sync_ref_model=false",
            ]
        )
    assert "is not offered" not in str(caught.value)
