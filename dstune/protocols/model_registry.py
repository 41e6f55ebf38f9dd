"""Defines a model registry: a place outside runs that keeps versions of exports under names, with aliases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

if TYPE_CHECKING:
    from dstune.config.schema import RunConfig


@dataclass(frozen=True)
class Registered:
    """A version of a model in a registry, as the result of a command."""

    name: str
    version: str
    created: bool
    """Whether the version is new; if not, an equal export was already registered."""
    alias: str | None
    before: str | None
    """The version that the alias pointed to before."""


class ModelRegistry:
    """Base of every model registry, for `dstune export --register NAME:/...`; it registers with `@model_registry`."""

    name: ClassVar[str] = ""
    """The scheme of its addresses."""
    addresses: ClassVar[str] = ""
    """The form of its addresses, for messages."""

    def check(self, address: str) -> None:
        """Raise UserError if `address` is not a valid address of this registry. Called before any work."""
        raise NotImplementedError

    def register(
        self, address: str, export: Path, run_dir: Path, config: RunConfig, message: Callable[[str], None]
    ) -> Registered:
        """Register the folder `export` of the run, and move the alias if `address` names one.

        message: shows a line to the user. Raises UserError, and DstuneError if the registered files differ from the export.
        """
        raise NotImplementedError

    def roll_back(self, address: str) -> Registered:
        """Move an alias back to the version that it pointed to before its last move. Raises UserError."""
        raise NotImplementedError


@runtime_checkable
class ReadsVersions(Protocol):
    """A registry whose versions can be used instead of a path: `model.path`, and the models of `generate`, `predict`, `evaluate`,
    `export` and `serve`."""

    def pin(self, address: str, key: str) -> str:
        """Return the fixed address `SCHEME:/NAME/VERSION` of the version that `address` stands for now. A fixed address is returned
        unchanged, without contacting the registry. key: the key that problems name. Raises UserError."""
        ...

    def origin(self) -> str:
        """Return an identity that distinguishes this registry from others of the same kind; empty if none is configured."""
        ...

    def fetch(self, pinned: str, folder: Path, key: str) -> None:
        """Download the export of a version to `folder`, which must not exist. key: the key that problems name. Raises UserError."""
        ...
