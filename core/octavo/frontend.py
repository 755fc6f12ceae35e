"""The API side of a request: checks it, submits it, and turns the engine's tokens back into text for whoever waits.

Shared by the offline ``LLM`` and by the server. A token and its text travel together: in every delta the texts of the
tokens' log-probabilities joined are the delta's text, whatever is held back for stop strings or unfinished characters.
"""

from __future__ import annotations

import random
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import msgspec

from octavo.errors import EngineDead, RequestError
from octavo.messages import SequenceOutput, StepOutputs, StepStats, Submit, Timing, TokenLogprobs
from octavo.outputs import Completion, CompletionDelta, Logprob, PositionLogprobs, RequestOutput, RequestSummary
from octavo.request import FinishReason, SamplingParams
from octavo.text import Detokenizer, StopStrings, TextProcessor

if TYPE_CHECKING:
    from octavo.client import EngineClient

Sink = Callable[[CompletionDelta], None]
Delivery = tuple[Sink, CompletionDelta]

MAX_DRAWN_SEED = 2**63 - 128  # sample i uses seed + i, and n is at most 128


class Frontend:
    """Submits requests and delivers what becomes of them.

    Args:
        client: the engine's client; :meth:`start` starts it with this object as its listener.
        text: the model's tokenizer.
        deliver: takes the deltas of one step, each with its sink; default: each sink is called in the client's
            thread. A server passes one that hands the whole list to its event loop at once.
        on_finished: told once of every request that ended, in whatever thread noticed.
        on_step: told of every step's gauges, in the client's thread.
        seed: where the seeds come from of requests that bring none: the same requests in the same order then give the
            same tokens. None: from the system's entropy.
    """

    def __init__(
        self,
        client: EngineClient,
        text: TextProcessor,
        *,
        deliver: Callable[[list[Delivery]], None] | None = None,
        on_finished: Callable[[RequestSummary], None] | None = None,
        on_step: Callable[[StepStats], None] | None = None,
        seed: int | None = None,
    ) -> None:
        self.client = client
        self.text = text
        self._deliver = deliver or call_sinks
        self._eos_token_ids = sorted(text.eos_token_ids)
        self._on_finished = on_finished
        self._on_step = on_step
        self._seeds = random.SystemRandom() if seed is None else random.Random(seed)
        self._lock = threading.Lock()  # guards the two fields below, never held while anything else is called
        self._open: dict[str, _OpenRequest] = {}
        self._dead: EngineDead | None = None

    def start(self) -> None:
        """Start the client and listen to it; returns when the engine is ready."""
        self.client.start(self.handle_outputs, self.handle_death)

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return len(self._open)

    @property
    def num_open_samples(self) -> int:
        """Samples of requests that have not ended: what the engine runs or keeps waiting."""
        return sum(request.num_unfinished for request in list(self._open.values()))

    # --- from any thread ---------------------------------------------------------------------------------------------

    def submit(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        sink: Sink,
        *,
        request_id: str | None = None,
        salt: bytes = b"",
        priority: int = 0,
    ) -> str:
        """Start a request; ``sink`` gets its deltas, the last one of each sample with a finish reason.

        Returns the request's id.

        Raises:
            RequestError: the request cannot be served as it is; nothing was started.
            EngineDead: the engine has stopped.
        """
        prompt = list(prompt_token_ids)
        only_scores = params.max_tokens == 0
        params = self.checked(prompt, params)
        request_id = request_id or uuid.uuid4().hex
        submit = Submit(
            request_id=request_id,
            prompt=prompt,
            params=params,
            seed=self._seeds.randrange(MAX_DRAWN_SEED) if params.seed is None else params.seed,
            eos_token_ids=self._eos_token_ids,
            bad_token_ids=self.text.bad_token_ids(params.bad_words),
            salt=salt,
            priority=priority,
            arrival=time.monotonic(),
        )
        request = _OpenRequest(submit, self.text, sink, only_scores)
        with self._lock:
            if self._dead is not None:
                raise EngineDead(str(self._dead))
            if request_id in self._open:
                raise RequestError(f"a request with the id '{request_id}' is running already", param="request_id")
            self._open[request_id] = request
        try:
            self.client.submit(submit)
        except (RequestError, EngineDead):
            self._forget(request_id)
            raise
        return request_id

    def abort(self, request_id: str) -> None:
        """Stop a request; unknown and finished ones are ignored.

        The engine confirms: until then deltas may still come, and each sample's last one says FinishReason.ABORT.
        """
        if request_id in self._open:
            self.client.abort(request_id)

    def abort_all(self) -> None:
        """Stop every request that is open."""
        for request_id in list(self._open):
            self.client.abort(request_id)

    def checked(self, prompt: Sequence[int], params: SamplingParams) -> SamplingParams:
        """The parameters with ``max_tokens`` settled: at least one, since every request ends with a sampled token.

        Raises:
            RequestError: the request is one that the engine must never see; names the field and the limit.
        """
        vocab_size, max_model_len = self.client.info.vocab_size, self.client.info.max_model_len
        if not prompt:
            raise RequestError("the prompt is empty; it must hold at least one token", param="prompt")
        _require_tokens("the prompt", prompt, vocab_size, "prompt")
        _require_tokens("logit_bias", params.logit_bias or (), vocab_size, "logit_bias")
        _require_tokens("allowed_token_ids", params.allowed_token_ids or (), vocab_size, "allowed_token_ids")
        _require_tokens("stop_token_ids", params.stop_token_ids, vocab_size, "stop_token_ids")
        room = max_model_len - len(prompt)
        if room < 1:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens, but the context holds {max_model_len} and at least one must be "
                f"left for the answer; shorten the prompt",
                param="prompt",
                code="context_length_exceeded",
            )
        if params.max_tokens is None:
            return params.replace(max_tokens=room)
        if params.max_tokens == 0:
            return params.replace(max_tokens=1)
        if params.max_tokens > room:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens and max_tokens asks for {params.max_tokens} more, but the "
                f"context holds {max_model_len}; shorten the prompt or set max_tokens to at most {room}",
                param="max_tokens",
                code="context_length_exceeded",
            )
        return params

    # --- from the client's thread ------------------------------------------------------------------------------------

    def handle_outputs(self, outputs: StepOutputs) -> None:
        """What one step produced."""
        deliveries: list[Delivery] = []
        summaries: list[RequestSummary] = []
        for output in outputs.sequences:
            request = self._open.get(output.request_id)
            if request is None or output.index in request.finished:
                continue  # aborted, or stopped by a stop string, while this step was in flight
            delta = request.push(output)
            if delta is None:
                continue
            deliveries.append((request.sink, delta))
            if delta.finish_reason is None:
                continue
            if output.finish_reason is None:  # the engine does not know of stop strings
                self.client.abort(output.request_id, output.index)
            if request.done and self._forget(output.request_id) is not None:
                summaries.append(request.summary(delta.finish_reason, time.monotonic()))
        if deliveries:
            self._deliver(deliveries)
        for summary in summaries:
            self._report(summary)
        if self._on_step is not None:
            self._on_step(outputs.stats)

    def handle_death(self, error: EngineDead) -> None:
        """The engine is gone: every open request ends with an error that carries the cause."""
        with self._lock:
            self._dead = error
            requests = list(self._open.values())
            self._open.clear()
        deliveries = [(request.sink, delta) for request in requests for delta in request.fail(str(error))]
        if deliveries:
            self._deliver(deliveries)
        for request in requests:
            self._report(request.summary(FinishReason.ERROR, time.monotonic()))

    # --- inside ------------------------------------------------------------------------------------------------------

    def _forget(self, request_id: str) -> _OpenRequest | None:
        with self._lock:
            return self._open.pop(request_id, None)

    def _report(self, summary: RequestSummary) -> None:
        if self._on_finished is not None:
            self._on_finished(summary)


def call_sinks(deliveries: list[Delivery]) -> None:
    """Hand each delta to its sink."""
    for sink, delta in deliveries:
        sink(delta)


def _require_tokens(what: str, token_ids: Iterable[int], vocab_size: int, param: str) -> None:
    ids = set(token_ids)
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        unknown = sorted(token_id for token_id in ids if not 0 <= token_id < vocab_size)
        raise RequestError(
            f"{what} names tokens that are not in the vocabulary (0 to {vocab_size - 1}): "
            f"{', '.join(map(str, unknown))}",
            param=param,
        )


class _OpenRequest:
    """A request that has not ended, with the text of its samples."""

    __slots__ = (
        "_only_scores",
        "_submit",
        "_text",
        "finished",
        "num_cached",
        "num_output",
        "samples",
        "sink",
        "timing",
    )

    def __init__(self, submit: Submit, text: TextProcessor, sink: Sink, only_scores: bool) -> None:
        self._submit = submit
        self._only_scores = only_scores  # nobody asked for the token that the engine samples
        self._text = text
        self.sink = sink
        self.samples = [_Sample(index, submit, text) for index in range(submit.params.n)]
        self.finished: set[int] = set()
        self.num_cached = 0
        self.num_output = 0
        self.timing: Timing | None = None

    @property
    def num_unfinished(self) -> int:
        return len(self.samples) - len(self.finished)

    @property
    def done(self) -> bool:
        return self.num_unfinished == 0

    def push(self, output: SequenceOutput) -> CompletionDelta | None:
        """What a step brought to one sample; None when there is nothing to tell yet."""
        if output.num_cached_tokens:
            self.num_cached = output.num_cached_tokens
        if self._only_scores:
            output = _without_tokens(output)
        prompt_logprobs = None if output.prompt_logprobs is None else self._prompt_logprobs(output.prompt_logprobs)
        delta = self.samples[output.index].push(output, prompt_logprobs)
        if delta is None:
            return None
        self.num_output += len(delta.token_ids)
        if delta.finish_reason is not None:
            self.finished.add(output.index)
            self.timing = delta.timing
        return delta

    def fail(self, error: str) -> list[CompletionDelta]:
        """The last deltas of all samples that are still open."""
        return [
            CompletionDelta(sample.index, "", [], finish_reason=FinishReason.ERROR, error=error)
            for sample in self.samples
            if sample.index not in self.finished
        ]

    def summary(self, reason: FinishReason, now: float) -> RequestSummary:
        submit = self._submit
        timing = self.timing
        if timing is None:
            timing = next((found for sample in self.samples if (found := sample.measured(now)) is not None), None)
        return RequestSummary(submit.request_id, len(submit.prompt), self.num_cached, self.num_output, reason, timing)

    def _prompt_logprobs(self, logprobs: list[TokenLogprobs | None]) -> list[PositionLogprobs | None]:
        pieces = Detokenizer(self._text, skip_special_tokens=False)
        texts = [pieces.push((token_id,)) for token_id in self._submit.prompt]
        return [
            None if found is None else _position(found, text, self._text)
            for found, text in zip(logprobs, texts, strict=True)
        ]


def _without_tokens(output: SequenceOutput) -> SequenceOutput:
    reason = FinishReason.LENGTH if output.finish_reason is FinishReason.STOP else output.finish_reason
    return msgspec.structs.replace(output, token_ids=[], logprobs=None, stop_token_id=None, finish_reason=reason)


class _Sample:
    """One sample of a request: decodes its tokens and looks for stop strings.

    ``_waiting`` holds the tokens whose text is not free to go yet, ``_credit`` counts the characters that are free but
    whose token still has some that are not.
    """

    __slots__ = (
        "_credit",
        "_detokenizer",
        "_num_tokens",
        "_params",
        "_stops",
        "_text",
        "_timing",
        "_waiting",
        "index",
    )

    def __init__(self, index: int, submit: Submit, text: TextProcessor) -> None:
        params = submit.params
        self.index = index
        self._timing: Timing | None = None  # what the engine has said of it so far
        self._params = params
        self._text = text
        self._detokenizer = Detokenizer(text, params.skip_special_tokens)
        self._stops = StopStrings(params.stop, params.include_stop_str_in_output) if params.stop else None
        self._waiting: list[tuple[int, str, TokenLogprobs | None]] = []
        self._credit = 0
        self._num_tokens = 0

    def push(
        self, output: SequenceOutput, prompt_logprobs: list[PositionLogprobs | None] | None
    ) -> CompletionDelta | None:
        """See :meth:`_OpenRequest.push`."""
        if output.timing is not None:
            self._timing = output.timing
        if self._stops is None and output.finish_reason is None and output.logprobs is None and output.token_ids:
            # most deltas of all: nothing is held back, nothing ends
            text = self._detokenizer.push(output.token_ids)
            return CompletionDelta(
                self.index,
                text,
                output.token_ids,
                prompt_logprobs=prompt_logprobs,
                num_cached_tokens=output.num_cached_tokens,
            )
        reason = output.finish_reason
        stop_reason: str | int | None = output.stop_token_id
        if self._stops is None and output.logprobs is None:  # nothing is ever held back
            text, token_ids, logprobs = self._decode_all(output), output.token_ids, None
        else:
            matched = self._take(output)
            if matched is not None:
                reason, stop_reason = FinishReason.STOP, matched
            text, token_ids, logprobs = self._release(everything=reason is not None)
        if not token_ids and not text and reason is None and prompt_logprobs is None:
            return None
        return CompletionDelta(
            index=self.index,
            text=text,
            token_ids=token_ids,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            finish_reason=reason,
            stop_reason=stop_reason if reason is not None else None,
            num_cached_tokens=output.num_cached_tokens,
            timing=self.measured(time.monotonic()) if reason is not None else None,
            error=output.error,
        )

    def measured(self, now: float) -> Timing | None:
        """The engine's times. A sample that ends here (a stop string, a dead engine) ends ``now``; None: the engine
        has not said anything of it."""
        if self._timing is None or self._timing.finished:
            return self._timing
        return msgspec.structs.replace(self._timing, finished=now)

    def _num_shown(self, output: SequenceOutput) -> int:
        """How many of the output's tokens are text: a token that ended the sample is not, unless that was asked for."""
        hidden = output.stop_token_id is not None and not self._params.include_stop_str_in_output
        return len(output.token_ids) - hidden

    def _decode_all(self, output: SequenceOutput) -> str:
        shown = self._num_shown(output)
        text = self._detokenizer.push(output.token_ids[:shown])
        ended = output.finish_reason is not None and bool(output.token_ids)
        return text + self._detokenizer.flush() if ended else text

    def _take(self, output: SequenceOutput) -> str | None:
        """Decode token by token into ``_waiting``; returns the stop string at which it stopped taking."""
        shown = self._num_shown(output)
        last = len(output.token_ids) - 1 if output.finish_reason is not None else -1
        for place, token_id in enumerate(output.token_ids):
            piece = self._detokenizer.push((token_id,)) if place < shown else ""
            if place == last:
                piece += self._detokenizer.flush()
            self._waiting.append((token_id, piece, output.logprobs[place] if output.logprobs else None))
            self._num_tokens += 1
            if self._stops is None or self._num_tokens <= self._params.min_tokens:
                self._credit += len(piece)
                continue
            free, matched = self._stops.push(piece)
            self._credit += len(free)
            if matched is not None:
                return matched
        if output.finish_reason is not None and self._stops is not None:
            self._credit += len(self._stops.flush())
        return None

    def _release(self, everything: bool) -> tuple[str, list[int], list[PositionLogprobs] | None]:
        """The tokens that are free to go, with their texts; with ``everything`` all, cut where the text ends."""
        token_ids: list[int] = []
        texts: list[str] = []
        logprobs: list[PositionLogprobs] = []
        for token_id, piece, found in self._waiting:
            if len(piece) > self._credit:
                if not everything:
                    break
                piece = piece[: self._credit]
            self._credit -= len(piece)
            token_ids.append(token_id)
            texts.append(piece)
            if found is not None:
                logprobs.append(_position(found, piece, self._text))
        del self._waiting[: len(token_ids)]
        return "".join(texts), token_ids, logprobs or None


def _position(found: TokenLogprobs, piece: str, text: TextProcessor) -> PositionLogprobs:
    """``piece`` is what the token adds to the text where it stands: not always what it decodes to on its own."""
    token = Logprob(found.token_id, found.logprob, found.rank, piece, text.token_bytes(found.token_id))
    top = (
        Logprob(token_id, logprob, rank, text.token_text(token_id), text.token_bytes(token_id))
        for rank, (token_id, logprob) in enumerate(zip(found.top_ids, found.top_logprobs, strict=True), start=1)
    )
    return PositionLogprobs(token, tuple(top))


class Collector:
    """A sink that folds a request's deltas into its :class:`~octavo.outputs.RequestOutput`."""

    def __init__(self, prompt_token_ids: Sequence[int], num_samples: int = 1, prompt: str | None = None) -> None:
        self._prompt = prompt
        self._prompt_token_ids = list(prompt_token_ids)
        self._completions = [Completion(index) for index in range(num_samples)]
        self._texts: list[list[str]] = [[] for _ in range(num_samples)]
        self._prompt_logprobs: list[PositionLogprobs | None] | None = None
        self._num_cached_tokens = 0
        self._num_open = num_samples
        self._done = threading.Event()
        self.error: str | None = None

    def push(self, delta: CompletionDelta) -> None:
        """Take one delta."""
        completion = self._completions[delta.index]
        self._texts[delta.index].append(delta.text)
        completion.token_ids += delta.token_ids
        if delta.logprobs is not None:
            completion.logprobs = completion.logprobs if completion.logprobs is not None else []
            completion.logprobs += delta.logprobs
        if delta.prompt_logprobs is not None:
            self._prompt_logprobs = delta.prompt_logprobs
        self._num_cached_tokens = max(self._num_cached_tokens, delta.num_cached_tokens)
        if delta.finish_reason is None:
            return
        completion.finish_reason = delta.finish_reason
        completion.stop_reason = delta.stop_reason
        completion.timing = delta.timing
        self.error = self.error or delta.error
        self._num_open -= 1
        if self._num_open == 0:
            self._done.set()

    @property
    def finished(self) -> bool:
        """Whether every sample has ended."""
        return self._done.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until every sample has ended; whether it has."""
        return self._done.wait(timeout)

    def result(self, request_id: str = "") -> RequestOutput:
        """What has been collected.

        Raises:
            EngineDead: a sample ended with an error; carries the engine's cause.
        """
        if self.error is not None:
            raise EngineDead(self.error)
        for completion, texts in zip(self._completions, self._texts, strict=True):
            completion.text = "".join(texts)
        return RequestOutput(
            request_id=request_id,
            prompt=self._prompt,
            prompt_token_ids=self._prompt_token_ids,
            outputs=self._completions,
            prompt_logprobs=self._prompt_logprobs,
            num_cached_tokens=self._num_cached_tokens,
        )
