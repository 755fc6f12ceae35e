"""Prompt lookup for all sequences of a batch in one launch; what it finds is said by
``octavo_speculative.ngram.propose``, the operation by ``NgramNeed`` there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # places that are looked at together


# both lie in one tensor: whether the second is aligned depends on how many sequences there are
@triton.jit(do_not_specialize_on_alignment=["slots", "lengths"])
def _lookup_kernel(
    table,
    row_stride,
    slots,
    lengths,
    found,
    limit,
    SHORTEST: tl.constexpr,
    LONGEST: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program for each sequence."""
    row = tl.program_id(0)
    text = table + tl.load(slots + row) * row_stride
    length = tl.load(lengths + row)
    best = tl.full((), -1, tl.int64)  # how many tokens are the same, above the place after them
    for start in range(0, length, BLOCK):
        places = start + tl.arange(0, BLOCK).to(tl.int64)
        is_same = places < length
        num_same = tl.zeros((BLOCK,), tl.int64)
        for back in tl.static_range(1, LONGEST + 1):
            is_same = is_same & (places >= back)
            end = tl.load(text + length - back, mask=length >= back, other=-1)
            is_same = is_same & (tl.load(text + places - back, mask=is_same, other=-1) == end)
            num_same += is_same.to(tl.int64)
        rank = tl.where(num_same >= SHORTEST, (num_same << 32) + places, -1)
        best = tl.maximum(best, tl.max(rank, axis=0))
    follower = best & 0xFFFFFFFF
    ahead = tl.arange(0, LIMIT).to(tl.int64)
    wanted = ahead < limit
    distance = tl.where(best >= 0, length - follower, 1)
    tokens = tl.load(text + follower + ahead % distance, mask=wanted & (best >= 0), other=-1)
    tl.store(found + row * limit + ahead, tokens, mask=wanted)


def lookup(table: Tensor, slots: Tensor, lengths: Tensor, *, shortest: int, longest: int, limit: int) -> Tensor:
    """``limit`` tokens for each sequence [num_sequences, limit], int64; -1 where no end has occurred before.

    ``table`` [num_slots, num_columns] int64; ``slots`` [num_sequences] int64, the rows of the sequences; ``lengths``
    [num_sequences] int64, at least 1.
    """
    found = torch.empty(len(slots), limit, dtype=torch.int64, device=table.device)
    _lookup_kernel[(len(slots),)](
        table,
        table.stride(0),
        slots,
        lengths,
        found,
        limit,
        SHORTEST=shortest,
        LONGEST=longest,
        LIMIT=triton.next_power_of_2(limit),
        BLOCK=BLOCK,
    )
    return found


class TritonNgram:
    """The operation ``ngram`` on GPUs."""

    def __init__(self, need: Any) -> None:
        self._settings = need.settings
        self._limit = need.limit

    @classmethod
    def missing(cls, need: Any) -> list[str]:
        return [] if need.device.type == "cuda" else [f"it needs a CUDA device, not '{need.device.type}'"]

    def __call__(self, table: Tensor, slots: Sequence[int], lengths: Sequence[int]) -> Tensor:
        rows, ends = torch.tensor([slots, lengths], device=table.device)
        shortest, longest = self._settings.shortest, self._settings.longest
        return lookup(table, rows, ends, shortest=shortest, longest=longest, limit=self._limit)
