"""The plugin ``prefix-cache``: finished blocks found again by their content."""

from __future__ import annotations

from octavo import PluginInfo

plugin = PluginInfo(api=(1, 1), summary="Prefix caching")
