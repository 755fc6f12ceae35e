"""Products with 4-bit integer weights in groups, ``y = x Wᵀ + b`` with ``W = (q - z) s``, for 16-bit activations.

One internal layout serves every format, made once at loading. The weights of 16 outputs and 128 inputs are 1 KiB in
one piece: word t of a row, nibble r + 4 e, holds input 32 r + 2 t + e. So ``(word >> 4 r) & 0x000F000F`` with the
exponent bits of 128 (bfloat16) or 1024 (float16) set *is* a pair of adjacent weights, without a conversion from
integers; subtracting zero points that carry the same offset is exact.

One token multiplies and adds in float32 without tensor cores. 2 to 64 tokens use them with the weights on the left, so
that these never pass through shared memory, and the scale on the sums. For more the weights are written out once for
cuBLAS.
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

from octavo_kernels.launch import describe, missing_device, power_of_two

ROWS = 16
"""Outputs whose weights lie together."""

BLOCK = 128
"""Inputs whose weights lie together; 16 words of 8."""

MAX_TILED_TOKENS = 64
"""Beyond, writing the weights out for cuBLAS costs less than it gains."""


@triton.jit
def _one_token_packed(
    out_ptr,
    partial_ptr,
    arrivals_ptr,
    x_ptr,
    weight_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    num_rows,
    exponent,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCKS: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (16 outputs, split of the input): BLOCKS blocks of 128 inputs at a time, the next on their way meanwhile.

    The inputs are read as pairs, 32 bits each. ``exponent`` is that of 128 in float32: as an argument, masking and
    setting it is one instruction, as two constants it would be two.
    """
    tile = tl.program_id(0)
    split = tl.program_id(1)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    num_blocks: tl.constexpr = K // 128
    parts: tl.constexpr = 1 if GROUP >= 128 else 128 // GROUP
    row = tl.arange(0, 16)
    n = tile * 16 + row
    block = tl.arange(0, BLOCKS)
    t = tl.arange(0, 16)
    offsets = row[:, None, None] * 16 + block[None, :, None] * 256 + t[None, None, :]
    per_split: tl.constexpr = (num_blocks + NUM_SPLITS - 1) // NUM_SPLITS
    begin = split * per_split
    end = tl.minimum(begin + per_split, num_blocks)
    words = weight_ptr + tile.to(tl.int64) * (num_blocks * 256) + offsets
    mask = (begin + block < end)[None, :, None]
    word = tl.load(words + begin * 256, mask=mask, other=0, eviction_policy="evict_first")
    if PDL:  # weights are never written by a predecessor: they need not wait
        gdc_launch_dependents()
        gdc_wait()
    total = tl.zeros((16, BLOCKS), tl.float32)
    for start in range(begin, end, BLOCKS):
        inside = start + block < end
        ahead = start + BLOCKS + block < end
        following = tl.load(
            words + (start + BLOCKS) * 256, mask=ahead[None, :, None], other=0, eviction_policy="evict_first"
        )
        for part in tl.static_range(parts):
            dots = tl.zeros((16, BLOCKS, 16), tl.float32)
            inputs = tl.zeros((BLOCKS, 16), tl.float32)
            for r in tl.static_range(part * 4 // parts, (part + 1) * 4 // parts):
                k = (start + block)[:, None] * 64 + r * 16 + t[None, :]
                pair = tl.load(x_ptr + k, mask=inside[:, None], other=0)
                if dtype == tl.bfloat16:
                    low = (pair << 16).to(tl.float32, bitcast=True)
                    high = (pair & -65536).to(tl.float32, bitcast=True)
                else:
                    low = pair.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
                    high = (pair >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
                inputs += low + high
                # 128 + q in float32: the nibble is moved to bits 16 to 19
                even = ((word << (16 - 4 * r)) & 0x000F0000) | exponent
                odd = ((word >> (4 * r)) & 0x000F0000) | exponent
                dots += even.to(tl.float32, bitcast=True) * low[None, :, :]
                dots += odd.to(tl.float32, bitcast=True) * high[None, :, :]
            group = ((start + block) * 128 + part * (128 // parts)) // GROUP
            place = group[None, :] * num_rows + n[:, None]
            there = inside[None, :] & (n < num_rows)[:, None]
            scale = tl.load(scale_ptr + place, mask=there, other=0.0).to(tl.float32)
            zero = 136.0
            if not SYMMETRIC:
                zero = 128.0 + tl.load(zero_ptr + place, mask=there, other=0).to(tl.float32)
            total += scale * (tl.sum(dots, axis=2) - zero * tl.sum(inputs, axis=1)[None, :])
        word = following
    result = tl.sum(total, axis=1)
    if NUM_SPLITS > 1:  # as in octavo_kernels.linear
        partial = partial_ptr + tile * (NUM_SPLITS * 16) + row
        tl.store(partial + split * 16, result)
        tl.debug_barrier()
        if tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel") != NUM_SPLITS - 1:
            return
        tl.debug_barrier()
        result = tl.zeros((16,), tl.float32)
        for index in tl.static_range(NUM_SPLITS):
            result += tl.load(partial + index * 16, cache_modifier=".cg")
        tl.store(arrivals_ptr + tile, 0)  # ready for the next call
    if BIAS:
        result += tl.load(bias_ptr + n, mask=n < num_rows, other=0.0).to(tl.float32)
    tl.store(out_ptr + n, result.to(out_ptr.dtype.element_ty), mask=n < num_rows)


@triton.jit
def _packed(
    out_ptr,
    partial_ptr,
    arrivals_ptr,
    x_ptr,
    weight_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    num_tokens,
    num_rows,
    x_stride,
    exponent,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    BIAS: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (BLOCK_N outputs, split of the input); ``exponent`` as above, of a pair."""
    tile = tl.program_id(0)
    split = tl.program_id(1)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    offset: tl.constexpr = 128.0 if dtype == tl.bfloat16 else 1024.0
    num_blocks: tl.constexpr = K // 128
    per_split: tl.constexpr = (num_blocks + NUM_SPLITS - 1) // NUM_SPLITS
    parts: tl.constexpr = 1 if GROUP >= 128 else 128 // GROUP
    first = split * per_split
    last = tl.minimum(first + per_split, num_blocks)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(n, num_rows - 1)  # rows beyond the end read the last one and are not stored
    m = tl.arange(0, BLOCK_M)
    there = (m < num_tokens)[None, :]
    place = (rows // 16).to(tl.int64) * (num_blocks * 256) + (rows % 16) * 16
    words = weight_ptr + place[:, None] + tl.arange(0, 16)[None, :]
    inputs = x_ptr + m[None, :].to(tl.int64) * x_stride + tl.arange(0, 32)[:, None]
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for block in tl.range(first, last, num_stages=STAGES):
        word = tl.load(words + block * 256, eviction_policy="evict_first")
        for part in tl.static_range(parts):
            group = (block * 128 + part * (128 // parts)) // GROUP
            scale = tl.load(scale_ptr + group * num_rows + rows)
            zero = tl.full((BLOCK_N,), offset + 8.0, dtype)
            if not SYMMETRIC:
                zero = (tl.load(zero_ptr + group * num_rows + rows).to(tl.float32) + offset).to(dtype)
            dots = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for r in tl.static_range(part * 4 // parts, (part + 1) * 4 // parts):
                x = tl.load(inputs + block * 128 + r * 32, mask=there, other=0.0)
                pair = ((word >> (4 * r)) & 0x000F000F) | exponent
                low = pair.to(tl.int16).to(dtype, bitcast=True) - zero[:, None]
                high = (pair >> 16).to(tl.int16).to(dtype, bitcast=True) - zero[:, None]
                weight = tl.join(low, high).reshape(BLOCK_N, 32)
                dots = tl.dot(weight, x, dots)
            total += dots * scale.to(tl.float32)[:, None]
    if NUM_SPLITS > 1:  # as in octavo_kernels.linear
        within = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
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
    out = out_ptr + m[None, :].to(tl.int64) * num_rows + n[:, None]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=there & (n < num_rows)[:, None])


@triton.jit
def _dequantize(
    out_ptr,
    weight_ptr,
    scale_ptr,
    zero_ptr,
    num_rows,
    in_features,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    SYMMETRIC: tl.constexpr,
):
    """Program (16 outputs, block of 128 inputs) -> weights [num_rows, in_features]."""
    tile = tl.program_id(0)
    block = tl.program_id(1)
    row = tl.arange(0, 16)
    n = tile * 16 + row
    t = tl.arange(0, 16)
    word = tl.load(weight_ptr + (tile.to(tl.int64) * (K // 128) + block) * 256 + row[:, None] * 16 + t[None, :])
    inside = (n < num_rows)[:, None]
    for r in tl.static_range(4):
        group = (block * 128 + r * 32) // GROUP
        scale = tl.load(scale_ptr + group * num_rows + n, mask=n < num_rows, other=0.0).to(tl.float32)
        zero = tl.full((16,), 8.0, tl.float32)
        if not SYMMETRIC:
            zero = tl.load(zero_ptr + group * num_rows + n, mask=n < num_rows, other=0).to(tl.float32)
        low = (((word >> (4 * r)) & 15).to(tl.float32) - zero[:, None]) * scale[:, None]
        high = (((word >> (4 * r + 16)) & 15).to(tl.float32) - zero[:, None]) * scale[:, None]
        k = block * 128 + r * 32 + tl.arange(0, 32)
        out = out_ptr + n[:, None].to(tl.int64) * in_features + k[None, :]
        weight = tl.join(low, high).reshape(16, 32)
        tl.store(out, weight.to(out_ptr.dtype.element_ty), mask=inside & (k < in_features)[None, :])


@dataclass(frozen=True, slots=True)
class PackedTiling:
    """Tile of :func:`_packed`."""

    block_m: int
    block_n: int
    num_splits: int
    num_warps: int
    num_stages: int


def one_token_splits(num_tiles: int, num_blocks: int) -> int:
    """Enough programs to hide what each waits for: about 1500, of one or two rounds of 8 blocks."""
    num_splits = 1
    while num_splits < 8 and num_tiles * num_splits < 1024 and num_blocks >= 16 * num_splits:
        num_splits *= 2
    return num_splits


def packed_tiling(in_features: int, out_features: int, num_tokens: int) -> PackedTiling:
    """Measured on an H200. Up to 16 tokens narrow layers gain from every split up to 8; with more, the partial sums
    weigh against it."""
    block_m = max(16, power_of_two(num_tokens))
    few = block_m == 16
    block_n = 64 if few or out_features < 16384 else 128
    tiles, blocks = triton.cdiv(out_features, block_n), triton.cdiv(in_features, BLOCK)
    wanted, least = (512, 8) if few else (192, 16)
    num_splits = 1
    while num_splits < 8 and tiles * num_splits < wanted and blocks >= least * num_splits:
        num_splits *= 2
    num_stages = 4 if out_features >= 16384 and block_m != 32 else 6
    return PackedTiling(block_m, block_n, num_splits, num_warps=4, num_stages=num_stages)


def pack_words(values: Tensor) -> Tensor:
    """values uint8 [out_features, in_features] below 16 -> int32 [ceil(out / 16), ceil(in / 128), 16, 16]."""
    rows, columns = -values.shape[0] % ROWS, -values.shape[1] % BLOCK
    padded = F.pad(values, (0, columns, 0, rows))
    # [row tile, row, block, r, t, e]
    parts = padded.view(-1, ROWS, padded.shape[1] // BLOCK, 4, 16, 2).to(torch.int32)
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=values.device).view(2, 4).T.view(4, 1, 2)
    return (parts << shifts).sum(dim=(3, 5), dtype=torch.int32).transpose(1, 2).contiguous()


class TritonPacked:
    """The operation ``linear_packed`` for 4 bits: ``weight`` has the attributes of octavo_quant.packed.PackedWeight."""

    def __init__(self, need: Any, weight: Any, bias: Tensor | None) -> None:
        self._in_features, self._out_features = need.in_features, need.out_features
        self._group_size = need.group_size
        self._words = pack_words(weight.unpack())
        self._scales = weight.scales.contiguous()
        self._zeros = None if weight.zeros is None else weight.zeros.contiguous()
        self._permutation = weight.permutation
        self._bias = bias
        self._device = describe(self._words.device)
        self._arrivals = torch.zeros(
            triton.cdiv(self._out_features, ROWS), dtype=torch.int32, device=self._words.device
        )

    @classmethod
    def missing(cls, need: Any) -> list[str]:
        reasons = missing_device(need.device, need.dtype)
        if need.bits != 4:
            reasons.append(f"it has 4-bit weights, not {need.bits}-bit ones")
        if need.group_size % BLOCK and need.group_size not in (32, 64) and need.group_size != need.in_features:
            reasons.append(f"its groups are of 32, 64 or a multiple of {BLOCK}, not of {need.group_size}")
        if need.in_features % BLOCK:
            reasons.append(f"it reads {BLOCK} inputs at a time, of which {need.in_features} is no multiple")
        return reasons

    def apply(self, x: Tensor) -> Tensor:
        """x [num_tokens, in_features] -> [num_tokens, out_features]."""
        if self._permutation is not None:
            x = x[:, self._permutation]
        num_tokens = x.shape[0]
        if num_tokens == 1:
            return self._apply_one(x)
        if 1 < num_tokens <= MAX_TILED_TOKENS:
            return self._apply_tiled(x, packed_tiling(self._in_features, self._out_features, num_tokens))
        return F.linear(x, self.dequantize(x.dtype), self._bias)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weights [out_features, in_features], columns in the order of the permutation."""
        out = torch.empty((self._out_features, self._in_features), dtype=dtype, device=self._words.device)
        _dequantize[(self._words.shape[0], self._words.shape[1])](
            out,
            self._words,
            self._scales,
            self._scales if self._zeros is None else self._zeros,
            self._out_features,
            self._in_features,
            K=self._in_features,
            GROUP=self._group_size,
            SYMMETRIC=self._zeros is None,
            num_warps=1,
        )
        return out

    def num_bytes(self) -> int:
        tensors = (self._words, self._scales, self._zeros, self._permutation, self._bias)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def _apply_one(self, x: Tensor) -> Tensor:
        out = torch.empty((1, self._out_features), dtype=x.dtype, device=x.device)
        tiles, blocks = self._words.shape[:2]
        num_splits = one_token_splits(tiles, blocks)
        partial = torch.empty((tiles, num_splits, ROWS), dtype=torch.float32, device=x.device)
        _one_token_packed[(tiles, num_splits)](
            out,
            partial,
            self._arrivals,
            x.contiguous().view(torch.int32),
            self._words,
            self._scales,
            self._scales if self._zeros is None else self._zeros,
            x if self._bias is None else self._bias,
            self._out_features,
            0x43000000,
            K=self._in_features,
            GROUP=self._group_size,
            BLOCKS=min(8, power_of_two(blocks)),
            NUM_SPLITS=num_splits,
            SYMMETRIC=self._zeros is None,
            BIAS=self._bias is not None,
            PDL=self._device.dependent_launch,
            num_warps=4,
            **self._device.options,
        )
        return out

    def _apply_tiled(self, x: Tensor, tile: PackedTiling) -> Tensor:
        out = torch.empty((x.shape[0], self._out_features), dtype=x.dtype, device=x.device)
        tiles = triton.cdiv(self._out_features, tile.block_n)
        partial = out
        if tile.num_splits > 1:
            shape = (tiles, tile.num_splits, tile.block_n, tile.block_m)
            partial = torch.empty(shape, dtype=torch.float32, device=x.device)
        _packed[(tiles, tile.num_splits)](
            out,
            partial,
            self._arrivals,
            x,
            self._words,
            self._scales,
            self._scales if self._zeros is None else self._zeros,
            x if self._bias is None else self._bias,
            x.shape[0],
            self._out_features,
            x.stride(0),
            0x43004300 if x.dtype == torch.bfloat16 else 0x64006400,
            K=self._in_features,
            GROUP=self._group_size,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            NUM_SPLITS=tile.num_splits,
            SYMMETRIC=self._zeros is None,
            BIAS=self._bias is not None,
            STAGES=tile.num_stages,
            PDL=self._device.dependent_launch,
            num_warps=tile.num_warps,
            **self._device.options,
        )
        return out
