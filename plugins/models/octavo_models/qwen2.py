"""Qwen2 and Qwen2.5 (Qwen Team 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo.layers.builder import Builder
from octavo_models.decoder import CausalDecoder, DecoderSpec, positive, sliding_window, windows_by_layer_type


class Qwen2ForCausalLM(CausalDecoder):
    """Llama with biases on query, key and value, and optionally a sliding window in the upper layers."""

    def __init__(self, config: Mapping[str, Any], build: Builder) -> None:
        spec = DecoderSpec.from_config(config, qkv_bias=True, windows=upper_windows(config))
        super().__init__(spec, config, build)


def upper_windows(config: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Qwen's windows: none unless ``use_sliding_window``, else from layer ``max_window_layers`` on."""
    window = sliding_window(config) if config.get("use_sliding_window", False) else None
    num_layers = positive(config, "num_hidden_layers")
    num_full = num_layers if window is None else min(config.get("max_window_layers", 28), num_layers)
    types = ["full_attention"] * num_full + ["sliding_attention"] * (num_layers - num_full)
    return windows_by_layer_type(config, window, types)
