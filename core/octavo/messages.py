"""All that crosses the boundary between a client and the engine. Tokens only, no text, no torch, no pickle."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from octavo.request import FinishReason, SamplingParams


class Submit(msgspec.Struct, tag="submit", omit_defaults=True):
    """Start one request; with ``params.n > 1`` the engine runs that many samples of it, indices 0 to n - 1.

    ``bad_token_ids`` are the token sequences that ``params.bad_words`` stand for: the engine knows no text.
    ``salt`` separates prefix-cache namespaces and is chosen by the server, never by a client alone.
    ``seed`` is always set: the caller draws one when the request brought none, so that a preempted or forked
    sequence continues the same random stream.
    """

    request_id: str
    prompt: list[int]
    params: SamplingParams
    seed: int
    eos_token_ids: list[int] = []  # what ends the sequence unless params.ignore_eos
    bad_token_ids: list[list[int]] = []
    salt: bytes = b""
    priority: int = 0
    arrival: float = 0.0  # time.monotonic() on this machine


class Abort(msgspec.Struct, tag="abort"):
    """Stop a request, or one of its samples; its blocks are free after the step in flight. Unknown ids are ignored."""

    request_id: str
    index: int | None = None  # None: every sample


class Shutdown(msgspec.Struct, tag="shutdown"):
    """Stop the engine; ``drain`` seconds are left to running requests first."""

    drain: float = 0.0


Command = Submit | Abort | Shutdown


class TokenLogprobs(msgspec.Struct, array_like=True):
    """The log-probability of one token under the model's raw distribution, and the most likely alternatives."""

    token_id: int
    logprob: float
    rank: int  # 1: the most likely
    top_ids: list[int] = []
    top_logprobs: list[float] = []


class Timing(msgspec.Struct, array_like=True):
    """When things happened to one sequence, in seconds of ``time.monotonic()``."""

    arrival: float
    scheduled: float
    first_token: float
    finished: float  # 0: not yet
    num_preemptions: int = 0


class SequenceOutput(msgspec.Struct, array_like=True, gc=False):
    """What one step brought to one sequence."""

    request_id: str
    index: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None  # one per token id, when asked for
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # one per prompt token, the first None; sent once
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None  # the token that ended it, when a token did
    num_cached_tokens: int = 0  # of the prompt; with the first tokens, then with the finish reason
    timing: Timing | None = None  # with the same
    error: str | None = None  # with FinishReason.ERROR


class StepStats(msgspec.Struct, array_like=True):
    """Gauges and counts of one step, for metrics and logs."""

    num_running: int = 0
    num_waiting: int = 0
    num_free_blocks: int = 0
    num_blocks: int = 0
    num_prompt_tokens: int = 0  # computed in this step
    num_output_tokens: int = 0  # sampled in this step
    num_preemptions: int = 0
    num_prefix_queries: int = 0  # prompt tokens looked up
    num_prefix_hits: int = 0  # prompt tokens found
    num_drafts: int = 0  # sequences that had drafts verified
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    accepted_per_position: list[int] = []
    step_seconds: float = 0.0
    seconds_saved: float = 0.0  # by drafts, as far as is known; less than 0: lost


class StepOutputs(msgspec.Struct, tag="outputs"):
    """Everything that one step produced, in one message."""

    sequences: list[SequenceOutput]
    stats: StepStats


class EngineInfo(msgspec.Struct, tag="ready"):
    """What a client needs to know of a running engine; sent once, when it is ready."""

    model: str
    architecture: str
    dtype: str
    device: str
    vocab_size: int
    max_model_len: int
    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    attention_backend: str
    weight_bytes: int
    startup_seconds: dict[str, float] = {}


class EngineFailed(msgspec.Struct, tag="failed"):
    """The engine's last words: the cause in one line, and the traceback if the cause does not explain itself."""

    cause: str
    traceback: str


Event = StepOutputs | EngineInfo | EngineFailed

_encoder = msgspec.msgpack.Encoder()


def encode(message: Command | Event) -> bytes:
    """One message as MessagePack."""
    return _encoder.encode(message)


def decode_command(data: bytes) -> Command:
    """The client's message; raises msgspec.ValidationError when it is none."""
    command: Command = msgspec.msgpack.decode(data, type=Command)
    return command


def decode_event(data: bytes) -> Event:
    """The engine's message; raises msgspec.ValidationError when it is none."""
    event: Event = msgspec.msgpack.decode(data, type=Event)
    return event


def samples(submit: Submit) -> Sequence[tuple[int, int]]:
    """``(index, seed)`` of every sample that a submitted request stands for."""
    return [(index, submit.seed + index) for index in range(submit.params.n)]
