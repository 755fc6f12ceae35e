"""Packed products say the same as torch's, and a row's result does not depend on its batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from octavo.operations import LinearNeed
from octavo_cpu.library import DTYPES, library
from octavo_cpu.linear import OneDNNLinear, PackedLinear

CPU = torch.device("cpu")


def make_need(dtype: torch.dtype, in_features: int, out_features: int) -> LinearNeed:
    return LinearNeed(CPU, dtype, in_features, out_features)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    num_rows=st.one_of(st.integers(1, 14), st.sampled_from([0, 63, 100])),
    in_features=st.integers(1, 100).map(lambda half: 2 * half),
    out_features=st.one_of(st.integers(1, 200), st.sampled_from([63, 64, 65, 256])),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    kind=st.sampled_from([PackedLinear, OneDNNLinear]),
    biased=st.booleans(),
)
def test_says_the_same_as_torch(
    num_threads: int,
    num_rows: int,
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
    kind: type[PackedLinear] | type[OneDNNLinear],
    biased: bool,
) -> None:
    need = make_need(dtype, in_features, out_features)
    if kind.missing(need):
        return
    x = torch.randn(num_rows, in_features).to(dtype)
    weight = (torch.randn(out_features, in_features) * in_features**-0.5).to(dtype)
    bias = torch.randn(out_features).to(dtype) if biased else None
    layer = kind(need, weight, bias)
    expected = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    result = layer.apply(x)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), expected, atol=tolerance, rtol=tolerance)
    assert layer.num_bytes() >= weight.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_its_batch(dtype: torch.dtype) -> None:
    need = make_need(dtype, 96, 130)
    if reasons := PackedLinear.missing(need):
        pytest.skip(reasons[0])
    layer = PackedLinear(need, torch.randn(130, 96).to(dtype), None)
    x = torch.randn(40, 96).to(dtype)
    whole = layer.apply(x)
    for count in (1, 2, 5, 6, 7, 13, 39):
        assert torch.equal(layer.apply(x[:count]), whole[:count])


def test_a_transposed_weight_and_a_strided_input_are_taken() -> None:
    weight, x = torch.randn(64, 32).T, torch.randn(64, 6).T
    layer = PackedLinear(make_need(torch.float32, 64, 32), weight, None)
    torch.testing.assert_close(layer.apply(x), x @ weight.T, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", [PackedLinear, OneDNNLinear])
@pytest.mark.parametrize(
    ("device", "dtype", "reason"),
    [
        (torch.device("cuda"), torch.float32, "runs on a CPU, not on cuda"),
        (CPU, torch.float16, "not in torch.float16"),
    ],
)
def test_says_what_is_missing(
    kind: type[PackedLinear] | type[OneDNNLinear], device: torch.device, dtype: torch.dtype, reason: str
) -> None:
    (lack,) = kind.missing(LinearNeed(device, dtype, 64, 64))
    assert reason in lack


def test_an_odd_number_of_bfloat16_inputs_is_refused() -> None:
    lacks = PackedLinear.missing(make_need(torch.bfloat16, 63, 64))
    if library().linear_supports(DTYPES[torch.bfloat16]):
        assert lacks == ["products in bfloat16 need an even number of inputs, not 63"]
    else:
        assert lacks == ["products in bfloat16 need a CPU with AVX512_BF16"]


def test_onednn_is_not_batch_invariant() -> None:
    need = LinearNeed(CPU, torch.float32, 64, 64, batch_invariant=True)
    assert "depends on the number of rows" in OneDNNLinear.missing(need)[0]
    assert PackedLinear.missing(need) == []
