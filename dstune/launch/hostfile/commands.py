"""A pure function from a run and its hosts to the tasks of their agents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from dstune.config.schema import RunConfig
from dstune.core.handoff import FOLDER, HANDOFF_FILE, RANK_LOGS
from dstune.core.rank_env import GROUP_SECRET, LAUNCH_ID
from dstune.launch.agents.task import Settings, Task
from dstune.launch.hostfile.config import HostfileConfig
from dstune.launch.local.warm import rank_imports
from dstune.launch.remote_commands import path_of, variables_of

OF_OTHER_LAUNCHERS = (LAUNCH_ID, RANK_LOGS, FOLDER, HANDOFF_FILE, GROUP_SECRET)
"""Variables that other launchers set and that ranks get from their agent here."""


def host_tasks(
    config: RunConfig,
    run_dir: Path,
    slots: Mapping[str, Sequence[int]],
    *,
    launch_id: str,
    parent: Mapping[str, str],
    on_cpu: bool,
    command: Sequence[str] = ("dstune.worker",),
    saves: bool = True,
) -> list[Task]:
    """Return one task for each host in `slots`; the last `launch.spares` hosts wait as spares.

    on_cpu: the hosts have no GPU. command: the module that each rank runs, and its arguments before the run directory's.

    Raises:
        UserError: an unset variable in `launch.export_env`.
    """
    launch = config.launch
    assert isinstance(launch, HostfileConfig)
    variables, handoff = variables_of(config, run_dir, launch, launch_id, parent, on_cpu=on_cpu)
    secret = handoff["all"][GROUP_SECRET]
    variables = {**variables, **handoff["all"], "PATH": path_of(parent)}
    variables = {name: value for name, value in variables.items() if name not in OF_OTHER_LAUNCHERS}
    nodes = len(slots) - launch.spares
    settings = Settings(
        nodes=nodes,
        expected=len(slots),
        min_nodes=launch.min_nodes or nodes,
        restarts=launch.restarts,
        silence_seconds=launch.silence_seconds,
        grace_seconds=launch.grace_seconds,
        interface=launch.interface,
        signals=list(config.run.signals),
        saves=saves,
        warm=launch.warm,
        imports=list(rank_imports(config)),
    )
    return [
        Task(
            run_dir=str(run_dir.absolute()),
            command=list(command) if len(command) > 1 else [*command, str(run_dir.absolute())],
            settings=settings,
            node=host,
            order=order,
            ranks=len(numbers),
            launch=launch_id,
            secret=secret,
            variables=variables | ({} if on_cpu else {"CUDA_VISIBLE_DEVICES": ",".join(map(str, numbers))}),
            first_variables=handoff.get("first", {}),
            folder=str(Path.cwd()),
        )
        for order, (host, numbers) in enumerate(slots.items())
    ]
