"""What ``octavo bench kernels`` runs of fused kernels that are no operation of their own."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from octavo.bench.kernel_cases import Case, Prepared, Setting
from octavo.bench.timing import relative_error
from octavo.interfaces import GatesOutput, LinearMethod
from octavo.operations import LinearNeed
from octavo_kernels.activation import silu_and_mul, silu_and_mul_reference
from octavo_kernels.launch import missing_device


def gated_cases(setting: Setting) -> Iterator[Case]:
    """A gated projection up to the end of its activation, as each product does it: itself or with a kernel more."""
    if not missing_device(setting.device, setting.dtype):
        yield from (_gated(setting, num_tokens) for num_tokens in setting.num_tokens)


def _gated(setting: Setting, num_tokens: int) -> Case:
    num_in, num_out = setting.linears["gate_up"]
    need = LinearNeed(setting.device, setting.dtype, num_in, num_out)
    x = setting.randn(num_tokens, num_in)
    weight = setting.randn(num_out, num_in) * num_in**-0.5

    def prepare(kernel: Any) -> Prepared:
        layers = [kernel(need, weight.clone(), None) for _ in range(setting.num_copies(weight.nbytes))]

        def error() -> float:
            return relative_error(_apply(layers[0], x), silu_and_mul_reference(F.linear(x.float(), weight.float())))

        return Prepared([partial(_apply, layer, x) for layer in layers], error)

    num_bytes = weight.nbytes + x.nbytes + num_tokens * num_out // 2 * x.element_size()
    size = f"gate_up + silu, {num_tokens}"
    return Case("linear", size, need, num_bytes, 2 * num_tokens * num_in * num_out, prepare)


def _apply(layer: LinearMethod, x: Tensor) -> Tensor:
    gated = layer.apply_gated(x) if isinstance(layer, GatesOutput) else None
    return silu_and_mul(layer.apply(x)) if gated is None else gated
