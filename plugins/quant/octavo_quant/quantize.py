"""The plugin ``quantize``: the command ``octavo quantize``, which makes quantized checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo import PluginInfo, hookimpl

plugin = PluginInfo(api=(1, 1), summary="The command that makes quantized checkpoints")


@hookimpl
def octavo_commands() -> Mapping[str, Any]:
    from octavo_quant.command import add_quantize

    return {"quantize": add_quantize}
