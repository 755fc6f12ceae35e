"""Root-mean-square normalization against float32."""

from __future__ import annotations

import pytest
import torch

from octavo.operations import NormNeed
from octavo_kernels.norm import TritonRMSNorm, rms_norm, rms_norm_reference


@pytest.mark.parametrize("size", [64, 96, 1000])
@pytest.mark.parametrize("num_tokens", [0, 1, 5])
def test_normalizes(device: torch.device, size: int, num_tokens: int) -> None:
    x = torch.randn(num_tokens, size, device=device).half()
    weight = torch.rand(size, device=device).half()
    torch.testing.assert_close(
        rms_norm(x, weight, 1e-5).float(), rms_norm_reference(x, weight, 1e-5), atol=4e-3, rtol=4e-3
    )


def test_a_row_of_a_wider_tensor_is_normalized_in_place_of_its_stride(device: torch.device) -> None:
    wide = torch.randn(4, 200, device=device).half()
    weight = torch.rand(64, device=device).half()
    x = wide[:, 32:96]
    torch.testing.assert_close(
        rms_norm(x, weight, 1e-5).float(), rms_norm_reference(x, weight, 1e-5), atol=4e-3, rtol=4e-3
    )


def test_adds_the_residual_first_and_returns_the_sum(device: torch.device) -> None:
    x, residual = torch.randn(2, 5, 96, device=device).half()
    weight = torch.rand(96, device=device).half()
    total = x + residual
    normalized, new_residual = TritonRMSNorm(NormNeed(device, x.dtype, 96)).add(x, residual, weight, 1e-5)
    torch.testing.assert_close(new_residual, total, atol=0, rtol=0)
    torch.testing.assert_close(normalized.float(), rms_norm_reference(total, weight, 1e-5), atol=4e-3, rtol=4e-3)


def test_refuses_a_residual_that_is_not_contiguous(device: torch.device) -> None:
    x = torch.randn(4, 64, device=device).half()
    with pytest.raises(ValueError, match="contiguous"):
        rms_norm(x, x[0], 1e-5, torch.randn(64, 4, device=device).half().t())
