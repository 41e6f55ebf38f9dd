"""Reasons why ranks cannot run in Spark's tasks, from what the tasks report and from Spark's errors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dstune import __version__
from dstune.core.errors import Problem, UserError
from dstune.lakehouse.spark.task import digest_of


def hides_gpus() -> bool:
    """Return whether the user has hidden all GPUs."""
    return os.environ.get("CUDA_VISIBLE_DEVICES") == ""


def check(hellos: Mapping[int, Mapping[str, Any]], run_dir: Path) -> None:
    """Raises UserError if the tasks cannot run ranks of this run together."""
    problems = []
    expected = digest_of(run_dir / "run.yaml")
    if blind := sorted({hello["host"] for hello in hellos.values() if hello["sees"] != expected}):
        reason = f"it is not there on {', '.join(blind)}: the workers do not share this file system"
        fix = "give a run.dir that all workers and the driver share"
        problems.append(Problem("run.dir", reason, fix, str(run_dir)))
    if others := sorted({hello["dstune"] for hello in hellos.values()} - {__version__}):
        fix = f"install dstune {__version__} on the workers"
        problems.append(Problem("launch", f"the workers have dstune {', '.join(others)}", fix, "spark"))
    bare = [rank for rank, hello in hellos.items() if not hello["gpus"]]
    if bare and len(bare) < len(hellos):
        reason = f"the tasks of ranks {', '.join(map(str, bare))} have no GPU, and others have"
        problems.append(Problem("launch", reason, "set spark.task.resource.gpu.amount=1", "spark"))
    host_devices = [(hello["host"], device) for hello in hellos.values() for device in hello["gpus"]]
    if len(host_devices) > len(hellos) or len({*host_devices}) < len(host_devices):
        reason = "Spark gives a task several GPUs, or several tasks one, and each rank uses one of its own"
        problems.append(Problem("launch", reason, "set spark.task.resource.gpu.amount=1", "spark"))
    unused = sorted({hello["host"] for hello in hellos.values() if hello.get("unused")})
    if unused and not host_devices and not hides_gpus():
        reason = f"Spark gives the tasks none of the GPUs on {', '.join(unused)}"
        fix = "set spark.task.resource.gpu.amount=1; launch=local uses those of this machine; CUDA_VISIBLE_DEVICES= the CPU"
        problems.append(Problem("launch", reason, fix, "spark"))
    if problems:
        raise UserError(problems)


def cause(text: str) -> str:
    """Return the line of a long Spark error that states the cause."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("An error occurred while calling")]
    telling_words = ("SPARK-24819", "SPARK-24942", "No module named")
    telling = [line for line in lines if any(word in line for word in telling_words)]
    telling += [line for line in lines if "Error:" in line]
    return f"the stage of Spark failed: {(telling or lines or ['no reason given'])[0].removeprefix(': ')[:300]}"


def refuse_by_cause(failure: str, size: int) -> None:
    """Raises UserError if the cause of a failed stage is one that the user can fix."""
    if "SPARK-24819" in failure or "more slots" in failure:
        reason = "Spark has fewer slots than ranks, and all have to run at once"
        raise UserError(Problem("launch.processes", reason, "fewer ranks, or a larger cluster", str(size)))
    if "SPARK-24942" in failure or "dynamic resource allocation" in failure:
        reason = "Spark starts tasks together only on a cluster of fixed size"
        raise UserError(Problem("launch", reason, "spark.dynamicAllocation.enabled=false", "spark"))
    if "No module named 'dstune" in failure:
        fix = "pip install dstune on the workers too (a cluster library on Databricks)"
        raise UserError(Problem("launch", "the workers have no dstune", fix, "spark"))
