"""The fine-tuning API whose jobs train through real SLURM daemons: group 13 of the demands on it."""

from __future__ import annotations

import time

import pytest
from support.cloud_server import Server, job_processes, wait_for
from support.command import metrics, wait_until
from support.tiny import save_decoder, write_dialogues

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900)]
SETTINGS = {"trainer": {"precision": "fp32", "micro_batch_size": 1}, "data": {"workers": 1}, "zero": {"stage": 0}}


def test_a_job_in_a_queue_outlives_the_server_and_its_own_jobs_there(login, slurm, machines, tmp_path):
    """Server and job process killed while SLURM runs it: found again, submitted once. Then `scancel` from outside, which lets
    it save, and every process killed, which does not: each time it is submitted again, and ends with the weights of an
    undisturbed job on this machine."""
    tiny = {
        "path": str(save_decoder(tmp_path / "base")),
        "adaptation": {"name": "lora", "rank": 4},
        "learning_rate": {"supervised": 0.01},
        "max_length": 128,
        "settings": SETTINGS,
    }
    queued = tiny | {"launch": {"name": "slurm", "time": "10"}}
    enter = machines.command("head", [], tmp_path)
    server = Server(tmp_path, {"models": {"tiny": tiny, "queued": queued}}, enter=enter)
    server.env |= login.env | slurm.env | {"DSTUNE_CACHE": str(tmp_path / "cache")}

    def numbers() -> list[str]:
        """Jobs that SLURM got so far."""
        shown = slurm.call("squeue", "-h", "--states=all", "--format=%A %j").splitlines()
        return [number for number, name in map(str.split, shown) if name == job.id]

    def at_step(step: int) -> None:
        run = server.job_folder(job.id) / "run"
        wait_until(lambda: any(row["step"] >= step for row in metrics(run)[-2:]), timeout=240)

    def last_step() -> int:
        return max(row["step"] for row in metrics(server.job_folder(job.id) / "run"))

    with machines.network("head"), server:
        client = server.client(max_retries=5)
        data = client.files.create(file=write_dialogues(tmp_path / "rows.jsonl", 30), purpose="fine-tune").id
        given = {"supervised": {"hyperparameters": {"n_epochs": 40, "batch_size": 1}}, "type": "supervised"}
        job = client.fine_tuning.jobs.create(model="queued", training_file=data, seed=5, method=given)
        at_step(35)
        server.kill()
        for process in job_processes(server.job_folder(job.id)):
            if "dstune.serve.finetuning.jobs.process" in process.cmdline():
                process.kill()
        before = last_step()
        wait_until(lambda: last_step() > before, timeout=60)
        server.start()
        client = server.client(max_retries=5)
        time.sleep(8)  # the next attempt has looked into the queue
        [first] = numbers()

        slurm.call("scancel", first)
        wait_until(lambda: len(numbers()) == 2, timeout=120)
        at_step(last_step() + 35)
        slurm.call("scancel", "--signal=KILL", "--full", numbers()[-1])
        wait_until(lambda: len(numbers()) == 3, timeout=120)

        job = wait_for(client, job.id, "succeeded", seconds=400)
        assert len(numbers()) == 3
        told = [event.data["step"] for event in client.fine_tuning.jobs.list_events(job.id, limit=100) if event.data]
        assert told == list(range(1200, 0, -1))
        local = client.fine_tuning.jobs.create(model="tiny", training_file=data, seed=5, method=given)
        wait_for(client, local.id, "succeeded", seconds=400)
        weights = [
            (server.job_folder(one) / "models" / "step-1200" / "adapter_model.safetensors").read_bytes()
            for one in (job.id, local.id)
        ]
        assert weights[0] == weights[1]
