"""Errors in the shape of OpenAI's API."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

KINDS = {
    400: "invalid_request_error",
    401: "invalid_request_error",
    403: "permission_error",
    404: "not_found_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """An error sent to a client: a status, a message, and the field or code that it is about."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        return error_body(self.status, str(self), self.param, self.code)

    def plain(self) -> bytes:
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return json.dumps({"error": self.code or kind, "message": str(self)}).encode()


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> bytes:
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    error: dict[str, Any] = {"message": message, "type": kind, "param": param, "code": code}
    return json.dumps({"error": error}).encode()
