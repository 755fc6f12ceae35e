"""Writes tensors in the layouts of AWQ, GPTQ and compressed-tensors, by their definitions."""

from __future__ import annotations

import torch
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output that nibble i of a word holds."""


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """Unsigned values [rows, n] -> int32 [rows, n * bits / 32], lowest bits first along the last axis."""
    values = values.long()
    stream = (values.unsqueeze(-1) >> torch.arange(bits) & 1).flatten(1)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[1] % 32)).unflatten(1, (-1, 32))
    words = (stream << torch.arange(32)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def interleave(values: Tensor) -> Tensor:
    """AWQ: unsigned values [rows, out] -> int32 [rows, out / 8]."""
    return pack_bits(values.unflatten(1, (-1, 8))[..., list(AWQ_ORDER)].flatten(1), 4)


Part = tuple[dict[str, Tensor], Tensor]
"""The tensors of one projection under their full names, and the matrix [out, in] that they stand for."""


def integers(
    seed: int, num_in: int, num_out: int, groups: Tensor, bits: int = 4, symmetric: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """values [in, out], scales and zeros [groups, out], and the matrix [out, in] that they stand for."""
    generator = torch.Generator().manual_seed(seed)
    num_groups = int(groups.max()) + 1
    values = torch.randint(0, 1 << bits, (num_in, num_out), generator=generator)
    scales = (torch.rand(num_groups, num_out, generator=generator) * 1.6 / (1 << bits)).half()
    zeros = torch.randint(1, 1 << bits, (num_groups, num_out), generator=generator)
    if symmetric:
        zeros = torch.full_like(zeros, 1 << (bits - 1))
    return values, scales, zeros, ((values - zeros[groups]).float() * scales[groups].float()).T


def in_order(num_in: int, group_size: int) -> Tensor:
    """The group of each input; -1: one for all."""
    return torch.arange(num_in) // (num_in if group_size == -1 else group_size)


def named(name: str, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name}.{key}": tensor for key, tensor in stored.items()}


def awq_part(name: str, seed: int, num_in: int, num_out: int, group_size: int) -> Part:
    values, scales, zeros, matrix = integers(seed, num_in, num_out, in_order(num_in, group_size))
    return named(name, {"qweight": interleave(values), "qzeros": interleave(zeros), "scales": scales}), matrix


def gptq_part(
    name: str,
    seed: int,
    num_in: int,
    num_out: int,
    groups: Tensor,
    bits: int = 4,
    version: int = 1,
    g_idx: bool = True,
    symmetric: bool = False,
) -> Part:
    """With the bias of zeros that auto-gptq writes for layers that have none."""
    values, scales, zeros, matrix = integers(seed, num_in, num_out, groups, bits, symmetric)
    stored = {
        "qweight": pack_bits(values.T, bits).T.contiguous(),
        "qzeros": pack_bits(zeros - int(version == 1), bits),
        "scales": scales,
        "bias": torch.zeros(num_out, dtype=torch.float16),
    }
    if g_idx:
        stored["g_idx"] = groups.int()
    return named(name, stored), matrix


def ct_part(
    name: str,
    seed: int,
    num_in: int,
    num_out: int,
    groups: Tensor,
    bits: int = 4,
    g_idx: bool = False,
    symmetric: bool = False,
) -> Part:
    values, scales, zeros, matrix = integers(seed, num_in, num_out, groups, bits, symmetric)
    stored = {
        "weight_packed": pack_bits(values.T, bits),
        "weight_scale": scales.T.contiguous(),
        "weight_shape": torch.tensor([num_out, num_in]),
    }
    if not symmetric:
        stored["weight_zero_point"] = pack_bits(zeros, bits).T.contiguous()
    if g_idx:
        stored["weight_g_idx"] = groups.int()
    return named(name, stored), matrix


def fp8_part(
    name: str, seed: int, num_out: int, num_in: int, scale_name: str, row_block: int, column_block: int
) -> Part:
    """One scale for each block of rows and columns; the last ones may be smaller."""
    generator = torch.Generator().manual_seed(seed)
    values = (torch.randn(num_out, num_in, generator=generator) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    shape = (-(-num_out // row_block), -(-num_in // column_block))
    scales = torch.rand(shape, generator=generator) * 4e-3
    matrix = values.float()
    for row in range(num_out):
        for column in range(0, num_in, column_block):
            matrix[row, column : column + column_block] *= scales[row // row_block, column // column_block]
    return named(name, {"weight": values, scale_name: scales.squeeze() if scales.numel() == 1 else scales}), matrix
