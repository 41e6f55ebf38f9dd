"""Routes of the gateway: Starlette's routes with the checks that every request passes before its handler."""

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
    """One segment of a path. A NUL is refused: no id has one, and PostgreSQL accepts none."""

    regex = r"[^/\0]+"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


class _Remainder(_Part):
    """The remainder of a path: model names may contain slashes."""

    regex = r"[^\n\0]+"


register_url_convertor("part", _Part())
register_url_convertor("remainder", _Remainder())


class Route(routing.Route):
    """A route and its checks."""

    def __init__(
        self,
        method: str,
        path: str,
        handler: Handler,
        scope: str = "key",
        any_host: bool = False,
        plain_errors: bool = False,
    ):
        """path: `{name}` stands for one segment, `{name+}` for the remainder. scope: who may call it: `public`, any `key`, a key
        with at least the role `member` or `owner` in its project, or an `admin`'s key. any_host: whether it may be called by IP
        address (Kubernetes probes). plain_errors: whether clients read the error's message at the top level, not inside `error`."""
        checks = [Middleware(HostCheck, any_host=any_host), Middleware(OriginCheck)]
        if scope != "public":
            checks.append(Middleware(Authentication, role=scope))
        starlette_path = re.sub(
            r"\{(\w+)(\+?)\}", lambda match: f"{{{match[1]}:{'remainder' if match[2] else 'part'}}}", path
        )
        super().__init__(starlette_path, _Endpoint(handler), methods=[method], middleware=checks)
        self.path, self.method, self.handler = path, method, handler
        self.scope, self.plain_errors = scope, plain_errors
        self.methods = {method}  # without HEAD, which Starlette would add
        # `$` would also match before a final newline.
        self.path_regex = re.compile(self.path_regex.pattern.removesuffix("$") + r"\Z")

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check the request and call its handler. Raises ApiError for another method, and what the handler raises."""
        if scope["method"] != self.method:
            allowed = ", ".join(sorted(allowed_methods(scope)))
            raise ApiError(405, "This route has another method.", headers={"allow": allowed})
        request = Request.from_scope(scope)
        request.label, request.plain_errors = self.path, self.plain_errors
        await self.app(scope, receive, send)


class _Endpoint:
    """A route's handler as an ASGI application; the handler sends its answer itself, so that streams pass through."""

    def __init__(self, handler: Handler):
        self.handler = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.handler(scope["app"], Request.from_scope(scope))


async def refuse_unknown_path(scope: Scope, receive: Receive, send: Send) -> None:
    """Raises ApiError for an unknown path; if routes with this prefix are closed, it names the option of `dstune serve` that opens
    them."""
    path = scope["path"]
    hint = ""
    for start, option in scope["app"].closed_paths.items():
        if f"{path}/".startswith(f"{start}/"):
            opened = any(f"{route.path}/".startswith(f"{start}/") for route in scope["app"].routes)
            hint = "" if opened else f" here: `dstune serve {option}` opens it"
            break
    raise ApiError(404, f"There is no such route{hint}.", code="unknown_url")
