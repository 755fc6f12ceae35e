"""Real quantized checkpoints on the GPU with its own kernels, against the logits of the libraries that made them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("triton")

from tests.kernels.triton.test_hopper_linear import packed
from tests.paging import PagedSequences
from tests.plugins.quant.conftest import BLOCK_SIZE, FIXTURES, LoadedModel
from torch import Tensor

from octavo.attention.torch_backend import TorchAttention
from octavo.interfaces import AttentionNeed
from octavo.layers.attention import ForwardContext
from octavo_kernels.fp8_tokens import RoundedTokens, TokenRounding
from octavo_kernels.hopper_linear import HopperPacked
from octavo_kernels.plugin import octavo_kernels
from octavo_quant.packed import PackedWeight

pytestmark = pytest.mark.gpu

ALL = sorted(path.name for path in FIXTURES.iterdir() if (path / "config.json").exists())
INTEGER = [name for name in ALL if name.startswith(("awq", "gptq")) or "w4a16" in name]
QUANTIZED = ("linear_packed", "linear_fp8")
FAMILIES = {
    "triton": {"triton-linear-packed", "triton-linear-fp8"},
    "hopper": {"hopper-linear-packed", "hopper-linear-fp8"},
}
"""Names of kernels to be preferred to others."""


class Conversation:
    """A model on the GPU and a cache, fed with the same tokens in several sequences at once.

    ``family`` is one of FAMILIES; ``operations`` are those that have kernels.
    """

    def __init__(self, name: str, dtype: torch.dtype, family: str, operations: Collection[str] = QUANTIZED) -> None:
        kernels = [
            replace(kernel, priority=100 if kernel.name in FAMILIES[family] else kernel.priority)
            for kernel in octavo_kernels()
            if kernel.operation in operations
        ]
        self.loaded = LoadedModel(FIXTURES / name, dtype, device="cuda", kernels=kernels)
        spec = self.loaded.build.attention_specs[0]
        sizes = (BLOCK_SIZE, spec.head_dim, spec.num_heads, spec.num_kv_heads)
        self.backend = TorchAttention(AttentionNeed(self.loaded.placement.device, dtype, dtype, *sizes))
        self.sequences = PagedSequences(block_size=BLOCK_SIZE, num_blocks=128)
        self.kv = [
            torch.zeros(self.backend.kv_shape(each, self.sequences.num_blocks), dtype=dtype, device="cuda")
            for each in self.loaded.build.attention_specs
        ]

    def logits(self, tokens: Mapping[int, list[int]]) -> Tensor:
        """[num_tokens, vocab_size] of every position of every sequence."""
        batch = self.sequences.batch(tokens)
        tensors = {field.name: getattr(batch, field.name) for field in fields(batch)}
        moved: dict[str, Any] = {name: t.cuda() for name, t in tensors.items() if isinstance(t, Tensor)}
        batch = replace(batch, **moved)
        context = ForwardContext(batch, self.backend, self.backend.plan(batch), self.kv)
        hidden = self.loaded.model.forward(batch.tokens, batch.positions, context)
        return self.loaded.model.logits(hidden).float().cpu()


def compare(name: str, dtype: torch.dtype, ours: Tensor, logits: Tensor) -> None:
    """The largest difference for integers; for FP8, where rounding one input otherwise moves a whole token, the mean.

    The library and we round FP8 inputs by different scales. On a CPU either rounding alone changes these models'
    logits by 0.05 to 0.07 in the mean, and the two differ by up to 0.12.
    """
    integer, half = name in INTEGER, dtype == torch.float16
    difference = (ours - logits).abs()
    largest = 0.06 if half else 0.25
    if integer:
        assert difference.max() < largest
    assert difference.mean() < ((0.01 if half else 0.05) if integer else 0.14)
    best = logits.topk(2).values
    clear = best[:, 0] - best[:, 1] > (2 * largest if integer else 1.8)
    assert clear.any()
    assert torch.equal(ours.argmax(-1)[clear], logits.argmax(-1)[clear])


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("name", ALL)
@torch.inference_mode()
def test_every_fixture_keeps_to_its_library_s_logits(name: str, dtype: torch.dtype, family: str) -> None:
    if dtype == torch.float16 and name not in INTEGER:
        pytest.skip("the library ran in bfloat16")
    stored = load_file(FIXTURES / name / "reference.safetensors")
    conversation = Conversation(name, dtype, family)
    # compressed-tensors ran in bfloat16, which is coarser than float16, and again in float32
    exact = dtype == torch.float16 and "logits_fp32" in stored
    tokens, logits = stored["input_ids"].tolist(), stored["logits_fp32" if exact else "logits"]
    size = len(tokens[0])
    # prompts of 24, 48, 144 and 576 tokens a step, for what a number of tokens chooses
    for step, num_sequences in enumerate((1, 2, 6, 24)):
        rows = {100 * step + i: tokens[i % 2] for i in range(num_sequences)}
        ours = conversation.logits(rows).view(num_sequences, size, -1)
        for i in range(num_sequences):
            compare(name, dtype, ours[i], logits[i % 2])
    # and one token a step
    each = torch.cat([conversation.logits({-1: [token]}) for token in tokens[0]])
    compare(name, dtype, each, logits[0])


@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="for Hopper")
@pytest.mark.parametrize("name", [name for name in ALL if "8bit" not in name and "g32" not in name])
def test_the_fast_kernels_serve_them(name: str) -> None:
    log = Conversation(name, torch.bfloat16, "hopper").loaded.operations.log
    chosen = set().union(*(names for operation, names in log.items() if operation in QUANTIZED))
    assert chosen <= FAMILIES["hopper"]


@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="for Hopper")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("num_in", "num_out", "group_size"), [(256, 72, 64), (1024, 17408, 128), (4096, 6144, 128), (1408, 520, 128)]
)
@torch.inference_mode()
def test_4_bit_products_of_every_number_of_tokens(
    num_in: int, num_out: int, group_size: int, dtype: torch.dtype
) -> None:
    need, weight = packed(num_in, num_out, group_size, dtype)
    parts = [getattr(weight, name) for name in weight.__slots__]
    on_device = [part.cuda() if isinstance(part, Tensor) else part for part in parts]
    need, weight = replace(need, device=torch.device("cuda")), PackedWeight(*on_device)
    bias = torch.randn(num_out, device="cuda", dtype=dtype)
    product = HopperPacked(need, weight, bias)
    exact = weight.dequantize(torch.float32)
    for num_tokens in (1, 9, 33, 64, 65, 128, 160, 200, 256, 384, 385, 600, 1024, 1025):
        x = torch.randn(num_tokens, num_in, device="cuda", dtype=dtype)
        expected = x.float() @ exact.T + bias.float()
        found = product.apply(x)
        error = (found.float() - expected).norm() / expected.norm()
        assert error < (1e-3 if dtype == torch.float16 else 6e-3), num_tokens
        assert torch.equal(product.apply(x), found), num_tokens


@pytest.mark.parametrize("family", ["triton", "hopper"])
@torch.inference_mode()
def test_a_model_is_the_same_whether_its_norms_round_or_its_products(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "ct-fp8-dynamic"
    tokens = load_file(FIXTURES / name / "reference.safetensors")["input_ids"].tolist()
    rows = {i: tokens[i % 2] for i in range(6)}  # 144 tokens
    operations = (*QUANTIZED, "rms_norm", "silu_and_mul")
    rounded: list[RoundedTokens | None] = []
    empty = TokenRounding.empty

    def note(self: TokenRounding, num_tokens: int, size: int, device: torch.device) -> RoundedTokens | None:
        rounded.append(empty(self, num_tokens, size, device))
        return rounded[-1]

    monkeypatch.setattr(TokenRounding, "empty", note)
    fused = Conversation(name, torch.bfloat16, family, operations).logits(rows)
    assert rounded
    assert all(tokens is not None for tokens in rounded)
    monkeypatch.setattr(TokenRounding, "empty", lambda *_: None)
    assert torch.equal(fused, Conversation(name, torch.bfloat16, family, operations).logits(rows))
