"""Head normalization, rotary embedding and the write into the paged cache, in one pass over the fused projection.

The cache of one layer is [num_blocks, key or value, num_kv_heads, block_size, head_dim]: what one head keeps of a
block lies together, so attention reads it in long contiguous pieces.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octavo_kernels.launch import describe, power_of_two

FP8_MAX = 448.0  # the largest finite e4m3


# the batch's positions and slots lie anywhere in one transfer
@triton.jit(do_not_specialize_on_alignment=["positions_ptr", "slots_ptr"])
def _rotate_and_store(
    out_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    kv_ptr,
    positions_ptr,
    slots_ptr,
    table_ptr,
    query_weight_ptr,
    key_weight_ptr,
    query_stride,
    key_stride,
    value_stride,
    kv_block_stride,
    eps,
    key_inverse_scale,
    value_inverse_scale,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    EIGHT_BIT: tl.constexpr,
    FP8_MAX: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (token, group of HEADS heads); heads are numbered query, key, value."""
    token = tl.program_id(0).to(tl.int64)
    query_programs: tl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    key_programs: tl.constexpr = (NUM_KV_HEADS + HEADS - 1) // HEADS
    group = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)[None, :]
    half: tl.constexpr = ROTARY_DIM // 2
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    slot = tl.load(slots_ptr + token)
    block = slot // BLOCK_SIZE
    offset = slot % BLOCK_SIZE
    plane: tl.constexpr = NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM
    if group < query_programs + key_programs:
        is_query = group < query_programs
        if is_query:
            head = group * HEADS + tl.arange(0, HEADS)[:, None]
            source = query_ptr + token * query_stride + head * HEAD_DIM
            weight_ptr = query_weight_ptr
        else:
            head = (group - query_programs) * HEADS + tl.arange(0, HEADS)[:, None]
            source = key_ptr + token * key_stride + head * HEAD_DIM
            weight_ptr = key_weight_ptr
        mask = (head < tl.where(is_query, NUM_HEADS, NUM_KV_HEADS)) & (d < HEAD_DIM)
        x = tl.load(source + d, mask=mask, other=0.0)
        if ROTARY_DIM > 0:
            pair = tl.where(d < half, d + half, d - half)
            rotated = d < ROTARY_DIM
            other = tl.load(source + pair, mask=mask & rotated, other=0.0)
        if NORM:
            wide = x.to(tl.float32)
            scale = tl.rsqrt(tl.sum(wide * wide, axis=1)[:, None] / HEAD_DIM + eps)
            x = (wide * scale).to(x.dtype) * tl.load(weight_ptr + d, mask=d < HEAD_DIM, other=0.0)
            if ROTARY_DIM > 0:
                weight = tl.load(weight_ptr + pair, mask=rotated, other=0.0)
                other = (other.to(tl.float32) * scale).to(x.dtype) * weight
        y = x.to(tl.float32)
        if ROTARY_DIM > 0:
            angles = table_ptr + tl.load(positions_ptr + token) * ROTARY_DIM
            frequency = tl.where(d < half, d, d - half)
            cosine = tl.load(angles + frequency, mask=rotated, other=1.0)
            sine = tl.load(angles + half + frequency, mask=rotated, other=0.0)
            y = y * cosine + tl.where(d < half, -sine, sine) * other.to(tl.float32)
        if is_query:
            tl.store(out_ptr + (token * NUM_HEADS + head) * HEAD_DIM + d, y.to(out_ptr.dtype.element_ty), mask=mask)
        else:
            if EIGHT_BIT:
                y = tl.clamp(y * key_inverse_scale, -FP8_MAX, FP8_MAX)
            target = kv_ptr + block * kv_block_stride + (head * BLOCK_SIZE + offset) * HEAD_DIM + d
            tl.store(target, y.to(kv_ptr.dtype.element_ty), mask=mask & (slot >= 0))
    else:
        head = (group - query_programs - key_programs) * HEADS + tl.arange(0, HEADS)[:, None]
        mask = (head < NUM_KV_HEADS) & (d < HEAD_DIM)
        y = tl.load(value_ptr + token * value_stride + head * HEAD_DIM + d, mask=mask, other=0.0).to(tl.float32)
        if EIGHT_BIT:
            y = tl.clamp(y * value_inverse_scale, -FP8_MAX, FP8_MAX)
        target = kv_ptr + block * kv_block_stride + plane + (head * BLOCK_SIZE + offset) * HEAD_DIM + d
        tl.store(target, y.to(kv_ptr.dtype.element_ty), mask=mask & (slot >= 0))


@dataclass(frozen=True, slots=True)
class Rotation:
    """How heads are rotated: ``table`` [max_position, rotary_dim] float32, cosines then sines, half-split form."""

    table: Tensor


@dataclass(frozen=True, slots=True)
class HeadNorm:
    """Root-mean-square norms of each query and key head, weights [head_dim]."""

    query_weight: Tensor
    key_weight: Tensor
    eps: float


def rotate_and_store(
    query: Tensor | None,
    key: Tensor,
    value: Tensor,
    kv: Tensor,
    positions: Tensor,
    slots: Tensor,
    *,
    rotation: Rotation | None = None,
    norm: HeadNorm | None = None,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> Tensor | None:
    """Normalize and rotate queries and keys, write keys and values to ``slots`` of ``kv``; the queries come back.

    query [num_tokens, num_heads, head_dim], key and value [num_tokens, num_kv_heads, head_dim]: views of the fused
    projection will do, only a token's heads must lie together. positions and slots [num_tokens] int64; nothing is
    written for a slot below zero. kv [num_blocks, 2, num_kv_heads, block_size, head_dim] in any floating dtype; an
    8-bit cache holds key / key_scale. Without queries only the cache is written.
    """
    num_tokens, num_kv_heads, head_dim = key.shape
    num_heads = 0 if query is None else query.shape[1]
    out = None if query is None else torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if num_tokens == 0:
        return out
    heads = 4 if num_tokens <= 64 else 8
    grid = (num_tokens, triton.cdiv(num_heads, heads) + 2 * triton.cdiv(num_kv_heads, heads))
    device = describe(key.device)
    _rotate_and_store[grid](
        key if out is None else out,  # a pointer that is not used still needs the right type
        key if query is None else query,
        key,
        value,
        kv,
        positions,
        slots,
        key if rotation is None else rotation.table,
        key if norm is None else norm.query_weight,
        key if norm is None else norm.key_weight,
        0 if query is None else query.stride(0),
        key.stride(0),
        value.stride(0),
        kv.stride(0),
        0.0 if norm is None else norm.eps,
        1.0 / key_scale,
        1.0 / value_scale,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        ROTARY_DIM=0 if rotation is None else rotation.table.shape[1],
        NORM=norm is not None,
        BLOCK_SIZE=kv.shape[3],
        EIGHT_BIT=kv.element_size() == 1,
        FP8_MAX=FP8_MAX,
        HEADS=heads,
        BLOCK_D=power_of_two(head_dim),
        PDL=device.dependent_launch,
        num_warps=1 if heads == 4 else 2,
        **device.options,
    )
    return out


def rotate_reference(x: Tensor, table: Tensor, positions: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x [num_tokens, num_heads, head_dim] normalized (with a weight) and rotated, in float32 throughout."""
    x = x.float()
    if weight is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()
    half = table.shape[1] // 2
    cosine, sine = table[positions].unsqueeze(1).chunk(2, dim=-1)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine, rest], dim=-1)
