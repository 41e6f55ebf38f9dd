"""Imports go one way, and what answers on a login node loads nothing heavy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

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
        for folder in ("config", "launch", "planning", "samples", "sweep")
        for path in (ROOT / "dstune" / folder).rglob("*.py")
    ]
    paths += [ROOT / "dstune" / f"{name}.py" for name in ("cli", "errors", "paths", "rank_env")]
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


def test_a_rank_does_not_import_mlflow():
    """DeepSpeed would, wherever it is installed; nothing that a rank imports may bring DeepSpeed in before its start."""
    code = (
        "import sys, dstune.worker\n"
        "assert 'deepspeed' not in sys.modules\n"
        "from dstune.rank_env import RankEnv\n"
        "from dstune.zero.start import start_process_group\n"
        "import os; os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT='0', CUDA_VISIBLE_DEVICES='')\n"
        "start_process_group(RankEnv(0, 1, 0, 1, 'alone'))\n"
        "assert 'deepspeed' in sys.modules and 'mlflow' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
