"""The official client as programs use it, unmodified, the newest and the last of version 1, and npm's, against jobs that are
stubs: group 1 of the demands on the API."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.killing import ROW, stub_server

FLOW = Path(__file__).parents[1] / "support" / "client_flow.py"
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("version", ["newest", pytest.param("1.109.1", marks=pytest.mark.slow)])
def test_a_published_recipe_runs_with_two_changed_lines(tmp_path, version):
    """`pip install --target FOLDER openai==1.109.1` beside what is here: it needs another httpx."""
    tmp_path.chmod(0o700)
    folder = os.environ.get("DSTUNE_OPENAI_1", "")
    if version != "newest" and not (Path(folder) / "openai").is_dir():
        pytest.skip("needs DSTUNE_OPENAI_1=FOLDER after `pip install --target FOLDER openai==1.109.1`")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(ROW * 12)
    env = os.environ | {"PYTHONPATH": folder if version != "newest" else str(ROOT)}
    with stub_server(tmp_path) as (url, key):
        command = [sys.executable, str(FLOW), url, key, str(rows), str(rows)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "good\n"), done.stderr


@pytest.mark.slow
def test_npm(tmp_path):
    tmp_path.chmod(0o700)
    folder = os.environ.get("DSTUNE_NPM", "")
    if shutil.which("node") is None or not (Path(folder) / "node_modules" / "openai").is_dir():
        pytest.skip("needs node, and DSTUNE_NPM=FOLDER after `npm install --prefix FOLDER openai`")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(ROW * 12)
    with stub_server(tmp_path) as (url, key):
        command = ["node", str(FLOW.with_name("npm_finetuning.mjs")), folder, url, key, str(rows)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "good\n"), done.stderr
