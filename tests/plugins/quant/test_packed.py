"""Packing loses nothing: what is unpacked is what was packed, for every family, width and order of groups."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.plugins.quant.packers import interleave, pack_bits

from octavo_quant.awq import unpack_interleaved
from octavo_quant.packed import PackedNeed, PackedWeight, unpack_bits, word_slice
from octavo_quant.packed_linear import Int4CPU, ReferencePacked

CPU = torch.device("cpu")


def random_weight(seed: int, num_out: int, groups: torch.Tensor, bits: int, symmetric: bool = False):
    """Plain parts and the matrix that they stand for."""
    generator = torch.Generator().manual_seed(seed)
    num_groups = int(groups.max()) + 1
    values = torch.randint(0, 1 << bits, (num_out, len(groups)), dtype=torch.uint8, generator=generator)
    scales = torch.rand(num_groups, num_out, generator=generator) * 0.1
    zeros = torch.randint(0, 1 << bits, (num_groups, num_out), generator=generator)
    if symmetric:
        zeros = torch.full_like(zeros, 1 << bits - 1)
    matrix = (values.float() - zeros.T[:, groups]) * scales.T[:, groups]
    return values, scales, zeros, matrix


def restored(weight: PackedWeight) -> torch.Tensor:
    """The matrix with its columns in the order of the input."""
    matrix = weight.dequantize(torch.float32)
    if weight.permutation is None:
        return matrix
    return torch.empty_like(matrix).index_copy_(1, weight.permutation, matrix)


@given(st.sampled_from([2, 3, 4, 8]), st.integers(1, 3), st.integers(1, 4), st.integers(0, 2**16))
def test_bits_are_unpacked_as_packed(bits, num_rows, num_blocks, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 1 << bits, (num_rows, 32 * num_blocks), generator=generator)
    words = pack_bits(values, bits)
    assert torch.equal(unpack_bits(words, bits, values.shape[1]).long(), values)


def test_one_awq_word_as_autoawq_writes_it():
    assert interleave(torch.arange(8).unsqueeze(0)).item() == 0x75316420
    assert unpack_interleaved(torch.tensor([[0x75316420]], dtype=torch.int32)).tolist() == [list(range(8))]


@given(st.integers(0, 200), st.integers(1, 200), st.sampled_from([2, 3, 4, 8]))
def test_a_slice_of_values_needs_only_its_words(start, length, bits):
    values = torch.randint(0, 1 << bits, (1, 416), generator=torch.Generator().manual_seed(start))
    packed = pack_bits(values, bits)
    words, inside = word_slice(slice(start, start + length), bits, packed.shape[1])
    cut = packed[:, words]
    unpacked = unpack_bits(cut, bits, cut.shape[1] * 32 // bits)[:, inside]
    assert torch.equal(unpacked.long(), values[:, start : start + length])


@given(
    st.sampled_from([2, 3, 4, 8]),
    st.integers(1, 12),
    st.lists(st.integers(0, 4), min_size=1, max_size=40),
    st.booleans(),
    st.integers(0, 2**16),
)
def test_any_assignment_of_inputs_to_groups_keeps_the_matrix(bits, num_out, groups, symmetric, seed):
    index = torch.tensor(groups)
    values, scales, zeros, matrix = random_weight(seed, num_out, index, bits, symmetric)
    torch.testing.assert_close(restored(PackedWeight.pack(values, scales, zeros, index, bits)), matrix)


def test_how_groups_are_numbered_does_not_matter():
    in_order = torch.arange(64) // 16
    values, scales, zeros, matrix = random_weight(0, 8, in_order, 4)
    relabelled = torch.tensor([2, 0, 3, 1])
    back = torch.argsort(relabelled)
    weight = PackedWeight.pack(values, scales[back], zeros[back], relabelled[in_order], 4)
    assert weight.permutation is None
    assert weight.group_size == 16
    torch.testing.assert_close(weight.dequantize(torch.float32), matrix)


def test_a_ragged_last_group_is_cut_into_equal_ones():
    groups = torch.arange(576) // 128
    values, scales, zeros, matrix = random_weight(0, 8, groups, 4)
    weight = PackedWeight.pack(values, scales, zeros, groups, 4)
    assert weight.group_size == 64
    torch.testing.assert_close(weight.dequantize(torch.float32), matrix)


@pytest.mark.parametrize(("first", "second"), [(True, False), (False, True), (True, True)])
def test_joined_weights_lie_below_each_other(first, second):
    groups = torch.arange(64) // 32
    one, two = (random_weight(seed, 8, groups, 4, sym) for seed, sym in ((1, first), (2, second)))
    packed = [PackedWeight.pack(*parts[:3], groups, 4) for parts in (one, two)]
    assert packed[0].joins(packed[1])
    torch.testing.assert_close(PackedWeight.join(packed).dequantize(torch.float32), torch.cat([one[3], two[3]]))


@pytest.mark.skipif(
    bool(Int4CPU.missing(PackedNeed(CPU, torch.bfloat16, 64, 64, 4, 32, True, False))), reason="another CPU"
)
@pytest.mark.parametrize("num_rows", [1, 7, Int4CPU.MANY_ROWS])
@pytest.mark.parametrize("group_size", [32, 96, 128, 384])
@pytest.mark.parametrize("permuted", [False, True])
def test_the_cpu_kernel_agrees_with_the_reference(num_rows, group_size, permuted):
    num_in, num_out = 384, 80
    groups = torch.arange(num_in) // group_size
    if permuted:
        groups = groups[torch.randperm(num_in, generator=torch.Generator().manual_seed(0))]
    values, scales, zeros, _ = random_weight(0, num_out, groups, 4)
    weight = PackedWeight.pack(values, scales, zeros, groups, 4)
    need = PackedNeed(CPU, torch.bfloat16, num_in, num_out, 4, weight.group_size, False, permuted)
    x, bias = torch.randn(num_rows, num_in).bfloat16(), torch.randn(num_out).bfloat16()
    ours = Int4CPU(need, weight, bias).apply(x).float()
    expected = ReferencePacked(need, weight, bias).apply(x).float()
    assert (ours - expected).norm() < 0.01 * expected.norm()


def test_four_bits_take_little_more_than_half_a_byte():
    groups = torch.arange(1024) // 128
    values, scales, zeros, _ = random_weight(0, 256, groups, 4)
    weight = PackedWeight.pack(values, scales.half(), zeros, groups, 4)
    need = PackedNeed(CPU, torch.bfloat16, 1024, 256, 4, 128, False, False)
    for kernel in (ReferencePacked, Int4CPU):
        assert kernel(need, weight, None).num_bytes() < 0.6 * 1024 * 256
