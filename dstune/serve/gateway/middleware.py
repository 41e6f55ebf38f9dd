"""Middleware of requests and answers, in plain ASGI.

Starlette's own middleware for hosts, origins and errors answers in another shape and with other status codes; its base class turns
a client's disconnect into an error.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from functools import partial
from typing import TYPE_CHECKING

from starlette.routing import Match

from dstune.core.errors import DstuneError, UserError
from dstune.core.text import visible
from dstune.serve.asgi import App, ClientGone, Receive, Scope, Send
from dstune.serve.engines.base import EngineDown
from dstune.serve.errors import ApiError
from dstune.serve.gateway.request import Request, SlowReader
from dstune.serve.store.keys import ROLES, Caller

if TYPE_CHECKING:
    from dstune.serve.gateway.app import Gateway

log = logging.getLogger("dstune.serve")


class Accounting:
    """Creates the request object, counts the request, and releases its memory. The outermost middleware."""

    def __init__(self, app: App):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gateway: Gateway = scope["app"]
        request = Request(scope, receive, send, gateway.settings, gateway.threads)
        scope["dstune.request"] = request
        gateway.open += 1
        try:
            await self.app(scope, request.receive, request.send)
        finally:
            gateway.open -= 1
            if request.caller is not None and request.held_bytes:
                gateway.admission.release(request.caller, request.held_bytes)
            self._count(gateway, request)

    @staticmethod
    def _count(gateway: Gateway, request: Request) -> None:
        seconds, metrics = time.monotonic() - request.began, gateway.metrics
        metrics.requests.labels(request.label, request.model, str(request.status)).inc()
        metrics.seconds.labels(request.label, request.model).observe(seconds)
        if request.first_byte is not None:
            metrics.first_byte.labels(request.label, request.model).observe(request.first_byte)
        caller = request.caller.name if request.caller is not None else "-"
        log.info(
            "%s %s %s %s key=%s model=%s %.3f s %d bytes",
            request.id, request.method, request.label, request.status, caller, request.model or "-", seconds, request.bytes_sent,
        )  # fmt: skip


class Errors:
    """Sends every error in the API's shape, once."""

    def __init__(self, app: App):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request.from_scope(scope)
        try:
            await self.app(scope, receive, send)
        except ApiError as error:
            await self._fail(request, error)
        except ClientGone:
            request.status = request.status or 499
        except SlowReader:
            request.status = request.status or 499
            raise ConnectionError("the answer was cut") from None  # uvicorn closes the connection
        except UserError as error:
            reasons = "; ".join(f"{problem.where}: {problem.reason}" for problem in error.problems)
            await self._fail(request, ApiError(400, reasons))
        except DstuneError as error:
            await self._fail(request, ApiError(409, visible(str(error))))
        except EngineDown as error:
            later = {"retry-after": "5"}
            await self._fail(request, ApiError(503, visible(str(error)), code="engine_down", headers=later))
        except Exception:
            log.exception("%s: a request failed", request.id)
            await self._fail(request, ApiError(500, "The server failed to answer this request.", code="server_error"))

    @staticmethod
    async def _fail(request: Request, error: ApiError) -> None:
        try:
            await request.fail(error)
        except SlowReader:
            request.status = 499


class CrossOrigin:
    """Lets pages of the sites in `--allow-origin` call the API, and answers the preflight requests of their browsers."""

    def __init__(self, app: App):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request.from_scope(scope)
        is_allowed = request.header("origin").lower() in request.settings.origins
        if is_allowed:
            request.allowed_origin = request.header("origin")
        if request.method == "OPTIONS" and request.header("access-control-request-method"):
            request.label = "preflight"
            await self._answer_preflight(scope, request, is_allowed=is_allowed)
        else:
            await self.app(scope, receive, send)

    @staticmethod
    async def _answer_preflight(scope: Scope, request: Request, *, is_allowed: bool) -> None:
        """Answer a preflight request. Raises ApiError."""
        check_host(request, read_host(request))
        if not is_allowed:
            raise ApiError(403, "Pages of this origin may not call the server.", code="origin_not_allowed")
        methods = allowed_methods(scope)
        if not methods:
            raise ApiError(404, "There is no such route.", code="unknown_url")
        headers = [
            (b"access-control-allow-methods", ", ".join(sorted(methods)).encode()),
            (b"access-control-max-age", b"600"),
        ]
        requested = request.header("access-control-request-headers")
        if re.fullmatch(r"[A-Za-z0-9_-]+(\s*,\s*[A-Za-z0-9_-]+)*", requested):
            headers.append((b"access-control-allow-headers", requested.encode()))
        if request.header("access-control-request-private-network") == "true":
            headers.append((b"access-control-allow-private-network", b"true"))
        await request.send({"type": "http.response.start", "status": 204, "headers": headers})
        await request.send({"type": "http.response.body", "body": b""})


def allowed_methods(scope: Scope) -> set[str]:
    """Return the methods that the request's path accepts."""
    routes = (route for route in scope["app"].routes if route.matches(scope)[0] is not Match.NONE)
    return {route.method for route in routes}


# -- for single routes


class HostCheck:
    """Refuses a host name under which the server does not answer: with DNS rebinding, a page could reach the server under a name of
    its own."""

    def __init__(self, app: App, *, any_host: bool = False):
        self.app, self._any_host = app, any_host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request.from_scope(scope)
        name = read_host(request)
        if not self._any_host:
            check_host(request, name)
        await self.app(scope, receive, send)


class OriginCheck:
    """Refuses requests from pages of other sites, whatever key they carry."""

    def __init__(self, app: App):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request.from_scope(scope)
        origin = request.header("origin").lower()
        if origin or request.header("sec-fetch-site") not in ("", "same-origin", "none"):
            host = request.header("host").lower()
            if origin not in (f"http://{host}", f"https://{host}", *request.settings.origins):
                raise ApiError(403, "Pages of this origin may not call the server.", code="origin_not_allowed")
        await self.app(scope, receive, send)


class Authentication:
    """Finds out whose key a request has, and refuses one that may not call the route or calls too often."""

    def __init__(self, app: App, *, role: str):
        self.app, self._role = app, role

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gateway: Gateway = scope["app"]
        request = Request.from_scope(scope)
        caller = request.caller = await self._authenticate(gateway, request)
        if self._role == "admin" and not caller.admin:
            raise ApiError(403, "This route needs an admin's key.", code="admin_only")
        if self._role in ROLES and not caller.has_role(self._role):
            message = f"This needs a key with the role {self._role}; yours is {caller.role}."
            raise ApiError(403, message, code="role")
        _check_tenant(request, caller)
        request.memory = partial(gateway.admission.hold, caller)
        if self._role != "admin":
            await gateway.admission.check_rate(caller)
        await self.app(scope, receive, send)

    @staticmethod
    async def _authenticate(gateway: Gateway, request: Request) -> Caller:
        kind, _, key = request.header("authorization").partition(" ")
        if kind.lower() != "bearer" or not key.strip():
            raise ApiError(
                401, "The header Authorization: Bearer KEY is missing.", code="missing_api_key",
                headers={"www-authenticate": "Bearer"},
            )  # fmt: skip
        key = key.strip()
        caller = gateway.keys.remembered(key) or await asyncio.to_thread(gateway.keys.find, key)
        if caller is None:
            raise ApiError(401, "There is no such key.", code="invalid_api_key", headers={"www-authenticate": "Bearer"})
        return caller


_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?")


def read_host(request: Request) -> str:
    """Return the requested host, without its port. Raises ApiError if the header is not `NAME` or `NAME:PORT`: proxies and browsers
    would read another host in it."""
    match = _HOST.fullmatch(request.header("host").lower())
    if match is None:
        raise ApiError(400, "The header host is not a name, or a name and a port.", code="invalid_host")
    return match[1]


def check_host(request: Request, name: str) -> None:
    """Raises ApiError if `name` is not a host under which the server answers."""
    if "*" not in request.settings.hosts and name not in request.settings.hosts:
        message = "The server does not answer under this host name: `dstune serve --allow-host NAME`."
        raise ApiError(421, message, code="unknown_host")


def _check_tenant(request: Request, caller: Caller) -> None:
    """Check that the tenant which a request names is the one of its key: a key belongs to one project."""
    for header, caller_value, word in (
        ("openai-organization", caller.organization, "organization"),
        ("openai-project", caller.project, "project"),
    ):
        requested = request.header(header)
        if requested and requested != caller_value:
            message = f"This key is of another {word} than the header {header} names."
            raise ApiError(403, message, code=f"{word}_mismatch")
