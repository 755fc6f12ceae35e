"""Granite 3 (IBM 2024): Llama with factors on embeddings, attention scores, residuals and logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from octavo import ConfigError
from octavo.layers.attention import ForwardContext
from octavo.layers.builder import Builder
from octavo.layers.rotary import RotaryEmbedding


class GraniteForCausalLM:
    """An :class:`octavo.interfaces.Model`. Tensors have the names that Transformers gives them.

    Raises:
        ConfigError: the checkpoint uses an activation that this model does not compute.
    """

    def __init__(self, config: Mapping[str, Any], build: Builder) -> None:
        activation = config.get("hidden_act", "silu")
        if activation != "silu":
            raise ConfigError(f"hidden_act '{activation}' of a Granite model is not supported; supported: silu")
        hidden_size, eps = config["hidden_size"], config["rms_norm_eps"]
        self.embedding_multiplier = float(config["embedding_multiplier"])
        self.logits_scaling = float(config["logits_scaling"])
        self.embedding = build.embedding("model.embed_tokens", config["vocab_size"], hidden_size)
        rotary = build.rotary(config, hidden_size // config["num_attention_heads"])
        self.layers = [
            GraniteLayer(f"model.layers.{index}", config, build, rotary) for index in range(config["num_hidden_layers"])
        ]
        self.norm = build.rms_norm("model.norm", hidden_size, eps)
        tied = self.embedding if config.get("tie_word_embeddings", False) else None
        self.head = build.lm_head("lm_head", hidden_size, config["vocab_size"], tied=tied)

    def forward(self, tokens: Tensor, positions: Tensor, context: ForwardContext) -> Tensor:
        """tokens, positions [num_tokens] -> hidden states [num_tokens, hidden_size]."""
        x, residual = self.embedding(tokens) * self.embedding_multiplier, None
        for layer in self.layers:
            x, residual = layer(x, residual, context)
        x, _ = self.norm.add(x, residual)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [num_rows, hidden_size] -> logits [num_rows, vocab_size]."""
        return self.head(hidden) / self.logits_scaling


class GraniteLayer:
    """Attention and a gated MLP. The residual travels beside ``x`` and is added where the next norm reads it."""

    def __init__(self, name: str, config: Mapping[str, Any], build: Builder, rotary: RotaryEmbedding) -> None:
        hidden_size, size, eps = config["hidden_size"], config["intermediate_size"], config["rms_norm_eps"]
        num_heads = config["num_attention_heads"]
        num_kv_heads = config.get("num_key_value_heads") or num_heads
        head_dim = hidden_size // num_heads
        attention_bias, mlp_bias = config.get("attention_bias", False), config.get("mlp_bias", False)
        self.residual_multiplier = float(config["residual_multiplier"])

        self.qkv = build.qkv_linear(
            f"{name}.self_attn.qkv_proj", hidden_size, num_heads, num_kv_heads, head_dim, bias=attention_bias
        )
        self.attention_norm = build.rms_norm(f"{name}.input_layernorm", hidden_size, eps, into=self.qkv)
        self.attention = build.attention(
            f"{name}.self_attn",
            num_heads,
            num_kv_heads,
            head_dim,
            rotary=rotary,
            scale=float(config["attention_multiplier"]),
        )
        self.output = build.row_linear(
            f"{name}.self_attn.o_proj", num_heads * head_dim, hidden_size, bias=attention_bias, unit=head_dim
        )

        self.gate_up = build.column_linear(
            f"{name}.mlp.gate_up_proj", hidden_size, {"gate_proj": size, "up_proj": size}, bias=mlp_bias
        )
        self.mlp_norm = build.rms_norm(f"{name}.post_attention_layernorm", hidden_size, eps, into=self.gate_up)
        self.down = build.row_linear(f"{name}.mlp.down_proj", size, hidden_size, bias=mlp_bias)
        self.activation = build.silu_and_mul(self.gate_up, into=self.down)

    def __call__(self, x: Tensor, residual: Tensor | None, context: ForwardContext) -> tuple[Tensor, Tensor]:
        """x [num_tokens, hidden_size], and what is still to be added to it -> the next layer's."""
        x, residual = self.attention_norm.add(x, residual)
        x = self.output(self.attention(self.qkv(x), context)) * self.residual_multiplier
        x, residual = self.mlp_norm.add(x, residual)
        x = self.down(self.activation(x)) * self.residual_multiplier
        return x, residual
