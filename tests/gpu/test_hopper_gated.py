"""What only the device can say of products that gate their output: layouts, registers, late copies."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")

from octavo.operations import LinearNeed
from octavo_kernels.activation import silu_and_mul, silu_and_mul_reference
from octavo_kernels.hopper_gated import HopperLinear, gated_tiling, multiply_gated

pytestmark = pytest.mark.gpu


def relative(result: torch.Tensor, right: torch.Tensor) -> float:
    return float((result.float() - right).norm() / right.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens_of_tiling", [1024, 8192])
@pytest.mark.parametrize(
    ("num_tokens", "size", "num_in"), [(1, 128, 64), (300, 256, 128), (1025, 1408, 4096), (4096, 14336, 4096)]
)
def test_it_is_as_near_to_float32_as_two_kernels(
    dtype: torch.dtype, tokens_of_tiling: int, num_tokens: int, size: int, num_in: int
) -> None:
    torch.manual_seed(0)
    x = torch.randn(num_tokens, num_in, device="cuda", dtype=dtype)
    weight = torch.randn(2 * size, num_in, device="cuda", dtype=dtype) * num_in**-0.5
    right = silu_and_mul_reference(x.float() @ weight.float().T)
    tile = gated_tiling(tokens_of_tiling)
    result = multiply_gated(x, weight, tile)
    assert relative(result, right) < 1.1 * relative(silu_and_mul(F.linear(x, weight)), right) + 1e-6
    for _ in range(5):
        assert torch.equal(multiply_gated(x, weight, tile), result)


def test_the_product_adds_as_exactly_as_the_norm() -> None:
    need = LinearNeed(torch.device("cuda"), torch.bfloat16, 1024, 512)
    weight = torch.randn(512, 1024, device="cuda", dtype=torch.bfloat16) / 32
    layer = HopperLinear(need, weight, None)
    x = torch.randn(2048, 1024, device="cuda", dtype=torch.bfloat16)
    residual = torch.randn(2048, 512, device="cuda", dtype=torch.bfloat16)
    right = residual.float() + x.float() @ weight.float().T
    in_the_norm = residual + layer.apply(x)
    assert layer.apply_onto(x, residual) is None
    assert relative(residual, right) <= relative(in_the_norm, right)
