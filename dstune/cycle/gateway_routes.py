"""Serve aliases with `dstune serve --aliases FOLDER`: several versions share the traffic of a name, as a cycle's registry says."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dstune.core.errors import Problem
from dstune.protocols import Routes, routes

if TYPE_CHECKING:
    from dstune.cycle.registry import Registry
    from dstune.serve.gateway.app import Gateway, Route
    from dstune.serve.gateway.request import Request


@routes
class AliasRoutes(Routes):
    name = "aliases"
    closed = dict.fromkeys(("/v1/aliases",), "--aliases FOLDER")

    def __init__(self) -> None:
        self._aliases: Aliases | None = None

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--aliases",
            type=Path,
            metavar="FOLDER",
            help="of `dstune cycle`: its alias is a model whose versions (served as v1, v2, ...) share the requests",
        )

    def is_served(self, arguments: argparse.Namespace) -> bool:
        return arguments.aliases is not None

    def check(self, arguments: argparse.Namespace) -> Iterator[Problem]:
        if arguments.aliases is not None and not (arguments.aliases / "registry.json").is_file():
            yield Problem("--aliases", "no cycle has run here yet", "the `folder` of a cycle", str(arguments.aliases))

    def open(self, arguments: argparse.Namespace, state: Path, runtime: Path) -> None:
        self._aliases = Aliases(arguments.aliases.resolve())

    def routes(self, gateway: Gateway) -> Sequence[Route]:
        from dstune.serve.gateway.app import Route

        return [Route("GET", "/v1/aliases", self._list)]

    def attach(self, gateway: Gateway) -> None:
        assert self._aliases is not None
        gateway.inference.resolve_alias = self._aliases.version
        gateway.metrics.add_collector(DeletedRowsGauge(self._aliases))

    async def _list(self, gateway: Gateway, request: Request) -> None:
        assert self._aliases is not None
        aliases = self._aliases.read().aliases
        visible = [
            {"id": name, "object": "alias", "versions": shares}
            for name, shares in aliases.items()
            if request.key.may_use(name)
        ]
        await request.answer({"object": "list", "data": visible})


class Aliases:
    """The aliases of a registry. The file is read again when it changes, because a person may promote while the server runs."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._changed = -1
        self._registry: Registry | None = None

    def read(self) -> Registry:
        from dstune.cycle.registry import REGISTRY, Registry

        try:
            changed = (self._folder / REGISTRY).stat().st_mtime_ns
        except OSError:
            changed = self._changed
        if self._registry is None or changed != self._changed:
            self._registry, self._changed = Registry.read(self._folder), changed
        return self._registry

    def version(self, alias: str, body: Mapping[str, Any], served: Mapping[str, object]) -> str | None:
        """Return the version that answers a request to `alias`; None if it is not an alias, or none of its versions is served."""
        from dstune.cycle.registry import chosen_version

        shares = self.read().aliases.get(alias)
        return None if shares is None else chosen_version(shares, served, conversation_name(body))


class DeletedRowsGauge:
    """Exports which versions were trained on rows that were deleted since."""

    def __init__(self, aliases: Aliases):
        self._aliases = aliases

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import GaugeMetricFamily

        description = "1 if the version was trained on rows that were deleted since"
        family = GaugeMetricFamily("dstune_version_holds_deleted_rows", description, labels=["version"])
        for name, version in self._aliases.read().versions.items():
            family.add_metric([name], float(bool(version.get("holds_forgotten"))))
        yield family


def conversation_name(body: Mapping[str, Any]) -> str:
    """Return the key that all requests of a user share, or of a conversation if there is no user: they get the same version."""
    user = body.get("user") or body.get("safety_identifier")
    if isinstance(user, str):
        return user
    messages = body.get("messages")
    first = messages[:2] if isinstance(messages, list) else [body.get(name) for name in ("prompt", "input")]
    content = [message for message in first if not (isinstance(message, dict) and message.get("role") == "assistant")]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode("utf-8", "replace")).hexdigest()
