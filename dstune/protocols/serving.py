"""Defines what wings and plugins add to `dstune serve`: engines that compute answers, and routes with their background work.

Types of the server are `Any` here, since this module must work without it: a `Gateway` is `dstune.serve.gateway.app.Gateway`, a
`Route` is `dstune.serve.gateway.routing.Route`, and an `Engine` is `dstune.serve.engines.base.Engine`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from dstune.core.errors import Problem


class EngineKind:
    """Base of the engines that `dstune serve --engine NAME` can choose. Subclasses register with `@engine`."""

    name: ClassVar[str] = ""
    options: ClassVar[frozenset[str]] = frozenset()
    """Those of the flags --engine-url, --engine-python, --dtype, --neutral-label, --max-sequences, --max-cached-tokens, --threads
    and `--` (arguments for the engine) that it supports. The others are refused with it."""
    one_template: ClassVar[bool] = False
    """Whether one chat template serves a base and all its adapters."""

    def check(self, arguments: argparse.Namespace) -> Iterator[Problem]:
        """Yield what is wrong with the options of the command line."""
        yield from ()

    def engine_factory(self, arguments: argparse.Namespace, key: str, **place: Any) -> Callable[..., Any]:
        """Return the function that creates an `Engine` from a `Source` and the name under which its base is served.

        key: the key for the server that --engine-url names. place: `state_dir`, `runtime_dir` and `limits` of every engine.

        Raises UserError.
        """
        raise NotImplementedError


class Routes:
    """Base of routes in addition to those of the models. Subclasses register with `@routes`; a server has one object of each.

    A subclass needs `name` and `routes`; the defaults of the other members do nothing. The methods are called in the order in which
    they are defined here (`help` sorts them by name).
    """

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    """The text about them in the line with the server's address; empty for none."""
    prefix: ClassVar[str] = "v1"
    """The first part of their paths, for the printed address of a server without models."""
    flags_without_models: ClassVar[tuple[str, ...]] = ()
    """Options that start the server without models."""
    closed: ClassVar[Mapping[str, str]] = {}
    """By the beginning of a path: the option that makes it available."""
    checks_itself: ClassVar[bool] = False
    """Whether `dstune serve --check` checks these routes if the server has no models."""

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Add flags to `dstune serve`."""

    def is_served(self, arguments: argparse.Namespace) -> bool:
        """Return whether the server offers the routes with these options."""
        return True

    def replaces_models(self, arguments: argparse.Namespace) -> bool:
        """Return whether these options start the server without models, by `flags_without_models`."""
        return False

    def options_used(self, arguments: argparse.Namespace) -> Collection[str]:
        """Return the flags of engines that these routes use, too."""
        return ()

    def check(self, arguments: argparse.Namespace) -> Iterator[Problem]:
        """Yield what is wrong with the options. Called even if the routes are not served."""
        yield from ()

    def run_instead(self, arguments: argparse.Namespace, state: Path) -> int | None:
        """Do something instead of serving and return the exit code; None to serve. Called even if the routes are not served."""
        return None

    def open(self, arguments: argparse.Namespace, state: Path, runtime: Path) -> None:
        """Open everything that may fail, before models are loaded for minutes. Raises UserError.

        state: the server's folder. runtime: a folder for sockets, which is deleted when the server ends.
        """

    async def before_models(self) -> None:
        """Start processes before the engines start."""

    def notes(self) -> Sequence[str]:
        """Return lines that say what was started, for `--check` and the log."""
        return ()

    def routes(self, gateway: Any) -> Sequence[Any]:
        """Return all `Route` objects. They take precedence over routes of the models with the same method and path."""
        return ()

    def attach(self, gateway: Any) -> None:
        """Attach to the gateway, which has all its routes by now."""

    def on_listening(self) -> None:
        """Start tasks in the event loop. The server answers requests from now on."""

    async def on_drained(self) -> None:
        """End these tasks. The server no longer answers requests, but its database is still open."""

    async def close(self) -> None:
        """End processes. Called after the engines have ended, even if starting failed."""
