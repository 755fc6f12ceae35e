"""Products with FP8 weights, ``y = x Wᵀ + b`` with ``W = q s``, for 16-bit activations.

Up to 64 tokens the weights stream through: they are widened in registers, on the left of the product, and the scale
goes on the sums; the activations are not rounded, which costs nothing here and is more exact than what the checkpoint
allows. More tokens are rounded to FP8, each by its largest value, for cuBLAS (``torch._scaled_mm``), where the
checkpoint has a scale for each output; block scales are multiplied out for a 16-bit product.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octavo_kernels.fp8_tokens import RoundedTokens, TokenRounding, round_tokens
from octavo_kernels.launch import describe, missing_device, power_of_two
from octavo_kernels.linear import MAX_TOKENS, FewTokensTiling

WIDE = 16384
"""So many outputs fill the device with tensor-core tiles, which then are ahead of multiplying for one token too."""


@triton.jit
def _one_token_fp8(
    out_ptr,
    x_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    num_rows,
    K: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    COLUMN_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PART: tl.constexpr,
    BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program: BLOCK_N outputs; each PART of a step's BLOCK_K inputs has one scale."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    inside = (n < num_rows)[:, None]
    pointers = weight_ptr + n[:, None].to(tl.int64) * K + k[None, :]
    weight = tl.load(pointers, mask=inside & (k < K)[None, :], other=0.0, eviction_policy="evict_first")
    if PDL:  # weights are never written by a predecessor: they need not wait
        gdc_launch_dependents()
        gdc_wait()
    blocks: tl.constexpr = (K + COLUMN_BLOCK - 1) // COLUMN_BLOCK
    parts: tl.constexpr = BLOCK_K // PART
    scaled = tl.zeros((BLOCK_N, parts), tl.float32)
    for start in range(0, K, BLOCK_K):
        x = tl.load(x_ptr + start + k, mask=start + k < K, other=0.0).to(tl.float32)
        ahead = start + BLOCK_K + k
        mask = inside & (ahead < K)[None, :]
        following = tl.load(pointers + start + BLOCK_K, mask=mask, other=0.0, eviction_policy="evict_first")
        product = (weight.to(tl.float32) * x[None, :]).reshape(BLOCK_N, parts, PART)
        column = (start + tl.arange(0, parts) * PART) // COLUMN_BLOCK
        place = (n // ROW_BLOCK)[:, None] * blocks + column[None, :]
        scale = tl.load(scale_ptr + place, mask=inside & (column < blocks)[None, :], other=0.0)
        scaled += tl.sum(product, axis=2) * scale
        weight = following
    result = tl.sum(scaled, axis=1)
    if BIAS:
        result += tl.load(bias_ptr + n, mask=n < num_rows, other=0.0).to(tl.float32)
    tl.store(out_ptr + n, result.to(out_ptr.dtype.element_ty), mask=n < num_rows)


@triton.jit
def _few_tokens_fp8(
    out_ptr,
    partial_ptr,
    arrivals_ptr,
    x_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    num_tokens,
    num_rows,
    x_stride,
    K: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    COLUMN_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BIAS: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (BLOCK_N outputs, split of the input); BLOCK_K divides COLUMN_BLOCK where there are several."""
    tile = tl.program_id(0)
    split = tl.program_id(1)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    blocks: tl.constexpr = (K + COLUMN_BLOCK - 1) // COLUMN_BLOCK
    steps: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    per_split: tl.constexpr = (steps + NUM_SPLITS - 1) // NUM_SPLITS
    first = split * per_split
    last = tl.minimum(first + per_split, steps)
    rows = tl.minimum(n, num_rows - 1)  # rows beyond the end read the last one and are not stored
    weights = weight_ptr + rows[:, None].to(tl.int64) * K + k[None, :]
    inputs = x_ptr + m[None, :] * x_stride + k[:, None]
    scales = scale_ptr + rows // ROW_BLOCK * blocks
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
        weight = weight.to(tl.float16).to(x.dtype)  # exact, and faster than in one step
        if blocks > 1:
            total += tl.dot(weight, x) * tl.load(scales + start // COLUMN_BLOCK)[:, None]
        else:
            total = tl.dot(weight, x, total)
    if blocks == 1:
        total *= tl.load(scales)[:, None]
    if NUM_SPLITS > 1:  # as in octavo_kernels.linear
        within = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + m[None, :]
        partial = partial_ptr + tile * (NUM_SPLITS * BLOCK_N * BLOCK_M) + within
        tl.store(partial + split * (BLOCK_N * BLOCK_M), total)
        tl.debug_barrier()
        if tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel") != NUM_SPLITS - 1:
            return
        tl.debug_barrier()
        total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for index in tl.static_range(NUM_SPLITS):
            total += tl.load(partial + index * (BLOCK_N * BLOCK_M), cache_modifier=".cg")
        tl.store(arrivals_ptr + tile, 0)  # ready for the next call
    if BIAS:
        total += tl.load(bias_ptr + n, mask=n < num_rows, other=0.0).to(tl.float32)[:, None]
    out = out_ptr + m[None, :] * num_rows + n[:, None]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=there & (n < num_rows)[:, None])


def few_tokens_fp8_tiling(in_features: int, out_features: int, column_block: int, block_m: int) -> FewTokensTiling:
    """Steps of half as many bytes as for 16-bit weights, and so one more in flight."""
    block_k = min(128, max(16, power_of_two(in_features)))
    while column_block < in_features and column_block % block_k:
        block_k //= 2
    tiles = triton.cdiv(out_features, 64)
    wanted = 512 if in_features > 8192 and block_m <= 32 else 128
    num_splits = 1
    while num_splits < 8 and (
        in_features > 8192 * num_splits or (tiles * num_splits < wanted and in_features >= 1536 * num_splits)
    ):
        num_splits *= 2
    return FewTokensTiling(64, block_k, num_splits, num_warps=4, num_stages=5 if out_features >= 16384 else 7)


class TritonFp8:
    """The operation ``linear_fp8``; ``weight`` has the attributes of octavo_quant.fp8_weight.Fp8Weight."""

    def __init__(self, need: Any, weight: Any, bias: Tensor | None) -> None:
        self._values = weight.values.contiguous()
        self._scales = weight.scales.contiguous()
        self._row_block, self._column_block = need.row_block, need.column_block
        self._by_output = need.column_block >= need.in_features
        # what cuBLAS multiplies by row takes activations rounded by token, or, as exactly, by a stored scale
        rounds = need.activation in ("token", "tensor") and self._by_output and need.out_features % 16 == 0
        rounds = rounds and need.device.type == "cuda" and need.dtype == torch.bfloat16
        self.form = TokenRounding(above=MAX_TOKENS) if rounds else None
        self._dtype = need.dtype
        self._row_scales: Tensor | None = None
        if rounds:
            rows = self._scales.repeat_interleave(self._row_block, dim=0)[: need.out_features]
            self._row_scales = rows.reshape(1, -1).contiguous()
        self._bias = bias
        self._device = describe(self._values.device)
        self._arrivals = torch.zeros(triton.cdiv(need.out_features, 64), dtype=torch.int32, device=self._values.device)

    @classmethod
    def missing(cls, need: Any) -> list[str]:
        reasons = missing_device(need.device, need.dtype)
        if need.device.type == "cuda" and torch.cuda.get_device_capability(need.device) < (8, 9):
            reasons.append("it needs a device that converts FP8, of compute capability 8.9 or above")
        if need.in_features % 16:
            reasons.append(
                f"it reads 16 bytes at a time: the input size must be a multiple of 16, not {need.in_features}"
            )
        if need.column_block < need.in_features and need.column_block % 16:
            reasons.append(f"its blocks are of a multiple of 16 inputs, not of {need.column_block}")
        return reasons

    def apply(self, x: Tensor) -> Tensor:
        """x [num_tokens, in_features] -> [num_tokens, out_features]."""
        if isinstance(x, RoundedTokens):
            return self._apply_rounded(x)
        num_tokens = x.shape[0]
        if num_tokens == 1 and self._values.shape[0] < WIDE:
            return self._apply_one(x)
        if 1 <= num_tokens <= MAX_TOKENS:
            return self._apply_few(x)
        if self._row_scales is None or num_tokens == 0:
            return F.linear(x, self.dequantize(x.dtype), self._bias)
        return self._apply_rounded(round_tokens(x))

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weights [out_features, in_features]."""
        out_features, in_features = self._values.shape
        rows = self._scales.repeat_interleave(self._row_block, dim=0)[:out_features]
        if not self._by_output:
            rows = rows.repeat_interleave(self._column_block, dim=1)[:, :in_features]
        weight: Tensor = self._values.to(dtype) * rows
        return weight.to(dtype)

    def num_bytes(self) -> int:
        tensors = (self._values, self._scales, self._row_scales, self._bias)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def _apply_rounded(self, x: RoundedTokens) -> Tensor:
        assert self._row_scales is not None
        y: Tensor = torch._scaled_mm(
            x,
            self._values.t(),
            scale_a=x.scales,
            scale_b=self._row_scales,
            out_dtype=self._dtype,
            use_fast_accum=True,
        )
        return y if self._bias is None else y + self._bias

    def _apply_one(self, x: Tensor) -> Tensor:
        out_features, in_features = self._values.shape
        out = torch.empty((1, out_features), dtype=x.dtype, device=x.device)
        block_k = min(2048, power_of_two(in_features))
        part = min(128, block_k)  # sums that are short-lived leave registers for loads
        while not self._by_output and self._column_block % part:
            part //= 2
        _one_token_fp8[(triton.cdiv(out_features, 4),)](
            out,
            x,
            self._values,
            self._scales,
            x if self._bias is None else self._bias,
            out_features,
            K=in_features,
            ROW_BLOCK=self._row_block,
            COLUMN_BLOCK=self._column_block,
            BLOCK_N=4,
            BLOCK_K=block_k,
            PART=part,
            BIAS=self._bias is not None,
            PDL=self._device.dependent_launch,
            num_warps=4,
            **self._device.options,
        )
        return out

    def _apply_few(self, x: Tensor) -> Tensor:
        out_features, in_features = self._values.shape
        out = torch.empty((x.shape[0], out_features), dtype=x.dtype, device=x.device)
        block_m = max(16, power_of_two(x.shape[0]))
        tile = few_tokens_fp8_tiling(in_features, out_features, self._column_block, block_m)
        tiles = triton.cdiv(out_features, tile.block_n)
        partial = out
        if tile.num_splits > 1:
            partial = torch.empty((tiles, tile.num_splits, tile.block_n, block_m), dtype=torch.float32, device=x.device)
        _few_tokens_fp8[(tiles, tile.num_splits)](
            out,
            partial,
            self._arrivals,
            x,
            self._values,
            self._scales,
            x if self._bias is None else self._bias,
            x.shape[0],
            out_features,
            x.stride(0),
            K=in_features,
            ROW_BLOCK=self._row_block,
            COLUMN_BLOCK=self._column_block,
            BLOCK_M=block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            NUM_SPLITS=tile.num_splits,
            BIAS=self._bias is not None,
            STAGES=tile.num_stages,
            PDL=self._device.dependent_launch,
            num_warps=tile.num_warps,
            **self._device.options,
        )
        return out
