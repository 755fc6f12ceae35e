"""Mistral 7B (Jiang et al. 2023) and its successors of the same architecture, Ministral 8B among them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo.layers.builder import Builder
from octavo_models.decoder import CausalDecoder, DecoderSpec, positive, sliding_window, windows_by_layer_type


class MistralForCausalLM(CausalDecoder):
    """Llama with a sliding window: in every layer, or in those that ``layer_types`` names; ``null``: in none."""

    def __init__(self, config: Mapping[str, Any], build: Builder) -> None:
        window = sliding_window(config)
        kind = "full_attention" if window is None else "sliding_attention"
        spec = DecoderSpec.from_config(
            config,
            num_kv_heads=positive(config, "num_key_value_heads", default=8),
            windows=windows_by_layer_type(config, window, [kind] * positive(config, "num_hidden_layers")),
        )
        super().__init__(spec, config, build)
