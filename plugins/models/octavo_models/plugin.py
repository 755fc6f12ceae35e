"""The plugin ``models``: the model architectures that come with Octavo."""

from __future__ import annotations

from octavo import PluginInfo

plugin = PluginInfo(api=(1, 1), summary="Model architectures: Llama, Mistral, Qwen2, Qwen3")
