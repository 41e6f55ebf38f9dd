"""The fine-tuning API whose jobs do what a test says: no process is started."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai

from dstune.finetuning.jobs.build import Parts
from dstune.finetuning.jobs.check import inconsistencies
from dstune.finetuning.jobs.device_queue import Machine
from dstune.finetuning.jobs.folder import JobFolder, write
from tests.support.finetuning import Cloud, cloud
from tests.support.jobs import StubLauncher, StubPlans

ROWS = 12
ROW = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}) + "\n"
PRESETS = {
    "models": {
        "tiny": {"path": "base", "learning_rate": {"supervised": 0.001}},
        "other": {"path": "b", "methods": ["dpo"]},
    }
}


@dataclass
class Office:
    """A cloud whose jobs do what a test says."""

    cloud: Cloud
    launcher: StubLauncher
    plans: StubPlans

    async def file(self, client: openai.AsyncOpenAI, rows: int = ROWS) -> str:
        """Upload a training file; returns its id."""
        return (await client.files.create(file=("rows.jsonl", (ROW * rows).encode()), purpose="fine-tune")).id

    async def create(self, client: openai.AsyncOpenAI, **fields: Any) -> Any:
        training = fields.pop("training_file", None) or await self.file(client)
        return await client.fine_tuning.jobs.create(**{"model": "tiny", "training_file": training, **fields})

    def folder(self, job: str) -> JobFolder:
        return JobFolder.of(self.cloud.api.folder / "jobs", job)

    async def reach(self, client: openai.AsyncOpenAI, job: str, *states: str) -> Any:
        """Wait until the job is in one of `states`; returns the job."""
        for _ in range(600):
            state = await client.fine_tuning.jobs.retrieve(job)
            if state.status in states:
                return state
            await asyncio.sleep(0.02)
        raise AssertionError(f"{job} is {state.status}, not {states}")

    def train(self, job: str, last: int) -> None:
        """Write the metrics of a training up to step `last`."""
        run = self.folder(job).run
        run.mkdir(exist_ok=True)
        lines = [
            json.dumps({"step": step, "epoch": step / 4, "loss": 1 / step, "tokens": 10 * step, "step_seconds": 0.5})
            for step in range(1, last + 1)
        ]
        (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")

    def finish(self, job: str, code: int = 0, exports: tuple[int, ...] = (4, 8)) -> None:
        """Let the job's training process end with `code`. exports: steps of the models that it has made."""
        folder = self.folder(job)
        for step in exports:
            (folder.models / f"step-{step}").mkdir(parents=True, exist_ok=True)
        attempt = max(
            task["attempt"] for name, task in self.launcher.started if name == job and task["phase"] == "train"
        )
        write(folder.ended, {"attempt": attempt, "code": code, "problems": [], "tokens": 80})
        self.launcher.alive.discard(job)

    async def succeeded(self, client: openai.AsyncOpenAI, **fields: Any) -> Any:
        """Create a job and let it train to its end; returns the job."""
        job = await self.create(client, hyperparameters={"n_epochs": 2, "batch_size": 3}, **fields)
        await self.reach(client, job.id, "running")
        self.train(job.id, 8)
        self.finish(job.id)
        return await self.reach(client, job.id, "succeeded")


@asynccontextmanager
async def office(folder: Path, devices: int = 2, **settings: Any) -> AsyncIterator[Office]:
    """Yield an office. settings: options of the fine-tuning API."""
    folder.mkdir(exist_ok=True)
    presets = folder / "models.yaml"
    presets.write_text(json.dumps(PRESETS))
    launcher, plans = StubLauncher(), StubPlans()
    parts = Parts(presets, launcher=launcher, planner=plans, machine=Machine(devices))
    async with cloud(folder, api=settings, parts=parts) as running:
        yield Office(running, launcher, plans)


def in_office(folder: Path, test: Any, **options: Any) -> None:
    async def main() -> None:
        async with office(folder, **options) as opened:
            await test(opened)
            with opened.cloud.api.database.session() as session:
                assert list(inconsistencies(session, opened.cloud.api.folder)) == []

    asyncio.run(main())
