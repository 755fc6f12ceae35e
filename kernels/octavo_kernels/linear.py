"""Matrix products for few tokens, where reading the weights is all the work: ``y = x Wᵀ + b``.

One token multiplies and reduces without tensor cores; 2 to 64 tokens use them with the weights on the left, so that the
tokens are the narrow side and are hardly padded. Narrow layers are split along the input; the last program to
arrive adds the parts up in order, so that results repeat bit by bit. More tokens go to cuBLAS.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octavo_kernels.activation import gated
from octavo_kernels.launch import describe, missing_device, power_of_two

MAX_TOKENS = 64


@triton.jit
def _one_token(
    out_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    num_rows,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program: BLOCK_N outputs. The weights of the next step are on their way while this one is added up."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    inside = (n < num_rows)[:, None]
    pointers = weight_ptr + n[:, None].to(tl.int64) * K + k[None, :]
    weight = tl.load(pointers, mask=inside & (k < K)[None, :], other=0.0, eviction_policy="evict_first")
    if PDL:  # weights are never written by a predecessor: they need not wait
        gdc_launch_dependents()
        gdc_wait()
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(0, K, BLOCK_K):
        x = tl.load(x_ptr + start + k, mask=start + k < K, other=0.0).to(tl.float32)
        ahead = start + BLOCK_K + k
        mask = inside & (ahead < K)[None, :]
        following = tl.load(pointers + start + BLOCK_K, mask=mask, other=0.0, eviction_policy="evict_first")
        total += weight.to(tl.float32) * x[None, :]
        weight = following
    result = tl.sum(total, axis=1)
    if BIAS:
        result += tl.load(bias_ptr + n, mask=n < num_rows, other=0.0).to(tl.float32)
    tl.store(out_ptr + n, result.to(out_ptr.dtype.element_ty), mask=n < num_rows)


@triton.jit(do_not_specialize=["num_tokens"])
def _few_tokens(
    out_ptr,
    partial_ptr,
    arrivals_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    num_tokens,
    num_rows,
    x_stride,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (BLOCK_N outputs, split of the input); GATED: half as many, of as many rows of gate and of up."""
    tile = tl.program_id(0)
    split = tl.program_id(1)
    HALF: tl.constexpr = BLOCK_N // 2
    if GATED:
        row = tl.arange(0, BLOCK_N)
        n = row // HALF * (num_rows // 2) + tile * HALF + row % HALF
    else:
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    steps: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    per_split: tl.constexpr = (steps + NUM_SPLITS - 1) // NUM_SPLITS
    first = split * per_split
    last = tl.minimum(first + per_split, steps)
    rows = tl.minimum(n, num_rows - 1)  # rows beyond the end read the last one and are not stored
    weights = weight_ptr + rows[:, None].to(tl.int64) * K + k[None, :]
    inputs = x_ptr + m[None, :] * x_stride + k[:, None]
    there = (m < num_tokens)[None, :]
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in tl.range(first, last, num_stages=STAGES):
        start = step * BLOCK_K
        if K % BLOCK_K == 0:
            weight = tl.load(weights + start, eviction_policy="evict_first")
            x = tl.load(inputs + start, mask=there, other=0.0)
        else:
            weight = tl.load(weights + start, mask=(start + k < K)[None, :], other=0.0, eviction_policy="evict_first")
            x = tl.load(inputs + start, mask=there & (start + k < K)[:, None], other=0.0)
        total = tl.dot(weight, x, total)
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(total, (2, HALF, BLOCK_M)), (1, 2, 0)))
        column = tile * HALF + tl.arange(0, HALF)
        offsets = m[None, :] * (num_rows // 2) + column[:, None]
        tl.store(out_ptr + offsets, gated(gate, up, out_ptr.dtype.element_ty), mask=there)
        return
    out_offsets = m[None, :] * num_rows + n[:, None]
    out_mask = there & (n < num_rows)[:, None]
    if NUM_SPLITS > 1:
        within = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + m[None, :]
        partial = partial_ptr + tile * (NUM_SPLITS * BLOCK_N * BLOCK_M) + within
        tl.store(partial + split * (BLOCK_N * BLOCK_M), total)
        tl.debug_barrier()  # all threads' stores before the one thread that announces them
        if tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel") != NUM_SPLITS - 1:
            return
        tl.debug_barrier()
        total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for index in tl.static_range(NUM_SPLITS):
            total += tl.load(partial + index * (BLOCK_N * BLOCK_M), cache_modifier=".cg")
        tl.store(arrivals_ptr + tile, 0)  # ready for the next call
    if BIAS:
        total += tl.load(bias_ptr + n, mask=n < num_rows, other=0.0).to(tl.float32)[:, None]
    tl.store(out_ptr + out_offsets, total.to(out_ptr.dtype.element_ty), mask=out_mask)


@dataclass(frozen=True, slots=True)
class OneTokenTiling:
    """Tile of :func:`_one_token`."""

    block_n: int
    block_k: int
    num_warps: int


@dataclass(frozen=True, slots=True)
class FewTokensTiling:
    """Tile of :func:`_few_tokens`."""

    block_n: int
    block_k: int
    num_splits: int
    num_warps: int
    num_stages: int


def one_token_tiling(in_features: int) -> OneTokenTiling:
    """Two long rows a program: the best or within 1 % of it for every layer of an 8B model on an H200."""
    return OneTokenTiling(block_n=2, block_k=min(2048, power_of_two(in_features)), num_warps=4)


def few_tokens_tiling(in_features: int, out_features: int, num_tokens: int) -> FewTokensTiling:
    """Wide layers fill the device by themselves; narrow ones want more loads in flight, and long ones a split.

    From 17 tokens on the tokens that every tile reads again count too: wide layers get larger tiles, and so few of them
    on a processor that an early start cannot crowd them on some processors while others idle. Measured on an H200.
    """
    block_k = min(128, max(16, power_of_two(in_features)))
    many = num_tokens > 16
    if out_features >= 65536:
        return FewTokensTiling(128, min(64, block_k), num_splits=1, num_warps=4, num_stages=5)
    if out_features >= 16384:
        return FewTokensTiling(128 if many else 64, block_k, num_splits=1, num_warps=4, num_stages=4)
    tiles = triton.cdiv(out_features, 64)
    wanted = 96 if many else 64
    num_splits = 1
    while num_splits < 8 and (
        in_features > 8192 * num_splits or (tiles * num_splits < wanted and in_features >= 1024 * num_splits)
    ):
        num_splits *= 2
    return FewTokensTiling(64, block_k, num_splits, num_warps=4, num_stages=5 if many and num_splits > 1 else 6)


class SkinnyLinear:
    """The operation ``linear`` for a plain weight [out_features, in_features] in bfloat16 or float16; it gates its own
    output of few tokens (:class:`octavo.interfaces.GatesOutput`)."""

    def __init__(self, need: Any, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight.contiguous()
        self.bias = bias
        out_features, in_features = weight.shape
        self.one = one_token_tiling(in_features)
        self._device = describe(weight.device)
        tiles = triton.cdiv(out_features, self.few(num_tokens=2).block_n)  # no tiling has smaller ones
        self._arrivals = torch.zeros(tiles, dtype=torch.int32, device=weight.device)

    @classmethod
    def missing(cls, need: Any) -> list[str]:
        reasons = missing_device(need.device, need.dtype)
        if need.batch_invariant:
            reasons.append("its sums depend on how many tokens share a step, which --batch-invariant rules out")
        if need.in_features % 8:
            reasons.append(
                f"it reads 16 bytes at a time: the input size must be a multiple of 8, not {need.in_features}"
            )
        return reasons

    def apply(self, x: Tensor) -> Tensor:
        """x [num_tokens, in_features] -> [num_tokens, out_features]."""
        num_tokens = x.shape[0]
        if num_tokens == 1:
            return self._apply_one(x)
        if 1 < num_tokens <= MAX_TOKENS:
            return self._apply_few(x)
        return F.linear(x, self.weight, self.bias)

    def apply_gated(self, x: Tensor) -> Tensor | None:
        """x [num_tokens, in_features] -> ``silu(gate) * up`` [num_tokens, out_features / 2]; None: two kernels take no
        longer, as for one token, or have to."""
        num_tokens, out_features = x.shape[0], self.weight.shape[0]
        tile = self.few(num_tokens)
        whole = tile.num_splits == 1 and out_features % tile.block_n == 0 and self.bias is None
        return self._apply_few(x, gated=True) if whole and 1 < num_tokens <= MAX_TOKENS else None

    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.weight, self.bias) if tensor is not None)

    def few(self, num_tokens: int) -> FewTokensTiling:
        """The tile for so many tokens."""
        out_features, in_features = self.weight.shape
        return few_tokens_tiling(in_features, out_features, num_tokens)

    def _apply_one(self, x: Tensor) -> Tensor:
        out_features, in_features = self.weight.shape
        out = torch.empty((1, out_features), dtype=x.dtype, device=x.device)
        tile = self.one
        _one_token[(triton.cdiv(out_features, tile.block_n),)](
            out,
            x,
            self.weight,
            x if self.bias is None else self.bias,
            out_features,
            K=in_features,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            BIAS=self.bias is not None,
            PDL=self._device.dependent_launch,
            num_warps=tile.num_warps,
            **self._device.options,
        )
        return out

    def _apply_few(self, x: Tensor, gated: bool = False) -> Tensor:
        out_features, in_features = self.weight.shape
        num_outputs = out_features // 2 if gated else out_features
        out = torch.empty((x.shape[0], num_outputs), dtype=x.dtype, device=x.device)
        tile = self.few(x.shape[0])
        tiles, block_m = triton.cdiv(out_features, tile.block_n), max(16, power_of_two(x.shape[0]))
        partial = out
        if tile.num_splits > 1:
            partial = torch.empty((tiles, tile.num_splits, tile.block_n, block_m), dtype=torch.float32, device=x.device)
        _few_tokens[(tiles, tile.num_splits)](
            out,
            partial,
            self._arrivals,
            x,
            self.weight,
            x if self.bias is None else self.bias,
            x.shape[0],
            out_features,
            x.stride(0),
            K=in_features,
            BLOCK_M=block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            NUM_SPLITS=tile.num_splits,
            GATED=gated,
            BIAS=self.bias is not None,
            STAGES=tile.num_stages,
            PDL=self._device.dependent_launch,
            num_warps=tile.num_warps,
            **self._device.options,
        )
        return out


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same in float32 throughout."""
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float())
