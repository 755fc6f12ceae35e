"""The plugin ``awq``: AWQ checkpoints (4 bit, gemm layout)."""

from __future__ import annotations

from octavo import PluginInfo

plugin = PluginInfo(api=(1, 1), summary="AWQ checkpoints")
