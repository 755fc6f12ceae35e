"""Products of 4-bit weights with many 16-bit tokens on Hopper: one warp loads, two groups of four warps multiply.

As in ``hopper_stream.py``, weights are widened in registers, where ``wgmma`` takes its left operand, and programs take
equal runs of steps. But with many tokens a group of warps is busy handing its products to the matrix unit for most of
their time, and cannot widen the next weights meanwhile. So two groups take turns: each has its own outputs of a tile,
and one widens while the other multiplies. They share the tokens, and wait for each other nowhere but for their turn.
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
def _word_layout(NUM_BLOCKS):
    """4-bit words [16 for each block of 64 outputs, 32], of which a thread has those of its own fragments."""
    lanes = [[0, 4], [0, 8], [0, 16], [1, 0], [2, 0]]
    registers = [[0, 1], [0, 2]] + ([[16, 0]] if NUM_BLOCKS == 2 else [])
    return gl.DistributedLinearLayout(registers, lanes, [[4, 0], [8, 0]], [], [16 * NUM_BLOCKS, 32])


@gluon.jit
def _run(num_rows, token_tiles, STEPS: gl.constexpr, TILE: gl.constexpr):
    """The number of this program's run of steps, where it begins and ends, and the steps of all tiles.

    Runs go to programs in reverse, so that what a program waits for is done by programs that started before it.
    """
    total = gl.cdiv(num_rows, TILE) * (token_tiles * STEPS)
    num_programs = gl.num_programs(0)
    run = num_programs - 1 - gl.program_id(0)
    return run, first_unit(run, num_programs, total), first_unit(run + 1, num_programs, total), total


@gluon.jit
def _copy_weights(
    words_descriptor, params_ptr, words, params, full, tile, step, slot, token_tiles, num_rows, K: gl.constexpr,
    GROUP: gl.constexpr, BLOCKS: gl.constexpr, NUM_BYTES: gl.constexpr,
):  # fmt: skip
    """One step's words, as [tile of 128 outputs] x [64, 32], and parameters; rows beyond the end are zeros or read."""
    PARAMS: gl.constexpr = params.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [1], [0])
    index = gl.arange(0, PARAMS, layout)
    row_tile = gl.minimum(tile // token_tiles * BLOCKS + index // (PARAMS // BLOCKS), (num_rows - 1) // 128)
    place = (row_tile * (K // GROUP) + step * 128 // GROUP) * 128 + index % (PARAMS // BLOCKS)
    async_copy.async_copy_global_to_shared(params.index(slot), params_ptr + place)
    async_copy.mbarrier_arrive(full.index(slot))
    mbarrier.expect(full.index(slot), NUM_BYTES)
    for block in gl.static_range(BLOCKS):
        row = ((tile // token_tiles * BLOCKS + block) * (K // 128) + step) * 64
        tma.async_copy_global_to_shared(words_descriptor, [row, 0], full.index(slot), words.index(slot * BLOCKS + block))


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
    BLOCKS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
    PDL: gl.constexpr,
):
    """The loading warp."""
    NUM_BYTES: gl.constexpr = BLOCK_M * 256 + BLOCKS * 8192
    STEPS: gl.constexpr = K // 128
    _, begin, end, _ = _run(num_rows, token_tiles, STEPS, 128 * BLOCKS)
    tile, step = begin // STEPS, begin % STEPS
    for stage in gl.static_range(STAGES):
        if begin + stage < end:
            _copy_weights(
                words_descriptor, params_ptr, words, params, full, tile, step, stage, token_tiles, num_rows, K, GROUP,
                BLOCKS, NUM_BYTES,
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
            words_descriptor, params_ptr, words, params, full, tile, step, slot, token_tiles, num_rows, K, GROUP,
            BLOCKS, NUM_BYTES,
        )  # fmt: skip
        _copy_inputs(x_descriptor, inputs, full, tile, step, slot, token_tiles, BLOCK_M)
        tile, step = following(tile, step, STEPS)
        last = slot == STAGES - 1
        slot = gl.where(last, 0, slot + 1)
        parity = gl.where(last, parity ^ 1, parity)


@gluon.jit
def _widen(words, params, slot, PART: gl.constexpr, HALF: gl.constexpr, BLOCKS: gl.constexpr, dtype: gl.constexpr):
    """Pairs of weights of half a step: [64 BLOCKS outputs, 64 inputs]. ``words`` are [slot, and then two parts within
    two halves, or the other way round] x [16 BLOCKS, 32], ``params`` [slot] x [tile of 128 outputs, group, half of the
    rows, 64 outputs, warp, row of 8]."""
    layout: gl.constexpr = fragment_layout(BLOCKS, 4)
    place = (slot * 2 + HALF) * 2 + PART if BLOCKS == 1 else (slot * 2 + PART) * 2 + HALF
    word = words.index(place).load(_word_layout(BLOCKS)).reshape([BLOCKS, 4, 8, 4, 4])
    word = gl.convert_layout(word, layout, assert_trivial=True)
    GROUPS: gl.constexpr = params.shape[1] // (4 * BLOCKS)
    first: gl.constexpr = (PART * GROUPS * (BLOCKS - 1) + HALF * (GROUPS - 1)) * 4 + PART * (2 - BLOCKS)
    upper = parameter(params.index(slot).slice(first, BLOCKS, 0), layout)
    lower = parameter(params.index(slot).slice(first + 2, BLOCKS, 0), layout)
    return widen_int4(word, upper, lower, dtype)


@gluon.jit
def _finish(
    acc, tile, run, total, out_ptr, partial_ptr, arrivals_ptr, bias_ptr, num_tokens, num_rows, token_tiles,
    PART: gl.constexpr, STEPS: gl.constexpr, BLOCKS: gl.constexpr, BLOCK_M: gl.constexpr, BIAS: gl.constexpr,
):  # fmt: skip
    """Store a group's part of a tile; of one that several runs share, leave it to the run with its first step, which
    adds up.

    That run ends with the tile and the others begin with it, so it hardly ever waits.
    """
    ROWS: gl.constexpr = 64 * BLOCKS
    FACTOR: gl.constexpr = int4_factor(out_ptr.dtype.element_ty)
    layout: gl.constexpr = acc.type.layout
    # a zero that the compiler does not know: addresses are made here, not kept in registers throughout the loop
    zero = gl.inline_asm_elementwise("mov.b32 $0, 0; // $1", "=r,r", [tile], dtype=gl.int32, is_pure=True, pack=1)
    owner = program_of(tile * STEPS, gl.num_programs(0), total)
    last = program_of(tile * STEPS + STEPS - 1, gl.num_programs(0), total)
    row = zero + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    column = gl.arange(0, BLOCK_M, gl.SliceLayout(0, layout))
    within = row[:, None] * BLOCK_M + column[None, :]
    if run != owner:
        gl.store(partial_ptr + (run * 2 + PART) * (ROWS * BLOCK_M) + within, acc)
        gl.thread_barrier()
        gl.atomic_add(arrivals_ptr + tile * 2 + PART, 1, sem="acq_rel")
    else:
        if last > owner:
            num_arrived = gl.atomic_add(arrivals_ptr + tile * 2 + PART, 0, sem="acq_rel")
            while num_arrived < last - owner:
                num_arrived = gl.atomic_add(arrivals_ptr + tile * 2 + PART, 0, sem="acq_rel")
            gl.thread_barrier()
            for other in range(owner + 1, last + 1):
                pointers = partial_ptr + (other * 2 + PART) * (ROWS * BLOCK_M) + within
                acc += gl.load(pointers, cache_modifier=".cg")
            gl.store(arrivals_ptr + tile * 2 + PART, 0)  # ready for the next call
        linear: gl.constexpr = output_layout(ROWS, BLOCK_M, 4)
        result = acc.reshape([4 * BLOCKS, 2, 8, BLOCK_M]).permute([0, 2, 1, 3]).reshape([ROWS, BLOCK_M])
        result = gl.convert_layout(result, linear)
        n = (tile // token_tiles * 2 + PART) * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, linear))
        m = zero + tile % token_tiles * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(0, linear))
        if FACTOR != 1:
            result *= FACTOR
        if BIAS:
            result += gl.load(bias_ptr + n, mask=n < num_rows, other=0.0).to(gl.float32)[:, None]
        mask = (n < num_rows)[:, None] & (m < num_tokens)[None, :]
        gl.store(out_ptr + (m * num_rows)[None, :] + n[:, None], result.to(out_ptr.dtype.element_ty), mask=mask)


@gluon.jit
def _take_turn(turn, PART: gl.constexpr, HALF: gl.constexpr, TURNS: gl.constexpr):
    if TURNS:  # two turns a step: their parity is that of the half; the first part's first turn is free
        mbarrier.wait(turn.index(PART), HALF ^ (1 - PART))


@gluon.jit
def _give_turn(turn, PART: gl.constexpr, TURNS: gl.constexpr):
    if TURNS:
        mbarrier.arrive(turn.index(1 - PART))


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
    turn,
    num_tokens,
    num_rows,
    token_tiles,
    PART: gl.constexpr,
    K: gl.constexpr,
    BLOCKS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
    BIAS: gl.constexpr,
    TURNS: gl.constexpr,
    DEEP: gl.constexpr,
):
    """One of two groups of warps: the PART-th 64 BLOCKS outputs of every tile."""
    dtype: gl.constexpr = inputs.dtype
    STEPS: gl.constexpr = K // 128
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    run, begin, end, total = _run(num_rows, token_tiles, STEPS, 128 * BLOCKS)
    slot = 0
    before = 0
    parity = 0
    unit = begin
    while unit < end:
        tile = unit // STEPS
        last = gl.minimum(tile * STEPS + STEPS, end)
        acc = gl.zeros([64 * BLOCKS, BLOCK_M], gl.float32, mma)
        if DEEP:
            mbarrier.wait(full.index(slot), parity)
            w00, w01, w10, w11 = _widen(words, params, slot, PART, 0, BLOCKS, dtype)
            held = operand(w00, w01, w10, w11, dtype, left)
            for step in range(unit, last):
                weight = operand(w00, w01, w10, w11, dtype, left)
                _take_turn(turn, PART, 0, TURNS)
                running = warpgroup_mma(weight, inputs.index(slot * 2).permute([1, 0]), acc, is_async=True)
                _give_turn(turn, PART, TURNS)
                # the product before this one has ended: its weights' registers and its step's memory are free
                acc, held = warpgroup_mma_wait(1, deps=[running, held])
                gl.thread_barrier()
                mbarrier.arrive(empty.index(before), pred=step > unit)
                v00, v01, v10, v11 = _widen(words, params, slot, PART, 1, BLOCKS, dtype)
                held = operand(v00, v01, v10, v11, dtype, left)
                _take_turn(turn, PART, 1, TURNS)
                running = warpgroup_mma(held, inputs.index(slot * 2 + 1).permute([1, 0]), acc, is_async=True)
                _give_turn(turn, PART, TURNS)
                acc, weight = warpgroup_mma_wait(1, deps=[running, weight])
                before = slot
                wraps = slot == STAGES - 1
                slot = gl.where(wraps, 0, slot + 1)
                parity = gl.where(wraps, parity ^ 1, parity)
                mbarrier.wait(full.index(slot), parity, pred=step + 1 < last)
                w00, w01, w10, w11 = _widen(words, params, slot, PART, 0, BLOCKS, dtype)
            acc, held = warpgroup_mma_wait(0, deps=[acc, held])
            gl.thread_barrier()
            mbarrier.arrive(empty.index(before))
        else:
            for _ in range(unit, last):
                mbarrier.wait(full.index(slot), parity)
                for half in gl.static_range(2):
                    w00, w01, w10, w11 = _widen(words, params, slot, PART, half, BLOCKS, dtype)
                    weight = operand(w00, w01, w10, w11, dtype, left)
                    _take_turn(turn, PART, half, TURNS)
                    x = inputs.index(slot * 2 + half).permute([1, 0])
                    acc = warpgroup_mma(weight, x, acc, is_async=True)
                    _give_turn(turn, PART, TURNS)
                    acc, weight = warpgroup_mma_wait(0, deps=[acc, weight])
                gl.thread_barrier()
                mbarrier.arrive(empty.index(slot))
                wraps = slot == STAGES - 1
                slot = gl.where(wraps, 0, slot + 1)
                parity = gl.where(wraps, parity ^ 1, parity)
        _finish(
            acc, tile, run, total, out_ptr, partial_ptr, arrivals_ptr, bias_ptr, num_tokens, num_rows, token_tiles,
            PART, STEPS, BLOCKS, BLOCK_M, BIAS,
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
    BLOCKS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
    BIAS: gl.constexpr,
    TURNS: gl.constexpr,
    DEEP: gl.constexpr,
    MULTIPLYING_REGISTERS: gl.constexpr,
    LOADING_REGISTERS: gl.constexpr,
    PDL: gl.constexpr,
):
    """Program: a run of steps through tiles of 128 BLOCKS outputs and BLOCK_M tokens, the tokens' tiles of one row of
    outputs one after the other."""
    if PDL:
        gdc_launch_dependents()
    GROUPS: gl.constexpr = 2 if GROUP == 64 else 1
    dtype: gl.constexpr = x_descriptor.dtype
    inputs = gl.allocate_shared_memory(dtype, [STAGES * 2, BLOCK_M, 64], gl.NVMMASharedLayout(128, 16, 2))
    WORDS: gl.constexpr = gl.NVMMASharedLayout(128, 32, 2)
    pieces = gl.allocate_shared_memory(gl.int32, [STAGES * BLOCKS, 64, 32], WORDS)
    words = pieces._reinterpret(gl.int32, [STAGES * 4, 16 * BLOCKS, 32], WORDS)
    flat = gl.allocate_shared_memory(gl.int32, [STAGES, 128 * GROUPS * BLOCKS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    params = flat._reinterpret(
        gl.int32, [STAGES, 4 * GROUPS * BLOCKS, 4, 8], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    for part in gl.static_range(2):
        mbarrier.init(turn.index(part), count=1)
    gl.warp_specialize(
        [
            (_multiply, (
                out_ptr, partial_ptr, arrivals_ptr, bias_ptr, inputs, words, params, full, empty, turn, num_tokens,
                num_rows, token_tiles, 0, K, BLOCKS, BLOCK_M, STAGES, BIAS, TURNS, DEEP,
            )),
            (_multiply, (
                out_ptr, partial_ptr, arrivals_ptr, bias_ptr, inputs, words, params, full, empty, turn, num_tokens,
                num_rows, token_tiles, 1, K, BLOCKS, BLOCK_M, STAGES, BIAS, TURNS, DEEP,
            )),
            (_load, (
                x_descriptor, words_descriptor, params_ptr, inputs, pieces, flat, full, empty, num_rows, token_tiles,
                K, GROUP, BLOCKS, BLOCK_M, STAGES, PDL,
            )),
        ],
        [4, 1],
        [MULTIPLYING_REGISTERS, LOADING_REGISTERS],
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class PackedTiling:
    """How :func:`multiply_packed` cuts the work: tiles of 128 ``blocks`` outputs and ``block_m`` tokens, steps on their
    way, and programs."""

    blocks: int
    block_m: int
    num_stages: int
    num_programs: int
    turns: bool = True
    deep: bool = False


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
    token_tiles = triton.cdiv(num_tokens, tile.block_m)
    num_tiles = triton.cdiv(weight.out_features, 128 * tile.blocks) * token_tiles
    num_programs = min(tile.num_programs, num_tiles * (in_features // STEP))
    partial = torch.empty((num_programs, 128 * tile.blocks, tile.block_m), dtype=torch.float32, device=x.device)
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
        token_tiles,
        K=in_features,
        GROUP=weight.group_size,
        BLOCKS=tile.blocks,
        BLOCK_M=tile.block_m,
        STAGES=tile.num_stages,
        BIAS=bias is not None,
        TURNS=tile.turns,
        DEEP=tile.deep,
        MULTIPLYING_REGISTERS=MULTIPLYING_REGISTERS,
        LOADING_REGISTERS=LOADING_REGISTERS,
        PDL=device.dependent_launch,
        num_warps=4,
        maxnreg=MAX_REGISTERS,
        **device.options,
    )
    return out
