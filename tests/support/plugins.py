"""Plugins of tests: the optimizer of the examples, as a file or as an installed package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from dstune.config.compose import compose
from dstune.config.documentation import documentation
from dstune.core import plugins
from dstune.core.errors import UserError
from dstune.protocols import OPTIMIZERS

ROOT = Path(__file__).parents[2]
SIGNUM = ROOT / "examples" / "plugins" / "signum.py"


def folder_of_plugins(tmp_path, monkeypatch):
    """Enter the working directory of a test, without plugins before and after it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(plugins.VARIABLE, raising=False)
    yield tmp_path
    plugins.activate([])
    assert "signum" not in OPTIMIZERS
    assert "optimizer=signum" not in {setting.group for setting in documentation()}


def copy(target: str = "signum.py", old: str = "", new: str = "") -> Path:
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    Path(target).write_text(SIGNUM.read_text().replace(old, new) if old else SIGNUM.read_text())
    return Path(target)


def problems(*overrides: str) -> list[tuple[str, str, str]]:
    with pytest.raises(UserError) as error:
        compose(["data=chitchat", *overrides])
    return [(problem.where, problem.reason, problem.fix) for problem in error.value.problems]


# ---- installed packages ----


def install(folder: Path, version: str, old: str = "", new: str = "") -> None:
    """Install `mysignum`, a package with an entry point."""
    site = folder / "site"
    shutil.rmtree(site, ignore_errors=True)
    copy(str(site / "mysignum" / "__init__.py"), old, new)
    info = site / f"mysignum-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: mysignum\nVersion: {version}\n")
    (info / "entry_points.txt").write_text("[dstune.plugins]\nsignum = mysignum\n")


def in_a_process(folder: Path, program: str) -> str:
    """Return what `program` prints where `install` is in effect, in a process of its own: packages are looked for once."""
    env = os.environ | {"PYTHONPATH": f"{folder / 'site'}{os.pathsep}{ROOT}"}
    imports = "from dstune.config.compose import compose\nfrom dstune.config.run_file import read_run, write_run\n"
    start = imports + textwrap.dedent(program)
    done = subprocess.run([sys.executable, "-c", start], capture_output=True, text=True, env=env, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout
