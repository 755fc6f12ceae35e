"""Normalizing, rotating and writing to the cache against float32."""

from __future__ import annotations

import pytest
import torch

from octavo_kernels.rotary import HeadNorm, Rotation, rotate_and_store, rotate_reference

BLOCK_SIZE, NUM_BLOCKS = 4, 6


def read_cache(kv: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """[key or value, num_tokens, num_kv_heads, head_dim] float32."""
    return kv[slots // BLOCK_SIZE, :, :, slots % BLOCK_SIZE].float().transpose(0, 1)


def rotation_table(rotary_dim: int, device: torch.device) -> torch.Tensor:
    angles = torch.rand(50, rotary_dim // 2, device=device) * 6
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "rotary_dim"), [(4, 2, 64, 64), (9, 3, 80, 32), (10, 10, 16, 16)]
)
@pytest.mark.parametrize("with_norm", [False, True])
def test_rotates_and_writes(
    device: torch.device, num_heads: int, num_kv_heads: int, head_dim: int, rotary_dim: int, with_norm: bool
) -> None:
    qkv = torch.randn(5, num_heads + 2 * num_kv_heads, head_dim, device=device).half()
    query, key, value = qkv.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    positions = torch.tensor([3, 17, 0, 49, 8], device=device)
    slots = torch.tensor([5, 0, 23, 11, 12], device=device)
    table = rotation_table(rotary_dim, device)
    weights = torch.rand(2, head_dim, device=device).half()
    norm = HeadNorm(weights[0], weights[1], 1e-5) if with_norm else None
    kv = torch.full((NUM_BLOCKS, 2, num_kv_heads, BLOCK_SIZE, head_dim), 7.0, device=device).half()
    rotated = rotate_and_store(query, key, value, kv, positions, slots, rotation=Rotation(table), norm=norm)

    def expected(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rotate_reference(x, table, positions, weight if with_norm else None, 1e-5)

    assert rotated is not None
    torch.testing.assert_close(rotated.float(), expected(query, weights[0]), atol=5e-3, rtol=5e-3)
    keys, values = read_cache(kv, slots)
    torch.testing.assert_close(keys, expected(key, weights[1]), atol=5e-3, rtol=5e-3)
    torch.testing.assert_close(values, value.float(), atol=0, rtol=0)
    untouched = torch.ones(NUM_BLOCKS * BLOCK_SIZE, dtype=torch.bool, device=device)
    untouched[slots] = False
    assert (read_cache(kv, untouched.nonzero().flatten()) == 7.0).all()


def test_nothing_is_written_for_a_negative_slot_and_keys_may_come_rotated(device: torch.device) -> None:
    key, value = torch.randn(2, 2, 3, 16, device=device).half()
    kv = torch.full((NUM_BLOCKS, 2, 3, BLOCK_SIZE, 16), 7.0, device=device).half()
    slots = torch.tensor([-1, 9], device=device)
    assert rotate_and_store(None, key, value, kv, slots, slots) is None
    keys, values = read_cache(kv, slots[1:])
    torch.testing.assert_close(keys[0], key[1].float(), atol=0, rtol=0)
    torch.testing.assert_close(values[0], value[1].float(), atol=0, rtol=0)
    assert (kv == 7.0).sum() == kv.numel() - 2 * 3 * 16
