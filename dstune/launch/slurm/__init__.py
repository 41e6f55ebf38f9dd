"""launch=slurm: a SLURM job."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dstune.core.errors import Problem
from dstune.launch.slurm.config import SlurmConfig
from dstune.launch.slurm.jobs import SlurmQueue
from dstune.protocols import Launcher, launcher
from dstune.protocols.launcher import Check, LaunchRequest
from dstune.protocols.launcher_options import SubmitsRuns

if TYPE_CHECKING:
    from dstune.config.schema import RunConfig
    from dstune.launch.console import Console

MINUTES = "10"
"""Time limit of a job that measures."""


@launcher
class Slurm(Launcher, SubmitsRuns):
    Config = SlurmConfig
    config: SlurmConfig
    queue = SlurmQueue()

    def check(self) -> Iterator[Problem]:
        from dstune.launch.slurm.rules import check

        yield from check(self.config)

    @property
    def waits(self) -> bool:
        return self.config.wait

    @property
    def restarts(self) -> int:
        return self.config.restarts

    def nodes(self) -> int:
        return self.config.nodes

    def start(self, request: LaunchRequest) -> int:
        from dstune.launch.slurm import submit

        module, *arguments = request.command or ["dstune.worker"]
        assert not arguments or arguments == [str(request.run_dir)], "the script gives each rank the run directory"
        return submit.run(request.run, self.config, request.run_dir, console=request.console, module=module)

    def array_problems(self) -> Iterator[Problem]:
        if self.config.chain > 1:
            reason = "the jobs of an array do not wait for each other"
            yield Problem("launch.chain", reason, "launch.chain=1, or launch.wait=true", str(self.config.chain))

    def submit_array(
        self, sweep: RunConfig, folder: Path, runs: Sequence[tuple[RunConfig, Path]], console: Console
    ) -> list[str]:
        from dstune.launch.slurm import array

        return array.submit(sweep, self.config, folder, runs, console)

    @classmethod
    def probe(cls, *, needed: bool) -> Iterator[Check]:
        from dstune.launch.slurm.jobs import probe

        yield probe(needed=needed)

    def to_measure(self) -> SlurmConfig | None:
        import shutil

        if shutil.which("sbatch") is None:
            return None
        return replace(self.config, wait=True, requeue=False, chain=1, time=self.config.time or MINUTES)
