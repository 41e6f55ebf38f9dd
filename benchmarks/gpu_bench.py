"""Where the cases of `gpu_report.py` run: models and rows of any size made from seeds, runs in processes of their own, timed
operations, and rows of figures that are on disk as soon as they are known."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RUN = Path(__file__).with_name("gpu_run.py")

ONE_AND_A_HALF = {
    "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
    "num_key_value_heads": 2, "vocab_size": 151936,
}  # fmt: skip
EIGHT = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip
TOKENS_OF_A_DIALOGUE = 25
"""At least, on the average of many (`write_dialogues`)."""


def install_simulated_device() -> None:
    from tests.placement import simulated_device

    simulated_device.install()


class Failed(Exception):
    """A run ended with an error: its last lines."""


class Bench:
    """A case's folder and device, and what it has measured so far."""

    def __init__(self, folder: Path, *, simulate: bool):
        self.folder, self.simulate, self.rows = folder, simulate, list[dict[str, Any]]()
        if simulate:
            install_simulated_device()
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

    # -- operations ---------------------------------------------------------------------------------------------------

    def milliseconds(self, action: Callable[[], object]) -> float:
        """Return median of several calls, after two that are not timed."""
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
        bytes_before = module.memory_allocated()
        action()
        self.accelerator.synchronize()
        return float(module.max_memory_allocated() - bytes_before) / 2**30

    # -- models and rows ----------------------------------------------------------------------------------------------

    def tiny_model(self) -> Path:
        from tests.support.tiny import save_decoder

        folder = self.folder / "model"
        return folder if folder.exists() else save_decoder(folder)

    def shape(self, name: str, **values: int) -> Path:
        """Return a folder with a `config.json` of this shape, without weights; the tokenizer is the tiny one's."""
        folder = self.folder / name
        if not folder.exists():
            model = self.tiny_model()
            folder.mkdir()
            for file in model.iterdir():
                if file.suffix != ".safetensors":
                    (folder / file.name).write_bytes(file.read_bytes())
            config = json.loads((folder / "config.json").read_text())
            small = {key: value for key, value in values.items() if key.startswith("num_") and "layers" not in key}
            sizes = small | {"hidden_size": 16 * small["num_attention_heads"]} if self.simulate else values
            (folder / "config.json").write_text(json.dumps(config | sizes | {"max_position_embeddings": 8192}))
        return folder

    def weights(self, folder: Path) -> Path:
        """Write random weights beside the `config.json` in `folder`, drawn on the device: a CPU draws 8B of them for a minute or
        more."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        if not list(folder.glob("*.safetensors")):
            with torch.device("cpu" if self.simulate else self.device):
                config = AutoConfig.from_pretrained(folder)
                model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            model.save_pretrained(folder)
            del model
            self.accelerator.module().empty_cache()
        return folder

    def dialogues(self, count: int) -> Path:
        from tests.support.tiny import write_dialogues

        file = self.folder / f"dialogues-{count}.jsonl"
        return file if file.exists() else write_dialogues(file, count)

    def packed(self, shape: dict[str, int], name: str, *, steps: int, rows: int, micro: int | str = 2) -> list[str]:
        """Return the words of a run of `steps` steps of as many rows of 4k, packed, so that no step has fewer."""
        length = self.size(4096, 64)
        return [
            *(f"model.path={self.weights(self.shape(name, **shape))}", f"data.train={self.long_rows(steps, rows)}"),
            *(f"data.max_length={length}", "data.packing=true", "data.split.validation=0"),
            *("trainer.precision=bf16", "trainer.activation_checkpointing=true", f"trainer.max_steps={steps}"),
            *(f"trainer.micro_batch_size={micro}", f"trainer.global_batch_size={rows}"),
            *("checkpoint.every=1000", "checkpoint.weights_only=true"),  # optimizer states of 1.5B take 18 GB
        ]

    def long_rows(self, steps: int, rows: int) -> Path:
        """Write dialogues that fill so many steps of packed rows of 4k, and one more."""
        return self.dialogues((steps + 1) * rows * self.size(4096, 64) // TOKENS_OF_A_DIALOGUE)

    # -- runs ---------------------------------------------------------------------------------------------------------

    def run(self, name: str, *words: str, on_cpu: bool = False) -> dict[str, Any]:
        """Run one rank in a process of its own; returns what the files of its run say. Raises Failed."""
        flags = ["--simulate"] * (self.simulate and not on_cpu) + ["--cpu"] * on_cpu
        own_keys = {word.partition("=")[0] for word in words}
        common = ["data=files", "launch.processes=1", "run.export=none", "data.max_length=64", "trainer.epochs=100"]
        common += ["trainer.max_steps=4", "trainer.micro_batch_size=2", "trainer.global_batch_size=4"]
        common += ["evaluate.at_start=false", "checkpoint.every=4"]
        if "data.train" not in own_keys:
            common.append(f"data.train={self.dialogues(self.size(400, 60))}")
        overrides = [word for word in common if word.partition("=")[0] not in own_keys] + list(words)
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
        if on_cpu:
            env |= {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        command = [sys.executable, str(RUN), str(self.folder / name), *flags, *overrides]
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        if done.returncode:
            raise Failed("\n".join((done.stdout + done.stderr).splitlines()[-8:]))
        return result(self.folder / name)

    def run_and_report(self, name: str, *words: str) -> dict[str, Any]:
        """Call `run`, and add a row with its figures or with the reason of its failure. Returns the result of `run`; empty if it
        failed."""
        try:
            result = self.run(name, *words)
        except Failed as error:
            self.row(run=name, failed=str(error)[-1500:])
            return {}
        first, last = result["losses"][0], result["losses"][-1]
        figures = {key: result[key] for key in ("tokens_per_second", "peak_gib", "attention", "utilization")}
        self.row(run=name, loss=f"{first:.4f} -> {last:.4f}", **figures)
        return result


def result(folder: Path) -> dict[str, Any]:
    """Return what the files of a run say."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "loss" in row]
    ended = json.loads((folder / "result.json").read_text())
    kernels = json.loads((folder / "environment.json").read_text())["kernels"]
    return {
        "losses": [row["loss"] for row in rows],
        "norms": [row["grad_norm"] for row in rows],
        "tokens_per_second": ended["tokens_per_second"],
        "peak_gib": ended["peak_memory_gib"],
        "attention": kernels["attention"],
        "utilization": ended.get("utilization"),  # only of a device whose peak is known
    }


CASES: dict[str, Callable[[Bench], None]] = {}
"""By name, from the modules that `gpu_cases.py` imports."""


def case(function: Callable[[Bench], None]) -> Callable[[Bench], None]:
    CASES[function.__name__] = function
    return function
