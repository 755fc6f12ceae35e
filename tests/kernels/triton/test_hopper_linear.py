"""How weights lie for Hopper's tensor cores, and back; the products themselves are in ``tests/gpu``."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")

from octavo_kernels.fp8_linear import quantize_tokens
from octavo_kernels.hopper_linear import HopperFp8, HopperPacked, fp8_order, pack_fragments
from octavo_quant.fp8_weight import Fp8Need, Fp8Weight
from octavo_quant.packed import PackedNeed, PackedWeight


def packed(device: torch.device, num_in: int, num_out: int, group_size: int) -> tuple[PackedNeed, PackedWeight]:
    groups = torch.arange(num_in, device=device) // group_size
    shape = (num_in // group_size, num_out)
    weight = PackedWeight.pack(
        torch.randint(0, 16, (num_out, num_in), device=device, dtype=torch.uint8),
        (torch.rand(shape, device=device) + 0.1).half(),
        torch.randint(0, 16, shape, device=device),
        groups,
        4,
    )
    return PackedNeed(device, torch.float16, num_in, num_out, 4, group_size, False, False), weight


def test_a_word_holds_a_thread_s_own_part_of_a_fragment(device: torch.device) -> None:
    """The fragment of ``wgmma`` m64k16 for operands in registers: PTX ISA, "asynchronous warpgroup level matrix"."""
    values = torch.randint(0, 16, (128, 128), device=device, dtype=torch.uint8)
    words = pack_fragments(values)[0, 0]  # [half, 64 rows, 512]
    half, rows, warp, group, thread, step = 1, 0, 2, 5, 3, 1
    word = int(words[half, rows, warp * 128 + group * 16 + thread * 4 + step])
    for register in range(4):
        for of_pair in range(2):
            row = rows * 64 + warp * 16 + 2 * group + register % 2
            k = half * 64 + step * 16 + register // 2 * 8 + 2 * thread + of_pair
            assert word >> (4 * register + 16 * of_pair) & 15 == values[row, k]


@pytest.mark.parametrize(("num_in", "num_out", "group_size"), [(128, 72, 64), (384, 256, 128), (256, 128, 256)])
def test_4_bit_weights_come_back(device: torch.device, num_in: int, num_out: int, group_size: int) -> None:
    need, weight = packed(device, num_in, num_out, group_size)
    written = HopperPacked(need, weight, None).dequantize(torch.float16)
    torch.testing.assert_close(written, weight.dequantize(torch.float32).half(), atol=0, rtol=1e-3)


@pytest.mark.parametrize("block", [None, (128, 128), (64, 256)])
def test_fp8_weights_come_back(device: torch.device, block: tuple[int, int] | None) -> None:
    weight = Fp8Weight.online(torch.randn(136, 512, device=device))
    if block is not None:
        scales = torch.rand(-(-136 // block[0]), 512 // block[1], device=device)
        weight = Fp8Weight(weight.values, scales, *block, "group")
    need = Fp8Need(device, torch.float16, 512, 136, weight.activation, weight.row_block, weight.column_block)
    written = HopperFp8(need, weight, None).dequantize(torch.float16)
    torch.testing.assert_close(written, weight.dequantize(torch.float32).half(), atol=0, rtol=1e-3)


def test_tokens_are_rounded_in_the_order_of_the_weights(device: torch.device) -> None:
    x = torch.randn(3, 192, device=device).half()
    values, scales = quantize_tokens(x)
    reordered, same = quantize_tokens(x, reordered=True)
    expected = values.view(torch.uint8).view(3, 3, 64)[..., fp8_order(device)].flatten(1)
    assert torch.equal(reordered.view(torch.uint8), expected)
    assert torch.equal(scales, same)


def test_takes_half_a_byte_for_a_weight_and_four_for_a_group(device: torch.device) -> None:
    need, weight = packed(device, 256, 128, 128)
    assert HopperPacked(need, weight, None).num_bytes() == 256 * 128 // 2 + 2 * 128 * 4


def test_says_why_it_cannot_serve() -> None:
    device = torch.device("cpu")
    reasons = "; ".join(HopperPacked.missing(PackedNeed(device, torch.float16, 72, 8, 8, 24, True, False)))
    for part in ("CUDA device", "128 inputs at a time", "4-bit weights", "groups are of 64"):
        assert part in reasons
    reasons = "; ".join(HopperFp8.missing(Fp8Need(device, torch.float16, 256, 8, "none", 1, 32)))
    assert "blocks are of a multiple of 128" in reasons
