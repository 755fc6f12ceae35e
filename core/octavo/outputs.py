"""What a user gets back: text with its tokens, log-probabilities, reasons and times."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from octavo.messages import Timing
from octavo.request import FinishReason


@dataclass(frozen=True, slots=True)
class Logprob:
    """A token that was or could have been chosen: ``text`` is what it decodes to, ``data`` its exact bytes."""

    token_id: int
    logprob: float
    rank: int
    text: str
    data: bytes


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """One position: the token that stands there and the most likely ones (which may include it)."""

    token: Logprob
    top: tuple[Logprob, ...]


@dataclass(slots=True)
class Completion:
    """One sample of a request; grows while it is generated."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None  # the stop string or stop token that matched
    timing: Timing | None = None


@dataclass(slots=True)
class RequestOutput:
    """A finished request, samples in order of index."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[Completion]
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    num_cached_tokens: int = 0

    @property
    def metrics(self) -> Timing | None:
        """Times of the first sample, in seconds of ``time.monotonic()``."""
        return self.outputs[0].timing


class CompletionDelta(msgspec.Struct, frozen=True):
    """What one step added to one sample: a piece of text (may be empty while characters or stop strings are held
    back), its tokens, and at the end the reason."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[PositionLogprobs] | None = None
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    num_cached_tokens: int = 0
    timing: Timing | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class RequestSummary:
    """What an observer learns of a finished request; no text."""

    request_id: str
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    finish_reason: FinishReason
    timing: Timing | None
