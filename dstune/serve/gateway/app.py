"""The gateway: one table of routes, and what every request has to pass before one of them sees it."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

from dstune.core.errors import DstuneError, UserError
from dstune.core.text import visible
from dstune.serve.asgi import ClientGone, Receive, Scope, Send
from dstune.serve.engines.base import EngineDown
from dstune.serve.errors import ApiError
from dstune.serve.fleet import Fleet
from dstune.serve.gateway.admission import Admission
from dstune.serve.gateway.guarding import Guard
from dstune.serve.gateway.inference import Inference
from dstune.serve.gateway.metrics import Metrics
from dstune.serve.gateway.recording import Recorder
from dstune.serve.gateway.request import Request, SlowReader
from dstune.serve.gateway.settings import Settings
from dstune.serve.store.database import Database
from dstune.serve.store.keys import ROLES, Caller, Keys
from dstune.serve.turns import TurnThreads

log = logging.getLogger("dstune.serve")

Handler = Callable[["Gateway", Request], Awaitable[None]]


@dataclass(frozen=True)
class Route:
    """A path that is let through."""

    method: str
    path: str
    """`{name}` stands for one part of a path, `{name+}` for the rest of it."""
    handler: Handler
    scope: str = "key"
    """Who may call it: `public`, any `key`, one that is at least `member` or `owner` of its project, or an `admin`'s."""
    any_host: bool = False
    """Whether it is called by addresses too (probes of Kubernetes)."""
    plain_errors: bool = False
    """Whether clients read the message beside the error, not within it."""

    @property
    def pattern(self) -> re.Pattern[str]:
        named = re.sub(r"\\{(\w+)\\\+\\}", r"(?P<\1>.+)", re.escape(self.path))
        return re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>[^/]+)", named))


class Gateway:
    """ASGI application."""

    def __init__(
        self,
        fleet: Fleet,
        database: Database,
        settings: Settings,
        recorder: Recorder,
        routes: Iterable[Route] = (),
        *,
        closed: Mapping[str, str] | None = None,
    ):
        """closed: beginnings of paths that a server may have, and the option of `dstune serve` that opens them."""
        self.fleet, self.database, self.settings, self.recorder = fleet, database, settings, recorder
        self.keys = Keys(database)
        self.metrics = Metrics()
        self.admission = Admission(settings, self.metrics, recorder.used)
        self.inference = Inference(fleet, self.admission, self.metrics, recorder)
        self.guard: Guard | None = None
        recorder.written = self._written
        self.routes: list[Route] = []
        self._patterns: list[tuple[re.Pattern[str], Route]] = []
        self._plain: dict[tuple[str, str], Route] = {}
        self.add_routes(routes)
        self._closed_paths = closed or {}
        self._threads = TurnThreads("bodies")
        self.draining = False
        self.open = 0
        """Requests that are not answered yet."""

    @property
    def ready(self) -> bool:
        guarded = self.guard is None or self.guard.is_up
        return self.fleet.ready and guarded and not self.draining

    def add_routes(self, routes: Iterable[Route]) -> None:
        """Of two routes of one method and path the first answers."""
        for route in routes:
            self.routes.append(route)
            self._patterns.append((route.pattern, route))
            if "{" not in route.path:
                self._plain.setdefault((route.method, route.path), route)

    def guard_with(self, guard: Guard) -> None:
        """Let nothing pass that its policies stop."""
        self.guard = self.inference.guard = guard
        guard.counted = lambda what, decision: self.metrics.guarded.labels(what, decision).inc()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        if scope["type"] != "http":  # a websocket is refused by closing it
            await send({"type": "websocket.close", "code": 1008})
            return
        request = Request(scope, receive, send, self.settings, self._threads)
        label, self.open = "none", self.open + 1
        try:
            if self._from_other_site(request):
                request.allowed_origin = request.header("origin")
            if request.method == "OPTIONS" and request.header("access-control-request-method"):
                label = "preflight"
                await self._preflight(request)
                return
            route = self._route(request)
            label, request.plain_errors = route.path, route.plain_errors
            await self._handle(route, request)
        except ApiError as error:
            await self._fail(request, error)
        except (ClientGone, SlowReader, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError):
                raise
            request.status = request.status or 499
            if isinstance(error, SlowReader):
                raise ConnectionError("the answer was cut") from None  # uvicorn closes the connection
        except UserError as error:
            await self._fail(request, ApiError(400, "; ".join(_messages_of(error))))
        except DstuneError as error:
            await self._fail(request, ApiError(409, visible(str(error))))
        except EngineDown as error:
            later = {"retry-after": "5"}
            await self._fail(request, ApiError(503, visible(str(error)), code="engine_down", headers=later))
        except Exception:
            log.exception("%s: a request failed", request.id)
            await self._fail(request, ApiError(500, "The server failed to answer this request.", code="server_error"))
        finally:
            self.open -= 1
            if request.caller is not None and request.held_bytes:
                self.admission.release(request.caller, request.held_bytes)
            self._count(request, label)

    @staticmethod
    async def _fail(request: Request, error: ApiError) -> None:
        try:
            await request.fail(error)
        except SlowReader:
            request.status = 499

    def _count(self, request: Request, label: str) -> None:
        seconds = time.monotonic() - request.began
        self.metrics.requests.labels(label, request.model, str(request.status)).inc()
        self.metrics.seconds.labels(label, request.model).observe(seconds)
        if request.first_byte is not None:
            self.metrics.first_byte.labels(label, request.model).observe(request.first_byte)
        caller = request.caller.name if request.caller is not None else "-"
        log.info(
            "%s %s %s %s key=%s model=%s %.3f s %d bytes",
            request.id, request.method, label, request.status, caller, request.model or "-", seconds, request.sent,
        )  # fmt: skip

    def _written(self, request: Request, tokens: int) -> None:
        self.metrics.tokens.labels(request.model).inc(tokens)
        if request.caller is not None:
            self.admission.charge(request.caller, tokens, recorded=True)

    # -- what every request passes

    def _route(self, request: Request) -> Route:
        """Raises ApiError where there is none."""
        found = self._plain.get((request.method, request.path))
        if found is not None:
            return found
        others = set()
        if "\0" in request.path:  # no id has one, and PostgreSQL takes none
            raise ApiError(404, "There is no such route.", code="unknown_url")
        for pattern, route in self._patterns:
            match = pattern.fullmatch(request.path)
            if match is None:
                continue
            if route.method == request.method:
                request.parameters = match.groupdict()
                return route
            others.add(route.method)
        if others:
            raise ApiError(405, "This route has another method.", headers={"allow": ", ".join(sorted(others))})
        raise ApiError(404, f"There is no such route{self._closed(request.path)}.", code="unknown_url")

    def _closed(self, path: str) -> str:
        """What opens the routes of this beginning, where none of them is open."""
        for start, words in self._closed_paths.items():
            if f"{path}/".startswith(f"{start}/"):
                opened = any(f"{route.path}/".startswith(f"{start}/") for _, route in self._patterns)
                return "" if opened else f" here: `dstune serve {words}` opens it"
        return ""

    async def _handle(self, route: Route, request: Request) -> None:
        name = _host_name(request)
        if not route.any_host:
            self._check_host(name)
        self._check_origin(request)
        if route.scope != "public":
            await self._authenticate(route, request)
        await route.handler(self, request)

    def _check_host(self, name: str) -> None:
        if "*" not in self.settings.hosts and name not in self.settings.hosts:
            raise ApiError(
                421,
                "The server does not answer under this host name: `dstune serve --allow-host NAME`.",
                code="unknown_host",
            )

    def _from_other_site(self, request: Request) -> bool:
        """Whether a page of a site that may call the server asks. Raises ApiError."""
        return request.header("origin").lower() in self.settings.origins

    async def _preflight(self, request: Request) -> None:
        """What a browser asks before a page of another site may send a request. Raises ApiError."""
        self._check_host(_host_name(request))
        if not self._from_other_site(request):
            raise ApiError(403, "Pages of this origin may not call the server.", code="origin_not_allowed")
        methods = {route.method for pattern, route in self._patterns if pattern.fullmatch(request.path)}
        if not methods:
            raise ApiError(404, "There is no such route.", code="unknown_url")
        headers = [
            (b"access-control-allow-methods", ", ".join(sorted(methods)).encode()),
            (b"access-control-max-age", b"600"),
        ]
        named = request.header("access-control-request-headers")
        if re.fullmatch(r"[A-Za-z0-9_-]+(\s*,\s*[A-Za-z0-9_-]+)*", named):
            headers.append((b"access-control-allow-headers", named.encode()))
        if request.header("access-control-request-private-network") == "true":
            headers.append((b"access-control-allow-private-network", b"true"))
        await request.send({"type": "http.response.start", "status": 204, "headers": headers})
        await request.send({"type": "http.response.body", "body": b""})

    def _check_origin(self, request: Request) -> None:
        """A page of another site may not ask, whatever key it has."""
        origin = request.header("origin").lower()
        if not origin and request.header("sec-fetch-site") in ("", "same-origin", "none"):
            return
        host = request.header("host").lower()
        if origin not in (f"http://{host}", f"https://{host}", *self.settings.origins):
            raise ApiError(403, "Pages of this origin may not call the server.", code="origin_not_allowed")

    async def _authenticate(self, route: Route, request: Request) -> None:
        kind, _, key = request.header("authorization").partition(" ")
        if kind.lower() != "bearer" or not key.strip():
            raise ApiError(
                401, "The header Authorization: Bearer KEY is missing.", code="missing_api_key",
                headers={"www-authenticate": "Bearer"},
            )  # fmt: skip
        key = key.strip()
        caller = self.keys.remembered(key) or await asyncio.to_thread(self.keys.find, key)
        if caller is None:
            raise ApiError(401, "There is no such key.", code="invalid_api_key", headers={"www-authenticate": "Bearer"})
        request.caller = caller
        if route.scope == "admin" and not caller.admin:
            raise ApiError(403, "This route needs an admin's key.", code="admin_only")
        if route.scope in ROLES and not caller.has_role(route.scope):
            raise ApiError(403, f"This needs a key with the role {route.scope}; yours is {caller.role}.", code="role")
        _check_tenant(request, caller)
        request.memory = partial(self.admission.hold, caller)
        if route.scope != "admin":
            await self.admission.check_rate(caller)


_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?")


def _host_name(request: Request) -> str:
    """The host that was asked for, without its port. Raises ApiError where the header is not `NAME` or `NAME:PORT`: proxies and
    browsers would read another host in it."""
    match = _HOST.fullmatch(request.header("host").lower())
    if match is None:
        raise ApiError(400, "The header host is not a name, or a name and a port.", code="invalid_host")
    return match[1]


def _check_tenant(request: Request, caller: Caller) -> None:
    """A client may say whom it asks for; a key is of one project, so that it can only agree."""
    for header, own, word in (
        ("openai-organization", caller.organization, "organization"),
        ("openai-project", caller.project, "project"),
    ):
        given = request.header(header)
        if given and given != own:
            raise ApiError(
                403, f"This key is of another {word} than the header {header} names.", code=f"{word}_mismatch"
            )


def _messages_of(error: UserError) -> list[str]:
    return [f"{problem.where}: {problem.reason}" for problem in error.problems]


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return
