"""Run rewards and environments in a child process (`reward_child.py`); this is the rank's side. Code that hangs, crashes or prints
endlessly does not take the rank down."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from dstune.core.confinement import table
from dstune.core.confinement.spawned import ProcessEnded, Spawned, TookTooLong
from dstune.core.errors import Problem, UserError
from dstune.core.registry import Registry
from dstune.core.secrets import is_secret
from dstune.grading.sandbox import AT_ONCE
from dstune.grading.sandbox import START_SECONDS as PROGRAM_START
from dstune.protocols import ENVIRONMENTS, REWARDS
from dstune.tasks.reinforcement.config import ReinforcementConfig
from dstune.tasks.reinforcement.grade import asks_others, read_grader
from dstune.tasks.reinforcement.outages import LONGEST_REASON, Failure

START_SECONDS = 120.0
"""Time for the child to import the rewards."""
END_SECONDS = 10.0
"""Time for the child to kill what the rewards have started."""
JUDGE_KEY = "DSTUNE_JUDGE_API_KEY"
"""The variable with the key for `task.judge`; no other secret reaches the child."""
MODULE = "dstune.tasks.reinforcement.reward_child"


@dataclass
class Scores:
    """A reward's results for completions, in their order."""

    scores: list[float | None]
    """None for a completion that the reward could not score."""
    extra: dict[str, list[Any]] = field(default_factory=dict)
    """Columns that the reward logged, with a value for each completion."""
    metrics: dict[str, float] = field(default_factory=dict)
    failures: dict[int, Failure] = field(default_factory=dict)
    """Why the reward failed, by number of the completion. One that returned None without failing is not in it."""


class RewardProcess:
    """Scores completions in a child process, which is started again whenever it had to be ended."""

    def __init__(self, task: ReinforcementConfig):
        """Read the graders. Raises UserError for a file of `task.graders` that holds no grader."""
        self._modules = [module_of(REWARDS, name) for name in dict.fromkeys(task.rewards)]
        if task.environment is not None:
            self._modules.append(module_of(ENVIRONMENTS, task.environment))
        self._graders = {name: read_grader(path) for name, path in task.grader_files.items()}
        self._task = task
        self._child: Spawned | None = None
        self._printed: Any = None
        self.starts = 0
        """How often the child was started. When this number changes, the state of the former child is lost."""
        self.last_error = ""
        """Why the last failed reward failed."""

    def __call__(
        self,
        name: str,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int] | None],
        columns: Mapping[str, Sequence[Any]],
        *,
        state: Mapping[str, Any] | None = None,
        environments: Sequence[str] = (),
    ) -> Scores:
        """Return the scores of `completions`. If the reward failed, all scores are None and `last_error` says why.

        completion_ids: None for a completion whose tokens are unknown. state: the values of `trainer_state` in TRL's functions.
        environments: the key of each completion's environment, if there are any.

        Raises:
            UserError: the rewards cannot be imported.
        """
        seconds, rounds = self._task.reward_seconds, math.ceil(len(completions) / AT_ONCE)
        request = {
            "kind": "score",
            "seconds_each": seconds / max(1, rounds),
            "reward": name,
            "prompts": list(prompts),
            "completions": list(completions),
            "completion_ids": [None if ids is None else list(ids) for ids in completion_ids],
            "columns": {column: list(values) for column, values in columns.items()},
            "state": dict(state or {}),
            "environments": list(environments),
        }
        if (name in self._graders and asks_others(self._graders[name])) or (
            name in REWARDS and REWARDS[name].runs_programs
        ):
            seconds += rounds * (self._task.program_seconds + PROGRAM_START)
        answer = self.ask(request, seconds, "task.reward_seconds")
        scores = answer.get("scores")
        if not isinstance(scores, list) or len(scores) != len(completions):
            self.last_error = str(answer.get("error") or "it returned no list with a score for each completion")
            failure = Failure(self.last_error, bool(answer.get("may_pass")))
            return Scores([None] * len(completions), failures=dict.fromkeys(range(len(completions)), failure))
        failures = {number: Failure(*failure) for number, *failure in answer.get("failures", ())}
        for failure in failures.values():
            self.last_error = failure.reason
        return Scores(
            [None if score is None else float(score) for score in scores],
            answer.get("extra", {}),
            answer.get("metrics", {}),
            failures,
        )

    def ask(self, request: Mapping[str, Any], seconds: float, key: str) -> dict[str, Any]:
        """Return the child's answer, or an object with `error`. key: the setting that limits the time. Raises UserError."""
        if self._child is None:
            self._start()
        return self._ask(request, seconds, key)

    def close(self) -> None:
        """End the child and everything that it started."""
        child, self._child = self._child, None
        if child is not None:
            child.end(END_SECONDS)
            self._printed.close()

    def _start(self) -> None:
        self._printed = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the child)
        variables = {name: value for name, value in os.environ.items() if not _may_be_secret(name, value)}
        self._child = Spawned(MODULE, table.REWARDS, variables, self._printed, folder=os.curdir)
        self.starts += 1
        task = self._task
        services = {
            "seconds": task.program_seconds,
            "memory_gib": task.program_memory_gib,
            "judge": task.judge,
            "judge_key": os.environ.get(JUDGE_KEY, "") if task.judge else "",
        }
        request = {"kind": "start", "modules": self._modules, "graders": self._graders, "services": services}
        answer = self._ask(request, START_SECONDS, "", is_new=True)
        if "ready" not in answer:
            self.close()
            reason = f"the rewards cannot be started in a process of their own: {answer.get('error')}"
            raise UserError(Problem("task.rewards", reason, "import what they need inside of the plugin's file"))

    def _ask(self, request: Mapping[str, Any], seconds: float, key: str, is_new: bool = False) -> dict[str, Any]:
        """Return the child's answer, or an object with `error`; if the child hung or crashed, it has then been ended.

        is_new: whether this is its first request.
        """
        child = self._child
        assert child is not None
        try:
            if is_new:
                child.wait_until_ready()
            answer: dict[str, Any] = json.loads(child.ask(json.dumps(request).encode(), wall_seconds=seconds))
        except TookTooLong:
            self.close()
            return {
                "error": f"it took longer than {seconds:g} s ({key})" if key else f"it took longer than {seconds:g} s"
            }
        except (ProcessEnded, ValueError):
            with suppress(subprocess.TimeoutExpired):
                child.process.wait(END_SECONDS)  # it may still print the reason
            printed = self._last_line()
            self.close()
            return {"error": f"its process ended: {printed}" if printed else "its process ended"}
        return answer

    def _last_line(self) -> str:
        size = self._printed.seek(0, os.SEEK_END)
        self._printed.seek(max(0, size - 4096))
        lines = self._printed.read().decode(errors="replace").strip().splitlines()
        return lines[-1][:LONGEST_REASON] if lines else ""


def module_of(registry: Registry[Any], name: str) -> tuple[str, str, str | None]:
    """Return (name of a member, its module, the module's file if Python cannot find it by name, else None)."""
    module = registry[name].__module__
    file = getattr(sys.modules.get(module), "__file__", None)
    return name, module, file if module.startswith("dstune_plugins.") or module == "__main__" else None


def _may_be_secret(name: str, value: str) -> bool:
    """Return whether a variable may hold a secret, also where its name only contains such a word: rewards run code of many authors
    on texts of the model."""
    words = ("TOKEN", "SECRET", "PASSWORD", "API_KEY", "CREDENTIAL")
    return is_secret(name, value) or any(word in name.upper() for word in words)
