"""The operation ``sample`` without a sort and without asking the host, so that a CUDA graph can hold it.

Top-k, top-p and min-p keep every token above a threshold. It is found by bisection over the bits of the probabilities,
which as integers are in the same order, among the few candidates that can matter (:mod:`octavo_kernels.candidates`);
where those are too many to fit, or not enough, the whole row is bisected. A token is then drawn by inverting the
cumulative distribution in the order of the vocabulary, from one uniform number a row, as
:class:`octavo.sampling.TorchSample` does. Sums are taken in another order there, so a choice may differ where a number
falls within rounding of a boundary.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octavo_kernels import candidates
from octavo_kernels.argmax import argmax
from octavo_kernels.candidates import bound, collect, gather, key_of, survey, weight_of
from octavo_kernels.launch import describe, power_of_two


@triton.jit
def _prepare(
    greedy_ptr,
    pivots_ptr,
    maxima_ptr,
    values_ptr,
    ids_ptr,
    temperature_ptr,
    top_k_ptr,
    vocab_size,
    num_parts,
    TOP_K: tl.constexpr,
    CANDIDATES: tl.constexpr,
    NUM_WANTED: tl.constexpr,
    PARTS: tl.constexpr,
    GROUPS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program: one row. Its most likely token, and (CANDIDATES) the bits of a weight that all candidates exceed."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    values = tl.load(values_ptr + row * num_parts + part, mask=part < num_parts, other=float("-inf"))
    tl.store(greedy_ptr + row, tl.load(ids_ptr + row * num_parts + tl.argmax(values, axis=0)).to(tl.int64))
    temperature = tl.load(temperature_ptr + row)
    if CANDIDATES and temperature > 0.0:
        wanted = tl.full((), NUM_WANTED, tl.int32)
        if TOP_K:
            wanted = tl.minimum(tl.load(top_k_ptr + row), NUM_WANTED).to(tl.int32)
        group = tl.arange(0, PARTS * GROUPS)
        maxima = tl.load(
            maxima_ptr + row * num_parts * GROUPS + group, mask=group < num_parts * GROUPS, other=float("-inf")
        )
        weights = weight_of(maxima, tl.max(values, axis=0), temperature)
        tl.store(pivots_ptr + row, bound(key_of(weights), wanted, 0x3F800000))  # 1.0, which none is above


@triton.jit
def _weigh(
    masses_ptr,
    ids_ptr,
    counts_ptr,
    logits_ptr,
    greedy_ptr,
    pivots_ptr,
    temperature_ptr,
    min_p_ptr,
    stride,
    vocab_size,
    MIN_P: tl.constexpr,
    CANDIDATES: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (row, part): the sum of its weights, and (with CANDIDATES) its candidates and how many there are."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    temperature = tl.load(temperature_ptr + row)
    if temperature == 0.0:
        return
    largest = tl.load(logits_ptr + row * stride + tl.load(greedy_ptr + row)).to(tl.float32)
    token = part * BLOCK + tl.arange(0, BLOCK)
    logits = tl.load(logits_ptr + row * stride + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)
    weights = weight_of(logits, largest, temperature)
    if MIN_P:
        weights = tl.where(weights < tl.load(min_p_ptr + row), 0.0, weights)
    out = row * tl.num_programs(1) + part
    tl.store(masses_ptr + out, tl.sum(weights, axis=0))
    if CANDIDATES:
        wanted = (key_of(weights) > tl.load(pivots_ptr + row)) & (weights > 0.0)
        tl.store(counts_ptr + out, collect(ids_ptr, token, wanted, out * CAPACITY, CAPACITY))


@triton.jit
def _row_weights(logits, start, largest, temperature, floor, vocab_size, BLOCK: tl.constexpr):
    """BLOCK weights of a row from ``start`` on; 0 below ``floor``."""
    token = start + tl.arange(0, BLOCK)
    logit = tl.load(logits + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)
    weights = weight_of(logit, largest, temperature)
    return tl.where(weights < floor, 0.0, weights)


@triton.jit
def _above(weights, bits, logits, largest, temperature, floor, vocab_size, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """How many weights are larger than the float with these bits, and their sum: in ``weights`` or the WHOLE row."""
    pivot = bits.to(tl.float32, bitcast=True)
    if WHOLE:
        count = tl.zeros((BLOCK,), tl.int32)
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, vocab_size, BLOCK):
            part = _row_weights(logits, start, largest, temperature, floor, vocab_size, BLOCK)
            larger = part > pivot
            count += larger.to(tl.int32)
            total += tl.where(larger, part, 0.0)
    else:
        larger = weights > pivot
        count = larger.to(tl.int32)
        total = tl.where(larger, weights, 0.0)
    return tl.sum(count, axis=0), tl.sum(total, axis=0)


@triton.jit
def _threshold(
    weights,
    num_kept,
    total,
    top_k,
    top_p,
    logits,
    largest,
    temperature,
    floor,
    vocab_size,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The smallest kept weight: one is kept when fewer than top_k, and less than top_p of the mass, lie above it.

    ``num_kept`` weights are there before, and ``total`` is the mass of the row.
    """
    threshold = tl.full((), 0, tl.int32)
    if TOP_K:  # noqa: SIM102  (decided when it is compiled)
        if top_k < num_kept:
            low = tl.full((), -1, tl.int32)  # a pivot that at least top_k are above
            high = tl.full((), 0x3F800000, tl.int32)  # 1.0, which none is above
            num_high = tl.full((), 0, tl.int32)
            # one weight between the two is the last to be kept
            while (high - low > 1) & (num_kept - num_high > 1) & (num_kept != top_k):
                middle = low + (high - low) // 2
                count, above = _above(weights, middle, logits, largest, temperature, floor, vocab_size, WHOLE, BLOCK)
                if count < top_k:
                    high = middle
                    num_high = count
                else:
                    low = middle
                    num_kept = count
                    total = above
            threshold = low + 1
            # top_p is of the k most likely: of equals at the threshold only so many as fill up to k
            total -= (num_kept - top_k).to(tl.float32) * threshold.to(tl.float32, bitcast=True)
    if TOP_P:  # noqa: SIM102
        if top_p < 1.0:
            mass = top_p * total
            low = threshold - 1
            high = tl.full((), 0x3F800000, tl.int32)
            num_high = tl.full((), 0, tl.int32)
            while (high - low > 1) & (num_kept - num_high > 1):
                middle = low + (high - low) // 2
                count, above = _above(weights, middle, logits, largest, temperature, floor, vocab_size, WHOLE, BLOCK)
                if above < mass:
                    high = middle
                    num_high = count
                else:
                    low = middle
                    num_kept = count
            threshold = low + 1
    return threshold.to(tl.float32, bitcast=True)


@triton.jit
def _draw(
    out_ptr,
    logits_ptr,
    greedy_ptr,
    pivots_ptr,
    masses_ptr,
    ids_ptr,
    counts_ptr,
    temperature_ptr,
    uniform_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    stride,
    vocab_size,
    num_parts,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    MIN_P: tl.constexpr,
    CANDIDATES: tl.constexpr,
    CAPACITY: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program: one row. CANDIDATES: how many of them are looked at."""
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    best = tl.load(greedy_ptr + row)
    temperature = tl.load(temperature_ptr + row)
    if temperature == 0.0:
        tl.store(out_ptr + row, best)
        return
    logits = logits_ptr + row * stride
    largest = tl.load(logits + best).to(tl.float32)
    uniform = tl.load(uniform_ptr + row)
    floor = 0.0
    if MIN_P:
        floor = tl.load(min_p_ptr + row)  # of the largest, which is 1
    part = tl.arange(0, PARTS)
    masses = tl.load(masses_ptr + row * num_parts + part, mask=part < num_parts, other=0.0)
    total = tl.sum(masses, axis=0)

    # where the first token lies whose cumulative weight exceeds the goal, and the weight before it
    smallest = floor
    goal = uniform * total
    begin = tl.min(tl.where((tl.cumsum(masses, axis=0) > goal) & (masses > 0.0), part, PARTS), axis=0)
    begin = tl.where(begin < PARTS, begin, tl.max(tl.where(masses > 0.0, part, 0), axis=0))
    before = tl.sum(tl.where(part < begin, masses, 0.0), axis=0)
    chosen = best.to(tl.int32)
    found = tl.full((), 0, tl.int32)

    if CANDIDATES > 0:
        top_k = tl.full((), 0, tl.int32) + vocab_size
        top_p = tl.full((), 1.0, tl.float32)
        if TOP_K:
            top_k = tl.load(top_k_ptr + row).to(tl.int32)
        if TOP_P:
            top_p = tl.load(top_p_ptr + row)
        if (top_k < vocab_size) | (top_p < 1.0):
            ids, held, count, most = gather(ids_ptr, counts_ptr, row, num_parts, CAPACITY, PARTS, CANDIDATES)
            place = tl.arange(0, CANDIDATES)
            logit = tl.load(logits + ids, mask=place < held, other=float("-inf")).to(tl.float32)
            weights = weight_of(logit, largest, temperature)
            pivot = tl.load(pivots_ptr + row).to(tl.float32, bitcast=True)
            # a pivot of -1 is NaN as a float
            enough = (pivot < floor) | (pivot != pivot) | ((top_k < vocab_size) & (count >= top_k))
            enough |= (top_k == vocab_size) & (tl.sum(weights, axis=0) >= top_p * total)
            if enough & (count == held) & (most <= CAPACITY):
                smallest = _threshold(
                    weights, count, total, top_k, top_p, logits, largest, temperature, floor, vocab_size,
                    TOP_K, TOP_P, False, BLOCK,
                )  # fmt: skip
                weights = tl.where(weights >= smallest, weights, 0.0)
                cumulative = tl.cumsum(weights, axis=0)
                goal = uniform * tl.sum(weights, axis=0)
                first = tl.min(tl.where((cumulative > goal) & (weights > 0.0), place, CANDIDATES), axis=0)
                last = tl.max(tl.where(weights > 0.0, place, 0), axis=0)
                first = tl.where(first < CANDIDATES, first, last)
                chosen = tl.sum(tl.where(place == first, ids, 0), axis=0)
                found = tl.full((), 1, tl.int32)
            else:
                smallest = _threshold(
                    weights, vocab_size, total, top_k, top_p, logits, largest, temperature, floor, vocab_size,
                    TOP_K, TOP_P, True, BLOCK,
                )  # fmt: skip
                below = tl.maximum(key_of(smallest) - 1, 0)
                _, mass = _above(weights, below, logits, largest, temperature, floor, vocab_size, True, BLOCK)
                goal = uniform * mass
                begin = begin * 0
                before = before * 0.0

    start = begin * BLOCK
    while (found == 0) & (start < vocab_size):
        token = start + tl.arange(0, BLOCK)
        weight = _row_weights(logits, start, largest, temperature, floor, vocab_size, BLOCK)
        weight = tl.where(weight >= smallest, weight, 0.0)
        mass = tl.sum(weight, axis=0)
        if before + mass > goal:
            beyond = (before + tl.cumsum(weight, axis=0) > goal) & (weight > 0.0)
            first = tl.min(tl.where(beyond, token, vocab_size), axis=0)
            last = tl.max(tl.where(weight > 0.0, token, 0), axis=0)
            chosen = tl.where(first < vocab_size, first, last)
            found = tl.full((), 1, tl.int32)
        elif mass > 0.0:  # the last one that is kept, where rounding leaves none beyond the goal
            chosen = tl.max(tl.where(weight > 0.0, token, 0), axis=0)
        before += mass
        start += BLOCK
    tl.store(out_ptr + row, chosen.to(tl.int64))


class CandidateSample:
    """The operation ``sample``, quick for filtered rows; called with an :class:`octavo.sampling.SamplingTensors`."""

    def __init__(self, need: Any) -> None:
        self._vocab_size: int = need.vocab_size

    @classmethod
    def missing(cls, need: Any) -> list[str]:
        return [] if need.device.type == "cuda" else [f"it needs a CUDA device, not '{need.device.type}'"]

    def __call__(self, logits: Tensor, tensors: Any) -> Tensor:
        """logits [num_rows, vocab_size] of any floating dtype -> token ids [num_rows] int64."""
        num_rows = logits.shape[0]
        if tensors.all_greedy or num_rows == 0:
            return argmax(logits)
        device, vocab_size = describe(logits.device), self._vocab_size
        num_parts = triton.cdiv(vocab_size, candidates.BLOCK)
        unused = tensors.temperature
        top_k, top_p, min_p = (
            unused if tensor is None else tensor for tensor in (tensors.top_k, tensors.top_p, tensors.min_p)
        )
        filtered = tensors.top_k is not None or tensors.top_p is not None

        def scratch(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.empty((num_rows, *shape), dtype=dtype, device=logits.device)

        maxima = scratch(torch.float32, num_parts, candidates.GROUPS if filtered else 0)
        values, masses = scratch(torch.float32, num_parts), scratch(torch.float32, num_parts)
        part_ids, counts = scratch(torch.int32, num_parts), scratch(torch.int32, num_parts)
        ids = scratch(torch.int32, num_parts, candidates.PART_CAPACITY if filtered else 0)
        greedy, out, pivots = scratch(torch.int64), scratch(torch.int64), scratch(torch.int32)
        options = {"PDL": device.dependent_launch, **device.options}
        parts = max(16, power_of_two(num_parts))
        survey[(num_rows, num_parts)](
            maxima,
            values,
            part_ids,
            logits,
            logits.stride(0),
            vocab_size,
            BLOCK=candidates.BLOCK,
            GROUPS=candidates.GROUPS if filtered else 0,
            num_warps=8,
            **options,
        )
        _prepare[(num_rows,)](
            greedy,
            pivots,
            maxima,
            values,
            part_ids,
            tensors.temperature,
            top_k,
            vocab_size,
            num_parts,
            TOP_K=tensors.top_k is not None,
            CANDIDATES=filtered,
            NUM_WANTED=candidates.NUM_WANTED,
            PARTS=parts,
            GROUPS=candidates.GROUPS,
            num_warps=4,
            **options,
        )
        _weigh[(num_rows, num_parts)](
            masses,
            ids,
            counts,
            logits,
            greedy,
            pivots,
            tensors.temperature,
            min_p,
            logits.stride(0),
            vocab_size,
            MIN_P=tensors.min_p is not None,
            CANDIDATES=filtered,
            CAPACITY=candidates.PART_CAPACITY,
            BLOCK=candidates.BLOCK,
            num_warps=8,
            **options,
        )
        _draw[(num_rows,)](
            out,
            logits,
            greedy,
            pivots,
            masses,
            ids,
            counts,
            tensors.temperature,
            tensors.uniform,
            top_k,
            top_p,
            min_p,
            logits.stride(0),
            vocab_size,
            num_parts,
            TOP_K=tensors.top_k is not None,
            TOP_P=tensors.top_p is not None,
            MIN_P=tensors.min_p is not None,
            CANDIDATES=candidates.NUM_CANDIDATES if filtered else 0,
            CAPACITY=candidates.PART_CAPACITY,
            PARTS=parts,
            BLOCK=candidates.BLOCK,
            num_warps=8,
            **options,
        )
        return out
