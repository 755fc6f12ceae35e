"""What ``octavo bench kernels`` runs of the products with quantized weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from octavo.bench.kernel_cases import Case, Prepared, Setting
from octavo.bench.timing import relative_error
from octavo_quant import fp8_weight, packed
from octavo_quant.fp8_linear import ReferenceFp8
from octavo_quant.fp8_weight import Fp8Need, Fp8Weight
from octavo_quant.packed import PackedNeed, PackedWeight
from octavo_quant.packed_linear import ReferencePacked

GROUP_SIZE = 128


def packed_cases(setting: Setting) -> Iterator[Case]:
    """Asymmetric 4 bits in groups of 128 inputs, or as many as divide them, as AWQ has them."""
    for name, (num_in, num_out) in _layers(setting):
        group_size = math.gcd(num_in, GROUP_SIZE)
        shape = (num_in // group_size, num_out)
        device = setting.device
        weight = PackedWeight(
            torch.randint(0, 256, (num_out, num_in // 2), dtype=torch.uint8, device=device),
            ((torch.rand(shape, device=device) + 0.5) / (5 * num_in**0.5)).half(),
            torch.randint(0, 16, shape, dtype=torch.uint8, device=device),
            group_size,
            None,
            4,
        )
        need = PackedNeed(device, setting.dtype, num_in, num_out, 4, group_size, symmetric=False, permuted=False)
        reference = ReferencePacked(need, weight, None)
        for num_tokens in setting.num_tokens:
            yield _case(setting, packed.OPERATION, name, num_tokens, need, weight, reference)


def fp8_cases(setting: Setting) -> Iterator[Case]:
    """A scale for each output, and for each token. The error is that against inputs that are rounded so."""
    for name, (num_in, num_out) in _layers(setting):
        weight = Fp8Weight.online(setting.randn(num_out, num_in) * num_in**-0.5)
        need = Fp8Need(
            setting.device, setting.dtype, num_in, num_out, weight.activation, weight.row_block, weight.column_block
        )
        reference = ReferenceFp8(need, weight, None)
        for num_tokens in setting.num_tokens:
            yield _case(setting, fp8_weight.OPERATION, name, num_tokens, need, weight, reference)


def _layers(setting: Setting) -> Iterator[tuple[str, tuple[int, int]]]:
    """The head is not quantized."""
    return ((name, shape) for name, shape in setting.linears.items() if name != "lm_head")


def _case(
    setting: Setting,
    operation: str,
    name: str,
    num_tokens: int,
    need: PackedNeed | Fp8Need,
    weight: PackedWeight | Fp8Weight,
    reference: ReferencePacked | ReferenceFp8,
) -> Case:
    x = setting.randn(num_tokens, need.in_features)

    def prepare(kernel: Any) -> Prepared:
        layers = [kernel(need, weight, None) for _ in range(setting.num_copies(weight.num_bytes()))]
        calls: list[Callable[[], Tensor]] = [partial(layer.apply, x) for layer in layers]
        return Prepared(calls, lambda: relative_error(calls[0](), reference.apply(x.float())))

    num_bytes = weight.num_bytes() + (need.in_features + need.out_features) * num_tokens * x.element_size()
    num_operations = 2 * num_tokens * need.in_features * need.out_features
    return Case(operation, f"{name}, {num_tokens}", need, num_bytes, num_operations, prepare)
