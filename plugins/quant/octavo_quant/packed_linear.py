"""Products with packed integer weights: the reference, and torch's 4-bit kernel for CPUs."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo_quant.packed import PackedNeed, PackedWeight


class ReferencePacked:
    """Dequantizes in float32 and multiplies, on any device: the oracle of ``linear_packed``."""

    def __init__(self, need: PackedNeed, weight: PackedWeight, bias: Tensor | None) -> None:
        self._weight = weight
        self._bias = bias

    @classmethod
    def missing(cls, need: PackedNeed) -> list[str]:
        return []

    def apply(self, x: Tensor) -> Tensor:
        if self._weight.permutation is not None:
            x = x[:, self._weight.permutation]
        y = F.linear(x.float(), self._weight.dequantize(torch.float32)).to(x.dtype)
        return y if self._bias is None else y + self._bias

    def num_bytes(self) -> int:
        return self._weight.num_bytes() + (0 if self._bias is None else self._bias.nbytes)


class Int4CPU:
    """4 bits on a CPU: torch's kernel over packed weights for few rows; many are worth unpacking the weights for.

    Scales and zero points are rounded to bfloat16.
    """

    GROUP_SIZES = (256, 128, 64, 32)  # what torch's kernel knows
    BLOCK = 64  # outputs that torch interleaves
    MANY_ROWS = 384  # measured: from here on unpacking the weights costs less than it saves

    def __init__(self, need: PackedNeed, weight: PackedWeight, bias: Tensor | None) -> None:
        self._out_features = need.out_features
        self._permutation = weight.permutation
        self._bias = bias
        self._group_size = next(size for size in self.GROUP_SIZES if need.group_size % size == 0)
        weight = weight.split_groups(self._group_size)
        values = weight.unpack().int()
        scales = weight.scales.float()
        zeros = torch.full_like(scales, 8.0) if weight.zeros is None else weight.zeros.float()
        # the kernel computes (q - 8) * scale + offset
        table = torch.stack([scales, (8.0 - zeros) * scales], dim=-1)
        padding = -need.out_features % self.BLOCK
        values, table = F.pad(values, (0, 0, 0, padding)), F.pad(table, (0, 0, 0, padding))
        self._values = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 2)
        self._table = table.to(torch.bfloat16).contiguous()

    @classmethod
    def missing(cls, need: PackedNeed) -> list[str]:
        if need.device.type != "cpu":
            return [f"runs on a CPU, not on {need.device.type}"]
        reasons = []
        if need.bits != 4:
            reasons.append(f"has 4-bit weights, not {need.bits}-bit ones")
        if need.dtype != torch.bfloat16:
            reasons.append(f"computes in bfloat16, not in {need.dtype}")
        if all(need.group_size % size for size in cls.GROUP_SIZES):
            reasons.append(f"has groups of a multiple of 32, not of {need.group_size}")
        return reasons or ([] if _packs_as_expected() else ["torch interleaves its blocks in another way on this CPU"])

    def apply(self, x: Tensor) -> Tensor:
        if self._permutation is not None:
            x = x[:, self._permutation]
        if x.shape[0] < self.MANY_ROWS:
            y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
                x.contiguous(), self._values, self._group_size, self._table
            )
        else:
            y = F.linear(x, self._dequantize())
        y = y[:, : self._out_features]
        return y if self._bias is None else y + self._bias

    def _dequantize(self) -> Tensor:
        """bfloat16 [out_features padded to whole blocks, in_features]."""
        values = unpack_blocks(self._values).to(torch.bfloat16)  # [blocks, in_features, BLOCK]
        grouped = values.reshape(len(values), -1, self._group_size, self.BLOCK)
        table = self._table.reshape(len(self._table), -1, self.BLOCK, 2).transpose(0, 1).unsqueeze(2)
        weights = torch.addcmul(table[..., 1], grouped.sub_(8), table[..., 0])
        return weights.flatten(1, 2).transpose(1, 2).flatten(0, 1)

    def num_bytes(self) -> int:
        tensors = (self._values, self._table, self._permutation, self._bias)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def unpack_blocks(packed: Tensor) -> Tensor:
    """The values of ``_convert_weight_to_int4pack_for_cpu`` with AVX-512: uint8 [blocks, in_features, 64].

    For each block of 64 outputs and each input there are 32 bytes, the low half of byte d for output d and the high
    half for output d + 32.
    """
    block = Int4CPU.BLOCK
    num_blocks, num_in = packed.shape[0] // block, packed.shape[1] * 2
    halves = packed.reshape(num_blocks, num_in, block // 2)
    return torch.cat([halves & 15, halves >> 4], dim=-1)


@functools.cache
def _packs_as_expected() -> bool:
    """Whether torch on this machine interleaves blocks as :func:`unpack_blocks` reads them."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 16, (128, 64), dtype=torch.int32, generator=generator)
    unpacked = unpack_blocks(torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 2))
    return torch.equal(unpacked.transpose(1, 2).flatten(0, 1).int(), values)
