"""Tokens drawn on the device against those of torch."""

from __future__ import annotations

import pytest
import torch

from octavo.operations import SampleNeed
from octavo.sampling import SamplingTensors, TorchSample
from octavo_kernels.candidate_sample import CandidateSample

VOCAB = 5000  # more than one block
NUM_ROWS = 6


def make(device: torch.device, *, top_k: bool, top_p: bool, min_p: bool) -> SamplingTensors:
    """Rows with and without each filter, and a greedy one."""
    return SamplingTensors(
        temperature=torch.tensor([1.0, 0.7, 0.0, 1.5, 1.0, 0.3], device=device),
        uniform=torch.rand(NUM_ROWS, device=device),
        top_k=torch.tensor([1, 7, 5, VOCAB, 300, 40], device=device) if top_k else None,
        top_p=torch.tensor([0.9, 0.5, 0.9, 0.95, 1.0, 0.01], device=device) if top_p else None,
        min_p=torch.tensor([0.0, 0.02, 0.5, 0.001, 0.01, 0.0], device=device) if min_p else None,
    )


def samplers(device: torch.device) -> tuple[CandidateSample, TorchSample]:
    need = SampleNeed(device, VOCAB)
    return CandidateSample(need), TorchSample(need)


def misses(device: torch.device, logits: torch.Tensor, tensors: SamplingTensors) -> list[float]:
    """By how much of the mass the number that led to each chosen token misses that token's own interval."""
    kernel, reference = samplers(device)
    chosen = kernel(logits, tensors).unsqueeze(1)
    probabilities = reference.probabilities(logits, tensors).double()
    cumulative = probabilities.cumsum(dim=1) / probabilities.sum(dim=1, keepdim=True)
    end = cumulative.gather(1, chosen).squeeze(1)
    own = probabilities.gather(1, chosen).squeeze(1) / probabilities.sum(dim=1)
    number = tensors.uniform.double()
    away = torch.maximum(number - end, end - own - number).clamp(min=0.0)
    away[own == 0.0] = 1.0  # a token that is not kept at all
    greedy = tensors.temperature == 0.0
    away[greedy] = (chosen.squeeze(1) != logits.argmax(dim=1)).double()[greedy]
    return away.tolist()


@pytest.mark.parametrize("top_k", [False, True])
@pytest.mark.parametrize("top_p", [False, True])
@pytest.mark.parametrize("min_p", [False, True])
def test_draws_what_torch_draws(device: torch.device, top_k: bool, top_p: bool, min_p: bool) -> None:
    logits = torch.randn(NUM_ROWS, VOCAB, device=device) * 4
    tensors = make(device, top_k=top_k, top_p=top_p, min_p=min_p)
    assert max(misses(device, logits, tensors)) < 1e-5


@pytest.mark.parametrize("scale", [0.1, 2.0, 12.0])  # from nearly even to a handful of tokens that matter
def test_draws_what_torch_draws_with_one_filter_on_any_distribution(device: torch.device, scale: float) -> None:
    logits = torch.randn(NUM_ROWS, VOCAB, device=device) * scale
    logits[:, :200] += 3 * scale  # small ids are the likely ones, as in a real vocabulary
    for top_p in (None, torch.tensor([0.9, 0.5, 1.0, 0.95, 0.2, 0.99], device=device)):
        top_k = torch.tensor([1, 90, VOCAB, 1500, 4999, 20], device=device) if top_p is None else None
        tensors = SamplingTensors(
            torch.ones(NUM_ROWS, device=device), torch.rand(NUM_ROWS, device=device), top_k, top_p
        )
        assert max(misses(device, logits, tensors)) < 1e-5


def test_ties_at_the_threshold_are_kept(device: torch.device) -> None:
    logits = torch.full((2, VOCAB), -20.0, device=device)
    logits[:, [3, 4500, 4999]] = 2.0
    for number in (0.1, 0.5, 0.9):
        tensors = SamplingTensors(
            temperature=torch.ones(2, device=device),
            uniform=torch.full((2,), number, device=device),
            top_k=torch.tensor([2, 1], device=device),
        )
        kernel, reference = samplers(device)
        assert torch.equal(kernel(logits, tensors), reference(logits, tensors))


@pytest.mark.parametrize("number", [0.0, 1.0 - 2.0**-24])
def test_the_ends_of_the_interval_choose_tokens_that_are_possible(device: torch.device, number: float) -> None:
    logits = torch.full((1, VOCAB), -torch.inf, device=device)
    logits[0, [10, 4200]] = 0.0
    tensors = SamplingTensors(torch.ones(1, device=device), torch.full((1,), number, device=device))
    chosen = samplers(device)[0](logits, tensors)
    assert chosen.tolist() == [10 if number == 0.0 else 4200]


def test_greedy_rows_alone_and_no_rows(device: torch.device) -> None:
    kernel, _ = samplers(device)
    logits = torch.randn(3, VOCAB, device=device)
    greedy = SamplingTensors(torch.zeros(3, device=device), torch.rand(3, device=device), all_greedy=True)
    assert torch.equal(kernel(logits, greedy), logits.argmax(dim=1))
    none = SamplingTensors(torch.zeros(0, device=device), torch.zeros(0, device=device))
    assert kernel(logits[:0], none).shape == (0,)


def test_says_why_it_cannot_serve() -> None:
    assert "CUDA device" in CandidateSample.missing(SampleNeed(torch.device("cpu"), VOCAB))[0]
