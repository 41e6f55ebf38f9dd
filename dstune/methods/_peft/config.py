"""What every method of peft can be told."""

from __future__ import annotations

from dataclasses import dataclass

from dstune.config.fields import setting
from dstune.protocols.method import MethodConfig


@dataclass(frozen=True)
class AdapterConfig(MethodConfig):
    """What every method of peft has: a few new parameters beside frozen weights."""

    name: str = ""
    adapter: str | None = None
    """Start from this adapter: an export, or a run with one in `export/`. Its own settings replace those not given here."""


@dataclass(frozen=True)
class ModuleAdapterConfig(AdapterConfig):
    """Adapters on modules of the model."""

    target_modules: list[str] = setting(["all-linear"])
    """Module name endings that get an adapter; `all-linear` is every linear layer except the head."""
    modules_to_save: list[str] = setting([])
    """Modules that are trained completely and saved with the adapter (a new classification head always is)."""
