"""The keeper of a node's agent: `python -m dstune.launch.agents`, started by SLURM's srun or over ssh.

    ... -m dstune.launch.agents RUN_DIR SETTINGS RANKS MODULE [ARGUMENT ...]   in a step of a SLURM job
    ... -m dstune.launch.agents                                               with a task on standard input, which stays open

It starts the agent, and restarts it when it is killed. Over ssh, the agent ends its ranks once standard input is closed.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from dstune.config.schema import PREEMPTION_SIGNALS
from dstune.core import files
from dstune.core.lease import Lease, new_holder
from dstune.core.rank_env import FORK_SERVER
from dstune.core.rendezvous import SECRET_FILE
from dstune.launch.agents import BATCH_NODE, ORDER
from dstune.launch.agents.agent import Agent
from dstune.launch.agents.task import Settings, Task, task_from_json
from dstune.launch.local import warm
from dstune.launch.processes import process_namespace
from dstune.launch.verdict import exit_reason

POLL_SECONDS = 0.2
STARTS, PER_SECONDS = 5, 30.0
"""An agent that ends STARTS times within PER_SECONDS is not restarted."""
KILL_SECONDS = 5.0
"""How long to wait for an earlier keeper and its descendants after they were killed."""
KEEPER_MODULE = "dstune.launch.agents"
WITHOUT_SCRIPT = 100
"""Added to the exit code of the run, which is smaller, if the node that runs the script of the SLURM job was lost."""
PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h


def main(argv: Sequence[str]) -> int:
    if argv:
        task = slurm_task(argv)
        dead_holder = replace_earlier_keeper(task)
        if (code := keep(task, dead_holder=dead_holder)) >= WITHOUT_SCRIPT:
            from dstune.launch.slurm.job import end_without_script

            end_without_script(Path(task.run_dir), code - WITHOUT_SCRIPT)
            return 0
        return code
    line = sys.stdin.buffer.readline()
    task = task_from_json(json.loads(line))
    dead_holder = replace_earlier_keeper(task)
    print("ready", flush=True)
    return keep(task, standard_input=sys.stdin.fileno(), dead_holder=dead_holder)


def slurm_task(argv: Sequence[str]) -> Task:
    """Return the task of an agent that srun started on one node of a job step."""
    run_dir, settings, ranks, *command = argv
    secret = files.read_own(Path(run_dir) / SECRET_FILE).decode()
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    order = int(os.environ.get(ORDER, "0"))
    names = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT")
    launch = ".".join(os.environ.get(name, "0") for name in names)
    return Task(
        run_dir=run_dir,
        command=[*command, run_dir],
        settings=Settings(**json.loads(settings)),
        node=node,
        order=order,
        ranks=int(ranks),
        launch=launch,
        secret=secret,
        batch_node=os.environ.get(BATCH_NODE, ""),
    )


@dataclass(frozen=True)
class KeeperRecord:
    """Which process keeps a node's agent running. Each node of a run has a file of its own with its newest record."""

    launch: str
    node: str
    namespace: str
    """`process_namespace()` of the keeper."""
    pid: int
    started: float
    """Creation time of the process, in seconds since the epoch."""

    def process(self) -> psutil.Process | None:
        """Return the keeper if it still runs where this process can see it.

        The record's file may be older than a reboot, or come with a copied run directory, so a process that merely has the same
        id is not it.
        """
        if self.namespace != process_namespace() or self.pid == os.getpid():
            return None
        with suppress(psutil.Error, OSError):
            process = psutil.Process(self.pid)
            if abs(process.create_time() - self.started) < 1.0 and KEEPER_MODULE in process.cmdline():
                return process
        return None


def replace_earlier_keeper(task: Task) -> str:
    """End the keeper that an earlier connection or job step of this launch started on this node, and record this process.

    Such a keeper, with its agent and ranks, may still run because it has not noticed that the network broke. Returns the holder
    of the lease if that keeper's agent held it; else an empty string.
    """
    file = Path(task.run_dir) / "launch" / f"keeper-{task.order}.json"
    earlier = read_keeper(file)
    if earlier is not None and (earlier.launch, earlier.node) == (task.launch, task.node):
        end_keeper(earlier)
    this = psutil.Process()
    record = KeeperRecord(task.launch, task.node, process_namespace(), this.pid, this.create_time())
    files.write(file, json.dumps(asdict(record)), mode=0o600)
    lease = Lease(Path(task.run_dir))
    holder = lease.read(lease.newest())
    return holder.holder if holder and (holder.launch, holder.node) == (task.launch, task.node) else ""


def read_keeper(file: Path) -> KeeperRecord | None:
    """Return the record in `file`; None if there is none that this user alone could have written."""
    try:
        record = KeeperRecord(**json.loads(files.read_own(file)))
    except (OSError, ValueError, TypeError):
        return None
    texts = (record.launch, record.node, record.namespace)
    is_valid = (
        all(isinstance(text, str) for text in texts) and type(record.pid) is int and type(record.started) is float
    )
    return record if is_valid else None


def end_keeper(record: KeeperRecord) -> None:
    """Kill the keeper and all its descendants, and wait until they are gone."""
    keeper = record.process()
    if keeper is None:
        return
    with suppress(psutil.Error, OSError):
        keeper.suspend()  # so that it does not restart the agent while this process looks for descendants
        processes = [keeper, *keeper.children(recursive=True)]
        for process in processes:
            with suppress(psutil.Error, OSError):
                process.kill()
        psutil.wait_procs(processes, timeout=KILL_SECONDS)


def keep(task: Task, standard_input: int | None = None, dead_holder: str = "") -> int:
    """Run an agent until it ends by itself, and return its exit code. standard_input: a descriptor; once it is closed, the agent
    leaves."""
    if task.folder is not None:
        os.chdir(task.folder)
    os.environ.pop(FORK_SERVER, None)  # it may name a folder of another machine
    with ExitStack() as stack:
        if task.settings.warm and task.settings.restarts:
            # The keeper offers the server, so that it outlives an agent that is killed.
            os.environ.update(stack.enter_context(warm.offer()))
        return _keep(task, standard_input, dead_holder)


def _keep(task: Task, standard_input: int | None, dead_holder: str) -> int:
    holder, starts, is_leaving = new_holder(), [time.monotonic()], False
    for name in {*PREEMPTION_SIGNALS, *task.settings.signals, "SIGTERM", "SIGINT", "SIGHUP"}:
        signal.signal(signal.Signals[name], signal.SIG_IGN)  # the agent gets the signals of a queue too, and obeys them
    child = _fork(task, holder, dead_holder)
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            code = os.waitstatus_to_exitcode(status)
            if code == 0 or code >= WITHOUT_SCRIPT or is_leaving:
                return code
            starts = [start for start in starts if time.monotonic() - start < PER_SECONDS]
            print(f"dstune: the agent of {task.node} {exit_reason(code)}", flush=True)
            if len(starts) >= STARTS:
                return 1
            starts.append(time.monotonic())
            child = _fork(task, holder, dead_holder)
        if standard_input is not None and not is_leaving:
            poll = select.poll()
            poll.register(standard_input, select.POLLIN)
            if poll.poll(1000 * POLL_SECONDS) and not os.read(standard_input, 4096):
                is_leaving = True
                os.kill(child, signal.SIGHUP)
        else:
            time.sleep(POLL_SECONDS)


def _fork(task: Task, holder: str, dead_holder: str) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        if sys.platform.startswith("linux"):
            ctypes.CDLL(None, use_errno=True).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
        for name in {*PREEMPTION_SIGNALS, *task.settings.signals, "SIGTERM", "SIGINT", "SIGHUP"}:
            signal.signal(signal.Signals[name], signal.SIG_DFL)  # `caught_signals` leaves ignored signals alone
        agent = Agent(task, holder, dead_holder)
        agent.run()
        code = 0 if agent.left_alone is None else WITHOUT_SCRIPT + agent.left_alone
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
