"""Products of 4-bit weights with many 16-bit tokens on Hopper: one warp loads, two groups of four warps multiply.

As in ``hopper_stream.py``, weights are widened in registers, where ``wgmma`` takes its left operand, and programs take
equal runs of steps. With many tokens such a product is bound by the matrix unit and by the traffic of tokens from the
second-level cache. So a tile has 256 outputs, which halves this traffic; and the tensor memory accelerator brings words
and tokens, which leaves nearly all registers to sums and to weights: half a step is widened while the half before it is
multiplied.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octavo_kernels.hopper_stream import (
    STEP,
    StreamedWeight,
    first_unit,
    following,
    operand,
    output_layout,
    program_of,
    widen_int4,
)
from octavo_kernels.launch import describe

TILE = 256
"""Outputs of a tile."""

# Three groups of 128 threads start with as many registers each as there are. Then the last, with the loading warp,
# gives the others what it does not need.
MAX_REGISTERS = 168
LOADING_REGISTERS = 24


@gluon.constexpr_function
def _word_layout():
    """Words [64, 32] of half a step, of which a thread has those of its own fragments: rows count blocks of 64 x 4
    inputs, tiles of 128 outputs last."""
    lanes = [[0, 4], [0, 8], [0, 16], [1, 0], [2, 0]]
    return gl.DistributedLinearLayout([[0, 1], [0, 2], [32, 0]], lanes, [[4, 0], [8, 0], [16, 0]], [], [64, 32])


@gluon.constexpr_function
def _fragment_layout():
    """The same as [block of 64 outputs, warp, row of 8, pair of 4, 16 inputs]."""
    registers = [[0, 0, 0, 0, 1], [0, 0, 0, 0, 2], [2, 0, 0, 0, 0]]
    lanes = [[0, 0, 0, 1, 0], [0, 0, 0, 2, 0], [0, 0, 1, 0, 0], [0, 0, 2, 0, 0], [0, 0, 4, 0, 0]]
    warps = [[0, 1, 0, 0, 0], [0, 2, 0, 0, 0], [1, 0, 0, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [4, 4, 8, 4, 4])


@gluon.jit
def _run(num_rows, token_tiles, STEPS: gl.constexpr):
    """The number of this program's run of steps, where it begins and ends, and the steps of all tiles.

    Runs go to programs in reverse, so that what a program waits for is done by programs that started before it.
    """
    total = gl.cdiv(num_rows, 256) * (token_tiles * STEPS)
    num_programs = gl.num_programs(0)
    run = num_programs - 1 - gl.program_id(0)
    return run, first_unit(run, num_programs, total), first_unit(run + 1, num_programs, total), total


@gluon.jit
def _copy_words(words_descriptor, words, full, tile, step, slot, token_tiles, STEPS: gl.constexpr):
    """One step's words, as [half, tile of 128 outputs] x [32, 32]; beyond the end they are zeros."""
    for part in gl.static_range(4):
        row = ((tile // token_tiles * 2 + part % 2) * STEPS + step) * 64 + part // 2 * 32
        tma.async_copy_global_to_shared(words_descriptor, [row, 0], full.index(slot), words.index(slot * 4 + part))


@gluon.jit
def _copy_inputs(
    x_descriptor, inputs, full, tile, step, slot, token_tiles, BLOCK_M: gl.constexpr
):  # fmt: skip
    """One step's inputs, as [half] x [BLOCK_M, 64]; tokens beyond the end are zeros."""
    for half in gl.static_range(2):
        place = [tile % token_tiles * BLOCK_M, step * 128 + half * 64]
        tma.async_copy_global_to_shared(x_descriptor, place, full.index(slot), inputs.index(slot * 2 + half))


@gluon.jit
def _load(
    x_descriptor,
    words_descriptor,
    inputs,
    words,
    full,
    empty,
    num_rows,
    STEPS: gl.constexpr,
    token_tiles,
    BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
    PDL: gl.constexpr,
):
    """The loading warp."""
    NUM_BYTES: gl.constexpr = BLOCK_M * 256 + 16384
    _, begin, end, _ = _run(num_rows, token_tiles, STEPS)
    tile, step = begin // STEPS, begin % STEPS
    for stage in gl.static_range(STAGES):
        if begin + stage < end:
            mbarrier.expect(full.index(stage), NUM_BYTES)
            _copy_words(words_descriptor, words, full, tile, step, stage, token_tiles, STEPS)
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
        mbarrier.expect(full.index(slot), NUM_BYTES)
        _copy_words(words_descriptor, words, full, tile, step, slot, token_tiles, STEPS)
        _copy_inputs(x_descriptor, inputs, full, tile, step, slot, token_tiles, BLOCK_M)
        tile, step = following(tile, step, STEPS)
        last = slot == STAGES - 1
        slot = gl.where(last, 0, slot + 1)
        parity = gl.where(last, parity ^ 1, parity)


@gluon.jit
def _parameters(
    params_ptr, tile, step, num_rows, HALF: gl.constexpr, token_tiles, K: gl.constexpr,
    GROUP: gl.constexpr,
):  # fmt: skip
    """Scales and zero points of the upper and of the lower rows of 8, for half a step."""
    rows: gl.constexpr = gl.SliceLayout(3, gl.SliceLayout(4, _fragment_layout()))
    block = gl.arange(0, 4, gl.SliceLayout(1, gl.SliceLayout(2, rows)))
    warp = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(2, rows)))
    row = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, rows)))
    row_tile = gl.minimum(tile // token_tiles * 2 + block // 2, (num_rows - 1) // 128)
    group = row_tile * (K // GROUP) + (step * 128 + HALF * 64) // GROUP
    within = (group * 128 + block % 2 * 32)[:, None, None] + (warp * 8)[None, :, None] + row[None, None, :]
    upper = gl.load(params_ptr + within)
    lower = gl.load(params_ptr + within + 64)
    return upper, lower


@gluon.jit
def _widen(words, upper, lower, dtype: gl.constexpr):
    """Pairs of weights of half a step: [256 outputs, 64 inputs]."""
    word = gl.convert_layout(
        words.load(_word_layout()).reshape([4, 4, 8, 4, 4]), _fragment_layout(), assert_trivial=True
    )
    return widen_int4(word, upper.expand_dims(3).expand_dims(4), lower.expand_dims(3).expand_dims(4), dtype)


@gluon.jit
def _finish(
    acc, tile, run, total, out_ptr, partial_ptr, arrivals_ptr, bias_ptr, num_tokens, num_rows, token_tiles,
    STEPS: gl.constexpr, BLOCK_M: gl.constexpr, BIAS: gl.constexpr,
):  # fmt: skip
    """Store a tile; of one that several runs share, leave the part to the run with its first step, which adds up.

    That run ends with the tile and the others begin with it, so it hardly ever waits.
    """
    layout: gl.constexpr = acc.type.layout
    # a zero that the compiler does not know: addresses are made here, not kept in registers throughout the loop
    zero = gl.inline_asm_elementwise("mov.b32 $0, 0; // $1", "=r,r", [tile], dtype=gl.int32, is_pure=True, pack=1)
    owner = program_of(tile * STEPS, gl.num_programs(0), total)
    last = program_of(tile * STEPS + STEPS - 1, gl.num_programs(0), total)
    row = zero + gl.arange(0, 256, gl.SliceLayout(1, layout))
    column = gl.arange(0, BLOCK_M, gl.SliceLayout(0, layout))
    within = row[:, None] * BLOCK_M + column[None, :]
    if run != owner:
        gl.store(partial_ptr + run * (256 * BLOCK_M) + within, acc)
        gl.thread_barrier()
        gl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel")
    else:
        if last > owner:
            num_arrived = gl.atomic_add(arrivals_ptr + tile, 0, sem="acq_rel")
            while num_arrived < last - owner:
                num_arrived = gl.atomic_add(arrivals_ptr + tile, 0, sem="acq_rel")
            gl.thread_barrier()
            for part in range(owner + 1, last + 1):
                acc += gl.load(partial_ptr + part * (256 * BLOCK_M) + within, cache_modifier=".cg")
            gl.store(arrivals_ptr + tile, 0)  # ready for the next call
        linear: gl.constexpr = output_layout(256, BLOCK_M, 8)
        result = acc.reshape([16, 2, 8, BLOCK_M]).permute([0, 2, 1, 3]).reshape([256, BLOCK_M])
        result = gl.convert_layout(result, linear)
        n = tile // token_tiles * 256 + gl.arange(0, 256, gl.SliceLayout(1, linear))
        m = zero + tile % token_tiles * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(0, linear))
        if BIAS:
            result += gl.load(bias_ptr + n, mask=n < num_rows, other=0.0).to(gl.float32)[:, None]
        mask = (n < num_rows)[:, None] & (m < num_tokens)[None, :]
        gl.store(out_ptr + (m * num_rows)[None, :] + n[:, None], result.to(out_ptr.dtype.element_ty), mask=mask)


@gluon.jit
def _multiply(
    out_ptr,
    partial_ptr,
    arrivals_ptr,
    params_ptr,
    bias_ptr,
    inputs,
    words,
    full,
    empty,
    num_tokens,
    num_rows,
    token_tiles,
    K: gl.constexpr,
    GROUP: gl.constexpr,
    BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
    BIAS: gl.constexpr,
):
    """The multiplying warps. ``words`` are [slot, half] x [64, 32]."""
    dtype: gl.constexpr = inputs.dtype
    STEPS: gl.constexpr = K // 128
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BLOCK_M, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    run, begin, end, total = _run(num_rows, token_tiles, STEPS)
    slot = 0
    before = 0
    parity = 0
    unit = begin
    while unit < end:
        tile = unit // STEPS
        first = unit % STEPS
        last = gl.minimum(first + end - unit, STEPS)
        upper, lower = _parameters(params_ptr, tile, first, num_rows, 0, token_tiles, K, GROUP)
        mbarrier.wait(full.index(slot), parity)
        w00, w01, w10, w11 = _widen(words.index(slot * 2), upper, lower, dtype)
        acc = gl.zeros([256, BLOCK_M], gl.float32, mma)
        held = operand(w00, w01, w10, w11, dtype, left)
        for step in range(first, last):
            weight = operand(w00, w01, w10, w11, dtype, left)
            running = warpgroup_mma(weight, inputs.index(slot * 2).permute([1, 0]), acc, is_async=True)
            if GROUP == 64:
                upper, lower = _parameters(params_ptr, tile, step, num_rows, 1, token_tiles, K, GROUP)
            # the product before this one has ended: its weights' registers and its step's memory are free
            acc, held = warpgroup_mma_wait(1, deps=[running, held])
            gl.thread_barrier()
            mbarrier.arrive(empty.index(before), pred=step > first)
            v00, v01, v10, v11 = _widen(words.index(slot * 2 + 1), upper, lower, dtype)
            upper, lower = _parameters(
                params_ptr, tile, gl.minimum(step + 1, STEPS - 1), num_rows, 0, token_tiles, K, GROUP
            )
            held = operand(v00, v01, v10, v11, dtype, left)
            running = warpgroup_mma(held, inputs.index(slot * 2 + 1).permute([1, 0]), acc, is_async=True)
            acc, weight = warpgroup_mma_wait(1, deps=[running, weight])
            before = slot
            wraps = slot == STAGES - 1
            slot = gl.where(wraps, 0, slot + 1)
            parity = gl.where(wraps, parity ^ 1, parity)
            mbarrier.wait(full.index(slot), parity, pred=step + 1 < last)
            w00, w01, w10, w11 = _widen(words.index(slot * 2), upper, lower, dtype)
        acc, held = warpgroup_mma_wait(0, deps=[acc, held])
        gl.thread_barrier()
        mbarrier.arrive(empty.index(before))
        _finish(
            acc, tile, run, total, out_ptr, partial_ptr, arrivals_ptr, bias_ptr, num_tokens, num_rows, token_tiles,
            STEPS, BLOCK_M, BIAS,
        )  # fmt: skip
        unit += last - first


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
    LOADING_REGISTERS: gl.constexpr,
    PDL: gl.constexpr,
):
    """Program: a run of steps through tiles of 256 outputs and BLOCK_M tokens, the tokens' tiles of one row of outputs
    one after the other."""
    if PDL:
        gdc_launch_dependents()
    inputs = gl.allocate_shared_memory(
        x_descriptor.dtype, [STAGES * 2, BLOCK_M, 64], gl.NVMMASharedLayout(128, 16, 2)
    )  # fmt: skip
    WORDS: gl.constexpr = gl.NVMMASharedLayout(128, 32, 2)
    pieces = gl.allocate_shared_memory(gl.int32, [STAGES * 4, 32, 32], WORDS)
    words = pieces._reinterpret(gl.int32, [STAGES * 2, 64, 32], WORDS)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    gl.warp_specialize(
        [
            (_multiply, (
                out_ptr, partial_ptr, arrivals_ptr, params_ptr, bias_ptr, inputs, words, full, empty, num_tokens,
                num_rows, token_tiles, K, GROUP, BLOCK_M, STAGES, BIAS,
            )),
            (_load, (
                x_descriptor, words_descriptor, inputs, pieces, full, empty, num_rows, K // 128, token_tiles, BLOCK_M,
                STAGES, PDL,
            )),
        ],
        [1],
        [LOADING_REGISTERS],
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class PackedTiling:
    """How :func:`multiply_packed` cuts the work: tokens of a tile, steps on their way, and programs."""

    block_m: int
    num_stages: int
    num_programs: int


def multiply_packed(
    x: Tensor, weight: StreamedWeight, bias: Tensor | None, arrivals: Tensor, tile: PackedTiling
) -> Tensor:
    """x [num_tokens, in_features] -> [num_tokens, out_features], for 4-bit weights.

    ``arrivals`` int32 are zeros, at least one for each tile, and zeros again afterwards.
    """
    assert weight.params is not None
    num_tokens, in_features = x.shape
    device = describe(x.device)
    x = x.contiguous()
    out = torch.empty((num_tokens, weight.out_features), dtype=x.dtype, device=x.device)
    token_tiles = triton.cdiv(num_tokens, tile.block_m)
    num_tiles = triton.cdiv(weight.out_features, TILE) * token_tiles
    num_programs = min(tile.num_programs, num_tiles * (in_features // STEP))
    partial = torch.empty((num_programs, TILE, tile.block_m), dtype=torch.float32, device=x.device)
    words = weight.words.view(-1, 32)
    _multiply_packed[(num_programs,)](
        out,
        partial,
        arrivals,
        TensorDescriptor.from_tensor(x, [tile.block_m, 64], gl.NVMMASharedLayout(128, 16, 2)),
        TensorDescriptor.from_tensor(words, [32, 32], gl.NVMMASharedLayout(128, 32, 2)),
        weight.params,
        x if bias is None else bias,
        num_tokens,
        weight.out_features,
        token_tiles,
        K=in_features,
        GROUP=weight.group_size,
        BLOCK_M=tile.block_m,
        STAGES=tile.num_stages,
        BIAS=bias is not None,
        LOADING_REGISTERS=LOADING_REGISTERS,
        PDL=device.dependent_launch,
        num_warps=8,
        maxnreg=MAX_REGISTERS,
        **device.options,
    )
    return out
