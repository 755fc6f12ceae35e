"""The torch backend against attention written down as it is defined, in float64, one query and one head at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.paging import PagedSequences
from torch import Tensor

from octavo.attention import torch_backend
from octavo.attention.torch_backend import TorchAttention
from octavo.interfaces import AttentionNeed, AttentionSpec

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """A mixed batch: per sequence, how many tokens each of two steps adds (0: no row in that step)."""

    steps: tuple[dict[int, int], dict[int, int]]
    spec: AttentionSpec
    block_size: int
    seed: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    lengths = st.lists(st.integers(0, 20), min_size=1, max_size=4)
    steps = tuple(dict(enumerate(draw(lengths))) for _ in range(2))
    steps = tuple({name: n for name, n in step.items() if n} or {0: 1} for step in steps)
    num_kv_heads, group = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 4]))
    spec = AttentionSpec(
        layer=0,
        num_heads=num_kv_heads * group,
        num_kv_heads=num_kv_heads,
        head_dim=draw(st.sampled_from([4, 6, 16])),
        scale=draw(st.sampled_from([0.1, 0.25, 1.0])),
        window=draw(st.none() | st.integers(1, 24)),
        soft_cap=draw(st.none() | st.sampled_from([0.5, 5.0])),
    )
    return Case(steps, spec, draw(st.sampled_from([1, 2, 8, 16])), draw(st.integers(0, 2**16)))


def oracle(query: Tensor, keys: Tensor, values: Tensor, spec: AttentionSpec) -> Tensor:
    """query [num_queries, num_heads, head_dim], keys and values [context_len, num_kv_heads, head_dim], all float64."""
    output = torch.zeros_like(query)
    group = spec.num_heads // spec.num_kv_heads
    for i in range(query.shape[0]):
        position = keys.shape[0] - query.shape[0] + i
        first = 0 if spec.window is None else max(0, position - spec.window + 1)
        for head in range(spec.num_heads):
            scores = keys[first : position + 1, head // group] @ query[i, head] * spec.scale
            if spec.soft_cap is not None:
                scores = spec.soft_cap * torch.tanh(scores / spec.soft_cap)
            output[i, head] = torch.softmax(scores, 0) @ values[first : position + 1, head // group]
    return output


def compare(case: Case, kv_dtype: torch.dtype, tolerance: float, dtype: torch.dtype = torch.float32) -> None:
    """Both steps of a case through the backend, every output against the oracle over the same stored values."""
    spec = case.spec
    torch.manual_seed(case.seed)
    sequences = PagedSequences(num_blocks=192, block_size=case.block_size, seed=case.seed)
    backend = TorchAttention(
        AttentionNeed(CPU, dtype, kv_dtype, case.block_size, spec.head_dim, spec.num_heads, spec.num_kv_heads)
    )
    # not a number wherever nothing was written: reading it would show
    kv = torch.full(backend.kv_shape(spec, sequences.num_blocks), torch.nan).to(kv_dtype)
    known: dict[int, tuple[Tensor, Tensor]] = {}
    for step in case.steps:
        tokens = {name: [0] * n for name, n in step.items()}
        batch = sequences.batch(tokens)
        query = torch.randn(batch.num_tokens, spec.num_heads, spec.head_dim).to(dtype)
        key, value = torch.randn(2, batch.num_tokens, spec.num_kv_heads, spec.head_dim).to(dtype)
        output = backend.attend(query, key, value, spec, kv, batch, backend.plan(batch))
        assert output.shape == (batch.num_tokens, spec.num_heads * spec.head_dim)
        assert output.dtype == dtype
        queries, keys, values = (sequences.split(tokens, x) for x in (query, key, value))
        for name, attended in sequences.split(tokens, output.view(query.shape)).items():
            empty = keys[name][:0]
            before = known.get(name, (empty, empty))
            known[name] = torch.cat([before[0], keys[name]]), torch.cat([before[1], values[name]])
            stored = [
                (x.double() / scale).to(torch.float32).to(kv_dtype).double() * scale
                for x, scale in zip(known[name], (spec.key_scale, spec.value_scale), strict=True)
            ]
            expected = oracle(queries[name].double(), stored[0], stored[1], spec)
            torch.testing.assert_close(attended.double(), expected, rtol=tolerance, atol=tolerance)


@given(case=cases())
@settings(max_examples=60, deadline=None)
def test_any_batch_is_attention_by_definition(case: Case) -> None:
    compare(case, torch.float32, tolerance=1e-5)


@given(case=cases())
@settings(max_examples=15, deadline=None)
def test_a_half_precision_cache_under_float32(case: Case) -> None:
    compare(case, torch.float16, tolerance=1e-5)


@given(case=cases())
@settings(max_examples=15, deadline=None)
def test_bfloat16_throughout(case: Case) -> None:
    compare(case, torch.bfloat16, tolerance=4e-2, dtype=torch.bfloat16)


@pytest.mark.parametrize("kv_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@given(case=cases(), scales=st.tuples(st.sampled_from([0.25, 1.0, 2.0]), st.sampled_from([0.5, 1.0])))
@settings(max_examples=15, deadline=None)
def test_an_eight_bit_cache_holds_scaled_values(kv_dtype: torch.dtype, case: Case, scales: tuple[float, float]) -> None:
    plain = case.spec
    spec = AttentionSpec(
        layer=0,
        num_heads=plain.num_heads,
        num_kv_heads=plain.num_kv_heads,
        head_dim=plain.head_dim,
        scale=plain.scale,
        window=plain.window,
        soft_cap=plain.soft_cap,
        key_scale=scales[0],
        value_scale=scales[1],
    )
    compare(Case(case.steps, spec, case.block_size, case.seed), kv_dtype, tolerance=1e-5)


@given(case=cases(), at_once=st.sampled_from([1, 3, 7]))
@settings(max_examples=30, deadline=None)
def test_long_queries_in_parts_are_the_same(case: Case, at_once: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_backend, "MAX_QUERIES_AT_ONCE", at_once)
        compare(case, torch.float32, tolerance=1e-5)


def test_a_value_beyond_the_eight_bit_range_is_clamped_not_lost() -> None:
    spec = AttentionSpec(layer=0, num_heads=1, num_kv_heads=1, head_dim=4, scale=1.0)
    backend = TorchAttention(AttentionNeed(CPU, torch.float32, torch.float8_e4m3fn, 4, 4, 1, 1))
    sequences = PagedSequences(num_blocks=2)
    batch = sequences.batch({0: [0]})
    kv = torch.zeros(backend.kv_shape(spec, 2)).to(torch.float8_e4m3fn)
    huge = torch.full((1, 1, 4), 1e6)
    output = backend.attend(huge, huge, -huge, spec, kv, batch, backend.plan(batch))
    assert output.tolist() == [[-torch.finfo(torch.float8_e4m3fn).max] * 4]


def test_queries_and_keys_may_lie_anywhere_in_memory() -> None:
    """Slices of a fused projection are not contiguous."""
    spec = AttentionSpec(layer=0, num_heads=2, num_kv_heads=1, head_dim=4, scale=0.5)
    backend = TorchAttention(AttentionNeed(CPU, torch.float32, torch.float32, 4, 4, 2, 1))
    torch.manual_seed(0)
    fused = torch.randn(6, 4, 4)
    query, key, value = fused[:, :2], fused[:, 2:3], fused[:, 3:]
    results = []
    for parts in ((query, key, value), (query.contiguous(), key.contiguous(), value.contiguous())):
        batch = PagedSequences(num_blocks=4).batch({0: [0] * 6})
        kv = torch.zeros(backend.kv_shape(spec, 4))
        results.append(backend.attend(*parts, spec, kv, batch, backend.plan(batch)))
    assert math.isfinite(results[0].sum().item())
    assert results[0].equal(results[1])
