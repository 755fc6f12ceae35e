"""The plugin ``gguf``: models in GGUF files."""

from __future__ import annotations

from octavo import PluginInfo

plugin = PluginInfo(api=(1, 1), summary="Models in GGUF files")
