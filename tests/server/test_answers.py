"""What answers look like where a tokenizer, a step's order or a held-back stop string make it hard."""

from __future__ import annotations

import json
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from octavo.outputs import Completion, CompletionDelta, Logprob, PositionLogprobs
from octavo.request import FinishReason
from octavo.server.answers import Answer, ChatAnswer, CompletionAnswer, Usage
from octavo.server.openai import StreamWriter
from octavo.server.schemas import ChatBody, CompletionBody, StreamOptions

USER = [{"role": "user", "content": "Hi"}]


def position(token_id: int, text: str, *top: tuple[int, str]) -> PositionLogprobs:
    token = Logprob(token_id, -1.0, 1, text, text.encode())
    return PositionLogprobs(token, tuple(Logprob(t, -2.0, 2, x, x.encode()) for t, x in top))


def completion_answer(prompts: list[list[int]], echoes: list[str], **fields: Any) -> CompletionAnswer:
    body = CompletionBody(prompt="x", echo=bool(echoes), **fields)
    return CompletionAnswer("tiny", "print", body, prompts, echoes)


def events(writer: StreamWriter, *arrived: tuple[int, CompletionDelta]) -> list[Any]:
    return [
        json.loads(event.removeprefix("data: ")) for event in writer.events(arrived).decode().split("\n\n") if event
    ]


@pytest.mark.parametrize(
    ("echo", "pieces", "tokens", "offsets"),
    [
        ("ab c", ["a", "b", " c"], ["a", "b", " c", "!"], [0, 1, 2, 4]),
        # a beginning of the document that the text does not show
        ("ab c", ["<s>", "ab", " c"], ["", "ab", " c", "!"], [0, 0, 2, 4]),
        # SentencePiece: the first word begins with a space that is not in the text
        ("ab c", ["<s>", " ab", " c"], ["", " ab", " c", "!"], [0, 0, 3, 4]),
        ("a", ["a"], ["a", "!"], [0, 1]),
    ],
)
def test_an_echoed_prompt_ends_where_its_text_ends(
    echo: str, pieces: list[str], tokens: list[str], offsets: list[int]
) -> None:
    known = [position(i, piece) for i, piece in enumerate(pieces[1:])]
    answer = completion_answer([list(range(len(pieces)))], [echo], logprobs=0)
    answer.remember(0, [None, *known])
    output = Completion(0, "!", [9], [position(9, "!")], FinishReason.LENGTH)
    (choice,) = answer.whole([(0, 0, output)])["choices"]
    assert choice["text"] == echo + "!"
    assert choice["logprobs"]["tokens"] == tokens
    assert choice["logprobs"]["text_offset"] == offsets
    assert [value is None for value in choice["logprobs"]["token_logprobs"]] == [True] + [False] * len(pieces)


def test_the_prompts_logprobs_serve_all_samples_of_a_step_whatever_their_order() -> None:
    answer = completion_answer([[1, 2]], ["ab"], logprobs=0, n=2)
    first = CompletionDelta(0, "x", [3], [position(3, "x")], prompt_logprobs=[None, position(2, "b")])
    second = CompletionDelta(1, "y", [4], [position(4, "y")])
    found = events(StreamWriter(answer, 2, None), (0, second), (0, first))
    choices = {event["choices"][0]["index"]: event["choices"][0] for event in found}
    assert choices[0]["logprobs"]["tokens"] == ["a", "b", "x"]
    assert choices[1]["logprobs"]["tokens"] == ["a", "b", "y"]


def test_offsets_go_on_from_chunk_to_chunk_for_each_choice() -> None:
    answer = completion_answer([[1]], [], logprobs=0)
    writer = StreamWriter(answer, 2, None)
    deltas = [CompletionDelta(i, text, [5], [position(5, text)]) for i, text in ((0, "abc"), (1, "d"), (0, "e"))]
    found = events(writer, *((0, delta) for delta in deltas))
    assert [event["choices"][0]["logprobs"]["text_offset"] for event in found] == [[0], [0], [3]]


def test_tokens_that_are_parts_of_characters_stay_apart() -> None:
    token = Logprob(1, -1.0, 1, "", b"\xf0\x9f")
    other = Logprob(2, -2.0, 2, "\ufffd", b"\xe2")
    answer = completion_answer([[1]], [], logprobs=2)
    output = Completion(0, "", [1], [PositionLogprobs(token, (token, other))], FinishReason.LENGTH)
    (top,) = answer.whole([(0, 0, output)])["choices"][0]["logprobs"]["top_logprobs"]
    assert top == {"bytes:\\xf0\\x9f": -1.0, "bytes:\\xe2": -2.0}


def test_the_chosen_token_is_shown_beside_the_most_likely_ones() -> None:
    answer = completion_answer([[1]], [], logprobs=1)
    output = Completion(0, "a", [1], [position(1, "a", (2, "b"))], FinishReason.LENGTH)
    (top,) = answer.whole([(0, 0, output)])["choices"][0]["logprobs"]["top_logprobs"]
    assert top == {"b": -2.0, "a": -1.0}


def test_usage_counts_each_prompt_once_and_sums_what_was_cached() -> None:
    usage = Usage([[1] * 10, [1] * 20])
    for prompt, cached in ((0, 8), (0, 0), (1, 16), (0, 0), (1, 0)):
        usage.count(prompt, 3, cached)
    assert usage.content() == {
        "prompt_tokens": 30,
        "completion_tokens": 15,
        "total_tokens": 45,
        "prompt_tokens_details": {"cached_tokens": 24},
    }


def test_a_delta_that_says_nothing_yet_sends_nothing() -> None:
    answer = completion_answer([[1]], [])
    writer = StreamWriter(answer, 1, StreamOptions(include_usage=True))
    assert writer.events([(0, CompletionDelta(0, "", [7]))]) == b""
    (event,) = events(writer, (0, CompletionDelta(0, "é", [8], finish_reason=FinishReason.LENGTH)))
    assert (event["choices"][0]["text"], event["usage"]) == ("é", None)
    last, mark = writer.end().decode().split("\n\n")[:2]
    assert json.loads(last.removeprefix("data: "))["usage"]["completion_tokens"] == 2
    assert mark == "data: [DONE]"


def test_a_chat_stream_opens_speaks_and_ends() -> None:
    writer = StreamWriter(ChatAnswer("tiny", "print", ChatBody(messages=USER), [1]), 1, None)
    opening, first = events(writer, (0, CompletionDelta(0, "a", [1])))
    (last,) = events(writer, (0, CompletionDelta(0, "", [], finish_reason=FinishReason.STOP, stop_reason="b")))
    assert opening["choices"] == [
        {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    ]
    assert first["choices"] == [{"index": 0, "delta": {"content": "a"}, "logprobs": None, "finish_reason": None}]
    assert last["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop", "stop_reason": "b"}]
    assert writer.end() == b"data: [DONE]\n\n"
    assert {event["object"] for event in (opening, first, last)} == {"chat.completion.chunk"}


@pytest.mark.parametrize("chat", [False, True])
def test_every_piece_of_an_answer_has_the_same_head(chat: bool) -> None:
    answer: Answer = completion_answer([[1]], [])
    if chat:
        answer = ChatAnswer("tiny", "print", ChatBody(messages=USER, request_id="mine"), [1])
    pieces = [
        answer.whole([(0, 0, Completion(0, "a", [1], None, FinishReason.STOP))]),
        *answer.chunks(0, 0, CompletionDelta(0, "a", [1])),
        answer.empty_chunk(),
    ]
    heads = [{name: piece[name] for name in ("id", "created", "model", "system_fingerprint")} for piece in pieces]
    assert all(head == heads[0] for head in heads)
    assert heads[0]["id"] == "chatcmpl-mine" if chat else heads[0]["id"].startswith("cmpl-")
    assert (heads[0]["model"], heads[0]["system_fingerprint"]) == ("tiny", "print")


def test_token_ids_of_a_chat_stand_beside_its_choices() -> None:
    answer = ChatAnswer("tiny", "print", ChatBody(messages=USER, return_token_ids=True), [1, 2])
    whole = answer.whole([(0, 0, Completion(0, "a", [3], None, FinishReason.STOP))])
    assert (whole["prompt_token_ids"], whole["choices"][0]["token_ids"]) == ([1, 2], [3])
    opening, first = answer.chunks(0, 0, CompletionDelta(0, "", [3]))
    assert (opening["prompt_token_ids"], first["choices"][0]["token_ids"]) == ([1, 2], [3])


@st.composite
def streams(draw: st.DrawFn) -> list[tuple[int, CompletionDelta]]:
    """Deltas of two samples, as they may come: texts of any kind, some empty, reasons at the end."""
    arrived = []
    for _ in range(draw(st.integers(1, 8))):
        index = draw(st.integers(0, 1))
        text = draw(st.text(max_size=4) | st.just('"\\u2028\n'))
        logprobs = [position(5, text)] if draw(st.integers(0, 5)) == 0 else None
        reason = FinishReason.LENGTH if draw(st.integers(0, 5)) == 0 else None
        arrived.append((0, CompletionDelta(index, text, [5], logprobs, finish_reason=reason)))
    return arrived


def answer_to(body: ChatBody | CompletionBody) -> Answer:
    if isinstance(body, ChatBody):
        return ChatAnswer("tiny", "print", body, [1, 2])
    return CompletionAnswer("tiny", "print", body, [[1, 2]], ["the prompt"] if body.echo else [])


@given(
    streams(),
    st.builds(ChatBody, messages=st.just(USER), request_id=st.just("r"), return_token_ids=st.booleans())
    | st.builds(
        CompletionBody,
        prompt=st.just("x"),
        request_id=st.just("r"),
        echo=st.booleans(),
        return_token_ids=st.booleans(),
        prompt_logprobs=st.none() | st.just(1),
    ),
    st.none() | st.builds(StreamOptions, include_usage=st.booleans(), continuous_usage_stats=st.booleans()),
)
def test_events_put_together_from_parts_are_those_written_whole(
    arrived: list[tuple[int, CompletionDelta]], body: ChatBody | CompletionBody, options: StreamOptions | None
) -> None:
    fast, whole = (StreamWriter(answer_to(body), 2, options) for _ in range(2))
    whole._answer.differs_in_text_alone = lambda delta: False  # type: ignore[method-assign]
    for one in arrived:
        assert events(fast, one) == events(whole, one)
    assert fast.end() == whole.end()
