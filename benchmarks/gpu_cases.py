"""The cases of `gpu_report.py`, each in a process of its own: `python gpu_cases.py CASE FOLDER [--simulate]`.

A case writes what it has measured so far into FOLDER/measured.json after each row, so that a limit cuts off the rest alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


class Bench:
    """Where a case measures, and what."""

    def __init__(self, folder: Path, *, simulate: bool):
        self.folder, self.simulate, self.rows = folder, simulate, list[dict[str, Any]]()
        if simulate:
            from tests.placement import simulated_device

            simulated_device.install()
        from dstune.zero import accelerator

        assert accelerator.present(), "there is no accelerator; --simulate rehearses"
        self.accelerator, self.device = accelerator, accelerator.current()
        total = accelerator.memory(self.device)[1] / 2**30
        self.row(machine=f"{accelerator.name()} ({total:.0f} GiB)")

    def row(self, **values: Any) -> None:
        self.rows.append(values)
        (self.folder / "measured.json").write_text(json.dumps(self.rows))

    def size(self, real: int, rehearsal: int) -> int:
        return rehearsal if self.simulate else real

    def milliseconds(self, action: Callable[[], object]) -> float:
        """Median of several calls, after two that are not timed."""
        times = []
        for number in range(self.size(12, 3)):
            self.accelerator.synchronize()
            began = time.perf_counter()
            action()
            self.accelerator.synchronize()
            if number > 1:
                times.append(time.perf_counter() - began)
        return sorted(times)[len(times) // 2] * 1e3

    def peak_gib(self, action: Callable[[], object]) -> float:
        module = self.accelerator.module()
        module.reset_peak_memory_stats()
        before = module.memory_allocated()
        action()
        self.accelerator.synchronize()
        return float(module.max_memory_allocated() - before) / 2**30

    # -- runs ---------------------------------------------------------------------------------------------------------

    def inputs(self) -> tuple[Path, Path]:
        from tests.support.tiny import save_decoder, write_dialogues

        model, data = self.folder / "model", self.folder / "rows.jsonl"
        if not data.exists():
            save_decoder(model)
            write_dialogues(data, self.size(400, 60))
        return model, data

    def shape(self, name: str, **values: int) -> Path:
        """A folder with a `config.json` of this shape, whose weights are random; the tokenizer is the tiny one's."""
        model, _ = self.inputs()
        folder = self.folder / name
        if not folder.exists():
            folder.mkdir()
            for file in model.iterdir():
                if file.suffix != ".safetensors":
                    (folder / file.name).write_bytes(file.read_bytes())
            config = json.loads((folder / "config.json").read_text())
            small = {key: value for key, value in values.items() if key.startswith("num_") and "layers" not in key}
            given = small | {"hidden_size": 16 * small["num_attention_heads"]} if self.simulate else values
            (folder / "config.json").write_text(json.dumps(config | given | {"max_position_embeddings": 8192}))
        return folder

    def train(self, name: str, *words: str, steps: int = 4) -> dict[str, Any]:
        """A run of one rank in this process (a second one after it would need a process group of its own: see `children`)."""
        from dstune.config.compose import compose
        from dstune.config.run_file import Composed, write_run
        from dstune.config.validate import validate
        from dstune.core.rank_env import RankEnv
        from dstune.rank import worker
        from dstune.zero.start import start_process_group

        _, data = self.inputs()
        own = {word.partition("=")[0] for word in words}
        common = [f"run.dir={self.folder / name}", f"data.train={data}", "data=files", "launch.processes=1"]
        common += [f"trainer.max_steps={steps}", "trainer.micro_batch_size=2", "trainer.global_batch_size=4"]
        common += [
            "run.export=none",
            "data.max_length=64",
            "evaluate.at_start=false",
            f"checkpoint.every={steps}",
            "trainer.epochs=100",
        ]
        config = compose([word for word in common if word.partition("=")[0] not in own] + list(words)).config
        validate(config)
        folder = self.folder / name
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        write_run(folder / "run.yaml", Composed(config, []))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", DSTUNE_STORE=str(folder / "store"))
        worker.train(config, folder, start_process_group(RankEnv(0, 1, 0, 1, "environment")))
        return self.result(folder)

    def result(self, folder: Path) -> dict[str, Any]:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        rows = [row for row in map(json.loads, lines) if "loss" in row]
        result = json.loads((folder / "result.json").read_text())
        keys = ("tokens_per_second", "peak_memory_gib")
        kernels = json.loads((folder / "environment.json").read_text()).get("kernels", {})
        return {
            "losses": [row["loss"] for row in rows],
            "norms": [row["grad_norm"] for row in rows],
            **{key: result.get(key) for key in keys},
            "attention": kernels.get("attention"),
            "mfu": rows[-1].get("mfu"),
        }

    def child(self, name: str, *words: str, steps: int = 4) -> dict[str, Any]:
        """A run in a process of its own. Raises RuntimeError with its last lines where it fails."""
        command = [sys.executable, __file__, "train", str(self.folder), name, str(steps), *words]
        command += ["--simulate"] if self.simulate else []
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        if done.returncode:
            raise RuntimeError("\n".join((done.stdout + done.stderr).splitlines()[-8:]))
        return self.result(self.folder / name)

    def reported(self, name: str, *words: str, steps: int = 4, **more: Any) -> dict[str, Any]:
        """A row of a run: what it reached, or why it failed."""
        try:
            found = self.child(name, *words, steps=steps)
        except RuntimeError as error:
            self.row(run=name, failed=str(error).splitlines()[-1][:300])
            return {}
        first, last = found["losses"][0], found["losses"][-1]
        figures = {"tokens_per_second": found["tokens_per_second"], "peak_gib": found["peak_memory_gib"]}
        self.row(run=name, loss=f"{first:.4f} -> {last:.4f}", **figures, attention=found["attention"], **more)
        return found


CASES: dict[str, Callable[[Bench], None]] = {}


def case(function: Callable[[Bench], None]) -> Callable[[Bench], None]:
    CASES[function.__name__] = function
    return function


def on_cpu(bench: Bench, *words: str) -> dict[str, Any]:
    """The same run on this machine's CPU, in fp32."""
    command = [sys.executable, __file__, "train", str(bench.folder), "cpu", "4", *words]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([*command, "--cpu"], capture_output=True, text=True, env=env)
    if done.returncode:
        raise RuntimeError("\n".join((done.stdout + done.stderr).splitlines()[-8:]))
    return bench.result(bench.folder / "cpu")


@case
def losses(bench: Bench) -> None:
    """Losses and gradient norms at each stage beside those of the CPU in fp32."""
    model, _ = bench.inputs()
    words = (f"model.path={model}", "trainer.precision=fp32", "optimizer.lr=1e-3")
    expected = on_cpu(bench, *words, "zero=stage2")
    for name, more in {"stage2": ["zero=stage2"], "stage3": ["zero=stage3"], "stage1": ["zero=stage1"]}.items():
        found = bench.reported(f"{name}-fp32", *words, *more)
        if found:
            apart = [abs(a / b - 1) for a, b in zip(found["losses"], expected["losses"], strict=True)]
            norms = [abs(a / b - 1) for a, b in zip(found["norms"], expected["norms"], strict=True)]
            bench.row(run=f"{name}-fp32 against the CPU", loss_apart=max(apart), norm_apart=max(norms))
    for name in ("stage2", "stage3"):
        bench.reported(f"{name}-bf16", f"model.path={model}", "trainer.precision=bf16", f"zero={name}")


@case
def attention(bench: Bench) -> None:
    """A forward and backward pass of packed rows by each kernel, and by sdpa with a mask."""
    import torch
    import torch.nn.functional as functional

    from dstune.models.varlen import boundaries_of, kernels

    for length in (bench.size(1024, 32), bench.size(4096, 64), bench.size(8192, 64)):
        sample = length // 4
        positions = (torch.arange(length) % sample)[None]
        starts, longest = boundaries_of({"input_ids": positions, "position_ids": positions})
        boundaries = (starts.to(bench.device), longest)
        heads, of_keys, size = bench.size(32, 4), bench.size(8, 2), bench.size(128, 16)
        shapes = ((length, heads, size), (length, of_keys, size), (length, of_keys, size))
        states = [torch.randn(shape).to(bench.device, torch.bfloat16).requires_grad_() for shape in shapes]
        place = torch.arange(length)
        seen = (place[:, None] >= place) & (place[:, None] // sample == place // sample)
        mask = seen[None, None].to(bench.device)

        def masked(mask: Any = mask, states: Any = states) -> torch.Tensor:
            q, k, v = (part.transpose(0, 1)[None] for part in states)
            found = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
            return found[0].transpose(0, 1)

        ways: dict[str, Callable[[], torch.Tensor]] = {"sdpa with a mask": masked}
        for kernel in kernels():
            if bench.simulate and "flex" in kernel.name:
                continue  # it is compiled

            def packed(kernel: Any = kernel, states: Any = states, at: Any = boundaries) -> torch.Tensor:
                from dstune.models.varlen import Boundaries

                return kernel.compute(*states, Boundaries(*at), states[0].shape[-1] ** -0.5, None)

            ways[kernel.name] = packed
        expected = masked().detach().float()
        for name, way in ways.items():
            try:
                apart = float((way().detach().float() - expected).abs().max())
                taken = bench.milliseconds(lambda way=way: way().float().square().sum().backward())
                peak = bench.peak_gib(lambda way=way: way().float().square().sum().backward())
                bench.row(positions=length, kernel=name, ms=taken, peak_gib=peak, apart=apart)
            except Exception as error:
                bench.row(positions=length, kernel=name, failed=f"{type(error).__name__}: {error}"[:200])


ONE_AND_A_HALF = {
    "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
    "num_key_value_heads": 2, "vocab_size": 151936,
}  # fmt: skip
EIGHT = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip


def packed_words(bench: Bench, shape: dict[str, int], name: str) -> list[str]:
    model = bench.shape(name, **shape)
    length = bench.size(4096, 64)
    words = [f"model.path={model}", "model.weights=random", f"data.max_length={length}", "trainer.precision=bf16"]
    return [
        *words,
        "data.packing=true",
        "trainer.activation_checkpointing=true",
        "checkpoint.every=1000",
        "run.export=none",
    ]


@case
def packed_step(bench: Bench) -> None:
    """Steps of packed rows of 4k, with what waited for the device (`torch.cuda.set_sync_debug_mode`)."""
    words = packed_words(bench, ONE_AND_A_HALF | {"num_hidden_layers": 8}, "eight-layers")
    os.environ["GPU_CASES_WAITS"] = "1"
    bench.reported("packed", *words, "zero=stage2", "trainer.profile_steps=2", steps=6)
    waits = bench.folder / "waits.json"
    if waits.exists():
        for place, count in json.loads(waits.read_text()).items():
            bench.row(waits_at=place, times=count)


@case
def cross_entropy(bench: Bench) -> None:
    """The loss of 4,096 targets: chunks, the plain way, Liger's where it is installed."""
    import torch
    import torch.nn.functional as functional
    from torch import nn

    from dstune.models.cross_entropy import projected_cross_entropy, wide_products

    targets, vocabulary, width = bench.size(4096, 16), bench.size(128256, 64), bench.size(4096, 32)
    projection = nn.Linear(width, vocabulary, bias=False, dtype=torch.bfloat16).to(bench.device)
    hidden = torch.randn(targets, width).to(bench.device, torch.bfloat16).requires_grad_()
    expected = torch.randint(vocabulary, (targets,)).to(bench.device)
    bench.row(logits="fp32" if wide_products(bench.device.type, torch.bfloat16) else "bf16")

    def chunked() -> torch.Tensor:
        return projected_cross_entropy(projection, projection.forward, hidden, expected).loss_sum

    def plain() -> torch.Tensor:
        return functional.cross_entropy(projection(hidden).float(), expected, reduction="sum")

    ways = {"chunks": chunked, "plain": plain}
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        fused = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        ways["Liger"] = lambda: fused(projection.weight, hidden, expected)
    except ImportError:
        bench.row(way="Liger", failed="not installed")
    exact = functional.cross_entropy(hidden.detach().float() @ projection.weight.detach().float().t(), expected)
    for name, way in ways.items():
        peak = bench.peak_gib(lambda way=way: way().backward())
        apart = abs(float(way()) / targets - float(exact))
        bench.row(way=name, ms=bench.milliseconds(lambda way=way: way().backward()), peak_gib=peak, apart=apart)


@case
def norms(bench: Bench) -> None:
    """RMS norms of a Llama: transformers' chain, dstune's, torch's kernel; and whether the proof takes it."""
    import torch
    import torch.nn.functional as functional
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    from dstune.models.norms import Kind, is_as_exact, lean_norm

    width = bench.size(4096, 32)
    rows = torch.randn(bench.size(8192, 16), width).to(bench.device, torch.bfloat16).requires_grad_()
    norm = LlamaRMSNorm(width, eps=1e-5).to(bench.device, torch.bfloat16)
    weight = norm.weight
    bench.row(kernel_is_as_exact=is_as_exact(Kind.rounded, 1e-5, width, torch.bfloat16))
    ways = {
        "transformers": lambda: norm(rows),
        "dstune": lambda: lean_norm(rows, weight, 1e-5, Kind.rounded),
        "torch's kernel": lambda: functional.rms_norm(rows, (width,), weight, 1e-5),
    }
    for name, way in ways.items():
        peak = bench.peak_gib(lambda way=way: way().sum().backward())
        bench.row(way=name, ms=bench.milliseconds(lambda way=way: way().sum().backward()), peak_gib=peak)


@case
def elementwise(bench: Bench) -> None:
    """SwiGLU and rotary positions as transformers has them, compiled, and by Liger where installed."""
    import torch
    import torch.nn.functional as functional

    inner = bench.size(14336, 32)
    gate, up = (
        torch.randn(bench.size(8192, 16), inner).to(bench.device, torch.bfloat16).requires_grad_() for _ in "ab"
    )

    def swiglu(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return functional.silu(a) * b

    ways: dict[str, Callable[..., torch.Tensor]] = {"SwiGLU": swiglu}
    if not bench.simulate:
        ways["SwiGLU compiled"] = torch.compile(swiglu)
    try:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        ways["SwiGLU by Liger"] = LigerSiLUMulFunction.apply
    except ImportError:
        bench.row(way="SwiGLU by Liger", failed="not installed")
    for name, way in ways.items():
        peak = bench.peak_gib(lambda way=way: way(gate, up).sum().backward())
        bench.row(way=name, ms=bench.milliseconds(lambda way=way: way(gate, up).sum().backward()), peak_gib=peak)


@case
def plan(bench: Bench) -> None:
    """The planner's memory beside the allocator's peak."""
    from dstune.config.compose import compose
    from dstune.config.schema import Precision
    from dstune.planning.architecture import architecture
    from dstune.planning.memory import memory
    from dstune.planning.setup import head_of, setup

    words = packed_words(bench, ONE_AND_A_HALF, "one-and-a-half")
    for stage in ("stage2", "stage3"):
        run = [*words, f"zero={stage}", "trainer.micro_batch_size=1", "trainer.global_batch_size=2"]
        found = bench.reported(f"plan-{stage}", *run)
        config = compose(["data=files", "data.train=rows.jsonl", *run]).config
        values = json.loads((bench.folder / "one-and-a-half" / "config.json").read_text())
        model = architecture(values, head_of(config))
        more = {"ranks": 1, "ranks_per_node": 1, "on_gpu": True, "precision": Precision.bf16, "values": values}
        planned = memory(setup(config, model, **more)).total / 2**30
        if found:
            measured = found["peak_memory_gib"]
            bench.row(run=f"plan-{stage}", planned_gib=planned, peak_gib=measured, ratio=planned / max(measured, 1e-9))


@case
def out_of_memory(bench: Bench) -> None:
    """`trainer.micro_batch_size=auto`, and what a run says that does not fit."""
    words = packed_words(bench, ONE_AND_A_HALF | {"num_hidden_layers": 8}, "eight-layers")
    bench.reported(
        "auto", *words, "zero=stage2", "trainer.micro_batch_size=auto", "trainer.global_batch_size=64", steps=2
    )
    if bench.simulate:
        bench.row(run="forced", failed="a simulated device is never full")
        return
    large = ["trainer.micro_batch_size=512", "trainer.global_batch_size=512", "trainer.activation_checkpointing=false"]
    own = {word.partition("=")[0] for word in large}
    bench.reported(
        "forced", *[word for word in words if word.partition("=")[0] not in own], *large, "zero=stage2", steps=1
    )


@case
def importance(bench: Bench) -> None:
    model, _ = bench.inputs()
    bench.reported("importance", f"model.path={model}", "method=importance", "method.score_steps=2", "zero=stage2")


@case
def preference(bench: Bench) -> None:
    from tests.support.tiny import write_preferences

    model, _ = bench.inputs()
    data = write_preferences(bench.folder / "pairs.jsonl", 60)
    bench.reported("dpo", f"model.path={model}", "task=preference", f"data.train={data}", "zero=stage2", "method=lora")


@case
def classification(bench: Bench) -> None:
    from tests.support.tiny import save_encoder, write_labelled

    model, data = save_encoder(bench.folder / "encoder"), write_labelled(bench.folder / "labels.jsonl", 60)
    bench.reported("classifier", f"model.path={model}", "task=classification", f"data.train={data}", "zero=stage3")


@case
def half(bench: Bench) -> None:
    model, _ = bench.inputs()
    if bench.simulate:
        bench.row(run="fp16", failed="a CPU has no kernels of fp16 for several layers")
        return
    bench.reported("fp16", f"model.path={model}", "trainer.precision=fp16", "zero=stage2")
    bench.reported("tf32", f"model.path={model}", "trainer.precision=fp32", "trainer.tf32=true", "zero=stage2")


@case
def deterministic(bench: Bench) -> None:
    """Two runs of the same words, and whether they are equal to the bit."""
    model, _ = bench.inputs()
    words = (f"model.path={model}", "trainer.precision=bf16", "trainer.deterministic=true", "zero=stage2")
    first, second = bench.reported("first", *words), bench.reported("second", *words)
    if first and second:
        bench.row(run="equal to the bit", value=first["losses"] == second["losses"])


@case
def resume(bench: Bench) -> None:
    """Half of the steps with a save in the background, then the rest, beside a run without a stop."""
    model, _ = bench.inputs()
    words = (
        f"model.path={model}",
        "trainer.precision=bf16",
        "zero=stage2",
        "checkpoint.mode=async",
        "trainer.deterministic=true",
    )
    if bench.simulate:
        bench.row(run="resume", failed="the simulated device has no memory of its own that a checkpoint could copy")
        return
    whole = bench.reported("whole", *words, "checkpoint.every=2", steps=4)
    bench.reported("halves", *words, "checkpoint.every=2", steps=2)
    resumed = bench.reported("halves", *words, "checkpoint.every=2", steps=4)
    if whole and resumed:
        bench.row(run="resumed to the bit", value=whole["losses"][2:] == resumed["losses"][-2:])


@case
def offload(bench: Bench) -> None:
    model, _ = bench.inputs()
    if bench.simulate:
        bench.row(run="offload", failed="the simulated device has no memory of its own to move states from")
        return
    bench.reported("offload", f"model.path={model}", "zero=stage3_offload", "trainer.precision=bf16")


@case
def qlora(bench: Bench) -> None:
    if bench.simulate:
        bench.row(run="qlora", failed="bitsandbytes has no kernels for a device that it does not know")
        return
    model = bench.shape("wide", hidden_size=1024, intermediate_size=2816, num_attention_heads=16, num_key_value_heads=4)
    for stage in ("stage2", "stage3"):
        bench.reported(
            f"qlora-{stage}", f"model.path={model}", "method=qlora", f"zero={stage}", "trainer.precision=bf16"
        )


@case
def full_1_5b(bench: Bench) -> None:
    words = packed_words(bench, ONE_AND_A_HALF, "one-and-a-half")
    bench.reported(
        "full 1.5B", *words, "zero=stage2", "trainer.micro_batch_size=2", "trainer.global_batch_size=8", steps=6
    )


@case
def lora_8b(bench: Bench) -> None:
    words = packed_words(bench, EIGHT, "eight")
    lora = ("method=lora", "zero=stage2", "trainer.micro_batch_size=2", "trainer.global_batch_size=8")
    bench.reported("LoRA 8B", *words, *lora, steps=6)


@case
def trl(bench: Bench) -> None:
    """TRL's SFTTrainer on the same shape, rows and length: sdpa, and flash attention and Liger where installed."""
    import importlib.util

    if bench.simulate or importlib.util.find_spec("trl") is None:
        bench.row(run="TRL", failed="not on a simulated device" if bench.simulate else "TRL is not installed")
        return
    import torch
    from datasets import load_dataset
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    model_folder = bench.shape("one-and-a-half", **ONE_AND_A_HALF)
    _, data = bench.inputs()
    liger = importlib.util.find_spec("liger_kernel") is not None
    flash = importlib.util.find_spec("flash_attn") is not None
    for kind in ["sdpa"] + ["flash_attention_2"] * flash:
        config = AutoConfig.from_pretrained(model_folder)
        with torch.device(bench.device):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=kind)
        more = {"use_liger_kernel": True} if liger else {}
        arguments = SFTConfig(
            output_dir=str(bench.folder / "trl"), max_steps=6, per_device_train_batch_size=2, packing=True, bf16=True,
            gradient_accumulation_steps=4, max_length=4096, gradient_checkpointing=True, report_to=[], **more,
        )  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(model_folder)
        rows = load_dataset("json", data_files=str(data), split="train")
        trainer = SFTTrainer(model, args=arguments, train_dataset=rows, processing_class=tokenizer)
        bench.accelerator.module().reset_peak_memory_stats()
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
        peak = bench.accelerator.module().max_memory_allocated() / 2**30
        bench.row(run=f"TRL {kind}{' Liger' if liger else ''}", tokens_per_second=6 * 8 * 4096 / seconds, peak_gib=peak)
        del trainer, model


def several(bench: Bench, name: str, *words: str) -> None:
    """A run on all GPUs through `dstune train`."""
    model, data = bench.inputs()
    gpus = os.environ.get("GPUS", "1")
    command = [sys.executable, "-m", "dstune", "train", f"run.dir={bench.folder / name}", f"model.path={model}"]
    command += ["data=files", f"data.train={data}", "trainer.max_steps=4", "trainer.epochs=100", "data.max_length=128"]
    command += [f"launch.processes={gpus}", "trainer.micro_batch_size=2", f"trainer.global_batch_size={4 * int(gpus)}"]
    if bench.simulate or gpus == "1":
        bench.row(run=name, failed="needs several GPUs: GPUS=8")
        return
    done = subprocess.run([*command, *words], capture_output=True, text=True, cwd=bench.folder)
    if done.returncode:
        bench.row(run=name, failed=(done.stdout + done.stderr).splitlines()[-1][:300])
        return
    found = bench.result(bench.folder / name)
    bench.row(
        run=name, losses=str([round(loss, 4) for loss in found["losses"]]), tokens_per_second=found["tokens_per_second"]
    )


@case
def nccl(bench: Bench) -> None:
    if bench.simulate:
        bench.row(run="nccl", failed="needs several GPUs")
        return
    done = subprocess.run([sys.executable, "-m", "dstune", "doctor", "--json"], capture_output=True, text=True)
    for check in json.loads(done.stdout)["checks"]:
        bench.row(check=check["name"], status=check["status"], detail=check["detail"][:200])


@case
def ranks(bench: Bench) -> None:
    for stage in ("stage1", "stage2", "stage3"):
        several(bench, stage, f"zero={stage}", "trainer.precision=fp32")
    several(bench, "no-overlap", "zero=stage2", "zero.overlap_comm=false")


@case
def ulysses(bench: Bench) -> None:
    several(bench, "ulysses", "parallel=ulysses", "parallel.size=2", "trainer.precision=bf16")


@case
def tensor(bench: Bench) -> None:
    several(bench, "tensor", "parallel=tensor", "parallel.size=2", "zero=stage1", "trainer.precision=bf16")


# --- a run in a process of its own ------------------------------------------------------------------------------------


def count_waits(folder: Path) -> None:
    """Let CUDA warn of what waits, count it by line, and write `waits.json` with each line."""
    import torch

    if not torch.cuda.is_available():
        return
    torch.cuda.set_sync_debug_mode("warn")
    counted: dict[str, int] = {}

    def show(message: Any, category: Any, filename: str, lineno: int, *unused: Any) -> None:
        if "synchroniz" in str(message):
            place = f"{filename.rpartition('site-packages/')[2]}:{lineno}"
            counted[place] = counted.get(place, 0) + 1
            (folder / "waits.json").write_text(json.dumps(counted))

    warnings.simplefilter("always")
    warnings.showwarning = show


def main() -> None:
    arguments = [word for word in sys.argv[1:] if word not in ("--simulate", "--cpu")]
    name, folder = arguments[0], Path(arguments[1])
    simulate = "--simulate" in sys.argv
    if name != "train":
        CASES[name](Bench(folder, simulate=simulate))
        return
    _, _, run, steps, *words = arguments
    bench = Bench.__new__(Bench)
    bench.folder, bench.simulate = folder, simulate
    if simulate:
        from tests.placement import simulated_device

        simulated_device.install()
    if os.environ.get("GPU_CASES_WAITS"):
        count_waits(folder)
    bench.train(run, *words, steps=int(steps))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
