"""The entry point of a node's container."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

NODE = Path(__file__).parents[2] / "docker" / "node.sh"
PROGRAMS = ("flock", "ssh-keygen", "install", "sshd")


@pytest.mark.parametrize(
    "value",
    ["$(touch {ran})", "a; touch {ran}", "`touch {ran}`", "a\nexport HF_Y=1; touch {ran}", 'it\'s "quoted" $HOME \\'],
)
def test_a_node_runs_nothing_of_its_environment(value: str, tmp_path: Path) -> None:
    """Every login reads what the container was started with."""
    ran, programs, home = tmp_path / "ran", tmp_path / "bin", tmp_path / "home"
    programs.mkdir()
    for name in PROGRAMS:
        (programs / name).write_text("#!/bin/sh\n")
        (programs / name).chmod(0o700)
    script = NODE.read_text()
    for path, own in (("/root", home), ("/keys", tmp_path / "keys"), ("/run/sshd", tmp_path / "run")):
        script = script.replace(path, str(own))
    script = script.replace("/usr/sbin/sshd", "sshd")
    value = value.format(ran=ran)
    names = {"HF_TOKEN": value, "DSTUNE_CACHE": "/a b", "OTHER": "unwanted"}
    environment = {"PATH": f"{programs}:/usr/bin:/bin", **names}
    subprocess.run(["bash", "-c", script], env=environment, check=True)
    login = f'. {shlex.quote(str(home / ".bashrc"))}; printf \'%s\\0\' "$HF_TOKEN" "$DSTUNE_CACHE" "$PATH" "$OTHER"'
    done = subprocess.run(["bash", "-c", login], env={}, capture_output=True, check=True)
    assert done.stdout.decode().split("\0")[:4] == [value, "/a b", environment["PATH"], ""]
    assert not ran.exists()
    assert (home / ".bashrc").stat().st_mode & 0o077 == 0
