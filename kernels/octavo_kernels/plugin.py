"""The plugin ``triton``: attention and operations as Triton kernels for GPUs."""

from __future__ import annotations

from octavo import PluginInfo

plugin = PluginInfo(api=(1, 1), summary="Triton kernels for GPUs")
