"""Quantized products on Hopper GPUs: 4-bit integers and FP8, as :mod:`octavo_kernels.hopper_stream` reads them.

More tokens than streaming is made for go to cuBLAS: 4-bit weights are written out once for all of them; FP8 ones meet
tokens that are rounded to FP8, where the checkpoint has a scale for each output.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from octavo_kernels.fp8_tokens import RoundedTokens, TokenRounding, round_tokens
from octavo_kernels.hopper_packed import PackedTiling, multiply_packed
from octavo_kernels.hopper_stream import STEP, TILE, StreamedWeight, StreamTiling, int4_factor, stream
from octavo_kernels.launch import describe, missing_device, missing_hopper


@triton.jit
def _dequantize_int4(
    out_ptr, words_ptr, params_ptr, num_rows, K: tl.constexpr, GROUP: tl.constexpr, FACTOR: tl.constexpr
):
    """Program (128 outputs, 128 inputs) -> weights [num_rows, K]."""
    tile = tl.program_id(0)
    step = tl.program_id(1)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    row = tl.arange(0, 32)  # (warp, row of 8)
    t = tl.arange(0, 4)
    words = words_ptr + (tile.to(tl.int64) * (K // 128) + step) * 2048
    words += row[:, None, None] * 16 + t[None, :, None] * 4 + t[None, None, :]
    for half in tl.static_range(2):
        k = step * 128 + half * 64 + tl.arange(0, 64)
        params = params_ptr + (tile * (K // GROUP) + (step * 128 + half * 64) // GROUP) * 128 + row
        for rows in tl.static_range(2):
            word = tl.load(words + half * 1024 + rows * 512)
            for row_half in tl.static_range(2):
                param = tl.load(params + row_half * 64 + rows * 32)
                scale = param.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)[:, None, None]
                added = (param >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)[:, None, None]
                if dtype == tl.bfloat16:
                    scale *= 2.0**-133 * FACTOR * 16**row_half
                    added *= FACTOR
                else:
                    added = (1024 - added) * scale
                first = word >> (4 * row_half)
                even = tl.join((first & 15).to(tl.float32), (first >> 16 & 15).to(tl.float32))
                odd = tl.join((first >> 8 & 15).to(tl.float32), (first >> 24 & 15).to(tl.float32))
                weight = tl.join(even, odd) * scale[:, :, :, None, None] + added[:, :, :, None, None]
                # [row, t, 16 inputs, of the pair, input half]
                weight = tl.permute(weight, (0, 2, 4, 1, 3)).reshape(32, 64)
                n = tile * 128 + rows * 64 + 2 * row + row_half
                place = n[:, None].to(tl.int64) * K + k[None, :]
                tl.store(out_ptr + place, weight.to(dtype), mask=(n < num_rows)[:, None])


@triton.jit
def _dequantize_fp8(
    out_ptr,
    values_ptr,
    scales_ptr,
    K: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    COLUMN_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (output, BLOCK inputs): weights in their own order."""
    row = tl.program_id(0)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = k < K
    place = k // 64 * 64 + k % 8 // 2 * 16 + k % 64 // 16 * 4 + k % 2 * 2 + 1 - k % 16 // 8
    value = tl.load(values_ptr + row.to(tl.int64) * K + place, mask=inside, other=0.0).to(tl.float32)
    blocks: tl.constexpr = (K + COLUMN_BLOCK - 1) // COLUMN_BLOCK
    scale = tl.load(scales_ptr + row // ROW_BLOCK * blocks + k // COLUMN_BLOCK, mask=inside, other=0.0)
    tl.store(out_ptr + row.to(tl.int64) * K + k, (value * scale).to(out_ptr.dtype.element_ty), mask=inside)


def pack_fragments(values: Tensor) -> Tensor:
    """values uint8 [out_features, in_features] below 16 -> int32 [ceil(out / 128), in / 128, 2, 2, 512]: what a step of
    a tile reads lies together, its halves of 64 inputs first."""
    padded = F.pad(values, (0, 0, 0, -values.shape[0] % 128))
    tiles, steps = padded.shape[0] // 128, padded.shape[1] // 128
    # [tile, 64 rows, warp, g, row half, step, 64 inputs, 16 inputs, input half, t, of the pair]
    parts = padded.view(tiles, 2, 4, 8, 2, steps, 2, 4, 2, 4, 2).permute(0, 5, 6, 1, 2, 3, 9, 7, 4, 8, 10)
    row_half, input_half, second = torch.meshgrid(*[torch.arange(2, device=values.device)] * 3, indexing="ij")
    shifts = (4 * row_half + 8 * input_half + 16 * second).int()
    words = [(tile.int() << shifts).sum(dim=(-3, -2, -1), dtype=torch.int32) for tile in parts]
    return torch.stack(words).view(tiles, steps, 2, 2, 512)


def pack_parameters(scales: Tensor, zeros: Tensor | None, dtype: torch.dtype) -> Tensor:
    """scales [groups, out_features], zeros the same or None (8) -> int32 [ceil(out / 128), groups, 2, 2, 32]: two
    values in ``dtype`` that make weights of an output's nibbles.

    float16: the scale, and above it the zero point with the offset that nibbles have below an exponent.
    bfloat16: the scale as it meets nibbles without an exponent, at bit 4 in odd outputs, and above it what is added
    then, -zero · scale; both for weights that are smaller by ``int4_factor``. What is added is rounded, as the weights
    are, and exact for a zero point of 8.
    """
    low = scales.to(dtype)
    zeros = torch.full_like(low, 8) if zeros is None else zeros
    if dtype == torch.bfloat16:
        high = (low.float() * zeros.float() / -int4_factor(dtype)).to(dtype)
        nibble = torch.tensor([2.0**133, 2.0**129], dtype=torch.float64, device=low.device) / int4_factor(dtype)
        low = (low.double() * nibble.repeat(-(-low.shape[1] // 2))[: low.shape[1]]).to(dtype)
    else:
        high = (zeros.to(torch.int32) + 1024).to(dtype)
    both = torch.stack([low, high], dim=-1).contiguous().view(torch.int32).squeeze(-1)
    return _arrange_rows(both)


def pack_fp8_scales(scales: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
    """scales float32 [out_features, at least in / 128] -> int32 [ceil(out / 128), in / 128, 2, 2, 32]: each twice in
    ``dtype``, with what e4m3 lacks to its exponent."""
    scales = scales[:, : in_features // STEP].T * (2.0**120 if dtype == torch.bfloat16 else 2.0**8)
    return _arrange_rows(scales.to(dtype).unsqueeze(-1).repeat(1, 1, 2).view(torch.int32).squeeze(-1))


def _arrange_rows(params: Tensor) -> Tensor:
    """int32 [groups, out_features] -> [ceil(out / 128), groups, row half, 64 rows, 32]."""
    padded = F.pad(params, (0, -params.shape[1] % 128))
    parts = padded.view(len(padded), -1, 2, 32, 2)  # [groups, tile, 64 rows, (warp, g), row half]
    return parts.permute(1, 0, 4, 2, 3).contiguous()


def fp8_order(device: torch.device) -> Tensor:
    """The input of a block of 64 that lies at each place: a thread's fragments of a row are 16 neighbouring bytes."""
    place = torch.arange(64, device=device)
    t, j, byte = place // 16, place // 4 % 4, place % 4
    return 16 * j + 8 * (1 - byte % 2) + 2 * t + byte // 2


def int4_tiling(out_features: int, num_tokens: int, num_processors: int) -> StreamTiling:
    """Measured on an H200, between the kernels of a layer.

    With more tokens a tile that several programs share costs more, so narrow layers get one program for each processor.
    It leaves no room for a second one: the programs start while the kernel before them still runs, and would gather
    where that has ended first.
    """
    if num_tokens <= 8:
        return StreamTiling(8, num_stages=6, num_warps=4, resident=3, num_programs=3 * num_processors)
    if num_tokens <= 16:
        return StreamTiling(16, num_stages=6, num_warps=4, resident=2, num_programs=2 * num_processors)
    block_m = 32 if num_tokens <= 32 else 64
    if triton.cdiv(out_features, TILE) < num_processors:
        return StreamTiling(block_m, num_stages=8, num_warps=8, resident=1, num_programs=num_processors)
    num_stages = 6 if block_m == 32 else 4
    return StreamTiling(block_m, num_stages, num_warps=4, resident=2, num_programs=2 * num_processors)


def packed_tiling(out_features: int, in_features: int, num_tokens: int, num_processors: int) -> PackedTiling:
    """For more tokens; measured on an H200.

    Tiles of 256 tokens where those of 128 hold no fewer beyond the end: they widen weights half as often. But of up to
    256 tokens a narrow layer has too few of them, and many programs would share each.

    Runs that end with tiles leave processors idle, and others cost the sharing of tiles, as much as some 16 steps.
    """
    row_tiles = triton.cdiv(out_features, TILE)
    narrow = row_tiles < num_processors and num_tokens <= 256
    block_m = 128 if narrow or -num_tokens % 128 < -num_tokens % 256 else 256
    num_tiles = row_tiles * triton.cdiv(num_tokens, block_m)
    num_programs = num_processors
    if num_tiles <= num_processors:
        whole = num_processors // num_tiles * num_tiles
        num_steps = num_tiles * (in_features // STEP)
        if num_steps / whole - num_steps / num_processors <= 16:
            num_programs = whole
    return PackedTiling(block_m, 5 if block_m == 128 else 3, num_programs)


def fp8_tiling(out_features: int, num_tokens: int, num_processors: int) -> StreamTiling:
    """The same; steps are of twice as many bytes, and fewer are on their way."""
    if num_tokens <= 16:
        block_m = 8 if num_tokens <= 8 else 16
        return StreamTiling(block_m, num_stages=5, num_warps=8, resident=2, num_programs=2 * num_processors)
    if num_tokens <= 32:
        if triton.cdiv(out_features, TILE) < num_processors:
            return StreamTiling(32, num_stages=5, num_warps=8, resident=1, num_programs=num_processors)
        return StreamTiling(32, num_stages=4, num_warps=8, resident=2, num_programs=2 * num_processors)
    if num_tokens <= 64:
        return StreamTiling(64, num_stages=6, num_warps=8, resident=1, num_programs=num_processors)
    return StreamTiling(128, num_stages=4, num_warps=8, resident=1, num_programs=num_processors)


def missing_stream(device: torch.device, dtype: torch.dtype, in_features: int) -> list[str]:
    """Why :func:`octavo_kernels.hopper_stream.stream` cannot multiply; empty: it can."""
    reasons = [*missing_device(device, dtype), *missing_hopper(device)]
    if in_features % STEP:
        reasons.append(f"it reads {STEP} inputs at a time, of which {in_features} is no multiple")
    return reasons


class HopperPacked:
    """The operation ``linear_packed`` for 4 bits: ``weight`` has the attributes of octavo_quant.packed.PackedWeight."""

    MAX_STREAMED = 64
    """Tokens; beyond, one group of warps cannot widen weights as fast as it multiplies them."""

    MAX_PACKED = 1024
    """Tokens; beyond, writing the weights out for cuBLAS costs less than it gains."""

    def __init__(self, need: Any, weight: Any, bias: Tensor | None) -> None:
        words, params = pack_fragments(weight.unpack()), pack_parameters(weight.scales, weight.zeros, need.dtype)
        self._weight = StreamedWeight(words, params, need.group_size, None, need.out_features, need.in_features)
        self._permutation = weight.permutation
        self._bias = bias
        self._num_processors = describe(words.device).num_processors
        self._arrivals = _arrivals(self._weight, 2 * self.MAX_PACKED)  # two for each tile

    @classmethod
    def missing(cls, need: Any) -> list[str]:
        reasons = missing_stream(need.device, need.dtype, need.in_features)
        if need.bits != 4:
            reasons.append(f"it has 4-bit weights, not {need.bits}-bit ones")
        if need.group_size != 64 and need.group_size % STEP:
            reasons.append(f"its groups are of 64 or a multiple of {STEP}, not of {need.group_size}")
        return reasons

    def apply(self, x: Tensor) -> Tensor:
        """x [num_tokens, in_features] -> [num_tokens, out_features]."""
        if self._permutation is not None:
            x = x[:, self._permutation]
        num_tokens, weight = x.shape[0], self._weight
        if not 1 <= num_tokens <= self.MAX_PACKED:
            return F.linear(x, self.dequantize(x.dtype), self._bias)
        if num_tokens <= self.MAX_STREAMED:
            tile = int4_tiling(weight.out_features, num_tokens, self._num_processors)
            return stream(x, weight, self._bias, self._arrivals, tile)
        tiling = packed_tiling(weight.out_features, weight.in_features, num_tokens, self._num_processors)
        return multiply_packed(x, weight, self._bias, self._arrivals, tiling)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weights [out_features, in_features], columns in the order of the permutation."""
        weight = self._weight
        out = torch.empty((weight.out_features, weight.in_features), dtype=dtype, device=weight.words.device)
        _dequantize_int4[weight.words.shape[:2]](
            out,
            weight.words,
            weight.params,
            weight.out_features,
            K=weight.in_features,
            GROUP=weight.group_size,
            FACTOR=int4_factor(dtype),
            num_warps=4,
        )
        return out

    def num_bytes(self) -> int:
        return self._weight.num_bytes() + sum(t.nbytes for t in (self._permutation, self._bias) if t is not None)


class HopperFp8:
    """The operation ``linear_fp8``; ``weight`` has the attributes of octavo_quant.fp8_weight.Fp8Weight.

    Streaming leaves the activations as they are, which is more exact than what the checkpoint allows.
    """

    MAX_UNROUNDED = 32
    """Tokens; beyond, rounding them for cuBLAS gains, where it multiplies such weights."""

    MAX_STREAMED = 256
    """Tokens, where it does not; beyond, writing the weights out gains."""

    def __init__(self, need: Any, weight: Any, bias: Tensor | None) -> None:
        out_features, in_features = weight.values.shape
        device = weight.values.device
        blocks = weight.values.view(torch.uint8).view(out_features, in_features // 64, 64)
        values = blocks[..., fp8_order(device)].view(out_features, in_features).view(weight.values.dtype)
        self._scales, self._row_block, self._column_block = weight.scales, need.row_block, need.column_block
        by_output = need.column_block >= need.in_features
        rows = weight.scales.repeat_interleave(need.row_block, dim=0)[:out_features]
        if by_output:
            scales = rows.reshape(-1).contiguous()
            self._weight = StreamedWeight(values, None, 0, scales, out_features, in_features)
        else:
            params = pack_fp8_scales(rows.repeat_interleave(need.column_block // STEP, dim=1), in_features, need.dtype)
            self._weight = StreamedWeight(values, params, STEP, None, out_features, in_features)
        # what cuBLAS multiplies by row takes activations rounded by token, or, as exactly, by a stored scale
        rounds = by_output and need.activation in ("token", "tensor") and need.dtype == torch.bfloat16
        rounds = rounds and out_features % 16 == 0
        self.form = TokenRounding(above=self.MAX_UNROUNDED, reordered=True) if rounds else None
        self._dtype = need.dtype
        self._bias = bias
        self._num_processors = describe(device).num_processors
        self._arrivals = _arrivals(self._weight, self.MAX_STREAMED)

    @classmethod
    def missing(cls, need: Any) -> list[str]:
        reasons = missing_stream(need.device, need.dtype, need.in_features)
        if need.column_block < need.in_features and need.column_block % STEP:
            reasons.append(f"its blocks are of a multiple of {STEP} inputs, not of {need.column_block}")
        return reasons

    def apply(self, x: Tensor) -> Tensor:
        """x [num_tokens, in_features] -> [num_tokens, out_features]."""
        if isinstance(x, RoundedTokens):
            return self._apply_rounded(x)
        num_tokens = x.shape[0]
        if 1 <= num_tokens <= (self.MAX_STREAMED if self.form is None else self.form.above):
            tile = fp8_tiling(self._weight.out_features, num_tokens, self._num_processors)
            return stream(x, self._weight, self._bias, self._arrivals, tile)
        if self.form is None or num_tokens == 0:
            return F.linear(x, self.dequantize(x.dtype), self._bias)
        return self._apply_rounded(round_tokens(x, reordered=True))

    def _apply_rounded(self, x: RoundedTokens) -> Tensor:
        assert self._weight.scales is not None
        y: Tensor = torch._scaled_mm(
            x,
            self._weight.words.t(),
            scale_a=x.scales,
            scale_b=self._weight.scales.view(1, -1),
            out_dtype=self._dtype,
            use_fast_accum=True,
        )
        return y if self._bias is None else y + self._bias

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weights [out_features, in_features]."""
        weight, block = self._weight, 1024
        out = torch.empty((weight.out_features, weight.in_features), dtype=dtype, device=weight.words.device)
        _dequantize_fp8[(weight.out_features, triton.cdiv(weight.in_features, block))](
            out,
            weight.words,
            self._scales,
            K=weight.in_features,
            ROW_BLOCK=self._row_block,
            COLUMN_BLOCK=self._column_block,
            BLOCK=block,
            num_warps=4,
        )
        return out

    def num_bytes(self) -> int:
        return self._weight.num_bytes() + (0 if self._bias is None else self._bias.nbytes)


def _arrivals(weight: StreamedWeight, max_tokens: int) -> Tensor:
    """A counter for each tile that there can be."""
    return torch.zeros(weight.num_tiles(max_tokens, 128), dtype=torch.int32, device=weight.words.device)
