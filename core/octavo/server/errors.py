"""Errors in OpenAI's shape, whatever went wrong."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from octavo.errors import EngineDead, RequestError


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}

HEADERS = {
    401: {"WWW-Authenticate": "Bearer"},
    413: {"Connection": "close"},  # whatever else the client wanted to send
    503: {"Retry-After": "1"},
}


def error_body(message: str, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """``{"error": {"message", "type", "param", "code"}}``."""
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_of(error: RequestError | EngineDead) -> dict[str, Any]:
    """The same of an exception."""
    if isinstance(error, EngineDead):
        return error_body(str(error), 503, code="engine_dead")
    return error_body(error.message, error.status, error.param, error.code)


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Encoded by msgspec."""
    return Response(msgspec.json.encode(content), status, headers, "application/json")


def error_response(message: str, status: int, param: str | None = None, code: str | None = None) -> Response:
    """As :func:`error_body`, with the headers that belong to the status."""
    return _with_headers(error_body(message, status, param, code), status)


def _with_headers(body: dict[str, Any], status: int) -> Response:
    return json_response(body, status, HEADERS.get(status))


def install(app: FastAPI) -> None:
    """Answer every exception in this shape."""

    @app.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> Response:
        return _with_headers(error_of(error), error.status)

    @app.exception_handler(EngineDead)
    async def dead(_: Request, error: EngineDead) -> Response:
        return _with_headers(error_of(error), 503)

    @app.exception_handler(ClientGone)
    async def gone(_: Request, __: ClientGone) -> Response:
        return Response(status_code=499)  # nobody reads it

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        what = {
            404: f"there is nothing at {request.url.path}",
            405: f"{request.url.path} does not take {request.method}",
        }
        return error_response(what.get(error.status_code, str(error.detail)), error.status_code)

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> Response:
        return error_response(f"the server failed: {type(error).__name__}", 500)
