"""The ranks of one node, which are started, watched and ended as those of `launch=local` are."""

from __future__ import annotations

import hashlib
import hmac
import os
import signal
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from dstune.core.errors import EXIT_DONE, EXIT_PREEMPTED
from dstune.core.lease import LEASE
from dstune.core.rank_env import FORK_SERVER, GROUP_SECRET, LAUNCH_ID, LAUNCHER_PID, STORE
from dstune.launch.agents.task import Task
from dstune.launch.commands import LaunchPlan
from dstune.launch.console import Console
from dstune.launch.local.supervise import Launch
from dstune.launch.local.warm import ForkServer
from dstune.launch.verdict import Ended

ENDING_SECONDS = 2.0
"""How long ranks that wait for a lost rank may take to end by themselves."""
START_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", STORE, GROUP_SECRET, LAUNCH_ID, LEASE)
"""Variables that hold for one start of the ranks only: rank 0 announces a new meeting point each time."""


class NodeLaunch(Launch):
    """One start of the ranks of this node.

    mark: `DSTUNE_LAUNCH_ID` of all ranks of the attempt. lease: the lease file of its generation. server: forks the ranks; if
    None, each rank is a new process that does its own imports.
    """

    def __init__(
        self,
        task: Task,
        mark: str,
        lease: Path,
        first_rank: int,
        world_size: int,
        received: list[str],
        console: Console,
        server: ForkServer | None = None,
    ):
        plan = node_plan(task, os.environ, first_rank, world_size)
        run_dir, settings = Path(task.run_dir), task.settings
        super().__init__(plan, run_dir, settings.grace_seconds, console, received, None, settings.saves, server)
        self.id, self.first_rank = mark, first_rank
        self._world_size, self._lease, self._secret = world_size, lease, task.secret

    @property
    def world_size(self) -> int:
        return self._world_size

    def variables(self, stack: ExitStack) -> dict[str, str]:
        secret = hmac.new(self._secret.encode(), f"ranks {self.id}".encode(), hashlib.sha256).hexdigest()
        return {LAUNCH_ID: self.id, GROUP_SECRET: secret, LEASE: str(self._lease)}

    def shows_output(self, rank: int) -> bool:
        return False

    @property
    def has_failed(self) -> bool:
        """Whether a rank has failed, so that the ranks of other nodes would wait for it forever."""
        return any(end.code not in (EXIT_DONE, EXIT_PREEMPTED) for end in self.ended)

    def end_soon(self) -> None:
        """Ask, from another thread, that the ranks end because ranks of other nodes are gone."""
        self.grace_seconds = min(self.grace_seconds, ENDING_SECONDS)
        self.ends_others = True

    def all_ends(self) -> list[Ended]:
        """Return how each rank of this node ended; one that could not be started counts as killed."""
        ended = {end.rank for end in self.ended}
        ranks = range(self.first_rank, self.first_rank + self.plan.size)
        return [*self.ended, *(Ended(rank, -signal.SIGKILL, 0) for rank in ranks if rank not in ended)]


def node_plan(task: Task, parent: Mapping[str, str], first_rank: int, world_size: int) -> LaunchPlan:
    """Return the command lines and environments of this node's ranks."""
    dropped = {*START_VARIABLES, FORK_SERVER, *task.unset}
    shared = {name: value for name, value in parent.items() if name not in dropped} | task.variables
    shared |= {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(task.ranks),
        "DSTUNE_CONSOLE": "plain",
        LAUNCHER_PID: str(os.getpid()),
    }
    ranks = range(first_rank, first_rank + task.ranks)
    envs = tuple(
        {
            **shared,
            **(task.first_variables if rank == 0 else {}),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank - first_rank),
        }
        for rank in ranks
    )
    command = (sys.executable, "-u", "-m", *task.command)
    return LaunchPlan(argv=(command,) * task.ranks, env=envs)
