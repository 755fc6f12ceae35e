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
