"""Llama 1 to 3 (Touvron et al. 2023) and the many models that share its architecture, SmolLM2 among them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo.layers.builder import Builder
from octavo_models.decoder import CausalDecoder, DecoderSpec


class LlamaForCausalLM(CausalDecoder):
    """``attention_bias`` adds a bias to all four attention projections, ``mlp_bias`` to the three of the MLP."""

    def __init__(self, config: Mapping[str, Any], build: Builder) -> None:
        attention_bias = bool(config.get("attention_bias", False))
        spec = DecoderSpec.from_config(
            config,
            qkv_bias=attention_bias,
            output_bias=attention_bias,
            mlp_bias=bool(config.get("mlp_bias", False)),
        )
        super().__init__(spec, config, build)
