"""Matrix products over weights that are packed once: our own in C, and oneDNN's where that cannot serve."""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_int64, c_void_p
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from octavo_cpu.library import DTYPES, common_lacks, library

if TYPE_CHECKING:
    from octavo.operations import LinearNeed


class LinearStructure(ctypes.Structure):
    """``linear_t`` in linear.c."""

    _fields_ = (
        ("weights", c_void_p),
        ("bias", c_void_p),
        ("in_features", c_int64),
        ("out_features", c_int64),
        ("dtype", c_int32),
    )


class PackedLinear:
    """The operation ``linear`` in C: reads the weights at the speed of memory when there are few rows.

    A row's result does not depend on the other rows of its batch.
    """

    def __init__(self, need: LinearNeed, weight: Tensor, bias: Tensor | None) -> None:
        kernels, dtype = library(), DTYPES[need.dtype]
        weight = weight.contiguous()
        self._out_features = need.out_features
        self._dtype = need.dtype
        self._weights = torch.empty(kernels.linear_padded(need.out_features) * need.in_features, dtype=need.dtype)
        kernels.linear_pack(self._weights.data_ptr(), weight.data_ptr(), need.out_features, need.in_features, dtype)
        self._bias = None if bias is None else bias.float().contiguous()
        self._structure = LinearStructure(
            self._weights.data_ptr(),
            None if self._bias is None else self._bias.data_ptr(),
            need.in_features,
            need.out_features,
            dtype,
        )
        self._address = ctypes.addressof(self._structure)
        self._kernel = kernels.linear

    @classmethod
    def missing(cls, need: LinearNeed) -> list[str]:
        lacks = common_lacks(need.device, need.dtype)
        if lacks:
            return lacks
        if not library().linear_supports(DTYPES[need.dtype]):
            return ["products in bfloat16 need a CPU with AVX512_BF16"]
        if need.dtype == torch.bfloat16 and need.in_features % 2:
            return [f"products in bfloat16 need an even number of inputs, not {need.in_features}"]
        return []

    def apply(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        num_rows = x.shape[0]
        y = torch.empty((num_rows, self._out_features), dtype=self._dtype)
        self._kernel(self._address, x.data_ptr(), y.data_ptr(), num_rows, torch.get_num_threads())
        return y

    def num_bytes(self) -> int:
        return self._weights.nbytes + (0 if self._bias is None else self._bias.nbytes)


class OneDNNLinear:
    """The operation ``linear`` through oneDNN with weights in its own layout: faster than ``F.linear``, same result."""

    def __init__(self, need: LinearNeed, weight: Tensor, bias: Tensor | None) -> None:
        self._num_bytes = weight.nbytes
        self._weights = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self._bias = bias

    @classmethod
    def missing(cls, need: LinearNeed) -> list[str]:
        if need.device.type != "cpu":
            return [f"runs on a CPU, not on {need.device.type}"]
        if not torch._C._has_mkldnn:
            return ["this build of torch has no oneDNN"]
        if need.dtype not in DTYPES:
            return [f"computes in {', '.join(str(known) for known in DTYPES)}, not in {need.dtype}"]
        if need.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return ["products in bfloat16 need a CPU with AVX-512"]
        if need.batch_invariant:
            return ["sums in an order that depends on the number of rows"]
        return []

    def apply(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weights, self._bias, "none", [], "")
        return y

    def num_bytes(self) -> int:
        return self._num_bytes + (0 if self._bias is None else self._bias.nbytes)
