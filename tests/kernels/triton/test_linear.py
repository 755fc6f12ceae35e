"""Products for few tokens against float32."""

from __future__ import annotations

import pytest
import torch

from octavo.operations import LinearNeed
from octavo_kernels.activation import silu_and_mul_reference
from octavo_kernels.linear import MAX_TOKENS, SkinnyLinear, linear_reference


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 7, MAX_TOKENS, MAX_TOKENS + 1])
@pytest.mark.parametrize(("in_features", "out_features"), [(64, 40), (1544, 72), (2048, 200)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_multiplies(
    device: torch.device, num_tokens: int, in_features: int, out_features: int, with_bias: bool
) -> None:
    weight = torch.randn(out_features, in_features, device=device).half() / in_features**0.5
    bias = torch.randn(out_features, device=device).half() if with_bias else None
    x = torch.randn(num_tokens, in_features, device=device).half()
    layer = SkinnyLinear(LinearNeed(device, torch.float16, in_features, out_features), weight, bias)
    for _ in range(2):  # the second call finds the counters as the first one left them
        torch.testing.assert_close(layer.apply(x).float(), linear_reference(x, weight, bias), atol=4e-3, rtol=4e-3)


@pytest.mark.parametrize("num_tokens", [4, 40])
def test_a_narrow_layer_is_split_and_the_order_of_arrival_does_not_matter(
    device: torch.device, num_tokens: int
) -> None:
    weight = torch.randn(64, 4096, device=device).half()
    x = torch.randn(num_tokens, 4096, device=device).half()
    layer = SkinnyLinear(LinearNeed(device, torch.float16, 4096, 64), weight, None)
    assert layer.few(num_tokens).num_splits > 1
    first = layer.apply(x)
    assert all(torch.equal(first, layer.apply(x)) for _ in range(5))


@pytest.mark.parametrize("num_tokens", [2, 17, MAX_TOKENS])
def test_few_tokens_are_gated_by_the_product(device: torch.device, num_tokens: int) -> None:
    weight = torch.randn(16384, 48, device=device).half() / 48**0.5
    x = torch.randn(num_tokens, 48, device=device).half()
    layer = SkinnyLinear(LinearNeed(device, torch.float16, 48, 16384), weight, None)
    gated = layer.apply_gated(x)
    assert gated is not None
    torch.testing.assert_close(gated.float(), silu_and_mul_reference(linear_reference(x, weight)), atol=4e-3, rtol=4e-3)


@pytest.mark.parametrize(
    ("num_tokens", "in_features", "out_features", "with_bias"),
    [
        (0, 64, 16384, False),
        (1, 64, 16384, False),
        (MAX_TOKENS + 1, 64, 16384, False),
        (2, 64, 16384, True),
        (2, 4096, 64, False),
        (2, 64, 16400, False),
    ],
)
def test_what_it_cannot_gate_is_left_to_an_activation(
    device: torch.device, num_tokens: int, in_features: int, out_features: int, with_bias: bool
) -> None:
    """No tokens, one, many, a bias, a narrow layer that is split, half a tile at the end."""
    weight = torch.zeros(out_features, in_features, device=device).half()
    bias = torch.zeros(out_features, device=device).half() if with_bias else None
    layer = SkinnyLinear(LinearNeed(device, torch.float16, in_features, out_features), weight, bias)
    assert layer.apply_gated(torch.zeros(num_tokens, in_features, device=device).half()) is None


@pytest.mark.parametrize("num_tokens", [16, 17, MAX_TOKENS])
def test_a_wide_layer_has_larger_tiles_for_many_tokens(device: torch.device, num_tokens: int) -> None:
    weight = torch.randn(16400, 32, device=device).half()
    x = torch.randn(num_tokens, 32, device=device).half()
    layer = SkinnyLinear(LinearNeed(device, torch.float16, 32, 16400), weight, None)
    assert layer.few(num_tokens).block_n == (128 if num_tokens > 16 else 64)
    torch.testing.assert_close(layer.apply(x).float(), linear_reference(x, weight), atol=4e-3, rtol=4e-3)


def test_counts_its_bytes(device: torch.device) -> None:
    weight, bias = torch.zeros(8, 16, device=device).half(), torch.zeros(8, device=device).half()
    assert SkinnyLinear(LinearNeed(device, torch.float16, 16, 8), weight, bias).num_bytes() == 2 * 8 * 17


def test_says_why_it_cannot_serve() -> None:
    need = LinearNeed(torch.device("cpu"), torch.float32, 12, 8, batch_invariant=True)
    reasons = "; ".join(SkinnyLinear.missing(need))
    assert "CUDA device" in reasons
    assert "batch-invariant" in reasons
    assert "multiple of 8" in reasons
