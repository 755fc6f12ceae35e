"""Drafts by heads on the target's hidden states: EAGLE (Li et al. 2024) and EAGLE-3 (Li et al. 2025), as chains.

A head is a small decoder. At position i it reads the token i + 1 and a feature of position i, and says what token i + 2
will be. The feature is the target's hidden state where the target has been, and the head's own output of the position
before where it has not.

Checkpoints in the published formats, as safetensors:

- EAGLE: ``fc`` joins the token's embedding with the target's last hidden state, after its final norm; ``layers.N``, of
  which the first has no input norm; no norm at the end; the target's own output head.
- EAGLE-3: ``fc`` joins what goes into three of the target's layers; one layer, ``midlayer`` or ``layers.0``, attends on
  the normalized embedding beside the normalized feature; ``norm`` and an ``lm_head`` of its own, for a part of the
  vocabulary: ``d2t`` [draft_vocab_size] is what to add to one of its ids to get the target's.

Where there is no ``embed_tokens`` the target's is used.

What a head computes at position i depends on token i + 1. Of sequences that go on differently right after a block that
they share, each overwrites the last position of that block for the others: they lose a little acceptance there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from octavo import CheckpointError, ConfigError, EngineConfig
from octavo.batch import ForwardBatch
from octavo.interfaces import DrafterContext, ObservedModel
from octavo.layers.attention import ForwardContext
from octavo.layers.builder import Builder
from octavo.layers.norm import RMSNorm
from octavo.layers.rotary import RotaryEmbedding
from octavo_speculative.beside import DrafterBeside


class Features:
    """One feature for each position, in blocks as keys and values are kept: the target's where it has been, beyond that
    those that the head guesses.

    A :class:`octavo.interfaces.HiddenStateRecorder`. ``combine`` makes a feature of the hidden states of ``layers``,
    [num_tokens, len(layers) * hidden_size] in ascending order of the layers.
    """

    def __init__(
        self,
        layers: Collection[int],
        combine: Callable[[Tensor], Tensor] | None,
        size: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.layers = layers
        self.bytes_per_block = block_size * size * dtype.itemsize
        self._last = max(layers)
        self._combine = combine
        self._size = size
        self._block_size = block_size
        self._dtype = dtype
        self._device = device
        self._seen: list[Tensor] = []

    def start(self, num_blocks: int) -> Tensor:
        # the last block takes what is written for nobody
        self._cache = torch.zeros(num_blocks + 1, self._block_size, self._size, dtype=self._dtype, device=self._device)
        self._flat = self._cache.view(-1, self._size)
        self._nowhere = num_blocks * self._block_size
        return self._cache

    def record(self, layer: int, hidden: Tensor, batch: ForwardBatch) -> None:
        self._seen.append(hidden)
        if layer == self._last:
            features = hidden if self._combine is None else self._combine(torch.cat(self._seen, dim=-1))
            self._flat[batch.slots] = features
            self._seen = []

    def read(self, batch: ForwardBatch) -> Tensor:
        """Of the batch's tokens [num_tokens, size]."""
        return self._flat[batch.slots]

    def guess(self, output: Tensor, batch: ForwardBatch) -> None:
        """The head's ``output`` [num_tokens, size]: where a row's last token decides one, that is the feature of the
        position after it. Elsewhere the target's is there already."""
        last = batch.query_start[1:].long() - 1
        ends = batch.seq_lens.long()
        block = batch.block_tables.gather(1, (ends // self._block_size).unsqueeze(1)).squeeze(1)
        places = block.long() * self._block_size + ends % self._block_size
        decides = (last.unsqueeze(1) == batch.logit_rows).any(dim=1)
        self._flat[torch.where(decides, places, self._nowhere)] = output[last]


class HeadLayer:
    """A decoder layer after its input norm, if it has one."""

    def __init__(
        self, name: str, config: Mapping[str, Any], build: Builder, rotary: RotaryEmbedding, input_size: int
    ) -> None:
        hidden_size, size = int(config["hidden_size"]), int(config["intermediate_size"])
        num_heads = int(config["num_attention_heads"])
        heads = (num_heads, int(config.get("num_key_value_heads") or num_heads), head_dim(config))
        bias = bool(config.get("attention_bias", False))
        attention = f"{name}.self_attn"
        self.qkv = build.qkv_linear(f"{attention}.qkv_proj", input_size, *heads, bias=bias)
        self.attention = build.attention(attention, *heads, rotary=rotary)
        self.output = build.row_linear(f"{attention}.o_proj", heads[0] * heads[2], hidden_size, bias=bias)
        self.norm = build.rms_norm(f"{name}.post_attention_layernorm", hidden_size, float(config["rms_norm_eps"]))
        self.gate_up = build.column_linear(
            f"{name}.mlp.gate_up_proj", hidden_size, {"gate_proj": size, "up_proj": size}
        )
        self.activation = build.silu_and_mul(self.gate_up)
        self.down = build.row_linear(f"{name}.mlp.down_proj", size, hidden_size)

    def __call__(self, x: Tensor, residual: Tensor, context: ForwardContext) -> tuple[Tensor, Tensor]:
        """x [num_tokens, input_size] and what is to be added -> the same for the next layer."""
        x = self.output(self.attention(self.qkv(x), context))
        x, residual = self.norm.add(x, residual)
        return self.down(self.activation(x)), residual


class EagleHead:
    """EAGLE's head: an :class:`octavo.interfaces.Model` that reads ``features``."""

    def __init__(self, config: Mapping[str, Any], build: Builder, target: ObservedModel, block_size: int) -> None:
        hidden_size, eps = int(config["hidden_size"]), float(config["rms_norm_eps"])
        rotary = build.rotary(config, head_dim(config))
        self._target = target
        self._embed = _embedding(config, build, target)
        self._fc = build.linear("fc", 2 * hidden_size, hidden_size, bias=build.load.has("fc.bias"))
        names = [f"layers.{index}" for index in range(int(config["num_hidden_layers"]))]
        self._layers = [HeadLayer(name, config, build, rotary, hidden_size) for name in names]
        self._norms: list[RMSNorm | None] = [None]
        self._norms += [build.rms_norm(f"{name}.input_layernorm", hidden_size, eps) for name in names[1:]]
        self.features = _features((target.num_layers,), None, config, build, block_size)

    def forward(self, tokens: Tensor, positions: Tensor, context: ForwardContext) -> Tensor:
        """See :meth:`octavo.interfaces.Model.forward`; ``tokens`` are those after the positions."""
        x = self._fc(torch.cat([self._embed(tokens), self.features.read(context.batch)], dim=-1))
        residual: Tensor | None = None
        for norm, layer in zip(self._norms, self._layers, strict=True):
            x, residual = (x, x) if norm is None else norm.add(x, residual)
            x, residual = layer(x, residual, context)
        assert residual is not None  # there is a layer
        x = x + residual
        self.features.guess(x, context.batch)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """See :meth:`octavo.interfaces.Model.logits`."""
        return self._target.logits(hidden)


class Eagle3Head:
    """EAGLE-3's head: an :class:`octavo.interfaces.Model` that reads ``features``."""

    def __init__(self, config: Mapping[str, Any], build: Builder, target: ObservedModel, block_size: int) -> None:
        hidden_size, eps = int(config["hidden_size"]), float(config["rms_norm_eps"])
        if int(config.get("num_hidden_layers", 1)) != 1:
            raise ConfigError(f"a head of EAGLE-3 with {config['num_hidden_layers']} layers; only one is supported")
        layers = feature_layers(config, target.num_layers)
        name = "midlayer" if build.load.has("midlayer.hidden_norm.weight") else "layers.0"
        self._embed = _embedding(config, build, target)
        self._norm_first = bool(config.get("norm_before_residual", False))
        self._input_norm = build.rms_norm(f"{name}.input_layernorm", hidden_size, eps)
        self._hidden_norm = build.rms_norm(f"{name}.hidden_norm", hidden_size, eps)
        self._layer = HeadLayer(name, config, build, build.rotary(config, head_dim(config)), 2 * hidden_size)
        self._norm = build.rms_norm("norm", hidden_size, eps)
        self._vocab_size = int(config["vocab_size"])
        draft_vocab_size = int(config.get("draft_vocab_size") or self._vocab_size)
        self._head = build.lm_head("lm_head", hidden_size, draft_vocab_size)
        self._target_ids = _target_ids(build, draft_vocab_size, self._vocab_size)
        fc = build.linear("fc", len(layers) * target.hidden_size, hidden_size, bias=build.load.has("fc.bias"))
        self.features = _features(layers, fc, config, build, block_size)

    def forward(self, tokens: Tensor, positions: Tensor, context: ForwardContext) -> Tensor:
        """See :meth:`octavo.interfaces.Model.forward`; ``tokens`` are those after the positions."""
        features = self.features.read(context.batch)
        normed = self._hidden_norm(features)
        x = torch.cat([self._input_norm(self._embed(tokens)), normed], dim=-1)
        x, residual = self._layer(x, normed if self._norm_first else features, context)
        x, output = self._norm.add(x, residual)
        self.features.guess(output, context.batch)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """See :meth:`octavo.interfaces.Model.logits`: impossible what is not in the head's part of the vocabulary."""
        logits: Tensor = self._head(hidden)
        if self._target_ids is None:
            return logits
        everything = logits.new_full((logits.shape[0], self._vocab_size), -torch.inf)
        return everything.index_copy_(1, self._target_ids, logits)


class Eagle(DrafterBeside):
    """The drafter ``eagle``; see :class:`octavo.interfaces.Drafter`."""

    def __init__(self, config: EngineConfig, context: DrafterContext) -> None:
        """Loads the head.

        Raises:
            ConfigError: the head cannot be served, belongs to another target, or the target shows no hidden states.
        """
        speculative = config.speculative
        if speculative.model is None:
            raise ConfigError("speculation by eagle needs a head; name its folder with --speculative-model")
        if speculative.dtype not in ("auto", context.dtype):
            raise ConfigError(
                f"--speculative-dtype {speculative.dtype}: a head computes with the target's hidden states, in "
                f"{context.dtype}; leave the option out"
            )

        target = context.observed_model()

        def make(head_config: Mapping[str, Any], build: Builder) -> EagleHead | Eagle3Head:
            _check_config(head_config, target, context.vocab_size)
            # of the two formats this one normalizes the features
            third = "draft_vocab_size" in head_config or any(
                build.load.has(f"{name}.hidden_norm.weight") for name in ("midlayer", "layers.0")
            )
            return (Eagle3Head if third else EagleHead)(head_config, build, target, context.block_size)

        model = context.load_model(
            speculative.model, dtype=context.dtype, quantization=speculative.quantization, make=make
        )
        features = cast("EagleHead | Eagle3Head", model.model).features
        context.record(features)
        super().__init__(
            model,
            context,
            vocab_size=context.vocab_size,
            max_row_tokens=1 + speculative.num_tokens,  # what a step of the target may have added
            shift=1,
        )
        self.bytes_per_block += features.bytes_per_block


def head_dim(config: Mapping[str, Any]) -> int:
    """The size of an attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def feature_layers(config: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """The target's layers whose inputs EAGLE-3 joins: an early one, the middle one and a late one.

    Raises:
        ConfigError: the configuration names others. Programs differ in whether such a number means the input or the
            output of a layer.
    """
    usual = (2, num_layers // 2, num_layers - 3)
    named = config.get("eagle_aux_hidden_state_layer_ids")
    named = named or (config.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    if named is not None and tuple(named) not in (usual, tuple(layer - 1 for layer in usual)):
        raise ConfigError(
            f"the head asks for hidden states of layers {list(named)}; supported are those of EAGLE-3, which are the "
            f"inputs of {list(usual)} for this target"
        )
    if not 2 < usual[1] < usual[2]:
        raise ConfigError(f"a target of {num_layers} layers is too short for EAGLE-3, which joins those of {usual}")
    return usual


def _check_config(config: Mapping[str, Any], target: ObservedModel, vocab_size: int) -> None:
    for name, expected in (("hidden_size", target.hidden_size), ("vocab_size", vocab_size)):
        if config.get(name) != expected:
            raise ConfigError(
                f"the head's {name} is {config.get(name)}, but the target's is {expected}: it belongs to another target"
            )


def _embedding(config: Mapping[str, Any], build: Builder, target: ObservedModel) -> Callable[[Tensor], Tensor]:
    """The head's own table if it has one, else the target's."""
    if not build.load.has("embed_tokens.weight"):
        return target.embed
    return build.embedding("embed_tokens", int(config["vocab_size"]), int(config["hidden_size"]))


def _features(
    layers: Collection[int],
    combine: Callable[[Tensor], Tensor] | None,
    config: Mapping[str, Any],
    build: Builder,
    block_size: int,
) -> Features:
    placement = build.load.placement
    return Features(layers, combine, int(config["hidden_size"]), block_size, placement.dtype, placement.device)


def _target_ids(build: Builder, draft_vocab_size: int, vocab_size: int) -> Tensor | None:
    """What the head's ids are in the target's vocabulary [draft_vocab_size]; None: the same."""
    if not build.load.has("d2t"):
        if draft_vocab_size != vocab_size:
            raise CheckpointError(
                f"the head knows {draft_vocab_size} of {vocab_size} tokens, but the tensor 'd2t', which says which, is "
                f"not in its checkpoint"
            )
        return None
    offsets = build.tensor("d2t", (draft_vocab_size,), dtype=torch.int64)
    ids = torch.arange(draft_vocab_size, device=offsets.device) + offsets
    if not bool(((ids >= 0) & (ids < vocab_size)).all()) or len(set(ids.tolist())) < draft_vocab_size:
        raise CheckpointError(f"the tensor 'd2t' does not map the head's ids to different ones below {vocab_size}")
    return ids
