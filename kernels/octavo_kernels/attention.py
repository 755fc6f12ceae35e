"""Paged attention for any mix of query lengths: prefill chunks, decodes and draft verification in one kernel.

A program takes a tile of queries of one sequence with all the heads that share a key/value head (so that grouped heads
read the cache once), and one of several splits of the context. Splits write partial results; the last to arrive adds
them up in order, so that the result does not depend on who was last (FlashDecoding, Dao et al. 2023, in one launch).
The softmax is computed online in float32 (FlashAttention-2, Dao 2023).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octavo_kernels.launch import describe, power_of_two

MAX_SPLITS = 64
SHARED_ROWS = 256  # up to so many rows share out splits by the same kernel: few are compiled, and it is small
INVARIANT_SPLIT_TOKENS = 1024
LOG2_E = 1.4426950408889634


@triton.jit
def _attend_range(
    accumulator,
    maximum,
    total,
    query,
    key_ptr,
    value_ptr,
    block_table_ptr,
    kv_block_stride,
    begin,
    end,
    position,
    scale,
    soft_cap,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    EIGHT_BIT: tl.constexpr,
    MASKED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Add the context positions [begin, end) to the running softmax. Without MASKED every query sees all of them and
    they are whole tiles."""
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        other = start + n
        if MASKED:
            block = tl.load(block_table_ptr + other // BLOCK_SIZE, mask=other < end, other=0)
        else:
            block = tl.load(block_table_ptr + other // BLOCK_SIZE)
        offsets = (block.to(tl.int64) * kv_block_stride + (other % BLOCK_SIZE) * HEAD_DIM)[:, None] + d[None, :]
        if MASKED:
            mask = (other < end)[:, None] & (d < HEAD_DIM)[None, :]
            key = tl.load(key_ptr + offsets, mask=mask, other=0.0)
            value = tl.load(value_ptr + offsets, mask=mask, other=0.0)
        elif HEAD_DIM == BLOCK_D:
            key = tl.load(key_ptr + offsets)
            value = tl.load(value_ptr + offsets)
        else:
            key = tl.load(key_ptr + offsets, mask=(d < HEAD_DIM)[None, :], other=0.0)
            value = tl.load(value_ptr + offsets, mask=(d < HEAD_DIM)[None, :], other=0.0)
        if EIGHT_BIT:
            key = key.to(query.dtype)
            value = value.to(query.dtype)
        scores = tl.dot(query, tl.trans(key)) * scale
        if SOFT_CAP:
            # tanh(x) = 1 - 2 / (exp(2x) + 1); scores and cap are both in units of log2(e)
            scores = soft_cap * (1.0 - 2.0 / (tl.exp2(scores * (2.8853900817779268 / soft_cap)) + 1.0))
        if MASKED:
            seen = (other[None, :] <= position[:, None]) & (other < end)[None, :]
            if WINDOW > 0:
                seen &= other[None, :] > position[:, None] - WINDOW
            scores = tl.where(seen, scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
        if MASKED:  # a row that has seen nothing yet stays at -inf, and -inf - -inf is no number
            finite = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        else:
            finite = new_maximum
        weights = tl.exp2(scores - finite[:, None])
        decay = tl.exp2(maximum - finite)
        total = total * decay + tl.sum(weights, axis=1)
        accumulator = accumulator * decay[:, None]
        accumulator = tl.dot(weights.to(value.dtype), value, accumulator)
        maximum = new_maximum
    return accumulator, maximum, total


@triton.jit(
    do_not_specialize=["num_rows", "num_items", "num_extra"],
    do_not_specialize_on_alignment=["seq_lens_ptr"],
)
def _share_out(
    item_rows_ptr,
    first_items_ptr,
    seq_lens_ptr,
    num_rows,
    num_items,
    num_extra,
    BLOCK_N: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program. Rows get as many items (splits) as their contexts ask for: one each, and up to ``num_extra`` more
    that go to the longest. Writes each item's row (-1: nobody's) and each row's first item, with one more at the end.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.arange(0, BLOCK_ROWS)
    tiles = tl.cdiv(tl.load(seq_lens_ptr + row, mask=row < num_rows, other=0), BLOCK_N)
    longest = tl.maximum(tl.cdiv(tl.sum(tiles), num_extra), 1)  # so that tiles // longest adds up to num_extra at most
    count = tl.where(row < num_rows, tl.maximum(tl.cdiv(tiles, longest), 1), 0)
    end = tl.cumsum(count, 0)
    first = end - count
    tl.store(first_items_ptr + row, first, mask=row < num_rows)
    total = tl.sum(count)
    tl.store(first_items_ptr + num_rows, total)
    for step in range(tl.max(count)):
        tl.store(item_rows_ptr + first + step, row, mask=step < count)
    nobody = tl.full((BLOCK_ROWS,), -1, tl.int32)
    for start in range(total, num_items, BLOCK_ROWS):
        tl.store(item_rows_ptr + start + row, nobody, mask=start + row < num_items)


@triton.jit(
    do_not_specialize=["first_row", "num_rows", "num_splits", "block_tables_stride"],
    do_not_specialize_on_alignment=["query_start_ptr", "seq_lens_ptr"],  # pieces of a step's numbers
)
def _paged_attention(
    out_ptr,
    partial_ptr,
    statistics_ptr,
    arrivals_ptr,
    item_rows_ptr,
    first_items_ptr,
    query_ptr,
    kv_ptr,
    block_tables_ptr,
    query_start_ptr,
    seq_lens_ptr,
    block_tables_stride,
    kv_block_stride,
    first_row,
    num_rows,
    scale,
    soft_cap,
    value_scale,
    num_splits,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    ITEMS: tl.constexpr,
    SPLIT_TILES: tl.constexpr,
    ONE_TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    EIGHT_BIT: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (key/value head, tile of queries, split of the context).

    ONE_TILE: a sequence's queries fit one tile, and tile t is row first_row + t. Otherwise sequences have as many tiles
    as they need and a program finds its own by bisection; the grid is an upper bound. SPLIT_TILES fixes the length of a
    split (in tiles of BLOCK_N tokens); 0 shares the context out evenly. ITEMS: tiles have different numbers of splits,
    and the second axis counts splits of all tiles, see _share_out.
    """
    tokens_per_tile: tl.constexpr = BLOCK_M // GROUP
    head = tl.program_id(0)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)  # the longest contexts first
    split = tl.program_id(2)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()

    if ITEMS:
        item = tile
        tile = tl.load(item_rows_ptr + item)
        if tile < 0:
            return
        first_item = tl.load(first_items_ptr + tile)
        num_splits = tl.load(first_items_ptr + tile + 1) - first_item
        split = item - first_item

    if ONE_TILE:
        row = first_row + tile
        first_token = tl.load(query_start_ptr + row)
        local_tile = 0
    else:
        base = tl.load(query_start_ptr + first_row)
        low = first_row
        high = first_row + num_rows
        while high - low > 1:
            middle = (low + high) // 2
            begins = (tl.load(query_start_ptr + middle) - base) // tokens_per_tile + middle - first_row
            if begins <= tile:
                low = middle
            else:
                high = middle
        row = low
        first_token = tl.load(query_start_ptr + row)
        local_tile = tile - ((first_token - base) // tokens_per_tile + row - first_row)
    query_len = tl.load(query_start_ptr + row + 1) - first_token
    seq_len = tl.load(seq_lens_ptr + row)
    first_query = local_tile * tokens_per_tile
    if first_query >= query_len:
        return

    # Rows of the tile are (token, head of the group).
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    query_index = first_query + m // GROUP
    valid = (m < tokens_per_tile * GROUP) & (query_index < query_len)
    position = seq_len - query_len + query_index
    out_offsets = ((first_token + query_index).to(tl.int64) * (NUM_KV_HEADS * GROUP) + head * GROUP + m % GROUP)[
        :, None
    ] * HEAD_DIM + d[None, :]
    out_mask = valid[:, None] & (d < HEAD_DIM)[None, :]

    context_end = tl.minimum(seq_len, seq_len - query_len + first_query + tokens_per_tile)
    context_begin = 0
    if WINDOW > 0:
        context_begin = tl.maximum(seq_len - query_len + first_query - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
    num_tiles = tl.cdiv(context_end - context_begin, BLOCK_N)
    if SPLIT_TILES > 0:
        tiles_per_split = tl.full((), SPLIT_TILES, tl.int32)
    else:
        tiles_per_split = tl.maximum(tl.cdiv(num_tiles, num_splits), 1)
    num_active = tl.maximum(tl.cdiv(num_tiles, tiles_per_split), 1)
    if split >= num_active:
        return
    begin = context_begin + split * tiles_per_split * BLOCK_N
    end = tl.minimum(begin + tiles_per_split * BLOCK_N, context_end)

    query = tl.load(query_ptr + out_offsets, mask=out_mask, other=0.0)
    accumulator = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    # Rows of the tile that are nobody's get weights of zero: products with those take less power.
    maximum = tl.where(valid, float("-inf"), 1e30)
    total = tl.zeros((BLOCK_M,), tl.float32)
    key_ptr = kv_ptr + head * (BLOCK_SIZE * HEAD_DIM)
    value_ptr = key_ptr + NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM
    table_ptr = block_tables_ptr + row.to(tl.int64) * block_tables_stride
    masked_from = begin
    if WINDOW == 0:  # up to here every query of the tile sees everything
        masked_from = tl.minimum(begin + (seq_len - query_len + first_query + 1 - begin) // BLOCK_N * BLOCK_N, end)
        masked_from = tl.maximum(begin + (masked_from - begin) // BLOCK_N * BLOCK_N, begin)
        accumulator, maximum, total = _attend_range(
            accumulator, maximum, total, query, key_ptr, value_ptr, table_ptr, kv_block_stride,
            begin, masked_from, position, scale, soft_cap,
            HEAD_DIM, BLOCK_D, BLOCK_N, BLOCK_SIZE, WINDOW, SOFT_CAP, EIGHT_BIT, False, STAGES,
        )  # fmt: skip
    accumulator, maximum, total = _attend_range(
        accumulator, maximum, total, query, key_ptr, value_ptr, table_ptr, kv_block_stride,
        masked_from, end, position, scale, soft_cap,
        HEAD_DIM, BLOCK_D, BLOCK_N, BLOCK_SIZE, WINDOW, SOFT_CAP, EIGHT_BIT, True, STAGES,
    )  # fmt: skip

    if ITEMS:
        several = num_active > 1
    else:
        several: tl.constexpr = True
    if SPLIT and several:
        unit = tile * NUM_KV_HEADS + head
        if ITEMS:
            first_partial = (first_item * NUM_KV_HEADS + head).to(tl.int64)
            PARTIAL_STEP: tl.constexpr = NUM_KV_HEADS
        else:
            first_partial = unit.to(tl.int64) * num_splits
            PARTIAL_STEP: tl.constexpr = 1
        partial = partial_ptr + (first_partial + split * PARTIAL_STEP) * (BLOCK_M * BLOCK_D)
        within = m[:, None] * BLOCK_D + d[None, :]
        tl.store(partial + within, accumulator, mask=out_mask)
        statistics = statistics_ptr + (first_partial + split * PARTIAL_STEP) * (2 * BLOCK_M)
        tl.store(statistics + m, maximum)
        tl.store(statistics + BLOCK_M + m, total)
        tl.debug_barrier()  # all threads' stores before the one thread that announces them
        if tl.atomic_add(arrivals_ptr + unit, 1, sem="acq_rel") != num_active - 1:
            return
        tl.debug_barrier()
        accumulator = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        for first in range(0, num_active, 4):
            for step in tl.static_range(4):  # four loads in flight
                index = first + step
                there = index < num_active
                statistics = statistics_ptr + (first_partial + index * PARTIAL_STEP) * (2 * BLOCK_M)
                part_maximum = tl.load(statistics + m, mask=there, other=float("-inf"), cache_modifier=".cg")
                part_total = tl.load(statistics + BLOCK_M + m, mask=there, other=0.0, cache_modifier=".cg")
                part = tl.load(
                    partial_ptr + (first_partial + index * PARTIAL_STEP) * (BLOCK_M * BLOCK_D) + within,
                    mask=out_mask & there,
                    other=0.0,
                    cache_modifier=".cg",
                )
                new_maximum = tl.maximum(maximum, part_maximum)
                finite = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
                decay = tl.exp2(maximum - finite)
                part_decay = tl.exp2(part_maximum - finite)
                total = total * decay + part_total * part_decay
                accumulator = accumulator * decay[:, None] + part * part_decay[:, None]
                maximum = new_maximum
        tl.store(arrivals_ptr + unit, 0)  # ready for the next layer
    total = tl.where(total > 0.0, total, 1.0)  # a row with no context, such as a graph's padding, gives zeros
    result = accumulator * (value_scale / total)[:, None]
    tl.store(out_ptr + out_offsets, result.to(out_ptr.dtype.element_ty), mask=out_mask)


@dataclass(frozen=True, slots=True)
class Tiling:
    """How the kernel is compiled for one kind of query tile."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    programs: int  # for each processor, that splits of the context aim at


def tiling(rows_per_tile: int, head_dim: int) -> Tiling:
    """For tiles of up to ``rows_per_tile`` (queries times heads of a group); measured on an H200, see
    ``octavo bench kernels``."""
    block_m = max(16, min(power_of_two(rows_per_tile), 128))
    if head_dim > 128:
        return Tiling(min(block_m, 64), 32 if block_m <= 32 else 64, 4, 2, programs=3)
    if block_m == 16:
        return Tiling(16, 64, 2, 4, programs=3)
    return Tiling(block_m, 64, 4, 3, programs=3 if block_m <= 64 else 1)


@dataclass(frozen=True, slots=True)
class Items:
    """The splits of all rows in order: each one's row, and each row's first one."""

    rows: Tensor  # [num_items] int32, -1 for items that are nobody's
    first: Tensor  # [num_rows + 1] int32


@dataclass(frozen=True, slots=True)
class Section:
    """Rows of a batch that one launch serves. With ``items`` rows have different numbers of splits."""

    first_row: int
    num_rows: int
    num_tiles: int
    num_splits: int
    split_tiles: int
    one_tile: bool
    tiling: Tiling
    partial: Tensor | None  # [tile, key/value head, split (or item, key/value head), block_m, block_d] float32
    statistics: Tensor | None  # [the same, maximum or total, block_m] float32
    arrivals: Tensor | None  # [tile, key/value head] int32, zero between launches
    items: Items | None = None


@dataclass(frozen=True, slots=True)
class Heads:
    """What of a model decides how work is cut."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True, slots=True)
class Planner:
    """Cuts batches into launches from numbers that the host knows.

    Nothing that the host decides depends on the lengths of single sequences, so a captured graph serves any of them up
    to the longest that it was planned for. Splits of rows with few queries are shared out on the device, by their
    contexts' lengths: a long context beside short ones takes many programs, not one for all the time that the step
    takes. A row that must not depend on its neighbours, or has none, is cut into splits of equal length.
    """

    heads: Heads
    batch_invariant: bool = False
    split_prompts: bool = True
    """Whether rows of more than a tile of queries are split as well, when they do not fill the device."""
    tiling: Callable[[int, int], Tiling] = tiling

    def plan(
        self,
        seq_lens: Tensor,
        *,
        num_rows: int,
        num_tokens: int,
        num_decodes: int,
        max_query_len: int,
        max_seq_len: int,
    ) -> list[Section]:
        """The launches for rows of ``seq_lens`` [num_rows] int32, the first ``num_decodes`` with one query each."""

        def short(rows: int, query_len: int) -> Section:
            if rows > 1 and not self.batch_invariant:
                return self._share_out(rows, query_len, seq_lens)
            return self._split_evenly(0, rows, rows * query_len, query_len, max_seq_len, seq_lens.device)

        if max_query_len * self.heads.group <= 64 and not self.batch_invariant:
            return [short(num_rows, max_query_len)]
        sections = []
        if num_decodes:
            sections.append(short(num_decodes, 1))
        if num_rows > num_decodes:
            rows, tokens = num_rows - num_decodes, num_tokens - num_decodes
            sections.append(self._split_evenly(num_decodes, rows, tokens, max_query_len, max_seq_len, seq_lens.device))
        return sections

    def _split_evenly(
        self, first_row: int, num_rows: int, num_tokens: int, max_query_len: int, max_seq_len: int, device: torch.device
    ) -> Section:
        """Rows whose contexts have the same number of splits each."""
        group, num_kv_heads = self.heads.group, self.heads.num_kv_heads
        rows_per_tile = max_query_len * group
        if self.batch_invariant and max_query_len > 1:
            rows_per_tile = 128
        shape = self.tiling(rows_per_tile, self.heads.head_dim)
        tokens_per_tile = shape.block_m // group
        one_tile = max_query_len <= tokens_per_tile
        num_tiles = num_rows if one_tile else num_tokens // tokens_per_tile + num_rows
        context_tiles = -(-max_seq_len // shape.block_n)
        split_tiles, num_splits = 0, 1
        if self.batch_invariant:
            split_tiles = INVARIANT_SPLIT_TOKENS // shape.block_n
            num_splits = -(-context_tiles // split_tiles)
        elif one_tile or self.split_prompts:
            programs = describe(device).num_processors * shape.programs
            num_splits = min(-(-programs // (num_tiles * num_kv_heads)), MAX_SPLITS, context_tiles)
        partial = statistics = arrivals = None
        if num_splits > 1:
            units = num_tiles * num_kv_heads
            block_d = power_of_two(self.heads.head_dim)
            partial = torch.empty((units, num_splits, shape.block_m, block_d), dtype=torch.float32, device=device)
            statistics = torch.empty((units, num_splits, 2, shape.block_m), dtype=torch.float32, device=device)
            arrivals = torch.zeros(units, dtype=torch.int32, device=device)
        return Section(
            first_row, num_rows, num_tiles, num_splits, split_tiles, one_tile, shape, partial, statistics, arrivals
        )

    def _share_out(self, num_rows: int, max_query_len: int, seq_lens: Tensor) -> Section:
        """The leading rows, whose queries fit a tile each, with splits by their lengths."""
        num_kv_heads, head_dim = self.heads.num_kv_heads, self.heads.head_dim
        shape = self.tiling(max_query_len * self.heads.group, head_dim)
        device = seq_lens.device
        figures = describe(device)
        num_extra = max(-(-figures.num_processors * shape.programs // num_kv_heads), num_rows // 4)
        num_items = num_rows + num_extra
        items = Items(
            torch.empty(num_items, dtype=torch.int32, device=device),
            torch.empty(num_rows + 1, dtype=torch.int32, device=device),
        )
        _share_out[(1,)](
            items.rows,
            items.first,
            seq_lens,
            num_rows,
            num_items,
            num_extra,
            BLOCK_N=shape.block_n,
            BLOCK_ROWS=max(SHARED_ROWS, power_of_two(num_rows)),
            PDL=figures.dependent_launch,
            **figures.options,
        )
        block_d = power_of_two(head_dim)
        units = num_items * num_kv_heads
        return Section(
            first_row=0,
            num_rows=num_rows,
            num_tiles=num_items,
            num_splits=1,
            split_tiles=0,
            one_tile=True,
            tiling=shape,
            partial=torch.empty((units, shape.block_m, block_d), dtype=torch.float32, device=device),
            statistics=torch.empty((units, 2, shape.block_m), dtype=torch.float32, device=device),
            arrivals=torch.zeros(num_rows * num_kv_heads, dtype=torch.int32, device=device),
            items=items,
        )


def paged_attention(
    query: Tensor,
    kv: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    sections: list[Section],
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """Causal attention of each sequence's last tokens over its cached context.

    query [num_tokens, num_heads, head_dim] contiguous, kv [num_blocks, 2, num_kv_heads, block_size, head_dim], the
    block size a power of two; block_tables [num_rows, max_num_blocks], query_start [num_rows + 1] and seq_lens
    [num_rows] int32, the last counting this step's tokens -> [num_tokens, num_heads * head_dim]. With a ``window`` a
    token sees itself and the window - 1 tokens before it; ``soft_cap`` bounds the scaled scores by tanh. ``out`` is
    written and returned when it is given.
    """
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads, block_size = kv.shape[2], kv.shape[3]
    if out is None:
        out = torch.empty((num_tokens, num_heads * head_dim), dtype=query.dtype, device=query.device)
    device = describe(query.device)
    for section in sections:
        shape = section.tiling
        _paged_attention[(num_kv_heads, section.num_tiles, section.num_splits)](
            out,
            out if section.partial is None else section.partial,
            out if section.statistics is None else section.statistics,
            out if section.arrivals is None else section.arrivals,
            out if section.items is None else section.items.rows,
            out if section.items is None else section.items.first,
            query,
            kv,
            block_tables,
            query_start,
            seq_lens,
            block_tables.stride(0),
            kv.stride(0),
            section.first_row,
            section.num_rows,
            scale * key_scale * LOG2_E,
            0.0 if soft_cap is None else soft_cap * LOG2_E,
            value_scale,
            section.num_splits,
            NUM_KV_HEADS=num_kv_heads,
            GROUP=num_heads // num_kv_heads,
            HEAD_DIM=head_dim,
            BLOCK_D=power_of_two(head_dim),
            BLOCK_SIZE=block_size,
            BLOCK_M=shape.block_m,
            BLOCK_N=shape.block_n,
            SPLIT=section.partial is not None,
            ITEMS=section.items is not None,
            SPLIT_TILES=section.split_tiles,
            ONE_TILE=section.one_tile,
            WINDOW=window or 0,
            SOFT_CAP=soft_cap is not None,
            EIGHT_BIT=kv.element_size() == 1,
            STAGES=shape.num_stages,
            PDL=device.dependent_launch,
            num_warps=shape.num_warps,
            **device.options,
        )
    return out


def paged_attention_reference(
    query: Tensor,
    kv: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> Tensor:
    """The same in float32, one sequence at a time; reads lengths from the device."""
    num_heads, head_dim = query.shape[1:]
    num_kv_heads, block_size = kv.shape[2], kv.shape[3]
    out = torch.zeros((query.shape[0], num_heads * head_dim), dtype=torch.float32, device=query.device)
    starts = query_start.tolist()
    for row, seq_len in enumerate(seq_lens.tolist()):
        begin, end = starts[row], starts[row + 1]
        if seq_len == 0 or begin == end:
            continue
        blocks = block_tables[row, : -(-seq_len // block_size)].long()
        context = kv[blocks].float().permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :seq_len]  # [2, heads, tokens, dim]
        keys, values = context.repeat_interleave(num_heads // num_kv_heads, dim=1)
        scores = query[begin:end].float().transpose(0, 1) @ keys.transpose(1, 2) * (scale * key_scale)
        if soft_cap is not None:
            scores = torch.tanh(scores / soft_cap) * soft_cap
        position = torch.arange(seq_len - (end - begin), seq_len, device=query.device).unsqueeze(1)
        other = torch.arange(seq_len, device=query.device)
        hidden = other > position
        if window is not None:
            hidden |= other <= position - window
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out[begin:end] = (weights @ values * value_scale).transpose(0, 1).flatten(1)
    return out
