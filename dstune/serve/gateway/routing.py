"""Routes of the gateway: Starlette's, behind the checks that every request passes before its handler."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from starlette import routing
from starlette.convertors import Convertor, register_url_convertor
from starlette.middleware import Middleware

from dstune.serve.asgi import Receive, Scope, Send
from dstune.serve.errors import ApiError
from dstune.serve.gateway.middleware import Authentication, HostCheck, OriginCheck, allowed_methods
from dstune.serve.gateway.request import Request

if TYPE_CHECKING:
    from dstune.serve.gateway.app import Gateway

Handler = Callable[["Gateway", Request], Awaitable[None]]


class _Part(Convertor[str]):
    """One part of a path. No id has a NUL, and PostgreSQL takes none."""

    regex = r"[^/\0]+"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


class _Remainder(_Part):
    """The remainder of a path: names of models have slashes."""

    regex = r"[^\n\0]+"


register_url_convertor("part", _Part())
register_url_convertor("remainder", _Remainder())


class Route(routing.Route):
    """A path that is let through."""

    def __init__(
        self,
        method: str,
        path: str,
        handler: Handler,
        scope: str = "key",
        any_host: bool = False,
        plain_errors: bool = False,
    ):
        """path: `{name}` stands for one part of it, `{name+}` for its remainder. scope: who may call it: `public`, any `key`, one
        that is at least `member` or `owner` of its project, or an `admin`'s. any_host: whether it is called by addresses too
        (probes of Kubernetes). plain_errors: whether clients read the message beside the error, not within it."""
        checks = [Middleware(HostCheck, any_host=any_host), Middleware(OriginCheck)]
        if scope != "public":
            checks.append(Middleware(Authentication, role=scope))
        starlette_path = re.sub(
            r"\{(\w+)(\+?)\}", lambda match: f"{{{match[1]}:{'remainder' if match[2] else 'part'}}}", path
        )
        super().__init__(starlette_path, _Endpoint(handler), methods=[method], middleware=checks)
        self.path, self.method, self.handler = path, method, handler
        self.scope, self.plain_errors = scope, plain_errors
        self.methods = {method}  # without HEAD
        # `$` would match before a final newline too.
        self.path_regex = re.compile(self.path_regex.pattern.removesuffix("$") + r"\Z")

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises ApiError for another method, and what the handler raises."""
        if scope["method"] != self.method:
            allowed = ", ".join(sorted(allowed_methods(scope)))
            raise ApiError(405, "This route has another method.", headers={"allow": allowed})
        request = Request.of(scope)
        request.label, request.plain_errors = self.path, self.plain_errors
        await self.app(scope, receive, send)


class _Endpoint:
    """The handler of a route as an ASGI application: it sends its answer itself, since streams pass as they come."""

    def __init__(self, handler: Handler):
        self.handler = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.handler(scope["app"], Request.of(scope))


async def refuse_unknown_path(scope: Scope, receive: Receive, send: Send) -> None:
    """Raises ApiError, which names the option of `dstune serve` that opens the routes of this beginning where none is open."""
    path = scope["path"]
    hint = ""
    for start, option in scope["app"].closed_paths.items():
        if f"{path}/".startswith(f"{start}/"):
            opened = any(f"{route.path}/".startswith(f"{start}/") for route in scope["app"].routes)
            hint = "" if opened else f" here: `dstune serve {option}` opens it"
            break
    raise ApiError(404, f"There is no such route{hint}.", code="unknown_url")
