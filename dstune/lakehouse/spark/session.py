"""The Spark session of a launch: the existing one, which stays open, or a new one that ends with the launch."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dstune.core.child_python import SAFE_PATH
from dstune.core.errors import Problem, UserError, first_line
from dstune.lakehouse.spark.config import SparkConfig
from dstune.launch.console import Console

POLL_SECONDS = 0.2
QUIET_SECONDS = 5.0
"""Workers of a new session count as complete when none has joined for this long."""
SLOTS_SECONDS = 60.0
"""How long to wait for more slots, since the last one appeared, while there are fewer than ranks."""


def existing() -> Any | None:
    """Return the session of this process, whichever thread created it; None if there is none."""
    if "pyspark" not in sys.modules:
        return None
    from pyspark.sql import SparkSession

    context = getattr(sys.modules["pyspark"], "SparkContext", None)  # the client of Spark Connect alone has none
    active = SparkSession.getActiveSession()
    if active is None and context is not None and context._active_spark_context is not None:
        active = SparkSession.builder.getOrCreate()
    return active


def master_of(launch: SparkConfig) -> str | None:
    """Return where the tasks run; None if Spark itself is configured (spark-submit, spark-defaults.conf)."""
    if launch.master:
        return launch.master
    if (session := existing()) is not None:
        master: str | None = session.conf.get("spark.master", None)
        return master
    return None if _spark_is_configured() else f"local[{launch.processes or 2}]"


def _spark_is_configured() -> bool:
    folder = os.environ.get("SPARK_CONF_DIR") or os.path.join(os.environ.get("SPARK_HOME", ""), "conf")
    try:
        defaults = Path(folder, "spark-defaults.conf").read_text()
    except OSError:
        defaults = ""
    words = os.environ.get("PYSPARK_SUBMIT_ARGS", "")
    if {"PYSPARK_GATEWAY_PORT", "MASTER"} & os.environ.keys() or "--master" in words or "spark.master" in words:
        return True
    return re.search(r"^\s*spark\.master[\s=:]", defaults, re.MULTILINE) is not None


@contextlib.contextmanager
def session_of(launch: SparkConfig, console: Console) -> Iterator[Any]:
    """Yield the existing session, which stays open, or else a new one that ends with the launch. Raises UserError."""
    from pyspark.sql import SparkSession

    session = existing()
    if session is not None:
        _refuse_without_context(session)
        if launch.master and launch.master != session.sparkContext.master:
            reason = f"a session with another master is active: {session.sparkContext.master}"
            raise UserError(Problem("launch.master", reason, "leave it out", launch.master))
        yield session
        return
    console.stage("starting Spark")
    builder = SparkSession.builder.appName("dstune").config("spark.ui.showConsoleProgress", "false")
    if (master := master_of(launch)) is not None:
        builder = builder.master(master)
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    os.environ.update(SAFE_PATH)  # for the Python that Spark starts for its tasks
    try:
        session = builder.getOrCreate()
    except Exception as error:  # from Java, py4j or pyspark
        reason, fix = f"Spark does not start: {first_line(error)}", "look at its log above"
        raise UserError(Problem("launch.master", reason, fix, str(launch.master))) from None
    try:
        _refuse_without_context(session)
        yield session
    finally:
        with contextlib.suppress(Exception):  # Java may be gone by now, and the run's outcome matters more
            session.stop()


def _refuse_without_context(session: Any) -> None:
    """Raises UserError for a session of Spark Connect."""
    try:
        if session.sparkContext is not None:
            return
    except Exception:  # Spark Connect raises an exception of its own
        pass
    reason = "the session is one of Spark Connect, which shows no tasks and devices"
    raise UserError(
        Problem("launch", reason, "a cluster with dedicated (single user) access, or spark-submit", "spark")
    )


def slots(context: Any) -> int | None:
    """Return how many tasks Spark can run at once now; None if this Spark does not report it."""
    try:
        inner = context._jsc.sc()
        return int(inner.maxNumConcurrentTasks(inner.resourceProfileManager().defaultResourceProfile()))
    except Exception:  # from py4j: another version of Spark, or one that exposes less to Python
        return None


def wait_for_slots(context: Any, requested: int | None, received: Sequence[str]) -> int:
    """Return the number of ranks: `requested`, or as many as Spark can run at once. Spark itself would wait for ten minutes.
    Workers of a new session join one by one, so a number counts once it has not changed for a while; on this machine all slots
    exist at once. Returns early if a signal was received. Raises UserError if there are too few slots."""
    is_local = str(context.master).startswith("local[") or context.master == "local"
    last_count, changed_at = -1, time.monotonic()
    while True:
        slot_count = slots(context)
        if slot_count is None or received:
            cores = int(context.getConf().get("spark.task.cpus", "1"))
            return requested or max(1, context.defaultParallelism // cores)
        if requested is not None and slot_count >= requested:
            return requested
        if slot_count != last_count:
            last_count, changed_at = slot_count, time.monotonic()
        waited = time.monotonic() - changed_at
        if requested is None and slot_count and (is_local or waited > QUIET_SECONDS):
            return slot_count
        if is_local or waited > SLOTS_SECONDS:
            reason = f"Spark has {slot_count} slot{'s' * (slot_count != 1)}, and all ranks have to run at once"
            fix = "fewer ranks, or a larger cluster (spark.cores.max, spark.task.cpus and spark.task.resource.* count too)"
            raise UserError(Problem("launch.processes", reason, fix, str(requested or "")))
        time.sleep(POLL_SECONDS)
