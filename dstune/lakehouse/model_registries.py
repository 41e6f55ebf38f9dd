"""`models:/NAME[@ALIAS]`: the model registry of MLflow, or that of Unity Catalog."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dstune.config.schema import RunConfig
from dstune.lakehouse import register
from dstune.protocols import ModelRegistry, model_registry
from dstune.protocols.model_registry import Registered


@model_registry
class MlflowRegistry(ModelRegistry):
    name = "models"
    addresses = register.ADDRESSES

    def check(self, address: str) -> None:
        register.parse(address)

    def register(
        self, address: str, export: Path, run_dir: Path, config: RunConfig, message: Callable[[str], None]
    ) -> Registered:
        return register.register(address, export, run_dir, config, message)

    def roll_back(self, address: str) -> Registered:
        return register.roll_back(address)
