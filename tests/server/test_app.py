"""The application around OpenAI's routes: plugins' routes, keys, metrics, and whatever bytes the network brings."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from fastapi import APIRouter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.server.conftest import RunningServer, listening
from tests.server.scripted import ScriptedEngine, make_processor

from octavo.errors import PluginError
from octavo.hooks import RouteProvider
from octavo.server.app import create_app
from octavo.server.schemas import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from octavo.server.service import ServerConfig, Service

METRICS = [
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "startup_seconds",
    "num_preemptions_total",
    "prompt_tokens_total",
    "generation_tokens_total",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "prompt_tokens_cached_total",
    "spec_decode_num_drafts_total",
    "spec_decode_num_draft_tokens_total",
    "spec_decode_num_accepted_tokens_total",
    "spec_decode_num_accepted_tokens_per_pos_total",
    "spec_decode_acceptance_length",
    "spec_decode_seconds_saved",
    "request_success_total",
    "iteration_tokens_total",
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
]


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with listening(ScriptedEngine(), make_processor()) as made:
        yield made


def make_router(*paths: str, prefix: str = "") -> APIRouter:
    router = APIRouter(prefix=prefix)
    for path in paths:

        @router.get(path)
        async def answer() -> str:
            return "mine"

    return router


def make_service() -> Service:
    return Service(ScriptedEngine(), make_processor(), ServerConfig(model_names=("tiny",)))


# --- plugins ---------------------------------------------------------------------------------------------------------


def test_a_plugins_routes_need_a_key_unless_they_are_open() -> None:
    routes = [
        ("acme", RouteProvider(make_router("/closed", prefix="/acme"))),
        ("acme", RouteProvider(make_router("/open", prefix="/acme"), open=True)),
    ]
    with listening(ScriptedEngine(), make_processor(), routes, api_keys=("key",)) as server:
        assert server.http.get("/acme/closed").status_code == 401
        assert server.http.get("/acme/closed", headers={"authorization": "Bearer key"}).json() == "mine"
        assert server.http.get("/acme/open").json() == "mine"


@pytest.mark.parametrize("path", ["/health", "/v1/completions", "/v1/models/mine", "/acme/twice"])
def test_a_path_that_is_taken_is_refused(path: str) -> None:
    first = RouteProvider(make_router("/acme/twice"))
    with pytest.raises(PluginError, match=f"'late' provides the path {path}, which is taken.*no:late"):
        create_app(make_service(), [("early", first), ("late", RouteProvider(make_router(path)))])


# --- keys ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
def test_a_key_is_asked_for_before_the_body_is_read(path: str) -> None:
    with listening(ScriptedEngine(), make_processor(), api_keys=("key",)) as server:
        refused = server.http.post(path, content=b"not even JSON")
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"] == "Bearer"
        assert refused.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize(
    ("keys", "scope", "separate"),
    [(("one", "two"), "principal", True), (("one", "two"), "shared", False), (("one",), "principal", False)],
)
def test_keys_have_parts_of_the_prefix_cache(keys: tuple[str, ...], scope: str, separate: bool) -> None:
    engine = ScriptedEngine()
    with listening(engine, make_processor(), api_keys=keys, prefix_cache_scope=scope) as server:
        for key in keys:
            for salt in (None, "mine"):
                body = {"prompt": "x", "cache_salt": salt}
                assert server.post("/v1/completions", body, authorization=f"Bearer {key}").status_code == 200
    plain, salted = [[submit.salt for submit in engine.submitted[start::2]] for start in (0, 1)]
    assert len(set(plain)) == len(set(salted)) == (len(keys) if separate else 1)
    assert not set(plain) & set(salted)


def test_origins_that_are_not_allowed_get_no_leave() -> None:
    with listening(ScriptedEngine(), make_processor(), allowed_origins=("https://good.example",)) as server:
        for origin, allowed in (("https://good.example", True), ("https://bad.example", False)):
            answer = server.post("/v1/completions", {"prompt": "x"}, origin=origin)
            assert ("access-control-allow-origin" in answer.headers) is allowed
        refused = server.post("/v1/completions", {"prompt": ""}, origin="https://good.example")
        assert refused.headers["access-control-allow-origin"], "a page must be able to read what was wrong"


# --- the rest --------------------------------------------------------------------------------------------------------


def test_the_metrics_that_dashboards_know(server: RunningServer) -> None:
    server.post("/v1/completions", {"prompt": "x"})
    answer = server.http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    families = {line.split()[2] for line in answer.text.splitlines() if line.startswith("# TYPE")}
    assert {f"octavo:{name}" for name in METRICS} <= families


def test_metrics_of_two_servers_do_not_meet() -> None:
    first, second = make_service(), make_service()
    first.metrics.prompt_tokens.inc(5)
    value = 'octavo:prompt_tokens_total{model_name="tiny"} '
    assert value + "5.0" in first.metrics.text().decode()
    assert value + "0.0" in second.metrics.text().decode()


def test_a_fingerprint_stays_the_same_from_answer_to_answer(server: RunningServer) -> None:
    prints = {server.post("/v1/completions", {"prompt": "x"}).json()["system_fingerprint"] for _ in range(3)}
    assert len(prints) == 1
    assert prints.pop().startswith("octavo-")


def test_a_body_that_comes_without_end_is_cut_off() -> None:
    with listening(ScriptedEngine(), make_processor(), max_body_bytes=5000) as server:
        address = urlsplit(server.url)
        with socket.create_connection((address.hostname, address.port), timeout=10) as client:
            client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
            client.sendall(b"Content-Length: 1000000000\r\n\r\n" + b" " * 6000)
            answer = b"".join(iter(lambda: client.recv(65536), b""))  # until the server hangs up
        assert answer.startswith(b"HTTP/1.1 413")
        assert b"body_too_large" in answer
        assert server.post("/v1/completions", {"prompt": "x"}).status_code == 200


def test_any_of_the_served_names_is_answered_with(server: RunningServer) -> None:
    with listening(ScriptedEngine(), make_processor(), model_names=("big", "small")) as named:
        assert [card["id"] for card in named.http.get("/v1/models").json()["data"]] == ["big", "small"]
        for asked, answered in (("small", "small"), (None, "big")):
            assert named.post("/v1/completions", {"prompt": "x", "model": asked}).json()["model"] == answered
        assert "big, small" in str(named.refused("/v1/completions", {"prompt": "x", "model": "other"}, 404)["message"])


def test_a_request_id_is_used_and_cannot_be_used_twice_at_once() -> None:
    engine = ScriptedEngine(pause=0.01)
    with listening(engine, make_processor()) as server:
        body = {"prompt": "x", "max_tokens": 3000, "request_id": "mine", "stream": True}
        with server.http.stream("POST", "/v1/completions", json=body) as response:
            first = next(response.iter_text())
            assert json.loads(first.split("\n\n")[0].removeprefix("data: "))["id"] == "cmpl-mine"
            error = server.refused("/v1/completions", {**body, "stream": False})
            assert error["param"] == "request_id"
        server.wait_idle()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "tool", "", 5]), "content": JSON}) | JSON,
    max_size=3,
)
PATHS: dict[str, type[Any]] = {
    "/v1/completions": CompletionBody,
    "/v1/chat/completions": ChatBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
}


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, bytes]:
    """A path, and a body that is nearly right."""
    path = draw(st.sampled_from(sorted(PATHS)))
    body = draw(st.dictionaries(st.sampled_from(PATHS[path].__struct_fields__), JSON, max_size=4))
    body |= {"max_tokens": 2} if "completions" in path else {}
    if draw(st.booleans()):
        body |= {"messages": draw(MESSAGES)} if "chat" in path else {"prompt": draw(JSON | st.just("x"))}
    data = json.dumps(body).encode()
    return path, data if draw(st.integers(0, 9)) else data[: draw(st.integers(0, len(data)))]


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(requests())
def test_no_body_brings_the_server_down(server: RunningServer, request_: tuple[str, bytes]) -> None:
    path, body = request_
    answer = server.http.post(path, content=body, headers={"content-type": "application/json"}, timeout=10)
    assert answer.status_code in (200, 400, 404)
    if answer.status_code != 200:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert server.service.frontend.num_open == 0
