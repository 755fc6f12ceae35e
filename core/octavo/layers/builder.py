"""What a model is built with: layers that are loaded, sharded and quantized as they are made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from octavo.errors import CheckpointError
from octavo.interfaces import AttentionSpec, LayerLoader, LinearMethod, LinearPart, LinearSpec, Quantization
from octavo.layers.activation import SiluAndMul
from octavo.layers.attention import Attention
from octavo.layers.embedding import Embedding
from octavo.layers.linear import Linear, load_plain, make_linear
from octavo.layers.norm import RMSNorm
from octavo.layers.rotary import RotaryEmbedding, rope_parameters
from octavo.operations import ActivationNeed, NormNeed
from octavo.parallel import Shard


class Builder:
    """Makes the layers of one model on one rank.

    Building is loading: each method reads the tensors that it names and nothing is left half-made, so a model never
    exists in two copies, and an error says which layer it happened in. Names are those of the checkpoint.
    """

    def __init__(
        self,
        load: LayerLoader,
        *,
        max_model_len: int,
        quantization: Quantization | None = None,
        shard: Shard | None = None,
    ) -> None:
        self.load = load
        self.max_model_len = max_model_len
        self.quantization = quantization
        self.shard = shard or Shard()
        self.attention_specs: list[AttentionSpec] = []
        self._rotary: dict[tuple[int, str], RotaryEmbedding] = {}
        self._bytes = 0
        self._beside_layers = 0  # of those: embeddings and output heads
        self._head_bytes = 0  # that heads read, of an embedding that they share, too

    # --- linear layers ----------------------------------------------------------------------------------------------

    def linear(self, name: str, in_features: int, out_features: int, *, bias: bool = False) -> Linear:
        """A layer that every rank holds whole."""
        part = LinearPart(name, out_features, slice(0, out_features))
        return self._linear(LinearSpec(name, (part,), in_features, slice(0, in_features), bias))

    def column_linear(self, name: str, in_features: int, parts: Mapping[str, int], *, bias: bool = False) -> Linear:
        """Projections of one input, fused side by side, each split over the ranks by output.

        ``parts`` maps the projections' names below ``name``'s parent to their output features:
        ``column_linear("model.layers.0.mlp.gate_up_proj", hidden, {"gate_proj": size, "up_proj": size})``.
        """
        parent = name.rpartition(".")[0]
        made = tuple(
            LinearPart(f"{parent}.{part}", size, self.shard.rows(size, f"output of {parent}.{part}"))
            for part, size in parts.items()
        )
        return self._linear(LinearSpec(name, made, in_features, slice(0, in_features), bias))

    def qkv_linear(
        self, name: str, hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int, *, bias: bool = False
    ) -> Linear:
        """Query, key and value projections (``q_proj``, ``k_proj``, ``v_proj`` beside ``name``), split by heads."""
        parent = name.rpartition(".")[0]
        query = self.shard.rows(num_heads * head_dim, "number of attention heads", head_dim)
        heads = self.shard.kv_heads(num_kv_heads)
        key = slice(heads.start * head_dim, heads.stop * head_dim)
        parts = (
            LinearPart(f"{parent}.q_proj", num_heads * head_dim, query),
            LinearPart(f"{parent}.k_proj", num_kv_heads * head_dim, key),
            LinearPart(f"{parent}.v_proj", num_kv_heads * head_dim, key),
        )
        return self._linear(LinearSpec(name, parts, hidden_size, slice(0, hidden_size), bias))

    def row_linear(
        self, name: str, in_features: int, out_features: int, *, bias: bool = False, unit: int = 1
    ) -> Linear:
        """A layer whose input is split over the ranks in whole ``unit``s; the ranks' outputs are added up."""
        columns = self.shard.rows(in_features, f"input of {name}", unit)
        part = LinearPart(name, out_features, slice(0, out_features))
        return self._linear(LinearSpec(name, (part,), in_features, columns, bias))

    def _linear(self, spec: LinearSpec) -> Linear:
        method: LinearMethod | None = None
        if self.quantization is not None:
            method = self.quantization.linear(spec, self.load)
        return self._counted(Linear(spec, method or load_plain(spec, self.load)))

    def _counted(self, linear: Linear) -> Linear:
        self._bytes += linear.method.num_bytes()
        return linear

    # --- embeddings and heads ---------------------------------------------------------------------------------------

    def embedding(self, name: str, num_embeddings: int, size: int) -> Embedding:
        """A table [num_embeddings, size] in the activations' dtype."""
        table = self.tensor(f"{name}.weight", (num_embeddings, size))
        self._beside_layers += table.nbytes
        return Embedding(table)

    def lm_head(self, name: str, hidden_size: int, vocab_size: int, *, tied: Embedding | None = None) -> Linear:
        """The output projection; with ``tied`` it multiplies by the embedding's table and reads nothing."""
        part = LinearPart(name, vocab_size, slice(0, vocab_size))
        spec = LinearSpec(name, (part,), hidden_size, slice(0, hidden_size), False)
        before = self._bytes
        if tied is None:
            head = self._linear(spec)
        else:
            head = Linear(spec, make_linear(tied.weight, None, self.load))
            if getattr(head.method, "weight", None) is not tied.weight:
                self._counted(head)
        self._beside_layers += self._bytes - before
        self._head_bytes += head.method.num_bytes()
        return head

    # --- norms, activations, attention ------------------------------------------------------------------------------

    def rms_norm(self, name: str, size: int, eps: float, *, into: Linear | None = None) -> RMSNorm:
        """A root-mean-square norm over ``size`` elements.

        ``into`` promises that what it returns goes into that layer and nowhere else, so it may be rounded for it.
        """
        placement = self.load.placement
        weight = self.tensor(f"{name}.weight", (size,))
        need = NormNeed(placement.device, placement.dtype, size, None if into is None else into.form)
        return RMSNorm(weight, eps, self.load.kernel("rms_norm", need)(need))

    def silu_and_mul(self, gate_up: Linear, *, into: Linear | None = None) -> SiluAndMul:
        """``silu(gate) * up`` of what ``gate_up`` projects, fused from two parts of one size: called with its input.

        ``into`` promises that what it returns goes into that layer and nowhere else, so it may be rounded for it.
        """
        placement = self.load.placement
        form = None if into is None else into.form
        need = ActivationNeed(placement.device, placement.dtype, gate_up.spec.parts[0].num_rows, form)
        return SiluAndMul(gate_up, self.load.kernel("silu_and_mul", need)(need), fuses=form is None)

    def rotary(self, config: Mapping[str, Any], head_dim: int, *, layer_type: str | None = None) -> RotaryEmbedding:
        """Rotary embeddings as ``config`` describes them; layers that ask for the same share one table.

        ``layer_type`` is for models whose ``rope_parameters`` differ from layer to layer.
        """
        key = (head_dim, repr(rope_parameters(config, layer_type)))
        if key not in self._rotary:
            device = self.load.placement.device
            made = RotaryEmbedding.from_config(config, head_dim, self.max_model_len, device, layer_type)
            self._bytes += made.table.nbytes
            self._rotary[key] = made
        return self._rotary[key]

    def attention(
        self,
        name: str,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        rotary: RotaryEmbedding | None,
        scale: float | None = None,
        window: int | None = None,
        soft_cap: float | None = None,
        query_norm: RMSNorm | None = None,
        key_norm: RMSNorm | None = None,
    ) -> Attention:
        """The next attention layer, with its own cache.

        ``name`` is the checkpoint's module that the scales of an 8-bit cache hang on ("model.layers.0.self_attn").
        Heads are counted over all ranks; ``scale`` defaults to 1/√head_dim.
        """
        heads = self.shard.kv_heads(num_kv_heads)
        spec = AttentionSpec(
            layer=len(self.attention_specs),
            num_heads=self.shard.divide(num_heads, "number of attention heads"),
            num_kv_heads=heads.stop - heads.start,
            head_dim=head_dim,
            scale=head_dim**-0.5 if scale is None else scale,
            window=window,
            soft_cap=soft_cap,
            key_scale=self._cache_scale(name, "k"),
            value_scale=self._cache_scale(name, "v"),
        )
        self.attention_specs.append(spec)
        return Attention(spec, rotary, query_norm, key_norm)

    def _cache_scale(self, name: str, which: str) -> float:
        """The scale of an 8-bit cache's keys (``k``) or values (``v``); 1 where the checkpoint has none.

        compressed-tensors and fp8 checkpoints call it ``k_scale``; ModelOpt hangs it on the projection; early
        compressed-tensors files have the scale of the projection's output, and early fp8 ones one scale for both.

        Raises:
            CheckpointError: it is no positive number.
        """
        candidates = (f"{which}_scale", f"{which}_proj.{which}_scale", f"{which}_proj.output_scale", "kv_scale")
        found = next((f"{name}.{each}" for each in candidates if self.load.has(f"{name}.{each}")), None)
        if found is None:
            return 1.0
        scale = float(self.load.tensor(found, (), dtype=torch.float32))
        if not 0 < scale < float("inf"):
            raise CheckpointError(
                f"tensor '{found}' is {scale}, but the scale of an 8-bit cache is a positive number; quantize the "
                f"model again, or remove the tensor"
            )
        return scale

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """Any other tensor of the checkpoint, whole, in the activations' dtype unless another is named."""
        tensor = self.load.tensor(name, shape, dtype=dtype or self.load.placement.dtype)
        self._bytes += tensor.nbytes
        return tensor

    def num_bytes(self) -> int:
        """Device memory that everything built so far takes; what layers share is counted once."""
        return self._bytes

    def num_bytes_read(self, *, with_head: bool) -> int:
        """Of them, what a step of few tokens reads: the layers and, where tokens are sampled, the output head.
        Embeddings are looked up in."""
        return self._bytes - self._beside_layers + (self._head_bytes if with_head else 0)
