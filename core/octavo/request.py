"""What a request asks for, and what the engine knows about it while it runs. No torch here."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from octavo.errors import RequestError

if TYPE_CHECKING:
    from octavo.messages import TokenLogprobs

MAX_LOGPROBS = 20
MAX_SEED = 2**63 - 1


class FinishReason(enum.StrEnum):
    """Why a request ended."""

    STOP = "stop"  # an end-of-sequence or stop token, or a stop string
    LENGTH = "length"  # max_tokens or the context length
    ABORT = "abort"  # the client left or asked for it
    ERROR = "error"  # the engine could not go on


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How to turn one prompt into text. Validated on construction; every field is honoured or refused.

    Greedy decoding is ``temperature=0``. ``seed`` makes sampling reproducible whatever else the engine runs;
    with ``n > 1`` sample ``i`` uses ``seed + i``.

    Raises:
        RequestError: a value is out of range; names the field, the value and the limit.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    max_tokens: int | None = 16  # None: as many as the context holds; 0: only the prompt's log-probabilities
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None  # how many alternatives beside the sampled token
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    bad_words: Sequence[str] = ()
    allowed_token_ids: Sequence[int] | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            msgspec.structs.force_setattr(self, "stop", (self.stop,))
        if self.top_k == -1:  # the other spelling of "off"
            msgspec.structs.force_setattr(self, "top_k", 0)
        self._require_range("n", self.n, 1, 128)
        self._require_range("temperature", self.temperature, 0.0, 100.0)
        self._require_range("min_p", self.min_p, 0.0, 1.0)
        self._require_range("top_k", self.top_k, 0, None)
        self._require_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        self._require_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        self._require_range("min_tokens", self.min_tokens, 0, None)
        if not (math.isfinite(self.top_p) and 0.0 < self.top_p <= 1.0):
            raise RequestError(f"top_p must be above 0 and at most 1, not {self.top_p}", param="top_p")
        if not (math.isfinite(self.repetition_penalty) and 0.0 < self.repetition_penalty <= 100.0):
            raise RequestError(
                f"repetition_penalty must be above 0 and at most 100, not {self.repetition_penalty}",
                param="repetition_penalty",
            )
        if self.seed is not None:
            self._require_range("seed", self.seed, -MAX_SEED - 1, MAX_SEED)
        if self.max_tokens is not None:
            if self.max_tokens < 1 and not (self.max_tokens == 0 and self.prompt_logprobs is not None):
                raise RequestError(
                    f"max_tokens must be at least 1 (or 0, with prompt_logprobs alone), not {self.max_tokens}",
                    param="max_tokens",
                )
            if self.min_tokens > self.max_tokens:
                raise RequestError(
                    f"min_tokens ({self.min_tokens}) is larger than max_tokens ({self.max_tokens})", param="min_tokens"
                )
        for field, value in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if value is not None:
                self._require_range(field, value, 0, MAX_LOGPROBS)
        if any(not text for text in self.stop):
            raise RequestError("stop must not contain an empty string", param="stop")
        if any(not text for text in self.bad_words):
            raise RequestError("bad_words must not contain an empty string", param="bad_words")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise RequestError("allowed_token_ids must name at least one token", param="allowed_token_ids")
        for token, bias in (self.logit_bias or {}).items():
            if not math.isfinite(bias) or not -100.0 <= bias <= 100.0:
                raise RequestError(
                    f"logit_bias of token {token} must be between -100 and 100, not {bias}", param="logit_bias"
                )

    def _require_range(self, field: str, value: float, low: float, high: float | None) -> None:
        if math.isfinite(value) and value >= low and (high is None or value <= high):
            return
        limit = f"at least {low}" if high is None else f"between {low} and {high}"
        raise RequestError(f"{field} must be {limit}, not {value}", param=field)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0

    def replace(self, **changes: Any) -> SamplingParams:
        """A copy with some fields changed, validated again."""
        return msgspec.structs.replace(self, **changes)


class RequestState(enum.Enum):
    """Where a request stands with the scheduler."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


class Request:
    """One sequence as the engine sees it: tokens known, tokens computed, and what it holds.

    The regions of a running request::

        tokens:   [ prompt ............ | output ....... ]  pending  drafts
                  |<---- num_computed ---->|<- to compute ----------------->|
                  |<-------------- num_known ------------->|

    ``num_computed`` counts tokens whose keys and values are in the cache, including those of the step in flight.
    ``num_pending`` counts tokens that a step in flight has sampled and the host has not seen yet: they are on the
    device, so the next step may compute them, and they join ``tokens`` when that step is settled.
    """

    __slots__ = (
        "arrival",
        "awaited_block",
        "bad_token_ids",
        "blocks",
        "drafts",
        "eos_token_ids",
        "finish_reason",
        "first_token_at",
        "fork_of",
        "index",
        "max_total_tokens",
        "needs_history",
        "num_cached",
        "num_computed",
        "num_pending",
        "num_preemptions",
        "num_prompt",
        "num_stored",
        "params",
        "priority",
        "prompt_logprobs",
        "request_id",
        "salt",
        "scheduled_at",
        "seed",
        "sequence",
        "slot",
        "state",
        "stop_token_id",
        "stop_token_ids",
        "tokens",
    )

    def __init__(
        self,
        request_id: str,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        seed: int,
        max_total_tokens: int,
        index: int = 0,
        eos_token_ids: frozenset[int] = frozenset(),
        bad_token_ids: Sequence[Sequence[int]] = (),
        salt: bytes = b"",
        priority: int = 0,
        arrival: float = 0.0,
        fork_of: Request | None = None,
        needs_history: bool = False,
    ) -> None:
        self.request_id = request_id
        self.index = index
        self.params = params
        self.seed = seed
        self.tokens: list[int] = list(prompt)
        self.num_prompt = len(self.tokens)
        self.max_total_tokens = max_total_tokens
        self.eos_token_ids = eos_token_ids
        self.stop_token_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else eos_token_ids)
        self.bad_token_ids = bad_token_ids
        self.salt = salt
        self.priority = priority
        self.fork_of = fork_of
        self.needs_history = needs_history  # sampling reads the tokens themselves: they must be on the host

        self.state = RequestState.WAITING
        self.num_computed = 0
        self.num_pending = 0
        self.num_stored = 0  # leading full blocks already offered to the prefix cache
        self.num_cached = 0  # prompt tokens that did not have to be computed at the first admission
        self.num_preemptions = 0
        self.drafts: list[int] = []
        self.blocks: list[int] = []
        self.awaited_block = -1  # while waiting: promised to hold some of its first tokens, see octavo.blocks
        self.slot = -1
        self.sequence = -1  # order of arrival, given by the scheduler
        self.finish_reason: FinishReason | None = None
        self.stop_token_id: int | None = None

        self.prompt_logprobs: list[TokenLogprobs | None] | None = None  # filled while the prompt is computed
        self.arrival = arrival
        self.scheduled_at = 0.0
        self.first_token_at = 0.0

    @property
    def key(self) -> tuple[str, int]:
        """The name of this sequence: the request's id and the index of the sample."""
        return self.request_id, self.index

    @property
    def num_output(self) -> int:
        """Tokens sampled so far and seen by the host."""
        return len(self.tokens) - self.num_prompt

    @property
    def num_known(self) -> int:
        """Tokens that exist, on the host or only on the device; drafts are guesses and do not count."""
        return len(self.tokens) + self.num_pending

    @property
    def num_to_compute(self) -> int:
        """Tokens whose keys and values are still missing, without drafts."""
        return self.num_known - self.num_computed

    @property
    def is_prefilling(self) -> bool:
        """Whether more than the newest token is still to be computed."""
        return self.num_to_compute > 1

    @property
    def finished(self) -> bool:
        return self.state is RequestState.FINISHED

    @property
    def wants_prompt_logits(self) -> bool:
        """Whether logits of every prompt position are asked for; one sample answers for all."""
        return self.params.prompt_logprobs is not None and self.index == 0

    @property
    def may_sample(self) -> bool:
        """Whether one more token may be sampled, counting those in flight."""
        return self.num_known < self.max_total_tokens

    def append(self, token: int) -> FinishReason | None:
        """Add a sampled token; returns the reason when it is the last one."""
        tokens = self.tokens
        tokens.append(token)
        if token in self.stop_token_ids and self.num_output >= self.params.min_tokens:
            self.stop_token_id = token
            return FinishReason.STOP
        if len(tokens) >= self.max_total_tokens:
            return FinishReason.LENGTH
        return None

    def __repr__(self) -> str:
        return (
            f"Request({self.request_id}:{self.index}, {self.state.name}, {self.num_computed}/{len(self.tokens)}"
            f"+{self.num_pending} tokens, slot {self.slot}, {len(self.blocks)} blocks)"
        )
