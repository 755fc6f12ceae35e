"""Norms and activations in C say the same as torch's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.layers.activation import TorchSiluAndMul
from octavo.layers.norm import TorchRMSNorm
from octavo.operations import ActivationNeed, NormNeed
from octavo_cpu.pointwise import RMSNorm, SiluAndMul

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
shapes = st.tuples(st.integers(0, 9), st.sampled_from([16, 64, 176, 576]))
dtypes = st.sampled_from([torch.float32, torch.bfloat16])


@settings(max_examples=40, deadline=None)
@given(shape=shapes, dtype=dtypes, scale=st.sampled_from([1e-3, 1.0, 1e3]))
def test_rms_norm(shape: tuple[int, int], dtype: torch.dtype, scale: float) -> None:
    need = NormNeed(CPU, dtype, shape[1])
    x, weight = (torch.randn(shape) * scale).to(dtype), torch.randn(shape[1]).to(dtype)
    expected = TorchRMSNorm(need)(x, weight, 1e-5)
    result = RMSNorm(need)(x, weight, 1e-5)
    torch.testing.assert_close(result, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@settings(max_examples=40, deadline=None)
@given(shape=shapes, dtype=dtypes)
def test_rms_norm_after_adding_the_residual(shape: tuple[int, int], dtype: torch.dtype) -> None:
    need = NormNeed(CPU, dtype, shape[1])
    x, residual, weight = (torch.randn(size).to(dtype) for size in (shape, shape, shape[1:]))
    expected, expected_residual = TorchRMSNorm(need).add(x.clone(), residual.clone(), weight, 1e-5)
    result, new_residual = RMSNorm(need).add(x, residual, weight, 1e-5)
    assert torch.equal(new_residual, expected_residual)
    torch.testing.assert_close(result, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_rms_norm_of_heads_that_lie_apart() -> None:
    need = NormNeed(CPU, torch.float32, 32)
    heads, weight = torch.randn(5, 6, 32)[:, 1:3], torch.randn(32)
    torch.testing.assert_close(RMSNorm(need)(heads, weight, 1e-6), TorchRMSNorm(need)(heads, weight, 1e-6))


@settings(max_examples=40, deadline=None)
@given(shape=shapes, dtype=dtypes, scale=st.sampled_from([0.1, 1.0, 30.0, 1000.0]))
def test_silu_and_mul(shape: tuple[int, int], dtype: torch.dtype, scale: float) -> None:
    num_rows, size = shape
    need = ActivationNeed(CPU, dtype, size)
    gate_up = (torch.randn(num_rows, 2 * size) * scale).to(dtype)
    expected = TorchSiluAndMul(need)(gate_up)
    torch.testing.assert_close(SiluAndMul(need)(gate_up), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_not_a_number_stays_one() -> None:
    for dtype in TOLERANCE:
        need = NormNeed(CPU, dtype, 16)
        x = torch.ones(2, 16, dtype=dtype)
        x[1, 3] = float("nan")
        result = RMSNorm(need)(x, torch.ones(16, dtype=dtype), 1e-5)
        assert result[0].isfinite().all()
        assert result[1].isnan().all()


@pytest.mark.parametrize(
    ("device", "dtype", "size", "reason"),
    [
        (torch.device("cuda"), torch.float32, 64, "runs on a CPU, not on cuda"),
        (CPU, torch.float16, 64, "not in torch.float16"),
        (CPU, torch.float32, 24, "a size that is a multiple of 16, not 24"),
    ],
)
def test_says_what_is_missing(device: torch.device, dtype: torch.dtype, size: int, reason: str) -> None:
    for lacks in (
        RMSNorm.missing(NormNeed(device, dtype, size)),
        SiluAndMul.missing(ActivationNeed(device, dtype, size)),
    ):
        assert len(lacks) == 1
        assert reason in lacks[0]
