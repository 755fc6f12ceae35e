"""Tokens rounded to FP8: against plain torch, and by whom they are rounded makes no difference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")

from octavo.operations import ActivationNeed, NormNeed
from octavo_kernels.activation import TritonSiluAndMul
from octavo_kernels.fp8_linear import TritonFp8
from octavo_kernels.fp8_tokens import MAX_SIZE, RoundedTokens, TokenRounding, round_tokens, round_tokens_reference
from octavo_kernels.hopper_linear import HopperFp8, fp8_order
from octavo_kernels.norm import TritonRMSNorm
from octavo_quant.fp8_linear import ReferenceFp8
from octavo_quant.fp8_weight import Activation, Fp8Need, Fp8Weight

ORDERS = pytest.mark.parametrize("reordered", [False, True], ids=["in order", "reordered"])


def assert_same(rounded: Tensor, expected: RoundedTokens) -> None:
    assert isinstance(rounded, RoundedTokens)
    assert torch.equal(rounded.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(rounded.scales, expected.scales)


@ORDERS
@pytest.mark.parametrize(("num_tokens", "size"), [(0, 64), (3, 192), (2, 1024)])
def test_rounds_as_torch_does(device: torch.device, num_tokens: int, size: int, reordered: bool) -> None:
    x = torch.randn(num_tokens, 2 * size, device=device).half()[:, size:]  # rows lie apart
    rounded = round_tokens(x, reordered=reordered)
    values, scales = round_tokens_reference(x, fp8_order(device) if reordered else None)
    torch.testing.assert_close(rounded.scales, scales)
    # over all: quotients may differ in their last bit, and the interpreter loses a carry into the exponent at times
    error = (rounded.float() - values.float()).norm() / values.float().norm().clamp(min=1.0)
    assert error < (0.01 if device.type == "cuda" else 0.06)


def test_the_largest_value_of_a_token_becomes_the_largest_there_is_and_zeros_stay(device: torch.device) -> None:
    x = torch.randn(3, 80, device=device).half()
    x[1] = 0.0
    rounded = round_tokens(x)
    torch.testing.assert_close(rounded.scales[0, 0], x[0].float().abs().max() / 448)
    assert rounded[0].float().abs().max() == 448
    assert not rounded[1].float().any()


@ORDERS
@pytest.mark.parametrize("size", [64, 192, 1024])
def test_a_norm_rounds_what_it_would_have_returned(device: torch.device, size: int, reordered: bool) -> None:
    form = TokenRounding(above=3, reordered=reordered)
    plain, rounding = (TritonRMSNorm(NormNeed(device, torch.float16, size, form=f)) for f in (None, form))
    x, residual = torch.randn(2, 4, size, device=device).half()
    weight = torch.randn(size, device=device).half()
    assert_same(rounding(x, weight, 1e-5), round_tokens(plain(x, weight, 1e-5), reordered=reordered))

    normalized, total = plain.add(x, residual.clone(), weight, 1e-5)
    rounded, same = rounding.add(x, residual, weight, 1e-5)
    assert_same(rounded, round_tokens(normalized, reordered=reordered))
    assert torch.equal(same, total)


@ORDERS
@pytest.mark.parametrize("size", [64, 192, 1536])
def test_an_activation_rounds_what_it_would_have_returned(device: torch.device, size: int, reordered: bool) -> None:
    form = TokenRounding(above=3, reordered=reordered)
    plain, rounding = (TritonSiluAndMul(ActivationNeed(device, torch.float16, size, form=f)) for f in (None, form))
    gate_up = torch.randn(4, 2 * size, device=device).half()
    assert_same(rounding(gate_up), round_tokens(plain(gate_up), reordered=reordered))


def test_few_tokens_stay_plain_and_so_do_those_too_long_for_one_program(device: torch.device) -> None:
    form = TokenRounding(above=64)
    assert form.empty(64, 128, device) is None
    assert form.empty(65, MAX_SIZE + 1, device) is None
    rounded = form.empty(65, MAX_SIZE, device)
    assert rounded is not None
    assert (rounded.shape, rounded.scales.shape) == ((65, MAX_SIZE), (65, 1))
    x = torch.randn(2, 64, device=device).half()
    norm = TritonRMSNorm(NormNeed(device, x.dtype, 64, form=form))
    assert norm(x, x[0], 1e-5).dtype == torch.float16


def test_a_form_that_is_not_known_is_left_to_the_layer_that_wants_it(device: torch.device) -> None:
    gate_up = torch.randn(4, 128, device=device).half()
    kernel = TritonSiluAndMul(ActivationNeed(device, gate_up.dtype, 64, form="somebody else's"))
    assert type(kernel(gate_up)) is Tensor


@pytest.mark.parametrize("kernel", [TritonFp8, HopperFp8])
def test_a_layer_multiplies_what_was_rounded_for_it_as_what_it_rounds_itself(
    device: torch.device, kernel: type[TritonFp8 | HopperFp8]
) -> None:
    size, num_tokens = 256, 96
    weight = Fp8Weight.online(torch.randn(48, size, device=device))
    need = Fp8Need(device, torch.bfloat16, size, 48, weight.activation, weight.row_block, weight.column_block)
    bias = torch.randn(48, device=device).bfloat16()
    layer = kernel(need, weight, bias)
    if layer.form is None:
        pytest.skip("on a CPU it multiplies by weights that were widened")
    dtype = torch.float16  # the interpreter does not multiply bfloat16
    plain, rounding = (TritonSiluAndMul(ActivationNeed(device, dtype, size, form=f)) for f in (None, layer.form))
    gate_up = torch.randn(num_tokens, 2 * size, device=device).to(dtype)
    result = layer.apply(rounding(gate_up))
    assert torch.equal(result, layer.apply(plain(gate_up)))
    expected = ReferenceFp8(need, weight, bias).apply(plain(gate_up)).float()
    assert (result.float() - expected).norm() < (0.02 if device.type == "cuda" else 0.08) * expected.norm()


@pytest.mark.parametrize(
    ("activation", "form"),
    [("token", TokenRounding(32, reordered=True)), ("tensor", TokenRounding(32, reordered=True)), ("none", None)],
)
def test_only_layers_that_round_want_rounded_tokens(
    device: torch.device, activation: Activation, form: TokenRounding | None
) -> None:
    weight = Fp8Weight.online(torch.randn(32, 128, device=device))
    need = Fp8Need(device, torch.bfloat16, 128, 32, activation, weight.row_block, weight.column_block)
    assert HopperFp8(need, weight, None).form == form
