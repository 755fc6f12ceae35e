"""The client observes what a server does, and counts every way in which one fails."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any

import pytest

from octavo.bench.client import Target, complete, drive, first_model, run_loop
from octavo.bench.datasets import BenchRequest
from octavo.bench.metrics import RequestResult, summarize
from octavo.errors import ConfigError


def ask(target: Target, request: BenchRequest) -> RequestResult:
    result: RequestResult = run_loop(complete(target, target.completion(request), request.num_prompt_tokens))
    return result


def test_an_answer_is_counted_by_the_servers_usage_and_timed_by_its_pieces(server: Any) -> None:
    server.pause = 0.005
    result = ask(Target(server.url, model="tiny"), BenchRequest(5, 7, [0] * 5))
    assert result.error is None
    assert result.text == "abababa"
    assert (result.num_output_tokens, result.num_prompt_tokens, result.num_cached_tokens) == (7, 7, 3)
    assert result.counted_by_server
    assert result.finish_reason == "length"
    assert len(result.chunk_times) == 4  # two tokens in each piece; the closing event carries none
    assert len(result.itls) == 3
    assert result.sent_at < result.chunk_times[0] <= result.chunk_times[-1] <= result.ended_at
    assert result.itls == [later - earlier for earlier, later in pairwise(result.chunk_times)]


def test_the_opening_chunk_of_a_chat_is_not_its_first_token(server: Any) -> None:
    server.pause = 0.02
    target = Target(server.url, "/v1/chat/completions", "tiny", prompt_as="text")
    result = ask(target, BenchRequest(1, 4, None, "hello"))
    assert len(result.chunk_times) == 2
    assert result.ttft >= 0.015
    assert server.bodies[0]["messages"] == [{"role": "user", "content": "hello"}]


def test_the_request_carries_what_the_target_says(server: Any) -> None:
    target = Target(server.url, model="tiny", api_key="secret", ignore_eos=True, extra={"top_k": 3})
    ask(target, BenchRequest(2, 4, [5, 6]))
    assert server.headers[0]["authorization"] == "Bearer secret"
    assert server.bodies[0] == {
        "model": "tiny",
        "prompt": [5, 6],
        "max_tokens": 4,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        "top_k": 3,
    }


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("refuse", "HTTP 429: queue full"),
        ("break", "disconnected before the answer was complete"),
        ("error", "error in the stream: engine died"),
        ("empty", "the answer holds no output"),
        ("silent", "no complete answer within 0.2 s"),
        ("unfinished", "the stream ended without a finish reason"),
    ],
)
def test_every_failure_has_its_reason(server: Any, behaviour: str, reason: str) -> None:
    server.behaviour[0] = behaviour
    result = ask(Target(server.url, model="tiny", timeout=0.2), BenchRequest(1, 8, [0]))
    assert result.error == reason


def test_a_server_that_is_not_there_is_a_failed_request() -> None:
    result = ask(Target("http://127.0.0.1:9", model="tiny"), BenchRequest(1, 8, [0]))
    assert result.error is not None
    assert result.error.startswith("cannot connect: ")


def test_without_usage_pieces_are_counted_and_the_result_says_so(server: Any) -> None:
    server.behaviour[0] = "plain"
    result = ask(Target(server.url, model="tiny"), BenchRequest(1, 8, [0]))
    assert result.error is None
    assert (result.num_output_tokens, result.num_prompt_tokens, result.counted_by_server) == (4, 1, False)


def test_failures_of_a_run_are_counted_by_reason_beside_what_completed(server: Any) -> None:
    server.behaviour |= {0: "refuse", 1: "refuse", 2: "break"}
    requests = [BenchRequest(1, 8, [i]) for i in range(10)]
    results, duration = run_loop(drive(Target(server.url, model="tiny"), requests, [0.0] * 10))
    summary = summarize(results, duration)
    assert summary["num_completed"] == 7
    assert summary["failures"] == {"HTTP 429: queue full": 2, "disconnected before the answer was complete": 1}
    assert [result.error is None for result in results] == [False] * 3 + [True] * 7  # in the requests' order


def test_no_more_than_max_concurrency_requests_are_under_way(server: Any) -> None:
    server.pause = 0.002
    requests = [BenchRequest(1, 4, [0])] * 20
    results, _ = run_loop(drive(Target(server.url, model="tiny"), requests, [0.0] * 20, max_concurrency=3))
    assert server.most_at_once == 3
    assert all(result.completed for result in results)


def test_requests_are_sent_at_their_times(server: Any) -> None:
    arrivals = [0.0, 0.05, 0.1]
    results, duration = run_loop(drive(Target(server.url, model="tiny"), [BenchRequest(1, 4, [0])] * 3, arrivals))
    sent = [result.sent_at - results[0].sent_at for result in results]
    assert sent == pytest.approx(arrivals, abs=0.03)
    assert duration >= 0.1


def test_a_thousand_streams_at_once(server: Any) -> None:
    server.pause = 0.3  # long enough for all of them to be open together
    requests = [BenchRequest(1, 4, [0])] * 1000
    results, _ = run_loop(drive(Target(server.url, model="tiny"), requests, [0.0] * 1000))
    assert [result.error for result in results if result.error] == []
    assert server.most_at_once > 500


def test_the_model_is_the_first_that_the_server_offers(server: Any) -> None:
    assert run_loop(first_model(Target(server.url))).model == "tiny"


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://"])
def test_an_address_that_cannot_be_one_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="must look like http://HOST:PORT"):
        Target(url)


def test_chat_takes_no_token_ids() -> None:
    with pytest.raises(ConfigError, match="--prompt-type text"):
        Target("http://x", "/v1/chat/completions")


def test_asyncio_without_uvloop_gives_the_same(server: Any) -> None:
    target = Target(server.url, model="tiny")
    result = asyncio.run(complete(target, target.completion(BenchRequest(1, 4, [0])), 1))
    assert (result.error, result.text) == (None, "abab")
