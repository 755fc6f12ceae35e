"""Gated activations."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

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
