"""The draft model beside the target: it follows its requests through everything, and its memory is bounded."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from tests.plugins.speculative.conftest import VOCAB_SIZE, Models, make_config, make_engine, run, tiny_config
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from octavo import ConfigError, SamplingParams, SpeculativeConfig
from octavo.batch import StepPlan
from octavo.request import Request
from octavo.runner import LaunchedStep
from octavo_speculative.draft_model import DraftModel

PARAMS = SamplingParams(temperature=0.0, max_tokens=None)
BLOCKS_EACH = 96  # of a request: enough for the longest in blocks of one token


class Beside:
    """A drafter beside its target, without an engine: a test plays the target."""

    def __init__(self, models: Models, **options: Any) -> None:
        speculative = SpeculativeConfig(model=str(models.drafts["other"]), dtype="float32", num_tokens=4, fixed=True)
        engine = make_engine(make_config(models, speculative, **{"num_blocks": 8 * BLOCKS_EACH, **options}))
        drafter = engine._speculation._drafter  # type: ignore[attr-defined]
        assert isinstance(drafter, DraftModel)
        self.drafter = drafter
        self._target = engine.runner
        self._launch = drafter._runner.launch
        drafter._runner.launch = self._count  # type: ignore[method-assign]
        self.num_computed = 0

    def _count(self, plan: StepPlan) -> LaunchedStep:
        self.num_computed += plan.num_tokens
        return self._launch(plan)

    def request(self, name: str, tokens: Sequence[int], slot: int) -> Request:
        request = Request(name, tokens, PARAMS, seed=0, max_total_tokens=96)
        self.place(request, slot)
        return request

    def place(self, request: Request, slot: int) -> None:
        """Give the request a slot and the blocks that nobody else has."""
        request.slot = slot
        first = slot * BLOCKS_EACH
        request.blocks = list(range(first, first + BLOCKS_EACH // self._target.block_size))

    def draft(self, requests: Sequence[Request], limits: Sequence[int]) -> list[list[int] | None]:
        for request in requests:  # the target has sampled them there
            self._target._tokens.write(request.slot, 0, request.tokens)
        return self.drafter.draft(requests, limits)


@pytest.fixture(scope="session")
def reference(models: Models) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(models.drafts["other"], dtype=torch.float32)


def greedy(reference: LlamaForCausalLM, tokens: Sequence[int], num_tokens: int) -> list[int]:
    """By Transformers, without a cache."""
    text = list(tokens)
    for _ in range(num_tokens):
        with torch.no_grad():
            text.append(int(reference(torch.tensor([text])).logits[0, -1].argmax()))
    return text[len(tokens) :]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_drafts_are_the_draft_models_own_continuation(
    models: Models, reference: LlamaForCausalLM, data: st.DataObject
) -> None:
    """Whatever became of earlier drafts, however many steps went by, and wherever the requests have moved."""
    beside = Beside(models, block_size=data.draw(st.sampled_from([1, 4])))
    source = random.Random(data.draw(st.integers(0, 1000)))
    requests = [beside.request(f"r{i}", source.choices(range(VOCAB_SIZE), k=1 + 4 * i), i) for i in range(3)]
    last: dict[str, list[int]] = {}
    for _ in range(data.draw(st.integers(1, 6))):
        asked = [request for request in requests if source.random() < 0.7]
        limits = [source.randint(0, 4) for _ in asked]
        for request, limit, drafts in zip(asked, limits, beside.draft(asked, limits), strict=True):
            assert drafts is not None
            assert drafts == greedy(reference, request.tokens, limit)
            last[request.request_id] = drafts
        for request in requests:
            right = last.pop(request.request_id, [])
            request.tokens += right[: source.randint(0, len(right))]
            request.tokens += source.choices(range(VOCAB_SIZE), k=source.randint(0, 3))
        if source.random() < 0.3:  # as after a preemption
            slots = source.sample(range(8), k=3)
            for request, slot in zip(requests, slots, strict=True):
                request.num_preemptions += 1
                beside.place(request, slot)


def test_a_long_prompt_is_read_in_pieces(models: Models, reference: LlamaForCausalLM) -> None:
    beside = Beside(models, max_num_batched_tokens=8, max_num_seqs=4)
    long = beside.request("long", [i * 7 % VOCAB_SIZE for i in range(20)], 0)
    short = beside.request("short", [1, 2, 3], 1)
    found = [beside.draft([long, short], [2, 2]) for _ in range(4)]
    assert found[0] == [None, greedy(reference, short.tokens, 2)]
    assert found[-1] == [greedy(reference, long.tokens, 2), greedy(reference, short.tokens, 2)]


def test_shared_blocks_are_computed_once(models: Models, reference: LlamaForCausalLM) -> None:
    """What the prefix cache or a fork gives two requests in common is in the draft model's cache as well."""
    beside = Beside(models)
    first = beside.request("first", [i * 7 % VOCAB_SIZE for i in range(19)], 0)
    second = beside.request("second", [*first.tokens[:16], 5, 6, 7], 1)
    second.blocks[:4] = first.blocks[:4]
    beside.draft([first], [1])
    before = beside.num_computed
    assert beside.draft([second], [1]) == [greedy(reference, second.tokens, 1)]
    assert beside.num_computed - before == 3


def test_a_block_that_was_overwritten_is_computed_again(models: Models, reference: LlamaForCausalLM) -> None:
    beside = Beside(models)
    first = beside.request("first", [i * 7 % VOCAB_SIZE for i in range(9)], 0)
    beside.draft([first], [1])
    other = beside.request("other", [3] * 9, 1)
    other.blocks = list(first.blocks)
    assert beside.draft([other], [2]) == [greedy(reference, other.tokens, 2)]
    first.num_preemptions += 1
    assert beside.draft([first], [2]) == [greedy(reference, first.tokens, 2)]


def test_the_prefix_cache_serves_the_draft_model_too(models: Models) -> None:
    speculative = SpeculativeConfig(model=str(models.drafts["same"]), dtype="float32", fixed=True)
    engine = make_engine(make_config(models, speculative))
    prompt = [i * 7 % VOCAB_SIZE for i in range(64)]
    params = SamplingParams(temperature=0.0, max_tokens=6)
    num_computed: list[int] = []
    launch = engine._speculation._drafter._runner.launch  # type: ignore[attr-defined]

    def count(plan: StepPlan) -> LaunchedStep:
        num_computed.append(plan.num_tokens)
        return launch(plan)  # type: ignore[no-any-return]

    engine._speculation._drafter._runner.launch = count  # type: ignore[attr-defined]
    first = run(engine, [(prompt, params)])
    cold = sum(num_computed)
    num_computed.clear()
    assert run(engine, [(prompt, params)]).outputs == first.outputs
    assert sum(num_computed) < cold - 50


def test_the_memory_of_both_models_is_planned(models: Models) -> None:
    alone = make_engine(make_config(models, num_blocks=None, cpu_kv_cache_gib=0.01))
    speculative = SpeculativeConfig(model=str(models.drafts["same"]), dtype="float32")
    both = make_engine(make_config(models, speculative, num_blocks=None, cpu_kv_cache_gib=0.01))
    assert both.info.num_blocks == pytest.approx(alone.info.num_blocks / 2, rel=0.02)


# --- vocabularies ----------------------------------------------------------------------------------------------------


def other_vocabulary(folder: Path, models: Models) -> Path:
    LlamaForCausalLM(tiny_config()).save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(models.target)
    tokenizer.add_tokens(["<strange>"])
    tokenizer.save_pretrained(folder)
    return folder


def test_a_draft_model_with_another_vocabulary_is_refused(models: Models, tmp_path: Path) -> None:
    speculative = SpeculativeConfig(model=str(other_vocabulary(tmp_path, models)), dtype="float32")
    with pytest.raises(ConfigError, match=r"another vocabulary.*1 tokens differ, such as '<strange>'.*ngram"):
        make_engine(make_config(models, speculative))


def test_without_weights_sizes_are_compared(models: Models, tmp_path: Path) -> None:
    tiny_config(vocab_size=50).save_pretrained(tmp_path)
    config = LlamaForCausalLM(tiny_config(vocab_size=50))
    config.save_pretrained(tmp_path)
    speculative = SpeculativeConfig(model=str(tmp_path), dtype="float32")
    with pytest.raises(ConfigError, match="has 50 tokens, but the target's has 40"):
        make_engine(make_config(models, speculative, load_format="dummy"))


@pytest.mark.parametrize("vocab_size", [32, 64])
def test_vocabularies_that_are_padded_differently_work(models: Models, tmp_path: Path, vocab_size: int) -> None:
    """The draft model guesses no token that the target lacks, and reads none that it lacks itself."""
    torch.manual_seed(1)
    LlamaForCausalLM(tiny_config(vocab_size=vocab_size)).save_pretrained(tmp_path)
    PreTrainedTokenizerFast.from_pretrained(models.target).save_pretrained(tmp_path)
    both = list(range(32))
    requests = [
        ([1, 2, 3, 39], SamplingParams(temperature=0.0, max_tokens=30)),
        ([5, 6], SamplingParams(temperature=0.0, max_tokens=30, allowed_token_ids=both)),
    ]
    speculative = SpeculativeConfig(model=str(tmp_path), dtype="float32", fixed=True)
    plain = run(make_engine(make_config(models)), requests)
    guessed = run(make_engine(make_config(models, speculative)), requests)
    assert guessed.outputs == plain.outputs
    assert guessed.num_draft_tokens > 0


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("speculative", "message"),
    [
        ({"method": "draft-model"}, "needs a model; name one with --speculative-model"),
        ({"method": "ngram", "model": "MODEL"}, "--speculative-model .* ngram has none"),
        ({"method": "ngram", "quantization": "awq"}, "--speculative-quantization awq"),
        ({"method": "ngram", "dtype": "float16"}, "--speculative-dtype float16"),
        ({"method": "crystal-ball"}, "no drafter is called 'crystal-ball'; there are: draft-model, eagle, ngram"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    models: Models, speculative: dict[str, Any], message: str
) -> None:
    if "model" in speculative:
        speculative = {**speculative, "model": str(models.drafts["same"])}
    with pytest.raises(ConfigError, match=message):
        make_engine(make_config(models, SpeculativeConfig(**speculative)))


@pytest.mark.parametrize("bounds", [(0, 3), (3, 2), (2, 17)])
def test_bounds_of_ngrams_are_checked(models: Models, bounds: tuple[int, int]) -> None:
    options = {"speculative_ngram_min": bounds[0], "speculative_ngram_max": bounds[1]}
    with pytest.raises(ConfigError, match="between 1 and 16"):
        make_engine(make_config(models, SpeculativeConfig(method="ngram"), plugin_options=options))


def test_speculation_without_its_plugin_is_refused(models: Models) -> None:
    with pytest.raises(ConfigError, match=r"speculation by ngram is configured.*no:speculative"):
        make_engine(make_config(models, SpeculativeConfig(method="ngram"), plugins="no:speculative"))
