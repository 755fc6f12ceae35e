"""The gated activation against float32."""

from __future__ import annotations

import pytest
import torch

from octavo_kernels.activation import silu_and_mul, silu_and_mul_reference


@pytest.mark.parametrize(("num_tokens", "size"), [(0, 64), (1, 1500), (3, 64)])
def test_multiplies_by_silu(device: torch.device, num_tokens: int, size: int) -> None:
    gate_up = torch.randn(num_tokens, 2 * size, device=device).half()
    torch.testing.assert_close(silu_and_mul(gate_up).float(), silu_and_mul_reference(gate_up), atol=4e-3, rtol=4e-3)
