"""Every message survives the way between the processes."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.errors import RequestError
from octavo.messages import (
    Abort,
    Command,
    EngineFailed,
    EngineInfo,
    Event,
    SequenceOutput,
    Shutdown,
    StepOutputs,
    StepStats,
    Submit,
    Timing,
    TokenLogprobs,
    decode_command,
    decode_event,
    encode,
    samples,
)
from octavo.request import FinishReason, SamplingParams

TOKENS = st.lists(st.integers(0, 2**31), max_size=8)
NUMBERS = st.floats(allow_nan=False)
SMALL = st.integers(0, 2**40)
TEXT = st.text(max_size=20)

PARAMS = st.builds(
    SamplingParams,
    n=st.integers(1, 128),
    temperature=st.floats(0, 100),
    top_p=st.floats(0.01, 1),
    top_k=st.integers(-1, 1000),
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    stop=st.lists(st.text(min_size=1, max_size=5), max_size=3).map(tuple),
    max_tokens=st.none() | st.integers(1, 2**31),
    logit_bias=st.none() | st.dictionaries(st.integers(0, 1000), st.floats(-100, 100), max_size=3),
    allowed_token_ids=st.none() | st.lists(st.integers(0, 1000), min_size=1, max_size=3).map(tuple),
    logprobs=st.none() | st.integers(0, 20),
)
SUBMITS = st.builds(
    Submit,
    request_id=TEXT,
    prompt=TOKENS,
    params=PARAMS,
    seed=st.integers(-(2**63), 2**63 - 1),
    bad_token_ids=st.lists(TOKENS, max_size=3),
    salt=st.binary(max_size=8),
    priority=st.integers(-100, 100),
    arrival=NUMBERS,
)
COMMANDS = st.one_of(
    SUBMITS,
    st.builds(Abort, request_id=TEXT, index=st.none() | st.integers(0, 127)),
    st.builds(Shutdown, drain=NUMBERS),
)

LOGPROBS = st.builds(TokenLogprobs, SMALL, NUMBERS, SMALL, TOKENS, st.lists(NUMBERS, max_size=8))
SEQUENCES = st.builds(
    SequenceOutput,
    TEXT,
    st.integers(0, 127),
    TOKENS,
    logprobs=st.none() | st.lists(LOGPROBS, max_size=3),
    prompt_logprobs=st.none() | st.lists(st.none() | LOGPROBS, max_size=3),
    finish_reason=st.none() | st.sampled_from(FinishReason),
    stop_token_id=st.none() | SMALL,
    num_cached_tokens=SMALL,
    timing=st.none() | st.builds(Timing, NUMBERS, NUMBERS, NUMBERS, NUMBERS, SMALL),
    error=st.none() | TEXT,
)
EVENTS = st.one_of(
    st.builds(
        StepOutputs,
        st.lists(SEQUENCES, max_size=3),
        st.builds(StepStats, SMALL, SMALL, accepted_per_position=TOKENS, step_seconds=NUMBERS),
    ),
    st.builds(EngineFailed, TEXT, TEXT),
    st.builds(
        EngineInfo,
        *[TEXT] * 4,
        *[SMALL] * 6,
        TEXT,
        SMALL,
        st.dictionaries(TEXT, NUMBERS, max_size=3),
    ),
)


@given(COMMANDS)
def test_commands_arrive_as_they_were_sent(command: Command) -> None:
    arrived = decode_command(encode(command))
    assert type(arrived) is type(command)
    assert encode(arrived) == encode(command)  # tuples arrive as lists


@given(EVENTS)
def test_events_arrive_as_they_were_sent(event: Event) -> None:
    assert decode_event(encode(event)) == event


@given(SUBMITS)
def test_every_sample_has_its_own_seed(submit: Submit) -> None:
    pairs = samples(submit)
    assert [index for index, _ in pairs] == list(range(submit.params.n))
    assert [seed - submit.seed for _, seed in pairs] == list(range(submit.params.n))


@pytest.mark.parametrize("data", [b"", b"\x80", encode(EngineFailed("cause", ""))])
def test_what_is_no_command_is_refused(data: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        decode_command(data)


def test_limits_hold_on_arrival_too() -> None:
    """A message that was made by something else than SamplingParams is checked by the same code."""
    data = msgspec.to_builtins(Submit("r", [1], SamplingParams(), 0))
    data["params"]["n"] = 0
    with pytest.raises(RequestError, match="n must be between 1 and 128"):
        decode_command(msgspec.msgpack.encode(data))
