"""Products of 4-bit weights with many 16-bit tokens on Hopper: one warp loads, two groups of four warps multiply.

As in ``hopper_stream.py``, weights are widened in registers, where ``wgmma`` takes its left operand, and programs take
equal runs of steps. But with many tokens a group of warps is busy handing its products to the matrix unit for most of
their time, and cannot widen the next weights meanwhile. So there are two groups, each with its own outputs of a tile:
while one widens, the other multiplies. They share the tokens, and never wait for each other: they fall into turns
by themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octavo_kernels.hopper_stream import (
    STEP,
    StreamedWeight,
    first_unit,
    following,
    fragment_layout,
    int4_factor,
    operand,
    output_layout,
    parameter,
    program_of,
    widen_int4,
)
from octavo_kernels.launch import describe

# Three groups of 128 threads start with as many registers each as there are. Then the last, with the loading warp,
# gives the others what it does not need.
MAX_REGISTERS = 168
MULTIPLYING_REGISTERS = 240
LOADING_REGISTERS = 24


@gluon.constexpr_function
def _word_layout():
    """4-bit words [16, 32] of 64 outputs, of which a thread has those of its own fragments."""
    lanes = [[0, 4], [0, 8], [0, 16], [1, 0], [2, 0]]
    return gl.DistributedLinearLayout([[0, 1], [0, 2]], lanes, [[4, 0], [8, 0]], [], [16, 32])


@gluon.jit
def _run(num_rows, token_tiles, STEPS: gl.constexpr):
    """The number of this program's run of steps, where it begins and ends, and the steps of all tiles.

    Runs go to programs in reverse, so that what a program waits for is done by programs that started before it.
    """
    total = gl.cdiv(num_rows, 128) * (token_tiles * STEPS)
    num_programs = gl.num_programs(0)
    run = num_programs - 1 - gl.program_id(0)
    return run, first_unit(run, num_programs, total), first_unit(run + 1, num_programs, total), total


@gluon.jit
def _copy_weights(
    words_descriptor, params_ptr, words, params, full, tile, step, slot, token_tiles, K: gl.constexpr,
    GROUP: gl.constexpr, NUM_BYTES: gl.constexpr,
):  # fmt: skip
    """One step's words, [64, 32], and parameters."""
    row_tile = tile // token_tiles
    index = gl.arange(0, params.shape[1], gl.BlockedLayout([4], [32], [1], [0]))
    pointers = params_ptr + (row_tile * (K // GROUP) + step * 128 // GROUP) * 128 + index
    async_copy.async_copy_global_to_shared(params.index(slot), pointers)
    async_copy.mbarrier_arrive(full.index(slot))
    mbarrier.expect(full.index(slot), NUM_BYTES)
    row = (row_tile * (K // 128) + step) * 64
    tma.async_copy_global_to_shared(words_descriptor, [row, 0], full.index(slot), words.index(slot))


@gluon.jit
def _copy_inputs(x_descriptor, inputs, full, tile, step, slot, token_tiles, BLOCK_M: gl.constexpr):
    """One step's inputs, as [half] x [BLOCK_M, 64]; tokens beyond the end are zeros."""
    for half in gl.static_range(2):
        place = [tile % token_tiles * BLOCK_M, step * 128 + half * 64]
        tma.async_copy_global_to_shared(x_descriptor, place, full.index(slot), inputs.index(slot * 2 + half))


@gluon.jit
def _load(
    x_descriptor,
    words_descriptor,
    params_ptr,
    inputs,
    words,
    params,
    full,
    empty,
    num_rows,
    token_tiles,
    K: gl.constexpr,
    GROUP: gl.constexpr,
    BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
    PDL: gl.constexpr,
):
    """The loading warp."""
    NUM_BYTES: gl.constexpr = BLOCK_M * 256 + 8192
    STEPS: gl.constexpr = K // 128
    _, begin, end, _ = _run(num_rows, token_tiles, STEPS)
    tile, step = begin // STEPS, begin % STEPS
    for stage in gl.static_range(STAGES):
        if begin + stage < end:
            _copy_weights(
                words_descriptor, params_ptr, words, params, full, tile, step, stage, token_tiles, K, GROUP, NUM_BYTES
            )  # fmt: skip
        tile, step = following(tile, step, STEPS)
    if PDL:  # weights are never written by a predecessor: they need not wait
        gdc_wait()
    tile, step = begin // STEPS, begin % STEPS
    for stage in gl.static_range(STAGES):
        if begin + stage < end:
            _copy_inputs(x_descriptor, inputs, full, tile, step, stage, token_tiles, BLOCK_M)
        tile, step = following(tile, step, STEPS)
    slot = 0
    parity = 0
    for _ in range(begin + STAGES, end):
        mbarrier.wait(empty.index(slot), parity)
        _copy_weights(
            words_descriptor, params_ptr, words, params, full, tile, step, slot, token_tiles, K, GROUP, NUM_BYTES
        )  # fmt: skip
        _copy_inputs(x_descriptor, inputs, full, tile, step, slot, token_tiles, BLOCK_M)
        tile, step = following(tile, step, STEPS)
        last = slot == STAGES - 1
        slot = gl.where(last, 0, slot + 1)
        parity = gl.where(last, parity ^ 1, parity)


@gluon.jit
def _widen(words, params, slot, PART: gl.constexpr, HALF: gl.constexpr, dtype: gl.constexpr):
    """Pairs of weights of half a step, [64 outputs, 64 inputs], from words [(slot, half, part)] x [16, 32] and
    parameters [slot] x [group, half of the rows, part] x [warp, row of 8]."""
    layout: gl.constexpr = fragment_layout(1, 4)
    word = words.index((slot * 2 + HALF) * 2 + PART).load(_word_layout()).reshape([1, 4, 8, 4, 4])
    word = gl.convert_layout(word, layout, assert_trivial=True)
    GROUPS: gl.constexpr = params.shape[1] // 4
    first: gl.constexpr = HALF * (GROUPS - 1) * 4 + PART
    upper = parameter(params.index(slot).slice(first, 1, 0), layout)
    lower = parameter(params.index(slot).slice(first + 2, 1, 0), layout)
    return widen_int4(word, upper, lower, dtype)


@gluon.jit
def _finish(
    acc, tile, run, total, out_ptr, partial_ptr, arrivals_ptr, bias_ptr, num_tokens, num_rows, token_tiles,
    PART: gl.constexpr, STEPS: gl.constexpr, BLOCK_M: gl.constexpr, BIAS: gl.constexpr,
):  # fmt: skip
    """Store a group's part of a tile; of one that several runs share, leave it to the run with its first step, which
    adds up.

    That run ends with the tile and the others begin with it, so it hardly ever waits.
    """
    FACTOR: gl.constexpr = int4_factor(out_ptr.dtype.element_ty)
    layout: gl.constexpr = acc.type.layout
    # a zero that the compiler does not know: addresses are made here, not kept in registers throughout the loop
    zero = gl.inline_asm_elementwise("mov.b32 $0, 0; // $1", "=r,r", [tile], dtype=gl.int32, is_pure=True, pack=1)
    owner = program_of(tile * STEPS, gl.num_programs(0), total)
    last = program_of(tile * STEPS + STEPS - 1, gl.num_programs(0), total)
    row = zero + gl.arange(0, 64, gl.SliceLayout(1, layout))
    column = gl.arange(0, BLOCK_M, gl.SliceLayout(0, layout))
    within = row[:, None] * BLOCK_M + column[None, :]
    if run != owner:
        gl.store(partial_ptr + (run * 2 + PART) * (64 * BLOCK_M) + within, acc)
        gl.thread_barrier()
        gl.atomic_add(arrivals_ptr + tile * 2 + PART, 1, sem="acq_rel")
    else:
        if last > owner:
            num_arrived = gl.atomic_add(arrivals_ptr + tile * 2 + PART, 0, sem="acq_rel")
            while num_arrived < last - owner:
                num_arrived = gl.atomic_add(arrivals_ptr + tile * 2 + PART, 0, sem="acq_rel")
            gl.thread_barrier()
            for other in range(owner + 1, last + 1):
                pointers = partial_ptr + (other * 2 + PART) * (64 * BLOCK_M) + within
                acc += gl.load(pointers, cache_modifier=".cg")
            gl.store(arrivals_ptr + tile * 2 + PART, 0)  # ready for the next call
        linear: gl.constexpr = output_layout(64, BLOCK_M, 4)
        result = acc.reshape([4, 2, 8, BLOCK_M]).permute([0, 2, 1, 3]).reshape([64, BLOCK_M])
        result = gl.convert_layout(result, linear)
        n = (tile // token_tiles * 2 + PART) * 64 + gl.arange(0, 64, gl.SliceLayout(1, linear))
        m = zero + tile % token_tiles * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(0, linear))
        if FACTOR != 1:
            result *= FACTOR
        if BIAS:
            result += gl.load(bias_ptr + n, mask=n < num_rows, other=0.0).to(gl.float32)[:, None]
        mask = (n < num_rows)[:, None] & (m < num_tokens)[None, :]
        gl.store(out_ptr + (m * num_rows)[None, :] + n[:, None], result.to(out_ptr.dtype.element_ty), mask=mask)


@gluon.jit
def _multiply(
    out_ptr,
    partial_ptr,
    arrivals_ptr,
    bias_ptr,
    inputs,
    words,
    params,
    full,
    empty,
    num_tokens,
    num_rows,
    token_tiles,
    PART: gl.constexpr,
    K: gl.constexpr,
    BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
    BIAS: gl.constexpr,
):
    """One of two groups of warps: the PART-th 64 outputs of every tile."""
    dtype: gl.constexpr = inputs.dtype
    STEPS: gl.constexpr = K // 128
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    run, begin, end, total = _run(num_rows, token_tiles, STEPS)
    slot = 0
    parity = 0
    unit = begin
    while unit < end:
        tile = unit // STEPS
        last = gl.minimum(tile * STEPS + STEPS, end)
        acc = gl.zeros([64, BLOCK_M], gl.float32, mma)
        for _ in range(unit, last):
            mbarrier.wait(full.index(slot), parity)
            for half in gl.static_range(2):
                w00, w01, w10, w11 = _widen(words, params, slot, PART, half, dtype)
                weight = operand(w00, w01, w10, w11, dtype, left)
                x = inputs.index(slot * 2 + half).permute([1, 0])
                acc = warpgroup_mma(weight, x, acc, is_async=True)
                acc, weight = warpgroup_mma_wait(0, deps=[acc, weight])
            gl.thread_barrier()
            mbarrier.arrive(empty.index(slot))
            wraps = slot == STAGES - 1
            slot = gl.where(wraps, 0, slot + 1)
            parity = gl.where(wraps, parity ^ 1, parity)
        _finish(
            acc, tile, run, total, out_ptr, partial_ptr, arrivals_ptr, bias_ptr, num_tokens, num_rows, token_tiles,
            PART, STEPS, BLOCK_M, BIAS,
        )  # fmt: skip
        unit = last


@gluon.jit(do_not_specialize=["num_tokens", "token_tiles"])
def _multiply_packed(
    out_ptr,
    partial_ptr,
    arrivals_ptr,
    x_descriptor,
    words_descriptor,
    params_ptr,
    bias_ptr,
    num_tokens,
    num_rows,
    token_tiles,
    K: gl.constexpr,
    GROUP: gl.constexpr,
    BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
    BIAS: gl.constexpr,
    MULTIPLYING_REGISTERS: gl.constexpr,
    LOADING_REGISTERS: gl.constexpr,
    PDL: gl.constexpr,
):
    """Program: a run of steps through tiles of 128 outputs and BLOCK_M tokens, the tokens' tiles of the same outputs
    one after the other."""
    if PDL:
        gdc_launch_dependents()
    GROUPS: gl.constexpr = 2 if GROUP == 64 else 1
    dtype: gl.constexpr = x_descriptor.dtype
    inputs = gl.allocate_shared_memory(dtype, [STAGES * 2, BLOCK_M, 64], gl.NVMMASharedLayout(128, 16, 2))
    WORDS: gl.constexpr = gl.NVMMASharedLayout(128, 32, 2)
    pieces = gl.allocate_shared_memory(gl.int32, [STAGES, 64, 32], WORDS)
    words = pieces._reinterpret(gl.int32, [STAGES * 4, 16, 32], WORDS)
    flat = gl.allocate_shared_memory(gl.int32, [STAGES, 128 * GROUPS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    params = flat._reinterpret(gl.int32, [STAGES, 4 * GROUPS, 4, 8], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    gl.warp_specialize(
        [
            (_multiply, (
                out_ptr, partial_ptr, arrivals_ptr, bias_ptr, inputs, words, params, full, empty, num_tokens, num_rows,
                token_tiles, 0, K, BLOCK_M, STAGES, BIAS,
            )),
            (_multiply, (
                out_ptr, partial_ptr, arrivals_ptr, bias_ptr, inputs, words, params, full, empty, num_tokens, num_rows,
                token_tiles, 1, K, BLOCK_M, STAGES, BIAS,
            )),
            (_load, (
                x_descriptor, words_descriptor, params_ptr, inputs, pieces, flat, full, empty, num_rows, token_tiles,
                K, GROUP, BLOCK_M, STAGES, PDL,
            )),
        ],
        [4, 1],
        [MULTIPLYING_REGISTERS, LOADING_REGISTERS],
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class PackedTiling:
    """How :func:`multiply_packed` cuts the work: tiles of 128 outputs and ``block_m`` tokens, steps on their way, and
    programs."""

    block_m: int
    num_stages: int
    num_programs: int


def multiply_packed(
    x: Tensor, weight: StreamedWeight, bias: Tensor | None, arrivals: Tensor, tile: PackedTiling
) -> Tensor:
    """x [num_tokens, in_features] -> [num_tokens, out_features], for 4-bit weights.

    ``arrivals`` int32 are zeros, at least two for each tile, and zeros again afterwards.
    """
    assert weight.params is not None
    num_tokens, in_features = x.shape
    device = describe(x.device)
    x = x.contiguous()
    out = torch.empty((num_tokens, weight.out_features), dtype=x.dtype, device=x.device)
    num_tiles = weight.num_tiles(num_tokens, tile.block_m)
    num_programs = min(tile.num_programs, num_tiles * (in_features // STEP))
    partial = torch.empty((num_programs, 128, tile.block_m), dtype=torch.float32, device=x.device)
    words = weight.words.view(-1, 32)
    _multiply_packed[(num_programs,)](
        out,
        partial,
        arrivals,
        TensorDescriptor.from_tensor(x, [tile.block_m, 64], gl.NVMMASharedLayout(128, 16, 2)),
        TensorDescriptor.from_tensor(words, [64, 32], gl.NVMMASharedLayout(128, 32, 2)),
        weight.params,
        x if bias is None else bias,
        num_tokens,
        weight.out_features,
        triton.cdiv(num_tokens, tile.block_m),
        K=in_features,
        GROUP=weight.group_size,
        BLOCK_M=tile.block_m,
        STAGES=tile.num_stages,
        BIAS=bias is not None,
        MULTIPLYING_REGISTERS=MULTIPLYING_REGISTERS,
        LOADING_REGISTERS=LOADING_REGISTERS,
        PDL=device.dependent_launch,
        num_warps=4,
        maxnreg=MAX_REGISTERS,
        **device.options,
    )
    return out
