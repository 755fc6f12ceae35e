"""Products with FP8 weights that run anywhere: the reference, and one that leaves the input alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo_quant.fp8_weight import Fp8Need, Fp8Weight


class ReferenceFp8:
    """Rounds the input as the checkpoint says and multiplies in float32: the oracle of ``linear_fp8``."""

    def __init__(self, need: Fp8Need, weight: Fp8Weight, bias: Tensor | None) -> None:
        self._weight = weight
        self._bias = bias

    @classmethod
    def missing(cls, need: Fp8Need) -> list[str]:
        return []

    def apply(self, x: Tensor) -> Tensor:
        y = F.linear(self._weight.rounding(x), self._weight.dequantize(torch.float32)).to(x.dtype)
        return y if self._bias is None else y + self._bias

    def num_bytes(self) -> int:
        return self._weight.num_bytes() + (0 if self._bias is None else self._bias.nbytes)


class WideFp8:
    """On a CPU, which has no FP8 units: weights are widened once, and the input loses nothing.

    Converting weights at each product takes twenty times as long as multiplying by them, so memory is what for plain
    weights; 4-bit formats are those that save some here.
    """

    def __init__(self, need: Fp8Need, weight: Fp8Weight, bias: Tensor | None) -> None:
        self._weight = weight.dequantize(torch.float32).to(need.dtype)
        self._bias = bias

    @classmethod
    def missing(cls, need: Fp8Need) -> list[str]:
        if need.device.type != "cpu":
            return [f"runs on a CPU, not on {need.device.type}"]
        # float32 is for exact results: there the reference follows the checkpoint's rounding
        return ["the input is float32"] if need.dtype == torch.float32 else []

    def apply(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight, self._bias)

    def num_bytes(self) -> int:
        return self._weight.nbytes + (0 if self._bias is None else self._bias.nbytes)
