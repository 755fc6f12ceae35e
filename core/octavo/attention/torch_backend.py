"""Paged attention in plain torch: correct on any device, the oracle of every other backend.

Heads that share a key/value head are folded into the query length, and both products are plain matrix products: on a
CPU that is several times faster than scaled_dot_product_attention with one query.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from octavo.batch import ForwardBatch
from octavo.interfaces import AttentionBackend, AttentionNeed, AttentionSpec

EIGHT_BIT = (torch.float8_e4m3fn, torch.float8_e5m2)

MAX_QUERIES_AT_ONCE = 256
"""Bounds the memory for scores, and spares a long prompt most of the part that causality hides."""


@dataclass(frozen=True, slots=True)
class _Row:
    """One sequence of the step: its tokens' place in the batch, and where its keys and values lie in the cache."""

    begin: int
    end: int
    places: Tensor  # [key or value, context_len] int64: rows of the cache seen as [places, num_kv_heads, head_dim]


@dataclass(frozen=True, slots=True)
class _Plan:
    """Where this step's keys and values go, [num_tokens] int64 each, and its sequences."""

    key_places: Tensor
    value_places: Tensor
    rows: list[_Row]


class TorchAttention(AttentionBackend):
    """One sequence at a time; softmax in float32."""

    name: ClassVar[str] = "torch"

    def __init__(self, need: AttentionNeed) -> None:
        self._block_size = need.block_size
        self._kv_dtype = need.kv_dtype

    @classmethod
    def missing(cls, need: AttentionNeed) -> list[str]:
        return []

    def kv_shape(self, spec: AttentionSpec, num_blocks: int) -> tuple[int, ...]:
        """[num_blocks, key or value, block_size, num_kv_heads, head_dim]."""
        return (num_blocks, 2, self._block_size, spec.num_kv_heads, spec.head_dim)

    def plan(self, batch: ForwardBatch) -> _Plan:
        size = self._block_size
        device = batch.slots.device
        # a block holds its keys, then its values: the token at slot b * size + i has its key at place 2 * b * size + i
        key_places = batch.slots + torch.div(batch.slots, size, rounding_mode="floor") * size
        first = batch.block_tables.long().mul(2 * size).unsqueeze(-1) + torch.arange(size, device=device)
        context = first.flatten(1)  # [num_rows, max_num_blocks * size]
        places = torch.stack([context, context + size])
        rows, begin = [], 0
        for index, (query_len, context_len) in enumerate(zip(batch.query_lens, batch.context_lens, strict=True)):
            rows.append(_Row(begin, begin + query_len, places[:, index, :context_len]))
            begin += query_len
        return _Plan(key_places, key_places + size, rows)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        spec: AttentionSpec,
        kv: Tensor,
        batch: ForwardBatch,
        plan: _Plan,
    ) -> Tensor:
        flat = kv.view(-1, spec.num_kv_heads * spec.head_dim)
        stored = flat.view(torch.uint8) if self._kv_dtype in EIGHT_BIT else flat  # few operations take 8-bit floats
        stored.index_copy_(0, plan.key_places, self._to_cache(key, spec.key_scale))
        stored.index_copy_(0, plan.value_places, self._to_cache(value, spec.value_scale))
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        for row in plan.rows:
            num_queries, places = row.end - row.begin, row.places
            if spec.window is not None:
                places = places[:, max(0, places.shape[1] - num_queries - spec.window + 1) :]
            context = stored.index_select(0, places.flatten()).view(2, -1, spec.num_kv_heads, spec.head_dim)
            keys = self._from_cache(context[0], spec.key_scale, query.dtype)
            values = self._from_cache(context[1], spec.value_scale, query.dtype)
            output[row.begin : row.end] = attend_one(query[row.begin : row.end], keys, values, spec)
        return output.flatten(1)

    def _to_cache(self, x: Tensor, scale: float) -> Tensor:
        x = x.flatten(1)
        if self._kv_dtype not in EIGHT_BIT:
            return x.to(self._kv_dtype)
        limit = torch.finfo(self._kv_dtype).max
        return (x.float() / scale).clamp(-limit, limit).to(self._kv_dtype).view(torch.uint8)

    def _from_cache(self, x: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
        if self._kv_dtype not in EIGHT_BIT:
            return x.to(dtype)
        return (x.view(self._kv_dtype).float() * scale).to(dtype)


def attend_one(query: Tensor, keys: Tensor, values: Tensor, spec: AttentionSpec) -> Tensor:
    """Causal attention of one sequence's last tokens over the end of its context.

    query [num_queries, num_heads, head_dim], keys and values [context_len, num_kv_heads, head_dim] -> as query.
    ``context_len`` may leave out what the window hides from all queries.
    """
    num_queries, hidden = query.shape[0], keys.shape[0] - query.shape[0]
    if num_queries <= MAX_QUERIES_AT_ONCE:
        return _attend(query, keys, values, spec)
    parts = []
    for begin in range(0, num_queries, MAX_QUERIES_AT_ONCE):
        end = min(begin + MAX_QUERIES_AT_ONCE, num_queries)
        first = 0 if spec.window is None else max(0, hidden + begin - spec.window + 1)
        seen = slice(first, hidden + end)
        parts.append(_attend(query[begin:end], keys[seen], values[seen], spec))
    return torch.cat(parts)


def _attend(query: Tensor, keys: Tensor, values: Tensor, spec: AttentionSpec) -> Tensor:
    """:func:`attend_one` with all queries in one product."""
    num_queries, num_heads, head_dim = query.shape
    context_len, num_kv_heads, _ = keys.shape
    group = num_heads // num_kv_heads
    # [num_kv_heads, group * num_queries, head_dim]: the queries of a group share their keys in one product
    folded = (
        query.view(num_queries, num_kv_heads, group, head_dim).permute(1, 2, 0, 3).reshape(num_kv_heads, -1, head_dim)
    )
    scores = (folded @ keys.permute(1, 2, 0)).float().mul_(spec.scale)
    if spec.soft_cap is not None:
        scores = torch.tanh(scores / spec.soft_cap) * spec.soft_cap
    if num_queries > 1 or spec.window is not None:
        position = torch.arange(context_len - num_queries, context_len, device=query.device).unsqueeze(1)
        other = torch.arange(context_len, device=query.device)
        masked = other > position
        if spec.window is not None:
            masked |= other <= position - spec.window
        scores.view(num_kv_heads, group, num_queries, context_len).masked_fill_(masked, float("-inf"))
    weights = scores.softmax(dim=-1).to(values.dtype)
    attended = (weights @ values.transpose(0, 1)).view(num_kv_heads, group, num_queries, head_dim)
    return attended.permute(2, 0, 1, 3).reshape(num_queries, num_heads, head_dim)
