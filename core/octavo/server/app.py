"""The HTTP application, built by a function from its parts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import Response
from starlette.requests import HTTPConnection
from starlette.routing import Match

import octavo
from octavo.errors import PluginError, RequestError
from octavo.hooks import RouteProvider
from octavo.server import errors, openai
from octavo.server.errors import error_response, json_response
from octavo.server.schemas import DetokenizeBody, TokenizeBody
from octavo.server.service import Service


def create_app(service: Service, plugin_routes: Iterable[tuple[str, RouteProvider]] = ()) -> FastAPI:
    """Every route over one served model.

    ``plugin_routes`` are (plugin's name, its routes); they need a key like ours unless they declare that they are open.

    Raises:
        PluginError: a plugin's path is taken.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.bind()
        yield

    app = FastAPI(title="Octavo", version=octavo.__version__, lifespan=lifespan, openapi_url=None)
    errors.install(app)
    if service.config.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(service.config.allowed_origins),
            allow_methods=["*"],
            allow_headers=["*"],
        )
    app.include_router(make_health_router(service))
    app.include_router(openai.make_models_router(service))
    app.include_router(openai.make_router(service))
    app.include_router(make_token_router(service))
    _add_plugin_routes(app, service, plugin_routes)
    return app


def make_health_router(service: Service) -> APIRouter:
    """How the server is; anyone may ask."""
    router = APIRouter()

    @router.get("/health")
    async def health() -> Response:
        dead = service.client.dead
        if dead is not None:
            return error_response(str(dead), 503, code="engine_dead")
        return json_response({"status": "ok"})

    @router.get("/ready")
    async def ready() -> Response:
        if service.draining:
            return error_response("the server is shutting down", 503, code="shutting_down")
        return await health()

    @router.get("/version")
    async def version() -> Response:
        return json_response({"version": octavo.__version__})

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


def make_token_router(service: Service) -> APIRouter:
    """Text to tokens and back."""
    router = APIRouter()

    @router.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        service.principal(request)
        body = service.reader.read(await service.body(request), TokenizeBody)
        service.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise RequestError("give either prompt or messages", param="prompt")
        if body.messages is not None:
            tokens = await asyncio.to_thread(
                service.text.encode_chat, body.messages, add_generation_prompt=body.add_generation_prompt
            )
        else:
            tokens = await asyncio.to_thread(service.text.encode, body.prompt or "", body.add_special_tokens)
        return json_response(
            {"tokens": tokens, "count": len(tokens), "max_model_len": service.client.info.max_model_len}
        )

    @router.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        service.principal(request)
        body = service.reader.read(await service.body(request), DetokenizeBody)
        service.check_model(body.model)
        unknown = [token for token in body.tokens if not 0 <= token < service.text.vocab_size]
        if unknown:
            raise RequestError(f"tokens that are not in the vocabulary: {unknown[:10]}", param="tokens")
        return json_response({"prompt": service.text.decode(body.tokens, skip_special_tokens=False)})

    return router


def _add_plugin_routes(app: FastAPI, service: Service, routes: Iterable[tuple[str, RouteProvider]]) -> None:
    def needs_key(connection: HTTPConnection) -> None:
        service.principal(connection)

    for plugin, provider in routes:
        for route in provider.router.routes:
            path = getattr(route, "path", "")
            if _is_taken(app, path):
                raise PluginError(
                    f"plugin '{plugin}' provides the path {path}, which is taken; to go on without it: "
                    f"--plugins no:{plugin}"
                )
        app.include_router(provider.router, dependencies=[] if provider.open else [Depends(needs_key)])


def _is_taken(app: FastAPI, path: str) -> bool:
    """Whether a request to the path, by any method, reaches a route that is there already."""
    scopes: list[dict[str, Any]] = [
        {"type": kind, "method": "GET", "path": path, "root_path": "", "headers": [], "path_params": {}}
        for kind in ("http", "websocket")
    ]
    return any(route.matches(scope)[0] is not Match.NONE for route in app.routes for scope in scopes)
