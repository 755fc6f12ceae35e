"""Products with FP8 weights against the reference of the quantization plugin."""

from __future__ import annotations

import pytest
import torch

from octavo_kernels.fp8_linear import TritonFp8, few_tokens_fp8_tiling
from octavo_kernels.linear import MAX_TOKENS
from octavo_quant.fp8_linear import ReferenceFp8
from octavo_quant.fp8_weight import Activation, Fp8Need, Fp8Weight


def make(
    device: torch.device, num_in: int, num_out: int, activation: Activation, block: tuple[int, int] | None = None
) -> tuple[Fp8Need, Fp8Weight]:
    plain = torch.randn(num_out, num_in, device=device) / num_in**0.5
    weight = Fp8Weight.online(plain)
    if block is not None:
        shape = (-(-num_out // block[0]), -(-num_in // block[1]))
        scales = (torch.rand(shape, device=device) + 0.5) / 448
        weight = Fp8Weight(weight.values, scales, *block, activation)
    elif activation == "none":
        weight = Fp8Weight(weight.values, weight.scales, 1, num_in, "none")
    need = Fp8Need(device, torch.float16, num_in, num_out, activation, weight.row_block, weight.column_block)
    return need, weight


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 17, MAX_TOKENS + 1])
@pytest.mark.parametrize(("num_in", "num_out"), [(64, 40), (1040, 24)])
@pytest.mark.parametrize("block", [None, (16, 32), (128, 128)])
def test_multiplies(
    device: torch.device, num_tokens: int, num_in: int, num_out: int, block: tuple[int, int] | None
) -> None:
    need, weight = make(device, num_in, num_out, "none", block)
    bias = torch.randn(num_out, device=device).half() if block is None else None
    x = torch.randn(num_tokens, num_in, device=device).half()
    kernel, reference = TritonFp8(need, weight, bias), ReferenceFp8(need, weight, bias)
    for _ in range(2):  # the second call finds the counters as the first one left them
        torch.testing.assert_close(kernel.apply(x), reference.apply(x), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("num_tokens", [1, 33, 100])
def test_rounding_of_activations_is_within_what_the_checkpoint_allows(device: torch.device, num_tokens: int) -> None:
    need, weight = make(device, 256, 48, "token")
    x = torch.randn(num_tokens, 256, device=device).half()
    expected = ReferenceFp8(need, weight, None).apply(x).float()
    error = (TritonFp8(need, weight, None).apply(x).float() - expected).norm() / expected.norm()
    assert error < 0.04  # 3 bits of mantissa


def test_a_narrow_layer_is_split_and_the_order_of_arrival_does_not_matter(device: torch.device) -> None:
    need, weight = make(device, 4096, 64, "none")
    assert few_tokens_fp8_tiling(4096, 64, 4096, 16).num_splits > 1
    layer, x = TritonFp8(need, weight, None), torch.randn(4, 4096, device=device).half()
    first = layer.apply(x)
    assert all(torch.equal(first, layer.apply(x)) for _ in range(3))


def test_says_why_it_cannot_serve() -> None:
    reasons = "; ".join(TritonFp8.missing(Fp8Need(torch.device("cpu"), torch.float32, 72, 8, "none", 1, 24)))
    for part in ("CUDA device", "multiple of 16, not 72", "multiple of 16 inputs"):
        assert part in reasons
