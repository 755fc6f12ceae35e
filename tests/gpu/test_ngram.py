"""Prompt lookup on a GPU says what it says on a CPU."""

from __future__ import annotations

import pytest
import torch

from octavo_speculative.ngram import propose
from octavo_speculative.settings import NgramSettings

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("vocab_size", [2, 50, 5000])
def test_proposals_are_those_of_a_cpu(vocab_size: int) -> None:
    torch.manual_seed(vocab_size)
    tokens, lengths = torch.randint(vocab_size, (128, 3000)), torch.randint(1, 3001, (128,))
    expected = propose(tokens, lengths, NgramSettings(2, 4), 5)
    assert torch.equal(propose(tokens.cuda(), lengths.cuda(), NgramSettings(2, 4), 5).cpu(), expected)


def test_nothing_waits_for_the_device() -> None:
    tokens, lengths = torch.randint(5, (8, 100), device="cuda"), torch.full((8,), 90, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        propose(tokens, lengths, NgramSettings(), 4)
    finally:
        torch.cuda.set_sync_debug_mode("default")
