"""The attention backend ``triton-hopper``: ``triton`` with kernels made for Hopper GPUs."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from octavo.batch import ForwardBatch
from octavo.interfaces import AttentionNeed, AttentionSpec
from octavo_kernels.attention import Section, paged_attention
from octavo_kernels.backend import TritonAttention
from octavo_kernels.launch import missing_hopper

HEAD_DIM = 128
BLOCK_SIZES = (8, 16, 32, 64)  # they fill a tile, in whole swizzle patterns of 8 rows


class HopperAttention(TritonAttention):
    """Rows with few queries and rows with many go to a kernel for Hopper each; what lies between is as in ``triton``.

    The kernel for many is faster without splits than ``triton``'s with them, also for 64 tokens behind 15,000.
    """

    name: ClassVar[str] = "triton-hopper"

    def __init__(self, need: AttentionNeed) -> None:
        super().__init__(need)
        # Here and not above: being asked what it is missing must not take a Gluon that may have changed.
        from octavo_kernels import hopper_attention, hopper_decode

        self._prefill, self._decode = hopper_attention, hopper_decode
        self._planner = replace(self._planner, split_prompts=False, tiling=hopper_decode.tiling)

    @classmethod
    def missing(cls, need: AttentionNeed) -> list[str]:
        reasons = [*super().missing(need), *missing_hopper(need.device)]
        if need.head_dim != HEAD_DIM:
            reasons.append(f"head_dim must be {HEAD_DIM}, not {need.head_dim}")
        if need.kv_dtype != need.dtype:
            reasons.append(f"its cache is in the activations' dtype, not {need.kv_dtype}")
        if need.block_size not in BLOCK_SIZES:
            reasons.append(f"blocks must be of {', '.join(map(str, BLOCK_SIZES))} tokens, not {need.block_size}")
        if need.window or need.soft_cap:
            reasons.append("it has neither windows nor soft caps")
        if need.batch_invariant:
            reasons.append("its rows depend on their neighbours, if only in how they are rounded")
        return reasons

    def _attend(
        self, query: Tensor, spec: AttentionSpec, kv: Tensor, batch: ForwardBatch, plan: list[Section]
    ) -> Tensor:
        out = torch.empty((query.shape[0], spec.num_heads * spec.head_dim), dtype=query.dtype, device=query.device)
        rows = batch.block_tables, batch.query_start, batch.seq_lens
        scales = {"scale": spec.scale, "key_scale": spec.key_scale, "value_scale": spec.value_scale}
        for section in plan:
            if self._decode.serves(section):
                self._decode.decode_attention(out, query, kv, *rows, section, **scales)
            elif self._prefill.serves(section):
                self._prefill.prefill_attention(out, query, kv, *rows, section, **scales)
            else:
                paged_attention(query, kv, *rows, [section], **scales, out=out)
        return out
