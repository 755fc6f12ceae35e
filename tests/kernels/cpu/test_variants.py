"""Each instruction set that this machine runs gives the same results: what is tested here holds on older machines."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import octavo_cpu.library
from octavo.attention.torch_backend import attend_one
from octavo.batch import ForwardBatch
from octavo.interfaces import AttentionNeed, AttentionSpec
from octavo.layers.activation import TorchSiluAndMul
from octavo.layers.norm import TorchRMSNorm
from octavo.operations import ActivationNeed, LinearNeed, NormNeed
from octavo_cpu.attention import CPUAttention
from octavo_cpu.linear import PackedLinear
from octavo_cpu.pointwise import RMSNorm, SiluAndMul
from octavo_cpu.quantized import PackedIntegers
from octavo_quant.packed import PackedNeed, PackedWeight
from octavo_quant.packed_linear import ReferencePacked

CPU = torch.device("cpu")
VARIANTS = [variant for variant in octavo_cpu.library.variants() if octavo_cpu.library.library_path(variant).exists()]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2}


@pytest.fixture(params=VARIANTS, autouse=True)
def _variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(octavo_cpu.library, "variants", lambda: [request.param])
    octavo_cpu.library.library.cache_clear()
    yield
    octavo_cpu.library.library.cache_clear()


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    result: torch.dtype = request.param
    return result


def assert_near(result: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[result.dtype]
    torch.testing.assert_close(result.float(), expected.float(), atol=tolerance, rtol=tolerance)


def test_attention(dtype: torch.dtype) -> None:
    num_tokens, num_heads, num_kv_heads, head_dim = 70, 6, 2, 48
    backend = CPUAttention(AttentionNeed(CPU, dtype, dtype, 16, head_dim, num_heads, num_kv_heads, window=True))
    spec = AttentionSpec(0, num_heads, num_kv_heads, head_dim, scale=0.2, window=40, soft_cap=3.0)
    query = torch.randn(num_tokens, num_heads, head_dim).to(dtype)
    key, value = (torch.randn(num_tokens, num_kv_heads, head_dim).to(dtype) for _ in range(2))
    batch = ForwardBatch(
        tokens=torch.zeros(num_tokens, dtype=torch.int64),
        positions=torch.arange(num_tokens),
        query_start=torch.tensor([0, num_tokens], dtype=torch.int32),
        seq_lens=torch.tensor([num_tokens], dtype=torch.int32),
        block_tables=torch.tensor([[0, 1, 2, 3, 4]], dtype=torch.int32),
        slots=torch.arange(num_tokens),
        logit_rows=torch.tensor([num_tokens - 1]),
        max_query_len=num_tokens,
        max_seq_len=num_tokens,
        num_decodes=0,
    )
    kv = torch.zeros(backend.kv_shape(spec, 5), dtype=dtype)
    result = backend.attend(query, key, value, spec, kv, batch, backend.plan(batch))
    assert_near(result, attend_one(query.float(), key.float(), value.float(), spec).flatten(1))


def test_linear(dtype: torch.dtype) -> None:
    need = LinearNeed(CPU, dtype, 70, 101)
    if reasons := PackedLinear.missing(need):
        assert dtype == torch.bfloat16, reasons
        pytest.skip(reasons[0])
    x, weight, bias = (torch.randn(shape).to(dtype) / 8 for shape in ((15, 70), (101, 70), (101,)))
    expected = torch.nn.functional.linear(x.float(), weight.float(), bias.float())
    assert_near(PackedLinear(need, weight, bias).apply(x), expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized(dtype: torch.dtype, bits: int) -> None:
    values = torch.randint(0, 1 << bits, (101, 96), dtype=torch.uint8)
    scales, zeros = torch.rand(3, 101) / 100, torch.randint(0, 1 << bits, (3, 101))
    weight = PackedWeight.pack(values, scales, zeros, torch.arange(96) // 32, bits)
    need = PackedNeed(CPU, dtype, 96, 101, bits, 32, False, False)
    if reasons := PackedIntegers.missing(need):
        assert dtype == torch.bfloat16, reasons
        pytest.skip(reasons[0])
    x = torch.randn(15, 96).to(dtype)
    result, expected = PackedIntegers(need, weight, None).apply(x), ReferencePacked(need, weight, None).apply(x)
    torch.testing.assert_close(result, expected, atol=1e-4 if dtype == torch.float32 else 0.1, rtol=TOLERANCE[dtype])


def test_norm_and_activation(dtype: torch.dtype) -> None:
    x, residual, weight = (torch.randn(shape).to(dtype) for shape in ((5, 96), (5, 96), (96,)))
    need = NormNeed(CPU, dtype, 96)
    expected = TorchRMSNorm(need).add(x.clone(), residual.clone(), weight, 1e-6)
    for mine, theirs in zip(RMSNorm(need).add(x.clone(), residual, weight, 1e-6), expected, strict=True):
        assert_near(mine, theirs)
    activation = ActivationNeed(CPU, dtype, 48)
    assert_near(SiluAndMul(activation)(x), TorchSiluAndMul(activation)(x))
