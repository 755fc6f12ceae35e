"""Log-probabilities against those of torch."""

from __future__ import annotations

import pytest
import torch

from octavo.operations import SampleNeed
from octavo.sampling import gather_logprobs
from octavo_kernels.logprobs import TritonLogprobs

VOCAB = 9000  # more than two parts


def check(logits: torch.Tensor, num_top: int) -> None:
    chosen = torch.randint(0, logits.shape[1], (len(logits),), device=logits.device)
    kernel = TritonLogprobs(SampleNeed(logits.device, logits.shape[1]))
    logprobs, ranks, top_ids, top_logprobs = kernel(logits, chosen, num_top)
    expected = gather_logprobs(logits, chosen, num_top)
    torch.testing.assert_close(logprobs, expected.logprobs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(top_logprobs, expected.top_logprobs, atol=1e-5, rtol=1e-5)
    # the logits themselves, where torch counts rounded log-probabilities
    assert torch.equal(ranks, 1 + (logits > logits.gather(1, chosen.unsqueeze(1))).sum(dim=1))
    assert torch.equal(logits.gather(1, top_ids), logits.topk(num_top).values)
    assert all(len(set(row)) == num_top for row in top_ids.tolist())


@pytest.mark.parametrize("num_top", [0, 1, 20])
@pytest.mark.parametrize("scale", [0.01, 3.0, 80.0])  # at 80 all but the first few have no probability in float32
def test_lists_what_torch_lists(device: torch.device, num_top: int, scale: float) -> None:
    check(torch.randn(3, VOCAB, device=device) * scale, num_top)


def test_neighbours_that_are_all_likely(device: torch.device) -> None:
    logits = torch.randn(2, VOCAB, device=device)
    logits[:, 4096:4116] += 50.0
    check(logits, 20)


def test_impossible_tokens(device: torch.device) -> None:
    logits = torch.full((2, VOCAB), -torch.inf, device=device)
    logits[:, ::400] = torch.randn(2, 23, device=device)
    chosen = torch.tensor([400, 8800], device=device)
    _, ranks, ids, top = TritonLogprobs(SampleNeed(device, VOCAB))(logits, chosen, 20)
    assert torch.equal(ids, logits.topk(20).indices)
    torch.testing.assert_close(top, logits.log_softmax(1).topk(20).values)
    assert torch.equal(ranks, 1 + (logits > logits.gather(1, chosen.unsqueeze(1))).sum(dim=1))


def test_of_equals_the_first_even_if_all_are_equal(device: torch.device) -> None:
    logits = torch.zeros(1, VOCAB, device=device)
    logits[0, 8999] = 1.0
    _, ranks, ids, _ = TritonLogprobs(SampleNeed(device, VOCAB))(logits, torch.tensor([5], device=device), 5)
    assert ids.tolist() == [[8999, 0, 1, 2, 3]]
    assert ranks.tolist() == [2]


def test_no_rows(device: torch.device) -> None:
    kernel = TritonLogprobs(SampleNeed(device, VOCAB))
    empty = torch.zeros(0, VOCAB, device=device)
    assert [tuple(t.shape) for t in kernel(empty, torch.zeros(0, dtype=torch.int64, device=device), 3)] == [
        (0,),
        (0,),
        (0, 3),
        (0, 3),
    ]


def test_says_why_it_cannot_serve() -> None:
    assert "CUDA device" in TritonLogprobs.missing(SampleNeed(torch.device("cpu"), VOCAB))[0]
