"""Sampling: the distribution is the one that was asked for, and every parameter does what its name says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from tests.engines import Sample, make_engine, run, submit
from transformers import (
    LlamaForCausalLM,
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from octavo.engine import Engine
from octavo.messages import Submit
from octavo.operations import SampleNeed
from octavo.request import FinishReason, Request, SamplingParams
from octavo.sampling import SamplingTable, SamplingTensors, TorchSample, apply_penalties, gather_logprobs, uniform

CPU = torch.device("cpu")
PROMPT = [10, 20, 30, 20, 10, 20]


def sampler(vocab_size: int) -> TorchSample:
    return TorchSample(SampleNeed(CPU, vocab_size))


def tensors(
    rows: int, *, vocab_size: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> SamplingTensors:
    return SamplingTensors(
        temperature=torch.full((rows,), temperature),
        uniform=torch.linspace(0.0, 0.999, rows),
        top_k=torch.full((rows,), top_k) if top_k else None,
        top_p=torch.full((rows,), top_p) if top_p < 1.0 else None,
        min_p=torch.full((rows,), min_p) if min_p else None,
    )


# --- randomness ------------------------------------------------------------------------------------------------------


def test_uniform_numbers_are_uniform_and_depend_on_seed_position_and_stream() -> None:
    seeds = np.repeat(np.arange(200, dtype=np.int64), 200)
    positions = np.tile(np.arange(200, dtype=np.int64), 200)
    numbers = np.concatenate([uniform(seeds, positions, stream) for stream in (0, 1)])
    assert len(np.unique(numbers)) == len(numbers)
    counts, _ = np.histogram(numbers, bins=100, range=(0.0, 1.0))
    assert chi_square(counts, np.full(100, len(numbers) / 100)) < 99 + 6 * np.sqrt(2 * 99)
    for lag in (1, 200):  # neighbours in position, and in seed
        assert abs(np.corrcoef(numbers[:-lag], numbers[lag:])[0, 1]) < 0.02


def chi_square(found: np.ndarray, expected: np.ndarray) -> float:
    """Has mean ``len(found) - 1`` and variance twice that when ``found`` was drawn from ``expected``."""
    return float(((found - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"top_k": 9}, {"top_p": 0.8}, {"min_p": 0.1}])
def test_samples_follow_the_distribution(options: dict[str, float]) -> None:
    """A chi-square test over 60,000 draws: six standard deviations, and nothing that is cut off is ever drawn."""
    vocab_size, num_draws = 24, 60_000
    logits = torch.randn(vocab_size, generator=torch.Generator().manual_seed(1)) * 1.5
    sample = sampler(vocab_size)
    setting = tensors(1, vocab_size=vocab_size, **options)  # type: ignore[arg-type]
    expected = sample.probabilities(logits.unsqueeze(0), setting)[0]
    expected = (expected / expected.sum()).double().numpy()
    numbers = uniform(np.arange(num_draws, dtype=np.int64), np.full(num_draws, 7)).astype(np.float32)
    many = tensors(num_draws, vocab_size=vocab_size, **options)  # type: ignore[arg-type]
    many = SamplingTensors(many.temperature, torch.from_numpy(numbers), many.top_k, many.top_p, many.min_p)
    found = np.bincount(sample(logits.expand(num_draws, -1), many).numpy(), minlength=vocab_size)
    kept = expected > 0
    assert found[~kept].sum() == 0
    freedom = kept.sum() - 1
    assert chi_square(found[kept], expected[kept] * num_draws) < freedom + 6 * np.sqrt(2 * freedom)


# --- filters against Transformers' -----------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    vocab_size=st.sampled_from([5, 40, 300, 700]),
    spread=st.sampled_from([0.01, 1.0, 4.0]),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 2, 7, 255, 256, 257, 600]),
    top_p=st.sampled_from([0.01, 0.3, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    seed=st.integers(0, 1000),
)
def test_filters_equal_those_of_transformers(
    vocab_size: int, spread: float, temperature: float, top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    """Fewer and more than the candidates that are sorted first, peaked and flat."""
    top_k = min(top_k, vocab_size)
    logits = torch.randn(3, vocab_size, generator=torch.Generator().manual_seed(seed)) * spread
    setting = tensors(3, vocab_size=vocab_size, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    found = sampler(vocab_size).probabilities(logits, setting)
    found = found / found.sum(-1, keepdim=True)

    warpers: list[LogitsProcessor] = []
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        warpers.append(TopPLogitsWarper(top_p))
    expected = logits / temperature
    for warper in warpers:
        expected = warper(torch.zeros(3, 1, dtype=torch.long), expected)
    expected = expected.softmax(-1)
    # a border that lies within rounding of a cumulative sum may fall on either side
    differs = (found > 0) != (expected > 0)
    assert (expected[differs] + found[differs]).sum() <= 2e-2 * differs.any()
    assert int(differs.sum()) <= 3
    if not differs.any():
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_rows_of_one_batch_keep_their_own_filters() -> None:
    vocab_size = 500
    logits = torch.randn(4, vocab_size, generator=torch.Generator().manual_seed(0))
    together = SamplingTensors(
        temperature=torch.tensor([0.0, 1.0, 0.5, 2.0]),
        uniform=torch.full((4,), 0.6),
        top_k=torch.tensor([500, 3, 500, 400]),
        top_p=torch.tensor([1.0, 1.0, 0.7, 0.99]),
        min_p=torch.tensor([0.0, 0.0, 0.0, 0.2]),
    )
    sample = sampler(vocab_size)
    tokens = sample(logits, together)
    for row in range(4):
        own = SamplingTensors(*(getattr(together, name)[row : row + 1] for name in FILTERS))
        assert sample(logits[row : row + 1], own).item() == tokens[row]
    assert tokens[0] == logits[0].argmax()


FILTERS = ("temperature", "uniform", "top_k", "top_p", "min_p")


@pytest.mark.parametrize("number", [0.0, 0.5, float(np.float32(1.0 - 2.0**-24))])
def test_the_choice_is_never_a_token_without_probability(number: float) -> None:
    logits = torch.full((1, 50), -torch.inf)
    logits[0, 20:23] = 1.0
    chosen = sampler(50)(logits, SamplingTensors(torch.ones(1), torch.tensor([number])))
    assert 20 <= chosen.item() <= 22


def test_top_k_of_one_and_a_tiny_top_p_are_greedy() -> None:
    logits = torch.randn(64, 300, generator=torch.Generator().manual_seed(0))
    for options in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        setting = tensors(64, vocab_size=300, temperature=5.0, **options)  # type: ignore[arg-type]
        assert torch.equal(sampler(300)(logits, setting), logits.argmax(-1))


def test_a_temperature_too_small_to_divide_by_is_greedy() -> None:
    """A logit over it would be infinite, and infinity minus infinity no number."""
    table = SamplingTable(1, 8)
    table.set(0, Request("r", [1], SamplingParams(temperature=1e-40), seed=0, max_total_tokens=9))
    setting = table.gather(np.array([0]), np.array([1]), CPU)
    assert setting.all_greedy
    assert sampler(8)(torch.arange(8.0).unsqueeze(0), setting).item() == 7


# --- penalties -------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 19), min_size=2, max_size=30),
    num_prompt=st.integers(1, 30),
    repetition=st.sampled_from([0.5, 1.0, 1.7]),
    presence=st.sampled_from([-1.0, 0.0, 0.8]),
    frequency=st.sampled_from([-0.5, 0.0, 0.3]),
    padding=st.integers(0, 5),
)
def test_penalties(
    tokens: list[int], num_prompt: int, repetition: float, presence: float, frequency: float, padding: int
) -> None:
    """Repetition is Transformers' over prompt and output; presence and frequency count the output, after OpenAI."""
    num_prompt = min(num_prompt, len(tokens))
    logits = torch.randn(1, 20, generator=torch.Generator().manual_seed(0))
    expected = RepetitionPenaltyLogitsProcessor(repetition)(torch.tensor([tokens]), logits.clone())
    output = tokens[num_prompt:]
    for token in set(output):
        expected[0, token] -= presence + frequency * output.count(token)
    found = apply_penalties(
        logits,
        torch.tensor([tokens + [3] * padding]),
        torch.tensor([num_prompt]),
        torch.tensor([len(tokens)]),
        torch.tensor([repetition]),
        torch.tensor([presence]),
        torch.tensor([frequency]),
    )
    torch.testing.assert_close(found, expected)


def test_logprobs_are_of_the_raw_distribution() -> None:
    logits = torch.randn(3, 30, generator=torch.Generator().manual_seed(0))
    chosen = torch.tensor([4, 5, 6])
    found = gather_logprobs(logits, chosen, 2)
    expected = logits.log_softmax(-1)
    torch.testing.assert_close(found.logprobs, expected[range(3), chosen])
    assert torch.equal(found.top_ids, expected.topk(2).indices)
    assert found.ranks.tolist() == [
        1 + int((row > row[token]).sum()) for row, token in zip(expected, chosen, strict=True)
    ]


# --- every parameter, through the engine -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(tiny_llama: Path) -> Engine:
    return make_engine(tiny_llama, max_model_len=128)


def ask(
    engine: Engine, bad_token_ids: list[list[int]] | None = None, seed: int = 0, eos: Sequence[int] = (), **params: Any
) -> Sample:
    chosen = SamplingParams(**{"temperature": 0.0, "max_tokens": 12, **params})
    more = {"bad_token_ids": bad_token_ids or [], "eos_token_ids": list(eos)}
    return run(engine, [submit("r", PROMPT, chosen, seed, **more)])["r", 0]


@pytest.fixture(scope="module")
def greedy(engine: Engine) -> list[int]:
    return ask(engine).tokens


def test_seeds_repeat_and_differ(engine: Engine) -> None:
    first, again, other = (ask(engine, temperature=1.0, seed=seed).tokens for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**63 - 1])
def test_every_seed_that_is_accepted_works(engine: Engine, seed: int) -> None:
    samples = run(engine, [Submit("r", PROMPT, SamplingParams(n=3, seed=seed), seed)])
    assert len({tuple(sample.tokens) for sample in samples.values()}) == 3


def test_sample_i_uses_seed_plus_i(engine: Engine) -> None:
    several = run(engine, [submit("r", PROMPT, SamplingParams(n=3, max_tokens=12), seed=5)])
    for index in range(3):
        assert several["r", index].tokens == ask(engine, temperature=1.0, seed=5 + index).tokens


@pytest.mark.parametrize("params", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-30}])
def test_the_narrowest_filters_are_greedy(engine: Engine, greedy: list[int], params: dict[str, float]) -> None:
    assert ask(engine, **{"temperature": 3.0, **params}).tokens == greedy


def test_a_top_k_beyond_the_vocabulary_filters_nothing(engine: Engine) -> None:
    assert ask(engine, temperature=1.0, top_k=10**9).tokens == ask(engine, temperature=1.0).tokens


def test_max_tokens(engine: Engine, greedy: list[int]) -> None:
    found = ask(engine, max_tokens=5)
    assert (found.tokens, found.finish_reason) == (greedy[:5], FinishReason.LENGTH)


def test_stop_token_ids_and_min_tokens(engine: Engine, greedy: list[int]) -> None:
    stop = greedy[3]
    stopped = ask(engine, stop_token_ids=[stop])
    assert stopped.tokens == greedy[: greedy.index(stop) + 1]
    assert stopped.finish_reason is FinishReason.STOP
    held = ask(engine, stop_token_ids=[stop], min_tokens=6)
    assert stop not in held.tokens[:6]
    assert len(held.tokens) >= 6


def test_an_end_token_ends_unless_it_is_ignored(engine: Engine, greedy: list[int]) -> None:
    eos = [greedy[2], 999]  # one that the model cannot even say
    found = ask(engine, eos=eos)
    assert found.tokens == greedy[: greedy.index(greedy[2]) + 1]
    assert found.finish_reason is FinishReason.STOP
    assert ask(engine, eos=eos, ignore_eos=True).tokens == greedy
    assert greedy[2] not in ask(engine, eos=eos, min_tokens=5).tokens[:5]


def test_logit_bias(engine: Engine, greedy: list[int]) -> None:
    assert ask(engine, logit_bias={77: 100.0}).tokens == [77] * 12
    assert greedy[0] not in ask(engine, logit_bias={greedy[0]: -100.0}).tokens


def test_allowed_token_ids(engine: Engine) -> None:
    assert set(ask(engine, allowed_token_ids=[5, 6, 7], temperature=3.0).tokens) == {5, 6, 7}


def test_logprobs_do_not_see_what_was_forbidden(engine: Engine, greedy: list[int]) -> None:
    found = ask(engine, allowed_token_ids=[5], logprobs=1)
    assert found.logprobs[0].token_id == 5
    assert found.logprobs[0].top_ids == [greedy[0]]
    assert found.logprobs[0].rank > 1


def test_bad_words(engine: Engine, greedy: list[int]) -> None:
    one = ask(engine, bad_words=["x"], bad_token_ids=[[greedy[4]]]).tokens
    assert greedy[4] not in one
    assert one[:4] == greedy[:4]
    pair = ask(engine, bad_words=["xy"], bad_token_ids=[greedy[4:6]]).tokens
    assert pair[:5] == greedy[:5]
    assert pair[5] != greedy[5]
    across = ask(engine, bad_words=["xy"], bad_token_ids=[[PROMPT[-1], greedy[0]]]).tokens
    assert across[0] != greedy[0]


@pytest.mark.parametrize("params", [{"repetition_penalty": 1.8}, {"presence_penalty": 2.0}, {"frequency_penalty": 2.0}])
def test_penalties_equal_a_loop_over_the_model(engine: Engine, tiny_llama: Path, params: dict[str, float]) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    expected: list[int] = []
    for _ in range(12):
        tokens = [*PROMPT, *expected]
        with torch.inference_mode():
            logits = model(torch.tensor([tokens])).logits[:, -1]
        logits = RepetitionPenaltyLogitsProcessor(params.get("repetition_penalty", 1.0))(torch.tensor([tokens]), logits)
        for token in set(expected):
            logits[0, token] -= params.get("presence_penalty", 0.0)
            logits[0, token] -= params.get("frequency_penalty", 0.0) * expected.count(token)
        expected.append(int(logits.argmax()))
    assert ask(engine, **params).tokens == expected


def test_more_logprobs_than_tokens_that_were_asked_for_by_another(engine: Engine) -> None:
    """Each request of a batch gets its own number of alternatives."""
    wanted = {"none": None, "chosen": 0, "five": 5}
    samples = run(
        engine,
        [submit(name, PROMPT, SamplingParams(max_tokens=3, logprobs=count)) for name, count in wanted.items()],
    )
    assert samples["none", 0].logprobs == []
    for name in ("chosen", "five"):
        assert [len(item.top_ids) for item in samples[name, 0].logprobs] == [wanted[name]] * 3
