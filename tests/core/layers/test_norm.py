"""The root-mean-square norm, alone and with the residual addition before it."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from octavo.layers.norm import RMSNorm, TorchRMSNorm
from octavo.operations import NormNeed


def norm_pair(size: int, eps: float, dtype: torch.dtype) -> tuple[RMSNorm, LlamaRMSNorm]:
    torch.manual_seed(0)
    reference = LlamaRMSNorm(size, eps).to(dtype)
    reference.weight.data.uniform_(0.5, 1.5)
    kernel = TorchRMSNorm(NormNeed(torch.device("cpu"), dtype, size))
    return RMSNorm(reference.weight.data, eps, kernel), reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("eps", "scale"), [(1e-6, 1.0), (0.3, 1.0), (1e-5, 1e-3), (1e-6, 300.0)])
def test_a_norm_is_transformers(dtype: torch.dtype, eps: float, scale: float) -> None:
    norm, reference = norm_pair(48, eps, dtype)
    x = (torch.randn(5, 48) * scale).to(dtype)
    torch.testing.assert_close(norm(x), reference(x).detach())


def test_heads_of_a_fused_projection_are_normalized_where_they_lie() -> None:
    norm, reference = norm_pair(8, 1e-6, torch.float32)
    query = torch.randn(5, 6 * 8).view(5, 6, 8)[:, :4]
    assert not query.is_contiguous()
    torch.testing.assert_close(norm(query), reference(query).detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adding_first_is_adding_then_normalizing(dtype: torch.dtype) -> None:
    norm, _ = norm_pair(48, 1e-6, dtype)
    x, residual = torch.randn(5, 48).to(dtype), torch.randn(5, 48).to(dtype)
    total = x + residual
    expected = norm(total)
    y, new_residual = norm.add(x, residual)
    assert new_residual.equal(total)
    assert y.equal(expected)


def test_what_was_added_before_is_only_normalized() -> None:
    norm, _ = norm_pair(48, 1e-6, torch.float32)
    total = torch.randn(5, 48)
    y, residual = norm.add(None, total)
    assert residual is total
    assert y.equal(norm(total))


def test_the_first_norm_of_a_model_has_no_residual_yet() -> None:
    norm, _ = norm_pair(48, 1e-6, torch.float32)
    x = torch.randn(5, 48)
    y, residual = norm.add(x, None)
    assert residual.equal(x)
    assert y.equal(norm(x))
