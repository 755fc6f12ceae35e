"""The product of ``--batch-invariant``: right, and the same to the last bit however many tokens share it."""

from __future__ import annotations

import pytest
import torch

from octavo.operations import LinearNeed
from octavo_kernels.activation import silu_and_mul
from octavo_kernels.invariant_linear import InvariantLinear
from octavo_kernels.linear import linear_reference


def make(device: torch.device, in_features: int, out_features: int, *, bias: bool) -> InvariantLinear:
    weight = torch.randn(out_features, in_features, device=device).half() / in_features**0.5
    need = LinearNeed(device, torch.float16, in_features, out_features, batch_invariant=True)
    return InvariantLinear(need, weight, torch.randn(out_features, device=device).half() if bias else None)


@pytest.mark.parametrize("num_tokens", [0, 1, 5, 64, 65, 200])
@pytest.mark.parametrize(("in_features", "out_features"), [(64, 40), (1544, 72), (2176, 200)])
@pytest.mark.parametrize("bias", [False, True])
def test_multiplies(device: torch.device, num_tokens: int, in_features: int, out_features: int, bias: bool) -> None:
    layer = make(device, in_features, out_features, bias=bias)
    x = torch.randn(num_tokens, in_features, device=device).half()
    expected = linear_reference(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer.apply(x).float(), expected, atol=4e-3, rtol=4e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter adds up as numpy likes")
@pytest.mark.parametrize(("in_features", "out_features"), [(1544, 72), (4096, 1024), (14336, 4096), (2048, 20000)])
def test_a_row_does_not_depend_on_its_neighbours(device: torch.device, in_features: int, out_features: int) -> None:
    layer = make(device, in_features, out_features, bias=True)
    x = torch.randn(700, in_features, device=device).half()
    whole = layer.apply(x)
    for num_tokens in (1, 2, 15, 16, 17, 33, 64, 65, 128, 129, 699):
        assert torch.equal(layer.apply(x[:num_tokens]), whole[:num_tokens]), num_tokens
    assert torch.equal(layer.apply(x[300:301]), whole[300:301])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter adds up as numpy likes")
def test_a_row_that_is_gated_does_not_depend_on_its_neighbours(device: torch.device) -> None:
    layer = make(device, 4096, 16384, bias=False)
    x = torch.randn(100, 4096, device=device).half()
    whole = silu_and_mul(layer.apply(x))
    for num_tokens in (1, 2, 16, 17, 64, 65):
        gated = layer.apply_gated(x[:num_tokens])
        assert (gated is None) == (num_tokens in (1, 65))
        if gated is not None:
            assert torch.equal(gated, whole[:num_tokens]), num_tokens


def test_says_why_it_cannot_serve() -> None:
    reasons = "; ".join(InvariantLinear.missing(LinearNeed(torch.device("cpu"), torch.float32, 12, 8)))
    assert "CUDA device" in reasons
    assert "multiple of 8" in reasons
