"""Paged attention for few queries on Hopper GPUs: one warp loads, one group of four warps computes.

What ``attention.py`` computes for rows whose queries, times the heads of a group, fit one tile: decodes and draft
verification. That is reading the cache, and at the device's limit of power what a byte costs counts as much as how many
there are. The tensor memory accelerator brings blocks to shared memory for less energy than threads do, and from there
the matrix units read them: products have the context on their left, 64 tokens or dimensions high, and the few queries
on their right.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octavo_kernels import attention
from octavo_kernels.attention import LOG2_E, Section, Tiling
from octavo_kernels.hopper_attention import allocate_ring, clear_beyond, load_blocks
from octavo_kernels.launch import describe, power_of_two

BLOCK_N = 64
"""Tokens of the context that are multiplied at a time."""

MAX_ROWS = 32
"""Queries times heads of a group; with more, registers spill."""

THREADS = 256
"""Of a program: a group that computes, and one that holds the loading warp."""

LOADING_REGISTERS = 24
"""All threads start with as many registers, then those of the loading warp's group leave the others what they can."""


@gluon.constexpr_function
def _dimensions_first():
    """The layout in which rows [HEAD_DIM, ROWS] are read and stored: neighbouring dimensions of a head lie together."""
    return gl.BlockedLayout([8, 1], [16, 2], [1, 4], [0, 1])


@gluon.jit
def _attend_context(
    queries,
    shared_weights,
    ring,
    num_tiles,
    begin,
    seq_len,
    position,
    maximum,
    scale,
    MMA: gl.constexpr,
):
    """The softmax over ``num_tiles`` tiles from token ``begin`` on, the newest first: sums of values
    [head_dim, rows], the rows' maxima and sums of weights."""
    keys, values, key_full, key_empty, value_full, value_empty = ring
    ROWS: gl.constexpr = queries.shape[0]
    STAGES: gl.constexpr = keys.shape[0]
    BLOCK_N: gl.constexpr = keys.shape[1]
    HEAD_DIM: gl.constexpr = keys.shape[2]
    query = queries.permute((1, 0))
    weights_of_rows = shared_weights.permute((1, 0))
    accumulator = warpgroup_mma_init(gl.zeros([HEAD_DIM, ROWS], gl.float32, MMA))
    totals = gl.zeros([BLOCK_N, ROWS], gl.float32, MMA)
    for i in range(num_tiles):
        stage = i % STAGES
        parity = (i // STAGES) & 1
        mbarrier.wait(key_full.index(stage), parity)
        empty = gl.zeros([BLOCK_N, ROWS], gl.float32, MMA)
        scores = warpgroup_mma(keys.index(stage), query, empty, use_acc=False, is_async=True)
        scores, accumulator = warpgroup_mma_wait(0, deps=[scores, accumulator])
        mbarrier.arrive(key_empty.index(stage))
        mbarrier.arrive(value_empty.index((i + STAGES - 1) % STAGES), pred=i > 0)
        first = begin + (num_tiles - 1 - i) * BLOCK_N
        other = first + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, MMA))
        scores = gl.where(other[:, None] <= position[None, :], scores, float("-inf"))
        new_maximum = gl.maximum(maximum, gl.max(scores, axis=0))
        finite = gl.where(new_maximum == float("-inf"), 0.0, new_maximum)  # -inf - -inf is no number
        weights = gl.exp2(scores * scale - (finite * scale)[None, :])
        decay = gl.exp2((maximum - finite) * scale)
        totals = totals * decay[None, :] + weights
        accumulator = accumulator * decay[None, :]
        maximum = new_maximum
        # All warps are done with the weights before: they have met for the maximum since.
        weights_of_rows.store(weights.to(queries.dtype))
        mbarrier.wait(value_full.index(stage), parity)
        if first + BLOCK_N > seq_len:
            clear_beyond(values.index(stage), first, seq_len)
        fence_async_shared()
        gl.thread_barrier()
        value = values.index(stage).permute((1, 0))
        accumulator = warpgroup_mma(value, weights_of_rows, accumulator, is_async=True)
    accumulator = warpgroup_mma_wait(0, deps=[accumulator])
    return accumulator, maximum, gl.sum(totals, axis=0)


@gluon.jit
def _are_taken(m, query_len, ROWS: gl.constexpr, GROUP: gl.constexpr):
    """Which of the rows ``m`` (query, head of the group) there are."""
    return (m // GROUP < query_len) & (m < ROWS // GROUP * GROUP)


@gluon.jit
def _places(first_token, query_len, head, ROWS: gl.constexpr, NUM_KV_HEADS: gl.constexpr, GROUP: gl.constexpr,
            HEAD_DIM: gl.constexpr, LAYOUT: gl.constexpr):  # fmt: skip
    """Where rows (query, head of the group) lie among queries and outputs, [HEAD_DIM, ROWS], and which there are."""
    d = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(1, LAYOUT))
    m = gl.arange(0, ROWS, layout=gl.SliceLayout(0, LAYOUT))
    valid = _are_taken(m, query_len, ROWS, GROUP)
    offsets = ((first_token + m // GROUP).to(gl.int64) * (NUM_KV_HEADS * GROUP) + head * GROUP + m % GROUP) * HEAD_DIM
    return offsets[None, :] + d[:, None], valid[None, :]


@gluon.jit
def _join_parts(
    partial_ptr,
    statistics_ptr,
    arrival_ptr,
    sums,
    maximum,
    total,
    valid,
    split,
    num_active,
    STEP: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """Leave this split's part with the others': ``sums`` [head_dim, rows], and the rows' ``maximum`` and ``total``.

    The last to come adds all of them up in order: whether it was, sums and totals.
    """
    AT_ONCE: gl.constexpr = 4
    HEAD_DIM: gl.constexpr = sums.shape[0]
    ROWS: gl.constexpr = sums.shape[1]
    m = gl.arange(0, ROWS, layout=gl.SliceLayout(0, LAYOUT))
    d = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(1, LAYOUT))
    within = m[None, :] * HEAD_DIM + d[:, None]
    partial = partial_ptr + split * (STEP * ROWS * HEAD_DIM)
    statistics = statistics_ptr + split * (STEP * 2 * ROWS)
    gl.store(partial + within, sums, mask=valid)
    gl.store(statistics + m, maximum)
    gl.store(statistics + ROWS + m, total)
    gl.thread_barrier()  # all threads' stores before the one thread that announces them
    is_last = gl.atomic_add(arrival_ptr, 1, sem="acq_rel") == num_active - 1
    gl.thread_barrier()
    if is_last:
        sums = gl.zeros([HEAD_DIM, ROWS], gl.float32, LAYOUT)
        total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(0, LAYOUT))
        maximum = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(0, LAYOUT))
        for first in range(0, num_active, AT_ONCE):
            for step in gl.static_range(AT_ONCE):  # so many loads in flight
                index = first + step
                there = index < num_active
                partial = partial_ptr + index * (STEP * ROWS * HEAD_DIM)
                statistics = statistics_ptr + index * (STEP * 2 * ROWS)
                part_maximum = gl.load(statistics + m, mask=there, other=float("-inf"), cache_modifier=".cg")
                part_total = gl.load(statistics + ROWS + m, mask=there, other=0.0, cache_modifier=".cg")
                part = gl.load(partial + within, mask=valid & there, other=0.0, cache_modifier=".cg")
                new_maximum = gl.maximum(maximum, part_maximum)
                finite = gl.where(new_maximum == float("-inf"), 0.0, new_maximum)
                decay = gl.exp2(maximum - finite)
                part_decay = gl.exp2(part_maximum - finite)
                total = total * decay + part_total * part_decay
                sums = sums * decay[None, :] + part * part_decay[None, :]
                maximum = new_maximum
        gl.store(arrival_ptr, 0)  # ready for the next layer
    return is_last, sums, total


@gluon.jit
def _attend_rows(
    out_ptr,
    partial_ptr,
    statistics_ptr,
    arrival_ptr,
    query_ptr,
    queries,
    shared_weights,
    ring,
    num_tiles,
    begin,
    first_token,
    query_len,
    seq_len,
    head,
    split,
    num_active,
    scale,
    value_scale,
    NUM_KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    PARTIAL_STEP: gl.constexpr,
    SPLIT: gl.constexpr,
):
    """The computing group. ``partial_ptr`` and ``statistics_ptr`` point to the first split's."""
    ROWS: gl.constexpr = queries.shape[0]
    HEAD_DIM: gl.constexpr = queries.shape[1]
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, ROWS, 16])
    STORE: gl.constexpr = _dimensions_first()
    offsets, valid = _places(first_token, query_len, head, ROWS, NUM_KV_HEADS, GROUP, HEAD_DIM, STORE)
    queries.permute((1, 0)).store(gl.load(query_ptr + offsets, mask=valid, other=0.0))
    fence_async_shared()
    gl.thread_barrier()
    m = gl.arange(0, ROWS, layout=gl.SliceLayout(0, MMA))
    position = seq_len - query_len + m // GROUP
    # Rows that are nobody's get weights of zero: products with those take less power.
    maximum = gl.where(_are_taken(m, query_len, ROWS, GROUP), float("-inf"), 1e30)
    accumulator, maximum, total = _attend_context(
        queries, shared_weights, ring, num_tiles, begin, seq_len, position, maximum, scale, MMA
    )
    sums = gl.convert_layout(accumulator, STORE)
    total = gl.convert_layout(total, gl.SliceLayout(0, STORE))
    maximum = gl.convert_layout(maximum, gl.SliceLayout(0, STORE)) * scale
    writes = num_active == 1
    if SPLIT and num_active > 1:
        writes, sums, total = _join_parts(
            partial_ptr, statistics_ptr, arrival_ptr, sums, maximum, total, valid, split, num_active, PARTIAL_STEP,
            STORE,
        )  # fmt: skip
    if writes:
        result = sums * (value_scale / gl.where(total > 0.0, total, 1.0))[None, :]
        gl.store(out_ptr + offsets, result.to(out_ptr.dtype.element_ty), mask=valid)


@gluon.jit(
    do_not_specialize=["first_row", "num_splits", "block_tables_stride"],
    do_not_specialize_on_alignment=["query_start_ptr", "seq_lens_ptr"],  # pieces of a step's numbers
)
def _decode_attention(
    out_ptr,
    partial_ptr,
    statistics_ptr,
    arrivals_ptr,
    item_rows_ptr,
    first_items_ptr,
    query_ptr,
    kv_descriptor,
    block_tables_ptr,
    query_start_ptr,
    seq_lens_ptr,
    block_tables_stride,
    first_row,
    scale,
    value_scale,
    num_splits,
    NUM_KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    SPLIT: gl.constexpr,
    ITEMS: gl.constexpr,
    STAGES: gl.constexpr,
    LOADING_REGISTERS: gl.constexpr,
    PDL: gl.constexpr,
):
    """Program (key/value head, row or item, split of the context), as in ``_paged_attention`` with ONE_TILE."""
    blocks: gl.constexpr = BLOCK_N // BLOCK_SIZE
    head = gl.program_id(0)
    tile = gl.num_programs(1) - 1 - gl.program_id(1)  # the longest contexts first
    split = gl.program_id(2)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    first_partial = (tile * NUM_KV_HEADS + head).to(gl.int64) * num_splits
    PARTIAL_STEP: gl.constexpr = NUM_KV_HEADS if ITEMS else 1
    if ITEMS:
        item = tile
        tile = gl.load(item_rows_ptr + item)
        if tile < 0:
            return
        first_item = gl.load(first_items_ptr + tile)
        num_splits = gl.load(first_items_ptr + tile + 1) - first_item
        split = item - first_item
        first_partial = (first_item * NUM_KV_HEADS + head).to(gl.int64)
    row = first_row + tile
    first_token = gl.load(query_start_ptr + row)
    query_len = gl.load(query_start_ptr + row + 1) - first_token
    seq_len = gl.load(seq_lens_ptr + row)
    num_tiles = gl.cdiv(seq_len, BLOCK_N)
    tiles_per_split = gl.maximum(gl.cdiv(num_tiles, num_splits), 1)
    num_active = gl.maximum(gl.cdiv(num_tiles, tiles_per_split), 1)
    if (query_len <= 0) | (split >= num_active):
        return
    dtype: gl.constexpr = query_ptr.dtype.element_ty
    if seq_len <= 0:  # a row with no context, such as a graph's padding, gives zeros
        STORE: gl.constexpr = _dimensions_first()
        offsets, valid = _places(first_token, query_len, head, ROWS, NUM_KV_HEADS, GROUP, HEAD_DIM, STORE)
        gl.store(out_ptr + offsets, gl.zeros_like(offsets).to(dtype), mask=valid)
        return
    first_tile = split * tiles_per_split
    num_tiles = gl.minimum(tiles_per_split, num_tiles - first_tile)

    SHARED: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    queries = gl.allocate_shared_memory(dtype, [ROWS, HEAD_DIM], SHARED)
    shared_weights = gl.allocate_shared_memory(dtype, [ROWS, BLOCK_N], SHARED)
    ring = allocate_ring(dtype, BLOCK_N, HEAD_DIM, STAGES, 1)

    last_block = (seq_len - 1) // BLOCK_SIZE - first_tile * blocks
    table_ptr = block_tables_ptr + row.to(gl.int64) * block_tables_stride + first_tile * blocks
    gl.warp_specialize(
        [
            (_attend_rows, (
                out_ptr, partial_ptr + first_partial * (ROWS * HEAD_DIM),
                statistics_ptr + first_partial * (2 * ROWS), arrivals_ptr + tile * NUM_KV_HEADS + head, query_ptr,
                queries, shared_weights, ring, num_tiles, first_tile * BLOCK_N, first_token, query_len, seq_len, head,
                split, num_active, scale, value_scale, NUM_KV_HEADS, GROUP, PARTIAL_STEP, SPLIT,
            )),
            (load_blocks, (kv_descriptor, table_ptr, ring, num_tiles, last_block, head, NUM_KV_HEADS, BLOCK_SIZE)),
        ],
        [1],
        [LOADING_REGISTERS],
    )  # fmt: skip


def decode_attention(
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
    tile = section.tiling
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    _decode_attention[(num_kv_heads, section.num_tiles, section.num_splits)](
        out,
        out if section.partial is None else section.partial,
        out if section.statistics is None else section.statistics,
        out if section.arrivals is None else section.arrivals,
        out if section.items is None else section.items.rows,
        out if section.items is None else section.items.first,
        query,
        TensorDescriptor.from_tensor(kv.view(-1, head_dim), [block_size, 64], layout),
        block_tables,
        query_start,
        seq_lens,
        block_tables.stride(0),
        section.first_row,
        scale * key_scale * LOG2_E,
        value_scale,
        section.num_splits,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=num_heads // num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        ROWS=tile.block_m,
        BLOCK_N=tile.block_n,
        SPLIT=section.partial is not None,
        ITEMS=section.items is not None,
        STAGES=tile.num_stages,
        LOADING_REGISTERS=LOADING_REGISTERS,
        PDL=device.dependent_launch,
        num_warps=tile.num_warps,
        maxnreg=max_registers(tile),
        **device.options,
    )


def tiling(rows_per_tile: int, head_dim: int) -> Tiling:
    """For tiles of up to ``rows_per_tile`` (queries times heads of a group), those of ``attention.py`` where they are
    not served here; measured on an H200."""
    if rows_per_tile > MAX_ROWS:
        return attention.tiling(rows_per_tile, head_dim)
    block_m = max(8, power_of_two(rows_per_tile))
    return Tiling(block_m, BLOCK_N, num_warps=4, num_stages=2, programs=3 if block_m == 8 else 2)


def max_registers(tile: Tiling) -> int:
    """Of a thread, so that a processor holds as many programs as splits aim at."""
    return 65536 // (tile.programs * THREADS) // 8 * 8


def serves(section: Section) -> bool:
    """Whether ``decode_attention`` computes this section: rows of a tile each, with as many splits as it takes."""
    return section.one_tile and section.split_tiles == 0 and section.tiling.block_m <= MAX_ROWS
