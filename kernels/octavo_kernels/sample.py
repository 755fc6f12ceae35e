"""The operation ``sample`` without a sort and without asking the host, so that a CUDA graph can hold it.

Top-k, top-p and min-p keep every token above a threshold. A program per row finds it by bisection over the bits of the
probabilities, which as integers are in the same order; then it draws by inverting the cumulative distribution in the
order of the vocabulary, from one uniform number a row, as :class:`octavo.sampling.TorchSample` does. Sums are taken in
another order there, so a choice may differ where a number falls within rounding of a boundary.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octavo_kernels.argmax import argmax
from octavo_kernels.launch import describe, power_of_two

BLOCK = 4096


@triton.jit
def _above(weights, bits, vocab_size, BLOCK: tl.constexpr):
    """How many weights of a row are larger than the float with these bits, and their sum."""
    pivot = bits.to(tl.float32, bitcast=True)
    count = tl.zeros((BLOCK,), tl.int32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        token = start + tl.arange(0, BLOCK)
        weight = tl.load(weights + token, mask=token < vocab_size, other=0.0)
        larger = weight > pivot
        count += larger.to(tl.int32)
        total += tl.where(larger, weight, 0.0)
    return tl.sum(count, axis=0), tl.sum(total, axis=0)


@triton.jit
def _sample(
    out_ptr,
    weights_ptr,
    logits_ptr,
    greedy_ptr,
    temperature_ptr,
    uniform_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    stride,
    vocab_size,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    MIN_P: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program: one row. ``weights`` is scratch [num_rows, vocab_size]: exp((logit - largest) / temperature)."""
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
    weights = weights_ptr + row * vocab_size
    largest = tl.load(logits + best).to(tl.float32)
    floor = 0.0
    if MIN_P:
        floor = tl.load(min_p_ptr + row)  # of the largest, which is 1
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        token = start + tl.arange(0, BLOCK)
        inside = token < vocab_size
        logit = tl.load(logits + token, mask=inside, other=float("-inf")).to(tl.float32)
        weight = tl.exp((logit - largest) / temperature)
        weight = tl.where(weight < floor, 0.0, weight)
        tl.store(weights + token, weight, mask=inside)
        sums += weight
    total = tl.sum(sums, axis=0)
    tl.debug_barrier()  # from here on threads read what others wrote

    # the smallest kept weight; a token is kept when fewer than top_k, and less than top_p of the mass, lie above it
    threshold = tl.full((), 0, tl.int32)
    num_kept = tl.full((), 0, tl.int32) + vocab_size
    if TOP_K:
        top_k = tl.load(top_k_ptr + row)
        if top_k < vocab_size:
            low = tl.full((), -1, tl.int32)  # a pivot that at least top_k are above
            high = tl.full((), 0x3F800000, tl.int32)  # 1.0, which none is above
            num_high = tl.full((), 0, tl.int32)
            while (high - low > 1) & (num_kept - num_high > 1):  # one weight between the two is the last to be kept
                middle = low + (high - low) // 2
                count, above = _above(weights, middle, vocab_size, BLOCK)
                if count < top_k:
                    high = middle
                    num_high = count
                else:
                    low = middle
                    num_kept = count
                    total = above
            threshold = low + 1
            # top_p is of the k most likely: of equals at the threshold only so many as fill up to k
            excess = (num_kept - top_k).to(tl.float32)
            total -= excess * threshold.to(tl.float32, bitcast=True)
    if TOP_P:
        top_p = tl.load(top_p_ptr + row)
        if top_p < 1.0:
            mass = top_p * total
            low = threshold - 1
            high = tl.full((), 0x3F800000, tl.int32)
            num_high = tl.full((), 0, tl.int32)
            while (high - low > 1) & (num_kept - num_high > 1):
                middle = low + (high - low) // 2
                count, above = _above(weights, middle, vocab_size, BLOCK)
                if above < mass:
                    high = middle
                    num_high = count
                else:
                    low = middle
                    num_kept = count
            threshold = low + 1
    smallest = threshold.to(tl.float32, bitcast=True)

    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        token = start + tl.arange(0, BLOCK)
        weight = tl.load(weights + token, mask=token < vocab_size, other=0.0)
        sums += tl.where(weight >= smallest, weight, 0.0)
    goal = tl.load(uniform_ptr + row) * tl.sum(sums, axis=0)
    # the first token whose cumulative weight exceeds the goal; the last kept one where rounding leaves none
    before = 0.0
    start = tl.full((), 0, tl.int32)
    chosen = best.to(tl.int32)
    found = tl.full((), 0, tl.int32)
    while (found == 0) & (start < vocab_size):
        token = start + tl.arange(0, BLOCK)
        weight = tl.load(weights + token, mask=token < vocab_size, other=0.0)
        weight = tl.where(weight >= smallest, weight, 0.0)
        part = tl.sum(weight, axis=0)
        if before + part > goal:
            cumulative = before + tl.cumsum(weight, axis=0)
            beyond = (cumulative > goal) & (weight > 0.0)
            first = tl.min(tl.where(beyond, token, vocab_size), axis=0)
            last = tl.max(tl.where(weight > 0.0, token, 0), axis=0)
            chosen = tl.where(first < vocab_size, first, last)
            found = tl.full((), 1, tl.int32)
        elif part > 0.0:
            chosen = tl.max(tl.where(weight > 0.0, token, 0), axis=0)
        before += part
        start += BLOCK
    tl.store(out_ptr + row, chosen.to(tl.int64))


class TritonSample:
    """The operation ``sample``; called with the attributes of :class:`octavo.sampling.SamplingTensors`."""

    def __init__(self, need: Any) -> None:
        self._vocab_size: int = need.vocab_size

    @classmethod
    def missing(cls, need: Any) -> list[str]:
        return [] if need.device.type == "cuda" else [f"it needs a CUDA device, not '{need.device.type}'"]

    def __call__(self, logits: Tensor, tensors: Any) -> Tensor:
        """logits [num_rows, vocab_size] of any floating dtype -> token ids [num_rows] int64."""
        greedy = argmax(logits)
        num_rows = len(greedy)
        if tensors.all_greedy or num_rows == 0:
            return greedy
        out = torch.empty_like(greedy)
        weights = torch.empty((num_rows, self._vocab_size), dtype=torch.float32, device=logits.device)
        device = describe(logits.device)
        unused = tensors.temperature
        _sample[(num_rows,)](
            out,
            weights,
            logits,
            greedy,
            tensors.temperature,
            tensors.uniform,
            unused if tensors.top_k is None else tensors.top_k,
            unused if tensors.top_p is None else tensors.top_p,
            unused if tensors.min_p is None else tensors.min_p,
            logits.stride(0),
            self._vocab_size,
            TOP_K=tensors.top_k is not None,
            TOP_P=tensors.top_p is not None,
            MIN_P=tensors.min_p is not None,
            BLOCK=min(BLOCK, max(16, power_of_two(self._vocab_size))),
            PDL=device.dependent_launch,
            num_warps=8,
            **device.options,
        )
        return out
