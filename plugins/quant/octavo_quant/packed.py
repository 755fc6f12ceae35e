"""Integer weights in groups: the one form that every 4-bit and 8-bit integer format is brought into at loading."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.interfaces import LayerLoader, LinearMethod

OPERATION = "linear_packed"
"""Made with ``(PackedNeed, PackedWeight, bias [out_features] or None)``: a LinearMethod."""


@dataclass(frozen=True, slots=True)
class PackedNeed:
    """A product with a :class:`PackedWeight`; ``dtype`` is that of the activations."""

    device: torch.device
    dtype: torch.dtype
    in_features: int
    out_features: int
    bits: int
    group_size: int
    symmetric: bool
    permuted: bool


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """``W[n, permutation[k]] = (value[n, k] - zero[k // group_size, n]) * scale[k // group_size, n]``.

    Attributes:
        values: uint8 [out_features, in_features * bits / 8], unsigned; of two 4-bit values the first is the low one.
        scales: [num_groups, out_features] in the dtype of the checkpoint.
        zeros: uint8 [num_groups, out_features]; None: ``2 ** (bits - 1)`` everywhere.
        group_size: divides in_features; groups of any other shape are cut until it does, which is exact.
        permutation: int64 [in_features], the input feature of each column (act-order); None: in order.
        bits: 4 or 8. Values of 2 and 3 bits are kept in 4.
    """

    values: Tensor
    scales: Tensor
    zeros: Tensor | None
    group_size: int
    permutation: Tensor | None
    bits: int

    @classmethod
    def pack(cls, values: Tensor, scales: Tensor, zeros: Tensor | None, groups: Tensor, bits: int) -> PackedWeight:
        """From plain parts.

        Args:
            values: uint8 [out_features, in_features], unsigned.
            scales: [num_groups, out_features].
            zeros: integers [num_groups, out_features], or None: ``2 ** (bits - 1)``.
            groups: int64 [in_features], the row of ``scales`` that each input feature uses, in any order.
            bits: 2, 3, 4 or 8.
        """
        # groups in the order of their first input feature: how a file numbers them must not matter
        labels, numbered, lengths = torch.unique(groups, return_inverse=True, return_counts=True)
        features = torch.arange(len(groups), device=groups.device)
        first = torch.full_like(labels, len(groups)).scatter_reduce(0, numbered, features, "amin")
        order = torch.argsort(first)
        groups = torch.argsort(order)[numbered]
        permutation = None
        if bool((groups[1:] < groups[:-1]).any()):
            permutation = torch.argsort(groups, stable=True)
            values = values[:, permutation]
        group_size = math.gcd(*lengths.tolist())
        rows = labels[order].repeat_interleave(lengths[order] // group_size)
        if zeros is not None and bool((zeros == 1 << (bits - 1)).all()) and bits in (4, 8):
            zeros = None
        if zeros is None and bits < 4:
            zeros = torch.full_like(scales, 1 << (bits - 1), dtype=torch.uint8)
        kept = max(bits, 4)
        if kept == 4:
            values = torch.cat([values, values.new_zeros(values.shape[0], values.shape[1] % 2)], dim=1)
            values = values[:, 0::2] | values[:, 1::2] << 4
        zeros = None if zeros is None else zeros[rows].to(torch.uint8).contiguous()
        return cls(values.contiguous(), scales[rows].contiguous(), zeros, group_size, permutation, kept)

    @property
    def out_features(self) -> int:
        return self.values.shape[0]

    @property
    def in_features(self) -> int:
        return self.scales.shape[0] * self.group_size

    def unpack(self) -> Tensor:
        """The values, uint8 [out_features, in_features]."""
        if self.bits == 8:
            return self.values
        return torch.stack([self.values & 15, self.values >> 4], dim=-1).flatten(1)[:, : self.in_features]

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """[out_features, in_features], columns in the order of the permutation."""
        values = self.unpack().reshape(self.out_features, -1, self.group_size).to(dtype)
        zeros = 1 << (self.bits - 1) if self.zeros is None else self.zeros.T.unsqueeze(-1).to(dtype)
        return ((values - zeros) * self.scales.T.unsqueeze(-1).to(dtype)).flatten(1)

    def split_groups(self, group_size: int) -> PackedWeight:
        """The same weight in groups of ``group_size``, a divisor of the present one."""
        times = self.group_size // group_size
        zeros = None if self.zeros is None else self.zeros.repeat_interleave(times, dim=0)
        scales = self.scales.repeat_interleave(times, dim=0)
        return PackedWeight(self.values, scales, zeros, group_size, self.permutation, self.bits)

    def joins(self, other: PackedWeight) -> bool:
        """Whether the two can lie side by side in one product: equal bits, and inputs in equal order."""
        if self.bits != other.bits:
            return False
        if self.permutation is None or other.permutation is None:
            return self.permutation is other.permutation
        return torch.equal(self.permutation, other.permutation)

    @staticmethod
    def join(weights: Sequence[PackedWeight]) -> PackedWeight:
        """Weights that join, their outputs side by side; groups of different sizes are cut to their common divisor."""
        size = math.gcd(*(weight.group_size for weight in weights))
        weights = [weight.split_groups(size) for weight in weights]
        first = weights[0]
        zeros = None
        if any(weight.zeros is not None for weight in weights):
            middle = 1 << (first.bits - 1)
            plain = [torch.full_like(weight.scales, middle, dtype=torch.uint8) for weight in weights]
            pairs = zip(weights, plain, strict=True)
            zeros = torch.cat([own if weight.zeros is None else weight.zeros for weight, own in pairs], dim=1)
        values = torch.cat([weight.values for weight in weights])
        scales = torch.cat([weight.scales for weight in weights], dim=1)
        return PackedWeight(values, scales, zeros, size, first.permutation, first.bits)

    def method(self, bias: Tensor | None, load: LayerLoader) -> LinearMethod:
        """The best product with this weight."""
        need = PackedNeed(
            load.placement.device,
            load.placement.dtype,
            self.in_features,
            self.out_features,
            self.bits,
            self.group_size,
            self.zeros is None,
            self.permutation is not None,
        )
        made: LinearMethod = load.kernel(OPERATION, need)(need, self, bias)
        return made

    def num_bytes(self) -> int:
        tensors = (self.values, self.scales, self.zeros, self.permutation)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def unpack_bits(words: Tensor, bits: int, num_values: int) -> Tensor:
    """Unsigned values from a stream of bits along the last axis, lowest bits first.

    words int32 [..., num_words] -> uint8 [..., num_values]. Values of 3 bits cross words, as in GPTQ's files.
    """
    if 32 % bits == 0:
        shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
        values = (words.unsqueeze(-1) >> shifts & (1 << bits) - 1).to(torch.uint8)
        return values.flatten(-2)[..., :num_values]
    ones = unpack_bits(words, 1, words.shape[-1] * 32)
    length = ones.shape[-1] // bits * bits
    weights = 1 << torch.arange(bits, dtype=torch.uint8, device=words.device)
    return (ones[..., :length].reshape(*words.shape[:-1], -1, bits) * weights).sum(-1, dtype=torch.uint8)[
        ..., :num_values
    ]


def word_slice(part: slice, bits: int, num_words: int) -> tuple[slice, slice]:
    """The words of ``num_words`` that hold the values ``part`` of a stream, and where those are in these words."""
    start = part.start // 32
    words = slice(start * bits, min(-(-part.stop // 32) * bits, num_words))
    return words, slice(part.start - start * 32, part.stop - start * 32)
