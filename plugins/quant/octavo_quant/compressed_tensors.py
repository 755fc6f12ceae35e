"""The plugin ``compressed-tensors``: checkpoints made by llm-compressor."""

from __future__ import annotations

from octavo import PluginInfo

plugin = PluginInfo(api=(1, 1), summary="compressed-tensors checkpoints")
