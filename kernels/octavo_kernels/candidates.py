"""The largest logits of each row without a sort, by many programs a row.

A row is cut into parts of BLOCK logits and these into GROUPS groups. At least k logits are at or above the k-th largest
of the groups' maxima and, unless they crowd in few groups, hardly more. So a first pass finds the maxima, one program a
row picks the bound among them, and a second pass collects what reaches it, in the order of the vocabulary. Everything
behind works on these candidates, in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

BLOCK = 4096
GROUPS = 64
NUM_WANTED = 1024  # the largest k that a bound is looked for
NUM_CANDIDATES = 4096  # as many as one program takes
PART_CAPACITY = 1024  # as many as one part may hold


@triton.jit
def survey(
    maxima_ptr,
    values_ptr,
    ids_ptr,
    logits_ptr,
    stride,
    vocab_size,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (row, part): its largest logit, where that is (of equals the first), and the maximum of each group.

    maxima [num_rows, num_parts, GROUPS], values and ids [num_rows, num_parts].
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    token = part * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    logits = tl.load(logits_ptr + row * stride + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)
    out = row * tl.num_programs(1) + part
    tl.store(values_ptr + out, tl.max(logits, axis=0))
    tl.store(ids_ptr + out, part * BLOCK + tl.argmax(logits, axis=0))
    if GROUPS > 0:
        maxima = tl.max(tl.reshape(logits, (GROUPS, BLOCK // GROUPS)), axis=1)
        tl.store(maxima_ptr + out * GROUPS + tl.arange(0, GROUPS), maxima)


@triton.jit
def key_of(number):
    """The bits of a float that is not negative: an integer, in the same order."""
    return number.to(tl.int32, bitcast=True)


@triton.jit
def weight_of(logit, largest, temperature):
    """What a token weighs beside the most likely one, which weighs 1."""
    return tl.exp((logit - largest) / temperature)


@triton.jit
def bound(keys, num_wanted, HIGHEST: tl.constexpr):
    """A number that at least ``num_wanted`` of the ``keys`` (from 0 to HIGHEST) are above, and less than twice as
    many if ties allow it; -1 if so many keys are not there at all."""
    low = tl.full((), -1, tl.int32)
    high = tl.full((), HIGHEST, tl.int32)
    above = tl.full((), 0x7FFFFFFF, tl.int32)
    while (high - low > 1) & (above >= 2 * num_wanted):
        middle = low + (high - low) // 2
        count = tl.sum((keys > middle).to(tl.int32), axis=0)
        if count < num_wanted:
            high = middle
        else:
            low = middle
            above = count
    return low


@triton.jit
def collect(ids_ptr, token, wanted, first, CAPACITY: tl.constexpr):
    """Write the tokens that are wanted one after another from ``first`` on, at most CAPACITY; how many there are."""
    flags = wanted.to(tl.int32)
    place = tl.cumsum(flags, axis=0) - 1
    tl.store(ids_ptr + first + place, token, mask=wanted & (place < CAPACITY))
    return tl.sum(flags, axis=0)


@triton.jit
def gather(ids_ptr, counts_ptr, row, num_parts, CAPACITY: tl.constexpr, PARTS: tl.constexpr, SIZE: tl.constexpr):
    """The first SIZE tokens that a row's parts collected, in order; how many those are, how many there are in all, and
    the most that a part has. Places beyond the end hold 0."""
    place = tl.arange(0, SIZE)
    shift = tl.zeros((SIZE,), tl.int32)
    end = tl.full((), 0, tl.int32)
    total = tl.full((), 0, tl.int32)
    most = tl.full((), 0, tl.int32)
    for part in tl.static_range(PARTS):
        count = tl.load(counts_ptr + row * num_parts + part, mask=part < num_parts, other=0)
        total += count
        most = tl.maximum(most, count)
        end += tl.minimum(count, CAPACITY)
        shift = tl.where(place >= end, (part + 1) * CAPACITY - end, shift)  # what passed this part lies in a later one
    ids = tl.load(ids_ptr + row * num_parts * CAPACITY + place + shift, mask=place < end, other=0)
    return ids, tl.minimum(end, SIZE), total, most
