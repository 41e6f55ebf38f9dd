"""Whether the packages that `tracking` asks for are installed, without importing them."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from dstune.config.convert import shown
from dstune.config.schema import TrackingConfig
from dstune.errors import Problem


def missing(tracking: TrackingConfig) -> Iterator[Problem]:
    """What has to be installed first."""
    if tracking.tensorboard and find_spec("tensorboard") is None:
        fix = "pip install 'dstune[tensorboard]'"
        yield Problem("tracking.tensorboard", "the package tensorboard is not installed", fix, "true")
    uri = tracking.mlflow.uri
    if uri is None:
        return
    if find_spec("mlflow") is None:
        fix = "pip install 'dstune[mlflow]'"
        yield Problem("tracking.mlflow.uri", "the package mlflow is not installed", fix, shown(uri))
    elif uri.startswith(("sqlite", "postgresql", "mysql", "mssql")) and find_spec("sqlalchemy") is None:
        reason = "mlflow-skinny, which is installed, cannot open a database"
        yield Problem("tracking.mlflow.uri", reason, "pip install mlflow, or give a folder", shown(uri))
