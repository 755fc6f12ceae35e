"""The engine says what the model says, whatever sizes it is given and whatever else it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from tests.engines import Sample, make_engine, run, submit
from transformers import LlamaForCausalLM

from octavo.engine import Engine
from octavo.errors import ConfigError
from octavo.messages import Abort, Submit, TokenLogprobs
from octavo.request import FinishReason, SamplingParams
from octavo.sampling import SamplingTensors, TorchSample
from octavo.speculation import NoSpeculation

NUM_TOKENS = 20
MAX_MODEL_LEN = 128
BACKENDS = ["torch", "cpu"]
PROMPTS = [
    [7],
    [5, 9],
    list(range(40, 56)),
    list(range(40, 57)),
    list(range(40, 72)),
    [3, 1, 4, 1, 5, 9, 2, 6] * 9,
    list(range(200, 100, -1)),
]
SAMPLED = {"temperature": 1.3, "max_tokens": NUM_TOKENS}
KINDS = [
    SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS),
    SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, logprobs=3, prompt_logprobs=2),
    SamplingParams(**SAMPLED),
    SamplingParams(**SAMPLED, top_k=20, top_p=0.9, min_p=0.01, logprobs=0),
    SamplingParams(**SAMPLED, repetition_penalty=1.4, presence_penalty=0.7, frequency_penalty=-0.4),
    SamplingParams(**SAMPLED, bad_words=("two tokens",), logit_bias={11: 3.0, 12: -100.0}),
    SamplingParams(**SAMPLED, allowed_token_ids=tuple(range(30, 90)), min_tokens=3, stop_token_ids=tuple(range(50))),
    SamplingParams(**SAMPLED, n=3),
    SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, n=2),
]
BAD_TOKENS = [[60, 61], [33], [80, 81, 82]]


@cache
def reference_model(path: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@cache
def generated(path: Path, prompt: tuple[int, ...]) -> list[int]:
    """What Transformers generates."""
    ids = torch.tensor([prompt])
    output = reference_model(path).generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_TOKENS, do_sample=False, pad_token_id=0
    )
    return output[0, len(prompt) :].tolist()


def reference_logprobs(path: Path, tokens: Sequence[int]) -> torch.Tensor:
    """[len(tokens), vocab_size]: row i is the distribution of token i + 1."""
    with torch.inference_mode():
        return reference_model(path)(torch.tensor([tokens])).logits[0].log_softmax(-1)


def make_submit(request_id: str, prompt: Sequence[int], params: SamplingParams, seed: int) -> Submit:
    return submit(request_id, prompt, params, seed, bad_token_ids=BAD_TOKENS if params.bad_words else [])


def engine_for(path: Path, **options: Any) -> Engine:
    return make_engine(path, **{"max_model_len": MAX_MODEL_LEN, **options})


class CloseCalls:
    """A sampler that notes how near its closest choice was to another token."""

    def __init__(self, sample: TorchSample) -> None:
        self._sample = sample
        self.margin = 1.0

    def __call__(self, logits: torch.Tensor, tensors: SamplingTensors) -> torch.Tensor:
        tokens = self._sample(logits, tensors)
        probabilities = self._sample.probabilities(logits, tensors).double()
        borders = probabilities.cumsum(-1) / probabilities.sum(-1, keepdim=True)
        drawn = (borders[:, :-1] - tensors.uniform.unsqueeze(1)).abs().amin(-1)
        first, second = logits.topk(2, dim=-1).values.unbind(-1)
        self.margin = min(self.margin, *torch.where(tensors.temperature == 0.0, first - second, drawn).tolist())
        return tokens


@cache
def alone(path: Path, prompt: int, kind: int, seed: int) -> dict[int, Sample]:
    """What a plain engine says to one request that it has for itself: no caching, no chunks, no overlap.

    Empty if a choice was so close that rounding, which depends on the batch, may turn it.
    """
    engine = engine_for(path, attention_backend="torch", enable_prefix_caching=False)
    engine.runner._sample = calls = CloseCalls(engine.runner._sample)  # type: ignore[assignment]
    samples = run(engine, [make_submit("alone", PROMPTS[prompt], KINDS[kind], seed)])
    return {index: sample for (_, index), sample in samples.items()} if calls.margin > 1e-5 else {}


def assert_same_logprobs(found: Sequence[TokenLogprobs | None], expected: Sequence[TokenLogprobs | None]) -> None:
    assert [item and (item.token_id, item.rank, item.top_ids) for item in found] == [
        item and (item.token_id, item.rank, item.top_ids) for item in expected
    ]
    numbers = [[item.logprob, *item.top_logprobs] for item in found if item]
    assert numbers == [
        pytest.approx([item.logprob, *item.top_logprobs], abs=1e-4) for item in expected if item is not None
    ]


# --- equal to Transformers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_greedy_tokens_equal_those_of_transformers(tiny_llama: Path, backend: str) -> None:
    engine = engine_for(tiny_llama, attention_backend=backend)
    samples = run(engine, [submit(str(i), prompt, KINDS[0]) for i, prompt in enumerate(PROMPTS)])
    for i, prompt in enumerate(PROMPTS):
        assert samples[str(i), 0].tokens == generated(tiny_llama, tuple(prompt))
        assert samples[str(i), 0].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk", [8, 2048])
def test_logprobs_equal_those_of_transformers(tiny_llama: Path, backend: str, chunk: int) -> None:
    engine = engine_for(tiny_llama, attention_backend=backend, max_num_batched_tokens=chunk)
    params = SamplingParams(temperature=1.0, max_tokens=NUM_TOKENS, logprobs=4, prompt_logprobs=3)
    samples = run(engine, [submit(str(i), prompt, params, seed=i) for i, prompt in enumerate(PROMPTS)])
    for i, prompt in enumerate(PROMPTS):
        sample = samples[str(i), 0]
        tokens = [*prompt, *sample.tokens]
        logprobs = reference_logprobs(tiny_llama, tokens)
        assert sample.prompt_logprobs is not None
        assert sample.prompt_logprobs[0] is None
        assert len(sample.prompt_logprobs) == len(prompt)
        for position, found in enumerate([*sample.prompt_logprobs, *sample.logprobs]):
            if found is None:
                continue
            row = logprobs[position - 1]
            num_top = 3 if position < len(prompt) else 4
            top = row.topk(num_top)
            assert found.token_id == tokens[position]
            assert found.logprob == pytest.approx(row[found.token_id].item(), abs=1e-4)
            assert found.rank == 1 + int((row > row[found.token_id]).sum())
            assert found.top_ids == top.indices.tolist()
            assert found.top_logprobs == pytest.approx(top.values.tolist(), abs=1e-4)


# --- independent of everything else ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """An engine's sizes and what it is given: (prompt, kind, seed, the step at which it arrives)."""

    options: dict[str, Any]
    requests: list[tuple[int, int, int, int]]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    backend = draw(st.sampled_from(BACKENDS))
    block_size = draw(st.sampled_from([1, 4, 16, 32] if backend == "torch" else [16, 32]))
    fewest = MAX_MODEL_LEN // block_size
    options = {
        "block_size": block_size,
        "num_blocks": draw(st.one_of(st.just(fewest), st.integers(fewest, 8 * fewest))),  # few: preemptions
        "max_num_seqs": draw(st.integers(1, 8)),
        "max_num_batched_tokens": draw(st.sampled_from([3, 8, 17, 64, 2048])),
        "max_num_partial_prefills": draw(st.integers(1, 4)),
        "enable_prefix_caching": draw(st.booleans()),
        "overlap": draw(st.booleans()),
        "attention_backend": backend,
        "scheduling_policy": draw(st.sampled_from(["fcfs", "priority"])),
    }
    request = st.tuples(
        st.integers(0, len(PROMPTS) - 1), st.integers(0, len(KINDS) - 1), st.integers(0, 2), st.integers(0, 20)
    )
    return Case(options, draw(st.lists(request, min_size=1, max_size=7)))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases())
def test_a_request_says_the_same_alone_and_in_any_company(tiny_llama: Path, case: Case) -> None:
    """Chunk size, block size, batch, arrival, preemption, n, overlap, prefix caching, backend: none of them shows."""
    later: dict[int, list[Submit]] = {}
    for name, (prompt, kind, seed, step) in enumerate(case.requests):
        later.setdefault(step, []).append(make_submit(str(name), PROMPTS[prompt], KINDS[kind], seed))
    samples = run(engine_for(tiny_llama, **case.options), [], later)
    for name, (prompt, kind, seed, _) in enumerate(case.requests):
        expected = alone(tiny_llama, prompt, kind, seed)
        for index, sample in expected.items():
            found = samples[str(name), index]
            assert found.tokens == sample.tokens
            assert found.finish_reason is sample.finish_reason
            assert_same_logprobs(found.logprobs, sample.logprobs)
            assert_same_logprobs(found.prompt_logprobs or [], sample.prompt_logprobs or [])


@pytest.mark.parametrize("overlap", [False, True])
def test_preempted_requests_go_on_where_they_were(tiny_llama: Path, overlap: bool) -> None:
    engine = engine_for(tiny_llama, num_blocks=8, overlap=overlap)
    samples = run(engine, [submit(str(i), PROMPTS[3], KINDS[1]) for i in range(4)])
    assert sum(sample.num_preemptions for sample in samples.values()) > 0
    expected = alone(tiny_llama, 3, 1, 0)[0]
    for sample in samples.values():
        assert sample.tokens == expected.tokens
        assert_same_logprobs(sample.logprobs, expected.logprobs)
        assert_same_logprobs(sample.prompt_logprobs or [], expected.prompt_logprobs or [])


def test_a_prompt_seen_before_is_taken_from_the_cache(tiny_llama: Path) -> None:
    engine = engine_for(tiny_llama)
    first = run(engine, [submit("first", PROMPTS[6], KINDS[0])])["first", 0]
    again = run(engine, [submit("again", PROMPTS[6], KINDS[0])])["again", 0]
    other = run(engine, [submit("other", PROMPTS[6], KINDS[0], salt=b"somebody else's")])["other", 0]
    assert (first.num_cached, again.num_cached, other.num_cached) == (0, 96, 0)
    assert first.tokens == again.tokens == other.tokens


def test_an_answer_can_be_cached_too(tiny_llama: Path) -> None:
    engine = engine_for(tiny_llama)
    answer = run(engine, [submit("question", PROMPTS[2], KINDS[0])])["question", 0].tokens
    follow_up = run(engine, [submit("follow-up", [*PROMPTS[2], *answer, 1], KINDS[0])])["follow-up", 0]
    assert follow_up.num_cached == 32


def test_without_prefix_caching_nothing_is_found(tiny_llama: Path) -> None:
    engine = engine_for(tiny_llama, enable_prefix_caching=False)
    for name in ("first", "again"):
        assert run(engine, [submit(name, PROMPTS[6], KINDS[0])])[name, 0].num_cached == 0


# --- what becomes of a request ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_an_aborted_request_ends_and_the_others_go_on(tiny_llama: Path, steps: int, overlap: bool) -> None:
    engine = engine_for(tiny_llama, overlap=overlap, max_num_batched_tokens=32)
    samples = run(
        engine,
        [submit("stays", PROMPTS[5], KINDS[0]), submit("goes", PROMPTS[6], KINDS[7], seed=0)],
        {steps: [Abort("goes", 1)], steps + 1: [Abort("goes"), Abort("nobody"), Abort("goes")]},
    )
    assert samples["stays", 0].tokens == generated(tiny_llama, tuple(PROMPTS[5]))
    for index in range(3):
        assert samples["goes", index].finish_reason is FinishReason.ABORT
        expected = alone(tiny_llama, 6, 7, 0)[index].tokens
        assert samples["goes", index].tokens == expected[: len(samples["goes", index].tokens)]


@pytest.mark.parametrize("num_prompt", [0, MAX_MODEL_LEN, MAX_MODEL_LEN + 1])
def test_a_prompt_that_cannot_fit_ends_with_an_error(tiny_llama: Path, num_prompt: int) -> None:
    samples = run(engine_for(tiny_llama), [submit("r", [1] * num_prompt, SamplingParams(n=2))])
    for index in range(2):
        assert samples["r", index].finish_reason is FinishReason.ERROR
        assert f"the prompt has {num_prompt} tokens" in (samples["r", index].error or "")


def test_the_longest_request_fills_the_context_and_the_smallest_pool(tiny_llama: Path) -> None:
    engine = engine_for(tiny_llama, num_blocks=MAX_MODEL_LEN // 16)
    params = SamplingParams(temperature=0.0, max_tokens=None)
    samples = run(engine, [submit(str(i), prompt, params) for i, prompt in enumerate([[1] * (MAX_MODEL_LEN - 1), [1]])])
    assert [len(samples[name, 0].tokens) for name in "01"] == [1, MAX_MODEL_LEN - 1]


def test_more_requests_than_slots_and_blocks_all_end(tiny_llama: Path) -> None:
    engine = engine_for(tiny_llama, num_blocks=10, max_num_seqs=3)
    samples = run(engine, [submit(str(i), PROMPTS[i % 5], KINDS[0]) for i in range(40)])
    for i in range(40):
        assert samples[str(i), 0].tokens == generated(tiny_llama, tuple(PROMPTS[i % 5]))


def test_samples_of_one_request_share_the_prompt(tiny_llama: Path) -> None:
    engine = engine_for(tiny_llama)
    launched = engine.runner.launch
    num_tokens: list[int] = []

    def counting(plan: Any) -> Any:
        num_tokens.append(plan.num_tokens)
        return launched(plan)

    engine.runner.launch = counting  # type: ignore[method-assign]
    run(engine, [submit("r", PROMPTS[6], SamplingParams(n=4, max_tokens=2))])
    assert sum(num_tokens) == len(PROMPTS[6]) + 3 + 4


@pytest.mark.parametrize("num_blocks", [1, MAX_MODEL_LEN // 16 - 1])
def test_a_pool_too_small_for_one_context_is_refused(tiny_llama: Path, num_blocks: int) -> None:
    with pytest.raises(ConfigError, match=r"max.model.len"):
        engine_for(tiny_llama, num_blocks=num_blocks)


def test_the_loop_overlaps_steps_when_told_to(tiny_llama: Path) -> None:
    order: dict[bool, list[str]] = {}
    for overlap in (False, True):
        engine = engine_for(tiny_llama, overlap=overlap)
        events = order[overlap] = []
        engine.launch = noting("launch", engine.launch, events)  # type: ignore[method-assign]
        engine.settle = noting("settle", engine.settle, events)  # type: ignore[method-assign]
        run(engine, [submit("r", [1, 2], SamplingParams(temperature=0.0, max_tokens=3))])
    assert order[False][:4] == ["launch", "settle", "launch", "settle"]
    assert order[True][:4] == ["launch", "launch", "settle", "launch"]


class Timed(NoSpeculation):
    """Keeps what steps have taken."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def settled(self, drafted: Any, plan: Any, settled: Any, stats: Any, seconds: float) -> None:
        self.seconds.append(seconds)


def test_a_step_takes_all_time_since_the_one_before_unless_there_was_nothing_to_do(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=100.0)
    fake = SimpleNamespace(perf_counter=lambda: clock.now, monotonic=lambda: clock.now)
    monkeypatch.setattr("octavo.engine.time", fake)
    engine = engine_for(tiny_llama)
    timed = engine._speculation = Timed()

    def step(seconds: float) -> None:
        launched = engine.launch()
        clock.now += seconds
        engine.settle(launched)

    engine.submit(submit("a", [1, 2], SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)))
    step(3.0)
    clock.now += 2.0  # somebody is told the token
    step(1.0)
    clock.now += 50.0  # the engine has nothing to do
    engine.submit(submit("b", [1, 2], SamplingParams(temperature=0.0, max_tokens=1)))
    step(1.0)
    assert timed.seconds == [3.0, 3.0, 1.0]


def noting(name: str, call: Callable[[Any], Any], events: list[str]) -> Callable[..., Any]:
    def noted(*arguments: Any) -> Any:
        events.append(name)
        return call(*arguments)

    return noted
