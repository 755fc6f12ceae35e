"""Prompt lookup in one launch says what the drafter's own search says."""

from __future__ import annotations

import pytest
import torch

from octavo_kernels.ngram import TritonNgram, lookup
from octavo_speculative.ngram import NgramNeed, TorchNgram, propose
from octavo_speculative.settings import NgramSettings


@pytest.mark.parametrize(("shortest", "longest"), [(1, 1), (1, 3), (2, 4)])
@pytest.mark.parametrize("limit", [1, 3, 6])
def test_all_sequences_get_what_the_search_finds(
    shortest: int, longest: int, limit: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("octavo_kernels.ngram.BLOCK", 16)  # so that a text has several
    table = torch.randint(3, (40, 64), device=device)
    slots, lengths = torch.randperm(40, device=device)[:32], torch.randint(1, 64, (32,), device=device)
    lengths[:3] = torch.tensor([1, 2, 63])
    expected = propose(table[slots], lengths, NgramSettings(shortest, longest), limit)
    found = lookup(table, slots, lengths, shortest=shortest, longest=longest, limit=limit)
    assert torch.equal(found, expected)


def test_the_operation_is_that_of_any_device(device: torch.device) -> None:
    need = NgramNeed(device, NgramSettings(1, 3), 4)
    table, slots, lengths = torch.randint(3, (9, 50), device=device), [7, 0, 3], [1, 50, 33]
    assert torch.equal(TritonNgram(need)(table, slots, lengths), TorchNgram(need)(table, slots, lengths))


def test_it_is_for_gpus_only() -> None:
    assert TritonNgram.missing(NgramNeed(torch.device("cpu"), NgramSettings(), 4))
    assert not TritonNgram.missing(NgramNeed(torch.device("cuda"), NgramSettings(), 4))
