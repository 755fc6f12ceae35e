"""Root-mean-square normalization (Zhang & Sennrich 2019), alone and fused with the residual addition before it."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from octavo.operations import NormNeed


class TorchRMSNorm:
    """The operation ``rms_norm`` in plain torch: computed in float32, returned in the dtype of ``x``."""

    def __init__(self, need: NormNeed) -> None:
        self._shape = (need.size,)

    @classmethod
    def missing(cls, need: NormNeed) -> list[str]:
        return []

    def __call__(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [..., size] -> the same shape: x / sqrt(mean(x²) + eps) * weight."""
        normalized = F.rms_norm(x.float(), self._shape, eps=eps).to(x.dtype)
        return normalized * weight

    def add(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(norm of x + residual, x + residual); may reuse the memory of either argument."""
        residual = residual + x
        return self(residual, weight, eps), residual


class RMSNorm:
    """A loaded norm. Called, it normalizes; ``add`` adds the residual first and returns both."""

    def __init__(self, weight: Tensor, eps: float, kernel: Any) -> None:
        self.weight = weight
        self.eps = eps
        self.kernel = kernel

    def __call__(self, x: Tensor) -> Tensor:
        """x [num_tokens, size] -> the same shape."""
        result: Tensor = self.kernel(x, self.weight, self.eps)
        return result

    def add(self, x: Tensor | None, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """(norm of x + residual, x + residual). The first norm of a model has no residual yet, and after
        :meth:`octavo.layers.linear.Linear.onto` there may be no x any more: None stands for either."""
        if x is None or residual is None:
            total = x if residual is None else residual
            assert total is not None
            return self(total), total
        result: tuple[Tensor, Tensor] = self.kernel.add(x, residual, self.weight, self.eps)
        return result
