"""Linear layers whose methods take over what follows them, and those whose methods do not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.interfaces import LinearMethod, LinearPart, LinearSpec
from octavo.layers.activation import SiluAndMul, TorchSiluAndMul
from octavo.layers.linear import Linear, TorchLinear
from octavo.layers.norm import RMSNorm, TorchRMSNorm
from octavo.operations import ActivationNeed, LinearNeed, NormNeed

CPU = torch.device("cpu")
HIDDEN, SIZE = 8, 6


class Doing(TorchLinear):
    """Gates its output and adds it from three tokens on, and counts how often it did."""

    num_done = 0

    def apply_gated(self, x: Tensor) -> Tensor | None:
        if len(x) < 3:
            return None
        self.num_done += 1
        gate, up = self.apply(x).chunk(2, dim=-1)
        return F.silu(gate) * up

    def apply_onto(self, x: Tensor, residual: Tensor) -> Tensor | None:
        if len(x) < 3:
            return self.apply(x)
        self.num_done += 1
        residual += self.apply(x)
        return None


def make(method: type[TorchLinear], num_in: int, num_out: int) -> tuple[Linear, TorchLinear]:
    torch.manual_seed(0)
    made = method(LinearNeed(CPU, torch.float32, num_in, num_out), torch.randn(num_out, num_in), None)
    parts = tuple(LinearPart(name, num_out // 2, slice(0, num_out // 2)) for name in ("gate", "up"))
    kept: LinearMethod = made
    return Linear(LinearSpec("both", parts, num_in, slice(0, num_in), False), kept), made


@pytest.mark.parametrize(("num_tokens", "num_done"), [(2, 0), (3, 1)])
def test_a_product_that_can_gates_its_output(num_tokens: int, num_done: int) -> None:
    kernel = TorchSiluAndMul(ActivationNeed(CPU, torch.float32, SIZE))
    x = torch.randn(num_tokens, HIDDEN)
    plain, _ = make(TorchLinear, HIDDEN, 2 * SIZE)
    layer, method = make(Doing, HIDDEN, 2 * SIZE)
    torch.testing.assert_close(SiluAndMul(layer, kernel, fuses=True)(x), SiluAndMul(plain, kernel, fuses=True)(x))
    assert isinstance(method, Doing)
    assert method.num_done == num_done


def test_an_activation_with_a_form_of_its_own_is_not_passed_over() -> None:
    layer, method = make(Doing, HIDDEN, 2 * SIZE)
    SiluAndMul(layer, TorchSiluAndMul(ActivationNeed(CPU, torch.float32, SIZE)), fuses=False)(torch.randn(5, HIDDEN))
    assert isinstance(method, Doing)
    assert method.num_done == 0


@pytest.mark.parametrize("num_tokens", [2, 3])
@pytest.mark.parametrize("method", [TorchLinear, Doing])
def test_a_norm_finds_the_sum_whoever_added(method: type[TorchLinear], num_tokens: int) -> None:
    layer, _ = make(method, SIZE, HIDDEN)
    norm = RMSNorm(torch.rand(HIDDEN), 1e-6, TorchRMSNorm(NormNeed(CPU, torch.float32, HIDDEN)))
    x, residual = torch.randn(num_tokens, SIZE), torch.randn(num_tokens, HIDDEN)
    total = residual + layer(x)
    normalized, found = norm.add(*layer.onto(x, residual))
    torch.testing.assert_close(found, total)
    torch.testing.assert_close(normalized, norm(total))
