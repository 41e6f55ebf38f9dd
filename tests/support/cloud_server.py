"""`dstune serve` with the fine-tuning API as a process that a test may kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import openai
import psutil

from support import warm_start
from tests.support.command import clean_environment

MODULES = ("dstune.finetuning.jobs.process", "dstune.finetuning.jobs.export", "dstune.worker")


class Server:
    """serves: words of `dstune serve` that name models; none for the API alone. enter: what goes before its command line."""

    def __init__(self, folder: Path, presets: dict[str, Any], *serves: str, enter: Sequence[str] = ()):
        self.folder, self.state, self._serves, self._enter = folder, folder / "serving", serves, enter
        self.state.mkdir(mode=0o700, exist_ok=True)
        self.presets = folder / "models.yaml"
        self.presets.write_text(json.dumps(presets))
        self.process: subprocess.Popen[str] | None = None
        self.url = ""
        self.port = 0
        self.env = clean_environment(folder)

    def start(self) -> None:
        words = (*self._serves, "--fine-tuning") if self._serves else ("--no-inference",)
        command = [
            *self._enter,
            sys.executable,
            "-m",
            "dstune",
            "serve",
            *words,
            "--port",
            str(self.port),
            "--presets",
            str(self.presets),
        ]
        log = (self.folder / "server.log").open("a")
        self.process = warm_start.Popen(
            [*command, "--state", str(self.state)], cwd=self.folder, env=self.env, stdout=subprocess.PIPE, stderr=log,
            text=True, start_new_session=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("http://"):
                self.url = line.split()[0]
                self.port = int(self.url.rsplit(":", 1)[1].split("/")[0])
                return
        raise AssertionError((self.folder / "server.log").read_text()[-4000:])

    def kill(self) -> None:
        """Kill the server and all of its session, as a service manager does it to a control group; jobs have sessions of their
        own."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            if self._enter:  # what runs the server passes no signal on
                os.killpg(self.process.pid, signal.SIGTERM)
            else:
                self.process.send_signal(signal.SIGTERM)
            self.process.wait(timeout=60)

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self.stop()
        finally:
            for process in job_processes(self.state):
                process.kill()

    def client(self, **options: Any) -> openai.OpenAI:
        key = (self.state / "admin-key").read_text().strip()
        return openai.OpenAI(base_url=self.url, api_key=key, **{"max_retries": 0, **options})

    def job_folder(self, job: str) -> Path:
        return self.state / "finetuning" / "jobs" / job


def job_processes(state: Path) -> list[psutil.Process]:
    """Return processes of jobs, and of their trainings."""
    processes = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if any(word in words for word in (*MODULES, "train")) and any(str(state) in word for word in words):
            processes.append(process)
    return processes


def wait_for(client: openai.OpenAI, job: str, *states: str, seconds: float = 1500.0) -> Any:
    """Return the job when it is in one of these states. Fails where it comes to another end."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        state = client.fine_tuning.jobs.retrieve(job)
        if state.status in states:
            return state
        if state.status in ("failed", "cancelled", "succeeded"):
            raise AssertionError(f"{job} is {state.status}: {state.error}")
        time.sleep(0.2)
    raise AssertionError(f"{job} is {state.status} after {seconds} s")
