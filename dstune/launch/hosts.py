"""Asks other machines over ssh for their software and hardware, and checks that they can run ranks together."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dstune
from dstune.core.child_python import SAFE_PATH
from dstune.core.errors import Problem
from dstune.core.parsing import parse_json

PACKAGES = ("torch", "deepspeed", "transformers", "peft", "datasets", "tokenizers", "numpy")
CONNECT_SECONDS = 10
ANSWER_SECONDS = 60
SKEW_SECONDS = 5.0
"""Largest difference of clocks without a warning; a larger one makes time-outs and times of files confusing."""


@dataclass(frozen=True)
class Ssh:
    """User and port with which ssh reaches all hosts."""

    user: str | None = None
    port: int | None = None

    def options(self) -> list[str]:
        """Return options with which ssh asks no questions and gives up a silent host after 15 s."""
        settings = {
            "BatchMode": "yes",
            "ConnectTimeout": CONNECT_SECONDS,
            "ServerAliveInterval": 5,
            "ServerAliveCountMax": 3,
        }
        words = [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]
        words += ["-p", str(self.port)] if self.port else []
        return words + (["-l", self.user] if self.user else [])

    def command(self, host: str, words: Sequence[str]) -> list[str]:
        return ["ssh", *self.options(), "--", host, shlex.join(words)]


@dataclass(frozen=True)
class Answer:
    """The facts that a host reported (`probe.py`), or why it did not."""

    host: str
    facts: Mapping[str, Any] | None
    seconds: float
    """Time from the question to the answer."""
    skew: float
    """Clock of the host minus this machine's, in seconds; accurate to half of `seconds`."""
    problem: str = ""
    fix: str = ""


def ask(hosts: Sequence[str], ssh: Ssh, paths: Sequence[str], folders: Sequence[str] = ()) -> list[Answer]:
    """Ask all hosts at the same time; return their answers in the order of `hosts`. paths: files and folders to compare. folders:
    if there are any, the answers also have what `node_health.judge` judges, with the mounts of these folders."""
    with ThreadPoolExecutor(max_workers=min(32, len(hosts))) as pool:
        return list(pool.map(lambda host: _ask(host, ssh, paths, folders), hosts))


def here(paths: Sequence[str]) -> dict[str, Any]:
    """Return the facts of this machine that hosts are compared with."""
    variables = {"DSTUNE_PROBE": _question(paths), **SAFE_PATH}
    done = subprocess.run([sys.executable, "-"], input=_probe(), capture_output=True, text=True, env=variables)
    return _facts(done.stdout) or {}


def _ask(host: str, ssh: Ssh, paths: Sequence[str], folders: Sequence[str]) -> Answer:
    words = ["env", f"DSTUNE_PROBE={_question(paths, folders)}", sys.executable, "-"]
    began = time.time()
    try:
        done = subprocess.run(
            ssh.command(host, words), input=_probe(), capture_output=True, text=True, timeout=ANSWER_SECONDS
        )
    except FileNotFoundError:
        return Answer(host, None, 0.0, 0.0, "there is no ssh on this machine", "install openssh-client")
    except subprocess.TimeoutExpired:
        reason = f"it accepted the connection but did not answer for {ANSWER_SECONDS} s"
        return Answer(host, None, ANSWER_SECONDS, 0.0, reason, f"log in and look at it: ssh {host}")
    ended = time.time()
    facts = _facts(done.stdout)
    if facts is not None:
        return Answer(host, facts, ended - began, float(facts["time"]) - (began + ended) / 2)
    reason, fix = explain(host, done.returncode, done.stderr)
    return Answer(host, None, ended - began, 0.0, reason, fix)


def explain(host: str, code: int, stderr: str) -> tuple[str, str]:
    """Return (reason, fix) for a failure of ssh or of the remote shell. code: exit code of ssh."""
    text = stderr.lower()
    last = next((line.strip() for line in reversed(stderr.splitlines()) if line.strip()), f"exit code {code}")
    if "could not resolve" in text or "name or service not known" in text:
        return "no machine has this name", "fix the name in the hostfile, or /etc/hosts"
    if "permission denied" in text and code == 255:
        return (
            f"it refuses the key ({last})",
            f"ssh-copy-id {host}, or launch.user=NAME; ssh {host} must work without a question",
        )
    if "host key verification failed" in text:
        return "its host key is unknown or has changed", f"ssh {host} once, and look at what it says"
    if any(words in text for words in ("no route to host", "timed out", "connection refused", "unreachable")):
        return (
            f"it does not answer ({last})",
            f"is it up, and is sshd there on that port (launch.port)? Else launch.exclude={host}",
        )
    if code in (126, 127):
        return f"it has no {sys.executable}", "install the same environment at the same place on every node"
    return last, f"try it: ssh {host} {sys.executable} --version"


def compare(answers: Sequence[Answer], paths: Sequence[str]) -> list[Problem]:
    """Return everything that prevents the hosts from running one program together: no answer, other versions, other files."""
    problems = [
        Problem("launch.hostfile", answer.problem, answer.fix, answer.host)
        for answer in answers
        if answer.facts is None
    ]
    answers_with_facts = [answer for answer in answers if answer.facts is not None]
    local_facts = here(paths)
    problems += _version_problems(answers_with_facts, local_facts)
    for path in paths:
        for answer in answers_with_facts:
            assert answer.facts is not None
            remote_digest, local_digest = answer.facts["files"].get(path), local_facts["files"].get(path)
            if remote_digest == local_digest:
                continue
            difference = "does not exist there" if remote_digest is None else "differs from the one on this machine"
            fix = "use a file system that all nodes share, or copy the same files to every node"
            problems.append(Problem("launch.hostfile", f"{path} {difference}", fix, answer.host))
    return problems


def _version_problems(answers: Sequence[Answer], local_facts: Mapping[str, Any]) -> list[Problem]:
    problems = []
    for answer in answers:
        assert answer.facts is not None
        pairs = {"Python": (answer.facts["python"], local_facts["python"])}
        pairs |= {name: (answer.facts["packages"].get(name), local_facts["packages"].get(name)) for name in PACKAGES}
        differing = [
            f"{name} {remote_version or 'is missing'} (here {local_version})"
            for name, (remote_version, local_version) in pairs.items()
            if remote_version != local_version
        ]
        if differing:
            fix = "install the same environment on every node"
            reason = f"its versions differ: {', '.join(differing)}"
            problems.append(Problem("launch.hostfile", reason, fix, answer.host))
    return problems


def package_folder() -> str:
    return str(Path(dstune.__file__).absolute().parent)


def check_shared_folder(hosts: Sequence[str], ssh: Ssh, folder: Path) -> list[Problem]:
    """Check that all hosts share `folder`, by writing a marker file and looking for it over ssh."""
    mark = folder / f".seen-{uuid.uuid4().hex}"
    mark.touch()
    try:

        def look(host: str) -> Problem | None:
            words = ssh.command(host, ["test", "-e", str(mark.absolute())])
            try:
                done = subprocess.run(words, capture_output=True, timeout=ANSWER_SECONDS)
            except subprocess.TimeoutExpired:
                reason = f"{folder.absolute()} does not answer there within {ANSWER_SECONDS} s"
                return Problem("run.dir", reason, f"look at its file system: ssh {host} ls {folder.absolute()}", host)
            if done.returncode == 0:
                return None
            reason = f"this host does not share {folder.absolute()}, into which all ranks write checkpoints and logs"
            return Problem("run.dir", reason, "give a run.dir on a file system that all nodes share", host)

        with ThreadPoolExecutor(max_workers=min(32, len(hosts))) as pool:
            return [problem for problem in pool.map(look, hosts) if problem]
    finally:
        mark.unlink(missing_ok=True)


def common_skew(answers: Sequence[Answer]) -> dict[str, float]:
    """Return the seconds by which a host's clock is off, where that exceeds `SKEW_SECONDS` and the error of measurement."""
    return {
        answer.host: answer.skew
        for answer in answers
        if answer.facts is not None and abs(answer.skew) > max(SKEW_SECONDS, answer.seconds / 2)
    }


def _probe() -> str:
    return (Path(__file__).parent / "probe.py").read_text()


def _question(paths: Sequence[str], folders: Sequence[str] = ()) -> str:
    return json.dumps({"packages": PACKAGES, "paths": list(paths), "folders": list(folders)})


def _facts(output: str) -> dict[str, Any] | None:
    """Return the facts that the probe printed, ignoring lines that login scripts print; None if there are none."""
    for line in output.splitlines():
        if line.startswith("DSTUNE_PROBE "):
            try:
                facts = parse_json(line.removeprefix("DSTUNE_PROBE "))
            except ValueError:
                continue
            if isinstance(facts, dict):
                return facts
    return None
