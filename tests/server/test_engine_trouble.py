"""What clients see of an engine that is slow, full, refuses, or dies; and that nothing is left running behind them."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from tests.server.conftest import RunningServer, listening
from tests.server.scripted import ScriptedEngine, make_processor

LONG = {"prompt": "go", "max_tokens": 3000}


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def server(engine: ScriptedEngine) -> Iterator[RunningServer]:
    with listening(engine, make_processor()) as made:
        yield made


def wait_until(condition: Any, timeout: float = 10.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


def events(text: str) -> list[Any]:
    """The events of a stream, which ends with its mark."""
    *found, last, rest = text.split("\n\n")
    assert (last, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in found]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_an_engine_that_dies_ends_streams_with_an_error(
    engine: ScriptedEngine, server: RunningServer, path: str
) -> None:
    engine.pause = 0.01
    body = LONG if path == "/v1/completions" else {"messages": [{"role": "user", "content": "go"}]}
    with server.http.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200
        pieces = response.iter_text()
        text = next(pieces)
        died = time.monotonic()
        engine.die("out of luck")
        text += "".join(pieces)
    assert time.monotonic() - died < 10.0  # the answer itself would take 30 s
    last = events(text)[-1]
    assert last["error"]["message"] == "out of luck"
    assert (last["error"]["type"], last["error"]["code"]) == ("service_unavailable_error", "engine_dead")


def test_an_engine_that_dies_fails_whole_answers_and_the_health(engine: ScriptedEngine, server: RunningServer) -> None:
    engine.pause = 0.01
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(server.post, "/v1/completions", LONG) for _ in range(8)]
        wait_until(lambda: engine.num_unfinished == 8)
        engine.die("out of luck")
        for answer in answers:
            assert answer.result(timeout=2.0).status_code == 503
            assert answer.result().json()["error"]["message"] == "out of luck"
    for path in ("/health", "/ready"):
        health = server.http.get(path)
        assert health.status_code == 503
        assert health.json()["error"]["message"] == "out of luck"
    assert server.post("/v1/completions", {"prompt": "x"}).status_code == 503
    assert server.service.frontend.num_open == 0
    assert server.http.get("/metrics").status_code == 200


def test_what_the_engine_itself_refuses_is_the_clients_to_mend(engine: ScriptedEngine, server: RunningServer) -> None:
    engine.refuses = "the prompt is too long"
    for stream in (False, True):
        error = server.refused("/v1/completions", {"prompt": "x", "stream": stream})
        assert error["message"] == "the prompt is too long"
    engine.refuses = None
    assert server.post("/v1/completions", {"prompt": "x"}).status_code == 200


def test_one_prompt_that_is_refused_stops_the_others(engine: ScriptedEngine, server: RunningServer) -> None:
    engine.pause = 0.01
    engine.refuses_after = 2
    server.refused("/v1/completions", {**LONG, "prompt": ["a", "b", "c", "d"]})
    wait_until(lambda: engine.num_unfinished == 0 and server.service.frontend.num_open == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_burst_over_the_limit_is_refused_and_the_rest_is_served(stream: bool) -> None:
    engine = ScriptedEngine(max_num_seqs=3)
    body = {"prompt": "x", "max_tokens": 5, "stream": stream}
    with listening(engine, make_processor(), max_num_waiting=2) as server, ThreadPoolExecutor(9) as pool:
        engine.held.set()  # the engine has not looked at any of them yet
        answers = [pool.submit(server.post, "/v1/completions", body) for _ in range(9)]
        wait_until(lambda: sum(answer.done() for answer in answers) == 4)
        for answer in [answer.result() for answer in answers if answer.done()]:
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            error = answer.json()["error"]
            assert (error["type"], error["code"]) == ("service_unavailable_error", "queue_full")
            assert "5 sequences run or wait, 1 more" in error["message"]
            assert "3 may run and 2 wait" in error["message"]
        assert engine.num_unfinished == 5
        engine.held.clear()
        assert sorted(answer.result().status_code for answer in answers) == [200] * 5 + [503] * 4
        wait_until(lambda: server.service.frontend.num_open_samples == 0)
        assert server.post("/v1/completions", {**body, "prompt": ["x"] * 5}).status_code == 200


def test_prompts_and_samples_count_against_the_limit() -> None:
    engine = ScriptedEngine(max_num_seqs=3)
    with listening(engine, make_processor(), max_num_waiting=2) as server, ThreadPoolExecutor(1) as pool:
        error = server.refused("/v1/completions", {"prompt": ["x", "y"], "n": 3})
        assert "6 sequences at once, but at most 5" in str(error["message"])  # trying again would not help
        engine.held.set()
        running = pool.submit(server.post, "/v1/completions", {"prompt": "x", "n": 4, "max_tokens": 2})
        wait_until(lambda: engine.num_unfinished == 4)
        refused = server.post("/v1/completions", {"prompt": ["a", "b"]})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "queue_full")
        assert len(engine.submitted) == 1  # neither of the two was begun
        engine.held.clear()
        assert len(running.result().json()["choices"]) == 4


def test_while_draining_requests_go_on_and_new_ones_are_refused(engine: ScriptedEngine, server: RunningServer) -> None:
    engine.held.set()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(server.post, "/v1/completions", {"prompt": "x", "max_tokens": 5})
        wait_until(lambda: engine.num_unfinished == 1)
        server.service.draining = True
        assert server.http.get("/ready").status_code == 503
        assert server.http.get("/health").status_code == 200
        refused = server.post("/v1/completions", {"prompt": "x"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        engine.held.clear()
        assert running.result(timeout=5.0).json()["choices"][0]["text"] == "abcde"


@pytest.mark.parametrize("stream", [False, True])
def test_hundreds_of_clients_that_give_up_leave_nothing_behind(
    engine: ScriptedEngine, server: RunningServer, stream: bool
) -> None:
    engine.pause = 0.02
    body = json.dumps({**LONG, "prompt": ["a", "b"], "n": 2, "stream": stream}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    address = server.url.removeprefix("http://").split(":")
    clients = []
    for _ in range(200):
        client = socket.create_connection((address[0], int(address[1])))
        client.sendall(head % len(body) + body)
        clients.append(client)
    wait_until(lambda: engine.num_unfinished == 200 * 4, timeout=30.0)
    for client in clients:
        client.close()
    started = time.monotonic()
    answer = server.post("/v1/completions", {"prompt": "x", "max_tokens": 3})
    assert answer.json()["choices"][0]["text"] == "abc"
    assert time.monotonic() - started < 5.0
    wait_until(lambda: engine.num_unfinished == 0 and server.service.frontend.num_open == 0)
    server.post("/v1/completions", {"prompt": "x", "max_tokens": 1})
    metrics = server.http.get("/metrics").text
    assert 'octavo:num_requests_running{model_name="tiny"} 0.0' in metrics
    assert 'octavo:num_requests_waiting{model_name="tiny"} 0.0' in metrics
    assert 'octavo:kv_cache_usage_perc{model_name="tiny"} 0.0' in metrics
    assert 'octavo:request_success_total{finished_reason="abort",model_name="tiny"} 400.0' in metrics


def test_a_client_that_leaves_before_the_first_token_is_noticed(engine: ScriptedEngine, server: RunningServer) -> None:
    engine.held.set()
    for stream in (False, True):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/completions", json={**LONG, "stream": stream}, timeout=0.2)
    wait_until(lambda: engine.num_unfinished == 0)


def test_a_client_that_reads_slowly_loses_nothing(engine: ScriptedEngine, server: RunningServer) -> None:
    with server.http.stream("POST", "/v1/completions", json={**LONG, "stream": True, "logprobs": 5}) as response:
        wait_until(lambda: engine.num_unfinished == 0)  # the engine did not wait
        text = response.read().decode()
    assert "".join(event["choices"][0]["text"] for event in events(text)) == "abcdefghij" * 300


def test_the_samples_of_a_step_are_sent_together(engine: ScriptedEngine, server: RunningServer) -> None:
    engine.pause = 0.05
    body = {"prompt": "x", "n": 50, "max_tokens": 4, "stream": True}
    with server.http.stream("POST", "/v1/completions", json=body) as response:
        pieces = list(response.iter_raw())
    assert len(events(b"".join(pieces).decode())) == 200
    assert len(pieces) <= 10


def test_many_streams_at_once_all_end(engine: ScriptedEngine, server: RunningServer) -> None:
    engine.held.set()
    limits = httpx.Limits(max_connections=300)
    texts: list[str] = []
    with httpx.Client(base_url=server.url, timeout=60, limits=limits) as http, ThreadPoolExecutor(300) as pool:
        body = {"prompt": "x", "max_tokens": 20, "stream": True}
        answers = [pool.submit(http.post, "/v1/completions", json=body) for _ in range(300)]
        wait_until(lambda: engine.num_unfinished == 300, timeout=60.0)
        engine.held.clear()
        texts = ["".join(e["choices"][0]["text"] for e in events(a.result(timeout=60).text)) for a in answers]
    assert texts == ["abcdefghij" * 2] * 300


def test_an_observer_is_told_of_every_request_once(engine: ScriptedEngine) -> None:
    told: list[Any] = []
    with listening(engine, make_processor(), on_finished=told.append) as server:
        for _ in range(3):
            server.post("/v1/completions", {"prompt": "abc", "max_tokens": 4, "n": 2})
        wait_until(lambda: len(told) == 3)
    assert {(one.num_prompt_tokens, one.num_output_tokens, one.finish_reason) for one in told} == {(3, 8, "length")}


def test_times_between_tokens_are_counted_one_by_one(engine: ScriptedEngine, server: RunningServer) -> None:
    threads = [
        threading.Thread(
            target=server.post, args=("/v1/completions", {"prompt": "x", "max_tokens": 7, "n": 3, "stop": "zz"})
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    metrics = server.http.get("/metrics").text
    assert 'octavo:time_to_first_token_seconds_count{model_name="tiny"} 4.0' in metrics
    assert f'octavo:inter_token_latency_seconds_count{{model_name="tiny"}} {4.0 * 3 * 6}' in metrics
