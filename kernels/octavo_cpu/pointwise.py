"""Norms and gated activations in C."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from octavo_cpu.library import DTYPES, common_lacks, library

if TYPE_CHECKING:
    from octavo.operations import ActivationNeed, NormNeed

MULTIPLE = 16  # rows are made of whole vectors, of up to 16 elements


def _size_lacks(size: int) -> list[str]:
    return [f"needs a size that is a multiple of {MULTIPLE}, not {size}"] if size % MULTIPLE else []


class RMSNorm:
    """The operation ``rms_norm``."""

    def __init__(self, need: NormNeed) -> None:
        self._size = need.size
        self._dtype = DTYPES[need.dtype]
        self._kernel = library().rms_norm

    @classmethod
    def missing(cls, need: NormNeed) -> list[str]:
        return [*common_lacks(need.device, need.dtype), *_size_lacks(need.size)]

    def __call__(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        y = torch.empty_like(x)
        rows = x.numel() // self._size
        self._kernel(y.data_ptr(), x.data_ptr(), None, weight.data_ptr(), eps, rows, self._size, self._dtype)
        return y

    def add(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Overwrites both arguments where they are contiguous."""
        x, residual = x.contiguous(), residual.contiguous()
        rows, at = x.numel() // self._size, x.data_ptr()
        self._kernel(at, at, residual.data_ptr(), weight.data_ptr(), eps, rows, self._size, self._dtype)
        return x, residual


class SiluAndMul:
    """The operation ``silu_and_mul``."""

    def __init__(self, need: ActivationNeed) -> None:
        self._size = need.size
        self._dtype = DTYPES[need.dtype]
        self._kernel = library().silu_and_mul

    @classmethod
    def missing(cls, need: ActivationNeed) -> list[str]:
        return [*common_lacks(need.device, need.dtype), *_size_lacks(need.size)]

    def __call__(self, gate_up: Tensor) -> Tensor:
        gate_up = gate_up.contiguous()
        y = torch.empty((*gate_up.shape[:-1], self._size), dtype=gate_up.dtype)
        rows = gate_up.numel() // (2 * self._size)
        self._kernel(y.data_ptr(), gate_up.data_ptr(), rows, self._size, self._dtype)
        return y
