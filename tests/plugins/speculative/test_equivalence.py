"""What comes out with speculation is what comes out without it, token for token, whatever else is switched on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from tests.plugins.speculative.conftest import VOCAB_SIZE, Erratic, Models, Run, make_config, make_engine, run

from octavo import ConfigError, EngineConfig, Provider, SamplingParams, SpeculativeConfig
from octavo.interfaces import DrafterContext, SampleRow
from octavo.messages import Abort, Submit
from octavo.plugins import PluginHost
from octavo.request import Request
from octavo.runner import Runner
from octavo.speculation import AdaptiveController, Speculation

DRAFTERS = ("ngram", "same", "noisy", "other")
Requests = list[tuple[list[int], SamplingParams]]


def speculation(models: Models, drafter: str, num_tokens: int = 3, fixed: bool = True) -> SpeculativeConfig:
    if drafter == "ngram":
        return SpeculativeConfig(method="ngram", num_tokens=num_tokens, fixed=fixed)
    return SpeculativeConfig(model=str(models.drafts[drafter]), dtype="float32", num_tokens=num_tokens, fixed=fixed)


def make_requests(seed: int, num_requests: int, **params: Any) -> Requests:
    """Prompts of different lengths, half of them with a repetition in them and half of them with a common beginning."""
    source = random.Random(seed)
    common = source.choices(range(VOCAB_SIZE), k=9)
    requests = []
    for number in range(num_requests):
        prompt = source.choices(range(VOCAB_SIZE), k=source.randint(1, 24))
        prompt = prompt * 2 if source.random() < 0.5 else prompt
        prompt = common + prompt if source.random() < 0.5 else prompt
        max_tokens = source.randint(1, 24)
        changes = {"max_tokens": max_tokens, "seed": number, **params}
        changes["min_tokens"] = min(changes.get("min_tokens", 0), max_tokens)
        requests.append((prompt, SamplingParams(**changes)))
    return requests


def compare(
    models: Models, speculative: SpeculativeConfig, requests: Requests, erratic: int | None = None, **options: Any
) -> Run:
    bad = [[5], [7, 9]]
    plain = run(make_engine(make_config(models, **{**options, "overlap": False})), requests, bad)
    engine = make_engine(make_config(models, speculative, **options))
    if erratic is not None:
        speculation = engine._speculation
        assert isinstance(speculation, Speculation)
        speculation._controller = Erratic(speculative.num_tokens, erratic)
    for output in plain.outputs.values():
        output.logprobs = pytest.approx(output.logprobs, abs=1e-3)
    guessed = run(engine, requests, bad)
    assert guessed.outputs == plain.outputs
    again = run(engine, requests, bad)  # with a warm prefix cache, and drafters that have forgotten the first round
    assert again.outputs == plain.outputs
    return guessed


options = st.fixed_dictionaries(
    {
        "block_size": st.sampled_from([1, 4, 8]),
        "max_num_batched_tokens": st.sampled_from([4, 11, 64]),
        "max_num_seqs": st.sampled_from([2, 4]),
        "num_blocks": st.sampled_from([96, 110, 400]),  # 96 blocks of 1 hold one sequence of the longest kind only
        "enable_prefix_caching": st.booleans(),
        "overlap": st.booleans(),
    }
)
sampling = st.fixed_dictionaries(
    {"temperature": st.sampled_from([0.0, 0.0, 0.9])},
    optional={
        "n": st.sampled_from([1, 2, 3]),
        "stop_token_ids": st.just([1, 2, 3, 11, 12]),
        "min_tokens": st.integers(1, 8),
        "repetition_penalty": st.just(1.3),
        "presence_penalty": st.just(0.7),
        "frequency_penalty": st.just(0.4),
        "logprobs": st.integers(0, 3),
        "logit_bias": st.just({3: 2.0, 4: -3.0}),
        "allowed_token_ids": st.just(list(range(0, VOCAB_SIZE, 2))),
        "bad_words": st.just(["x"]),
        "top_k": st.just(8),
        "top_p": st.just(0.8),
        "min_p": st.just(0.05),
    },
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    drafter=st.sampled_from(DRAFTERS),
    num_tokens=st.integers(1, 5),
    erratic=st.none() | st.integers(0, 1000),
    seed=st.integers(0, 1000),
    num_requests=st.integers(1, 5),
    options=options,
    params=sampling,
)
def test_output_is_the_same_with_and_without_speculation(
    models: Models,
    drafter: str,
    num_tokens: int,
    erratic: int | None,
    seed: int,
    num_requests: int,
    options: dict[str, Any],
    params: dict[str, Any],
) -> None:
    requests = make_requests(seed, num_requests, **params)
    compare(models, speculation(models, drafter, num_tokens), requests, erratic, **options)


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("overlap", [False, True])
def test_drafts_are_accepted_and_save_steps(models: Models, drafter: str, overlap: bool) -> None:
    requests = make_requests(1, 4, temperature=0.0, max_tokens=40, ignore_eos=True)
    guessed = compare(models, speculation(models, drafter), requests, overlap=overlap)
    assert guessed.num_drafts > 0
    assert 0 < guessed.num_accepted <= guessed.num_draft_tokens
    if drafter == "same":
        assert guessed.num_accepted == guessed.num_draft_tokens
        assert guessed.num_steps < 20  # 40 tokens, 4 a step
    elif drafter != "ngram":
        assert guessed.num_accepted < guessed.num_draft_tokens


@pytest.mark.parametrize("drafter", ["ngram", "noisy"])
def test_a_seed_means_the_same_tokens_with_and_without_speculation(models: Models, drafter: str) -> None:
    requests = make_requests(2, 4, temperature=0.8, max_tokens=40, top_p=0.9)
    guessed = compare(models, speculation(models, drafter), requests)
    assert guessed.num_draft_tokens > guessed.num_accepted > 0


@pytest.mark.parametrize("drafter", ["ngram", "same"])
def test_requests_that_give_way_go_on_as_before(models: Models, drafter: str) -> None:
    requests = make_requests(3, 6, temperature=0.0, max_tokens=30)
    guessed = compare(models, speculation(models, drafter), requests, num_blocks=26, block_size=4)
    assert guessed.num_preemptions > 0
    assert guessed.num_accepted > 0


@pytest.mark.parametrize("drafter", ["ngram", "same"])
@pytest.mark.parametrize("overlap", [False, True])
def test_the_controller_changes_nothing_but_the_speed(
    models: Models, drafter: str, overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AdaptiveController, "TRIAL_DEBT", 8.0)  # or sixty tokens would see few drafts
    requests = make_requests(1, 4, temperature=0.0, max_tokens=60, ignore_eos=True)
    guessed = compare(models, speculation(models, drafter, fixed=False), requests, overlap=overlap)
    assert guessed.num_drafts > 0


def test_an_aborted_request_takes_its_drafts_along(models: Models) -> None:
    engine = make_engine(make_config(models, speculation(models, "same")))
    params = SamplingParams(temperature=0.0, max_tokens=50)
    for name in ("a", "b"):
        engine.submit(Submit(name, [1, 2, 3], params, seed=0))
    for _ in range(3):
        engine.settle(engine.launch())
    engine.abort(Abort("a"))
    step = engine.launch()
    engine.abort(Abort("b"))
    outputs = engine.settle(step)
    engine.check()
    assert {output.request_id for output in outputs.sequences} == {"a", "b"}
    assert all(output.finish_reason == "abort" for output in outputs.sequences)
    assert engine.scheduler.blocks.num_free == engine.scheduler.blocks.num_blocks


class Parrot:
    """The smallest drafter: the last token again."""

    bytes_per_block = 0

    def __init__(self, config: EngineConfig, context: DrafterContext) -> None:
        pass

    def start(self, target: Runner) -> None:
        pass

    def num_unread(self, requests: Sequence[Request]) -> list[int]:
        return [0] * len(requests)

    def draft(self, requests: Sequence[Request], limits: Sequence[int]) -> list[list[int]]:
        return [[request.tokens[-1]] * limit for request, limit in zip(requests, limits, strict=True)]

    def release(self, request: Request) -> None:
        pass


def test_anybodys_drafter_is_treated_like_ours(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PluginHost, "drafters", lambda host: {"parrot": Provider("parrot", Parrot)})
    requests = make_requests(6, 3, temperature=0.0, max_tokens=30)
    speculative = SpeculativeConfig(method="parrot", num_tokens=2, fixed=True)
    guessed = compare(models, speculative, requests, plugins="no:speculative")
    assert guessed.num_draft_tokens > 0


class Shy:
    """A processor that declares that it does not work with speculation."""

    needs_history = False
    works_with_speculation = False

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        pass

    def wants(self, params: SamplingParams) -> bool:
        return False

    def apply(self, logits: torch.Tensor, rows: Sequence[tuple[int, SampleRow]]) -> None:
        pass


def test_a_processor_that_does_not_work_with_speculation_is_refused(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PluginHost, "logits_processors", lambda host: {"shy": Provider("shy", Shy)})
    make_engine(make_config(models))
    with pytest.raises(ConfigError, match="processor Shy does not work with speculation"):
        make_engine(make_config(models, speculation(models, "ngram")))
