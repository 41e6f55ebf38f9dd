"""The official client as programs use it, unmodified, the newest and the last of version 1, and npm's, against jobs that are
stubs: group 1 of the demands on the API."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dstune.finetuning.jobs.tables import Job
from dstune.finetuning.tables import File
from dstune.serve.store.database import Database
from tests.support.dropping import dropping
from tests.support.killing import ROW, stub_server

FLOW = Path(__file__).parents[1] / "support" / "client_flow.py"
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("drops", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("version", ["newest", pytest.param("1.109.1", marks=pytest.mark.slow)])
def test_a_published_recipe_runs_with_two_changed_lines(tmp_path, version, drops):
    """`pip install --target FOLDER openai==1.109.1` beside what is here: it needs another httpx. drops: answers to each POST
    that are lost, so that the client repeats it; everything is made once all the same."""
    tmp_path.chmod(0o700)
    folder = os.environ.get("DSTUNE_OPENAI_1", "")
    if version != "newest" and not (Path(folder) / "openai").is_dir():
        pytest.skip("needs DSTUNE_OPENAI_1=FOLDER after `pip install --target FOLDER openai==1.109.1`")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(ROW * 12)
    env = os.environ | {"PYTHONPATH": folder if version != "newest" else str(ROOT)}
    with stub_server(tmp_path) as (url, key), dropping(url, drops) as (behind, proxy):
        command = [sys.executable, str(FLOW), behind if drops else url, key, str(rows), str(rows)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "good\n"), done.stderr
    assert proxy.dropped >= 5 * drops  # two files, two jobs and what is asked of them
    database = Database.open_folder(tmp_path)
    with database.session() as session:
        assert (session.query(Job).count(), session.query(File).filter(File.purpose == "fine-tune").count()) == (2, 2)
    database.close()


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
