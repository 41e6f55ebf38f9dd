"""The one file, in environments without dstune."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def one_file(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("build") / "dstune-verify.pyz"
    subprocess.run([sys.executable, ROOT / "tools" / "build_verify.py", target], check=True)
    return target


def test_it_is_the_same_for_the_same_sources(one_file, tmp_path):
    subprocess.run([sys.executable, ROOT / "tools" / "build_verify.py", tmp_path / "again.pyz"], check=True)
    assert (tmp_path / "again.pyz").read_bytes() == one_file.read_bytes()


def test_it_needs_torch_alone(one_file, tmp_path):
    """Without DeepSpeed, transformers and dstune: modules that cannot be imported and are not there."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util, sys\n"
        "really = importlib.util.find_spec\n"
        "ABSENT = ('deepspeed', 'transformers', 'peft', 'dstune', 'hydra', 'numpy')\n"
        "importlib.util.find_spec = lambda name, package=None: None if name in ABSENT else really(name, package)\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ABSENT:\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
    )
    done = subprocess.run(
        [sys.executable, one_file, "--cases", "fsdp2-fp32-acc,packages,zero2-fp32-acc,golden", "--ranks", "2"],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "DeepSpeed is not installed" in done.stdout
    assert "6 cases: 3 right, 3 not run" in done.stdout


def test_every_module_is_in_it(one_file):
    import zipfile

    names = set(zipfile.ZipFile(one_file).namelist())
    assert names == {"__main__.py", *(f"dstune_verify/{path.name}" for path in (ROOT / "dstune_verify").glob("*.py"))}
