"""The plugin ``fp8``: FP8 checkpoints and online quantization."""

from __future__ import annotations

from octavo import PluginInfo

plugin = PluginInfo(api=(1, 1), summary="FP8 checkpoints and online quantization")
