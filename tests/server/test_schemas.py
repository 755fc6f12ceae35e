"""Bodies: every field that exists is served or refused by name, and every parameter of sampling can be reached."""

from __future__ import annotations

from typing import Any, get_type_hints

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from octavo.errors import RequestError
from octavo.request import SamplingParams
from octavo.server.schemas import (
    MAX_BAD_WORDS,
    MAX_NAME_LENGTH,
    SAME_NAME,
    UNSERVED,
    BodyReader,
    ChatBody,
    CompletionBody,
    chat_params,
    completion_params,
    prompts_of,
)

USER = [{"role": "user", "content": "Hi"}]
REFUSED = "unsupported_parameter"


def completion(**fields: Any) -> CompletionBody:
    return BodyReader().read(msgspec.json.encode({"prompt": "x", **fields}), CompletionBody)


def chat(**fields: Any) -> ChatBody:
    return BodyReader().read(msgspec.json.encode({"messages": USER, **fields}), ChatBody)


@pytest.mark.parametrize(
    ("kind", "params"),
    [
        (ChatBody, chat_create_params.CompletionCreateParamsStreaming),
        (CompletionBody, completion_create_params.CompletionCreateParamsStreaming),
    ],
)
def test_every_field_that_openai_has_is_known(kind: type[msgspec.Struct], params: type) -> None:
    assert set(get_type_hints(params)) - set(kind.__struct_fields__) - set(UNSERVED) == set()


def test_no_field_is_both_served_and_refused() -> None:
    assert not (set(ChatBody.__struct_fields__) | set(CompletionBody.__struct_fields__)) & set(UNSERVED)


def test_every_parameter_of_sampling_can_be_set() -> None:
    assert set(SAME_NAME) | {"logprobs", "logit_bias"} == set(SamplingParams.__struct_fields__)
    assert set(SAME_NAME) <= set(ChatBody.__struct_fields__) & set(CompletionBody.__struct_fields__)


@pytest.mark.parametrize(
    ("field", "value"),
    {
        "n": 3,
        "temperature": 0.5,
        "top_p": 0.5,
        "top_k": 5,
        "min_p": 0.5,
        "repetition_penalty": 1.5,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
        "seed": 5,
        "stop": ["a", "b"],
        "stop_token_ids": [5],
        "max_tokens": 50,
        "min_tokens": 5,
        "ignore_eos": True,
        "bad_words": ["a"],
        "allowed_token_ids": [5],
        "prompt_logprobs": 5,
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
    }.items(),
)
def test_a_field_reaches_the_parameter_of_its_name(field: str, value: Any) -> None:
    assert value != getattr(SamplingParams(), field)
    assert getattr(completion_params(completion(**{field: value}), {}), field) == value
    assert getattr(chat_params(chat(**{field: value}), {}), field) == value


def test_null_is_the_same_as_nothing() -> None:
    optional = [name for name in ChatBody.__struct_fields__ if name != "messages"]
    assert chat_params(chat(**dict.fromkeys(optional)), {}) == chat_params(chat(), {})
    optional = [name for name in CompletionBody.__struct_fields__ if name != "prompt"]
    assert completion_params(completion(**dict.fromkeys(optional)), {}) == completion_params(completion(), {})


def test_a_chat_may_fill_the_context_and_a_completion_has_sixteen_tokens() -> None:
    assert chat_params(chat(), {}).max_tokens is None
    assert completion_params(completion(), {}).max_tokens == 16


def test_max_completion_tokens_is_the_new_name() -> None:
    assert chat_params(chat(max_completion_tokens=9), {}).max_tokens == 9
    assert chat_params(chat(max_completion_tokens=9, max_tokens=9), {}).max_tokens == 9
    with pytest.raises(RequestError, match="give one"):
        chat_params(chat(max_completion_tokens=9, max_tokens=8), {})


def test_the_models_defaults_give_way_to_the_body() -> None:
    defaults = {"temperature": 0.6, "top_k": 20}
    params = chat_params(chat(temperature=0.1), defaults)
    assert (params.temperature, params.top_k) == (0.1, 20)
    assert completion_params(completion(), defaults).temperature == 0.6


def test_chat_logprobs() -> None:
    assert chat_params(chat(), {}).logprobs is None
    assert chat_params(chat(logprobs=False), {}).logprobs is None
    assert chat_params(chat(logprobs=True), {}).logprobs == 0
    assert chat_params(chat(logprobs=True, top_logprobs=20), {}).logprobs == 20
    for wrong in ({"logprobs": True, "top_logprobs": 21}, {"logprobs": True, "top_logprobs": -1}, {"top_logprobs": 1}):
        with pytest.raises(RequestError) as refused:
            chat_params(chat(**wrong), {})
        assert refused.value.param == "top_logprobs"


def test_echoed_prompts_have_logprobs_when_the_output_has() -> None:
    assert completion_params(completion(echo=True, logprobs=3), {}).prompt_logprobs == 3
    assert completion_params(completion(echo=True), {}).prompt_logprobs is None
    assert completion_params(completion(echo=True, prompt_logprobs=2), {}).prompt_logprobs == 2
    with pytest.raises(RequestError, match="the same as logprobs"):
        completion_params(completion(echo=True, logprobs=3, prompt_logprobs=2), {})


def test_no_tokens_may_be_asked_for_where_the_prompt_is_shown() -> None:
    for shown in ({"echo": True}, {"echo": True, "logprobs": 2}, {"prompt_logprobs": 2}):
        params = completion_params(completion(max_tokens=0, **shown), {})
        assert (params.max_tokens, params.prompt_logprobs) == (0, 0 if shown == {"echo": True} else 2)
    for body in (completion(max_tokens=0), completion(max_tokens=0, logprobs=1)):
        with pytest.raises(RequestError, match="max_tokens must be at least 1"):
            completion_params(body, {})


def test_a_generation_prompt_unless_the_last_message_is_continued() -> None:
    assert chat().adds_generation_prompt
    assert not chat(continue_final_message=True).adds_generation_prompt
    assert chat(continue_final_message=True, add_generation_prompt=True).adds_generation_prompt  # refused later
    assert not chat(add_generation_prompt=False).adds_generation_prompt


@pytest.mark.parametrize("name", UNSERVED)
def test_a_field_that_is_not_served_is_refused_unless_it_asks_for_nothing(name: str) -> None:
    for neutral in UNSERVED[name]:
        chat(**{name: neutral})
        completion(**{name: neutral})
    with pytest.raises(RequestError, match=f"'{name}' is not served") as refused:
        chat(**{name: "something else"})
    assert (refused.value.param, refused.value.code) == (name, REFUSED)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"best_of": 2}, "best_of"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"bad_words": ["x"] * (MAX_BAD_WORDS + 1)}, "bad_words"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_use": True}}, "stream_options"),
        ({"request_id": "x" * (MAX_NAME_LENGTH + 1)}, "request_id"),
        ({"cache_salt": "x" * (MAX_NAME_LENGTH + 1)}, "cache_salt"),
        ({"top_k": 2**63}, "top_k"),
        ({"priority": -(2**63) - 1}, "priority"),
        ({"seed": 2**63}, "seed"),
        ({"n": 1.5}, "n"),
        ({"n": True}, "n"),
        ({"temperature": "hot"}, "temperature"),
        ({"stop": [1]}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"logit_bias": {"1" * 5000: 1}}, "logit_bias"),
        ({"logit_bias": {"\u0661": 1}}, "logit_bias"),
        ({"metadata": {"a": 1}}, "metadata"),
    ],
)
def test_what_is_refused_names_its_field(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as refused:
        completion_params(completion(**fields), {})
    assert refused.value.param == param
    assert len(refused.value.message) < 3000


def test_best_of_is_fine_where_it_says_nothing_new() -> None:
    assert completion_params(completion(best_of=2, n=2), {}).n == 2


def test_several_unknown_fields_are_all_named() -> None:
    with pytest.raises(RequestError) as refused:
        completion(tempreature=1, max_token=3, qqqqq=1)
    assert refused.value.message == (
        "unknown fields 'tempreature' (did you mean 'temperature'?), 'max_token' (did you mean 'max_tokens'?), 'qqqqq'"
    )


def test_a_field_of_the_other_endpoint_is_unknown_here() -> None:
    with pytest.raises(RequestError, match="'echo'"):
        chat(echo=True)
    with pytest.raises(RequestError, match="'messages'"):
        completion(messages=USER)


def test_ignored_fields_stay_known_fields_errors(caplog: pytest.LogCaptureFixture) -> None:
    reader = BodyReader("ignore")
    reader.read(b'{"prompt": "x", "zzz": 1}', CompletionBody)
    reader.read(b'{"prompt": "x", "zzz": 2, "yyy": 3}', CompletionBody)
    assert [record.message for record in caplog.records] == [
        "ignoring unknown fields: zzz",
        "ignoring unknown fields: yyy",
    ]
    with pytest.raises(RequestError, match="not served"):
        reader.read(b'{"prompt": "x", "tools": [1]}', CompletionBody)


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([1, "a"], [[1, "a"]]),
        ([[1, 2], "a", ["b", 3]], [[1, 2], "a", ["b", 3]]),
    ],
)
def test_the_kinds_of_prompts(prompt: Any, found: Any) -> None:
    assert prompts_of(prompt) == found


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from([*CompletionBody.__struct_fields__, *UNSERVED])


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the first draw builds tables of Unicode
@given(st.dictionaries(FIELDS, JSON, max_size=6))
def test_any_value_of_any_field_is_taken_or_refused(fields: dict[str, Any]) -> None:
    try:
        body = BodyReader().read(msgspec.json.encode({"prompt": "x", **fields}), CompletionBody)
        prompts_of(body.prompt)
        params = completion_params(body, {})
    except RequestError:
        return
    msgspec.msgpack.encode(params)  # it can reach the engine
