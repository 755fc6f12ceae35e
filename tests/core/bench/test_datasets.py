"""Prompts are the same for the same arguments, and of the lengths that were asked for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from octavo.bench.datasets import as_text, random_requests, sharegpt_requests, trace_requests, trace_tokens
from octavo.errors import ConfigError

TRACE = Path(__file__).parents[3] / "benchmarks" / "traces" / "sharegpt_like.json"


class Words:
    """A tokenizer with one token a word."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return " ".join(map(str, token_ids))


def test_random_prompts_have_exact_lengths_and_a_shared_prefix() -> None:
    requests = random_requests(5, input_len=20, output_len=7, prefix_len=4, vocab_size=50, seed=1)
    prompts = [list(request.token_ids or ()) for request in requests]
    assert {len(prompt) for prompt in prompts} == {24}
    assert {request.num_prompt_tokens for request in requests} == {24}
    assert {request.num_output_tokens for request in requests} == {7}
    assert len({tuple(prompt[:4]) for prompt in prompts}) == 1
    assert len({tuple(prompt[4:]) for prompt in prompts}) == 5
    assert all(10 <= token < 50 for prompt in prompts for token in prompt)


def test_random_lengths_vary_within_the_ratio() -> None:
    requests = random_requests(300, input_len=100, output_len=10, range_ratio=0.5, vocab_size=50, seed=1)
    lengths = [request.num_prompt_tokens for request in requests]
    assert 50 <= min(lengths) < 60
    assert 140 < max(lengths) <= 150
    assert {request.num_output_tokens for request in requests} == set(range(5, 16))


def test_the_seed_decides() -> None:
    def some(seed: int) -> object:
        return random_requests(3, input_len=9, output_len=9, range_ratio=0.3, vocab_size=99, seed=seed)

    assert some(1) == some(1)
    assert some(1) != some(2)


@pytest.mark.parametrize(
    "wrong",
    [{"input_len": 0}, {"output_len": 0}, {"prefix_len": -1}, {"range_ratio": 1.0}, {"vocab_size": 10}],
)
def test_impossible_sizes_are_refused(wrong: dict[str, int]) -> None:
    sizes = {"input_len": 8, "output_len": 8, "vocab_size": 100} | wrong
    with pytest.raises(ConfigError, match="must be at least"):
        random_requests(1, seed=0, **sizes)  # type: ignore[arg-type]


def test_the_shipped_trace_has_a_thousand_requests_of_the_stated_lengths() -> None:
    requests = trace_requests(TRACE, None, vocab_size=128256)
    assert len(requests) == 1000
    assert sum(request.num_prompt_tokens for request in requests) == 219_999
    assert sum(request.num_output_tokens for request in requests) == 200_000
    assert all(len(request.token_ids or ()) == request.num_prompt_tokens for request in requests)
    assert list(requests[3].token_ids or ()) == trace_tokens(3, 35)


def test_trace_tokens_follow_the_rule_of_the_file() -> None:
    rule = json.loads(TRACE.read_text())["token_rule"]
    assert rule == ("r=random.Random(7*1000003+i*7919+salt*104729); [10+int(r.random()*(128000-10)) for _ in range(n)]")
    assert trace_tokens(0, 3) == trace_tokens(0, 5)[:3]
    assert trace_tokens(0, 3) != trace_tokens(0, 3, salt=1)


def test_a_small_vocabulary_folds_the_trace() -> None:
    requests = trace_requests(TRACE, 5, vocab_size=300)
    assert len(requests) == 5
    assert all(10 <= token < 300 for request in requests for token in request.token_ids or ())


def test_a_trace_that_is_too_short_or_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds 1000 requests, not 1001"):
        trace_requests(TRACE, 1001, vocab_size=300)
    broken = tmp_path / "trace.json"
    for content in ('{"prompt_len": [1], "output_len": []}', "[]"):
        broken.write_text(content)
        with pytest.raises(ConfigError, match="is no trace"):
            trace_requests(broken, 1, vocab_size=300)
    with pytest.raises(ConfigError, match="cannot be read"):
        trace_requests(tmp_path / "none.json", 1, vocab_size=300)


def conversation(num_prompt: int, num_answer: int) -> dict[str, object]:
    values = ["7 " * num_prompt, "8 " * num_answer]
    return {"conversations": [{"from": "x", "value": value} for value in values]}


def test_sharegpt_keeps_exchanges_of_usable_lengths(tmp_path: Path) -> None:
    file = tmp_path / "sharegpt.json"
    too_short, too_long, sum_too_long = conversation(3, 9), conversation(1025, 9), conversation(1000, 1049)
    single = {"conversations": [{"value": "1 2 3 4 5"}]}
    file.write_text(json.dumps([conversation(5, 6), too_short, too_long, sum_too_long, single, conversation(9, 3)]))
    (request,) = sharegpt_requests(file, None, Words(), seed=0)
    assert (request.num_prompt_tokens, request.num_output_tokens) == (5, 6)
    assert request.token_ids == [7] * 5
    longer = sharegpt_requests(file, None, Words(), output_len=30, seed=0)
    assert sorted((r.num_prompt_tokens, r.num_output_tokens) for r in longer) == [(5, 30), (9, 30), (1000, 30)]
    with pytest.raises(ConfigError, match="holds 1 usable conversations, not 2"):
        sharegpt_requests(file, 2, Words(), seed=0)


def test_a_broken_sharegpt_file_names_the_conversation(tmp_path: Path) -> None:
    file = tmp_path / "sharegpt.json"
    file.write_text(json.dumps([conversation(5, 6), {"turns": []}]))
    with pytest.raises(ConfigError, match="conversation 1"):
        sharegpt_requests(file, None, Words(), seed=0)


def test_text_is_decoded_where_only_tokens_are_known() -> None:
    (request,) = random_requests(1, input_len=3, output_len=1, vocab_size=20, seed=0)
    (with_text,) = as_text([request], Words())
    assert with_text.text == " ".join(map(str, request.token_ids or ()))
    assert with_text.token_ids == request.token_ids
