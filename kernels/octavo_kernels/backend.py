"""The attention backend ``triton``: plans a step from what the host knows and runs the fused kernels."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from octavo.batch import ForwardBatch
from octavo.interfaces import AttentionBackend, AttentionNeed, AttentionSpec
from octavo.layers.attention import Attention
from octavo_kernels.attention import Heads, Planner, Section, paged_attention
from octavo_kernels.launch import missing_device
from octavo_kernels.rotary import HeadNorm, Rotation, rotate_and_store

MAX_HEAD_DIM = 256


class TritonAttention(AttentionBackend):
    """Paged attention as Triton kernels.

    ``plan`` reads host numbers only, allocates what the splits need and shares them out on the device, so it may be
    captured in a CUDA graph: such a graph serves any lengths up to the ``max_seq_len`` of the batch that it was
    captured with.
    """

    name: ClassVar[str] = "triton"
    capturable: ClassVar[bool] = True

    def __init__(self, need: AttentionNeed) -> None:
        self._need = need
        heads = Heads(need.num_heads, need.num_kv_heads, need.head_dim)
        self._planner = Planner(heads, batch_invariant=need.batch_invariant)

    @classmethod
    def missing(cls, need: AttentionNeed) -> list[str]:
        reasons = missing_device(need.device, need.dtype)
        if need.kv_dtype not in (need.dtype, torch.float8_e4m3fn):
            reasons.append(f"its cache is in the activations' dtype or float8_e4m3fn, not {need.kv_dtype}")
        if need.head_dim > MAX_HEAD_DIM or need.head_dim % 8:
            reasons.append(f"head_dim must be a multiple of 8 up to {MAX_HEAD_DIM}, not {need.head_dim}")
        if need.num_heads // need.num_kv_heads > 64:
            reasons.append(f"up to 64 heads share a key/value head, not {need.num_heads // need.num_kv_heads}")
        return reasons

    def kv_shape(self, spec: AttentionSpec, num_blocks: int) -> tuple[int, ...]:
        """[num_blocks, key or value, num_kv_heads, block_size, head_dim]."""
        return (num_blocks, 2, spec.num_kv_heads, self._need.block_size, spec.head_dim)

    def plan(self, batch: ForwardBatch) -> list[Section]:
        return self._planner.plan(
            batch.seq_lens,
            num_rows=batch.num_rows,
            num_tokens=batch.num_tokens,
            num_decodes=batch.num_decodes,
            max_query_len=batch.max_query_len,
            max_seq_len=batch.max_seq_len,
        )

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        spec: AttentionSpec,
        kv: Tensor,
        batch: ForwardBatch,
        plan: list[Section],
    ) -> Tensor:
        rotate_and_store(
            None,
            _packed(key),
            _packed(value),
            kv,
            batch.positions,
            batch.slots,
            key_scale=spec.key_scale,
            value_scale=spec.value_scale,
        )
        return self._attend(query.contiguous(), spec, kv, batch, plan)

    def forward(self, layer: Attention, qkv: Tensor, kv: Tensor, batch: ForwardBatch, plan: list[Section]) -> Tensor:
        """Norms, rotation and the cache's write in one kernel, then attention."""
        spec = layer.spec
        heads = qkv.view(qkv.shape[0], -1, spec.head_dim)
        query, key, value = heads.split((spec.num_heads, spec.num_kv_heads, spec.num_kv_heads), dim=1)
        norm = None
        if layer.query_norm is not None and layer.key_norm is not None:
            norm = HeadNorm(layer.query_norm.weight, layer.key_norm.weight, layer.query_norm.eps)
        rotated = rotate_and_store(
            query,
            key,
            value,
            kv,
            batch.positions,
            batch.slots,
            rotation=None if layer.rotary is None else Rotation(layer.rotary.table),
            norm=norm,
            key_scale=spec.key_scale,
            value_scale=spec.value_scale,
        )
        assert rotated is not None
        return self._attend(rotated, spec, kv, batch, plan)

    def _attend(
        self, query: Tensor, spec: AttentionSpec, kv: Tensor, batch: ForwardBatch, plan: list[Section]
    ) -> Tensor:
        return paged_attention(
            query,
            kv,
            batch.block_tables,
            batch.query_start,
            batch.seq_lens,
            plan,
            scale=spec.scale,
            window=spec.window,
            soft_cap=spec.soft_cap,
            key_scale=spec.key_scale,
            value_scale=spec.value_scale,
        )


def _packed(x: Tensor) -> Tensor:
    """``x`` [num_tokens, num_heads, head_dim] with each token's heads side by side."""
    return x if x.stride(1) == x.shape[2] and x.stride(2) == 1 else x.contiguous()
