"""What a request may ask for, and how a sequence grows to its end."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.errors import RequestError
from octavo.request import MAX_LOGPROBS, MAX_SEED, FinishReason, Request, SamplingParams

NAN, INFINITE = float("nan"), float("inf")

LIMITS: list[tuple[str, list[Any], list[Any], str]] = [
    # field, values at the limits, values beyond them, what the error says the limit is
    ("n", [1, 128], [0, -1, 129], "between 1 and 128"),
    ("temperature", [0.0, 100.0], [-0.1, 100.1, NAN, INFINITE], r"between 0\.0 and 100\.0"),
    ("top_p", [1e-6, 1.0], [0.0, -0.5, 1.01, NAN], "above 0 and at most 1"),
    ("top_k", [-1, 0, 10**9], [-2], "at least 0"),
    ("min_p", [0.0, 1.0], [-0.1, 1.1, NAN], r"between 0\.0 and 1\.0"),
    ("repetition_penalty", [1e-6, 100.0], [0.0, -1.0, 100.1, NAN], "above 0 and at most 100"),
    ("presence_penalty", [-2.0, 2.0], [-2.1, 2.1, NAN], r"between -2\.0 and 2\.0"),
    ("frequency_penalty", [-2.0, 2.0], [-2.1, 2.1, NAN], r"between -2\.0 and 2\.0"),
    ("seed", [None, 0, -1, MAX_SEED, -MAX_SEED - 1], [MAX_SEED + 1, -MAX_SEED - 2], "between"),
    ("stop", [(), "end", ["end", "\n"]], ["", ["end", ""]], "must not contain an empty string"),
    ("max_tokens", [None, 1, 10**9], [0, -1], "at least 1"),
    ("min_tokens", [0, 16], [-1], "at least 0"),
    ("logprobs", [None, 0, MAX_LOGPROBS], [-1, MAX_LOGPROBS + 1], f"between 0 and {MAX_LOGPROBS}"),
    ("prompt_logprobs", [None, 0, MAX_LOGPROBS], [-1, MAX_LOGPROBS + 1], f"between 0 and {MAX_LOGPROBS}"),
    ("logit_bias", [None, {}, {5: 100.0, 6: -100.0}], [{5: 100.1}, {5: -100.1}, {5: NAN}], "between -100 and 100"),
    ("bad_words", [(), ["worse"]], [["worse", ""]], "must not contain an empty string"),
    ("allowed_token_ids", [None, [5]], [[]], "at least one token"),
]


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, good, _, _ in LIMITS for value in good])
def test_values_at_the_limits_are_taken(field: str, value: Any) -> None:
    SamplingParams(**{field: value})


@pytest.mark.parametrize(
    ("field", "value", "limit"), [(field, value, limit) for field, _, bad, limit in LIMITS for value in bad]
)
def test_values_beyond_the_limits_are_refused_with_the_field_and_the_limit(field: str, value: Any, limit: str) -> None:
    with pytest.raises(RequestError, match=limit) as refused:
        SamplingParams(**{field: value})
    assert refused.value.param == field
    assert refused.value.status == 400
    assert field in refused.value.message


def test_every_field_with_a_limit_is_tested_here() -> None:
    unlimited = {"stop_token_ids", "ignore_eos", "skip_special_tokens", "include_stop_str_in_output"}
    assert {field for field, *_ in LIMITS} | unlimited == set(SamplingParams.__struct_fields__)


def test_more_tokens_cannot_be_demanded_than_allowed() -> None:
    with pytest.raises(RequestError, match=r"min_tokens \(9\) is larger than max_tokens \(8\)"):
        SamplingParams(min_tokens=9, max_tokens=8)
    assert SamplingParams(min_tokens=9, max_tokens=None).min_tokens == 9


def test_nothing_may_be_generated_where_the_prompt_is_scored() -> None:
    assert SamplingParams(max_tokens=0, prompt_logprobs=0).max_tokens == 0
    with pytest.raises(RequestError, match="min_tokens"):
        SamplingParams(max_tokens=0, prompt_logprobs=0, min_tokens=1)


def test_spellings_that_mean_the_same() -> None:
    assert SamplingParams(stop="end") == SamplingParams(stop=("end",))
    assert SamplingParams(top_k=-1) == SamplingParams(top_k=0)
    assert SamplingParams(temperature=0).greedy
    assert not SamplingParams().greedy


def test_parameters_are_frozen_and_a_changed_copy_is_checked_again() -> None:
    params = SamplingParams(n=2)
    with pytest.raises(AttributeError):
        params.n = 3  # type: ignore[misc]
    assert params.replace(temperature=0.5) == SamplingParams(n=2, temperature=0.5)
    with pytest.raises(RequestError, match="n must be between"):
        params.replace(n=0)


# --- a sequence ------------------------------------------------------------------------------------------------------


def request(prompt: list[int], *, max_total_tokens: int = 100, eos: set[int] | None = None, **params: Any) -> Request:
    return Request(
        "r",
        prompt,
        SamplingParams(**params),
        seed=0,
        max_total_tokens=max_total_tokens,
        eos_token_ids=frozenset(eos or ()),
    )


def test_a_stop_token_ends_a_sequence_and_is_remembered() -> None:
    one = request([1, 2], stop_token_ids=[7], eos={9})
    assert one.append(3) is None
    assert one.append(7) is FinishReason.STOP
    assert one.stop_token_id == 7


def test_the_end_of_sequence_token_ends_it_unless_ignored() -> None:
    assert request([1], eos={9}).append(9) is FinishReason.STOP
    assert request([1], eos={9}, ignore_eos=True).append(9) is None
    assert request([1], eos={9}, ignore_eos=True, stop_token_ids=[9]).append(9) is FinishReason.STOP


def test_nothing_ends_it_before_min_tokens() -> None:
    one = request([1], eos={9}, min_tokens=2)
    assert one.append(9) is None
    assert one.append(9) is FinishReason.STOP


def test_the_last_token_that_there_is_room_for_ends_it_and_a_stop_token_there_is_a_stop() -> None:
    assert request([1, 2], max_total_tokens=3).append(5) is FinishReason.LENGTH
    assert request([1, 2], max_total_tokens=3, eos={5}).append(5) is FinishReason.STOP


@given(
    num_prompt=st.integers(1, 50),
    num_output=st.integers(0, 50),
    num_pending=st.integers(0, 2),
    computed=st.integers(0, 102),
)
def test_what_is_known_is_computed_or_to_be_computed(
    num_prompt: int, num_output: int, num_pending: int, computed: int
) -> None:
    one = request([1] * num_prompt, max_total_tokens=1000)
    for _ in range(num_output):
        one.append(2)
    one.num_pending = num_pending
    one.num_computed = min(computed, one.num_known)
    assert one.num_output == num_output
    assert one.num_known == num_prompt + num_output + num_pending
    assert one.num_computed + one.num_to_compute == one.num_known
    assert one.is_prefilling == (one.num_to_compute > 1)
    assert one.may_sample


def test_only_the_first_sample_answers_for_the_prompt() -> None:
    params = SamplingParams(n=2, prompt_logprobs=0)
    first, second = (Request("r", [1], params, seed=i, max_total_tokens=9, index=i) for i in (0, 1))
    assert first.wants_prompt_logits
    assert not second.wants_prompt_logits
    assert (first.key, second.key) == (("r", 0), ("r", 1))
