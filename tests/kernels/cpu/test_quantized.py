"""Products over weights of 4 and 8 bits say the same as a plain product with the weights that they stand for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from octavo_cpu.quantized import Float8, PackedIntegers
from octavo_quant.fp8_linear import ReferenceFp8
from octavo_quant.fp8_weight import FP8, Activation, Fp8Need, Fp8Weight
from octavo_quant.packed import PackedNeed, PackedWeight
from octavo_quant.packed_linear import ReferencePacked

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # of the largest sum
SLACK = {torch.float32: 1e-7, torch.bfloat16: 5e-4}  # of what a sum could be if nothing in it cancelled

relaxed = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
rows = st.one_of(st.integers(0, 14), st.sampled_from([47, 48, 49, 100]))
dtypes = st.sampled_from([torch.float32, torch.bfloat16])


def packed(num_in: int, num_out: int, bits: int, group_size: int, symmetric: bool, permuted: bool) -> PackedWeight:
    groups = torch.arange(num_in) // group_size
    if permuted:
        groups = groups[torch.randperm(num_in)]
    num_groups = int(groups.max()) + 1
    values = torch.randint(0, 1 << bits, (num_out, num_in), dtype=torch.uint8)
    zeros = None if symmetric else torch.randint(0, 1 << bits, (num_groups, num_out))
    return PackedWeight.pack(values, torch.rand(num_groups, num_out) * 0.1, zeros, groups, bits)


def packed_need(weight: PackedWeight, dtype: torch.dtype) -> PackedNeed:
    shape = (weight.in_features, weight.out_features, weight.bits, weight.group_size)
    return PackedNeed(CPU, dtype, *shape, weight.zeros is None, weight.permutation is not None)


def assert_near(result: torch.Tensor, expected: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    """Equal but for rounding, measured against the largest sum and, as even that may cancel, against the factors."""
    assert result.dtype == x.dtype
    if not result.numel():
        assert result.shape == expected.shape
        return
    error = (result.double() - expected.double()).abs().max()
    uncancelled = x.double().norm(dim=1).max() * weight.norm(dim=1).max()
    assert error <= TOLERANCE[x.dtype] * expected.double().abs().max() + SLACK[x.dtype] * uncancelled


@relaxed
@given(
    num_rows=rows,
    num_groups=st.integers(1, 5),
    group_size=st.sampled_from([2, 16, 32, 96, 128, 300]),
    num_out=st.one_of(st.integers(1, 200), st.sampled_from([63, 64, 65, 256])),
    bits=st.sampled_from([4, 8]),
    symmetric=st.booleans(),
    permuted=st.booleans(),
    biased=st.booleans(),
    dtype=dtypes,
)
def test_integers_say_the_same_as_the_reference(
    num_threads: int,
    num_rows: int,
    num_groups: int,
    group_size: int,
    num_out: int,
    bits: int,
    symmetric: bool,
    permuted: bool,
    biased: bool,
    dtype: torch.dtype,
) -> None:
    weight = packed(num_groups * group_size, num_out, bits, group_size, symmetric, permuted)
    need = packed_need(weight, dtype)
    if PackedIntegers.missing(need):
        return
    x = torch.randn(num_rows, weight.in_features).to(dtype)
    bias = torch.randn(num_out).to(dtype) if biased else None
    made = PackedIntegers(need, weight, bias)
    assert_near(made.apply(x), ReferencePacked(need, weight, bias).apply(x), x, weight.dequantize(torch.float64))


@relaxed
@given(
    num_rows=rows,
    num_in=st.integers(1, 160).map(lambda half: 2 * half),
    num_out=st.one_of(st.integers(1, 200), st.sampled_from([64, 128])),
    block=st.sampled_from([None, (1, 0), (16, 32), (128, 128)]),
    activation=st.sampled_from(["none", "tensor", "token", "group"]),
    dtype=dtypes,
)
def test_fp8_says_the_same_as_the_reference(
    num_threads: int,
    num_rows: int,
    num_in: int,
    num_out: int,
    block: tuple[int, int] | None,
    activation: Activation,
    dtype: torch.dtype,
) -> None:
    row_block, column_block = block or (num_out, num_in)
    column_block = column_block or num_in
    values = (torch.randn(num_out, num_in) * 100).clamp(-448, 448).to(FP8)
    scales = torch.rand(-(-num_out // row_block), -(-num_in // column_block)) * 0.01
    input_scale = torch.tensor(0.01) if activation == "tensor" else None
    weight = Fp8Weight(values, scales, row_block, column_block, activation, input_scale)
    need = Fp8Need(CPU, dtype, num_in, num_out, activation, row_block, column_block)
    if Float8.missing(need):
        return
    x = torch.randn(num_rows, num_in).to(dtype)
    expected = ReferenceFp8(need, weight, None).apply(x)
    if dtype == torch.bfloat16:  # where inputs are not rounded
        expected = torch.nn.functional.linear(x.double(), weight.dequantize(torch.float64))
    assert_near(Float8(need, weight, None).apply(x), expected, x, weight.dequantize(torch.float64))


def test_every_fp8_number_is_widened_exactly() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F]  # the two that are no numbers
    for dtype in (torch.float32, torch.bfloat16):
        weight = Fp8Weight(codes.view(FP8).unsqueeze(1).repeat(1, 2), torch.ones(1, 1), 254, 2, "none")
        need = Fp8Need(CPU, dtype, 2, 254, "none", 254, 2)
        if Float8.missing(need):
            continue
        result = Float8(need, weight, None).apply(torch.tensor([[1.0, 0.0], [0.0, 1.0]]).to(dtype))
        assert torch.equal(result.float(), codes.view(FP8).float().expand(2, -1))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_its_batch(bits: int, dtype: torch.dtype) -> None:
    weight = packed(320, 130, bits, 64, symmetric=False, permuted=True)
    need = packed_need(weight, dtype)
    if reasons := PackedIntegers.missing(need):
        pytest.skip(reasons[0])
    layer = PackedIntegers(need, weight, None)
    x = torch.randn(130, 320).to(dtype)
    whole = layer.apply(x)
    for count in (1, 2, 5, 6, 7, 13, 48, 49, 129):
        assert torch.equal(layer.apply(x[:count]), whole[:count])


def test_weights_keep_their_bits_in_memory() -> None:
    for bits in (4, 8):
        weight = packed(1024, 256, bits, 128, symmetric=True, permuted=False)
        made = PackedIntegers(packed_need(weight, torch.float32), weight, None)
        assert made.num_bytes() < 1.1 * 1024 * 256 * bits / 8


def test_says_what_is_missing() -> None:
    need = PackedNeed(torch.device("cuda"), torch.bfloat16, 64, 64, 4, 32, True, False)
    assert PackedIntegers.missing(need) == ["runs on a CPU, not on cuda"]
    odd = Fp8Need(CPU, torch.bfloat16, 63, 64, "token", 1, 63)
    (lack,) = Float8.missing(odd)
    assert "AVX512_BF16" in lack or "in pairs, not 63" in lack
