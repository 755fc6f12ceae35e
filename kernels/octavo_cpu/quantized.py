"""Matrix products over weights of 4 and 8 bits, which stay as they are in memory and are widened in the cache.

``weight`` has the attributes of ``PackedWeight`` or ``Fp8Weight`` in octavo_quant.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_int64, c_void_p
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo_cpu.library import DTYPES, common_lacks, library

FORMATS = {4: 0, 8: 1, "fp8": 2}  # as in quantized.c


class QuantizedStructure(ctypes.Structure):
    """``quantized_t`` in quantized.c."""

    _fields_ = (
        ("weights", c_void_p),
        ("scales", c_void_p),
        ("offsets", c_void_p),
        ("bias", c_void_p),
        ("in_features", c_int64),
        ("out_features", c_int64),
        ("group_size", c_int64),
        ("format", c_int32),
        ("dtype", c_int32),
    )


class QuantizedProduct:
    """``y = x Wᵀ + b`` with ``W[n, k] = value[n, k] * scale[g, n] + offset[g, n]``, ``g = k // group_size``.

    A row's result does not depend on the other rows of its batch.
    """

    def __init__(
        self,
        values: Tensor,
        scales: Tensor,
        offsets: Tensor | None,
        bias: Tensor | None,
        group_size: int,
        dtype: torch.dtype,
        stored: int,
    ) -> None:
        """values uint8 [out, in] of the format ``stored``, scales and offsets [num_groups, out], bias [out]."""
        kernels = library()
        values = values.contiguous()
        num_out, num_in = values.shape
        padding = (0, kernels.linear_padded(num_out) - num_out)
        self._weights = torch.zeros(kernels.quantized_bytes(num_out, num_in, stored), dtype=torch.uint8)
        kernels.quantized_pack(self._weights.data_ptr(), values.data_ptr(), num_out, num_in, stored, DTYPES[dtype])
        self._scales = F.pad(scales.float(), padding).contiguous()
        self._offsets = None if offsets is None else F.pad(offsets.float(), padding).contiguous()
        self._bias = None if bias is None else bias.float().contiguous()
        self._dtype, self._out_features = dtype, num_out
        self._num_sums = 0 if offsets is None else len(scales)
        self._structure = QuantizedStructure(
            self._weights.data_ptr(),
            self._scales.data_ptr(),
            None if self._offsets is None else self._offsets.data_ptr(),
            None if self._bias is None else self._bias.data_ptr(),
            num_in,
            num_out,
            group_size,
            stored,
            DTYPES[dtype],
        )
        self._address = ctypes.addressof(self._structure)
        self._kernel = kernels.quantized

    def __call__(self, x: Tensor) -> Tensor:
        """x [num_rows, in_features] -> [num_rows, out_features]."""
        x = x.contiguous()
        num_rows = x.shape[0]
        y = torch.empty((num_rows, self._out_features), dtype=self._dtype)
        sums = torch.empty(num_rows * self._num_sums)
        self._kernel(self._address, x.data_ptr(), y.data_ptr(), sums.data_ptr(), num_rows, torch.get_num_threads())
        return y

    def num_bytes(self) -> int:
        tensors = (self._weights, self._scales, self._offsets, self._bias)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def lacks(need: Any, group_size: int) -> list[str]:
    """What keeps the kernel from serving ``need`` with groups of ``group_size`` inputs."""
    reasons = common_lacks(need.device, need.dtype)
    if reasons:
        return reasons
    if not library().linear_supports(DTYPES[need.dtype]):
        return ["products in bfloat16 need a CPU with AVX512_BF16"]
    if need.dtype == torch.bfloat16 and (need.in_features % 2 or (group_size < need.in_features and group_size % 2)):
        return [f"in bfloat16 it takes inputs in pairs, not {need.in_features} in groups of {group_size}"]
    return []


class PackedIntegers:
    """The operation ``linear_packed``: integers of 4 or 8 bits in groups."""

    def __init__(self, need: Any, weight: Any, bias: Tensor | None) -> None:
        self._permutation: Tensor | None = weight.permutation
        values, scales, offsets = weight.unpack(), weight.scales.float(), None
        middle = 1 << (need.bits - 1)  # what the kernel takes off
        if need.bits == 8:
            values = values ^ middle  # to signed
        if weight.zeros is not None:
            offsets = (middle - weight.zeros.float()) * scales
        self._product = QuantizedProduct(values, scales, offsets, bias, need.group_size, need.dtype, FORMATS[need.bits])

    @classmethod
    def missing(cls, need: Any) -> list[str]:
        return lacks(need, need.group_size)

    def apply(self, x: Tensor) -> Tensor:
        return self._product(x if self._permutation is None else x[:, self._permutation])

    def num_bytes(self) -> int:
        return self._product.num_bytes() + (0 if self._permutation is None else self._permutation.nbytes)


class Float8:
    """The operation ``linear_fp8``: weights in FP8, scaled per tensor, output or block.

    In float32 inputs are rounded as the checkpoint says. In bfloat16 they are left alone: CPUs have no FP8 units, so
    rounding would only lose.
    """

    def __init__(self, need: Any, weight: Any, bias: Tensor | None) -> None:
        self._rounding = weight.rounding if need.dtype == torch.float32 else None
        by_output = weight.by_row()
        scales = by_output.scales.T
        values = weight.values.view(torch.uint8)
        self._product = QuantizedProduct(values, scales, None, bias, need.column_block, need.dtype, FORMATS["fp8"])

    @classmethod
    def missing(cls, need: Any) -> list[str]:
        return lacks(need, need.column_block)

    def apply(self, x: Tensor) -> Tensor:
        return self._product(x if self._rounding is None else self._rounding(x))

    def num_bytes(self) -> int:
        return self._product.num_bytes()
