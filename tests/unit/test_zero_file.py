"""`zero=file`: what a DeepSpeed or accelerate configuration becomes, and what of it is refused, by table."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dstune.config.compose import compose
from dstune.config.deepspeed_file import ON_WHEN_THERE
from dstune.config.deepspeed_keys import FIXED, OWN_KEYS, PASSED, REFUSED
from dstune.config.resume import continue_run
from dstune.config.run_file import read_run, write_run
from dstune.config.run_overrides import apply_overrides
from dstune.config.schema import Offload, OptimizerOffload, Precision, RunConfig
from dstune.config.validate import validate
from dstune.core.errors import UserError
from dstune.optim.adamw import AdamWConfig
from dstune.optim.constant import ConstantConfig
from dstune.optim.deepspeed import Decay, DeepSpeedScheduleConfig, WarmupType
from dstune.optim.sgd import SgdConfig
from dstune.zero.ds_config import deepspeed_config

FILES = Path(__file__).parents[1] / "data" / "deepspeed"


def composed(path: Path | str, *overrides: str) -> RunConfig:
    config = compose(["data=chitchat", "zero=file", f"zero.path={path}", *overrides]).config
    validate(config)
    return config


@pytest.fixture
def write(tmp_path: Path):
    def written(content: Any, name: str = "ds.json") -> Path:
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return written


def refused(path: Path, *overrides: str) -> dict[str, str]:
    with pytest.raises(UserError) as error:
        composed(path, *overrides)
    return {problem.where.replace(f" in {path}", ""): str(problem) for problem in error.value.problems}


def settings_of(config: RunConfig, precision: Precision = Precision.fp32, world: int = 2) -> dict[str, Any]:
    return deepspeed_config(config, world, precision, on_gpu=True)


# ---- whole files, as published ----


def test_a_file_for_the_trainer_full_of_auto_leaves_dstune_s_own_values():
    config = composed(FILES / "trainer_zero2.json", "trainer.grad_clip=0.3", "trainer.micro_batch_size=2")
    assert (config.zero.stage, config.zero.reduce_bucket_size, config.zero.overlap_comm) == (2, 500_000_000, False)
    assert (config.trainer.grad_clip, config.trainer.micro_batch_size) == (0.3, 2)
    assert config.trainer.precision is Precision.auto
    settings = settings_of(config)
    assert "auto" not in json.dumps(settings)
    assert settings["gradient_clipping"] == 0.3
    assert settings["zero_optimization"]["allgather_bucket_size"] == 500_000_000
    assert isinstance(settings["zero_optimization"]["allgather_bucket_size"], int)
    assert settings["zero_optimization"]["round_robin_gradients"] is True
    assert settings["fp16"] == {
        "enabled": False,
        "loss_scale": 0,
        "loss_scale_window": 1000,
        "initial_scale_power": 16,
        "hysteresis": 2,
        "min_loss_scale": 1,
    }


def test_offloading_and_sections_of_optimizer_and_scheduler_with_auto():
    config = composed(FILES / "trainer_zero3.json", "optimizer.lr=3e-4")
    assert (config.zero.stage, config.zero.offload_optimizer, config.zero.offload_param) == (
        3,
        OptimizerOffload.cpu,
        Offload.cpu,
    )
    assert config.schedule == DeepSpeedScheduleConfig(decay=Decay.linear)
    assert config.optimizer.lr == 3e-4
    zero = settings_of(config)["zero_optimization"]
    assert zero["offload_param"] == {"device": "cpu", "pin_memory": True}
    assert zero["stage3_max_live_parameters"] == 10**9
    assert zero["stage3_gather_16bit_weights_on_model_save"] is False


def test_a_second_copy_of_the_weights_in_each_node(write):
    copies = {"stage": 3, "zero_hpz_partition_size": 8}
    assert composed(write({"zero_optimization": copies})).zero.hpz
    assert not composed(write({"zero_optimization": copies | {"zero_hpz_partition_size": 1}})).zero.hpz
    assert not composed(write({"zero_optimization": copies | {"stage": 2}})).zero.hpz  # ignored there by DeepSpeed
    settings = deepspeed_config(
        composed(write({"zero_optimization": copies})), 4, Precision.fp32, on_gpu=True, copy_ranks=2
    )
    assert settings["zero_optimization"]["zero_hpz_partition_size"] == 2
    key = "zero_optimization.zero_hpz_partition_size"
    assert list(refused(write({"zero_optimization": copies | {"zero_hpz_partition_size": "eight"}}))) == [key]


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("zero_quantized_weights", True, "qwZ sends weights in 8 bits"),
        ("zero_quantized_gradients", True, "qgZ sends gradients in 4 bits"),
        ("mics_shard_size", 8, "MiCS was removed from DeepSpeed in 0.19"),
        ("zenflow", {"topk_ratio": 0.05}, "another algorithm than the optimizer's"),
    ],
)
def test_what_is_refused_of_zero_names_upstream_s_state(write, name, value, reason):
    (message,) = refused(write({"zero_optimization": {"stage": 3, name: value}})).values()
    assert reason in message
    if name != "zenflow":
        assert "zero.hpz=true" in message


def test_axolotl_s_file():
    config = composed(FILES / "axolotl_zero3.json")
    assert (config.zero.stage, config.trainer.precision) == (3, Precision.bf16)
    assert config.zero.settings["zero_optimization"] == {
        "contiguous_gradients": True,
        "sub_group_size": 0,
        "max_live_parameters": 0,
        "max_reuse_distance": 0,
    }


def test_a_plain_file_gives_dstune_s_keys_their_values():
    config = composed(FILES / "plain.json")
    trainer = config.trainer
    assert (trainer.global_batch_size, trainer.micro_batch_size, trainer.grad_clip) == (32, 2, 0.5)
    assert trainer.precision is Precision.fp32
    assert config.optimizer == SgdConfig(lr=0.01, momentum=0.9)
    assert config.schedule == DeepSpeedScheduleConfig(
        decay=Decay.cosine, warmup_steps=3, warmup_type=WarmupType.linear, min_lr_ratio=0.1
    )
    assert (config.zero.stage, config.zero.reduce_bucket_size) == (1, 1_000_000)
    assert config.zero.settings == {"zero_optimization": {"round_robin_gradients": True}}


def test_accelerate_s_file():
    config = composed(FILES / "accelerate_zero3.yaml")
    assert (config.zero.stage, config.trainer.precision, config.launch.processes) == (3, Precision.bf16, 8)
    assert config.zero.offload_param is Offload.none
    assert composed(FILES / "accelerate_zero3.yaml", "launch.processes=2").launch.processes == 2


def test_accelerate_may_name_a_deepspeed_file_beside_it(write):
    inner = write({"zero_optimization": {"stage": 1}, "bf16": {"enabled": "auto"}}, "inner.json")
    outer = write(
        f"distributed_type: DEEPSPEED\nmixed_precision: 'no'\ndeepspeed_config: {{deepspeed_config_file: {inner.name}}}\n",
        "a.yaml",
    )
    config = composed(outer)
    assert (config.zero.stage, config.trainer.precision) == (1, Precision.fp32)


def test_the_run_does_not_need_the_file_any_more(write, tmp_path: Path):
    path = write({"zero_optimization": {"stage": 2, "round_robin_gradients": True}, "gradient_clipping": 0.25})
    first = compose(["data=chitchat", "zero=file", f"zero.path={path}"])
    write_run(tmp_path / "run.yaml", first)
    path.unlink()
    again = read_run(tmp_path / "run.yaml").config
    assert again == first.config
    assert apply_overrides(again, ["trainer.max_steps=3"]).zero == first.config.zero
    with pytest.raises(UserError, match="was read when the run started"):
        apply_overrides(again, ["zero.path=other.json"])


def test_an_earlier_run_keeps_its_own_schedule_and_rate(write):
    content = {"optimizer": {"type": "AdamW"}, "scheduler": {"type": "WarmupLR"}, "zero_optimization": {"stage": 1}}
    new = compose(["data=chitchat", "zero=file", f"zero.path={write(content)}"])
    earlier = replace(new.config, schedule=ConstantConfig(warmup_steps=7), optimizer=AdamWConfig(lr=2e-5))
    assert new.config.optimizer.lr == 1e-3
    assert continue_run(replace(new, config=earlier), new) == earlier


def test_defaults_of_deepspeed_are_named_as_the_origin(write):
    path = write({"optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": 1}})
    result = compose(["data=chitchat", "zero=file", f"zero.path={path}", "optimizer.weight_decay=0.1"])
    assert (result.config.trainer.grad_clip, result.config.optimizer.weight_decay) == (1.0, 0.1)
    assert "since 0.19.3" in result.origins["trainer.grad_clip"]
    assert "leaves out optimizer.params.lr" in result.origins["optimizer.lr"]
    assert "optimizer.weight_decay" not in result.origins
    assert "trainer.grad_clip" not in compose([*result.overrides, "trainer.grad_clip=0.5"]).origins


WITH_RATE = {"optimizer": {"type": "AdamW", "params": {"lr": 2e-4}}, "zero_optimization": {"stage": 1}}


@pytest.mark.parametrize(
    ("content", "overrides", "schedule", "origin"),
    [
        (WITH_RATE, [], "constant", "DeepSpeed's default, since .* leaves out scheduler"),
        (WITH_RATE, ["schedule=cosine"], "cosine", None),
        (
            WITH_RATE,
            ["schedule.min_lr_ratio=0.1"],
            "cosine",
            "the command line decides, though .* leaves out scheduler",
        ),
        (WITH_RATE, ["experiment=ner"], "linear", "experiment=ner decides, though .* default is constant"),
        (WITH_RATE | {"scheduler": {"type": "auto"}}, [], "constant", "leaves out scheduler"),
        (WITH_RATE | {"scheduler": {"type": "WarmupLR"}}, [], "deepspeed", None),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}},
            [],
            "cosine",
            "dstune's own, since .* no scheduler",
        ),
        ({"zero_optimization": {"stage": 1}}, [], "cosine", "dstune's own, since .* no scheduler"),
        ({"zero_optimization": {"stage": 1}}, ["schedule=constant"], "constant", None),
    ],
)
def test_a_file_without_a_scheduler_keeps_the_rate_that_it_sets_and_says_so(
    write, content, overrides, schedule, origin
):
    result = compose(["data=chitchat", *overrides, "zero=file", f"zero.path={write(content)}"])
    assert result.config.schedule.name == schedule
    if origin is None:
        assert "schedule.name" not in result.origins
    else:
        assert re.search(origin, result.origins["schedule.name"])


def test_a_key_that_the_file_s_choice_lacks_is_refused(write):
    problems = refused(write({"optimizer": {"type": "SGD"}}), "optimizer.betas=[0.9,0.95]")
    assert "optimizer=sgd, which optimizer.type in" in problems["optimizer.betas"]
    path = write({"gradient_clipping": 1.0})  # what the fix says
    assert composed(path, "optimizer=adamw", "optimizer.betas=[0.9,0.95]").optimizer.name == "adamw"


def test_sizes_of_several_nodes_and_of_ranks_that_share_rows(write):
    path = write({"train_batch_size": 64, "gradient_accumulation_steps": 2, "zero_optimization": {"stage": 1}})
    slurm = ["launch=slurm", "launch.nodes=2", "launch.processes=4"]
    assert composed(path, *slurm).trainer.micro_batch_size == 4
    assert composed(path, *slurm, "parallel=ulysses", "parallel.size=2").trainer.micro_batch_size == 8
    unknown = compose(["data=chitchat", "zero=file", f"zero.path={path}"])
    assert "does not give the number of ranks" in unknown.origins["trainer.micro_batch_size"]


@pytest.mark.parametrize(
    ("content", "setting"),
    [
        ({"tensor_parallel": {"autotp_size": 4}}, "parallel=tensor parallel.size=4"),
        ({"sequence_parallel_size": 8}, "parallel=ulysses parallel.size=8"),
        ({"torch_autocast": {"enabled": True}}, "trainer.precision=bf16"),
        ({"activation_checkpointing": {"cpu_checkpointing": True}}, "trainer.activation_checkpointing=true"),
    ],
)
def test_a_fix_names_what_dstune_has_instead_and_works(write, content, setting):
    ((_, problem),) = refused(write({"zero_optimization": {"stage": 1}, **content})).items()
    assert f"remove it, and set {setting}" in problem
    without = {"zero_optimization": {"stage": 1}, "bf16": {"enabled": "auto"}}
    compose(["data=chitchat", "zero=file", f"zero.path={write(without)}", *setting.split()])


def test_the_former_key_of_offloading_is_answered_with_today_s(write):
    problems = refused(write({"zero_optimization": {"stage": 2, "cpu_offload": True}}))
    assert 'write "offload_optimizer": {"device": "cpu"} instead' in problems["zero_optimization.cpu_offload"]
    path = write({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}})
    assert composed(path).zero.offload_optimizer is OptimizerOffload.cpu


# ---- contradictions ----


contradictions = pytest.mark.parametrize(
    ("content", "override", "key"),
    [
        ({"train_batch_size": 32}, "trainer.global_batch_size=16", "trainer.global_batch_size"),
        (
            {"train_batch_size": "auto", "train_micro_batch_size_per_gpu": 1},
            "trainer.micro_batch_size=4",
            "trainer.micro_batch_size",
        ),
        ({"gradient_clipping": 0.5}, "trainer.grad_clip=1.0", "trainer.grad_clip"),
        ({"bf16": {"enabled": True}}, "trainer.precision=fp32", "trainer.precision"),
        ({"fp16": {"enabled": True}}, "trainer.precision=bf16", "trainer.precision"),
        ({"bf16": {"enabled": False}}, "trainer.precision=bf16", "trainer.precision"),
        ({"zero_optimization": {"stage": 2}}, "zero.stage=3", "zero.stage"),
        (
            {"zero_optimization": {"stage": 2, "reduce_bucket_size": 5e8}},
            "zero.reduce_bucket_size=7",
            "zero.reduce_bucket_size",
        ),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}}, "optimizer.lr=2e-4", "optimizer.lr"),
        (
            {"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.95]}}},
            "optimizer.betas=[0.9,0.999]",
            "optimizer.betas",
        ),
        ({"optimizer": {"type": "AdamW", "params": {"eps": 1e-6}}}, "optimizer.eps=1e-8", "optimizer.eps"),
        (
            {"optimizer": {"type": "AdamW", "params": {"weight_decay": 0.1}}},
            "optimizer.weight_decay=0",
            "optimizer.weight_decay",
        ),
        ({"optimizer": {"type": "AdamW"}}, "optimizer=sgd", "optimizer"),
        ({"scheduler": {"type": "WarmupLR"}}, "schedule=linear", "schedule"),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}}},
            "schedule.warmup_steps=5",
            "schedule.warmup_steps",
        ),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-4}}}, "optimizer.lr=1e-3", "optimizer.lr"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)


def contradicted(write, content: dict[str, Any], override: str) -> tuple[Path, dict[str, str]]:
    path = write({"zero_optimization": {"stage": 1}, **content})
    return path, refused(path, override)


@contradictions
def test_another_value_of_the_command_line_is_refused_with_both_places(write, content, override, key):
    path, problems = contradicted(write, content, override)
    assert list(problems) == [key]
    assert "the command line" in problems[key]
    assert str(path) in problems[key]


@pytest.mark.ci
@contradictions
def test_a_value_of_the_file_may_be_repeated(write, content, override, key):
    path, problems = contradicted(write, content, override)
    fix = problems[key].split("fix: ", 1)[1].split(", or write")[0]
    assert composed(path, fix) == composed(path)


def test_a_value_that_an_experiment_gives_is_given_even_where_it_is_the_default(write):
    problems = refused(
        write({"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 8}), "experiment=chat_lora"
    )
    assert "experiment=chat_lora sets this" in problems["trainer.micro_batch_size"]


def test_all_contradictions_are_reported_at_once(write):
    path = write(
        {
            "train_batch_size": 1,
            "gradient_clipping": 9,
            "sparse_attention": {"mode": "fixed"},
            "zero_optimization": {"stage": 1},
        }
    )
    problems = refused(path, "trainer.global_batch_size=16", "trainer.grad_clip=1")
    assert set(problems) == {"trainer.global_batch_size", "trainer.grad_clip", "sparse_attention"}


@pytest.mark.parametrize(
    ("content", "where", "words"),
    [
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "fp16.enabled", "bf16 is enabled too"),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"cos_min_ratio": 0.1}}},
            "scheduler.params.cos_min_ratio",
            "WarmupLR of DeepSpeed has no such parameter",
        ),
        ({"scheduler": {"type": "OneCycle"}}, "scheduler.type", "no such schedule"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type", "adamw, adamw_8bit, lion, muon, sgd"),
        (
            {"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}},
            "optimizer.params.adam_w_mode",
            "do not do this",
        ),
        (
            {"optimizer": {"type": "SGD", "params": {"eps": 1e-8}}},
            "optimizer.params.eps",
            "optimizer=sgd has no such key",
        ),
    ],
)
def test_contradictions_inside_the_file(write, content, where, words):
    assert words in refused(write({"zero_optimization": {"stage": 1}, **content}))[where]


# ---- accumulation ----


@pytest.mark.parametrize(
    ("content", "overrides", "rows"),
    [
        ({"gradient_accumulation_steps": 3}, ["launch.processes=2"], 24),
        ({"gradient_accumulation_steps": 3, "train_micro_batch_size_per_gpu": 1}, ["launch.processes=2"], 6),
        ({"gradient_accumulation_steps": 2, "train_batch_size": 32}, [], 32),
        ({"gradient_accumulation_steps": 2}, ["trainer.global_batch_size=16", "launch.processes=2"], 16),
        ({"gradient_accumulation_steps": 3}, ["trainer.global_batch_size=16"], None),
        ({"gradient_accumulation_steps": 2}, ["trainer.global_batch_size=16", "launch.processes=4"], None),
        ({"gradient_accumulation_steps": 2}, [], None),
        ({"gradient_accumulation_steps": 0.5}, ["launch.processes=2"], None),
        ({"gradient_accumulation_steps": 2}, ["trainer.micro_batch_size=auto", "launch.processes=2"], None),
    ],
)
def test_accumulation_steps_make_the_global_batch(write, content, overrides, rows):
    path = write({"zero_optimization": {"stage": 1}, **content})
    if rows:
        assert composed(path, *overrides).trainer.global_batch_size == rows
    else:
        assert list(refused(path, *overrides)) == ["gradient_accumulation_steps"]


# ---- what is passed on, and what is refused ----


# All keys of a kind in one file: composing takes 0.4 s, and there are 120 of them.


def with_keys(stage: int, values: dict[str, Any]) -> dict[str, Any]:
    """A file with `values` by dotted key."""
    content: dict[str, Any] = {"zero_optimization": {"stage": stage}}
    for key, value in values.items():
        *sections, last = key.split(".")
        holder = content
        for section in sections:
            holder = holder.setdefault(section, {})
        holder[last] = value
    return content


def test_what_dstune_has_no_key_for_reaches_deepspeed(write):
    values = {key: {bool: True, int: 12345, float: 0.5, str: "fp32"}[kind] for key, kind in PASSED.items()}
    devices = {f"zero_optimization.offload_{part}.device": "cpu" for part in ("optimizer", "param")}
    settings = settings_of(composed(write(with_keys(3, devices | values))))
    for key, value in values.items():
        found: Any = settings
        for part in key.split("."):
            found = found[part]
        assert found == value, key


def test_a_passed_value_of_another_type_is_refused(write):
    problems = refused(write(with_keys(3, {key: [1] for key in PASSED})))
    assert [key for key in PASSED if "expected" not in problems[key]] == []


@pytest.mark.parametrize("value", [{"enabled": True, "x": 1}, {"x": 1}, {}], ids=["on", "given", "empty"])
def test_sections_that_dstune_cannot_honour_are_refused(write, value):
    names = [name for name in REFUSED if value or name in ON_WHEN_THERE]
    problems = refused(write(with_keys(2, dict.fromkeys(names, value))))
    assert [name for name in names if REFUSED[name] not in problems[name]] == []


def test_params_of_an_optimizer_are_a_section_or_auto(write):
    auto = {
        "bf16": "auto",
        "optimizer": {"type": "AdamW", "params": "auto"},
        "scheduler": {"type": "WarmupLR", "params": "auto"},
    }
    assert composed(write(auto)).schedule.name == "deepspeed"
    with pytest.raises(UserError, match="expected an object"):
        composed(write({"optimizer": {"type": "AdamW", "params": [1]}}))


def test_sections_that_are_off_are_let_through(write):
    off = {name: None if name in ON_WHEN_THERE else {"enabled": False, "x": 1} for name in REFUSED}
    assert composed(write(with_keys(2, off))).zero.settings == {}


def test_keys_with_one_possible_value(write):
    assert composed(write(with_keys(2, {key: usual for key, (usual, _) in FIXED.items()}))).zero.settings == {}
    problems = refused(write(with_keys(2, dict.fromkeys(FIXED, "something else"))))
    assert [key for key, (_, reason) in FIXED.items() if reason not in problems[key]] == []


def test_nvme_and_unknown_keys_are_refused(write):
    content = {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}, "stagee": 2}, "made_up": 1}
    problems = refused(write(content))
    assert "NVMe" in problems["zero_optimization.offload_param.device"]
    assert "does not know" in problems["zero_optimization.stagee"]
    assert "does not know" in problems["made_up"]


@pytest.mark.parametrize(
    ("content", "key", "words"),
    [
        ({"bf16": True}, "bf16", '"bf16": {"enabled": true}'),
        ({"zero_optimization": 3}, "zero_optimization", '"zero_optimization": {"stage": 2}'),
        ({"zero_optimization": {"offload_param": "cpu"}}, "zero_optimization.offload_param", '{"device": "cpu"}'),
        ({"optimizer": "AdamW"}, "optimizer", '{"type": "AdamW"}'),
        ({"aio": 1}, "aio", '"aio": {}'),
        ({"train_batch_size": "many"}, "train_batch_size", "expected a whole number"),
        ({"steps_per_print": 10, "wall_clock_breakdown": True}, "wall_clock_breakdown", "step_seconds"),
        (
            {"activation_checkpointing": {"profile": True}},
            "activation_checkpointing.profile",
            "trainer.activation_checkpointing=true",
        ),
    ],
)
def test_values_of_another_kind_and_files_of_a_few_keys_are_named_as_what_they_are(write, content, key, words):
    problems = refused(write(content), "trainer.global_batch_size=8", "zero.stage=0")
    assert list(problems) == [key]
    assert words in problems[key]


def test_a_file_without_a_stage_is_stage_0(write):
    assert composed(write({"gradient_clipping": 1.0})).zero.stage == 0


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("ds.json", '{"zero_optimization": {\n"stage": 2,}}', "ds.json:2"),
        ("ds.yaml", "a: [", "no YAML"),
        ("ds.json", "[1]", "no configuration"),
        ("ds.json", '{"hidden_size": 3}', "not a DeepSpeed configuration"),
        ("fsdp.yaml", "distributed_type: FSDP\nfsdp_config: {}\n", "does not use DeepSpeed"),
    ],
)
def test_files_that_are_something_else(write, name, text, words):
    with pytest.raises(UserError, match=words):
        composed(write(text, name))


def test_a_missing_file_and_a_missing_path():
    with pytest.raises(UserError, match="cannot be read"):
        composed("absent.json")
    with pytest.raises(UserError, match=r"zero\.path"):
        compose(["data=chitchat", "zero=file"])


# ---- zero.settings by hand ----


def test_settings_may_be_given_without_a_file():
    config = compose(
        ["data=chitchat", "zero=stage2", "zero.settings.zero_optimization.round_robin_gradients=true"]
    ).config
    validate(config)
    assert settings_of(config)["zero_optimization"]["round_robin_gradients"] is True


def test_settings_given_by_hand_win_over_those_of_the_file(write):
    path = write({"zero_optimization": {"stage": 2, "allgather_bucket_size": 5}})
    config = composed(path, "zero.settings.zero_optimization.allgather_bucket_size=7")
    assert config.zero.settings == {"zero_optimization": {"allgather_bucket_size": 7}}


@pytest.mark.parametrize(
    ("setting", "fix"),
    [
        *[(f"{key}=1", own) for key, own in OWN_KEYS.items()],
        ("optimizer.type=AdamW", "optimizer=CHOICE"),
        ("elasticity={enabled: true}", "remove it"),
        ("steps_per_print=1", "leave it out"),
    ],
)
def test_settings_for_which_there_is_another_key(setting, fix):
    config = compose(["data=chitchat", f"zero.settings.{setting}"]).config
    with pytest.raises(UserError) as error:
        validate(config)
    (problem,) = error.value.problems
    assert problem.where == f"zero.settings.{setting.split('=')[0]}"
    assert fix in problem.fix
