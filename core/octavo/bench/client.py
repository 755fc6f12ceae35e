"""A lean client for streamed completions: it must cost little beside the server that it measures.

One asyncio protocol for each request, llhttp (``httptools``) for HTTP, msgspec for the events. Every request opens its
own connection, so a connection that the server closed while idle can never be mistaken for a failure, and the time to
connect is part of the time to first token, alike for every server.
"""

from __future__ import annotations

import asyncio
import dataclasses
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast
from urllib.parse import urlsplit

import httptools
import msgspec

from octavo.bench.datasets import BenchRequest
from octavo.bench.metrics import RequestResult
from octavo.errors import ConfigError

Endpoint = Literal["/v1/completions", "/v1/chat/completions"]
PromptType = Literal["text", "tokens"]

MAX_REASON = 200  # characters of a server's error message that are kept as the reason of a failure


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None

    @property
    def text(self) -> str:
        return (self.reasoning_content or "") + (self.content or "")


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _CachedTokens(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int = 0
    prompt_tokens_details: _CachedTokens | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode_event = msgspec.json.Decoder(_Event).decode


@dataclass(frozen=True, slots=True)
class Target:
    """The server that is measured and how it is asked.

    ``base_url`` has the scheme, host and port; a path in it stands before the endpoint. ``extra`` joins every body.

    Raises:
        ConfigError: the address is not http:// or https:// with a host.
    """

    base_url: str
    endpoint: Endpoint = "/v1/completions"
    model: str = ""
    api_key: str | None = None
    ignore_eos: bool = False
    temperature: float = 0.0
    prompt_as: PromptType = "tokens"
    timeout: float = 3600.0  # seconds for one request
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"base url '{self.base_url}' must look like http://HOST:PORT")
        if self.endpoint == "/v1/chat/completions" and self.prompt_as == "tokens":
            raise ConfigError("the chat endpoint takes no token ids; use --prompt-type text with --tokenizer")

    def address(self) -> tuple[str, int, ssl.SSLContext | None]:
        """Host, port and what TLS needs."""
        parts = urlsplit(self.base_url)
        assert parts.hostname is not None
        if parts.scheme == "https":
            return parts.hostname, parts.port or 443, ssl.create_default_context()
        return parts.hostname, parts.port or 80, None

    def http_request(self, method: str, path: str, body: bytes = b"") -> bytes:
        """A whole HTTP request."""
        parts = urlsplit(self.base_url)
        head = [f"{method} {parts.path.rstrip('/')}{path} HTTP/1.1", f"Host: {parts.netloc}", "Connection: close"]
        if self.api_key:
            head.append(f"Authorization: Bearer {self.api_key}")
        if body:
            head += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        return "\r\n".join([*head, "", ""]).encode() + body

    def completion(self, request: BenchRequest) -> bytes:
        """The HTTP request for one prompt."""
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": request.num_output_tokens,
            "temperature": self.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        prompt = request.text if self.prompt_as == "text" else request.token_ids
        if self.endpoint == "/v1/chat/completions":
            body["messages"] = [{"role": "user", "content": prompt}]
        else:
            body["prompt"] = prompt
        if self.ignore_eos:
            body["ignore_eos"] = True
        return self.http_request("POST", self.endpoint, msgspec.json.encode(body | dict(self.extra)))


class _Connection(asyncio.Protocol):
    """Sends one HTTP request and hands on the answer's body as it arrives; ``ended`` holds what went wrong or None."""

    def __init__(self, request: bytes, on_data: Callable[[bytes, float], None]) -> None:
        self.status = 0
        self.ended: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self._request = request
        self._on_data = on_data
        self._arrived = 0.0
        self._parser = httptools.HttpResponseParser(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._arrived = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(f"broken HTTP: {error}")

    def connection_lost(self, error: Exception | None) -> None:
        self._end(f"disconnected: {type(error).__name__}" if error else "disconnected before the answer was complete")

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self._on_data(body, self._arrived)

    def on_message_complete(self) -> None:
        self._end(None)

    def _end(self, problem: str | None) -> None:
        if not self.ended.done():
            self.ended.set_result(problem)
        self._transport.close()


class _Answer:
    """Takes a streamed answer apart: server-sent events into a RequestResult."""

    def __init__(self, result: RequestResult) -> None:
        self.result = result
        self.body = bytearray()  # all of it, for the message of an error
        self.complete = False  # the server said that this is the end
        self.error: str | None = None
        self._line = b""
        self._text: list[str] = []

    def feed(self, data: bytes, now: float) -> None:
        """More of the body, arrived at ``now``."""
        if not self.result.chunk_times and len(self.body) < 65536:
            self.body += data
        *lines, self._line = (self._line + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:].strip(), now)

    def text(self) -> str:
        return "".join(self._text)

    def _event(self, data: bytes, now: float) -> None:
        if data == b"[DONE]":
            self.complete = True
            return
        try:
            event = _decode_event(data)
        except msgspec.MsgspecError as error:
            self.error = self.error or f"unreadable event: {error}"
            return
        if event.error is not None:
            self.error = self.error or f"error in the stream: {_message(event.error)}"
        for choice in event.choices:
            self._choice(choice, now)
        if event.usage is not None:
            self.result.num_prompt_tokens = event.usage.prompt_tokens
            self.result.num_output_tokens = event.usage.completion_tokens
            self.result.counted_by_server = True
            if event.usage.prompt_tokens_details is not None:
                self.result.num_cached_tokens = event.usage.prompt_tokens_details.cached_tokens or 0

    def _choice(self, choice: _Choice, now: float) -> None:
        text = choice.text or (choice.delta.text if choice.delta else "")
        if choice.finish_reason is not None:
            self.result.finish_reason = choice.finish_reason
            self.complete = True
        # the opening chunk of a chat (role only) and a closing one (reason only) carry no output
        if text or (choice.text is not None and choice.finish_reason is None):
            self.result.chunk_times.append(now)
            self._text.append(text)


async def complete(target: Target, http_request: bytes, num_prompt_tokens: int) -> RequestResult:
    """Send one request made by :meth:`Target.completion` and observe its answer. Never raises for what a server or
    the network does: that is the result's ``error``."""
    result = RequestResult(num_prompt_tokens, sent_at=time.perf_counter())
    answer = _Answer(result)
    status, problem = await _exchange(target, http_request, answer.feed)
    result.ended_at = time.perf_counter()
    result.text = answer.text()
    if not result.counted_by_server:
        result.num_output_tokens = len(result.chunk_times)
    result.error = _failure(status, problem, answer)
    return result


def _failure(status: int, problem: str | None, answer: _Answer) -> str | None:
    """Why the request counts as failed; None: it completed."""
    if status and status != 200:
        return f"HTTP {status}: {_message(bytes(answer.body))}"
    if answer.error is not None:
        return answer.error
    if problem is not None and not answer.complete:
        return problem
    if not answer.complete:
        return "the stream ended without a finish reason"
    if not answer.result.chunk_times:
        return "the answer holds no output"
    return None


async def get_json(target: Target, path: str) -> Any:
    """GET ``path`` and decode it.

    Raises:
        ConfigError: the server cannot be reached, refuses, or does not answer with JSON.
    """
    body = bytearray()
    url = target.base_url.rstrip("/") + path
    status, problem = await _exchange(target, target.http_request("GET", path), lambda data, _: body.extend(data))
    if status != 200:
        raise ConfigError(f"{url}: {problem or f'HTTP {status}: {_message(bytes(body))}'}")
    try:
        return msgspec.json.decode(body)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{url} does not answer with JSON: {error}") from error


async def first_model(target: Target) -> Target:
    """The target with the first model that the server offers.

    Raises:
        ConfigError: the server cannot be asked or offers none.
    """
    answer = await get_json(target, "/v1/models")
    try:
        return dataclasses.replace(target, model=str(answer["data"][0]["id"]))
    except (KeyError, IndexError, TypeError) as error:
        raise ConfigError(f"{target.base_url} offers no model at /v1/models; name one with --model") from error


async def _exchange(
    target: Target, http_request: bytes, on_data: Callable[[bytes, float], None]
) -> tuple[int, str | None]:
    """Status (0: none came) and what went wrong on the way (None: the answer is whole)."""
    host, port, tls = target.address()
    connection: _Connection | None = None
    try:
        async with asyncio.timeout(target.timeout):
            loop = asyncio.get_running_loop()
            transport, connection = await loop.create_connection(
                lambda: _Connection(http_request, on_data), host, port, ssl=tls
            )
            try:
                problem = await connection.ended
            finally:
                transport.close()
            return connection.status, problem
    except TimeoutError:
        return connection.status if connection else 0, f"no complete answer within {target.timeout:g} s"
    except OSError as error:
        return 0, f"cannot connect: {error.strerror or error}"


def _message(error: Any) -> str:
    """The text of an error in OpenAI's shape, or whatever it is, shortened."""
    if isinstance(error, bytes):
        try:
            error = msgspec.json.decode(error)
        except msgspec.DecodeError:
            error = error.decode(errors="replace")
    while isinstance(error, dict) and ("error" in error or "message" in error):
        error = error.get("error", error.get("message"))
    return " ".join(str(error).split())[:MAX_REASON]


async def drive(
    target: Target,
    requests: Sequence[BenchRequest],
    arrivals: Sequence[float],
    *,
    max_concurrency: int | None = None,
    on_finished: Callable[[RequestResult], None] = lambda result: None,
) -> tuple[list[RequestResult], float]:
    """Send every request at its time of arrival, at most ``max_concurrency`` at once; results in the requests' order
    and the seconds from start to end. A request that waits for its turn is not sent yet: its clock does not run."""
    bodies = [target.completion(request) for request in requests]
    turns = asyncio.Semaphore(max_concurrency or max(1, len(requests)))

    async def one(request: BenchRequest, body: bytes) -> RequestResult:
        async with turns:
            result = await complete(target, body, request.num_prompt_tokens)
        on_finished(result)
        return result

    start = time.perf_counter()
    tasks = []
    for request, body, arrival in zip(requests, bodies, arrivals, strict=True):
        delay = start + arrival - time.perf_counter()
        if delay > 0.0:
            await asyncio.sleep(delay)
        tasks.append(asyncio.create_task(one(request, body)))
    results = list(await asyncio.gather(*tasks))
    return results, time.perf_counter() - start


def run_loop(main: Any) -> Any:
    """Run a coroutine on uvloop where it exists, else on asyncio's own loop."""
    try:
        import uvloop
    except ImportError:  # not on Windows
        return asyncio.run(main)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)
