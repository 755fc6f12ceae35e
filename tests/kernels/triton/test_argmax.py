"""The most likely token."""

from __future__ import annotations

import pytest
import torch

from octavo_kernels.argmax import BLOCK, argmax, argmax_reference


@pytest.mark.parametrize("vocab_size", [11, BLOCK, 3 * BLOCK + 5])
@pytest.mark.parametrize("num_rows", [0, 1, 3])
def test_finds_the_largest(device: torch.device, num_rows: int, vocab_size: int) -> None:
    logits = torch.randn(num_rows, vocab_size, device=device)
    assert torch.equal(argmax(logits), argmax_reference(logits))


def test_of_equal_logits_the_first_wins(device: torch.device) -> None:
    logits = torch.zeros(2, 2 * BLOCK, device=device)
    logits[0, [7, 9, BLOCK + 3]] = 1.0
    logits[1, [BLOCK + 3, BLOCK + 8]] = 1.0
    assert argmax(logits).tolist() == [7, BLOCK + 3]
