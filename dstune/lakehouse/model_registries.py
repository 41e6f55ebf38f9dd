"""`models:/NAME[@ALIAS]` and `models:/NAME/VERSION`: the model registry of MLflow, or that of Unity Catalog."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dstune.config.schema import RunConfig
from dstune.lakehouse import fetch_registered, register
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

    def pin(self, address: str, key: str) -> str:
        return fetch_registered.pin(address, key)

    def origin(self) -> str:
        return fetch_registered.origin()

    def fetch(self, pinned: str, folder: Path, key: str) -> None:
        fetch_registered.fetch(pinned, folder, key)
