"""Products of up to some hundred 16-bit tokens with weights that stream through Hopper's tensor cores.

Weights are the left operand of ``wgmma``, which takes it from registers: a thread reads words that hold its own
fragments, widens them there, and they never pass through shared memory again. The tokens are the narrow side and are
hardly padded. The work, steps of 128 inputs of all tiles of 128 outputs, is cut into equal runs, one a program, so that
no processor idles (stream-K, arXiv 2301.03598); a tile that several share is added up in order by the one that has its
first step, so that results repeat bit by bit.

Each half of a step is widened while the matrix unit works on the half before it, and nothing waits for a product until
the next one is on its way. Words, parameters and tokens are on
their way several steps ahead; weights, which no predecessor writes, before it has even ended.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octavo_kernels.launch import describe

TILE = 128
"""Outputs of a tile."""

STEP = 128
"""Inputs of a step."""


@gluon.constexpr_function
def _word_layout(NUM_BLOCKS, NUM_WARPS):
    """4-bit words [blocks of 64 outputs, 512], of which a thread has those of its own fragments."""
    apart = [[1, 0]] if NUM_WARPS == 8 else []
    together = [[b, 0] for b in (1, 2) if b < NUM_BLOCKS and [b, 0] not in apart]
    lanes = [[0, 4], [0, 8], [0, 16], [0, 32], [0, 64]]
    return gl.DistributedLinearLayout(
        [[0, 1], [0, 2], *together], lanes, [[0, 128], [0, 256], *apart], [], [NUM_BLOCKS, 512]
    )


@gluon.constexpr_function
def _row_layout(NUM_WARPS):
    """FP8 words [128 outputs, 32]: in each half of a row a thread has four, and two neighbouring rows."""
    apart = [[64, 0]] if NUM_WARPS == 8 else []
    together = [] if NUM_WARPS == 8 else [[64, 0]]
    registers = [[0, 1], [0, 2], [1, 0], [0, 16], *together]
    lanes = [[0, 4], [0, 8], [2, 0], [4, 0], [8, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0], *apart], [], [128, 32])


@gluon.constexpr_function
def fragment_layout(NUM_BLOCKS, NUM_WARPS):
    """Words of half a step as [block of 64 outputs, warp, row of 8, pair of 4, 16 inputs]."""
    apart = [[1, 0, 0, 0, 0]] if NUM_WARPS == 8 else []
    together = [[1, 0, 0, 0, 0]] if NUM_WARPS == 4 and NUM_BLOCKS == 2 else []
    registers = [[0, 0, 0, 0, 1], [0, 0, 0, 0, 2], *together]
    lanes = [[0, 0, 0, 1, 0], [0, 0, 0, 2, 0], [0, 0, 1, 0, 0], [0, 0, 2, 0, 0], [0, 0, 4, 0, 0]]
    warps = [[0, 1, 0, 0, 0], [0, 2, 0, 0, 0], *apart]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [NUM_BLOCKS, 4, 8, 4, 4])


@gluon.constexpr_function
def output_layout(NUM_ROWS, BLOCK_M, NUM_WARPS):
    """Sums [NUM_ROWS, BLOCK_M] as ``wgmma`` leaves them, where rows g and g + 8 of a fragment have become 2 g and
    2 g + 1: pairs of rows first, so that they are stored at once."""
    columns = [[0, b] for b in (1, 8, 16, 32, 64, 128) if b < BLOCK_M]
    apart = [[16 * w, 0] for w in (1, 2, 4) if w < NUM_WARPS]
    together = [[64, 0]] if NUM_WARPS == 4 and NUM_ROWS == 128 else []
    lanes = [[0, 2], [0, 4], [2, 0], [4, 0], [8, 0]]
    return gl.DistributedLinearLayout([[1, 0], *columns, *together], lanes, apart, [], [NUM_ROWS, BLOCK_M])


@gluon.constexpr_function
def int4_factor(dtype):
    """What sums with 4-bit weights are multiplied by in the end: in bfloat16 the weights are that much smaller, as the
    scale which makes numbers of its smallest exponent as large as they are would not be finite."""
    return 2.0**23 if dtype in (gl.bfloat16, torch.bfloat16) else 1.0


@gluon.constexpr_function
def _int4_assembly(nibble, dtype):
    if dtype == gl.bfloat16:
        # below an exponent of 0 or 1 the eight last bits of bfloat16 count 2 ** -133: two neighbouring nibbles fit
        mask = "0x00F000F0" if nibble % 2 else "0x000F000F"
        return f"{{ .reg .b32 t; and.b32 t, $1, {mask}; fma.rn.bf16x2 $0, t, $2, $3; }}"
    shift = 4 * (nibble % 2)
    return (
        f"{{ .reg .b32 t; shr.u32 t, $1, {shift}; lop3.b32 t, t, 0x000F000F, 0x64006400, 0xEA; "
        "sub.f16x2 t, t, $3; mul.f16x2 $0, t, $2; }"
    )


@gluon.jit
def _int4_pair(word, scale, zero, NIBBLE: gl.constexpr, dtype: gl.constexpr):
    """Two weights of each word, whose nibbles 0 and 1 of each half are meant, as 16-bit floats: times the scale and
    zero added (bfloat16), or the zero point taken off below an exponent and times the scale (float16)."""
    assembly: gl.constexpr = _int4_assembly(NIBBLE, dtype)
    return gl.inline_asm_elementwise(assembly, "=r,r,r,r", [word, scale, zero], dtype=gl.int32, is_pure=True, pack=1)


@gluon.constexpr_function
def _fp8_assembly(odd, dtype):
    # the sign where it belongs; exponent and mantissa below it, short of the difference of the exponents' offsets
    shift, mask = (4, "0x07F007F0") if dtype == gl.bfloat16 else (1, "0x3F803F80")
    kind = "bf16x2" if dtype == gl.bfloat16 else "f16x2"
    move = "mov.b32 s, $1;" if odd else "shl.b32 s, $1, 8;"
    return (
        f"{{ .reg .b32 s, t; {move} shr.u32 t, s, {shift}; and.b32 t, t, {mask}; "
        f"lop3.b32 t, s, 0x80008000, t, 0xEA; mul.{kind} $0, t, $2; }}"
    )


@gluon.jit
def _fp8_pair(word, scale, ODD: gl.constexpr, dtype: gl.constexpr):
    """The odd or the even bytes of each word as two 16-bit floats, times ``scale``."""
    assembly: gl.constexpr = _fp8_assembly(ODD, dtype)
    return gl.inline_asm_elementwise(assembly, "=r,r,r", [word, scale], dtype=gl.int32, is_pure=True, pack=1)


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
def parameter(shared, layout: gl.constexpr):
    """Parameters [blocks of 64 outputs, warp, row of 8], to be met by words."""
    rows: gl.constexpr = gl.SliceLayout(3, gl.SliceLayout(4, layout))
    return shared.load(rows).expand_dims(3).expand_dims(4)


@gluon.jit
def _int4_pairs(words, params, HALF: gl.constexpr, HALF_PARAMS: gl.constexpr, dtype: gl.constexpr):
    """Half of a step's words [4, 512] and parameters [4 HALF_PARAMS, 4, 8] -> pairs of weights, by halves of 16 rows
    and, within, of 16 inputs."""
    layout: gl.constexpr = fragment_layout(2, gl.num_warps())
    word = words.slice(HALF * 2, 2, 0).load(_word_layout(2, gl.num_warps())).reshape([2, 4, 8, 4, 4])
    word = gl.convert_layout(word, layout, assert_trivial=True)
    FIRST: gl.constexpr = HALF * (HALF_PARAMS - 1) * 4
    upper = parameter(params.slice(FIRST, 2, 0), layout)
    lower = parameter(params.slice(FIRST + 2, 2, 0), layout)
    return widen_int4(word, upper, lower, dtype)


@gluon.jit
def widen_int4(word, upper, lower, dtype: gl.constexpr):
    """Words of half a step and the parameters of their rows, by halves of 16 -> pairs of weights, by halves of 16 rows
    and, within, of 16 inputs."""
    scale, zero = _low_twice(upper), _high_twice(upper)
    upper_low = _int4_pair(word, scale, zero, 0, dtype)
    upper_high = _int4_pair(word >> 8, scale, zero, 0, dtype)
    scale, zero = _low_twice(lower), _high_twice(lower)
    lower_low = _int4_pair(word, scale, zero, 1, dtype)
    lower_high = _int4_pair(word >> 8, scale, zero, 1, dtype)
    return upper_low, upper_high, lower_low, lower_high


@gluon.jit
def _fp8_pairs(words, params, exponent, HALF: gl.constexpr, SCALED: gl.constexpr, dtype: gl.constexpr):
    """The same from words [128, 32]; without SCALED only the exponent is mended."""
    layout: gl.constexpr = fragment_layout(2, gl.num_warps())
    both = words.load(_row_layout(gl.num_warps())).reshape([128, 2, 16]).permute([0, 2, 1])
    first, second = gl.split(both)
    word = (second if HALF else first).reshape([2, 4, 8, 2, 4, 4]).permute([0, 1, 2, 4, 5, 3])
    upper, lower = gl.split(word)
    upper = gl.convert_layout(upper, layout, assert_trivial=True)
    lower = gl.convert_layout(lower, layout, assert_trivial=True)
    if SCALED:
        upper_scale = parameter(params.slice(0, 2, 0), layout)
        lower_scale = parameter(params.slice(2, 2, 0), layout)
    else:
        upper_scale = exponent
        lower_scale = exponent
    return (
        _fp8_pair(upper, upper_scale, True, dtype),
        _fp8_pair(upper, upper_scale, False, dtype),
        _fp8_pair(lower, lower_scale, True, dtype),
        _fp8_pair(lower, lower_scale, False, dtype),
    )


@gluon.jit
def _pairs(words, params, exponent, HALF: gl.constexpr, FP8: gl.constexpr, GROUP: gl.constexpr, dtype: gl.constexpr):
    if FP8:
        pairs = _fp8_pairs(words, params, exponent, HALF, GROUP > 0, dtype)
    else:
        pairs = _int4_pairs(words, params, HALF, 2 if GROUP == 64 else 1, dtype)
    return pairs


@gluon.jit
def _halves(pair, dtype: gl.constexpr):
    low = pair.to(gl.int16).to(dtype, bitcast=True)
    high = (pair >> 16).to(gl.int16).to(dtype, bitcast=True)
    return gl.join(low, high)


@gluon.jit
def operand(upper_low, upper_high, lower_low, lower_high, dtype: gl.constexpr, layout: gl.constexpr):
    """The left operand [64 for each block of outputs, 64]; no value moves, the registers only get the layout's name."""
    upper = gl.join(_halves(upper_low, dtype), _halves(upper_high, dtype))
    lower = gl.join(_halves(lower_low, dtype), _halves(lower_high, dtype))
    # [block of 64 outputs, warp, row of 8, pair, 16 inputs, of the pair, half of the inputs, half of the rows]
    ordered = gl.join(upper, lower).permute([0, 1, 7, 2, 4, 6, 3, 5]).reshape([64 * upper_low.shape[0], 64])
    return gl.convert_layout(ordered, layout, assert_trivial=True)


@gluon.jit
def _copy_weights(
    words,
    params,
    words_ptr,
    params_ptr,
    tile,
    step,
    num_rows,
    TOKEN_TILES: gl.constexpr,
    K: gl.constexpr,
    GROUP: gl.constexpr,
    HALF_PARAMS: gl.constexpr,
    FP8: gl.constexpr,
):
    """One step's words, and parameters [4 HALF_PARAMS, 4, 8]; rows beyond the end are read and not stored."""
    row_tile = tile // TOKEN_TILES
    if FP8:
        rows: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [gl.num_warps(), 1], [1, 0])
        n = gl.minimum(row_tile * 128 + gl.arange(0, 128, gl.SliceLayout(1, rows)), num_rows - 1)
        c = step * 32 + gl.arange(0, 32, gl.SliceLayout(0, rows))
        async_copy.async_copy_global_to_shared(words, words_ptr + (n * (K // 4))[:, None] + c[None, :])
    else:
        layout: gl.constexpr = _word_layout(4, gl.num_warps())
        n = gl.arange(0, 4, gl.SliceLayout(1, layout))
        c = gl.arange(0, 512, gl.SliceLayout(0, layout))
        pointers = words_ptr + (row_tile * (K // 128) + step) * 2048 + (n * 512)[:, None] + c[None, :]
        async_copy.async_copy_global_to_shared(words, pointers)
    if GROUP > 0:
        flat: gl.constexpr = gl.BlockedLayout([1, 1, 4], [4, 4, 2], [gl.num_warps(), 1, 1], [2, 1, 0])
        n = gl.arange(0, 4 * HALF_PARAMS, gl.SliceLayout(1, gl.SliceLayout(2, flat)))
        w = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(2, flat)))
        g = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, flat)))
        group = step * 128 // GROUP + n // 4
        start = (row_tile * (K // GROUP) + group) * 128 + n // 2 % 2 * 64 + n % 2 * 32
        within = start[:, None, None] + (w * 8)[None, :, None] + g[None, None, :]
        async_copy.async_copy_global_to_shared(params, params_ptr + within)


@gluon.jit
def _copy_inputs(
    inputs, x_ptr, tile, step, num_tokens, TOKEN_TILES: gl.constexpr, K: gl.constexpr, BLOCK_M: gl.constexpr
):
    """One step's inputs [BLOCK_M, 128]; tokens beyond the end are zeros."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [gl.num_warps(), 1], [1, 0])
    m = tile % TOKEN_TILES * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(1, layout))
    k = gl.arange(0, 128, gl.SliceLayout(0, layout))
    async_copy.async_copy_global_to_shared(
        inputs, x_ptr + ((m * K)[:, None] + k[None, :] + step * 128), mask=(m < num_tokens)[:, None]
    )


@gluon.jit
def first_unit(program, num_programs, num_units):
    """Where the program's run begins among the steps of all tiles; it ends where the next one's begins."""
    return (program * num_units) // num_programs


@gluon.jit
def program_of(unit, num_programs, num_units):
    """Whose run holds ``unit``."""
    return ((unit + 1) * num_programs - 1) // num_units


@gluon.jit
def following(tile, step, STEPS: gl.constexpr):
    last = step == STEPS - 1
    return gl.where(last, tile + 1, tile), gl.where(last, 0, step + 1)


@gluon.jit(do_not_specialize=["num_tokens", "num_tiles"])
def _stream(
    out_ptr,
    partial_ptr,
    arrivals_ptr,
    x_ptr,
    words_ptr,
    params_ptr,
    scale_ptr,
    bias_ptr,
    num_tokens,
    num_rows,
    num_tiles,
    exponent,
    K: gl.constexpr,
    GROUP: gl.constexpr,
    TOKEN_TILES: gl.constexpr,
    BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
    FP8: gl.constexpr,
    BIAS: gl.constexpr,
    PDL: gl.constexpr,
):
    """Program: a run of steps through tiles of 128 outputs and BLOCK_M tokens, the tokens' tiles of one row of outputs
    one after the other."""
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    STEPS: gl.constexpr = K // 128
    HALF_PARAMS: gl.constexpr = 2 if GROUP == 64 else 1
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_M, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    if FP8:  # neighbouring pairs of rows lie in different banks
        words = gl.allocate_shared_memory(gl.int32, [STAGES, 128, 32], gl.SwizzledSharedLayout(16, 2, 2, [1, 0]))
    else:
        words = gl.allocate_shared_memory(gl.int32, [STAGES, 4, 512], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    params = gl.allocate_shared_memory(
        gl.int32, [STAGES, 4 * HALF_PARAMS, 4, 8], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    )
    inputs = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, 128], gl.NVMMASharedLayout(128, 16, 2))
    num_programs = gl.num_programs(0)
    program = num_programs - 1 - gl.program_id(0)  # runs in reverse: what one waits for has started before it
    total = num_tiles * STEPS
    begin = first_unit(program, num_programs, total)
    end = first_unit(program + 1, num_programs, total)
    tile, step = begin // STEPS, begin % STEPS
    ahead_tile, ahead_step = tile, step
    for stage in gl.static_range(STAGES - 1):
        if begin + stage < end:
            _copy_weights(
                words.index(stage),
                params.index(stage),
                words_ptr,
                params_ptr,
                ahead_tile,
                ahead_step,
                num_rows,
                TOKEN_TILES,
                K,
                GROUP,
                HALF_PARAMS,
                FP8,
            )
        ahead_tile, ahead_step = following(ahead_tile, ahead_step, STEPS)
    if PDL:  # weights are never written by a predecessor: they need not wait
        gdc_launch_dependents()
        gdc_wait()
    ahead_tile, ahead_step = tile, step
    for stage in gl.static_range(STAGES - 1):
        if begin + stage < end:
            _copy_inputs(inputs.index(stage), x_ptr, ahead_tile, ahead_step, num_tokens, TOKEN_TILES, K, BLOCK_M)
        async_copy.commit_group()
        ahead_tile, ahead_step = following(ahead_tile, ahead_step, STEPS)
    async_copy.wait_group(STAGES - 2)
    gl.thread_barrier()
    w00, w01, w10, w11 = _pairs(words.index(0), params.index(0), exponent, 0, FP8, GROUP, dtype)
    slot = 0
    free = STAGES - 1
    unit = begin
    while unit < end:
        tile = unit // STEPS
        last = gl.minimum(tile * STEPS + STEPS, end)
        acc = gl.zeros([128, BLOCK_M], gl.float32, mma)
        held = operand(w00, w01, w10, w11, dtype, left)
        for ahead in range(unit + STAGES - 1, last + STAGES - 1):
            fence_async_shared()
            x = inputs.index(slot).permute([1, 0])
            weight = operand(w00, w01, w10, w11, dtype, left)
            running = warpgroup_mma(weight, x.slice(0, 64, 0), acc, is_async=True)
            acc, held = warpgroup_mma_wait(1, deps=[running, held])  # the product before this one has ended
            async_copy.wait_group(STAGES - 3)
            gl.thread_barrier()  # the next step has arrived, and all have done with the one before this
            if ahead < end:
                _copy_weights(
                    words.index(free),
                    params.index(free),
                    words_ptr,
                    params_ptr,
                    ahead_tile,
                    ahead_step,
                    num_rows,
                    TOKEN_TILES,
                    K,
                    GROUP,
                    HALF_PARAMS,
                    FP8,
                )
                _copy_inputs(inputs.index(free), x_ptr, ahead_tile, ahead_step, num_tokens, TOKEN_TILES, K, BLOCK_M)
            async_copy.commit_group()
            v00, v01, v10, v11 = _pairs(words.index(slot), params.index(slot), exponent, 1, FP8, GROUP, dtype)
            held = operand(v00, v01, v10, v11, dtype, left)
            running = warpgroup_mma(held, x.slice(64, 64, 0), acc, is_async=True)
            acc, weight = warpgroup_mma_wait(1, deps=[running, weight])
            free = slot
            slot = gl.where(slot == STAGES - 1, 0, slot + 1)
            ahead_tile, ahead_step = following(ahead_tile, ahead_step, STEPS)
            w00, w01, w10, w11 = _pairs(words.index(slot), params.index(slot), exponent, 0, FP8, GROUP, dtype)
        acc, held = warpgroup_mma_wait(0, deps=[acc, held])
        _finish(
            acc,
            tile,
            program,
            num_programs,
            total,
            out_ptr,
            partial_ptr,
            arrivals_ptr,
            scale_ptr,
            bias_ptr,
            num_tokens,
            num_rows,
            TOKEN_TILES,
            STEPS,
            BLOCK_M,
            FP8 and GROUP == 0,
            1.0 if FP8 else int4_factor(dtype),
            BIAS,
        )
        unit = last
    async_copy.wait_group(0)


@gluon.jit
def _finish(
    acc,
    tile,
    program,
    num_programs,
    total,
    out_ptr,
    partial_ptr,
    arrivals_ptr,
    scale_ptr,
    bias_ptr,
    num_tokens,
    num_rows,
    TOKEN_TILES: gl.constexpr,
    STEPS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    SCALE: gl.constexpr,
    FACTOR: gl.constexpr,
    BIAS: gl.constexpr,
):
    """Store a tile. Of one that several programs share, leave this one's part to the program that has its first step.

    That one ends with the tile and the others begin with it, so it hardly ever waits.
    """
    layout: gl.constexpr = acc.type.layout
    PART: gl.constexpr = 128 * BLOCK_M
    # a zero that the compiler does not know: addresses are made here, not kept in registers throughout the loop
    zero = gl.inline_asm_elementwise("mov.b32 $0, 0; // $1", "=r,r", [tile], dtype=gl.int32, is_pure=True, pack=1)
    first = program_of(tile * STEPS, num_programs, total)
    last = program_of(tile * STEPS + STEPS - 1, num_programs, total)
    row = zero + gl.arange(0, 128, gl.SliceLayout(1, layout))
    column = gl.arange(0, BLOCK_M, gl.SliceLayout(0, layout))
    within = row[:, None] * BLOCK_M + column[None, :]
    if program != first:  # it begins with this tile: one part is all that it has
        gl.store(partial_ptr + program * PART + within, acc)
        gl.thread_barrier()
        gl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel")
    else:
        if last > first:
            AT_ONCE: gl.constexpr = max(1, min(4, 64 // BLOCK_M))  # loads in flight, within the registers at hand
            num_arrived = gl.atomic_add(arrivals_ptr + tile, 0, sem="acq_rel")
            while num_arrived < last - first:
                num_arrived = gl.atomic_add(arrivals_ptr + tile, 0, sem="acq_rel")
            gl.thread_barrier()
            for part in range(first + 1, last + 1, AT_ONCE):
                for i in gl.static_range(AT_ONCE):
                    there = gl.full([128, BLOCK_M], part + i <= last, gl.int1, layout)
                    pointers = partial_ptr + (part + i) * PART + within
                    acc += gl.load(pointers, mask=there, other=0.0, cache_modifier=".cg")
            gl.store(arrivals_ptr + tile, 0)  # ready for the next call
        result = acc.reshape([8, 2, 8, BLOCK_M]).permute([0, 2, 1, 3]).reshape([128, BLOCK_M])
        linear: gl.constexpr = output_layout(128, BLOCK_M, gl.num_warps())
        result = gl.convert_layout(result, linear)
        n = tile // TOKEN_TILES * 128 + gl.arange(0, 128, gl.SliceLayout(1, linear))
        m = zero + tile % TOKEN_TILES * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(0, linear))
        if FACTOR != 1:
            result *= FACTOR
        if SCALE:
            result *= gl.load(scale_ptr + n, mask=n < num_rows, other=0.0)[:, None]
        if BIAS:
            result += gl.load(bias_ptr + n, mask=n < num_rows, other=0.0).to(gl.float32)[:, None]
        mask = (n < num_rows)[:, None] & (m < num_tokens)[None, :]
        gl.store(out_ptr + (m * num_rows)[None, :] + n[:, None], result.to(out_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True, slots=True)
class StreamTiling:
    """How :func:`stream` cuts the work: tokens of a tile, steps on their way, warps of a program, programs that share
    a processor, and programs in all."""

    block_m: int
    num_stages: int
    num_warps: int
    resident: int
    num_programs: int

    @property
    def max_registers(self) -> int:
        """Of a thread, so that ``resident`` programs fit."""
        return min(255, 65536 // (32 * self.num_warps * self.resident) // 8 * 8)


@dataclass(frozen=True, slots=True)
class StreamedWeight:
    """A matrix as :func:`stream` reads it; made by :mod:`octavo_kernels.hopper_linear`.

    Attributes:
        words: int32 [ceil(out / 128), in / 128, 2, 2, 512], 4-bit values; or float8_e4m3fn [out, in], of which every 64
            inputs are in the order of ``fp8_order``.
        params: int32 [ceil(out / 128), in / group_size, 2, 2, 32]: of each output scale and zero point as
            ``pack_parameters`` has them, or for FP8 the scale twice; None: FP8 with ``scales``.
        group_size: inputs with parameters of their own: 64 or a multiple of 128; 0: FP8 with ``scales``.
        scales: float32 [out], by which sums are multiplied, or None.
    """

    words: Tensor
    params: Tensor | None
    group_size: int
    scales: Tensor | None
    out_features: int
    in_features: int

    @property
    def is_fp8(self) -> bool:
        return self.words.dtype == torch.float8_e4m3fn

    def num_tiles(self, num_tokens: int, block_m: int) -> int:
        return triton.cdiv(self.out_features, TILE) * triton.cdiv(num_tokens, block_m)

    def num_bytes(self) -> int:
        tensors = (self.words, self.params, self.scales)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def stream(x: Tensor, weight: StreamedWeight, bias: Tensor | None, arrivals: Tensor, tile: StreamTiling) -> Tensor:
    """x [num_tokens, in_features] -> [num_tokens, out_features].

    ``arrivals`` int32 are zeros, at least one for each tile, and zeros again afterwards.
    """
    num_tokens, in_features = x.shape
    device = describe(x.device)
    x = x.contiguous()
    out = torch.empty((num_tokens, weight.out_features), dtype=x.dtype, device=x.device)
    num_tiles = weight.num_tiles(num_tokens, tile.block_m)
    num_programs = min(tile.num_programs, num_tiles * (in_features // STEP))
    partial = torch.empty((num_programs, TILE, tile.block_m), dtype=torch.float32, device=x.device)
    words = weight.words.view(torch.int32)
    _stream[(num_programs,)](
        out,
        partial,
        arrivals,
        x,
        words,
        words if weight.params is None else weight.params,
        partial if weight.scales is None else weight.scales,
        x if bias is None else bias,
        num_tokens,
        weight.out_features,
        num_tiles,
        fp8_exponent(x.dtype),
        K=in_features,
        GROUP=weight.group_size,
        TOKEN_TILES=triton.cdiv(num_tokens, tile.block_m),
        BLOCK_M=tile.block_m,
        STAGES=tile.num_stages,
        FP8=weight.is_fp8,
        BIAS=bias is not None,
        PDL=device.dependent_launch,
        num_warps=tile.num_warps,
        maxnreg=tile.max_registers,
        **device.options,
    )
    return out


def fp8_exponent(dtype: torch.dtype) -> int:
    """What e4m3 lacks to the exponent of ``dtype``, as a pair of its values: 2 ** 120 for bfloat16, 2 ** 8."""
    return 0x7B807B80 if dtype == torch.bfloat16 else 0x5C005C00
