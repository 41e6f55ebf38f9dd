"""The fine-tuning API whose jobs train through real SLURM daemons: group 13 of the demands on it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cluster.slurm import Slurm
from support.cloud_server import Server, job_processes, wait_for
from support.command import metrics, wait_until
from support.tiny import save_decoder, write_dialogues

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900)]
SETTINGS = {"trainer": {"precision": "fp32", "micro_batch_size": 1}, "data": {"workers": 1}, "zero": {"stage": 0}}
ROWS = 60


class Cloud:
    """A server on the cluster's login node, with a model whose jobs SLURM runs and one whose jobs run there."""

    def __init__(self, server: Server, slurm: Slurm, folder: Path):
        self.server, self._slurm, self.client = server, slurm, server.client(max_retries=5)
        data = write_dialogues(folder / "rows.jsonl", ROWS)
        self._data = self.client.files.create(file=data, purpose="fine-tune").id
        self._submitted: dict[str, None] = {}

    def create(self, model: str, epochs: int) -> str:
        method: Any = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": epochs, "batch_size": 1}}}
        job = self.client.fine_tuning.jobs.create(model=model, training_file=self._data, seed=5, method=method)
        return job.id

    def submitted(self, job: str) -> list[str]:
        """What SLURM got so far; it forgets jobs that are over."""
        shown = self._slurm.call("squeue", "-h", "--states=all", "--format=%A %j").splitlines()
        self._submitted.update((number, None) for number, name in map(str.split, shown) if name == job)
        return list(self._submitted)

    def step(self, job: str) -> int:
        return max((row["step"] for row in metrics(self.server.job_folder(job) / "run")), default=0)

    def trains_on(self, job: str, steps: int) -> None:
        first = self.step(job)
        wait_until(lambda: self.step(job) >= first + steps, timeout=240)

    def succeeded(self, job: str, epochs: int) -> bytes:
        """Its weights, when it has, and told each step once."""
        wait_for(self.client, job, "succeeded", seconds=400)
        events = self.client.fine_tuning.jobs.list_events(job, limit=100)
        assert [event.data["step"] for event in events if event.data] == list(range(epochs * ROWS, 0, -1))
        folder = self.server.job_folder(job) / "models" / f"step-{epochs * ROWS}"
        return (folder / "adapter_model.safetensors").read_bytes()


@contextmanager
def cloud(login, slurm, machines, folder: Path, **launch: Any) -> Iterator[Cloud]:
    tiny = {
        "path": str(save_decoder(folder / "base")),
        "adaptation": {"name": "lora", "rank": 4},
        "learning_rate": {"supervised": 0.01},
        "max_length": 128,
        "settings": SETTINGS,
    }
    queued = tiny | {"launch": {"name": "slurm", "time": "10", **launch}}
    server = Server(folder, {"models": {"tiny": tiny, "queued": queued}}, enter=machines.command("head", [], folder))
    server.env |= login.env | slurm.env | {"DSTUNE_CACHE": str(folder / "cache")}
    with machines.network("head"), server:
        yield Cloud(server, slurm, folder)


def test_a_job_in_a_queue_outlives_the_server_and_its_own_jobs_there(login, slurm, machines, tmp_path):
    """Server and job process killed while SLURM runs it: found again, submitted once. Then `scancel` from outside, twice: each
    time it is submitted again, and ends with the weights of an undisturbed job on this machine."""
    with cloud(login, slurm, machines, tmp_path) as api:
        job = api.create("queued", 25)
        api.trains_on(job, 35)
        api.server.kill()
        for process in job_processes(api.server.job_folder(job)):
            if "dstune.finetuning.jobs.process" in process.cmdline():
                process.kill()
        api.trains_on(job, 1)
        api.server.start()
        time.sleep(8)  # the next attempt has looked into the queue
        assert len(api.submitted(job)) == 1
        for times in (2, 3):
            slurm.call("scancel", api.submitted(job)[-1])
            wait_until(lambda expected=times: len(api.submitted(job)) == expected, timeout=120)
            api.trains_on(job, 35)
        weights = api.succeeded(job, 25)
        assert len(api.submitted(job)) == 3
        assert weights == api.succeeded(api.create("tiny", 25), 25)


@pytest.mark.parametrize(("requeue", "submissions"), [(False, 2), (True, 1)])
def test_a_job_whose_node_is_gone_goes_on_elsewhere(login, slurm, machines, tmp_path, requeue, submissions):
    """Where SLURM does not requeue it, nothing says how it ended, and it is submitted again; where it does, that is enough."""
    with cloud(login, slurm, machines, tmp_path, requeue=requeue) as api:
        job = api.create("queued", 5)
        api.trains_on(job, 70)
        node = slurm.call("squeue", "-h", f"--jobs={api.submitted(job)[-1]}", "--format=%N").strip()
        machines.kill(node)
        try:
            wait_until(lambda: len(api.submitted(job)) == submissions, timeout=240)
            api.succeeded(job, 5)
            assert len(api.submitted(job)) == submissions
        finally:
            machines.start(node)
            slurm.start_node(node)
            slurm.wait_until_ready()
