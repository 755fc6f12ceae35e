"""What clients of OpenAI's API rely on, with OpenAI's own client against a running server."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import httpx
import openai
import pytest
from tests.server.conftest import RunningServer

MODEL = "tiny"
USER = [{"role": "user", "content": "Tell me"}]


def complete(client: openai.OpenAI, prompt: Any = "hello", **options: Any) -> Any:
    return client.completions.create(**{"model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 8, **options})


def chat(client: openai.OpenAI, messages: Any = USER, **options: Any) -> Any:
    settings = {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 8, **options}
    return client.chat.completions.create(**settings)


# --- streams ---------------------------------------------------------------------------------------------------------


def test_a_streamed_chat_says_the_same_and_finishes_once(client: openai.OpenAI) -> None:
    whole = chat(client).choices[0]
    chunks = [chunk.choices[0] for chunk in chat(client, stream=True)]
    assert chunks[0].delta.role == "assistant"
    assert "".join(chunk.delta.content or "" for chunk in chunks) == whole.message.content
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == [whole.finish_reason]
    assert chunks[-1].finish_reason is not None


def test_a_streamed_completion_says_the_same_and_finishes_once(client: openai.OpenAI) -> None:
    whole = complete(client).choices[0]
    chunks = [chunk.choices[0] for chunk in complete(client, stream=True)]
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == [whole.finish_reason]


def test_a_stream_ends_with_its_mark(server: RunningServer) -> None:
    body = {"prompt": "x", "max_tokens": 2, "stream": True}
    text = server.post("/v1/completions", body).text
    assert text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("options", [None, {"include_usage": False}])
def test_no_usage_in_a_stream_unless_asked_for(client: openai.OpenAI, options: Any) -> None:
    extra = {} if options is None else {"stream_options": options}
    assert all(chunk.usage is None and chunk.choices for chunk in chat(client, stream=True, **extra))


def test_usage_comes_in_a_last_chunk_of_its_own(client: openai.OpenAI) -> None:
    *chunks, last = chat(client, stream=True, stream_options={"include_usage": True})
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == []
    assert last.usage.completion_tokens == 8
    assert last.usage.total_tokens == last.usage.prompt_tokens + 8


def test_continuous_usage_grows(client: openai.OpenAI) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    counts = [chunk.usage.completion_tokens for chunk in complete(client, stream=True, stream_options=options)]
    assert counts == sorted(counts)
    assert counts[-1] == 8


def test_stream_options_without_a_stream_are_refused(server: RunningServer) -> None:
    body = {"prompt": "x", "stream_options": {"include_usage": True}}
    assert server.refused("/v1/completions", body)["param"] == "stream_options"


# --- usage, samples, prompts -----------------------------------------------------------------------------------------


def test_usage_is_exact_for_text_and_for_token_ids(client: openai.OpenAI) -> None:
    usage = complete(client, "hello").usage  # one token per byte
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (5, 8, 13)
    usage = complete(client, [1, 2, 3]).usage
    assert (usage.prompt_tokens, usage.total_tokens) == (3, 11)
    usage = complete(client, ["ab", [1, 2, 3]], n=2).usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (5, 32)


def test_samples_differ_and_each_has_an_index_and_a_reason(client: openai.OpenAI) -> None:
    choices = chat(client, n=4, temperature=2.0, max_tokens=12, extra_body={"ignore_eos": True}).choices
    assert [choice.index for choice in choices] == [0, 1, 2, 3]
    assert all(choice.finish_reason == "length" for choice in choices)
    assert len({choice.message.content for choice in choices}) > 1


@pytest.mark.parametrize("stream", [False, True])
def test_samples_end_each_in_its_own_time(client: openai.OpenAI, server: RunningServer, stream: bool) -> None:
    often = list(range(0, 256, 8))  # one token in eight ends a sample
    options = {"n": 6, "temperature": 5.0, "seed": 3, "max_tokens": 40, "stream": stream}
    answer = complete(client, **options, extra_body={"stop_token_ids": often, "return_token_ids": True})
    choices = [choice for chunk in answer for choice in chunk.choices] if stream else answer.choices
    lengths, reasons = dict.fromkeys(range(6), 0), dict.fromkeys(range(6), "")
    for choice in choices:
        assert not reasons[choice.index], "it said something after its end"
        lengths[choice.index] += len(choice.token_ids)
        reasons[choice.index] = choice.finish_reason or ""
    assert all(reason == "stop" or lengths[index] == 40 for index, reason in reasons.items())
    assert len(set(lengths.values())) > 2


def test_samples_of_a_stream_are_told_apart_by_index(client: openai.OpenAI) -> None:
    whole = complete(client, n=3, temperature=1.0, seed=5)
    texts = ["", "", ""]
    reasons: list[int] = []
    for chunk in complete(client, n=3, temperature=1.0, seed=5, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        reasons += [choice.index] if choice.finish_reason else []
    assert texts == [choice.text for choice in whole.choices]
    assert sorted(reasons) == [0, 1, 2]


def test_many_prompts_are_answered_in_their_order(client: openai.OpenAI) -> None:
    choices = complete(client, ["ab", "xyz", "ab"], n=2).choices
    assert [choice.index for choice in choices] == list(range(6))
    texts = [choice.text for choice in choices]
    assert texts[0] == texts[1] == texts[4] == texts[5]
    assert texts[2] == texts[3] != texts[0]


def test_texts_and_token_ids_mix(client: openai.OpenAI, server: RunningServer) -> None:
    ids = server.service.text.encode("hello")
    plain, tokens, mixed = complete(client, ["hello", ids, [*ids[:2], "llo"]]).choices
    assert plain.text == tokens.text == mixed.text


def test_a_prompt_that_was_seen_reports_cached_tokens(client: openai.OpenAI) -> None:
    prompt = "a prompt of more than two blocks, long enough to be found again"
    complete(client, prompt)
    cached = complete(client, prompt).usage.prompt_tokens_details.cached_tokens
    assert cached == (len(prompt) - 1) // 16 * 16


def test_greedy_text_does_not_depend_on_the_batch(client: openai.OpenAI) -> None:
    alone = complete(client, "one").choices[0].text
    together = complete(client, ["one", "two", "three", "four", "five"]).choices[0].text
    assert alone == together


def test_more_requests_than_fit_at_once_all_finish(tiny_llama: Any) -> None:
    from tests.server.conftest import running

    with running(tiny_llama, engine={"max_num_seqs": 2}) as server:
        client = server.client()
        assert len(complete(client, [f"p{i}" for i in range(12)]).choices) == 12


# --- log-probabilities -----------------------------------------------------------------------------------------------


def test_completion_logprobs_as_many_as_asked_for(client: openai.OpenAI, server: RunningServer) -> None:
    assert complete(client).choices[0].logprobs is None
    for count in (0, 3):
        logprobs = complete(client, logprobs=count).choices[0].logprobs
        assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == 8
        # fewer where tokens that are parts of a character look alike
        assert all(1 <= len(top) <= count + 1 for top in logprobs.top_logprobs)
        assert all(value <= 0 for value in logprobs.token_logprobs)
    server.refused("/v1/completions", {"prompt": "x", "logprobs": 21})


@pytest.mark.parametrize("count", [0, 1, 20])
def test_chat_logprobs_spell_the_text(client: openai.OpenAI, count: int) -> None:
    choice = chat(client, logprobs=True, top_logprobs=count).choices[0]
    content = choice.logprobs.content
    assert "".join(entry.token for entry in content) == choice.message.content
    assert all(len(entry.top_logprobs) == count for entry in content)
    assert all(entry.logprob <= 0 and isinstance(entry.bytes, list) for entry in content)


@pytest.mark.parametrize("stream", [False, True])
def test_more_than_twenty_top_logprobs_are_refused(server: RunningServer, stream: bool) -> None:
    body = {"messages": USER, "logprobs": True, "top_logprobs": 21, "stream": stream}
    assert server.refused("/v1/chat/completions", body)["param"] == "top_logprobs"


def test_streamed_logprobs_are_those_of_the_whole(client: openai.OpenAI) -> None:
    whole = chat(client, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    streamed: list[Any] = []
    for chunk in chat(client, logprobs=True, top_logprobs=2, stream=True):
        if chunk.choices[0].logprobs:
            streamed += chunk.choices[0].logprobs.content
    assert [entry.token for entry in streamed] == [entry.token for entry in whole]
    assert [entry.logprob for entry in streamed] == pytest.approx([entry.logprob for entry in whole], abs=1e-4)


@pytest.mark.parametrize("stream", [False, True])
def test_echo_begins_with_the_prompt(client: openai.OpenAI, stream: bool) -> None:
    answer = complete(client, "hello", echo=True, logprobs=1, stream=stream)
    choices = [chunk.choices[0] for chunk in answer] if stream else [answer.choices[0]]
    assert "".join(choice.text for choice in choices).startswith("hello")
    tokens = [token for choice in choices for token in choice.logprobs.tokens]
    values = [value for choice in choices for value in choice.logprobs.token_logprobs]
    offsets = [offset for choice in choices for offset in choice.logprobs.text_offset]
    assert "".join(tokens) == "".join(choice.text for choice in choices)
    assert values[0] is None
    assert len(values) == 5 + 8
    assert offsets == [len("".join(tokens[:i])) for i in range(len(tokens))]


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_can_be_scored_without_generating(client: openai.OpenAI, server: RunningServer, stream: bool) -> None:
    """What evaluation harnesses ask for: the log-likelihood of a text."""
    longer = complete(client, "hello", echo=True, logprobs=2).choices[0].logprobs
    answer = complete(client, ["hello", "bye"], echo=True, logprobs=2, max_tokens=0, stream=stream)
    if stream:
        choices = [choice for chunk in answer for choice in chunk.choices]
    else:
        choices = answer.choices
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (8, 0)
    hello, bye = sorted(choices, key=lambda choice: choice.index)
    assert [(choice.text, choice.finish_reason) for choice in (hello, bye)] == [("hello", "length"), ("bye", "length")]
    assert hello.logprobs.tokens == list("hello")
    assert hello.logprobs.token_logprobs[0] is None
    assert hello.logprobs.token_logprobs[1:] == pytest.approx(longer.token_logprobs[1:5], abs=1e-5)
    assert hello.logprobs.text_offset == [0, 1, 2, 3, 4]
    assert len(bye.logprobs.top_logprobs) == 3
    plain = complete(client, "hello", echo=True, max_tokens=0).choices[0]
    assert (plain.text, plain.logprobs) == ("hello", None)
    server.refused("/v1/completions", {"prompt": "x", "max_tokens": 0})
    server.refused("/v1/chat/completions", {"messages": USER, "max_tokens": 0})


@pytest.mark.parametrize("stop", [[], ["zzzz"]])
def test_text_offsets_do_not_depend_on_streaming(client: openai.OpenAI, stop: list[str]) -> None:
    options = {"logprobs": 0, "stop": stop or None}
    whole = complete(client, **options).choices[0].logprobs.text_offset
    chunks = [chunk.choices[0].logprobs for chunk in complete(client, stream=True, **options)]
    assert [offset for one in chunks if one for offset in one.text_offset] == whole


def test_prompt_logprobs_for_every_prompt_token(server: RunningServer) -> None:
    body = {"prompt": "hello", "max_tokens": 1, "prompt_logprobs": 2}
    found = server.post("/v1/completions", body).json()["choices"][0]["prompt_logprobs"]
    assert found[0] is None
    assert [len(entry) in (2, 3) for entry in found[1:]] == [True] * 4
    assert server.refused("/v1/completions", {**body, "prompt_logprobs": -1})["param"] == "prompt_logprobs"


def test_token_ids_are_returned_beside_the_text(server: RunningServer) -> None:
    body = {"prompt": "hey", "max_tokens": 4, "temperature": 0, "return_token_ids": True}
    choice = server.post("/v1/completions", body).json()["choices"][0]
    assert choice["prompt_token_ids"] == server.service.text.encode("hey")
    assert server.service.text.decode(choice["token_ids"], continues=True) == choice["text"]
    events = server.post("/v1/completions", {**body, "stream": True}).text.split("\n\n")
    streamed = [json.loads(event[6:]) for event in events if event.startswith("data: {")]
    ids = [token for event in streamed for token in event["choices"][0]["token_ids"]]
    assert ids == choice["token_ids"]


# --- sampling --------------------------------------------------------------------------------------------------------


def test_a_seed_repeats_and_seeds_differ(client: openai.OpenAI) -> None:
    def text(seed: int, prompts: Any = "hello") -> str:
        return str(complete(client, prompts, temperature=1.0, seed=seed, max_tokens=16).choices[0].text)

    assert text(7) == text(7) == text(7, ["hello", "other", "third"])
    assert text(7) != text(8)


def test_a_seed_beyond_64_bits_is_refused(server: RunningServer) -> None:
    assert server.refused("/v1/completions", {"prompt": "x", "seed": 2**63})["param"] == "seed"


def test_a_stop_string_cuts_the_text_and_is_named(server: RunningServer, client: openai.OpenAI) -> None:
    text = complete(client, max_tokens=12).choices[0].text
    stop = text[5:7]
    body = {"prompt": "hello", "temperature": 0, "max_tokens": 12, "stop": [stop, "never seen"]}
    choice = server.post("/v1/completions", body).json()["choices"][0]
    assert choice["text"] == text[: text.index(stop)]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    kept = server.post("/v1/completions", {**body, "include_stop_str_in_output": True}).json()["choices"][0]
    assert kept["text"] == text[: text.index(stop) + len(stop)]
    unstopped = server.post("/v1/completions", {**body, "stop": None}).json()["choices"][0]
    assert (unstopped["finish_reason"], unstopped["stop_reason"]) == ("length", None)


def test_a_stop_token_is_named(server: RunningServer) -> None:
    body = {"prompt": "hello", "temperature": 0, "max_tokens": 12, "return_token_ids": True}
    ids = server.post("/v1/completions", body).json()["choices"][0]["token_ids"]
    choice = server.post("/v1/completions", {**body, "stop_token_ids": [ids[4]]}).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["stop_reason"] == ids[4]


def test_ignore_eos_and_min_tokens(server: RunningServer) -> None:
    text = server.service.text
    (eos,) = text.eos_token_ids
    body = {"prompt": "hello", "temperature": 0, "max_tokens": 9, "logit_bias": {str(eos): 100}}

    def count(**more: Any) -> Any:
        return server.post("/v1/completions", {**body, **more}).json()["usage"]["completion_tokens"]

    assert count() == 1
    assert count(min_tokens=5) == 6
    assert count(ignore_eos=True) == 9


def test_logit_bias_bans(client: openai.OpenAI, server: RunningServer) -> None:
    first = server.service.text.encode(complete(client).choices[0].text)[0]
    assert complete(client, logit_bias={str(first): -100}).choices[0].text != complete(client).choices[0].text
    for bias in ({"99999": 1}, {"x": 1, "y": 2}, {"1": "a"}):
        assert server.refused("/v1/completions", {"prompt": "x", "logit_bias": bias})["param"] == "logit_bias"
    assert "x, y" in str(server.refused("/v1/completions", {"prompt": "x", "logit_bias": {"x": 1, "y": 2}})["message"])


# --- what is refused -------------------------------------------------------------------------------------------------


def test_too_long_is_refused_with_both_numbers(server: RunningServer) -> None:
    error = server.refused("/v1/completions", {"prompt": "x" * 300})
    assert "300" in str(error["message"])
    assert "256" in str(error["message"])
    error = server.refused("/v1/completions", {"prompt": "x" * 100, "max_tokens": 200})
    assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize("prompt", ["", [], [[]], [""], None, [1, None], [[1], [2.5]], 7, {"a": 1}, [True]])
def test_empty_and_broken_prompts_are_refused(server: RunningServer, prompt: Any) -> None:
    assert server.refused("/v1/completions", {"prompt": prompt})["param"] == "prompt"


def test_a_missing_prompt_and_a_strange_token_are_refused(server: RunningServer) -> None:
    server.refused("/v1/completions", {})
    assert "99999" in str(server.refused("/v1/completions", {"prompt": [99999]})["message"])
    server.refused("/v1/completions", {"prompt": [-1]})


@pytest.mark.parametrize(
    "messages",
    [None, "hi", [123], [{}], [{"role": "user", "content": 5}], [{"role": 3, "content": "x"}], [], [None]],
)
def test_broken_messages_are_refused(server: RunningServer, messages: Any) -> None:
    server.refused("/v1/chat/completions", {"messages": messages})


def test_parts_of_text_are_their_joined_text(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "Tell"}, {"type": "text", "text": "me"}]
    joined = chat(client, [{"role": "user", "content": "Tell\nme"}]).choices[0].message.content
    assert chat(client, [{"role": "user", "content": parts}]).choices[0].message.content == joined


def test_any_role_reaches_the_template(client: openai.OpenAI) -> None:
    assert chat(client, [{"role": "pirate", "content": "Arr"}]).choices[0].message.content


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "required"),
        ("response_format", {"type": "json_object"}),
        ("audio", {"voice": "x"}),
        ("store", True),
        ("modalities", ["audio"]),
    ],
)
def test_fields_that_are_not_served_are_refused_by_name(server: RunningServer, field: str, value: Any) -> None:
    error = server.refused("/v1/chat/completions", {"messages": USER, field: value})
    assert (error["param"], error["code"]) == (field, "unsupported_parameter")


def test_values_that_ask_for_nothing_are_accepted(server: RunningServer) -> None:
    nothing = {"tools": None, "tool_choice": "none", "response_format": {"type": "text"}, "store": False, "user": "me"}
    body = {"messages": USER, "max_tokens": 1, **nothing}
    assert server.post("/v1/chat/completions", body).status_code == 200


def test_an_unknown_field_is_refused_with_the_nearest_known(server: RunningServer) -> None:
    error = server.refused("/v1/completions", {"prompt": "x", "max_token": 3})
    assert "did you mean 'max_tokens'" in str(error["message"])
    assert error["param"] == "max_token"


def test_unknown_fields_can_be_ignored_and_are_logged_once(tiny_llama: Any, caplog: pytest.LogCaptureFixture) -> None:
    from tests.server.conftest import running

    with running(tiny_llama, unknown_fields="ignore") as server:
        for _ in range(3):
            assert server.post("/v1/completions", {"prompt": "x", "max_tokens": 1, "zzz": 1}).status_code == 200
        assert [record.message for record in caplog.records].count("ignoring unknown fields: zzz") == 1


@pytest.mark.parametrize("field", ["n", "temperature", "top_p", "min_p", "presence_penalty", "top_k", "max_tokens"])
def test_values_out_of_range_name_their_field(server: RunningServer, field: str) -> None:
    assert server.refused("/v1/completions", {"prompt": "x", field: -7})["param"] == field


def test_more_samples_prompts_or_stops_than_allowed_are_refused(server: RunningServer) -> None:
    assert server.refused("/v1/completions", {"prompt": "x", "n": 129})["param"] == "n"
    assert server.refused("/v1/completions", {"prompt": ["x"] * 1025})["param"] == "prompt"
    assert server.refused("/v1/completions", {"prompt": "x", "stop": ["a"] * 65})["param"] == "stop"
    assert server.refused("/v1/completions", {"prompt": "x", "stop": ["a" * 1025]})["param"] == "stop"


def test_wrong_content_type_broken_json_and_unknown_places(server: RunningServer) -> None:
    http = server.http
    assert http.post("/v1/completions", content="{}", headers={"content-type": "text/plain"}).status_code == 415
    json_type = {"content-type": "application/json"}
    for content in ("", "{", "[]", '"x"', "[" * 100000, b"\xff\xfe"):
        response = http.post("/v1/completions", content=content, headers=json_type)
        assert response.status_code == 400, content[:20]
        assert response.json()["error"]["message"]
    assert http.get("/nowhere").json()["error"]["type"] == "not_found_error"
    assert http.get("/v1/completions").status_code == 405


def test_a_body_that_is_too_large_is_refused(tiny_llama: Any) -> None:
    from tests.server.conftest import running

    with running(tiny_llama, max_body_bytes=100) as server:
        assert server.refused("/v1/completions", {"prompt": "x" * 200}, status=413)["code"] == "body_too_large"


# --- models, keys, tokens --------------------------------------------------------------------------------------------


def test_models_are_listed_and_others_are_not_found(client: openai.OpenAI, server: RunningServer) -> None:
    (model,) = client.models.list().data
    assert model.id == MODEL
    assert model.model_dump()["max_model_len"] == 256
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    assert server.refused("/v1/completions", {"model": "other", "prompt": "x"}, status=404)["code"] == "model_not_found"


def test_keys_are_asked_for_where_it_matters(tiny_llama: Any) -> None:
    from tests.server.conftest import running

    with running(tiny_llama, api_keys=("one", "two"), allowed_origins=("https://example.org",)) as server:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic one"}):
            response = server.post("/v1/completions", {"prompt": "x"}, **headers)
            assert response.status_code == 401
            assert response.json()["error"]["type"] == "authentication_error"
        with pytest.raises(openai.AuthenticationError):
            chat(server.client("wrong"))
        for path in ("/health", "/ready", "/version", "/metrics", "/v1/models"):
            assert server.http.get(path).status_code == 200
        prompt = "a prompt of more than two blocks, to be remembered"
        usages = [complete(server.client(key), prompt).usage for key in ("one", "two", "one")]
        cached = [usage.prompt_tokens_details.cached_tokens for usage in usages]
        assert cached == [0, 0, (len(prompt) - 1) // 16 * 16]  # nobody sees what another principal has asked
        preflight = server.http.options(
            "/v1/completions",
            headers={"origin": "https://example.org", "access-control-request-method": "POST"},
        )
        assert preflight.headers["access-control-allow-origin"] == "https://example.org"


def test_a_cache_salt_narrows_the_namespace(server: RunningServer) -> None:
    def cached(salt: str | None) -> int:
        body = {"prompt": "salted prompt that fills more than a block", "max_tokens": 1, "cache_salt": salt}
        usage = server.post("/v1/completions", body).json()["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    assert [cached("a"), cached("b"), cached("a"), cached(None)] == [0, 0, 32, 0]


def test_tokenize_and_back(server: RunningServer) -> None:
    text = "héllo 🙂 wörld"
    tokens = server.post("/tokenize", {"prompt": text}).json()["tokens"]
    assert server.post("/detokenize", {"tokens": tokens}).json()["prompt"] == text
    assert server.post("/tokenize", {"messages": USER}).json()["count"] > 7
    server.refused("/tokenize", {})
    server.refused("/detokenize", {"tokens": [10**6]})


# --- leaving, metrics ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_its_request(server: RunningServer, stream: bool) -> None:
    body = {"prompt": "go on", "max_tokens": 240, "n": 3, "stream": stream}

    def leave() -> None:
        url = f"{server.url}/v1/completions"
        if stream:
            with httpx.stream("POST", url, json=body, timeout=5.0) as response:
                next(response.iter_bytes())
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(url, json=body, timeout=0.05)

    threads = [threading.Thread(target=leave) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    server.wait_idle()
    started = time.monotonic()
    assert server.post("/v1/completions", {"prompt": "x", "max_tokens": 1}).status_code == 200
    assert time.monotonic() - started < 5.0


def test_a_burst_fills_the_slots_and_the_queue_and_no_more(tiny_llama: Any) -> None:
    from tests.server.conftest import running

    with running(tiny_llama, engine={"max_num_seqs": 2}, max_num_waiting=4) as server:
        assert len(complete(server.client(), ["x"] * 6, max_tokens=2).choices) == 6
        server.refused("/v1/completions", {"prompt": ["x"] * 7, "max_tokens": 2})


def test_metrics_count_exactly(tiny_llama: Any) -> None:
    from tests.server.conftest import running

    with running(tiny_llama) as server:
        for _ in range(10):
            server.post("/v1/completions", {"prompt": "hello", "max_tokens": 6, "ignore_eos": True})
        for _ in range(3):
            server.post("/v1/completions", {"prompt": "x" * 40, "max_tokens": 1, "ignore_eos": True})
        server.wait_idle()
        values = {}
        for line in server.http.get("/metrics").text.splitlines():
            if not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                values[name.partition("{")[0]] = float(value)
        assert values["octavo:time_to_first_token_seconds_count"] == 13
        assert values["octavo:inter_token_latency_seconds_count"] == 10 * 5
        assert values["octavo:e2e_request_latency_seconds_count"] == 13
        assert values["octavo:prompt_tokens_total"] == 50 + 40 + 2 * 8
        assert values["octavo:prefix_cache_queries_total"] == 50 + 3 * 40
        assert values["octavo:prefix_cache_hits_total"] == 2 * 32
        assert values["octavo:prompt_tokens_cached_total"] == 2 * 32
        assert values["octavo:generation_tokens_total"] == 63
        assert values["octavo:request_success_total"] == 13
        assert values["octavo:num_requests_running"] == 0
        assert values["octavo:kv_cache_usage_perc"] == 0


def test_requests_that_a_stop_string_ends_have_all_their_times(tiny_llama: Any) -> None:
    from tests.server.conftest import running

    with running(tiny_llama, engine={"max_num_seqs": 1}) as server:
        text = complete(server.client()).choices[0].text
        complete(server.client(), ["hello"] * 3, stop=text[2:4])
        server.wait_idle()
        metrics = server.http.get("/metrics").text
    for name in ("request_queue_time", "request_prefill_time", "request_decode_time", "e2e_request_latency"):
        assert f'octavo:{name}_seconds_count{{model_name="tiny"}} 4.0' in metrics
        assert f'octavo:{name}_seconds_sum{{model_name="tiny"}} 0.0\n' not in metrics
