"""What a model registry is: a place outside of runs that keeps versions of exports under names, with aliases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

if TYPE_CHECKING:
    from dstune.config.schema import RunConfig


@dataclass(frozen=True)
class Registered:
    """A version of a model in a registry, after a command has made or moved something."""

    name: str
    version: str
    created: bool
    """Whether the version was made now; an equal export was registered before otherwise."""
    alias: str | None
    before: str | None
    """The version that the alias pointed to."""


class ModelRegistry:
    """Base of every model registry, for `dstune export --register NAME:/...`; it registers with `@model_registry`."""

    name: ClassVar[str] = ""
    """The scheme of its addresses."""
    addresses: ClassVar[str] = ""
    """How they look, for messages."""

    def check(self, address: str) -> None:
        """Raise UserError, before any work, where `address` is none of this registry."""
        raise NotImplementedError

    def register(
        self, address: str, export: Path, run_dir: Path, config: RunConfig, message: Callable[[str], None]
    ) -> Registered:
        """Register the folder `export` of the run, and move the alias where `address` names one.

        message: shows a line to the user. Raises UserError, and DstuneError where what was registered is not the export.
        """
        raise NotImplementedError

    def roll_back(self, address: str) -> Registered:
        """Point an alias to the version that it had before it was moved last. Raises UserError."""
        raise NotImplementedError


@runtime_checkable
class ReadsVersions(Protocol):
    """A registry whose versions can be used in place of a path: `model.path`, and the models of `generate`, `predict`, `evaluate`,
    `export` and `serve`."""

    def pin(self, address: str, key: str) -> str:
        """Return the address that always means the version that `address` means now, as `SCHEME:/NAME/VERSION`; one that is pinned
        already as it is, without asking anybody. key: what problems name. Raises UserError."""
        ...

    def origin(self) -> str:
        """Return what tells this registry from another one of the same kind; empty where none is configured."""
        ...

    def fetch(self, pinned: str, folder: Path, key: str) -> None:
        """Write the export that a version is to `folder`, which is not there yet. key: what problems name. Raises UserError."""
        ...
