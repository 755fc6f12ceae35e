"""What Octavo sees of this plugin. Keep imports light: it is imported whenever the plugin is selected."""

from __future__ import annotations

from collections.abc import Sequence

from octavo import PluginInfo, Provider, hookimpl

plugin = PluginInfo(api=(1, 1), summary="IBM's Granite models")


@hookimpl
def octavo_models() -> Sequence[Provider]:
    """The name is what a checkpoint's ``config.json`` has under ``architectures``."""
    return [Provider("GraniteForCausalLM", "octavo_granite.model:GraniteForCausalLM")]
