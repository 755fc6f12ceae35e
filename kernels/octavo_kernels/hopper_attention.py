"""Paged attention for many queries on Hopper GPUs: one warp loads, two groups of four warps compute.

A program takes a tile of queries as in ``attention.py``, 128 rows of (token, head of the group), and each group of
warps half of them, so that one multiplies while the other is busy with its softmax. Within a group a tile's values are
multiplied beside the softmax of the next tile's scores (FlashAttention-3, Shah et al. 2024). The loading warp has the
tensor memory accelerator copy blocks of the cache, wherever they lie, into shared memory. Tiles go from the newest
tokens to the oldest: those that the causal mask cuts come first, and the rest needs no mask.

Warps with tasks of their own cannot be said in Triton's language, so this is written in Gluon, which comes with Triton.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octavo_kernels.attention import LOG2_E, Section
from octavo_kernels.launch import describe

BLOCK_M = 128  # rows of a program
BLOCK_N = 128  # tokens of the context that are multiplied at a time
STAGES = 2  # tiles of keys and of values in shared memory
# Three groups of 128 threads start with as many registers each as there are, and then share them out anew: the last
# group holds the loading warp and needs few.
MAX_REGISTERS = 168
COMPUTING_REGISTERS = 232
LOADING_REGISTERS = 40


@gluon.constexpr_function
def plain_layout():
    """Of rows whose neighbouring elements lie together, as they are stored."""
    return gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])


@gluon.jit
def allocate_ring(
    dtype: gl.constexpr, BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr, READERS: gl.constexpr
):
    """Shared memory for tiles of the cache on their way: keys and values [stage] x [BLOCK_N, HEAD_DIM], and of each
    stage of both whether it is full and whether all READERS have done with it."""
    SHARED: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    keys = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_DIM], SHARED)
    values = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_DIM], SHARED)
    key_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    key_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    value_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    value_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(key_full.index(stage), count=1)
        mbarrier.init(key_empty.index(stage), count=READERS)
        mbarrier.init(value_full.index(stage), count=1)
        mbarrier.init(value_empty.index(stage), count=READERS)
    return keys, values, key_full, key_empty, value_full, value_empty


@gluon.jit
def load_blocks(
    kv_descriptor, table_ptr, ring, num_tiles, last_block, head, NUM_KV_HEADS: gl.constexpr, BLOCK_SIZE: gl.constexpr
):
    """The loading warp: ``num_tiles`` tiles of the cache, the newest first, into ``ring`` (see :func:`allocate_ring`).

    A tile lies in shared memory as [half of the head, BLOCK_N, 64], so a block's part of it is two contiguous pieces.
    """
    keys, values, key_full, key_empty, value_full, value_empty = ring
    STAGES: gl.constexpr = keys.shape[0]
    BLOCK_N: gl.constexpr = keys.shape[1]
    HEAD_DIM: gl.constexpr = keys.shape[2]
    blocks: gl.constexpr = BLOCK_N // BLOCK_SIZE
    halves: gl.constexpr = HEAD_DIM // 64  # 64 elements are 128 bytes, as wide as shared memory is swizzled
    SHARED: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    key_blocks = keys._reinterpret(keys.dtype, [STAGES * halves * blocks, BLOCK_SIZE, 64], SHARED)
    value_blocks = values._reinterpret(values.dtype, [STAGES * halves * blocks, BLOCK_SIZE, 64], SHARED)
    for i in range(num_tiles):
        stage = i % STAGES
        parity = (i // STAGES) & 1
        first_block = (num_tiles - 1 - i) * blocks
        mbarrier.wait(key_empty.index(stage), parity ^ 1)
        mbarrier.expect(key_full.index(stage), BLOCK_N * HEAD_DIM * 2)
        for index in gl.static_range(blocks):
            block = gl.load(table_ptr + gl.minimum(first_block + index, last_block))
            row = (block * (2 * NUM_KV_HEADS) + head) * BLOCK_SIZE
            for half in gl.static_range(halves):
                target = key_blocks.index((stage * halves + half) * blocks + index)
                tma.async_copy_global_to_shared(kv_descriptor, [row, half * 64], key_full.index(stage), target)
        mbarrier.wait(value_empty.index(stage), parity ^ 1)
        mbarrier.expect(value_full.index(stage), BLOCK_N * HEAD_DIM * 2)
        for index in gl.static_range(blocks):
            block = gl.load(table_ptr + gl.minimum(first_block + index, last_block))
            row = (block * (2 * NUM_KV_HEADS) + NUM_KV_HEADS + head) * BLOCK_SIZE
            for half in gl.static_range(halves):
                target = value_blocks.index((stage * halves + half) * blocks + index)
                tma.async_copy_global_to_shared(kv_descriptor, [row, half * 64], value_full.index(stage), target)


@gluon.jit
def clear_beyond(values, first, seq_len):
    """Zeros for the values [BLOCK_N, HEAD_DIM] of tokens from ``first`` on that are beyond the sequence's end: they may
    be no number, and 0 times that is none either. A fence and a barrier are to follow."""
    PLAIN: gl.constexpr = plain_layout()
    there = first + gl.arange(0, values.shape[0], layout=gl.SliceLayout(1, PLAIN)) < seq_len
    value = values.load(PLAIN)
    values.store(gl.where(there[:, None], value, gl.zeros_like(value)))


@gluon.jit
def _softmax_step(scores, maximum, total, scale, position, first, MASKED: gl.constexpr, MMA: gl.constexpr):
    """A step of the online softmax: weights, and what the sums so far are multiplied by."""
    if MASKED:
        other = first + gl.arange(0, scores.shape[1], layout=gl.SliceLayout(0, MMA))
        scores = gl.where(other[None, :] <= position[:, None], scores, float("-inf"))
    new_maximum = gl.maximum(maximum, gl.max(scores, axis=1))
    if MASKED:  # a row that has seen nothing yet stays at -inf, and -inf - -inf is no number
        finite = gl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    else:
        finite = new_maximum
    weights = gl.exp2(scores * scale - (finite * scale)[:, None])
    decay = gl.exp2((maximum - finite) * scale)
    return weights, new_maximum, total * decay + gl.sum(weights, axis=1), decay


@gluon.jit
def _attend_tiles(
    accumulator,
    maximum,
    total,
    weights,
    query,
    ring,
    begin,
    end,
    num_tiles,
    position,
    scale,
    MASKED: gl.constexpr,
    MMA: gl.constexpr,
):
    """Tiles [begin, end) in the order of loading; ``weights`` are the tile's before, whose values are added here."""
    keys, values, key_full, key_empty, value_full, value_empty = ring
    ROWS: gl.constexpr = query.shape[0]
    STAGES: gl.constexpr = keys.shape[0]
    BLOCK_N: gl.constexpr = keys.shape[1]
    operand: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    for i in range(begin, end):
        stage = i % STAGES
        before = (i - 1) % STAGES
        mbarrier.wait(key_full.index(stage), (i // STAGES) & 1)
        empty = gl.zeros([ROWS, BLOCK_N], gl.float32, MMA)
        key = keys.index(stage).permute((1, 0))
        scores = warpgroup_mma(query, key, empty, use_acc=False, is_async=True)
        mbarrier.wait(value_full.index(before), ((i - 1) // STAGES) & 1)
        accumulator = warpgroup_mma(weights, values.index(before), accumulator, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[scores])
        mbarrier.arrive(key_empty.index(stage))
        first = (num_tiles - 1 - i) * BLOCK_N
        wide, maximum, total, decay = _softmax_step(scores, maximum, total, scale, position, first, MASKED, MMA)
        accumulator = warpgroup_mma_wait(0, deps=[accumulator])
        mbarrier.arrive(value_empty.index(before))
        accumulator = accumulator * decay[:, None]
        weights = gl.convert_layout(wide.to(query.dtype), operand)
    return accumulator, maximum, total, weights


@gluon.jit
def _find_row(tile, base, query_start_ptr, first_row, num_rows, TOKENS: gl.constexpr):
    """The row whose queries a tile of TOKENS has; a row has one tile more than it fills.

    Looks at many rows at a time: to halve them would be to wait for memory again and again.
    """
    AT_ONCE: gl.constexpr = 128
    count = 0
    for start in range(0, num_rows, AT_ONCE):
        row = start + gl.arange(0, AT_ONCE, layout=gl.BlockedLayout([1], [32], [4], [0]))
        inside = row < num_rows
        begins = (gl.load(query_start_ptr + first_row + row, mask=inside, other=0) - base) // TOKENS + row
        count += gl.sum((inside & (begins <= tile)).to(gl.int32), axis=0)
    return first_row + count - 1


@gluon.jit
def _rows_of_part(
    first_token, first_query, query_len, head, PART: gl.constexpr, NUM_KV_HEADS: gl.constexpr, GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr,
):  # fmt: skip
    """Where a group's half of the rows lies among queries and outputs, [BLOCK_M / 2, HEAD_DIM], and which there are."""
    LAYOUT: gl.constexpr = plain_layout()
    m = PART * (BLOCK_M // 2) + gl.arange(0, BLOCK_M // 2, layout=gl.SliceLayout(1, LAYOUT))
    d = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, LAYOUT))
    token = first_query + m // GROUP
    valid = (m < BLOCK_M // GROUP * GROUP) & (token < query_len)
    offsets = ((first_token + token).to(gl.int64) * (NUM_KV_HEADS * GROUP) + head * GROUP + m % GROUP) * HEAD_DIM
    return offsets[:, None] + d[None, :], valid[:, None]


@gluon.jit
def _attend_rows(
    out_ptr,
    query_ptr,
    queries,
    ring,
    num_tiles,
    first_token,
    first_query,
    query_len,
    seq_len,
    head,
    scale,
    value_scale,
    PART: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
):
    """One group's half of the rows: the PART-th."""
    keys, values, key_full, key_empty, value_full, _ = ring
    STAGES: gl.constexpr = keys.shape[0]
    BLOCK_N: gl.constexpr = keys.shape[1]
    HEAD_DIM: gl.constexpr = keys.shape[2]
    rows: gl.constexpr = queries.shape[1]
    BLOCK_M: gl.constexpr = 2 * rows
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    query = queries.index(PART)
    offsets, valid = _rows_of_part(
        first_token, first_query, query_len, head, PART, NUM_KV_HEADS, GROUP, HEAD_DIM, BLOCK_M
    )
    query.store(gl.load(query_ptr + offsets, mask=valid, other=0.0))
    fence_async_shared()
    gl.thread_barrier()
    m = PART * rows + gl.arange(0, rows, layout=gl.SliceLayout(1, MMA))
    position = seq_len - query_len + first_query + m // GROUP
    full_tiles = (seq_len - query_len + first_query + 1) // BLOCK_N  # of these every row sees everything
    num_masked = num_tiles - full_tiles

    mbarrier.wait(key_full.index(0), 0)
    empty = gl.zeros([rows, BLOCK_N], gl.float32, MMA)
    scores = warpgroup_mma(query, keys.index(0).permute((1, 0)), empty, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(key_empty.index(0))
    maximum = gl.full([rows], float("-inf"), gl.float32, gl.SliceLayout(1, MMA))
    total = gl.zeros([rows], gl.float32, gl.SliceLayout(1, MMA))
    first = (num_tiles - 1) * BLOCK_N
    wide, maximum, total, _ = _softmax_step(scores, maximum, total, scale, position, first, True, MMA)
    weights = gl.convert_layout(wide.to(query.dtype), operand)
    accumulator = gl.zeros([rows, HEAD_DIM], gl.float32, MMA)
    if first + BLOCK_N > seq_len:
        mbarrier.wait(value_full.index(0), 0)
        clear_beyond(values.index(0), first, seq_len)  # both groups write the same
        fence_async_shared()
        gl.thread_barrier()

    accumulator, maximum, total, weights = _attend_tiles(
        accumulator, maximum, total, weights, query, ring, 1, num_masked, num_tiles, position, scale, True, MMA
    )
    accumulator, maximum, total, weights = _attend_tiles(
        accumulator, maximum, total, weights, query, ring, gl.maximum(num_masked, 1), num_tiles, num_tiles, position,
        scale, False, MMA,
    )  # fmt: skip
    last = (num_tiles - 1) % STAGES
    mbarrier.wait(value_full.index(last), ((num_tiles - 1) // STAGES) & 1)
    accumulator = warpgroup_mma(weights, values.index(last), accumulator, is_async=True)
    accumulator = warpgroup_mma_wait(0, deps=[accumulator])

    result = (accumulator * (value_scale / total)[:, None]).to(out_ptr.dtype.element_ty)
    offsets, valid = _rows_of_part(
        first_token, first_query, query_len, head, PART, NUM_KV_HEADS, GROUP, HEAD_DIM, BLOCK_M
    )
    gl.store(out_ptr + offsets, gl.convert_layout(result, plain_layout()), mask=valid)


@gluon.jit(
    do_not_specialize=["first_row", "num_rows", "block_tables_stride"],
    do_not_specialize_on_alignment=["query_start_ptr", "seq_lens_ptr"],  # pieces of a step's numbers
)
def _prefill_attention(
    out_ptr,
    query_ptr,
    kv_descriptor,
    block_tables_ptr,
    query_start_ptr,
    seq_lens_ptr,
    block_tables_stride,
    first_row,
    num_rows,
    scale,
    value_scale,
    NUM_KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    COMPUTING_REGISTERS: gl.constexpr,
    LOADING_REGISTERS: gl.constexpr,
    PDL: gl.constexpr,
):
    """Program (key/value head, tile of queries)."""
    tokens_per_tile: gl.constexpr = BLOCK_M // GROUP
    head = gl.program_id(0)
    tile = gl.num_programs(1) - 1 - gl.program_id(1)  # the longest contexts first
    if PDL:
        gdc_launch_dependents()
        gdc_wait()

    base = gl.load(query_start_ptr + first_row)
    row = _find_row(tile, base, query_start_ptr, first_row, num_rows, tokens_per_tile)
    first_token = gl.load(query_start_ptr + row)
    local_tile = tile - ((first_token - base) // tokens_per_tile + row - first_row)
    query_len = gl.load(query_start_ptr + row + 1) - first_token
    seq_len = gl.load(seq_lens_ptr + row)
    first_query = local_tile * tokens_per_tile
    if first_query >= query_len:
        return
    context_end = gl.minimum(seq_len, seq_len - query_len + first_query + tokens_per_tile)

    dtype: gl.constexpr = query_ptr.dtype.element_ty
    if context_end <= 0:  # a row with no context, such as a graph's padding, gives zeros
        for part in gl.static_range(2):
            offsets, valid = _rows_of_part(
                first_token, first_query, query_len, head, part, NUM_KV_HEADS, GROUP, HEAD_DIM, BLOCK_M
            )
            gl.store(out_ptr + offsets, gl.zeros_like(offsets).to(dtype), mask=valid)
        return

    SHARED: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    queries = gl.allocate_shared_memory(dtype, [2, BLOCK_M // 2, HEAD_DIM], SHARED)
    ring = allocate_ring(dtype, BLOCK_N, HEAD_DIM, STAGES, 2)
    num_tiles = gl.cdiv(context_end, BLOCK_N)
    last_block = (seq_len - 1) // BLOCK_SIZE
    table_ptr = block_tables_ptr + row.to(gl.int64) * block_tables_stride
    gl.warp_specialize(
        [
            (_attend_rows, (
                out_ptr, query_ptr, queries, ring, num_tiles, first_token, first_query, query_len, seq_len, head, scale,
                value_scale, 0, NUM_KV_HEADS, GROUP,
            )),
            (_attend_rows, (
                out_ptr, query_ptr, queries, ring, num_tiles, first_token, first_query, query_len, seq_len, head, scale,
                value_scale, 1, NUM_KV_HEADS, GROUP,
            )),
            (load_blocks, (kv_descriptor, table_ptr, ring, num_tiles, last_block, head, NUM_KV_HEADS, BLOCK_SIZE)),
        ],
        [4, 1],
        [COMPUTING_REGISTERS, LOADING_REGISTERS],
    )  # fmt: skip


def prefill_attention(
    out: Tensor,
    query: Tensor,
    kv: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    section: Section,
    *,
    scale: float,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> None:
    """What ``paged_attention`` computes for one section of a batch, into ``out`` [num_tokens, num_heads * head_dim].

    The arguments are those of ``paged_attention``, with heads of 128 in bfloat16 or float16, a cache of the same
    dtype and a section for which ``serves`` holds.
    """
    num_heads, head_dim = query.shape[1:]
    num_kv_heads, block_size = kv.shape[2], kv.shape[3]
    device = describe(query.device)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    _prefill_attention[(num_kv_heads, section.num_tiles)](
        out,
        query,
        TensorDescriptor.from_tensor(kv.view(-1, head_dim), [block_size, 64], layout),
        block_tables,
        query_start,
        seq_lens,
        block_tables.stride(0),
        section.first_row,
        section.num_rows,
        scale * key_scale * LOG2_E,
        value_scale,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=num_heads // num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        STAGES=STAGES,
        COMPUTING_REGISTERS=COMPUTING_REGISTERS,
        LOADING_REGISTERS=LOADING_REGISTERS,
        PDL=device.dependent_launch,
        num_warps=4,
        maxnreg=MAX_REGISTERS,
        **device.options,
    )


def serves(section: Section) -> bool:
    """Whether ``prefill_attention`` computes this section: tiles of full height, several to a row, without splits."""
    return section.tiling.block_m == BLOCK_M and section.num_splits == 1 and not section.one_tile
