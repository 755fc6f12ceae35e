"""OpenAI's routes: chat completions, completions, models."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from typing import Any, cast

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from octavo.errors import EngineDead, RequestError
from octavo.frontend import Collector
from octavo.outputs import Completion, CompletionDelta
from octavo.request import SamplingParams
from octavo.server.answers import Answer, ChatAnswer, CompletionAnswer, Usage
from octavo.server.errors import ClientGone, error_of, json_response
from octavo.server.schemas import (
    ChatBody,
    CompletionBody,
    Prompt,
    Sampling,
    StreamOptions,
    chat_params,
    completion_params,
    prompts_of,
)
from octavo.server.service import Arrival, Generation, Service
from octavo.text import TextProcessor

DONE = b"data: [DONE]\n\n"


def make_router(service: Service) -> APIRouter:
    """The routes that generate; they need a key where keys are configured."""
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        principal = service.principal(request)
        body = service.reader.read(await service.body(request), ChatBody)
        model = service.check_model(body.model)
        params = chat_params(body, service.config.sampling_defaults)
        prompt = await asyncio.to_thread(
            service.text.encode_chat,
            body.messages,
            add_generation_prompt=body.adds_generation_prompt,
            continue_final_message=bool(body.continue_final_message),
            chat_template_kwargs=body.chat_template_kwargs,
        )
        answer = ChatAnswer(model, service.fingerprint, body, prompt)
        return await respond(service, request, body, answer, params, principal)

    @router.post("/v1/completions")
    async def completions(request: Request) -> Response:
        principal = service.principal(request)
        body = service.reader.read(await service.body(request), CompletionBody)
        model = service.check_model(body.model)
        params = completion_params(body, service.config.sampling_defaults)
        given = prompts_of(body.prompt)
        prompts = await encode_prompts(service.text, given, body.add_special_tokens is not False)
        echoes = await asyncio.to_thread(echoed_texts, service.text, given, prompts) if body.echo else []
        answer = CompletionAnswer(model, service.fingerprint, body, prompts, echoes)
        return await respond(service, request, body, answer, params, principal)

    return router


def make_models_router(service: Service) -> APIRouter:
    """Which models there are; anyone may ask."""
    router = APIRouter()
    created = int(time.time())

    def card(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "octavo",
            "root": service.config.model_names[0],
            "parent": None,
            "max_model_len": service.client.info.max_model_len,
        }

    @router.get("/v1/models")
    async def models() -> Response:
        return json_response({"object": "list", "data": [card(name) for name in service.config.model_names]})

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        return json_response(card(service.check_model(name)))

    return router


async def encode_prompts(text: TextProcessor, prompts: Sequence[Prompt], add_special_tokens: bool) -> list[list[int]]:
    """Token ids of each prompt; texts inside a list of ids are encoded where they stand. In a thread, if any are."""
    if all(isinstance(prompt, list) and set(map(type, prompt)) == {int} for prompt in prompts):
        return cast("list[list[int]]", prompts)
    return await asyncio.to_thread(_encode_prompts, text, prompts, add_special_tokens)


def _encode_prompts(text: TextProcessor, prompts: Sequence[Prompt], add_special_tokens: bool) -> list[list[int]]:
    encoded = []
    for prompt in prompts:
        if isinstance(prompt, str):
            encoded.append(text.encode(prompt, add_special_tokens))
            continue
        ids: list[int] = []
        for part in prompt:
            ids += text.encode(part, add_special_tokens=False) if isinstance(part, str) else [part]
        encoded.append(ids)
    return encoded


def echoed_texts(text: TextProcessor, prompts: Sequence[Prompt], encoded: Sequence[Sequence[int]]) -> list[str]:
    """The prompts as texts: as they were given, token ids decoded."""
    return [
        prompt if isinstance(prompt, str) else text.decode(ids, skip_special_tokens=False)
        for prompt, ids in zip(prompts, encoded, strict=True)
    ]


async def respond(
    service: Service, request: Request, body: Sampling, answer: Answer, params: SamplingParams, principal: bytes
) -> Response:
    """Generate, and answer whole or as a stream."""
    generation = service.generate(
        answer.prompts,
        params,
        salt=service.salt(principal, body.cache_salt),
        priority=body.priority or 0,
        request_id=body.request_id,
    )
    generation.watch(request.receive)
    try:
        if body.stream:
            first = await generation.arrived()  # the status is still open until something has come back
            return EventStream(generation, first, StreamWriter(answer, params.n, body.stream_options))
        whole = await collect(generation, answer, params)
    except BaseException:
        generation.close()
        raise
    generation.close()
    return json_response(whole)


async def collect(generation: Generation, answer: Answer, params: SamplingParams) -> dict[str, Any]:
    """The whole answer."""
    collectors = [Collector(prompt, params.n) for prompt in answer.prompts]
    while arrived := await generation.arrived():
        for prompt, delta in arrived:
            collectors[prompt].push(delta)
    usage = Usage(answer.prompts)
    completions: list[tuple[int, int, Completion]] = []
    for number, collector in enumerate(collectors):
        output = collector.result()
        answer.remember(number, output.prompt_logprobs)
        usage.count(number, sum(len(one.token_ids) for one in output.outputs), output.num_cached_tokens)
        completions += [(number * params.n + one.index, number, one) for one in output.outputs]
    return {**answer.whole(completions), "usage": usage.content()}


class StreamWriter:
    """Deltas to server-sent events: a chunk for each that has something to say, usage if asked for, the end mark.

    Nearly all events of a choice differ in their text alone: what stands around it is written once.
    """

    def __init__(self, answer: Answer, num_samples: int, options: StreamOptions | None) -> None:
        self._answer = answer
        self._num_samples = num_samples
        self._with_usage = options is not None and bool(options.include_usage)
        self._running_usage = options is not None and bool(options.continuous_usage_stats)
        self._usage = Usage(answer.prompts)
        self._frames: dict[int, tuple[bytes, bytes]] = {}  # by choice

    def events(self, arrived: Sequence[Arrival]) -> bytes:
        """What has come, as events; empty when it has nothing to say yet."""
        for prompt, delta in arrived:  # a step's samples may be in any order, and the first one has these for all
            self._answer.remember(prompt, delta.prompt_logprobs)
        return b"".join([self._event(prompt, delta) for prompt, delta in arrived])

    def end(self) -> bytes:
        """The last events."""
        if self._with_usage:
            return _event({**self._answer.empty_chunk(), "usage": self._usage.content()}) + DONE
        return DONE

    def _event(self, prompt: int, delta: CompletionDelta) -> bytes:
        self._usage.count(prompt, len(delta.token_ids), delta.num_cached_tokens)
        index = prompt * self._num_samples + delta.index
        frame = self._frames.get(index)
        if frame is not None and delta.logprobs is None and delta.finish_reason is None:
            return _encode(delta.text).join(frame) if delta.text else b""
        events = self._chunks(index, prompt, delta)
        if frame is None and not self._running_usage and self._answer.differs_in_text_alone(delta):
            mark = uuid.uuid4().hex
            before, after = self._chunks(index, prompt, CompletionDelta(delta.index, mark, [])).split(_encode(mark))
            self._frames[index] = before, after
        return events

    def _chunks(self, index: int, prompt: int, delta: CompletionDelta) -> bytes:
        chunks = self._answer.chunks(index, prompt, delta)
        if self._with_usage:
            for chunk in chunks:
                chunk["usage"] = self._usage.content() if self._running_usage else None
        return b"".join(map(_event, chunks))


class EventStream(Response):
    """Sends what a generation brings as it comes: all that has come since the last time goes out at once.

    After a failure comes an event with the error, then the end mark.
    """

    media_type = "text/event-stream"

    def __init__(self, generation: Generation, first: list[Arrival], writer: StreamWriter) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._generation = generation
        self._first = first
        self._writer = writer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            # a task of its own: to wake it for every token is not to pass through every layer of middleware
            last = await asyncio.create_task(self._send_events(send))
            await send({"type": "http.response.body", "body": last})
        except ClientGone:
            pass  # there is nobody to tell
        finally:
            self._generation.close()

    async def _send_events(self, send: Send) -> bytes:
        arrived = self._first
        try:
            while arrived:
                if data := self._writer.events(arrived):
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                arrived = await self._generation.arrived()
        except (EngineDead, RequestError) as error:
            return _event(error_of(error)) + DONE
        return self._writer.end()


_encode = msgspec.json.Encoder().encode


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + _encode(content) + b"\n\n"
