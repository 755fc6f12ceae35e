"""Products of few to some hundred 16-bit tokens with 4-bit weights on Hopper GPUs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octavo_kernels.launch import describe


@gluon.constexpr_function
def _bits(size, value):
    """Bases of an index below ``size`` whose steps are worth ``value``."""
    bases = []
    while size > 1:
        bases.append(value)
        value *= 2
        size //= 2
    return bases


@gluon.constexpr_function
def _word_layout(N64, NUM_WARPS):
    """Words [64 rows, 512] of which each thread has those of its own fragments."""
    groups = NUM_WARPS // 4
    reg = [[0, 1], [0, 2]] + [[b, 0] for b in _bits(N64 // groups, groups)]
    lane = [[0, 4], [0, 8], [0, 16], [0, 32], [0, 64]]
    warp = [[0, 128], [0, 256]] + [[b, 0] for b in _bits(groups, 1)]
    return gl.DistributedLinearLayout(reg, lane, warp, [], [N64, 512])


@gluon.constexpr_function
def _fragment_layout(N64, NUM_WARPS):
    """The same as [64 rows, warp, row of 8, pair of 4, 16 inputs]."""
    groups = NUM_WARPS // 4
    zeros = [0, 0, 0, 0, 0]

    def unit(axis, value):
        return zeros[:axis] + [value] + zeros[axis + 1 :]

    reg = [unit(4, 1), unit(4, 2)] + [unit(0, b) for b in _bits(N64 // groups, groups)]
    lane = [unit(3, 1), unit(3, 2), unit(2, 1), unit(2, 2), unit(2, 4)]
    warp = [unit(1, 1), unit(1, 2)] + [unit(0, b) for b in _bits(groups, 1)]
    return gl.DistributedLinearLayout(reg, lane, warp, [], [N64, 4, 8, 4, 4])


@gluon.constexpr_function
def _pair_assembly(shift, dtype):
    kind, exponents = ("bf16x2", "0x43004300") if dtype == gl.bfloat16 else ("f16x2", "0x64006400")
    return (
        f"{{ .reg .b32 t; shr.u32 t, $1, {shift}; lop3.b32 t, t, 0x000F000F, {exponents}, 0xEA; "
        f"sub.{kind} t, t, $2; mul.{kind} $0, t, $3; }}"
    )


@gluon.jit
def _pair(word, zero, scale, SHIFT: gl.constexpr, dtype: gl.constexpr):
    """Two weights of each word as 16-bit floats: a nibble below an exponent, less the zero point, times the scale."""
    assembly: gl.constexpr = _pair_assembly(SHIFT, dtype)
    return gl.inline_asm_elementwise(assembly, "=r,r,r,r", [word, zero, scale], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _low_twice(param):
    return gl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $1, 0x1010;", "=r,r", [param], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _high_twice(param):
    return gl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $1, 0x3232;", "=r,r", [param], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _halves(pair, dtype: gl.constexpr):
    low = pair.to(gl.int16).to(dtype, bitcast=True)
    high = (pair >> 16).to(gl.int16).to(dtype, bitcast=True)
    return gl.join(low, high)


@gluon.jit
def _parameter(shared, layout: gl.constexpr):
    rows: gl.constexpr = gl.SliceLayout(3, gl.SliceLayout(4, layout))
    return shared.load(rows).expand_dims(3).expand_dims(4)


@gluon.jit
def _pairs(words, params, HALF: gl.constexpr, N64: gl.constexpr, HALF_PARAMS: gl.constexpr, dtype: gl.constexpr):
    """Half of a step's words [2 N64, 512] and its parameters -> pairs of weights, by (row half, input half)."""
    layout: gl.constexpr = _fragment_layout(N64, gl.num_warps())
    word = words.slice(HALF * N64, N64, 0).load(_word_layout(N64, gl.num_warps())).reshape([N64, 4, 8, 4, 4])
    word = gl.convert_layout(word, layout, assert_trivial=True)
    FIRST: gl.constexpr = HALF * (HALF_PARAMS - 1) * 2 * N64
    upper = _parameter(params.slice(FIRST, N64, 0), layout)
    lower = _parameter(params.slice(FIRST + N64, N64, 0), layout)
    scale, zero = _low_twice(upper), _high_twice(upper)
    upper_low = _pair(word, zero, scale, 0, dtype)
    upper_high = _pair(word, zero, scale, 8, dtype)
    scale, zero = _low_twice(lower), _high_twice(lower)
    lower_low = _pair(word, zero, scale, 4, dtype)
    lower_high = _pair(word, zero, scale, 12, dtype)
    return upper_low, upper_high, lower_low, lower_high


@gluon.jit
def _operand(
    upper_low, upper_high, lower_low, lower_high, N64: gl.constexpr, dtype: gl.constexpr, layout: gl.constexpr
):
    """The left operand [64 N64, 64]."""
    upper = gl.join(_halves(upper_low, dtype), _halves(upper_high, dtype))
    lower = gl.join(_halves(lower_low, dtype), _halves(lower_high, dtype))
    # [64 rows, warp, row of 8, pair, 16 inputs, of the pair, half of the 16 inputs, half of the 16 rows]
    ordered = gl.join(upper, lower).permute([0, 1, 7, 2, 4, 6, 3, 5]).reshape([64 * N64, 64])
    return gl.convert_layout(ordered, layout, assert_trivial=True)


@gluon.jit
def _copy_weights(
    words, params, words_ptr, params_ptr, unit, num_row_blocks,
    M_TILES: gl.constexpr, K: gl.constexpr, GROUP: gl.constexpr, N64: gl.constexpr, HALF_PARAMS: gl.constexpr,
):  # fmt: skip
    """One step's words [2 N64, 512] and parameters [2 HALF_PARAMS N64, 4, 8]."""
    layout: gl.constexpr = _word_layout(2 * N64, gl.num_warps())
    first = unit // (K // 128) // M_TILES * N64
    step = unit % (K // 128)
    n = gl.arange(0, 2 * N64, gl.SliceLayout(1, layout))
    c = gl.arange(0, 512, gl.SliceLayout(0, layout))
    block = gl.minimum(first + n % N64, num_row_blocks - 1)  # blocks beyond the end are read and not stored
    start = block * (K // 64 * 512) + (step * 2 + n // N64) * 512
    async_copy.async_copy_global_to_shared(words, words_ptr + start[:, None] + c[None, :])
    flat: gl.constexpr = gl.BlockedLayout([1, 1, 4], [4, 4, 2], [gl.num_warps(), 1, 1], [2, 1, 0])
    n = gl.arange(0, 2 * HALF_PARAMS * N64, gl.SliceLayout(1, gl.SliceLayout(2, flat)))
    w = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(2, flat)))
    g = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, flat)))
    block = gl.minimum(first + n % N64, num_row_blocks - 1)
    group = (step * 128 + n // (2 * N64) * 64) // GROUP
    start = (group * num_row_blocks + block) * 64 + n // N64 % 2 * 32
    async_copy.async_copy_global_to_shared(
        params, params_ptr + start[:, None, None] + (w * 8)[None, :, None] + g[None, None, :]
    )


@gluon.jit
def _copy_inputs(inputs, x_ptr, unit, num_tokens, M_TILES: gl.constexpr, K: gl.constexpr, BLOCK_M: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [gl.num_warps(), 1], [1, 0])
    m = unit // (K // 128) % M_TILES * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(1, layout))
    k = unit % (K // 128) * 128 + gl.arange(0, 128, gl.SliceLayout(0, layout))
    async_copy.async_copy_global_to_shared(
        inputs, x_ptr + (m * K)[:, None] + k[None, :], mask=(m < num_tokens)[:, None]
    )


@gluon.jit(do_not_specialize=["num_tokens", "num_tiles"])
def streamed(
    out_ptr, partial_ptr, arrivals_ptr, x_ptr, words_ptr, params_ptr, bias_ptr,
    num_tokens, num_rows, num_tiles,
    K: gl.constexpr, GROUP: gl.constexpr, M_TILES: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr, BIAS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Each program takes an equal run of the steps of all tiles; a tile that several share is added up in order by the
    last of them to arrive."""
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    N64: gl.constexpr = BLOCK_N // 64
    STEPS: gl.constexpr = K // 128
    HALF_PARAMS: gl.constexpr = 2 if GROUP == 64 else 1
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_M, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    words = gl.allocate_shared_memory(gl.int32, [STAGES, 2 * N64, 512], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    params = gl.allocate_shared_memory(
        gl.int32, [STAGES, 2 * HALF_PARAMS * N64, 4, 8], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    )
    inputs = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, 128], gl.NVMMASharedLayout(128, 16, 2))
    program, num_programs = gl.program_id(0), gl.num_programs(0)
    total = num_tiles * STEPS
    begin = (program * total) // num_programs
    end = ((program + 1) * total) // num_programs
    num_row_blocks = (num_rows + 63) // 64
    for stage in gl.static_range(STAGES - 1):
        if begin + stage < end:
            _copy_weights(
                words.index(stage), params.index(stage), words_ptr, params_ptr, begin + stage, num_row_blocks,
                M_TILES, K, GROUP, N64, HALF_PARAMS,
            )  # fmt: skip
    if PDL:  # weights are never written by a predecessor: they need not wait
        gdc_launch_dependents()
        gdc_wait()
    for stage in gl.static_range(STAGES - 1):
        if begin + stage < end:
            _copy_inputs(inputs.index(stage), x_ptr, begin + stage, num_tokens, M_TILES, K, BLOCK_M)
        async_copy.commit_group()
    async_copy.wait_group(STAGES - 2)
    gl.thread_barrier()
    w00, w01, w10, w11 = _pairs(words.index(0), params.index(0), 0, N64, HALF_PARAMS, dtype)
    acc = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, mma)
    slot = 0
    free = STAGES - 1
    for unit in range(begin, end):
        fence_async_shared()
        x = inputs.index(slot).permute([1, 0])
        weight = _operand(w00, w01, w10, w11, N64, dtype, operand)
        running = warpgroup_mma(weight, x.slice(0, 64, 0), acc, is_async=True)
        v00, v01, v10, v11 = _pairs(words.index(slot), params.index(slot), 1, N64, HALF_PARAMS, dtype)
        acc, weight = warpgroup_mma_wait(0, deps=[running, weight])
        weight = _operand(v00, v01, v10, v11, N64, dtype, operand)
        running = warpgroup_mma(weight, x.slice(64, 64, 0), acc, is_async=True)
        async_copy.wait_group(STAGES - 3)
        gl.thread_barrier()  # the next step has arrived, and all have done with the one before this
        if unit + STAGES - 1 < end:
            _copy_weights(
                words.index(free), params.index(free), words_ptr, params_ptr, unit + STAGES - 1, num_row_blocks,
                M_TILES, K, GROUP, N64, HALF_PARAMS,
            )  # fmt: skip
            _copy_inputs(inputs.index(free), x_ptr, unit + STAGES - 1, num_tokens, M_TILES, K, BLOCK_M)
        async_copy.commit_group()
        free = slot
        slot = gl.where(slot == STAGES - 1, 0, slot + 1)
        w00, w01, w10, w11 = _pairs(words.index(slot), params.index(slot), 0, N64, HALF_PARAMS, dtype)
        acc, weight = warpgroup_mma_wait(0, deps=[running, weight])
        if (unit + 1) % STEPS == 0 or unit + 1 == end:
            _finish(
                acc, unit // STEPS, program, num_programs, total, out_ptr, partial_ptr, arrivals_ptr, bias_ptr,
                num_tokens, num_rows, M_TILES, STEPS, BLOCK_N, BLOCK_M, BIAS,
            )  # fmt: skip
            acc = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, mma)
    async_copy.wait_group(0)


@gluon.jit
def _finish(
    acc, tile, program, num_programs, total, out_ptr, partial_ptr, arrivals_ptr, bias_ptr,
    num_tokens, num_rows, M_TILES: gl.constexpr, STEPS: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_M: gl.constexpr,
    BIAS: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = acc.type.layout
    first = ((tile * STEPS + 1) * num_programs - 1) // total  # program of the tile's first step
    last = ((tile * STEPS + STEPS) * num_programs - 1) // total
    complete = True
    if first != last:
        row = gl.arange(0, BLOCK_N, gl.SliceLayout(1, layout))
        column = gl.arange(0, BLOCK_M, gl.SliceLayout(0, layout))
        within = row[:, None] * BLOCK_M + column[None, :]
        # program + tile numbers the parts: both only ever grow from one part to the next
        gl.store(partial_ptr + (program + tile) * (BLOCK_N * BLOCK_M) + within, acc)
        gl.thread_barrier()
        complete = gl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel") == last - first
        gl.thread_barrier()
        if complete:
            acc = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, layout)
            for part in range(first + tile, last + tile + 1):
                acc += gl.load(partial_ptr + part * (BLOCK_N * BLOCK_M) + within, cache_modifier=".cg")
            gl.store(arrivals_ptr + tile, 0)  # ready for the next call
    if complete:
        WT: gl.constexpr = BLOCK_N // 16
        # rows of a fragment g and g + 8 are outputs 2 g and 2 g + 1, so that a thread's two lie side by side
        result = acc.reshape([WT, 2, 8, BLOCK_M]).permute([0, 2, 1, 3]).reshape([BLOCK_N, BLOCK_M])
        linear: gl.constexpr = result.type.layout
        n = (tile // M_TILES) * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(1, linear))
        m = (tile % M_TILES) * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(0, linear))
        if BIAS:
            result += gl.load(bias_ptr + n, mask=n < num_rows, other=0.0).to(gl.float32)[:, None]
        mask = (n < num_rows)[:, None] & (m < num_tokens)[None, :]
        gl.store(out_ptr + (m * num_rows)[None, :] + n[:, None], result.to(out_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True, slots=True)
class StreamTiling:
    """Tile of :func:`streamed`."""

    block_n: int
    block_m: int
    num_stages: int
    num_warps: int
    programs_per_processor: int


def pack_fragments(values: Tensor) -> Tensor:
    """values uint8 [out_features, in_features] below 16 -> int32 [ceil(out / 64), in / 64, 512]."""
    rows = -values.shape[0] % 64
    padded = F.pad(values, (0, 0, 0, rows))
    # [64 rows, warp, g, row half, 64 inputs, 16 inputs, input half, t, of the pair]
    parts = padded.view(-1, 4, 8, 2, padded.shape[1] // 64, 4, 2, 4, 2).permute(0, 4, 1, 2, 7, 5, 3, 6, 8)
    row_half, input_half, second = torch.meshgrid(*[torch.arange(2, device=values.device)] * 3, indexing="ij")
    shifts = (4 * row_half + 8 * input_half + 16 * second).int()
    words = (parts.to(torch.int32) << shifts).sum(dim=(-3, -2, -1), dtype=torch.int32)
    return words.reshape(words.shape[0], words.shape[1], 512)


def pack_parameters(scales: Tensor, zeros: Tensor | None, dtype: torch.dtype) -> Tensor:
    """scales [groups, out_features], zeros the same or None (8) -> int32 [groups, ceil(out / 64), 64]: scale below
    zero point, both in ``dtype``, the zero point with the offset that the weights have."""
    offset = 128 if dtype == torch.bfloat16 else 1024
    low = scales.to(dtype)
    high = torch.full_like(low, offset + 8) if zeros is None else (zeros.to(torch.int32) + offset).to(dtype)
    both = torch.stack([low, high], dim=-1).contiguous().view(torch.int32).squeeze(-1)
    both = F.pad(both, (0, -scales.shape[1] % 64))
    # [groups, 64 rows, warp, g, row half] -> row half before warp
    return both.view(len(both), -1, 4, 8, 2).permute(0, 1, 4, 2, 3).reshape(len(both), -1, 64).contiguous()


def launch_streamed(
    x: Tensor, words: Tensor, params: Tensor, arrivals: Tensor, bias: Tensor | None, out_features: int, group: int,
    tile: StreamTiling,
) -> Tensor:
    num_tokens, in_features = x.shape
    device = describe(x.device)
    out = torch.empty((num_tokens, out_features), dtype=x.dtype, device=x.device)
    m_tiles = triton.cdiv(num_tokens, tile.block_m)
    num_tiles = triton.cdiv(out_features, tile.block_n) * m_tiles
    steps = num_tiles * (in_features // 128)
    num_programs = min(device.num_processors * tile.programs_per_processor, steps)
    partial = torch.empty(((num_programs + num_tiles) * tile.block_n * tile.block_m,), dtype=torch.float32, device=x.device)
    streamed[(num_programs,)](
        out, partial, arrivals, x, words, params, x if bias is None else bias, num_tokens, out_features, num_tiles,
        K=in_features, GROUP=group, M_TILES=m_tiles, BLOCK_N=tile.block_n, BLOCK_M=tile.block_m,
        STAGES=tile.num_stages, BIAS=bias is not None, PDL=device.dependent_launch, num_warps=tile.num_warps,
        maxnreg=min(255, 65536 // (32 * tile.num_warps * tile.programs_per_processor) // 8 * 8),
        **device.options,
    )
    return out
