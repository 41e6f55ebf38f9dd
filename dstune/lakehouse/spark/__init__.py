"""launch=spark: ranks in the tasks of a barrier stage, wherever Spark runs: local, standalone, Databricks. `session.py` finds or
starts Spark, `stage.py` is the driver's side, `task.py` runs in each task. The result of a stage is not trusted: tasks report how
their ranks ended, and if one cannot, the run directory does."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from dstune.core.errors import Problem, UserError
from dstune.lakehouse.spark.config import SparkConfig
from dstune.protocols import Launcher, launcher
from dstune.protocols.launcher import FAIL, PASS, SKIP, Check, LaunchRequest

EXTRA = "pip install '.[spark]' in a clone of dstune (and a Java runtime, 17 or 21)"


@launcher
class Spark(Launcher):
    Config = SparkConfig
    config: SparkConfig

    @property
    def ranks(self) -> int | None:
        return self.config.processes

    @property
    def on_this_machine(self) -> bool:
        from dstune.lakehouse.spark.session import master_of

        return (master_of(self.config) or "").startswith("local")

    @property
    def shared_folder(self) -> bool:
        return not self.on_this_machine

    def start(self, request: LaunchRequest) -> int:
        if find_spec("pyspark") is None:
            raise UserError(Problem("launch", "the package pyspark is not installed", EXTRA, "spark"))
        from dstune.lakehouse.spark import stage

        return stage.run(request.run, request.run_dir, self.config, request.console, request.command)

    @classmethod
    def probe(cls, *, needed: bool) -> Iterator[Check]:
        import os
        import shutil

        absent = FAIL if needed else SKIP
        if find_spec("pyspark") is None:
            yield Check("spark", absent, "the package pyspark is not installed", EXTRA)
        elif shutil.which("java") is None and "JAVA_HOME" not in os.environ:
            yield Check("spark", absent, "there is no Java runtime", "Debian: apt-get install openjdk-17-jre-headless")
        else:
            from importlib.metadata import version

            yield Check(
                "spark", PASS, f"pyspark {version('pyspark')}; never run on Databricks itself, see docs/databricks.md"
            )

    def to_measure(self) -> None:
        return None
