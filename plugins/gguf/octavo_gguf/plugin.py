"""The plugin ``gguf``: models in GGUF files."""

from __future__ import annotations

from collections.abc import Sequence

from octavo import PluginInfo, Provider, hookimpl

plugin = PluginInfo(api=(1, 1), summary="Models in GGUF files")


@hookimpl
def octavo_weight_formats() -> Sequence[Provider]:
    return [Provider("gguf", "octavo_gguf.checkpoint:GGUFFormat")]
