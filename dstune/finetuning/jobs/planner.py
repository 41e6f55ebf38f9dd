"""Asks `dstune plan` once per preset whether its jobs fit the hardware, and how long a step takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from dstune.core.errors import EXIT_DONE
from dstune.core.parsing import parse_json
from dstune.finetuning.jobs import configuration
from dstune.finetuning.jobs.folder import JobFolder
from dstune.finetuning.jobs.launcher import environment
from dstune.finetuning.jobs.presets import LOCAL, Preset

SECONDS = 300
AGAIN_SECONDS = 60.0
"""After this time a failed planning is retried."""
BATCH = 8
"""Rows of the planned step; the time of other batch sizes is assumed to be proportional."""
ANY_JOB = "ftjob-" + "0" * 24


@dataclass(frozen=True)
class Estimate:
    fits: bool
    reason: str = ""
    """Why it does not fit, in the planner's words."""
    memory_gib: float | None = None
    row_seconds: float | None = None
    """Time of a step divided by its rows."""
    planned: bool = True
    """Whether there is a plan; a failure of the planner may be temporary."""


class Plans(Protocol):
    def ask(self, preset: Preset, method: str) -> Estimate | None:
        """Return the plan of a preset's method; None while it is being made."""


DOES_NOT_FIT = "job_does_not_fit"


def does_not_fit(preset: Preset, plan: Estimate) -> str:
    return f"The job does not fit the hardware of the model {preset.name!r}: {plan.reason}."


class Planner:
    """Plans presets in a background thread. folder: for the temporary configurations. here: whether local jobs run on this
    machine."""

    def __init__(self, folder: Path, *, here: bool = True):
        self._folder, self._here = folder, here
        self._estimates: dict[tuple[str, str], tuple[float, Estimate]] = {}
        self._pending: set[tuple[str, str]] = set()
        self._busy, self._planning = threading.Lock(), threading.Lock()

    def ask(self, preset: Preset, method: str) -> Estimate | None:
        """Return the plan for the current preset; None while it is being made in the background, which takes seconds."""
        key = (repr(preset), method)
        if (plan := self._fresh(key)) is not None:
            return plan
        if preset.hardware is None and not (self._here and preset.pool == LOCAL):
            return Estimate(fits=True)  # a plan for this machine would not apply to the machine of the jobs
        with self._busy:
            if key not in self._pending:
                self._pending.add(key)
                threading.Thread(target=self._plan, args=(key, preset, method), name="plan", daemon=True).start()
        return None

    def _plan(self, key: tuple[str, str], preset: Preset, method: str) -> None:
        plan = Estimate(
            fits=True, planned=False
        )  # if the planner cannot be started, the run itself refuses what does not fit
        try:
            with self._planning:
                plan = self._estimate(preset, method)
        finally:
            with self._busy:
                self._estimates[key] = (time.monotonic(), plan)
                self._pending.discard(key)

    def _fresh(self, key: tuple[str, str]) -> Estimate | None:
        at, estimate = self._estimates.get(key, (0.0, None))
        return estimate if estimate is None or estimate.planned or time.monotonic() - at < AGAIN_SECONDS else None

    def _estimate(self, preset: Preset, method: str) -> Estimate:
        hyperparameters = {"n_epochs": 1, "batch_size": BATCH, "learning_rate_multiplier": 1.0, "beta": 0.1}
        hyperparameters |= {"compute_multiplier": 1.0, "eval_interval": 1, "eval_samples": 1}
        with tempfile.TemporaryDirectory(dir=self._folder, prefix="plan-") as name:
            folder = JobFolder(Path(name))
            folder.train.touch()
            fewest = replace(preset, devices=preset.fewest)  # a job may have to run with this few devices
            configuration.write(configuration.Plan(ANY_JOB, method, hyperparameters, seed=0), fewest, folder)
            command = [sys.executable, "-m", "dstune", "plan", *configuration.arguments(folder), "--json"]
            if preset.hardware is not None:
                command.append(f"hardware={preset.hardware}")
            env = environment(os.environ)
            try:
                done = subprocess.run(command, env=env, cwd=name, capture_output=True, text=True, timeout=SECONDS)
            except subprocess.TimeoutExpired:
                return Estimate(
                    fits=True, planned=False
                )  # the planner knows nothing; the run itself refuses what does not fit
        return read(done.returncode, done.stdout)


def read(code: int, text: str) -> Estimate:
    """Parse the output of `dstune plan --json`. A failure for lack of knowledge refuses nothing."""
    try:
        answer = json.loads(text)
    except ValueError:
        answer = _last_object(text)
    if code != EXIT_DONE or not isinstance(answer, dict) or "choices" not in answer:
        problems = ((answer or {}).get("error") or {}).get("problems") or [] if isinstance(answer, dict) else []
        reasons = "; ".join(f"{entry.get('where')}: {entry.get('reason')}" for entry in problems)
        return Estimate(fits=not reasons, reason=reasons, planned=False)
    chosen = next((entry for entry in answer["choices"] if entry.get("fits")), None)
    configured = answer.get("configured") or {}
    choice = configured if configured.get("fits") else chosen or configured
    estimate = Estimate(
        fits=bool(answer.get("fits")) or bool(configured.get("fits")),
        memory_gib=choice.get("memory_gib_per_rank"),
        row_seconds=(choice["step_seconds"] / BATCH) if choice.get("step_seconds") else None,
    )
    if estimate.fits:
        return estimate
    hardware = answer.get("hardware") or {}
    reason = (
        f"a rank needs {float(estimate.memory_gib or 0):.1f} GiB at least, and {hardware.get('device', 'the device')} has "
        f"{float(hardware.get('memory_gib') or 0):.1f} GiB"
    )
    return replace(estimate, reason=reason)


def _last_object(text: str) -> dict[str, object] | None:
    for line in reversed(text.splitlines()):
        try:
            value = parse_json(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            return value
    return None
