"""Runs rewards in a separate process: `python -m dstune.tasks.reinforcement.reward_child`.

There are two processes. The inner one runs the rewards. The outer one adopts all
processes that rewards leave behind, and kills them when it is asked to end, when the rank ends, or when there are too many.
"""

from __future__ import annotations

import asyncio
import ctypes
import importlib
import importlib.util
import inspect
import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

from dstune.core.confinement import spawned, table
from dstune.protocols import ENVIRONMENTS, REWARDS
from dstune.tasks.reinforcement.environment_host import EnvironmentHost
from dstune.tasks.reinforcement.grade import Graders
from dstune.tasks.reinforcement.outages import Failure

WATCHED_SECONDS = 0.1
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
TOO_MANY_PROCESSES = 75


def main() -> None:
    if sys.platform == "linux":  # before any process can be left behind
        libc = ctypes.CDLL(None)
        libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    signal.signal(signal.SIGTERM, lambda *_: end(0))
    inner = os.fork()
    if inner == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        answer_requests()
        os._exit(0)
    os.close(0)
    os.close(1)
    while True:
        ended, status = os.waitpid(-1, os.WNOHANG)
        if ended == inner:
            end(os.waitstatus_to_exitcode(status) & 0xFF)
        if not ended:
            if len(descendants(os.getpid())) > table.REWARDS.processes:
                print(f"\nit started more than {table.REWARDS.processes} processes", file=sys.stderr, flush=True)
                end(TOO_MANY_PROCESSES)
            time.sleep(WATCHED_SECONDS)


def end(code: int) -> NoReturn:
    """Kill all descendants of this process, even those in other sessions, and exit."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform != "linux":  # descendants in other sessions cannot be found here
        os.killpg(0, signal.SIGKILL)
    while processes := descendants(os.getpid()):
        for kind in (signal.SIGSTOP, signal.SIGKILL):  # stop all of them first, so that none starts another
            for process in processes:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(process, kind)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
    os._exit(code)


def descendants(ancestor: int) -> list[int]:
    """Return the living descendants of `ancestor`; none if there is no /proc."""
    if sys.platform != "linux":
        return []
    parents: dict[int, int] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with suppress(OSError, ValueError):
                state, parent, *_ = Path(f"/proc/{name}/stat").read_text(errors="replace").rpartition(")")[2].split()
                if state != "Z" or int(parent) == ancestor:
                    parents[int(name)] = int(parent)
    below = {ancestor}
    while children := {process for process, parent in parents.items() if parent in below} - below:
        below |= children
    return sorted(below - {ancestor})


def answer_requests() -> None:
    """Answer requests, each JSON, until the rank closes its end of the pipe."""
    graders, host = Graders({}), EnvironmentHost()

    def answer(content: bytes) -> tuple[bytes]:
        nonlocal graders
        request = json.loads(content)
        try:
            match request["kind"]:
                case "start":
                    import_members(request["modules"])
                    graders = Graders(request["graders"], **request["services"])
                    result: dict[str, Any] = {"ready": True}
                case "score":
                    result = run_reward(request, graders, host)
                case "reset":
                    result = {"results": host.reset(request["environment"], request["rows"], again=request["again"])}
                case "call":
                    result = {"results": host.call(request["calls"], request["seconds"])}
        except Exception as error:
            failure = Failure.of(error)
            result = {"error": failure.reason, "may_pass": failure.may_pass}
        return (json.dumps(result).encode(),)

    spawned.answer_requests(answer, replace(table.REWARDS, processes=0))  # those are counted by the outer process


def import_members(modules: Sequence[Sequence[Any]]) -> None:
    """Import the modules that register rewards and environments. modules: (name of the member, module, file of the module if Python
    cannot find it by name), as from `reward_process.module_of`."""
    for name, module, file in modules:
        if module not in sys.modules:
            if file is None:
                importlib.import_module(module)
            else:
                spec = importlib.util.spec_from_file_location(module, file)
                assert spec is not None and spec.loader is not None
                loaded = sys.modules[module] = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(loaded)
        if name not in REWARDS and name not in ENVIRONMENTS:
            raise ImportError(f"{module} registers no reward or environment {name!r}")


def run_reward(request: Mapping[str, Any], graders: Graders, host: EnvironmentHost) -> dict[str, Any]:
    """Run a reward. Return its `scores`, `failures` (number of the completion, reason, whether it may pass), and what it logged:
    `extra` (columns of the completions) and `metrics`."""
    name, completions, columns = request["reward"], request["completions"], dict(request["columns"])
    if name in graders.names:
        return parted(graders.score(name, completions, columns))
    if request["environments"] and (name == host.name or (name in ENVIRONMENTS and name not in REWARDS)):
        return parted(host.rewards(request["environments"]))
    reward = REWARDS[name]()
    if reward.runs_programs:
        reward.limits, reward.seconds = graders.limits, request["seconds_each"]
    prompts, extra, metrics = request["prompts"], dict[str, list[Any]](), dict[str, list[float]]()
    if reward.like_trl:
        completions = [as_messages(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]
        columns["trainer_state"] = SimpleNamespace(**request["state"])
        columns["log_extra"] = lambda column, values: extra.update({str(column): list(values)})
        columns["log_metric"] = lambda metric, value: metrics.setdefault(str(metric), []).append(float(value))
        if request["environments"]:
            columns["environments"] = host.instances(request["environments"])
    scores: Any = reward(prompts, completions, request["completion_ids"], **columns)
    if inspect.isawaitable(scores):
        scores = asyncio.run(awaited(scores))
    logged = {column: [plain(value) for value in values] for column, values in extra.items()}
    return {
        "scores": [None if score is None or score != score else float(score) for score in scores],
        "extra": {column: values for column, values in logged.items() if len(values) == len(completions)},
        "metrics": {metric: sum(values) / len(values) for metric, values in metrics.items()},
    }


def parted(scores: Sequence[float | Failure | None]) -> dict[str, Any]:
    """Return the `scores` alone, and the `failures` among them."""
    failures = [(number, *score) for number, score in enumerate(scores) if isinstance(score, Failure)]
    return {"scores": [None if isinstance(score, Failure) else score for score in scores], "failures": failures}


async def awaited(scores: Any) -> Any:
    return await scores


def as_messages(prompt: Any, completion: Any) -> Any:
    """Return a completion as messages if its prompt is a conversation; else unchanged."""
    if isinstance(prompt, str) or not isinstance(completion, str):
        return completion
    return [{"role": "assistant", "content": completion}]


def plain(value: Any) -> Any:
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


if __name__ == "__main__":
    main()
