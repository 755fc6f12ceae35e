"""The blocks that decoders of the Llama family are made of, and the decoder that they make.

A model file reads its ``config.json`` into a :class:`DecoderSpec`; where an architecture differs in more than numbers,
it puts its own block in the place of one of these.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from octavo.errors import ConfigError
from octavo.layers.attention import ForwardContext
from octavo.layers.builder import Builder
from octavo.layers.rotary import RotaryEmbedding


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSpec:
    """The sizes of a decoder, counted over all ranks, and the ways in which its family's members differ."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    tied_embeddings: bool
    windows: tuple[int | None, ...]  # per layer: how many tokens attention reaches back, or None: all
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    query_key_norm: bool = False  # normalize each head's query and key before they are rotated

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **differences: Any) -> DecoderSpec:
        """What every member of the family says in the same words; ``differences`` are the fields that are its own.

        Raises:
            ConfigError: names the setting that is missing, contradicts another or is not supported.
        """
        require(config, "hidden_act", {"silu"}, default="silu")
        num_heads, hidden_size = positive(config, "num_attention_heads"), positive(config, "hidden_size")
        num_layers = positive(config, "num_hidden_layers")
        num_kv_heads = positive(config, "num_key_value_heads", default=num_heads)
        if num_heads % num_kv_heads:
            raise ConfigError(
                f"num_attention_heads ({num_heads}) is not a multiple of num_key_value_heads ({num_kv_heads})"
            )
        if config.get("head_dim") is None and hidden_size % num_heads:
            raise ConfigError(
                f"hidden_size ({hidden_size}) is not a multiple of num_attention_heads ({num_heads}) and the "
                f"configuration has no head_dim"
            )
        shared: dict[str, Any] = {
            "vocab_size": positive(config, "vocab_size"),
            "hidden_size": hidden_size,
            "intermediate_size": positive(config, "intermediate_size"),
            "num_layers": num_layers,
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "head_dim": positive(config, "head_dim", default=hidden_size // num_heads),
            "norm_eps": float(config.get("rms_norm_eps", 1e-6)),
            "tied_embeddings": bool(config.get("tie_word_embeddings", False)),
            "windows": (None,) * num_layers,
        }
        return cls(**{**shared, **differences})


def positive(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A whole number above 0; ``default`` stands for an absent one or null.

    Raises:
        ConfigError: names the setting.
    """
    value = config.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"the model's configuration needs a whole number above 0 as '{name}', not {value!r}")
    return value


def require(config: Mapping[str, Any], name: str, supported: Collection[Any], default: Any) -> Any:
    """The setting's value, if it is one that is supported; ``default`` stands for an absent one.

    Raises:
        ConfigError: names the setting, its value and what is supported.
    """
    value = config.get(name, default)
    if value not in supported:
        raise ConfigError(
            f"{name} {value!r} of the model's configuration is not supported; supported: "
            f"{', '.join(str(known) for known in sorted(supported))}"
        )
    return value


def sliding_window(config: Mapping[str, Any]) -> int | None:
    """The window in tokens; null: there is none. An absent one is the 4096 of the first Mistral, as in Transformers."""
    if config.get("sliding_window", 4096) is None:
        return None
    return positive(config, "sliding_window", default=4096)


def windows_by_layer_type(
    config: Mapping[str, Any], window: int | None, default: Collection[str]
) -> tuple[int | None, ...]:
    """Per layer ``window`` or None, as the config's ``layer_types`` say; ``default`` where it has none.

    Raises:
        ConfigError: a type is not supported, slides without a window, or there are not as many as layers.
    """
    types = config.get("layer_types") or default
    num_layers = positive(config, "num_hidden_layers")
    if len(types) != num_layers:
        raise ConfigError(f"layer_types has {len(types)} entries, but num_hidden_layers is {num_layers}")
    windows = []
    for kind in types:
        require({"layer_types": kind}, "layer_types", {"full_attention", "sliding_attention"}, None)
        if kind == "sliding_attention" and window is None:
            raise ConfigError("layer_types has 'sliding_attention', but the configuration sets no sliding_window")
        windows.append(window if kind == "sliding_attention" else None)
    return tuple(windows)


class GatedMLP:
    """``down(silu(gate(x)) * up(x))`` (Shazeer 2020)."""

    def __init__(self, name: str, spec: DecoderSpec, build: Builder) -> None:
        size = spec.intermediate_size
        self.gate_up = build.column_linear(
            f"{name}.gate_up_proj", spec.hidden_size, {"gate_proj": size, "up_proj": size}, bias=spec.mlp_bias
        )
        self.down = build.row_linear(f"{name}.down_proj", size, spec.hidden_size, bias=spec.mlp_bias)
        self.activation = build.silu_and_mul(self.gate_up, into=self.down)

    def __call__(self, x: Tensor, residual: Tensor) -> tuple[Tensor | None, Tensor]:
        """x [num_tokens, hidden_size] -> the same shape and the residual that it is to be added to; None: it was."""
        return self.down.onto(self.activation(x), residual)


class SelfAttention:
    """Projections around the attention of one layer, with grouped queries (Ainslie et al. 2023)."""

    def __init__(
        self, name: str, spec: DecoderSpec, build: Builder, rotary: RotaryEmbedding | None, window: int | None
    ) -> None:
        heads = (spec.num_heads, spec.num_kv_heads, spec.head_dim)
        self.qkv = build.qkv_linear(f"{name}.qkv_proj", spec.hidden_size, *heads, bias=spec.qkv_bias)
        query_norm = key_norm = None
        if spec.query_key_norm:
            query_norm = build.rms_norm(f"{name}.q_norm", spec.head_dim, spec.norm_eps)
            key_norm = build.rms_norm(f"{name}.k_norm", spec.head_dim, spec.norm_eps)
        self.attention = build.attention(
            name, *heads, rotary=rotary, window=window, query_norm=query_norm, key_norm=key_norm
        )
        self.output = build.row_linear(
            f"{name}.o_proj",
            spec.num_heads * spec.head_dim,
            spec.hidden_size,
            bias=spec.output_bias,
            unit=spec.head_dim,
        )

    def __call__(self, x: Tensor, context: ForwardContext) -> Tensor:
        """x [num_tokens, hidden_size] -> what ``output`` projects, [num_tokens, num_heads * head_dim]."""
        return self.attention(self.qkv(x), context)


class DecoderLayer:
    """Attention and MLP, each behind a norm and beside a residual that travels along, added where it is normalized."""

    def __init__(
        self, name: str, spec: DecoderSpec, build: Builder, rotary: RotaryEmbedding | None, window: int | None
    ) -> None:
        size, eps = spec.hidden_size, spec.norm_eps
        self.attention = SelfAttention(f"{name}.self_attn", spec, build, rotary, window)
        self.input_norm = build.rms_norm(f"{name}.input_layernorm", size, eps, into=self.attention.qkv)
        self.mlp = GatedMLP(f"{name}.mlp", spec, build)
        self.mlp_norm = build.rms_norm(f"{name}.post_attention_layernorm", size, eps, into=self.mlp.gate_up)

    def attend(self, x: Tensor | None, residual: Tensor | None, context: ForwardContext) -> tuple[Tensor, Tensor]:
        """The half in which tokens meet: x [num_tokens, hidden_size] and what is to be added to it, or one of them ->
        the heads' outputs [num_tokens, num_heads * head_dim] and the sum."""
        x, residual = self.input_norm.add(x, residual)
        return self.attention(x, context), residual

    def transform(self, x: Tensor, residual: Tensor) -> tuple[Tensor | None, Tensor]:
        """The half in which each token is by itself: what ``attend`` returned, or some rows of it -> x and residual
        of the next layer."""
        x, residual = self.mlp_norm.add(*self.attention.output.onto(x, residual))
        return self.mlp(x, residual)


class CausalDecoder:
    """Embedding, layers, norm and head: an :class:`octavo.interfaces.ObservedModel`, but for reading ``config``."""

    def __init__(self, spec: DecoderSpec, config: Mapping[str, Any], build: Builder) -> None:
        rotary = build.rotary(config, spec.head_dim)
        self.num_layers, self.hidden_size = spec.num_layers, spec.hidden_size
        self.embedding = build.embedding("model.embed_tokens", spec.vocab_size, spec.hidden_size)
        self.layers = [
            DecoderLayer(f"model.layers.{index}", spec, build, rotary, window)
            for index, window in enumerate(spec.windows)
        ]
        self.norm = build.rms_norm("model.norm", spec.hidden_size, spec.norm_eps)
        tied = self.embedding if spec.tied_embeddings else None
        self.head = build.lm_head("lm_head", spec.hidden_size, spec.vocab_size, tied=tied)

    def forward(self, tokens: Tensor, positions: Tensor, context: ForwardContext) -> Tensor:
        """See :meth:`octavo.interfaces.Model.forward`."""
        x, residual = self.embed(tokens), None  # type: Tensor | None, Tensor | None
        for index, layer in enumerate(self.layers):
            context.record(index, x, residual)
            x, residual = layer.attend(x, residual, context)
            if layer is self.layers[-1]:
                x, residual = context.keep(x), context.keep(residual)
            x, residual = layer.transform(x, residual)
        x, _ = self.norm.add(x, residual)
        context.record(self.num_layers, x)
        return x

    def embed(self, tokens: Tensor) -> Tensor:
        """See :meth:`octavo.interfaces.ObservedModel.embed`."""
        return self.embedding(tokens)

    def logits(self, hidden: Tensor) -> Tensor:
        """See :meth:`octavo.interfaces.Model.logits`."""
        return self.head(hidden)
