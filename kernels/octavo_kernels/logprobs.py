"""Log-probabilities of chosen tokens and of the most likely ones, without writing out those of the whole vocabulary."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octavo_kernels import candidates
from octavo_kernels.candidates import bound, collect, gather, key_of, survey
from octavo_kernels.launch import describe, power_of_two

NUM_CANDIDATES = 2048


@triton.jit
def _nearness(logits, largest):
    """An integer that is the larger, the nearer a logit is to the largest; 0 for one of -inf."""
    return 0x7F800000 - key_of(largest - logits)  # the bits of infinity


@triton.jit(do_not_specialize=["num_top"])
def _prepare(
    largest_ptr,
    pivots_ptr,
    maxima_ptr,
    values_ptr,
    num_parts,
    num_top,
    PARTS: tl.constexpr,
    GROUPS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program: one row. Its largest logit, and a nearness that all candidates exceed."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    group = tl.arange(0, PARTS * GROUPS)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    values = tl.load(values_ptr + row * num_parts + part, mask=part < num_parts, other=float("-inf"))
    largest = tl.max(values, axis=0)
    maxima = tl.load(
        maxima_ptr + row * num_parts * GROUPS + group, mask=group < num_parts * GROUPS, other=float("-inf")
    )
    tl.store(largest_ptr + row, largest)
    tl.store(pivots_ptr + row, bound(_nearness(maxima, largest), num_top, 0x7F800000))


@triton.jit
def _count(
    masses_ptr,
    ranks_ptr,
    ids_ptr,
    counts_ptr,
    logits_ptr,
    chosen_ptr,
    largest_ptr,
    pivots_ptr,
    stride,
    vocab_size,
    CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (row, part): the sum of exp(logit - largest), how many logits exceed the chosen one, and candidates."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    token = part * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocab_size
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    logits = tl.load(logits_ptr + row * stride + token, mask=inside, other=float("-inf")).to(tl.float32)
    chosen = tl.load(logits_ptr + row * stride + tl.load(chosen_ptr + row)).to(tl.float32)
    largest = tl.load(largest_ptr + row)
    out = row * tl.num_programs(1) + part
    tl.store(masses_ptr + out, tl.sum(tl.exp(logits - largest), axis=0))
    tl.store(ranks_ptr + out, tl.sum((logits > chosen).to(tl.int32), axis=0))
    wanted = (_nearness(logits, largest) > tl.load(pivots_ptr + row)) & inside
    tl.store(counts_ptr + out, collect(ids_ptr, token, wanted, out * CAPACITY, CAPACITY))


@triton.jit(do_not_specialize=["num_top"])
def _list(
    logprobs_ptr,
    out_ranks_ptr,
    top_ids_ptr,
    top_logprobs_ptr,
    logits_ptr,
    chosen_ptr,
    largest_ptr,
    masses_ptr,
    ranks_ptr,
    ids_ptr,
    counts_ptr,
    stride,
    vocab_size,
    num_parts,
    num_top,
    CANDIDATES: tl.constexpr,
    CAPACITY: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program: one row. The largest candidates one by one, of equals the first; of the whole row if they do not fit."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    logits = logits_ptr + row * stride
    there = part < num_parts
    mass = tl.sum(tl.load(masses_ptr + row * num_parts + part, mask=there, other=0.0), axis=0)
    rank = tl.sum(tl.load(ranks_ptr + row * num_parts + part, mask=there, other=0), axis=0)
    largest = tl.load(largest_ptr + row)
    normalizer = tl.log(mass)  # of the differences to the largest, which lose nothing by being subtracted first
    chosen = tl.load(logits + tl.load(chosen_ptr + row)).to(tl.float32)
    tl.store(logprobs_ptr + row, chosen - largest - normalizer)
    tl.store(out_ranks_ptr + row, (rank + 1).to(tl.int64))
    ids, held, count, most = gather(ids_ptr, counts_ptr, row, num_parts, CAPACITY, PARTS, CANDIDATES)
    if (count == held) & (most <= CAPACITY):
        place = tl.arange(0, CANDIDATES)
        values = tl.load(logits + ids, mask=place < held, other=float("-inf")).to(tl.float32)
        left = place < held
        for i in range(num_top):
            best = tl.max(tl.where(left, values, float("-inf")), axis=0)
            first = tl.min(tl.where(left & (values == best), place, CANDIDATES), axis=0)
            tl.store(top_ids_ptr + row * num_top + i, tl.sum(tl.where(place == first, ids, 0), axis=0).to(tl.int64))
            tl.store(top_logprobs_ptr + row * num_top + i, best - largest - normalizer)
            left &= place != first
    else:
        last = tl.full((), float("inf"), tl.float32)
        last_id = tl.full((), -1, tl.int32)
        for i in range(num_top):
            best = tl.full((), float("-inf"), tl.float32)
            best_id = tl.full((), 0x7FFFFFFF, tl.int32)
            for start in range(0, vocab_size, BLOCK):
                token = start + tl.arange(0, BLOCK)
                logit = tl.load(logits + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)
                follows = (token < vocab_size) & ((logit < last) | ((logit == last) & (token > last_id)))
                value = tl.max(tl.where(follows, logit, float("-inf")), axis=0)
                first = tl.min(tl.where(follows & (logit == value), token, 0x7FFFFFFF), axis=0)
                better = (value > best) | ((value == best) & (first < best_id))
                best = tl.where(better, value, best)
                best_id = tl.where(better, first, best_id)
            tl.store(top_ids_ptr + row * num_top + i, best_id.to(tl.int64))
            tl.store(top_logprobs_ptr + row * num_top + i, best - largest - normalizer)
            last = best
            last_id = best_id


class TritonLogprobs:
    """The operation ``logprobs``."""

    def __init__(self, need: Any) -> None:
        self._vocab_size: int = need.vocab_size

    @classmethod
    def missing(cls, need: Any) -> list[str]:
        return [] if need.device.type == "cuda" else [f"it needs a CUDA device, not '{need.device.type}'"]

    def __call__(self, logits: Tensor, chosen: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """logits [num_rows, vocab_size] of any floating dtype, chosen [num_rows] int64 -> see
        :mod:`octavo.operations`."""
        num_rows = logits.shape[0]
        device, vocab_size = describe(logits.device), self._vocab_size
        num_parts = triton.cdiv(vocab_size, candidates.BLOCK)

        def scratch(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.empty((num_rows, *shape), dtype=dtype, device=logits.device)

        logprobs, ranks = scratch(torch.float32), scratch(torch.int64)
        top_ids, top_logprobs = scratch(torch.int64, num_top), scratch(torch.float32, num_top)
        if num_rows == 0:
            return logprobs, ranks, top_ids, top_logprobs
        maxima = scratch(torch.float32, num_parts, candidates.GROUPS)
        values, masses = scratch(torch.float32, num_parts), scratch(torch.float32, num_parts)
        part_ids, part_ranks, counts = (scratch(torch.int32, num_parts) for _ in range(3))
        ids = scratch(torch.int32, num_parts, candidates.PART_CAPACITY)
        largest, pivots = scratch(torch.float32), scratch(torch.int32)
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
            GROUPS=candidates.GROUPS,
            num_warps=8,
            **options,
        )
        _prepare[(num_rows,)](
            largest,
            pivots,
            maxima,
            values,
            num_parts,
            max(num_top, 1),
            PARTS=parts,
            GROUPS=candidates.GROUPS,
            num_warps=4,
            **options,
        )
        _count[(num_rows, num_parts)](
            masses,
            part_ranks,
            ids,
            counts,
            logits,
            chosen,
            largest,
            pivots,
            logits.stride(0),
            vocab_size,
            CAPACITY=candidates.PART_CAPACITY,
            BLOCK=candidates.BLOCK,
            num_warps=8,
            **options,
        )
        _list[(num_rows,)](
            logprobs,
            ranks,
            top_ids,
            top_logprobs,
            logits,
            chosen,
            largest,
            masses,
            part_ranks,
            ids,
            counts,
            logits.stride(0),
            vocab_size,
            num_parts,
            num_top,
            CANDIDATES=NUM_CANDIDATES,
            CAPACITY=candidates.PART_CAPACITY,
            PARTS=parts,
            BLOCK=candidates.BLOCK,
            num_warps=8,
            **options,
        )
        return logprobs, ranks, top_ids, top_logprobs
