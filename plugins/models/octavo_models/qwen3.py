"""Qwen3, the dense models (Qwen Team 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo.layers.builder import Builder
from octavo_models.decoder import CausalDecoder, DecoderSpec, positive
from octavo_models.qwen2 import upper_windows


class Qwen3ForCausalLM(CausalDecoder):
    """Qwen2 with a norm on each head's query and key in place of the biases; heads are of a size of their own."""

    def __init__(self, config: Mapping[str, Any], build: Builder) -> None:
        attention_bias = bool(config.get("attention_bias", False))
        spec = DecoderSpec.from_config(
            config,
            head_dim=positive(config, "head_dim", default=128),
            qkv_bias=attention_bias,
            output_bias=attention_bias,
            query_key_norm=True,
            windows=upper_windows(config),
        )
        super().__init__(spec, config, build)
