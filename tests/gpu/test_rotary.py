"""What the interpreter cannot say of the write into the cache: its casts to 8 bits round wrongly."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from octavo_kernels.rotary import rotate_and_store

pytestmark = pytest.mark.gpu


def test_an_8_bit_cache_holds_scaled_values_within_its_range() -> None:
    device = torch.device("cuda")
    key, value = torch.randn(2, 2, 3, 16, device=device).half()
    key[0, 0, 0] = 1000.0
    kv = torch.zeros((6, 2, 3, 4, 16), device=device).to(torch.float8_e4m3fn)
    slots = torch.tensor([2, 9], device=device)
    rotate_and_store(None, key, value, kv, slots, slots, key_scale=0.5, value_scale=0.25)
    keys, values = kv.float()[slots // 4, :, :, slots % 4].transpose(0, 1)
    torch.testing.assert_close(keys * 0.5, key.float().clamp(-224, 224), atol=0.01, rtol=0.07)
    torch.testing.assert_close(values * 0.25, value.float(), atol=0.01, rtol=0.07)
