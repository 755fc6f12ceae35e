"""Tiny random checkpoints made by Transformers, and our models run on them step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.paging import PagedSequences
from torch import Tensor

from octavo.architectures import choose_model
from octavo.attention.torch_backend import TorchAttention
from octavo.batch import ForwardBatch
from octavo.hooks import KernelProvider
from octavo.interfaces import AttentionNeed, Model, Placement
from octavo.layers.activation import TorchSiluAndMul
from octavo.layers.attention import ForwardContext
from octavo.layers.builder import Builder
from octavo.layers.linear import TorchLinear
from octavo.layers.norm import TorchRMSNorm
from octavo.loader import CheckpointLoader, HuggingFaceFolder
from octavo.operations import Operations
from octavo_models.plugin import octavo_models

PLACEMENT = Placement(torch.device("cpu"), torch.float32)
BLOCK_SIZE = 4
MAX_MODEL_LEN = 64

TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": MAX_MODEL_LEN,
    "initializer_range": 0.5,  # far from uniform logits, so that a wrong layer shows
    "tie_word_embeddings": False,
}


def operations(plugins: Mapping[str, KernelProvider] | None = None) -> Operations:
    """The plain torch implementation of everything that models use, and kernels of ``plugins``."""
    return Operations(
        [
            KernelProvider("torch", TorchLinear, operation="linear"),
            KernelProvider("torch", TorchRMSNorm, operation="rms_norm"),
            KernelProvider("torch", TorchSiluAndMul, operation="silu_and_mul"),
        ],
        plugins or {},
    )


def load(path: Path, **overrides: Any) -> tuple[Model, CheckpointLoader, Builder]:
    """Our model from a checkpoint; ``overrides`` replace values of its ``config.json``."""
    folder = HuggingFaceFolder(path)
    config = {**folder.config(), **overrides}
    loader = CheckpointLoader(folder.weights(), PLACEMENT, operations())
    build = Builder(loader, max_model_len=MAX_MODEL_LEN)
    providers = {provider.name: provider for provider in octavo_models()}
    return choose_model(config, providers)(config, build), loader, build


class PagedModel:
    """One of our models with its caches: ``step`` continues sequences and returns the logits of every token."""

    def __init__(self, model: Model, build: Builder) -> None:
        self.sequences = PagedSequences(block_size=BLOCK_SIZE)
        self._model = model
        spec = build.attention_specs[0]
        sizes = (BLOCK_SIZE, spec.head_dim, spec.num_heads, spec.num_kv_heads)
        self._backend = TorchAttention(AttentionNeed(PLACEMENT.device, PLACEMENT.dtype, PLACEMENT.dtype, *sizes))
        # not a number wherever nothing was written: reading it would show
        self._kv = [
            torch.full(self._backend.kv_shape(spec, self.sequences.num_blocks), torch.nan)
            for spec in build.attention_specs
        ]

    def step(self, tokens: Mapping[int, Sequence[int]]) -> dict[int, Tensor]:
        """Tokens per sequence -> logits [num_tokens, vocab_size] per sequence."""
        return self.sequences.split(tokens, self._model.logits(self._forward(self.sequences.batch(tokens))))

    def last(self, tokens: Mapping[int, Sequence[int]]) -> Tensor:
        """Tokens per sequence -> logits [num_rows, vocab_size] of the last ones, in the order of the step's rows, when
        those are all that it keeps."""
        batch = self.sequences.batch(tokens)
        return self._model.logits(self._forward(batch, kept=batch.query_start[1:] - 1))

    def _forward(self, batch: ForwardBatch, kept: Tensor | None = None) -> Tensor:
        context = ForwardContext(batch, self._backend, self._backend.plan(batch), self._kv, kept=kept)
        return self._model.forward(batch.tokens, batch.positions, context)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., tuple[Path, transformers.PreTrainedModel]]:
    """Makes a tiny random model of a family ("Llama"), saves it, and returns the folder and the model."""

    def make(family: str, *, shard_size: str = "5GB", **changes: Any) -> tuple[Path, transformers.PreTrainedModel]:
        config = getattr(transformers, f"{family}Config")(**{**TINY, **changes})
        torch.manual_seed(0)
        reference = getattr(transformers, f"{family}ForCausalLM")(config).eval()
        with torch.no_grad():
            for name, parameter in reference.named_parameters():
                if name.endswith(
                    ("bias", "norm.weight", "layernorm.weight")
                ):  # zeros and ones would hide their absence
                    parameter.uniform_(0.5, 1.5)
        reference.save_pretrained(tmp_path, max_shard_size=shard_size)
        return tmp_path, reference

    return make
