"""Products of up to some hundred tokens with 16-bit weights on Hopper GPUs: one warp loads, groups of four multiply.

The weights are the left operand, so that the tokens are the narrow side and are hardly padded. The work, steps of 64
inputs of all tiles, is cut into equal runs, one for each processor, so that none idles (stream-K, arXiv 2301.03598).
Who begins a tile adds the parts of those who go on with it, in their order, so that results repeat bit by bit. The
tensor memory accelerator copies weights and tokens into shared memory several steps ahead; weights, which no
predecessor writes, before it has even ended.
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

from octavo_kernels.launch import describe

STEP = 64
"""Inputs of a step: 128 bytes, as wide as shared memory is swizzled."""


@gluon.jit
def first_unit(program, num_programs, num_units):
    """Where the program's run begins among the steps of all tiles; it ends where the next one's begins."""
    return (program * num_units) // num_programs


@gluon.jit
def program_of(unit, num_programs, num_units):
    """Whose run holds ``unit``."""
    return ((unit + 1) * num_programs - 1) // num_units


@gluon.jit
def _load_weights(
    descriptor, weights, full, unit, stage, num_steps, token_tiles, ROWS: gl.constexpr,
    GROUPS: gl.constexpr,
):  # fmt: skip
    row = unit // num_steps // token_tiles * (GROUPS * ROWS)
    for part in gl.static_range(GROUPS):
        target = weights.index(stage * GROUPS + part)
        tma.async_copy_global_to_shared(
            descriptor, [row + part * ROWS, unit % num_steps * 64], full.index(stage), target
        )  # fmt: skip


@gluon.jit
def _load_inputs(descriptor, inputs, full, unit, stage, num_steps, token_tiles, BLOCK_M: gl.constexpr):
    token = unit // num_steps % token_tiles * BLOCK_M
    tma.async_copy_global_to_shared(descriptor, [token, unit % num_steps * 64], full.index(stage), inputs.index(stage))


@gluon.jit
def _load_run(
    weight_descriptor,
    x_descriptor,
    weights,
    inputs,
    full,
    empty,
    begin,
    end,
    num_steps,
    token_tiles,
    ROWS: gl.constexpr,
    GROUPS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
    PDL: gl.constexpr,
):
    """The loading warp."""
    num_bytes: gl.constexpr = (GROUPS * ROWS + BLOCK_M) * 64 * 2
    for ahead in gl.static_range(STAGES):
        if begin + ahead < end:
            mbarrier.expect(full.index(ahead), num_bytes)
            _load_weights(weight_descriptor, weights, full, begin + ahead, ahead, num_steps, token_tiles, ROWS, GROUPS)
    if PDL:
        gdc_wait()
    for ahead in gl.static_range(STAGES):
        if begin + ahead < end:
            _load_inputs(x_descriptor, inputs, full, begin + ahead, ahead, num_steps, token_tiles, BLOCK_M)
    for unit in range(begin + STAGES, end):
        stage = (unit - begin) % STAGES
        mbarrier.wait(empty.index(stage), ((unit - begin) // STAGES & 1) ^ 1)
        mbarrier.expect(full.index(stage), num_bytes)
        _load_weights(weight_descriptor, weights, full, unit, stage, num_steps, token_tiles, ROWS, GROUPS)
        _load_inputs(x_descriptor, inputs, full, unit, stage, num_steps, token_tiles, BLOCK_M)


@gluon.jit
def _halves(acc):
    """[rows, columns] -> its left and its right half; no value moves."""
    return gl.split(acc.reshape([acc.shape[0], 2, acc.shape[1] // 2]).permute([0, 2, 1]))


@gluon.jit
def _opaque_zero(tile):
    """A zero that the compiler does not know: addresses are made where it is, not kept in registers through a loop."""
    return gl.inline_asm_elementwise("mov.b32 $0, 0; // $1", "=r,r", [tile], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _part_offsets(tile, COLUMN, PART: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, BLOCK_M: gl.constexpr):
    """Where columns of a group's rows lie in a part [GROUPS * ROWS, BLOCK_M]."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    row = _opaque_zero(tile) + PART * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    column = COLUMN + gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))
    return row[:, None] * BLOCK_M + column[None, :]


@gluon.jit
def _store_sums(
    acc,
    out_ptr,
    bias_ptr,
    tile,
    COLUMN,
    num_tokens,
    num_rows,
    token_tiles,
    PART: gl.constexpr,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    GROUPS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BIAS: gl.constexpr,
):
    """Columns [ROWS, COLUMNS] of a tile from COLUMN on."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    STORE: gl.constexpr = gl.BlockedLayout([8, 1], [ROWS // 8, 256 // ROWS], [1, 4], [0, 1])
    first_row = (tile // token_tiles * GROUPS + PART) * ROWS
    if BIAS:
        n = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
        acc += gl.load(bias_ptr + n, mask=n < num_rows, other=0.0).to(gl.float32)[:, None]
    n = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, STORE))
    m = tile % token_tiles * BLOCK_M + COLUMN + gl.arange(0, COLUMNS, gl.SliceLayout(0, STORE))
    mask = (n < num_rows)[:, None] & (m < num_tokens)[None, :]
    result = gl.convert_layout(acc.to(out_ptr.dtype.element_ty), STORE)
    gl.store(out_ptr + ((_opaque_zero(tile) + m) * num_rows)[None, :] + n[:, None], result, mask=mask)


@gluon.jit
def _finish(
    acc,
    out_ptr,
    partial_ptr,
    bias_ptr,
    tile,
    program,
    first,
    last,
    num_tokens,
    num_rows,
    token_tiles,
    PART: gl.constexpr,
    ROWS: gl.constexpr,
    GROUPS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    COLUMN: gl.constexpr,
    BIAS: gl.constexpr,
    SHARE: gl.constexpr,
):
    """Some columns of a tile: store them for its first program, or as that one add the others' and store the sum."""
    COLUMNS: gl.constexpr = min(BLOCK_M, 64)
    SIZE: gl.constexpr = GROUPS * ROWS * BLOCK_M
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    acc = gl.convert_layout(acc, layout, assert_trivial=True)
    within = _part_offsets(tile, COLUMN, PART, ROWS, COLUMNS, BLOCK_M)
    if SHARE:
        if first < last:
            gl.store(partial_ptr + (program + tile) * SIZE + within, acc)
        else:
            _store_sums(
                acc, out_ptr, bias_ptr, tile, COLUMN, num_tokens, num_rows, token_tiles, PART, ROWS, COLUMNS, GROUPS,
                BLOCK_M, BIAS,
            )  # fmt: skip
    elif first < program:
        gl.store(partial_ptr + program * SIZE + within, acc)
    else:
        for other in range(program + 1, last + 1):
            acc += gl.load(partial_ptr + other * SIZE + within, cache_modifier=".cg")
        _store_sums(
            acc, out_ptr, bias_ptr, tile, COLUMN, num_tokens, num_rows, token_tiles, PART, ROWS, COLUMNS, GROUPS,
            BLOCK_M, BIAS,
        )  # fmt: skip


@gluon.jit
def _add_share(
    out_ptr,
    partial_ptr,
    arrivals,
    bias_ptr,
    tile,
    program,
    first,
    last,
    num_tokens,
    num_rows,
    token_tiles,
    PART: gl.constexpr,
    ROWS: gl.constexpr,
    GROUPS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BIAS: gl.constexpr,
):
    """Wait for all parts of a tile and add up those columns that are this program's share."""
    COLUMNS: gl.constexpr = 16
    AT_ONCE: gl.constexpr = 4  # loads on their way
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    SIZE: gl.constexpr = GROUPS * ROWS * BLOCK_M
    num_parts = last - first + 1
    while gl.atomic_add(arrivals, 0, sem="acquire") < num_parts:
        pass
    gl.thread_barrier()
    for share in range(program - first, BLOCK_M // COLUMNS, num_parts):
        within = _part_offsets(tile, share * COLUMNS, PART, ROWS, COLUMNS, BLOCK_M)
        acc = gl.zeros([ROWS, COLUMNS], gl.float32, layout)
        for part in range(first, last + 1, AT_ONCE):
            for i in gl.static_range(AT_ONCE):
                there = gl.full([ROWS, COLUMNS], part + i <= last, gl.int1, layout)
                pointers = partial_ptr + (part + i + tile) * SIZE + within
                acc += gl.load(pointers, mask=there, other=0.0, cache_modifier=".cg")
        _store_sums(
            acc, out_ptr, bias_ptr, tile, share * COLUMNS, num_tokens, num_rows, token_tiles, PART, ROWS, COLUMNS,
            GROUPS, BLOCK_M, BIAS,
        )  # fmt: skip
    if gl.atomic_add(arrivals, 1, sem="relaxed") == 2 * num_parts - 1:
        gl.store(arrivals, 0)  # ready for the next call


@gluon.jit
def _multiply_run(
    out_ptr,
    partial_ptr,
    arrivals_ptr,
    bias_ptr,
    weights,
    inputs,
    full,
    empty,
    begin,
    end,
    program,
    num_programs,
    num_units,
    num_tokens,
    num_rows,
    num_steps,
    token_tiles,
    ROWS: gl.constexpr,
    GROUPS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
    PART: gl.constexpr,
    BIAS: gl.constexpr,
    SHARE: gl.constexpr,
):
    """One group's rows of each tile: the PART-th."""
    # an instruction's sums must fit the registers that a thread has at the start
    INSTRUCTION: gl.constexpr = BLOCK_M if GROUPS == 2 else min(BLOCK_M, 128)
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, INSTRUCTION, 16])
    for tile in range(begin // num_steps, (end + num_steps - 1) // num_steps):
        start = gl.maximum(begin, tile * num_steps)
        stop = gl.minimum(end, tile * num_steps + num_steps)
        acc = gl.zeros([ROWS, BLOCK_M], gl.float32, MMA)
        for unit in range(start, stop):
            i = unit - begin
            stage = i % STAGES
            mbarrier.wait(full.index(stage), i // STAGES & 1)
            x = inputs.index(stage).permute((1, 0))
            acc = warpgroup_mma(weights.index(stage * GROUPS + PART), x, acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[acc])  # the step before has been read
            mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES), pred=unit > start)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index((stop - 1 - begin) % STAGES))
        first = program_of(tile * num_steps, num_programs, num_units)
        last = program_of(tile * num_steps + num_steps - 1, num_programs, num_units)
        arrivals = arrivals_ptr + tile * GROUPS + PART
        if not SHARE and (first == program and last > program):
            while gl.atomic_add(arrivals, 0, sem="acquire") < last - program:
                pass
            gl.store(arrivals, 0)  # ready for the next call
        if BLOCK_M <= 64:
            _finish(
                acc, out_ptr, partial_ptr, bias_ptr, tile, program, first, last, num_tokens, num_rows, token_tiles,
                PART, ROWS, GROUPS, BLOCK_M, 0, BIAS, SHARE,
            )  # fmt: skip
        elif BLOCK_M == 128:
            left, right = _halves(acc)
            _finish(
                left, out_ptr, partial_ptr, bias_ptr, tile, program, first, last, num_tokens, num_rows, token_tiles,
                PART, ROWS, GROUPS, BLOCK_M, 0, BIAS, SHARE,
            )  # fmt: skip
            _finish(
                right, out_ptr, partial_ptr, bias_ptr, tile, program, first, last, num_tokens, num_rows, token_tiles,
                PART, ROWS, GROUPS, BLOCK_M, 64, BIAS, SHARE,
            )  # fmt: skip
        else:
            left, right = _halves(acc)
            left, middle = _halves(left)
            _finish(
                left, out_ptr, partial_ptr, bias_ptr, tile, program, first, last, num_tokens, num_rows, token_tiles,
                PART, ROWS, GROUPS, BLOCK_M, 0, BIAS, SHARE,
            )  # fmt: skip
            _finish(
                middle, out_ptr, partial_ptr, bias_ptr, tile, program, first, last, num_tokens, num_rows, token_tiles,
                PART, ROWS, GROUPS, BLOCK_M, 64, BIAS, SHARE,
            )  # fmt: skip
            left, middle = _halves(right)
            _finish(
                left, out_ptr, partial_ptr, bias_ptr, tile, program, first, last, num_tokens, num_rows, token_tiles,
                PART, ROWS, GROUPS, BLOCK_M, 128, BIAS, SHARE,
            )  # fmt: skip
            _finish(
                middle, out_ptr, partial_ptr, bias_ptr, tile, program, first, last, num_tokens, num_rows, token_tiles,
                PART, ROWS, GROUPS, BLOCK_M, 192, BIAS, SHARE,
            )  # fmt: skip
        if (first < last) if SHARE else (first < program):
            gl.thread_barrier()  # all threads' stores before the one thread that announces them
            gl.atomic_add(arrivals, 1, sem="release")
    if SHARE:
        for tile in range(begin // num_steps, (end + num_steps - 1) // num_steps):
            first = program_of(tile * num_steps, num_programs, num_units)
            last = program_of(tile * num_steps + num_steps - 1, num_programs, num_units)
            if first < last:
                _add_share(
                    out_ptr, partial_ptr, arrivals_ptr + tile * GROUPS + PART, bias_ptr, tile, program, first, last,
                    num_tokens, num_rows, token_tiles, PART, ROWS, GROUPS, BLOCK_M, BIAS,
                )  # fmt: skip


@gluon.jit(do_not_specialize=["num_tokens", "num_units", "num_steps", "token_tiles"])
def _product(
    out_ptr,
    partial_ptr,
    arrivals_ptr,
    x_descriptor,
    weight_descriptor,
    bias_ptr,
    num_tokens,
    num_rows,
    num_units,
    num_steps,
    token_tiles,
    ROWS: gl.constexpr,
    GROUPS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
    COMPUTING_REGISTERS: gl.constexpr,
    LOADING_REGISTERS: gl.constexpr,
    BIAS: gl.constexpr,
    SHARE: gl.constexpr,
    PDL: gl.constexpr,
):
    """Program: a run of steps through tiles of GROUPS * ROWS outputs and BLOCK_M tokens."""
    if PDL:
        gdc_launch_dependents()
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    SHARED: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    weights = gl.allocate_shared_memory(dtype, [STAGES * GROUPS, ROWS, 64], SHARED)
    inputs = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, 64], SHARED)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=GROUPS)
    num_programs = gl.num_programs(0)
    program = num_programs - 1 - gl.program_id(0)  # who waits for others is started after them
    begin = first_unit(program, num_programs, num_units)
    end = first_unit(program + 1, num_programs, num_units)
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_multiply_run, (
                    out_ptr, partial_ptr, arrivals_ptr, bias_ptr, weights, inputs, full, empty, begin, end, program,
                    num_programs, num_units, num_tokens, num_rows, num_steps, token_tiles, ROWS, GROUPS, BLOCK_M,
                    STAGES, 0, BIAS, SHARE,
                )),
                (_multiply_run, (
                    out_ptr, partial_ptr, arrivals_ptr, bias_ptr, weights, inputs, full, empty, begin, end, program,
                    num_programs, num_units, num_tokens, num_rows, num_steps, token_tiles, ROWS, GROUPS, BLOCK_M,
                    STAGES, 1, BIAS, SHARE,
                )),
                (_load_run, (
                    weight_descriptor, x_descriptor, weights, inputs, full, empty, begin, end, num_steps, token_tiles,
                    ROWS, GROUPS, BLOCK_M, STAGES, PDL,
                )),
            ],
            [4, 1],
            [COMPUTING_REGISTERS, LOADING_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_multiply_run, (
                    out_ptr, partial_ptr, arrivals_ptr, bias_ptr, weights, inputs, full, empty, begin, end, program,
                    num_programs, num_units, num_tokens, num_rows, num_steps, token_tiles, ROWS, GROUPS, BLOCK_M,
                    STAGES, 0, BIAS, SHARE,
                )),
                (_multiply_run, (
                    out_ptr, partial_ptr, arrivals_ptr, bias_ptr, weights, inputs, full, empty, begin, end, program,
                    num_programs, num_units, num_tokens, num_rows, num_steps, token_tiles, ROWS, GROUPS, BLOCK_M,
                    STAGES, 1, BIAS, SHARE,
                )),
                (_multiply_run, (
                    out_ptr, partial_ptr, arrivals_ptr, bias_ptr, weights, inputs, full, empty, begin, end, program,
                    num_programs, num_units, num_tokens, num_rows, num_steps, token_tiles, ROWS, GROUPS, BLOCK_M,
                    STAGES, 2, BIAS, SHARE,
                )),
                (_load_run, (
                    weight_descriptor, x_descriptor, weights, inputs, full, empty, begin, end, num_steps, token_tiles,
                    ROWS, GROUPS, BLOCK_M, STAGES, PDL,
                )),
            ],
            [4, 4, 1],
            [COMPUTING_REGISTERS, COMPUTING_REGISTERS, LOADING_REGISTERS],
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class DenseTiling:
    """How :func:`product` cuts the work: a tile is of ``num_groups * rows`` outputs and ``block_m`` tokens."""

    rows: int
    num_groups: int
    block_m: int
    num_stages: int

    @property
    def registers(self) -> tuple[int, int, int]:
        """Of a thread: at the start, when all have as many; then of those that multiply, and of the loading group."""
        return (168, 232, 40) if self.num_groups == 2 else (128, 160, 32)

    def num_tiles(self, num_tokens: int, out_features: int) -> int:
        return triton.cdiv(out_features, self.num_groups * self.rows) * triton.cdiv(num_tokens, self.block_m)


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    arrivals: Tensor,
    tile: DenseTiling,
    num_programs: int,
    share: bool = False,
) -> Tensor:
    """x [num_tokens, in_features], weight [out_features, in_features] -> [num_tokens, out_features].

    ``arrivals`` int32 are zeros, at least ``num_groups`` for each tile, and zeros again afterwards.
    """
    num_tokens, in_features = x.shape
    out_features = weight.shape[0]
    device = describe(x.device)
    x = x.contiguous()
    out = torch.empty((num_tokens, out_features), dtype=x.dtype, device=x.device)
    num_steps = triton.cdiv(in_features, STEP)
    num_units = num_steps * tile.num_tiles(num_tokens, out_features)
    num_programs = min(num_programs, num_units)
    shape = (
        num_programs + (tile.num_tiles(num_tokens, out_features) if share else 0),
        tile.num_groups * tile.rows,
        tile.block_m,
    )
    partial = torch.empty(shape, dtype=torch.float32, device=x.device)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    at_start, computing, loading = tile.registers
    _product[(num_programs,)](
        out,
        partial,
        arrivals,
        TensorDescriptor.from_tensor(x, [tile.block_m, STEP], layout),
        TensorDescriptor.from_tensor(weight, [tile.rows, STEP], layout),
        x if bias is None else bias,
        num_tokens,
        out_features,
        num_units,
        num_steps,
        triton.cdiv(num_tokens, tile.block_m),
        ROWS=tile.rows,
        GROUPS=tile.num_groups,
        BLOCK_M=tile.block_m,
        STAGES=tile.num_stages,
        COMPUTING_REGISTERS=computing,
        LOADING_REGISTERS=loading,
        BIAS=bias is not None,
        SHARE=share,
        PDL=dependent,
        num_warps=4,
        maxnreg=at_start,
        launch_pdl=dependent,
        launch_cooperative_grid=cooperative,
    )
    return out
