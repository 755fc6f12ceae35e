"""Paged attention in C: one call per layer normalizes, rotates, writes the cache and attends."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from octavo.batch import ForwardBatch
from octavo.interfaces import AttentionBackend, AttentionNeed, AttentionSpec
from octavo_cpu.library import DTYPES, common_lacks, library

if TYPE_CHECKING:
    from octavo.layers.attention import Attention
    from octavo.layers.norm import RMSNorm
    from octavo.layers.rotary import RotaryEmbedding

MULTIPLE = 16  # of block size and head dimension: both are walked in whole vectors of up to 16 elements
MAX_HEAD_DIM = 256


class LayerStructure(ctypes.Structure):
    """``layer_t`` in attention.c."""

    _fields_ = (
        ("num_heads", c_int64),
        ("num_kv_heads", c_int64),
        ("head_dim", c_int64),
        ("block_size", c_int64),
        ("window", c_int64),
        ("scale", c_float),
        ("soft_cap", c_float),
        ("rotary", c_void_p),
        ("rotary_dim", c_int64),
        ("query_norm", c_void_p),
        ("key_norm", c_void_p),
        ("query_eps", c_float),
        ("key_eps", c_float),
        ("dtype", c_int32),
        ("kv_dtype", c_int32),
    )


class BatchStructure(ctypes.Structure):
    """``batch_t`` in attention.c."""

    _fields_ = (
        ("positions", c_void_p),
        ("slots", c_void_p),
        ("query_start", c_void_p),
        ("seq_lens", c_void_p),
        ("block_tables", c_void_p),
        ("num_tokens", c_int64),
        ("num_rows", c_int64),
        ("table_stride", c_int64),
        ("num_threads", c_int32),
    )


@dataclass(frozen=True, slots=True)
class CPUPlan:
    """The batch as C sees it; keeps the tensors alive that the structure points into."""

    structure: BatchStructure
    address: int
    tensors: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer as C sees it, with the elements between tokens in the fused projection and the offsets into it."""

    structure: LayerStructure
    address: int
    max_position: int
    token_stride: int
    key_bytes: int
    value_bytes: int
    output_size: int


class CPUAttention(AttentionBackend):
    """Any mix of query lengths; softmax in float32; a row's result does not depend on the rest of its batch."""

    name: ClassVar[str] = "cpu"

    def __init__(self, need: AttentionNeed) -> None:
        self._block_size = need.block_size
        self._dtype = need.dtype
        self._kv_dtype = need.kv_dtype
        self._kernel = library().attention
        self._layers: dict[Attention, _Layer] = {}
        self._specs: dict[AttentionSpec, _Layer] = {}

    @classmethod
    def missing(cls, need: AttentionNeed) -> list[str]:
        lacks = common_lacks(need.device, need.dtype, need.kv_dtype)
        if need.block_size % MULTIPLE:
            lacks.append(f"needs a block size that is a multiple of {MULTIPLE}, not {need.block_size}")
        if need.head_dim % MULTIPLE or need.head_dim > MAX_HEAD_DIM:
            lacks.append(
                f"needs a head dimension that is a multiple of {MULTIPLE} up to {MAX_HEAD_DIM}, not {need.head_dim}"
            )
        return lacks

    def kv_shape(self, spec: AttentionSpec, num_blocks: int) -> tuple[int, ...]:
        """[num_blocks, key or value, num_kv_heads, block_size, head_dim]; keys lie transposed in the last two."""
        return (num_blocks, 2, spec.num_kv_heads, self._block_size, spec.head_dim)

    def plan(self, batch: ForwardBatch) -> CPUPlan:
        tensors = (
            _as(batch.positions, torch.int64),
            _as(batch.slots, torch.int64),
            _as(batch.query_start, torch.int32),
            _as(batch.seq_lens, torch.int32),
            _as(batch.block_tables, torch.int32),
        )
        structure = BatchStructure(
            *(tensor.data_ptr() for tensor in tensors),
            batch.num_tokens,
            batch.num_rows,
            tensors[-1].shape[1],
            torch.get_num_threads(),
        )
        return CPUPlan(structure, ctypes.addressof(structure), tensors)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        spec: AttentionSpec,
        kv: Tensor,
        batch: ForwardBatch,
        plan: CPUPlan,
    ) -> Tensor:
        layer = self._specs.get(spec)
        if layer is None:
            layer = self._specs[spec] = self._make_layer(spec, None, None, None)
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        output = torch.empty((query.shape[0], layer.output_size), dtype=self._dtype)
        self._kernel(
            layer.address,
            plan.address,
            query.data_ptr(),
            layer.output_size,
            key.data_ptr(),
            value.data_ptr(),
            spec.num_kv_heads * spec.head_dim,
            kv.data_ptr(),
            output.data_ptr(),
        )
        return output

    def forward(self, layer: Attention, qkv: Tensor, kv: Tensor, batch: ForwardBatch, plan: CPUPlan) -> Tensor:
        made = self._layers.get(layer)
        if made is None:
            made = self._make_layer(layer.spec, layer.rotary, layer.query_norm, layer.key_norm)
            self._layers[layer] = made
        if batch.max_seq_len > made.max_position:
            raise IndexError(f"position {batch.max_seq_len - 1} is beyond the rotary table of {made.max_position}")
        qkv = qkv.contiguous()
        at = qkv.data_ptr()
        output = torch.empty((qkv.shape[0], made.output_size), dtype=self._dtype)
        self._kernel(
            made.address,
            plan.address,
            at,
            made.token_stride,
            at + made.key_bytes,
            at + made.value_bytes,
            made.token_stride,
            kv.data_ptr(),
            output.data_ptr(),
        )
        return output

    def _make_layer(
        self,
        spec: AttentionSpec,
        rotary: RotaryEmbedding | None,
        query_norm: RMSNorm | None,
        key_norm: RMSNorm | None,
    ) -> _Layer:
        normalizes = query_norm is not None and key_norm is not None
        structure = LayerStructure(
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            block_size=self._block_size,
            window=spec.window or 0,
            scale=spec.scale,
            soft_cap=spec.soft_cap or 0.0,
            rotary=rotary.table.data_ptr() if rotary is not None else None,
            rotary_dim=rotary.rotary_dim if rotary is not None else 0,
            query_norm=query_norm.weight.data_ptr() if query_norm is not None and normalizes else None,
            key_norm=key_norm.weight.data_ptr() if key_norm is not None and normalizes else None,
            query_eps=query_norm.eps if query_norm is not None else 0.0,
            key_eps=key_norm.eps if key_norm is not None else 0.0,
            dtype=DTYPES[self._dtype],
            kv_dtype=DTYPES[self._kv_dtype],
        )
        query_size, key_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        return _Layer(
            structure,
            ctypes.addressof(structure),
            max_position=rotary.table.shape[0] if rotary is not None else 2**63,
            token_stride=query_size + 2 * key_size,
            key_bytes=query_size * self._dtype.itemsize,
            value_bytes=(query_size + key_size) * self._dtype.itemsize,
            output_size=query_size,
        )


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous and of the type that C reads; no copy when it is so already."""
    return tensor.to(dtype).contiguous()
