"""`dstune plan`: the public contract of its JSON, its own arguments beside Hydra's, and the recipes' hardware."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dstune.config.compose import compose
from dstune.core.errors import UserError
from dstune.launch.plan import configuration, main, parse, plan_of, planned
from dstune.planning.hardware import DEVICES
from dstune.planning.hardware import parse as hardware

ROOT = Path(__file__).parents[2]


def plan_json(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_json_is_the_public_contract(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan_json(capsys, "model=llama3_8b", "task=chat", "hardware=8xH100-80G")
    assert {choice["zero"] for choice in found["choices"]} == {"stage0", "stage1", "stage2", "stage3"}
    for choice in found["choices"]:
        kinds = {"zero": str, "offload": str, "micro_batch_size": int, "memory_gib_per_rank": float, "fits": bool}
        assert all(isinstance(choice[key], kind) for key, kind in kinds.items())
        assert choice["step_seconds"] > 0
        assert choice["fits"] == (choice["memory_gib_per_rank"] <= DEVICES["H100-80G"].memory_gib)
    assert found["recommended"]


def test_the_recommendation_can_be_typed_and_fits_as_configured(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model=qwen3_14b", "task=chat", "data.max_length=4096", "trainer.global_batch_size=64"]
    found = plan_json(capsys, *words, "hardware=8xA100-40G")
    assert not found["configured"]["fits"]  # kept activations of 4 rows
    typed = [f"{key}={str(value).lower()}" for key, value in found["recommended"].items()]
    assert typed
    again = plan_json(capsys, *words, *typed, "hardware=8xA100-40G")
    assert again["configured"]["fits"]
    assert again["recommended"] == {}


def test_where_nothing_fits_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model=llama3_70b", "task=chat", "hardware=RTX4090", "hardware.host_gib=256"]
    found = plan_json(capsys, *words)
    assert not found["fits"]
    assert found["recommended"] == {}
    assert main(words) == 0
    assert "nothing fits" in capsys.readouterr().out


def test_where_the_host_has_no_room_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model=llama3_70b", "data=files", "task=chat", "hardware=8xH100-80G", "hardware.host_gib=64"]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "GiB of a node's memory" in text and "there are 64 (hardware.host_gib)" in text
    assert "on the host: GiB of its memory that a rank takes" in text


def test_experts_are_not_planned_in_4_bits() -> None:
    config = compose(["model=qwen3_30b_a3b", "method=qlora", "data.train=x", "task=chat", "data.packing=false"]).config
    with pytest.raises(UserError, match="experts"):
        plan_of(config, parse(["hardware=8xH100-80G"]))


def test_nodes_price_and_own_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    run = ["model=llama3_8b", "task=chat", "trainer.max_steps=1000", "trainer.global_batch_size=256"]
    one = plan_json(capsys, *run, "hardware=8xH100", "price=2.5")
    four = plan_json(capsys, *run, "hardware=8xH100", "nodes=4", "price=2.5")
    stage3 = [next(row for row in found["choices"] if row["zero"] == "stage3") for found in (one, four)]
    assert stage3[1]["hours"] < stage3[0]["hours"]
    assert stage3[0]["cost"] == pytest.approx(2.5 * 8 * stage3[0]["hours"], rel=1e-3)
    assert four["hardware"]["nodes"] == 4
    assert plan_json(capsys, *run, "hardware=8xH100")["choices"][0]["cost"] is None  # no price is made up
    endless = plan_json(capsys, "model=llama3_8b", "task=chat", "hardware=8xH100", "price=2.5")["choices"][0]
    assert endless["cost_per_billion_tokens"] == pytest.approx(2.5 * 8 * endless["hours_per_billion_tokens"], rel=1e-2)
    numbers = ["hardware.memory_gib=48", "hardware.tflops=180", "hardware.bandwidth=900"]
    own = plan_json(capsys, *run, "hardware=2xmine", *numbers)
    assert own["hardware"] == {"device": "mine", "per_node": 2, "nodes": 1, "memory_gib": 48.0}


def test_a_mistyped_model_is_the_one_problem():
    with pytest.raises(UserError) as caught:
        main(["model=llama3_8bb", "hardware=H100"])
    assert [problem.where for problem in caught.value.problems] == ["model"]


def test_nodes_of_the_launch_count_where_none_are_given(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = ["model=llama3_8b", "task=chat", "hardware=8xH100"]
    slurm = [*run, "launch=slurm", "launch.nodes=4", "launch.gpus=8"]
    assert plan_json(capsys, *slurm)["hardware"]["nodes"] == 4
    assert plan_json(capsys, *slurm, "nodes=2")["hardware"]["nodes"] == 2
    hosts = tmp_path / "hosts"
    hosts.write_text("one slots=8\ntwo slots=8\nthree slots=8\n")
    listed = [*run, "launch=hostfile", f"launch.hostfile={hosts}"]
    assert plan_json(capsys, *listed)["hardware"]["nodes"] == 3
    assert plan_json(capsys, *listed, "launch.exclude=two")["hardware"]["nodes"] == 2


@pytest.mark.parametrize(
    ("words", "where"),
    [
        (["hardware=8xH1O0"], "hardware"),
        (["hardware=0xH100"], "hardware"),
        (["nodes=0"], "nodes"),
        (["nodes=1e400"], "nodes"),
        (["nodes=1e308"], "nodes"),
        (["hardware.tflops=1e400"], "hardware.tflops"),
        (["price=free"], "price"),
        (["hardware.memory=48"], "hardware.memory"),
        (["hardware.tflops=-3"], "hardware.tflops"),
        (["zero=stage9"], "zero"),
        (["model.path=nobody/nothing"], "model.path"),
        (["trainer.micro_batch_size=0"], "trainer.micro_batch_size"),
    ],
)
def test_mistakes_are_named(words: list[str], where: str) -> None:
    with pytest.raises(UserError) as caught:
        main(["model=qwen3_8b", "task=chat", *([] if "hardware" in words[0] else ["hardware=H100"]), *words])
    assert where in {problem.where for problem in caught.value.problems}


def test_it_answers_without_torch_in_a_second_or_so(tmp_path: Path) -> None:
    script = (
        "import sys, resource; from dstune.cli import main; code = main(sys.argv[1:]);"
        "heavy = {'torch', 'transformers', 'deepspeed'} & set(sys.modules);"
        "print(code, sorted(heavy), resource.getrusage(resource.RUSAGE_SELF).ru_utime)"
    )
    command = [sys.executable, "-c", script, "plan", "model=llama3_8b", "task=chat", "hardware=8xH100-80G"]
    began = time.perf_counter()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    code, heavy, seconds = done.stdout.splitlines()[-1].rsplit(" ", 2)
    assert (code, heavy) == ("0", "[]")
    assert float(seconds) < 2.5  # processor time: 0.6 s alone; a loaded machine's clock says nothing
    assert time.perf_counter() - began < 60


RECIPES = {
    "glm4.5_air_full_4nodes": ("8xH100-80G", 4),
    "gpt_oss_20b_lora_80gb": ("A100-80G", 1),
    "llama3_1b_full_1gpu": ("A100-40G", 1),
    "llama3_70b_full_4nodes": ("8xH100-80G", 4),
    "llama3_70b_full_offload": ("8xH100-80G", 1),
    "llama3_8b_4nodes": ("8xA100-80G", 4),
    "llama3_8b_full_8gpus": ("8xA100-80G", 1),
    "llama3_8b_lora_24gb": ("24G", 1),
    "llama3_8b_lora_80gb": ("A100-80G", 1),
    "modernbert_1gpu": ("16G", 1),
    "qwen3.5_27b_full_8gpus": ("8xH100-80G", 1),
    "qwen3.5_4b_lora_24gb": ("24G", 1),
    "qwen3_32b_lora_8gpus": ("8xA100-40G", 1),
}
"""What the first lines of each file in conf/experiment say it needs."""


@pytest.mark.parametrize("experiment", RECIPES)
def test_each_recipe_fits_the_hardware_that_it_names(experiment: str) -> None:
    devices, nodes = RECIPES[experiment]
    found = plan_of(compose([f"experiment={experiment}"]).config, parse([f"hardware={devices}", f"nodes={nodes}"]))
    configured = found.plan.configured
    assert configured.fits, f"{configured.memory_gib:.1f} GiB: {configured.memory.parts}"
    assert found.plan.recommended is not None


def test_every_recipe_for_gpus_fits_its_hardware() -> None:
    for_gpus = {
        file.stem
        for file in (ROOT / "conf" / "experiment").glob("*.yaml")
        if " GPU" in file.read_text(encoding="utf-8").split("defaults:")[0]
    }
    assert for_gpus <= set(RECIPES) | {"llama3_8b_4nodes"}


def test_a_model_too_large_by_far_does_not_fit() -> None:
    config = compose(["experiment=llama3_8b_full_8gpus"]).config
    assert not planned(config, hardware("RTX4090", {}, 1)).plan.configured.fits


def documented() -> list[list[str]]:
    texts = [
        (ROOT / name).read_text(encoding="utf-8") for name in ("docs/recipes.md", "docs/planning.md", "docs/memory.md")
    ]
    blocks = [block for text in texts for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines]
    plans = [words[2:] for words in commands if words[:2] == ["dstune", "plan"] and "--calibrate" not in words]
    return [words[: words.index(">")] if ">" in words else words for words in plans]


def test_the_documented_commands_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(documented()) >= 5
    for words in documented():
        assert main(words) == 0, words
        assert "recommended" in capsys.readouterr().out


def test_what_was_measured_here_replaces_the_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DSTUNE_CACHE", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    words = ["model=smollm2", "task=chat", "data=chitchat", "launch.processes=2"]
    assert not plan_json(capsys, *words)["calibrated"]
    slow = {"flops": 1e10, "saved": 1e9, "logits": 1e7, "weights": 1e7, "link": 1e8, "attention": 0.0, "fixed": 0.0}
    fast = {name: 10 * value for name, value in slow.items()}
    seconds = []
    for speed in (slow, fast):
        measured = {"device": "CPU", "ranks": 2, "threads": 1, "speeds": {"2": speed, "4": speed}}
        (tmp_path / "calibration-2.json").write_text(json.dumps({"2": measured}))
        found = plan_json(capsys, *words)
        assert found["calibrated"]
        seconds.append(found["configured"]["step_seconds"])
    assert seconds[0] == pytest.approx(10 * seconds[1], rel=1e-3)
    assert not plan_json(capsys, *words, "launch.processes=3")["calibrated"]


def test_pieces_of_a_layer_that_the_model_does_not_have_are_refused_as_training_does() -> None:
    with pytest.raises(UserError, match="bert has no feed-forward layer with gate_proj") as caught:
        main(["model=bert_base", "task=classification", "data=sentiment", "hardware=H100", "trainer.mlp_tiles=4"])
    assert [problem.where for problem in caught.value.problems] == ["trainer.mlp_tiles"]


def test_of_choices_with_room_the_fastest_is_recommended(capsys) -> None:
    """Two ranks of SmolLM2: ZeRO 0 to 2 fit with room, and ZeRO-2's update of half the states each is the fastest."""
    words = ["model=smollm2_135m", "task=causal_lm", "data=files", "hardware=2xH100-80G", "zero=stage0"]
    found = plan_json(capsys, *words)
    plain = {row["zero"]: row["step_seconds"] for row in found["choices"] if row["fits"] and row["offload"] == "none"}
    assert len(plain) == 4
    chosen = f"stage{found['recommended']['zero.stage']}"
    assert plain[chosen] == min(plain.values()) and min(plain.values()) < plain["stage0"]


def test_rows_that_ranks_share_take_a_part_of_the_memory_and_ranks_that_can_be_divided(capsys) -> None:
    words = ["model=llama3_8b", "task=causal_lm", "data=files", "hardware=8xH100-80G", "data.max_length=32768"]
    words += ["trainer.micro_batch_size=1", "zero=stage3"]
    whole = plan_json(capsys, *words)["configured"]
    shared = plan_json(capsys, *words, "parallel=ulysses", "parallel.size=8")["configured"]
    assert shared["memory_gib_per_rank"] < 0.4 * whole["memory_gib_per_rank"]
    assert shared["fits"] and not whole["fits"]
    capped = ["model=gemma2_2b", "model.attention=auto", *words[1:]]
    with pytest.raises(UserError, match="gemma2: its attention caps its scores"):
        main([*capped, "parallel=ulysses"])
    for size, why in ((3, "8 ranks cannot be divided"), (5, "32 attention heads cannot be shared")):
        with pytest.raises(UserError, match=why):
            main([*words, "parallel=ulysses", f"parallel.size={size}"])


def lines_of(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert main([*words]) == 0
    return capsys.readouterr().out.splitlines()


def test_a_plan_says_first_whether_and_how(capsys: pytest.CaptureFixture[str]):
    words = ["model=llama3_70b", "method=full", "data.max_length=2048", "zero.offload_optimizer=none"]
    lines = lines_of(capsys, *words, "hardware=8xH100-80G")
    assert re.match(r"no, not as configured: it takes [\d.]+ GiB a rank, there are 79.2", lines[3])
    assert re.match(
        r"yes, as recommended, if each node has \d+ GiB of memory for it \(hardware.host_gib=\): [\d.]+ of 79.2 GiB",
        lines[4],
    )
    recommended = lines[5].removeprefix("recommended: ").split()
    kept = [word for word in words if word != "zero.offload_optimizer=none"]
    assert lines[6].split() == ["dstune", "train", *kept, "data.train=FILE", *recommended], (
        "what is recommended replaces what was given"
    )
    table = {line.split()[0]: line.split() for line in lines[8:13] if line}
    assert [table[name][1] for name in ("full", "lora", "qlora")] == ["yes", "yes", "yes"]
    assert float(table["full"][3]) > 500 > float(table["lora"][2])


def test_a_plan_says_how_much_of_a_model_with_experts_a_token_uses(capsys: pytest.CaptureFixture[str]):
    words = ["model=qwen3_30b_a3b", "method=lora", "hardware=H100-80G"]
    assert "30.532B parameters, 3.353B of them for a token, " in lines_of(capsys, *words)[0]
    assert plan_json(capsys, *words)["model"]["active"] == pytest.approx(3.353e9, rel=1e-3)
    assert "active" not in plan_json(capsys, "model=qwen3_8b", *words[1:])["model"]


def test_a_plan_that_does_not_fit_says_so_first_and_what_would(capsys: pytest.CaptureFixture[str]):
    lines = lines_of(capsys, "model=llama3_70b", "method=lora", "hardware=RTX4090", "hardware.host_gib=64")
    assert lines[3].startswith("no: nothing fits")
    assert lines[5].split()[:3] == ["method", "fits", "GiB"]


def test_a_plan_as_json_has_the_methods_beside_its_fields(capsys: pytest.CaptureFixture[str]):
    found = json.loads("\n".join(lines_of(capsys, "model=llama3_8b", "method=lora", "hardware=RTX4090", "--json")))
    assert {"choices", "recommended", "fits", "configured"} <= set(found)
    assert set(found["methods"]) == {"full", "lora", "qlora"}
    assert found["methods"]["lora"]["recommended"] == found["recommended"]
    assert found["methods"]["qlora"]["memory_gib_per_rank"] < found["methods"]["lora"]["memory_gib_per_rank"]
    assert found["host_gib_per_node"] == 0
    other = json.loads("\n".join(lines_of(capsys, "model=minilm", "task=classification", "hardware=RTX4090", "--json")))
    assert other["methods"] == {}, "of a task that generates no text"


EXPERIMENTS = sorted((ROOT / "conf" / "experiment").glob("*.yaml"))
PLANNED = re.compile(r"^# `dstune plan` with (hardware=.+): ([\d.]+) GiB of ([\d.]+)\.$", re.MULTILINE)


@pytest.mark.parametrize(
    "file", [file for file in EXPERIMENTS if PLANNED.search(file.read_text())], ids=lambda file: file.stem
)
def test_the_memory_in_an_experiments_comment_is_that_of_the_plan(file: Path):
    found = PLANNED.search(file.read_text())
    assert found is not None
    words, memory, device = found.groups()
    arguments = parse([f"experiment={file.stem}", *words.split()])
    estimate = plan_of(configuration(arguments), arguments)
    assert estimate.plan.configured.fits
    assert estimate.plan.configured.memory_gib == pytest.approx(float(memory), abs=0.06)
    assert estimate.cluster.device.memory_gib == pytest.approx(float(device), abs=0.06)


def test_every_experiment_for_a_gpu_says_what_it_is_planned_to_take():
    named = [file.stem for file in EXPERIMENTS if re.search(r"(24gb|80gb|gpus?|nodes|offload)$", file.stem)]
    assert len(named) >= 13
    assert [name for name in named if not PLANNED.search((EXPERIMENTS[0].parent / f"{name}.yaml").read_text())] == []


def test_qlora_counts_embeddings_and_head_whole(capsys: pytest.CaptureFixture[str]):
    words = ["model=llama3_8b", "method=qlora", "zero=stage1", "hardware=H100-80G", "trainer.micro_batch_size=1"]
    found = plan_json(capsys, *words)["configured"]["parts_gib"]
    tables = 2 * 128256 * 4096 * 2
    rounded = (8_030_261_248 - tables // 2) / 2
    assert (tables + rounded) / 2**30 < found["weights"] < 1.1 * (tables + rounded) / 2**30


def test_qlora_pays_for_dequantizing(capsys: pytest.CaptureFixture[str]):
    words = ["model=llama3_8b", "zero=stage1", "hardware=H100-80G", "trainer.micro_batch_size=1"]
    seconds = [plan_json(capsys, *words, f"method={name}")["configured"]["step_seconds"] for name in ("lora", "qlora")]
    assert 1.05 < seconds[1] / seconds[0] < 2


def test_the_first_line_answers_for_the_configured_run(capsys: pytest.CaptureFixture[str]):
    lines = lines_of(capsys, "model=llama3_8b", "method=lora", "hardware=24G", "trainer.micro_batch_size=8")
    assert lines[3].startswith("no, not as configured")
    assert lines[4].startswith("yes, as recommended")


@pytest.mark.parametrize("words", [["method=lora", "hardware=H100-80G"], ["method=full", "hardware=8xH100-80G"]])
def test_no_more_memory_is_recommended_for_the_same_speed(capsys: pytest.CaptureFixture[str], words: list[str]):
    found = plan_json(capsys, "model=llama3_8b", "zero=stage3", "data.max_length=2048", *words)
    changed = found["recommended"]
    stage = f"stage{changed.get('zero.stage', 3)}"
    [best] = [row for row in found["choices"] if (row["zero"], row["offload"]) == (stage, "none")]
    as_fast = [
        row
        for row in found["choices"]
        if row["fits"]
        and row["offload"] == "none"
        and row["zero"] <= best["zero"]  # a higher stage is no simpler run
        and row["step_seconds"] <= best["step_seconds"]
    ]
    assert best["memory_gib_per_rank"] <= min(row["memory_gib_per_rank"] for row in as_fast)


def test_micro_batches_that_count_for_nothing_are_in_the_first_line(capsys: pytest.CaptureFixture[str]):
    """4 micro-batches of 4 rows for 8 devices: half of what they compute counts for nothing."""
    lines = lines_of(capsys, "model=llama3_8b", "data=chitchat", "hardware=8xH100-80G")
    assert lines[3].endswith("4 of its 8 micro-batches count for nothing")
    assert lines[5] == "recommended: trainer.micro_batch_size=2"
    words = ["model=llama3_8b", "data=chitchat", "hardware=8xH100-80G", "trainer.micro_batch_size=2"]
    assert "count for nothing" not in "\n".join(lines_of(capsys, *words))


@pytest.mark.parametrize(
    ("method", "zero"), [("full", "auto"), ("full", "stage3"), ("lora", "auto"), ("lora", "stage3"), ("qlora", "auto")]
)
def test_one_device_is_recommended_no_stage_that_takes_more_memory(method: str, zero: str) -> None:
    """On one device ZeRO partitions nothing, so a higher stage without offloading is slower or takes more memory."""
    for model, device in (("llama3_8b", "A100-80G"), ("qwen3_8b", "H200"), ("qwen3_14b", "H100-80G")):
        words = [f"model={model}", f"method={method}", f"zero={zero}", "data=chitchat"]
        found = planned(compose(words).config, hardware(device, {}, 1)).plan
        best, rows = found.recommended, [row for row in found.choices if row.fits and row.offload == "none"]
        if best is not None and best.offload == "none":
            as_fast = [row for row in rows if row.time.seconds <= 1.01 * best.time.seconds]
            assert best.memory_gib <= 1.01 * min(row.memory_gib for row in as_fast), (model, device)


@pytest.mark.parametrize(
    ("words", "devices"),
    [
        (["model=phi4", "data.max_length=512", "zero=stage3"], "2xB200"),
        (["model=qwen2.5_1.5b", "data.max_length=2048", "zero=stage3"], "1xRTX4090"),
        (["model=llama3_8b", "data.max_length=2048"], "1xH100-80G"),
    ],
)
def test_qlora_is_shown_with_no_more_memory_than_lora_where_it_is_no_faster(
    capsys: pytest.CaptureFixture[str], words: list[str], devices: str
) -> None:
    run = [*words, "method=lora", "data=chitchat", "trainer.micro_batch_size=1", f"hardware={devices}"]
    methods = plan_json(capsys, *run)["methods"]
    lora, qlora = methods["lora"], methods["qlora"]
    assert qlora["fits"]
    assert qlora["step_seconds"] > lora["step_seconds"], "a case that this is about"
    assert qlora["memory_gib_per_rank"] <= lora["memory_gib_per_rank"]
