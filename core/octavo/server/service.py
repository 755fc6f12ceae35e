"""What every route shares: the running model, who may use it, and the way from a body to a stream of deltas."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import hmac
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import HTTPConnection
from starlette.types import Receive

import octavo
from octavo.client import EngineClient
from octavo.errors import EngineDead, RequestError
from octavo.frontend import Delivery, Frontend, Sink, call_sinks
from octavo.messages import StepStats
from octavo.outputs import CompletionDelta, RequestSummary
from octavo.request import FinishReason, SamplingParams
from octavo.server.errors import ClientGone
from octavo.server.metrics import Metrics
from octavo.server.schemas import BodyReader
from octavo.text import TextProcessor

T = TypeVar("T")
Arrival = tuple[int, CompletionDelta]
"""The number of a prompt, and what came for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """What the server adds to the engine's configuration."""

    model_names: tuple[str, ...]
    api_keys: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    unknown_fields: str = "refuse"
    prefix_cache_scope: str = "principal"
    max_body_bytes: int = 32 * 2**20
    drain_timeout: float = 30.0
    max_num_waiting: int = 8192
    sampling_defaults: dict[str, Any] = field(default_factory=dict)


class Generation:
    """The samples of one HTTP request: one or more prompts, each with ``n`` samples, as they arrive.

    Lives in the event loop's thread. Whoever has one must :meth:`close` it.
    """

    def __init__(self, frontend: Frontend, num_open: int) -> None:
        self._frontend = frontend
        self._request_ids: list[str] = []
        self._num_open = num_open
        self._arrived: list[Arrival] = []
        self._failure: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._watcher: asyncio.Task[None] | None = None

    def sink(self, prompt: int) -> Sink:
        """Where the deltas of the prompt with that number go."""

        def push(delta: CompletionDelta) -> None:
            if delta.finish_reason is FinishReason.ERROR:
                self._fail(self._reason(delta.error or "the engine failed"))
                return
            self._num_open -= delta.finish_reason is not None
            self._arrived.append((prompt, delta))
            self._wake()

        return push

    def started(self, request_id: str) -> None:
        """A prompt was submitted."""
        self._request_ids.append(request_id)

    def watch(self, receive: Receive) -> None:
        """Notice when the client goes away. Only after the body was read: then nothing else can come from it."""

        async def until_disconnected() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            self._fail(ClientGone())

        self._watcher = asyncio.create_task(until_disconnected())

    async def arrived(self) -> list[Arrival]:
        """(prompt number, delta) of all that has come since the last call, at least one; empty: all samples have ended.

        Raises:
            EngineDead: the engine failed; carries its reason.
            RequestError: the engine refused what it was given.
            ClientGone: the client went away.
        """
        while not self._arrived and self._num_open and self._failure is None:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._failure is not None and not self._arrived:
            raise self._failure
        arrived, self._arrived = self._arrived, []
        return arrived

    def close(self) -> None:
        """Stop whatever still runs."""
        if self._watcher is not None:
            self._watcher.cancel()
        if self._num_open:
            for request_id in self._request_ids:
                self._frontend.abort(request_id)

    def _fail(self, failure: Exception) -> None:
        self._failure = self._failure or failure
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _reason(self, error: str) -> Exception:
        return EngineDead(error) if self._frontend.client.dead is not None else RequestError(error)


class Service:
    """One served model."""

    def __init__(
        self,
        client: EngineClient,
        text: TextProcessor,
        config: ServerConfig,
        *,
        on_finished: Callable[[RequestSummary], None] | None = None,
        on_step: Callable[[StepStats], None] | None = None,
        seed: int | None = None,
    ) -> None:
        self.client = client
        self.text = text
        self.config = config
        self.reader = BodyReader("ignore" if config.unknown_fields == "ignore" else "refuse")
        self.metrics = Metrics(config.model_names[0])
        self.frontend = Frontend(
            client,
            text,
            deliver=self._deliver,
            on_finished=_both(self.metrics.finished, on_finished),
            on_step=_both(self.metrics.step, on_step),
            seed=seed,
        )
        self.draining = False
        self._loop: asyncio.AbstractEventLoop | None = None

    @functools.cached_property
    def fingerprint(self) -> str:
        """OpenAI's ``system_fingerprint``: the same as long as the same request with the same seed gives the same."""
        info = self.client.info
        what = (octavo.__version__, info.model, info.dtype, info.device, info.attention_backend)
        return "octavo-" + hashlib.blake2b(repr(what).encode(), digest_size=6).hexdigest()

    def bind(self) -> None:
        """The running event loop is the one that requests are answered in."""
        self._loop = asyncio.get_running_loop()

    def _deliver(self, deliveries: list[Delivery]) -> None:
        """From the client's thread, once per step: one wake-up of the event loop for all of them."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(call_sinks, deliveries)

    # --- who may do what ---------------------------------------------------------------------------------------------

    def principal(self, request: HTTPConnection) -> bytes:
        """Who sends the request, as a namespace of the prefix cache.

        Raises:
            RequestError: keys are configured and the request carries none of them (status 401).
        """
        keys = self.config.api_keys
        if not keys:
            return b""
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        found = b""
        for key in keys:  # all of them: how long this takes must not tell which one is near
            if hmac.compare_digest(key.encode(), given.encode()):
                found = hashlib.blake2b(key.encode(), digest_size=16).digest()
        if scheme.lower() != "bearer" or not found:
            raise RequestError(
                "missing or wrong API key; send it as 'Authorization: Bearer KEY'", code="invalid_api_key", status=401
            )
        shared = self.config.prefix_cache_scope == "shared" or len(keys) == 1
        return b"" if shared else found

    def salt(self, principal: bytes, narrower: str | None) -> bytes:
        """The prefix cache's namespace: the principal's, divided further by the client's own salt if it has one."""
        if not narrower:
            return principal
        return hashlib.blake2b(narrower.encode(), key=principal, digest_size=16).digest()

    def check_model(self, name: str | None) -> str:
        """The name to answer with; raises RequestError (404) for one that is not served."""
        names = self.config.model_names
        if name is None or name in names:
            return name or names[0]
        raise RequestError(
            f"the model '{name}' is not served here; served: {', '.join(names)}",
            param="model",
            code="model_not_found",
            status=404,
        )

    # --- bodies ------------------------------------------------------------------------------------------------------

    async def body(self, request: Request) -> bytes:
        """The body's bytes.

        Raises:
            RequestError: not JSON by its header (415), or larger than allowed (413).
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise RequestError(f"send 'Content-Type: application/json', not '{kind}'", status=415)
        limit, size, pieces = self.config.max_body_bytes, 0, []
        async for piece in request.stream():
            size += len(piece)
            if size > limit:
                raise RequestError(f"the body is larger than {limit} bytes", status=413, code="body_too_large")
            pieces.append(piece)
        return b"".join(pieces)

    # --- generating --------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        *,
        salt: bytes = b"",
        priority: int = 0,
        request_id: str | None = None,
    ) -> Generation:
        """Submit every prompt; if one is refused, none runs.

        Raises:
            RequestError: a prompt cannot be served, or the server is full or about to stop (503).
            EngineDead: the engine has stopped.
        """
        if self.draining:
            raise RequestError("the server is shutting down", status=503, code="shutting_down")
        self._check_queue(len(prompts) * params.n)
        for prompt in prompts:
            self.frontend.checked(prompt, params)
        generation = Generation(self.frontend, len(prompts) * params.n)
        try:
            for number, prompt in enumerate(prompts):
                name = request_id if request_id is None or len(prompts) == 1 else f"{request_id}-{number}"
                sink = self.metrics.watch(time.monotonic(), generation.sink(number))
                generation.started(
                    self.frontend.submit(prompt, params, sink, request_id=name, salt=salt, priority=priority)
                )
        except (RequestError, EngineDead):
            generation.close()
            raise
        return generation

    def _check_queue(self, num_samples: int) -> None:
        """The one place that limits how much waits: every sequence of the engine was submitted here, so the count is
        exact, whatever the engine has seen of it yet."""
        num_open, num_running = self.frontend.num_open_samples, self.client.info.max_num_seqs
        limit = num_running + self.config.max_num_waiting
        if num_samples > limit:
            raise RequestError(
                f"the request asks for {num_samples} sequences at once, but at most {limit} may run or wait; send "
                f"several requests"
            )
        if num_open + num_samples > limit:
            raise RequestError(
                f"the queue is full: {num_open} sequences run or wait, {num_samples} more are asked for, and at most "
                f"{num_running} may run and {self.config.max_num_waiting} wait; try again later",
                status=503,
                code="queue_full",
            )


def _both(first: Callable[[T], None], second: Callable[[T], None] | None) -> Callable[[T], None]:
    if second is None:
        return first

    def tell(what: T) -> None:
        first(what)
        second(what)

    return tell
