"""Acceptance of drafts: what counts is what sampling brings one token at a time, in distribution and by the token."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from octavo.attention.torch_backend import TorchAttention
from octavo.batch import PlannedRow, StepPlan
from octavo.interfaces import AttentionNeed, AttentionSpec, Placement
from octavo.layers.attention import ForwardContext
from octavo.operations import SampleNeed
from octavo.request import Request, SamplingParams
from octavo.runner import Runner
from octavo.sampling import REJECTED, TorchLogprobs, TorchSample, accept, make_processors

CPU = torch.device("cpu")
VOCAB_SIZE = 8


def accept_one_by_one(tokens: list[int], drafts: list[int]) -> list[int]:
    """One row, as the words say it; the last draft is not read."""
    counted: list[int] = []
    for token, draft in zip(tokens, drafts, strict=True):
        counted.append(token)
        if token != draft:
            break
    return counted + [REJECTED] * (len(tokens) - len(counted))


token = st.integers(0, 2)


@given(rows=st.lists(st.lists(st.tuples(token, token), min_size=1, max_size=6), min_size=1, max_size=6))
def test_each_row_counts_up_to_its_first_wrong_draft(rows: list[list[tuple[int, int]]]) -> None:
    lengths = [len(row) for row in rows]
    first = np.repeat(np.cumsum([0, *lengths[:-1]]), lengths)
    flat = torch.tensor([pair for row in rows for pair in row])
    counted = accept(flat[:, 0], flat[:, 1], torch.from_numpy(first)).tolist()
    assert counted == [x for row in rows for x in accept_one_by_one([t for t, _ in row], [d for _, d in row])]


class Markov:
    """A model whose next token depends on the last one only: a table of logits [vocab_size, vocab_size]."""

    def __init__(self, table: torch.Tensor) -> None:
        self.table = table

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        return self.table[tokens]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.clone()


TABLE = torch.randn(VOCAB_SIZE, VOCAB_SIZE, generator=torch.Generator().manual_seed(5)) * 1.5


def make_runner(num_rows: int) -> Runner:
    need = AttentionNeed(CPU, torch.float32, torch.float32, 4, 8, 1, 1)
    return Runner(
        Markov(TABLE),  # type: ignore[arg-type]
        TorchAttention(need),
        [AttentionSpec(0, 1, 1, 8, 1.0)],
        Placement(CPU, torch.float32),
        num_blocks=num_rows * 3,
        block_size=4,
        kv_dtype=torch.float32,
        max_num_seqs=num_rows,
        max_model_len=12,
        vocab_size=VOCAB_SIZE,
        processors=make_processors([], VOCAB_SIZE, CPU),
        sample=TorchSample(SampleNeed(CPU, VOCAB_SIZE)),
        logprobs=TorchLogprobs(SampleNeed(CPU, VOCAB_SIZE)),
    )


def sample(params: SamplingParams, prompt: list[int], drafts: list[int], num_samples: int) -> list[list[int]]:
    """What one step brings to that many requests that differ in their seeds only."""
    runner, rows = make_runner(num_samples), []
    for seed in range(num_samples):
        request = Request(f"r{seed}", prompt, params, seed=seed * 7919, max_total_tokens=12)
        request.slot = seed
        request.blocks = list(range(seed * 3, seed * 3 + 3))
        rows.append(PlannedRow(request, 0, len(prompt) + len(drafts), True, tuple(drafts)))
    return [list(tokens) for tokens in runner.launch(StepPlan(rows)).wait().token_ids]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top-k": {"top_k": 3},
    "top-p": {"top_p": 0.7},
    "min-p": {"min_p": 0.2},
    "repetition": {"repetition_penalty": 1.8},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 1.5},
    "logit-bias": {"logit_bias": {1: 2.0, 2: -2.0}},
    "allowed": {"allowed_token_ids": [0, 1, 2, 5]},
    "everything": {"temperature": 1.3, "top_k": 6, "top_p": 0.95, "min_p": 0.02, "frequency_penalty": 0.5},
}
PROMPT = [3, 1]


def distribution(params: SamplingParams, tokens: list[int]) -> np.ndarray:
    """Of the token after ``tokens``, by the definitions of the options and none of the sampler's code."""
    logits = TABLE[tokens[-1]].double().numpy().copy()
    for index, bias in (params.logit_bias or {}).items():
        logits[index] += bias
    if params.allowed_token_ids is not None:
        logits[[i for i in range(VOCAB_SIZE) if i not in params.allowed_token_ids]] = -np.inf
    for index in range(VOCAB_SIZE):
        if index in tokens:
            logits[index] *= params.repetition_penalty if logits[index] < 0 else 1 / params.repetition_penalty
        count = tokens[len(PROMPT) :].count(index)
        logits[index] -= count * params.frequency_penalty + (count > 0) * params.presence_penalty
    p = np.exp((logits - logits.max()) / params.temperature)
    p /= p.sum()
    p[p < params.min_p * p.max()] = 0.0
    order = np.argsort(-p)
    if params.top_k:
        p[order[params.top_k :]] = 0.0
    p /= p.sum()
    kept_before = np.cumsum(p[order]) - p[order]
    p[order[kept_before >= params.top_p]] = 0.0
    return p / p.sum()


@pytest.mark.parametrize("option", OPTIONS)
def test_tokens_have_the_targets_distribution(option: str) -> None:
    """Chi-square over all continuations of two tokens: the draft, what replaces it, and what follows it.

    5000 samples; the bound is the 99.99th percentile of the distribution (Wilson and Hilferty 1931).
    """
    params = SamplingParams(max_tokens=8, **OPTIONS[option])
    first = distribution(params, PROMPT)
    draft = int(np.argsort(first)[-2])  # neither nearly always right nor nearly always wrong
    num_samples = 5000
    outputs = sample(params, PROMPT, [draft], num_samples)
    expected: dict[tuple[int, ...], float] = {(i,): p for i, p in enumerate(first) if i != draft}
    after = distribution(params, [*PROMPT, draft])
    expected |= {(draft, i): first[draft] * p for i, p in enumerate(after)}
    observed = dict.fromkeys(expected, 0)
    for tokens in outputs:
        observed[tuple(tokens)] += 1
    assert all(observed[key] == 0 for key, p in expected.items() if p == 0.0)
    # what is expected fewer than 5 times is counted together
    rare = [key for key, p in expected.items() if 0.0 < p * num_samples < 5.0]
    cells = [(observed[key], p * num_samples) for key, p in expected.items() if p * num_samples >= 5.0]
    rare_expected = sum(expected[key] for key in rare) * num_samples
    if rare_expected >= 1.0:
        cells.append((sum(observed[key] for key in rare), rare_expected))
    statistic = sum((seen - wanted) ** 2 / wanted for seen, wanted in cells)
    freedom = len(cells) - 1
    assert freedom >= 3
    bound = freedom * (1 - 2 / (9 * freedom) + 3.719 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert statistic < bound, (statistic, bound, freedom)


@pytest.mark.parametrize("option", OPTIONS)
def test_the_tokens_are_those_that_come_one_at_a_time(option: str) -> None:
    params = SamplingParams(max_tokens=8, **OPTIONS[option])
    drafts: list[int] = []
    for _ in range(3):
        drafts.append(int(np.argmax(distribution(params, [*PROMPT, *drafts]))))
    together = sample(params, PROMPT, drafts, 300)
    assert {len(tokens) for tokens in together} == {1, 2, 3, 4}
    for known in range(3):
        alone = continue_output(params, drafts[:known], 300)
        for tokens, (expected,) in zip(together, alone, strict=True):
            if len(tokens) > known:
                assert tokens[known] == expected


def continue_output(params: SamplingParams, output: list[int], num_samples: int) -> list[list[int]]:
    """The next token after ``output``, which counts as output and not as prompt."""
    runner, rows = make_runner(num_samples), []
    for seed in range(num_samples):
        request = Request(f"r{seed}", PROMPT, params, seed=seed * 7919, max_total_tokens=12)
        request.tokens += output
        request.slot = seed
        request.blocks = list(range(seed * 3, seed * 3 + 3))
        rows.append(PlannedRow(request, 0, len(request.tokens), True))
    return [list(tokens) for tokens in runner.launch(StepPlan(rows)).wait().token_ids]


def test_log_probabilities_belong_to_the_tokens_that_count() -> None:
    params = SamplingParams(max_tokens=8, logprobs=2, temperature=0.0)
    best = [int(TABLE[PROMPT[-1]].argmax())]
    best.append(int(TABLE[best[-1]].argmax()))
    wrong = (int(TABLE[best[-1]].argmax()) + 1) % VOCAB_SIZE
    runner = make_runner(1)
    request = Request("r", PROMPT, params, seed=0, max_total_tokens=12)
    request.slot, request.blocks = 0, [0, 1, 2]
    drafts = (*best, wrong)
    result = runner.launch(StepPlan([PlannedRow(request, 0, 5, True, drafts)])).wait()
    (tokens,), (logprobs,) = result.token_ids, result.logprobs
    assert len(tokens) == 3  # two right drafts, and the token in place of the wrong one
    assert logprobs is not None
    assert [item.token_id for item in logprobs] == list(tokens)
    assert all(item.rank == 1 for item in logprobs)
    before = [PROMPT[-1], *tokens[:-1]]
    for item, last in zip(logprobs, before, strict=True):
        assert item.logprob == pytest.approx(float(TABLE[last].log_softmax(0)[item.token_id]), abs=1e-5)
        assert len(item.top_ids) == 2


def test_a_forbidden_sequence_is_seen_through_drafts() -> None:
    """The history of a draft's position ends with the drafts before it, and not with those after."""
    best = int(TABLE[PROMPT[-1]].argmax())
    after = int(TABLE[best].argmax())
    params = SamplingParams(max_tokens=8, temperature=0.0, bad_words=["x"])
    runner = make_runner(1)
    request = Request("r", PROMPT, params, seed=0, max_total_tokens=12, bad_token_ids=[[best, after]])
    request.slot, request.blocks = 0, [0, 1, 2]
    result = runner.launch(StepPlan([PlannedRow(request, 0, 5, True, (best, after, 0))])).wait()
    (tokens,) = result.token_ids
    assert len(tokens) == 2
    assert tokens[0] == best
    assert tokens[1] == int(TABLE[best].topk(2).indices[1])
