"""The gateway's ASGI application: a table of routes, and the middleware of every request."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from starlette.middleware import Middleware
from starlette.routing import Router
from starlette.websockets import WebSocketClose

from dstune.serve.asgi import App, Receive, Scope, Send
from dstune.serve.fleet import Fleet
from dstune.serve.gateway.admission import Admission
from dstune.serve.gateway.guarding import Guard
from dstune.serve.gateway.inference import Inference
from dstune.serve.gateway.metrics import Metrics
from dstune.serve.gateway.middleware import Accounting, CrossOrigin, Errors
from dstune.serve.gateway.recording import Recorder
from dstune.serve.gateway.request import Request
from dstune.serve.gateway.routing import Handler as Handler
from dstune.serve.gateway.routing import Route as Route
from dstune.serve.gateway.routing import refuse_unknown_path
from dstune.serve.gateway.settings import Settings
from dstune.serve.store.database import Database
from dstune.serve.store.keys import Keys
from dstune.serve.turns import TurnThreads

LAYERS = (Middleware(Accounting), Middleware(Errors), Middleware(CrossOrigin))
"""Middleware of every request, outermost first; `Route` has that of single routes."""


class Gateway:
    """The gateway's ASGI application."""

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
        """closed: path prefixes of routes that this server has not opened, each with the option of `dstune serve` that opens it."""
        self.fleet, self.database, self.settings, self.recorder = fleet, database, settings, recorder
        self.keys = Keys(database)
        self.metrics = Metrics()
        self.admission = Admission(settings, self.metrics, recorder.used)
        self.inference = Inference(fleet, self.admission, self.metrics, recorder)
        self.guard: Guard | None = None
        recorder.on_recorded = self._count_tokens
        self.routes: list[Route] = []
        self._router = Router(redirect_slashes=False, default=refuse_unknown_path)
        self._app: App = self._router
        for layer, arguments, options in reversed(LAYERS):
            self._app = layer(self._app, *arguments, **options)
        self.add_routes(routes)
        self.closed_paths = closed or {}
        self.threads = TurnThreads("bodies")
        self.draining = False
        self.open = 0
        """Requests that are still being answered."""

    @property
    def ready(self) -> bool:
        guarded = self.guard is None or self.guard.is_up
        return self.fleet.ready and guarded and not self.draining

    def add_routes(self, routes: Iterable[Route]) -> None:
        """Add routes. If two have the same method and path, the first one answers."""
        self.routes += routes
        self._router.routes[:] = self.routes

    def guard_with(self, guard: Guard) -> None:
        """Check requests and answers with the policies of `guard`."""
        self.guard = self.inference.guard = guard
        guard.counted = lambda what, decision: self.metrics.guarded.labels(what, decision).inc()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = self
        if scope["type"] == "http":
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await WebSocketClose(code=1008)(scope, receive, send)
        else:
            await self._router(scope, receive, send)

    def _count_tokens(self, request: Request, tokens: int) -> None:
        self.metrics.tokens.labels(request.model).inc(tokens)
        if request.caller is not None:
            self.admission.charge(request.caller, tokens, recorded=True)
