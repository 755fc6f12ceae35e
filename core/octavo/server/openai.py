"""OpenAI's routes: chat completions, completions, models."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse

from octavo.errors import EngineDead, RequestError
from octavo.frontend import Collector
from octavo.outputs import Completion, CompletionDelta, Logprob, PositionLogprobs, RequestOutput
from octavo.request import SamplingParams
from octavo.server.errors import error_body, json_response
from octavo.server.schemas import ChatBody, CompletionBody, Sampling, prompts_of, sampling_params
from octavo.server.service import ClientGone, Generation, Service, unless_disconnected

DEFAULT_COMPLETION_TOKENS = 16


def make_router(service: Service) -> APIRouter:
    """The routes that generate; they need a key where keys are configured."""
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        principal = service.principal(request)
        body = service.reader.read(await service.body(request), ChatBody)
        prompt = await asyncio.to_thread(
            service.text.encode_chat,
            body.messages,
            add_generation_prompt=body.add_generation_prompt is not False and not body.continue_final_message,
            continue_final_message=bool(body.continue_final_message),
            chat_template_kwargs=body.chat_template_kwargs,
        )
        params = sampling_params(body, {"max_tokens": None, **service.config.sampling_defaults}, **chat_special(body))
        answer = ChatAnswer(service.check_model(body.model), body, [prompt])
        return await respond(service, request, body, answer, params, principal)

    @router.post("/v1/completions")
    async def completions(request: Request) -> Response:
        principal = service.principal(request)
        body = service.reader.read(await service.body(request), CompletionBody)
        if body.best_of is not None and body.best_of != (body.n or 1):
            raise RequestError("best_of is not served; use n", param="best_of", code="unsupported_parameter")
        prompts = await asyncio.to_thread(encode_prompts, service, prompts_of(body.prompt))
        special: dict[str, Any] = {"logprobs": body.logprobs}
        if body.echo and body.logprobs is not None:
            special["prompt_logprobs"] = body.logprobs
        defaults = {"max_tokens": DEFAULT_COMPLETION_TOKENS, **service.config.sampling_defaults}
        params = sampling_params(body, defaults, **special)
        texts = [service.text.decode(prompt, skip_special_tokens=False) for prompt in prompts] if body.echo else []
        answer = CompletionAnswer(service.check_model(body.model), body, prompts, texts)
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


def chat_special(body: ChatBody) -> dict[str, Any]:
    """The parameters that chat spells in its own way."""
    special: dict[str, Any] = {}
    if body.max_completion_tokens is not None:
        special["max_tokens"] = body.max_completion_tokens
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("top_logprobs is only allowed with logprobs=true", param="top_logprobs")
    if body.logprobs:
        try:
            special["logprobs"] = SamplingParams(logprobs=body.top_logprobs or 0).logprobs
        except RequestError as error:
            raise RequestError(error.message.replace("logprobs", "top_logprobs", 1), param="top_logprobs") from error
    return special


def encode_prompts(service: Service, prompts: Sequence[str | list[int | str]]) -> list[list[int]]:
    """Token ids of each prompt; texts inside a list of ids are encoded where they stand."""
    encoded = []
    for prompt in prompts:
        if isinstance(prompt, str):
            if not prompt:
                raise RequestError("prompt must not be empty", param="prompt")
            encoded.append(service.text.encode(prompt))
            continue
        ids: list[int] = []
        for part in prompt:
            ids += service.text.encode(part, add_special_tokens=False) if isinstance(part, str) else [part]
        encoded.append(ids)
    return encoded


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
    try:
        if not body.stream:
            return json_response(await unless_disconnected(request, collect(generation, answer, params)))
        deltas = generation.deltas()
        # the status is still open until something has come back
        first = await unless_disconnected(request, anext(deltas))
    except ClientGone:
        generation.abort()
        return Response(status_code=499)
    return StreamingResponse(stream(first, deltas, body, answer), media_type="text/event-stream")


async def collect(generation: Generation, answer: Answer, params: SamplingParams) -> dict[str, Any]:
    """The whole answer."""
    collectors = [Collector(prompt, params.n) for prompt in answer.prompts]
    async for prompt, delta in generation.deltas():
        collectors[prompt].push(delta)
    outputs = [collector.result() for collector in collectors]
    for number, output in enumerate(outputs):
        answer.remember(number, output.prompt_logprobs)
    choices = [
        answer.choice(number * params.n + completion.index, number, completion)
        for number, output in enumerate(outputs)
        for completion in output.outputs
    ]
    usage = Usage(answer.prompts)
    for output in outputs:
        usage.num_cached += output.num_cached_tokens
        usage.num_output += sum(len(completion.token_ids) for completion in output.outputs)
    whole = {**answer.head(answer.whole_object), "choices": choices, "usage": usage.content()}
    if params.prompt_logprobs is not None and not answer.echoes:
        whole["prompt_logprobs"] = _prompt_logprobs(outputs)
    return whole


async def stream(
    first: tuple[int, CompletionDelta],
    rest: AsyncIterator[tuple[int, CompletionDelta]],
    body: Sampling,
    answer: Answer,
) -> AsyncIterator[bytes]:
    """Server-sent events: a chunk per delta that has something to say, usage if asked for, and the end mark."""
    options = body.stream_options
    with_usage = options is not None and options.include_usage
    running_usage = with_usage and options is not None and options.continuous_usage_stats
    usage = Usage(answer.prompts)
    head = answer.head(answer.chunk_object)
    n = body.n or 1

    async def all_deltas() -> AsyncIterator[tuple[int, CompletionDelta]]:
        yield first
        async for item in rest:
            yield item

    try:
        async for prompt, delta in all_deltas():
            usage.add(delta)
            answer.remember(prompt, delta.prompt_logprobs)
            for choice in answer.chunks(prompt * n + delta.index, prompt, delta):
                chunk = {**head, "choices": [choice]}
                if with_usage:
                    chunk["usage"] = usage.content() if running_usage else None
                yield _event(chunk)
        if with_usage:
            yield _event({**head, "choices": [], "usage": usage.content()})
    except EngineDead as error:
        yield _event(error_body(str(error), 503, code="engine_dead"))
    yield b"data: [DONE]\n\n"


class Usage:
    """Counts tokens. A prompt counts once, however many samples it has."""

    def __init__(self, prompts: Sequence[Sequence[int]]) -> None:
        self._num_prompt = sum(map(len, prompts))
        self.num_output = 0
        self.num_cached = 0

    def add(self, delta: CompletionDelta) -> None:
        """Count one delta."""
        self.num_output += len(delta.token_ids)
        self.num_cached = max(self.num_cached, delta.num_cached_tokens)

    def content(self) -> dict[str, Any]:
        """OpenAI's ``usage``."""
        return {
            "prompt_tokens": self._num_prompt,
            "completion_tokens": self.num_output,
            "total_tokens": self._num_prompt + self.num_output,
            "prompt_tokens_details": {"cached_tokens": self.num_cached},
        }


class Answer(Protocol):
    """How one endpoint writes what was generated."""

    prompts: list[list[int]]
    whole_object: str
    chunk_object: str
    echoes: bool

    def head(self, kind: str) -> dict[str, Any]:
        """What every piece of this answer begins with."""
        ...

    def remember(self, prompt: int, logprobs: list[PositionLogprobs | None] | None) -> None:
        """A prompt's log-probabilities, known before its first choice is written."""
        ...

    def choice(self, index: int, prompt: int, completion: Completion) -> dict[str, Any]:
        """A whole choice."""
        ...

    def chunks(self, index: int, prompt: int, delta: CompletionDelta) -> list[dict[str, Any]]:
        """The choices of the chunks that a delta becomes: none when it has nothing to say yet."""
        ...


class _AnswerBase:
    echoes = False

    def __init__(self, prefix: str, model: str, body: Sampling, prompts: list[list[int]]) -> None:
        self.prompts = prompts
        self._model = model
        self._id = f"{prefix}-{body.request_id or uuid.uuid4().hex}"
        self._created = int(time.time())
        self._token_ids = bool(body.return_token_ids)
        self._begun: set[int] = set()

    def head(self, kind: str) -> dict[str, Any]:
        """See :class:`Answer`."""
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def remember(self, prompt: int, logprobs: list[PositionLogprobs | None] | None) -> None:
        """See :class:`Answer`; they are of no use where the prompt is not echoed."""

    def _with_ids(self, choice: dict[str, Any], prompt: int, token_ids: list[int], first: bool) -> dict[str, Any]:
        if self._token_ids:
            choice["token_ids"] = token_ids
            if first:
                choice["prompt_token_ids"] = self.prompts[prompt]
        return choice

    def _begins(self, index: int) -> bool:
        """Whether nothing has been sent for this choice before."""
        if index in self._begun:
            return False
        self._begun.add(index)
        return True


class ChatAnswer(_AnswerBase):
    """``chat.completion``."""

    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, model: str, body: ChatBody, prompts: list[list[int]]) -> None:
        super().__init__("chatcmpl", model, body, prompts)

    def choice(self, index: int, prompt: int, completion: Completion) -> dict[str, Any]:
        """See :class:`Answer`."""
        choice = {
            "index": index,
            "message": {"role": "assistant", "content": completion.text, "refusal": None},
            "logprobs": _chat_logprobs(completion.logprobs),
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }
        return self._with_ids(choice, prompt, completion.token_ids, True)

    def chunks(self, index: int, prompt: int, delta: CompletionDelta) -> list[dict[str, Any]]:
        """See :class:`Answer`; the first chunk of a choice says whose turn it is."""
        begins = self._begins(index)
        choices: list[dict[str, Any]] = []
        if begins:
            opening = {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None}
            choices.append(self._with_ids({**opening, "finish_reason": None}, prompt, [], True))
        if delta.text or delta.logprobs or delta.finish_reason or (self._token_ids and delta.token_ids):
            choice = {
                "index": index,
                "delta": {"content": delta.text},
                "logprobs": _chat_logprobs(delta.logprobs),
                "finish_reason": delta.finish_reason,
            }
            if delta.finish_reason is not None:
                choice["stop_reason"] = delta.stop_reason
            choices.append(self._with_ids(choice, prompt, delta.token_ids, False))
        return choices


class CompletionAnswer(_AnswerBase):
    """``text_completion``; ``texts`` are the prompts' texts when they are to be echoed."""

    whole_object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, model: str, body: CompletionBody, prompts: list[list[int]], texts: list[str]) -> None:
        super().__init__("cmpl", model, body, prompts)
        self._texts = texts
        self.echoes = bool(texts)
        self._prompt_logprobs: dict[int, list[PositionLogprobs | None]] = {}
        self._offsets: dict[int, int] = {}

    def choice(self, index: int, prompt: int, completion: Completion) -> dict[str, Any]:
        """See :class:`Answer`."""
        return self._choice(
            index,
            prompt,
            self._echo(prompt) + completion.text,
            completion.token_ids,
            completion.logprobs,
            completion.finish_reason,
            completion.stop_reason,
            True,
        )

    def chunks(self, index: int, prompt: int, delta: CompletionDelta) -> list[dict[str, Any]]:
        """See :class:`Answer`."""
        begins = self._begins(index)
        text = (self._echo(prompt) if begins else "") + delta.text
        if not (text or delta.logprobs or delta.finish_reason or (self._token_ids and delta.token_ids)):
            return []
        return [
            self._choice(
                index, prompt, text, delta.token_ids, delta.logprobs, delta.finish_reason, delta.stop_reason, begins
            )
        ]

    def remember(self, prompt: int, logprobs: list[PositionLogprobs | None] | None) -> None:
        """See :class:`Answer`: they are echoed before the output's."""
        if logprobs is not None:
            self._prompt_logprobs[prompt] = logprobs

    def _echo(self, prompt: int) -> str:
        return self._texts[prompt] if self.echoes else ""

    def _choice(
        self,
        index: int,
        prompt: int,
        text: str,
        token_ids: list[int],
        logprobs: list[PositionLogprobs] | None,
        finish_reason: str | None,
        stop_reason: str | int | None,
        first: bool,
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": index,
            "text": text,
            "logprobs": None,
            "finish_reason": finish_reason,
            "stop_reason": stop_reason,
        }
        if logprobs is not None:
            before: list[PositionLogprobs | None] = self._prompt_logprobs.get(prompt, []) if first else []
            choice["logprobs"] = self._logprobs(index, prompt, before, logprobs)
        return self._with_ids(choice, prompt, token_ids, first)

    def _logprobs(
        self,
        index: int,
        prompt: int,
        before: Sequence[PositionLogprobs | None],
        logprobs: Sequence[PositionLogprobs],
    ) -> dict[str, Any]:
        content: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        offset = self._offsets.get(index, 0)
        for position in [*before, *logprobs]:
            if position is None:  # the prompt's first token has nothing before it
                text = self._texts[prompt][: self._first_length(before, prompt)]
                content["tokens"].append(text)
                content["token_logprobs"].append(None)
                content["top_logprobs"].append(None)
            else:
                text = position.token.text
                content["tokens"].append(text)
                content["token_logprobs"].append(position.token.logprob)
                top = {one.text: one.logprob for one in position.top}
                content["top_logprobs"].append({**top, text: position.token.logprob})
            content["text_offset"].append(offset)
            offset += len(text)
        self._offsets[index] = offset
        return content

    def _first_length(self, before: Sequence[PositionLogprobs | None], prompt: int) -> int:
        """How long the first token's text is: what the others leave of the prompt's."""
        return len(self._texts[prompt]) - sum(len(one.token.text) for one in before if one is not None)


def _chat_logprobs(logprobs: Sequence[PositionLogprobs] | None) -> dict[str, Any] | None:
    if logprobs is None:
        return None

    def entry(one: Logprob) -> dict[str, Any]:
        return {"token": one.text, "logprob": one.logprob, "bytes": list(one.data)}

    content = [{**entry(position.token), "top_logprobs": [entry(one) for one in position.top]} for position in logprobs]
    return {"content": content, "refusal": None}


def _prompt_logprobs(outputs: Sequence[RequestOutput]) -> Any:
    """Per prompt a list over its tokens: null for the first, else token id to what is known of it."""

    def entry(position: PositionLogprobs | None) -> dict[str, Any] | None:
        if position is None:
            return None
        return {
            str(one.token_id): {"logprob": one.logprob, "rank": one.rank, "decoded_token": one.text}
            for one in (*position.top, position.token)
        }

    found = [[entry(position) for position in output.prompt_logprobs or []] for output in outputs]
    return found[0] if len(found) == 1 else found


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(content) + b"\n\n"
