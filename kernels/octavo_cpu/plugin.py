"""The plugin ``cpu``: attention and small operations in C, packed matrix products."""

from __future__ import annotations

from octavo import PluginInfo

plugin = PluginInfo(api=(1, 1), summary="Fast kernels for CPUs")
