"""Rewards in a child process: what hangs, crashes or prints without end takes no rank with it.

The child (`python -m dstune.tasks.reinforcement.reward_process`) imports the rewards and answers one JSON line with another.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from dstune.core.child_python import child_environment
from dstune.core.errors import Problem, UserError
from dstune.protocols import REWARDS

START_SECONDS = 120.0
"""For the child to import the rewards."""
MEMORY_BYTES = 8 * 2**30
"""Address space of the child."""
PRINTED_BYTES = 2**24
"""What the child may write to one file, what it prints included."""
LONGEST_REASON = 500
"""Characters of an error that are passed on."""


class RewardProcess:
    """Scores completions with the rewards `names`, in a child that is started anew whenever it had to be ended."""

    def __init__(self, names: Sequence[str], seconds: float):
        """seconds: for one reward to score the completions of one call."""
        self._modules = [module_of(name) for name in dict.fromkeys(names)]
        self._seconds = seconds
        self._child: subprocess.Popen[bytes] | None = None
        self._printed: Any = None
        self.last_error = ""
        """Why the last reward that failed did."""

    def __call__(
        self,
        name: str,
        prompts: Sequence[Any],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
    ) -> list[float | None]:
        """Return the scores of `completions`; None for all of them where the reward failed, with `last_error` saying why.

        Raises:
            UserError: the rewards cannot be imported.
        """
        request = {
            "reward": name,
            "prompts": list(prompts),
            "completions": list(completions),
            "completion_ids": [list(ids) for ids in completion_ids],
            "columns": {column: list(values) for column, values in columns.items()},
        }
        if self._child is None:
            self._start()
        answer = self._ask(request, self._seconds)
        scores = answer.get("scores")
        if not isinstance(scores, list) or len(scores) != len(completions):
            self.last_error = str(answer.get("error") or "it returned no list with a score for each completion")
            return [None] * len(completions)
        return [None if score is None else float(score) for score in scores]

    def close(self) -> None:
        """End the child and everything that it started."""
        child, self._child = self._child, None
        if child is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        for pipe in (child.stdin, child.stdout):
            with suppress(OSError):
                assert pipe is not None
                pipe.close()
        self._printed.close()

    def _start(self) -> None:
        self._printed = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the child)
        self._child = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._printed,
            env=child_environment({name: value for name, value in os.environ.items() if not _is_secret(name)}),
            start_new_session=True,
        )
        answer = self._ask({"modules": self._modules}, START_SECONDS)
        if "ready" not in answer:
            reason = f"the rewards cannot be imported in a process of their own: {answer.get('error')}"
            raise UserError(Problem("task.rewards", reason, "import what they need inside of the plugin's file"))

    def _ask(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """The child's answer, or an `error`, after which there is no child any more."""
        child = self._child
        assert child is not None and child.stdin is not None and child.stdout is not None
        deadline = time.monotonic() + seconds
        line = b""
        try:
            _write(child.stdin.fileno(), json.dumps(request).encode() + b"\n", deadline)
            while not line.endswith(b"\n"):
                left = deadline - time.monotonic()
                if left <= 0 or not select.select([child.stdout], [], [], left)[0]:
                    raise TimeoutError
                part = os.read(child.stdout.fileno(), 2**20)
                if not part:
                    raise EOFError
                line += part
            answer: dict[str, Any] = json.loads(line)
        except TimeoutError:
            self.close()
            return {"error": f"it took longer than {seconds:g} s (task.reward_seconds)"}
        except (OSError, EOFError, ValueError):
            printed = self._last_line()
            self.close()
            return {"error": f"its process ended: {printed}" if printed else "its process ended"}
        return answer

    def _last_line(self) -> str:
        size = self._printed.seek(0, os.SEEK_END)
        self._printed.seek(max(0, size - 4096))
        lines = self._printed.read().decode(errors="replace").strip().splitlines()
        return lines[-1][:LONGEST_REASON] if lines else ""


def module_of(name: str) -> tuple[str, str, str | None]:
    """(name of a reward, its module, the file of a module that Python does not find by its name)."""
    module = REWARDS[name].__module__
    spec = getattr(sys.modules.get(module), "__file__", None)
    return name, module, spec if module.startswith("dstune_plugins.") or module == "__main__" else None


def _write(descriptor: int, content: bytes, deadline: float) -> None:
    view = memoryview(content)
    os.set_blocking(descriptor, False)
    while view:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([], [descriptor], [], left)[1]:
            raise TimeoutError
        with suppress(BlockingIOError):
            view = view[os.write(descriptor, view[: 2**16]) :]


def _is_secret(name: str) -> bool:
    """Whether a variable may hold a key: rewards run code of many authors on texts of the model."""
    return any(word in name.upper() for word in ("TOKEN", "SECRET", "PASSWORD", "API_KEY", "CREDENTIAL"))


def _import(modules: Sequence[Sequence[Any]]) -> None:
    for name, module, file in modules:
        if module in sys.modules:
            continue
        if file is None:
            importlib.import_module(module)
        else:
            spec = importlib.util.spec_from_file_location(module, file)
            assert spec is not None and spec.loader is not None
            loaded = sys.modules[module] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(loaded)
        if name not in REWARDS:
            raise ImportError(f"{module} registers no reward {name!r}")


def _scores(request: Mapping[str, Any]) -> list[float | None]:
    reward = REWARDS[request["reward"]]()
    scores = reward(request["prompts"], request["completions"], request["completion_ids"], **request["columns"])
    return [None if score is None or score != score else float(score) for score in scores]


def main() -> None:
    """Answer requests until the rank closes its end."""
    for limit, amount in ((resource.RLIMIT_AS, MEMORY_BYTES), (resource.RLIMIT_FSIZE, PRINTED_BYTES)):
        resource.setrlimit(limit, (amount, amount))
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what a reward prints is no answer
    for line in sys.stdin.buffer:
        request = json.loads(line)
        try:
            if "modules" in request:
                _import(request["modules"])
                answer: dict[str, Any] = {"ready": True}
            else:
                answer = {"scores": _scores(request)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"[:LONGEST_REASON]}
        answers.write(json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    main()
