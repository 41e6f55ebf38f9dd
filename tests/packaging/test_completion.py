"""Completion as real shells do it, from the script that `dstune completion SHELL` prints."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A home without settings, and `dstune` on the path as an installation puts it there."""
    tools = tmp_path / "bin"
    tools.mkdir()
    script = tools / "dstune"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m dstune "$@"\n')
    script.chmod(0o755)
    kept = {"HOME": str(tmp_path), "TERM": "dumb", "PS1": "$ ", "PYTHONPATH": str(ROOT)}
    return kept | {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}


def needs(shell: str) -> str:
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not installed (Debian: apt-get install {shell})")
    return program


class Terminal:
    """A shell in a terminal of its own."""

    def __init__(self, command: list[str], environment: dict[str, str]):
        self._shell, self._screen = pty.fork()
        if self._shell == 0:
            os.chdir(environment["HOME"])
            os.execve(command[0], command, environment)
        self._unread = ""

    def type(self, text: str) -> None:
        os.write(self._screen, text.encode())

    def wait_for(self, text: str, seconds: float = 30.0) -> None:
        """Until the terminal shows `text`, which is then forgotten with what came before."""
        deadline = time.monotonic() + seconds
        while text not in self._unread:
            assert time.monotonic() < deadline, f"waited for {text!r}; the terminal shows {self._unread!r}"
            if select.select([self._screen], [], [], 0.1)[0]:
                self._unread += os.read(self._screen, 4096).decode(errors="replace")
        self._unread = self._unread.split(text, 1)[1]

    def close(self) -> None:
        os.close(self._screen)
        os.waitpid(self._shell, 0)


def interactive(command: list[str], shell: str, environment: dict[str, str]) -> None:
    """A verb, a group, a choice and a key, each finished by one press of the tabulator."""
    terminal = Terminal(command, environment)
    try:
        terminal.type(f'eval "$(dstune completion {shell})"; echo re""ady\n')
        terminal.wait_for("ready")
        for started, finished in (
            ("dstune eva", "luate"),
            ("dstune train exper", "iment="),
            ("dstune train method=lo", "ra"),
            ("dstune train trainer.max_s", "teps="),
        ):
            terminal.type(f"{started}\t")
            terminal.wait_for(started)
            terminal.wait_for(finished)
            terminal.type("\x15")  # Ctrl-U: a new line
    finally:
        terminal.close()


def test_bash(environment: dict[str, str]) -> None:
    interactive([needs("bash"), "--norc", "--noprofile", "-i"], "bash", environment)


def test_zsh(environment: dict[str, str]) -> None:
    interactive([needs("zsh"), "-f", "-i"], "zsh", environment)


def test_fish(environment: dict[str, str]) -> None:
    completions = "; ".join(
        f'complete -C "{line}"' for line in ("dstune eva", "dstune train exper", "dstune train method=lo")
    )
    command = [needs("fish"), "--no-config", "-c", f"dstune completion fish | source; {completions}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert [line.strip() for line in done.stdout.split()] == ["evaluate", "experiment=", "method=lora"], done.stderr
