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


@dataclass(frozen=True, slots=True)
class _Row:
    """One sequence of the step: its tokens' place in the batch, its context length and its blocks."""

    begin: int
    end: int
    context_len: int
    blocks: Tensor  # [num_blocks of this context] int32


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

    def plan(self, batch: ForwardBatch) -> list[_Row]:
        rows, begin = [], 0
        for index, (query_len, context_len) in enumerate(zip(batch.query_lens, batch.context_lens, strict=True)):
            num_blocks = -(-context_len // self._block_size)
            rows.append(_Row(begin, begin + query_len, context_len, batch.block_tables[index, :num_blocks]))
            begin += query_len
        return rows

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        spec: AttentionSpec,
        kv: Tensor,
        batch: ForwardBatch,
        plan: list[_Row],
    ) -> Tensor:
        block = torch.div(batch.slots, self._block_size, rounding_mode="floor")
        offset = batch.slots % self._block_size
        kv[block, 0, offset] = self._to_cache(key, spec.key_scale)
        kv[block, 1, offset] = self._to_cache(value, spec.value_scale)
        output = torch.empty_like(query)
        for row in plan:
            context = kv[row.blocks].transpose(0, 1).flatten(1, 2)[:, : row.context_len]  # [2, context, heads, dim]
            keys = self._from_cache(context[0], spec.key_scale, query.dtype)
            values = self._from_cache(context[1], spec.value_scale, query.dtype)
            output[row.begin : row.end] = attend_one(query[row.begin : row.end], keys, values, spec)
        return output.flatten(1)

    def _to_cache(self, x: Tensor, scale: float) -> Tensor:
        if self._kv_dtype not in EIGHT_BIT:
            return x.to(self._kv_dtype)
        limit = torch.finfo(self._kv_dtype).max
        return (x.float() / scale).clamp(-limit, limit).to(self._kv_dtype)

    def _from_cache(self, x: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
        if self._kv_dtype not in EIGHT_BIT:
            return x.to(dtype)
        return (x.float() * scale).to(dtype)


def attend_one(query: Tensor, keys: Tensor, values: Tensor, spec: AttentionSpec) -> Tensor:
    """Causal attention of one sequence's last tokens over its whole context.

    query [num_queries, num_heads, head_dim], keys and values [context_len, num_kv_heads, head_dim] -> as query.
    """
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
    scores = scores.view(num_kv_heads, group, num_queries, context_len)
    if num_queries > 1 or spec.window is not None:
        position = torch.arange(context_len - num_queries, context_len, device=query.device).unsqueeze(1)
        other = torch.arange(context_len, device=query.device)
        hidden = other > position
        if spec.window is not None:
            hidden |= other <= position - spec.window
        scores.masked_fill_(hidden, float("-inf"))
    weights = scores.softmax(dim=-1).to(values.dtype).view(num_kv_heads, -1, context_len)
    attended = (weights @ values.permute(1, 0, 2)).view(num_kv_heads, group, num_queries, head_dim)
    return attended.permute(2, 0, 1, 3).reshape(num_queries, num_heads, head_dim)
