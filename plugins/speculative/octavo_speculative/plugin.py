"""The plugin ``speculative``: drafts by a small model or from the prompt."""

from __future__ import annotations

from octavo import PluginInfo

plugin = PluginInfo(api=(1, 1), summary="Speculative decoding")
