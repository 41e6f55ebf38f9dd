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
from pathlib import Path

import psutil

from dstune.config.schema import PREEMPTION_SIGNALS
from dstune.core import files
from dstune.core.lease import Lease, new_holder
from dstune.core.rank_env import FORK_SERVER
from dstune.core.rendezvous import SECRET_FILE
from dstune.launch.agents import AGENT, BATCH_NODE, ORDER
from dstune.launch.agents.agent import Agent
from dstune.launch.agents.task import Settings, Task, task_from_json
from dstune.launch.local import warm
from dstune.launch.verdict import exit_reason

POLL_SECONDS = 0.2
STARTS, PER_SECONDS = 5, 30.0
"""An agent that ends STARTS times within PER_SECONDS is not restarted."""
WITHOUT_SCRIPT = 100
"""Added to the exit code of the run, which is smaller, if the node that runs the script of the SLURM job was lost."""
PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h


def main(argv: Sequence[str]) -> int:
    if argv:
        task = slurm_task(argv)
        dead_holder = end_earlier(task, os.environ.get(AGENT, ""))
        if (code := keep(task, dead_holder=dead_holder)) >= WITHOUT_SCRIPT:
            from dstune.launch.slurm.job import end_without_script

            end_without_script(Path(task.run_dir), code - WITHOUT_SCRIPT)
            return 0
        return code
    line = sys.stdin.buffer.readline()
    task = task_from_json(json.loads(line))
    dead_holder = end_earlier(task, os.environ.get(AGENT, ""))
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


def end_earlier(task: Task, mark: str) -> str:
    """End the agent that an earlier connection or job step started on this node, and its ranks.

    Such an agent may still run because it has not noticed that the network broke. mark: value of `AGENT` for this node.
    Returns the holder of the lease if that agent was it; else an empty string.
    """
    # Parents, such as the process that starts a container, carry the mark too.
    own_pids = {os.getpid(), *(process.pid for process in psutil.Process().parents())}
    for process in psutil.process_iter() if mark else ():
        with suppress(psutil.Error, OSError):
            if process.pid not in own_pids and process.environ().get(AGENT) == mark:
                process.kill()
    lease = Lease(Path(task.run_dir))
    record = lease.read(lease.newest())
    return record.holder if mark and record and (record.launch, record.node) == (task.launch, task.node) else ""


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
