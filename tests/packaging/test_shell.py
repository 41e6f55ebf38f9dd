"""Shell scripts pass shellcheck, and continuous integration fails where it must."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def shell_scripts() -> list[str]:
    listed = subprocess.run([ROOT / ".ci" / "shell-scripts"], capture_output=True, text=True, check=True)
    return listed.stdout.split()


def test_the_scripts_are_found() -> None:
    assert {".ci/run", ".ci/debian-packages"} <= set(shell_scripts())
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "launch").glob("*.s[hb]*")} <= set(shell_scripts())


@pytest.mark.parametrize("script", shell_scripts())
def test_shellcheck(script: str) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed (Debian: apt-get install shellcheck)")
    done = subprocess.run(["shellcheck", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("lint", "test", "expected"),
    [(0, 0, 0), (1, 0, 1), (0, 2, 1), (0, 5, 1)],
    ids=["clean", "lint", "failed", "none ran"],
)
def test_ci_run_fails_when_lint_or_tests_do(tmp_path: Path, lint: int, test: int, expected: int) -> None:
    """`.ci/run` in a copy whose tools only exit: 5 is pytest's status when it collects no test."""
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "pyproject.toml").touch()
    tools = tmp_path / ".venv" / "bin"
    tools.mkdir(parents=True)
    for name, status in {"python": test, "ruff": lint, "mypy": 0, "lint-imports": 0, "hadolint": 0}.items():
        (tools / name).write_text(f"#!/bin/sh\nexit {status}\n")
        (tools / name).chmod(0o755)
    for stamp in (".installed", ".installed-test", ".installed-dev"):
        (tmp_path / ".venv" / stamp).touch()
    (tmp_path / ".ci" / "shell-scripts").write_text("#!/bin/sh\necho .ci/run\n")
    (tmp_path / ".ci" / "debian-packages").write_text("#!/bin/sh\n")
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    done = subprocess.run([tmp_path / ".ci" / "run"], env=environment, capture_output=True, text=True)
    assert (done.returncode != 0) == bool(expected), done.stdout + done.stderr


def test_clean_removes_one_environment_whatever_its_name(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("a", "b", "a b"):
        (tmp_path / name).mkdir()
    subprocess.run(["make", "clean", "VENV=a b"], cwd=tmp_path, capture_output=True, check=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Makefile", "a", "b"]
