"""Products with 4-bit weights against the reference of the quantization plugin."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from octavo_kernels.packed_linear import MAX_TILED_TOKENS, TritonPacked, packed_tiling
from octavo_quant.packed import PackedNeed, PackedWeight
from octavo_quant.packed_linear import ReferencePacked


def make(
    device: torch.device, num_in: int, num_out: int, group_size: int, *, symmetric: bool = False, ordered: bool = True
) -> tuple[PackedNeed, PackedWeight]:
    num_groups = num_in // group_size
    groups = torch.arange(num_in, device=device) // group_size
    weight = PackedWeight.pack(
        torch.randint(0, 16, (num_out, num_in), device=device, dtype=torch.uint8),
        (torch.rand(num_groups, num_out, device=device) + 0.1).half() / (4 * num_in**0.5),
        None if symmetric else torch.randint(0, 16, (num_groups, num_out), device=device),
        groups if ordered else groups[torch.randperm(num_in, device=device)],
        4,
    )
    permuted = weight.permutation is not None
    return PackedNeed(device, torch.float16, num_in, num_out, 4, group_size, symmetric, permuted), weight


def compare(need: PackedNeed, weight: PackedWeight, num_tokens: int, bias: Tensor | None = None) -> None:
    x = torch.randn(num_tokens, need.in_features, device=need.device).half()
    kernel, reference = TritonPacked(need, weight, bias), ReferencePacked(need, weight, bias)
    for _ in range(2):  # the second call finds the counters as the first one left them
        torch.testing.assert_close(kernel.apply(x), reference.apply(x), atol=8e-3, rtol=8e-3)


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 17, 130, MAX_TILED_TOKENS + 1])
@pytest.mark.parametrize(("num_in", "num_out", "group_size"), [(256, 72, 32), (384, 16, 64), (1152, 40, 128)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_multiplies(
    device: torch.device, num_tokens: int, num_in: int, num_out: int, group_size: int, symmetric: bool
) -> None:
    compare(*make(device, num_in, num_out, group_size, symmetric=symmetric), num_tokens)


@pytest.mark.parametrize("num_tokens", [1, 3, 65])
def test_one_group_a_bias_and_inputs_out_of_order(device: torch.device, num_tokens: int) -> None:
    bias = torch.randn(48, device=device).half()
    compare(*make(device, 512, 48, 512), num_tokens, bias)
    compare(*make(device, 512, 48, 128, ordered=False), num_tokens, bias)


def test_a_narrow_layer_is_split_and_the_order_of_arrival_does_not_matter(device: torch.device) -> None:
    need, weight = make(device, 4096, 64, 128)
    assert packed_tiling(4096, 64, 4).num_splits > 1
    layer, x = TritonPacked(need, weight, None), torch.randn(4, 4096, device=device).half()
    first = layer.apply(x)
    assert all(torch.equal(first, layer.apply(x)) for _ in range(3))
    compare(need, weight, 4)


def test_takes_half_a_byte_for_a_weight(device: torch.device) -> None:
    need, weight = make(device, 256, 32, 128)
    assert TritonPacked(need, weight, None).num_bytes() == 256 * 32 // 2 + 2 * 32 * (2 + 1)


def test_says_why_it_cannot_serve() -> None:
    reasons = "; ".join(TritonPacked.missing(PackedNeed(torch.device("cpu"), torch.float32, 72, 8, 8, 24, True, False)))
    for part in ("CUDA device", "4-bit", "groups are of", "128 inputs at a time"):
        assert part in reasons
