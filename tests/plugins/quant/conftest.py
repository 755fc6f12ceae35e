"""Real and invented quantized checkpoints, and our models run on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.paging import PagedSequences
from torch import Tensor

from octavo.architectures import choose_model
from octavo.attention.torch_backend import TorchAttention
from octavo.hooks import KernelProvider
from octavo.interfaces import AttentionNeed, Model, Placement, TensorInfo
from octavo.layers.activation import TorchSiluAndMul
from octavo.layers.attention import ForwardContext
from octavo.layers.builder import Builder
from octavo.layers.linear import TorchLinear
from octavo.layers.norm import TorchRMSNorm
from octavo.loader import CheckpointLoader, HuggingFaceFolder
from octavo.operations import Operations
from octavo.parallel import Shard
from octavo.quantization import resolve_quantization
from octavo_models.plugin import octavo_models
from octavo_quant import awq, compressed_tensors, fp8, gptq
from octavo_quant.providers import FP8_KERNELS, PACKED_KERNELS

FIXTURES = Path(__file__).parents[2] / "fixtures" / "quant"
MAX_MODEL_LEN = 64
BLOCK_SIZE = 16
PLUGINS = (awq, gptq, fp8, compressed_tensors)


def operations(insisted: Mapping[str, str] | None = None, more: Sequence[KernelProvider] = ()) -> Operations:
    """The plain torch implementations, this package's kernels, and ``more``."""
    builtin = [
        KernelProvider("torch", TorchLinear, operation="linear"),
        KernelProvider("torch", TorchRMSNorm, operation="rms_norm"),
        KernelProvider("torch", TorchSiluAndMul, operation="silu_and_mul"),
    ]
    kernels = [*PACKED_KERNELS, *FP8_KERNELS, *more]
    return Operations(builtin, {f"{k.operation}/{k.name}": k for k in kernels}, insisted)


class Unfused(Builder):
    """Loads every projection as a product of its own."""

    def _linear(self, spec: Any) -> Any:
        from dataclasses import replace

        from octavo.layers.linear import JoinedLinear, Linear

        methods = []
        for part in spec.parts:
            methods.append(super()._linear(replace(spec, parts=(part,))).method)
        return Linear(spec, JoinedLinear(methods))


class LoadedModel:
    """A checkpoint loaded by the plugin that it names."""

    def __init__(
        self,
        path: Path,
        dtype: torch.dtype = torch.float32,
        *,
        fused: bool = True,
        wanted: str | None = None,
        insisted: Mapping[str, str] | None = None,
        shard: Shard | None = None,
        device: str = "cpu",
        kernels: Sequence[KernelProvider] = (),
    ) -> None:
        self.folder = HuggingFaceFolder(path)
        self.config = self.folder.config()
        self.placement = Placement(torch.device(device), dtype)
        weights = self.folder.weights()
        self.operations = operations(insisted, kernels)
        self.loader = CheckpointLoader(weights, self.placement, self.operations)
        providers = {provider.name: provider for plugin in PLUGINS for provider in plugin.octavo_quantizations()}
        quantization = resolve_quantization(self.folder, wanted, providers, weights)
        kind = Builder if fused else Unfused
        self.build = kind(self.loader, max_model_len=MAX_MODEL_LEN, quantization=quantization, shard=shard)
        models = {provider.name: provider for provider in octavo_models()}
        self.model: Model = choose_model(self.config, models)(self.config, self.build)

    def logits(self, tokens: list[int], kv_dtype: torch.dtype | None = None) -> Tensor:
        """One sequence -> logits [num_tokens, vocab_size] float32 of every position."""
        spec = self.build.attention_specs[0]
        dtype = self.placement.dtype
        kv_dtype = kv_dtype or dtype
        sizes = (BLOCK_SIZE, spec.head_dim, spec.num_heads, spec.num_kv_heads)
        backend = TorchAttention(AttentionNeed(self.placement.device, dtype, kv_dtype, *sizes))
        sequences = PagedSequences(block_size=BLOCK_SIZE)
        kv = [
            torch.zeros(backend.kv_shape(each, sequences.num_blocks), dtype=kv_dtype)
            for each in self.build.attention_specs
        ]
        batch = sequences.batch({0: tokens})
        context = ForwardContext(batch, backend, backend.plan(batch), kv)
        hidden = self.model.forward(batch.tokens, batch.positions, context)
        return self.model.logits(hidden).float()


class Tensors:
    """A checkpoint in memory: an :class:`octavo.interfaces.WeightSource`."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)

    def names(self) -> set[str]:
        return set(self.tensors)

    def info(self, name: str) -> TensorInfo:
        tensor = self.tensors[name]
        return TensorInfo(tuple(tensor.shape), tensor.dtype, "model.safetensors")

    def read(self, name: str, index: tuple[slice, ...] = ()) -> Tensor:
        return self.tensors[name][index] if index else self.tensors[name]

    def loader(self, dtype: torch.dtype = torch.float32) -> CheckpointLoader:
        return CheckpointLoader(self, Placement(torch.device("cpu"), dtype), operations())


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield
