"""What wings and plugins add to `dstune serve`: engines that compute answers, and routes with what runs behind them.

Types of the server are `Any` here, since this module is there without it: a `Gateway` is
`dstune.serve.gateway.app.Gateway`, a `Route` stands beside it, an `Engine` is `dstune.serve.engines.base.Engine`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from dstune.core.errors import Problem


class EngineKind:
    """Base of the choices of `dstune serve --engine NAME`; it registers with `@engine`."""

    name: ClassVar[str] = ""
    options: ClassVar[frozenset[str]] = frozenset()
    """Flags that it acts on, of --engine-url, --engine-python, --dtype, --neutral-label, --max-sequences, --max-cached-tokens,
    --threads, and `--` for arguments of its own. The others are refused with it."""
    one_template: ClassVar[bool] = False
    """Whether one chat template serves a base and all its adapters."""

    def check(self, arguments: argparse.Namespace) -> Iterator[Problem]:
        """Yield what is wrong with the options of the command line."""
        yield from ()

    def engine_factory(self, arguments: argparse.Namespace, key: str, **place: Any) -> Callable[..., Any]:
        """Return what makes an `Engine` of a `Source` and the name under which its base is served.

        key: of the server that --engine-url names. place: `state_dir`, `runtime_dir` and `limits` of every engine. Raises
        UserError.
        """
        raise NotImplementedError


class Routes:
    """Base of routes beside those of the models; it registers with `@routes`. There is one object a server.

    A subclass needs `name` and `routes`. The methods are called in the order in which they stand in this file (`help` sorts
    them by name); what they leave out does nothing.
    """

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    """What the line with the server's address says of them; nothing if empty."""
    prefix: ClassVar[str] = "v1"
    """Where they begin, for the printed address of a server without models."""
    flags_without_models: ClassVar[tuple[str, ...]] = ()
    """Options with which the server has no models."""
    closed: ClassVar[Mapping[str, str]] = {}
    """Beginnings of their paths, with the option that opens them."""
    checks_itself: ClassVar[bool] = False
    """Whether `dstune serve --check` has something to check here when there are no models."""

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Add flags to `dstune serve`."""

    def is_served(self, arguments: argparse.Namespace) -> bool:
        """Return whether this server has the routes."""
        return True

    def replaces_models(self, arguments: argparse.Namespace) -> bool:
        """Return whether the server has no models, as `flags_without_models` say."""
        return False

    def options_used(self, arguments: argparse.Namespace) -> Collection[str]:
        """Return the flags of engines that act here too."""
        return ()

    def check(self, arguments: argparse.Namespace) -> Iterator[Problem]:
        """Yield what is wrong with the options. Called whether the routes are served or not."""
        yield from ()

    def run_instead(self, arguments: argparse.Namespace, state: Path) -> int | None:
        """Do something else than to serve, and return the exit code; None to serve. Called whether the routes are served."""
        return None

    def open(self, arguments: argparse.Namespace, state: Path, runtime: Path) -> None:
        """Open what may be refused, before models are loaded, which takes minutes. Raises UserError.

        state: the server's folder. runtime: a folder for sockets, which goes with the server.
        """

    async def before_models(self) -> None:
        """Start processes before the engines start."""

    def notes(self) -> Sequence[str]:
        """Return lines on what was started, for `--check` and the log."""
        return ()

    def routes(self, gateway: Any) -> Sequence[Any]:
        """Return each `Route`. Of two routes of one method and path this one answers, not that of the models."""
        return ()

    def attach(self, gateway: Any) -> None:
        """Connect to a gateway that has all its routes."""

    def on_listening(self) -> None:
        """Start tasks of the event loop: the server answers from now on."""

    async def on_drained(self) -> None:
        """End these tasks: the server answers no more, and its database is still open."""

    async def close(self) -> None:
        """End processes. Called after the engines have ended, whatever was called before."""
