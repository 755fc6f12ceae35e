"""Gated activations."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from octavo.interfaces import GatesOutput
from octavo.layers.linear import Linear
from octavo.operations import ActivationNeed


class TorchSiluAndMul:
    """The operation ``silu_and_mul`` in plain torch: ``silu(gate) * up`` of a fused [gate | up] projection."""

    def __init__(self, need: ActivationNeed) -> None:
        self._size = need.size

    @classmethod
    def missing(cls, need: ActivationNeed) -> list[str]:
        return []

    def __call__(self, gate_up: Tensor) -> Tensor:
        """gate_up [num_tokens, 2 * size] -> [num_tokens, size]."""
        return F.silu(gate_up[..., : self._size]) * gate_up[..., self._size :]


class SiluAndMul:
    """Fused [gate | up] projections and their activation, in one kernel where that takes less time."""

    def __init__(self, gate_up: Linear, kernel: Any, *, fuses: bool) -> None:
        """``kernel`` is the operation ``silu_and_mul``; what it returns has a form of its own unless it ``fuses``."""
        self._gate_up = gate_up
        self._kernel = kernel
        self._gated = gate_up.method.apply_gated if fuses and isinstance(gate_up.method, GatesOutput) else None

    def __call__(self, x: Tensor) -> Tensor:
        """x [num_tokens, in_features] -> ``silu(gate) * up`` [num_tokens, size]."""
        gated = None if self._gated is None else self._gated(x)
        if gated is not None:
            return gated
        result: Tensor = self._kernel(self._gate_up(x))
        return result
