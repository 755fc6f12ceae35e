"""The plugin ``gptq``: GPTQ checkpoints."""

from __future__ import annotations

from octavo import PluginInfo

plugin = PluginInfo(api=(1, 1), summary="GPTQ checkpoints")
