"""Imports go one way, and what answers on a login node loads nothing heavy."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.tiny import save_decoder

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "deepspeed", "datasets", "peft", "wandb", "sklearn", "pandas")


def test_import_contracts() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def light_modules() -> list[str]:
    """Every module that the launching process may import: all of these folders, and the files beside them."""
    paths = [
        path
        for folder in ("cli", "config", "launch", "planning", "samples", "sweep")
        for path in (ROOT / "dstune" / folder).rglob("*.py")
    ]
    paths += [ROOT / "dstune" / f"{name}.py" for name in ("core/errors", "core/paths", "core/rank_env")]
    names = (".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths if path.name != "__main__.py")
    return sorted(name.removesuffix(".__init__") for name in names)


LIGHT = """
import importlib, json, sys
modules, heavy = json.loads(sys.argv[1])
loaded = {}
for module in modules:
    importlib.import_module(module)
    for name in heavy:
        if name in sys.modules:
            loaded.setdefault(name, module)
print(json.dumps(loaded))
"""


def test_light_modules_load_nothing_heavy() -> None:
    """One after another in one interpreter: what is not there after all of them, none of them has loaded."""
    argument = json.dumps([light_modules(), HEAVY])
    done = subprocess.run([sys.executable, "-c", LIGHT, argument], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {}, "the first module after whose import each of these is there"


TRAIN_ALONE = """
import json, os, sys
from pathlib import Path
from dstune.rank import worker
from dstune.config.compose import compose
from dstune.config.run_file import write_run
from dstune.core.rank_env import RankEnv
from dstune.zero.start import start_process_group

composed, run_dir = compose(sys.argv[2:]), Path(sys.argv[1])
run_dir.mkdir()
write_run(run_dir / "run.yaml", composed)
assert "deepspeed" not in sys.modules, "nothing that a rank imports may bring it in before its start"
worker.train(composed.config, run_dir, start_process_group(RankEnv(0, 1, 0, 1, "alone")))
assert "deepspeed" in sys.modules and "mlflow" not in sys.modules, "DeepSpeed would import it, wherever it is installed"
assert "peft" in sys.modules and "torch._inductor.compile_fx" not in sys.modules, "bitsandbytes would import the compiler"
print(json.dumps([name for name in sys.modules if name.startswith(("dstune.tasks.", "dstune.methods."))]))
sys.stdout.flush()
os._exit(0)  # DeepSpeed's threads need not be waited for
"""
LIGHT_IN_A_ROOM = ("config", "rules", "rows")
"""Modules of a room that every process may load; the others belong to runs of its task or method alone."""


def test_a_run_loads_nothing_heavy_that_it_does_not_use(tmp_path):
    """Neither of other rooms, nor MLflow."""
    model = save_decoder(tmp_path / "model")
    rows = [{"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]}] * 8
    train = tmp_path / "rows.jsonl"
    train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ["task=chat", "method=lora", f"model.path={model}", f"data.train={train}", "data.max_length=32"]
    settings += [
        "data.packing=false",
        "data.split.validation=0.25",
        "data.clean.duplicates=keep",
        "trainer.max_steps=1",
    ]
    settings += ["trainer.global_batch_size=2", "trainer.micro_batch_size=2", "zero.stage=0"]
    command = [sys.executable, "-c", TRAIN_ALONE, str(tmp_path / "run"), *settings]
    variables = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stderr[-3000:]
    loaded = [name.split(".")[1:] for name in json.loads(done.stdout.splitlines()[-1])]
    assert ["tasks", "classification"] in loaded, "rooms themselves are loaded, so the test looks at the right names"
    heavy = [parts for parts in loaded if len(parts) > 2 and parts[-1] not in LIGHT_IN_A_ROOM]
    shared = [parts for parts in heavy if parts[1].startswith("_")]  # bases of several rooms: adapters of peft
    assert [parts for parts in heavy if parts not in shared and parts[1] not in ("chat", "lora")] == []


ROUNDING = """
import sys, torch
from dstune.methods.qlora.quantize import rounding
rounding(torch.float32, double=True)
import bitsandbytes
sys.exit("torch._inductor.compile_fx" in sys.modules)
"""


@pytest.mark.ci
def test_four_bits_do_not_bring_the_compiler():
    assert subprocess.run([sys.executable, "-c", ROUNDING], cwd=ROOT).returncode == 0


def test_what_scripts_import_of_dstune_is_there():
    """Those of `benchmarks/` import within functions, and no other test runs them."""
    missing = []
    scripts = [file for folder in ("benchmarks", "tools", "examples", "docs") for file in (ROOT / folder).rglob("*.py")]
    for script in scripts:
        for node in ast.walk(ast.parse(script.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "dstune":
                module = importlib.import_module(node.module)
                place, inside = f"{script.relative_to(ROOT)}:{node.lineno}: {node.module}", hasattr(module, "__path__")
                missing += [
                    f"{place} has no {alias.name}"
                    for alias in node.names
                    if not hasattr(module, alias.name)
                    and not (inside and importlib.util.find_spec(f"{node.module}.{alias.name}"))
                ]
    assert len(scripts) > 50 and missing == []
