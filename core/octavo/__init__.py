"""Octavo: a plugin-based serving framework for large language models.

Everything that a plugin or a program may rely on is importable from here, from :mod:`octavo.interfaces` and from
:mod:`octavo.layers`. Names are loaded when they are first used, so that ``import octavo`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from octavo.config import EngineConfig, SpeculativeConfig
    from octavo.errors import CheckpointError, ConfigError, EngineDead, OctavoError, PluginError, RequestError
    from octavo.hooks import (
        API_VERSION,
        KernelProvider,
        OptionGroup,
        PluginInfo,
        Provider,
        RouteProvider,
        hookimpl,
    )
    from octavo.llm import LLM
    from octavo.outputs import Completion, RequestOutput
    from octavo.request import FinishReason, SamplingParams

_HOMES = {
    "API_VERSION": "hooks",
    "CheckpointError": "errors",
    "Completion": "outputs",
    "ConfigError": "errors",
    "EngineConfig": "config",
    "EngineDead": "errors",
    "FinishReason": "request",
    "KernelProvider": "hooks",
    "LLM": "llm",
    "OctavoError": "errors",
    "OptionGroup": "hooks",
    "PluginError": "errors",
    "PluginInfo": "hooks",
    "Provider": "hooks",
    "RequestError": "errors",
    "RequestOutput": "outputs",
    "RouteProvider": "hooks",
    "SamplingParams": "request",
    "SpeculativeConfig": "config",
    "hookimpl": "hooks",
}

__all__ = [
    "API_VERSION",
    "LLM",
    "CheckpointError",
    "Completion",
    "ConfigError",
    "EngineConfig",
    "EngineDead",
    "FinishReason",
    "KernelProvider",
    "OctavoError",
    "OptionGroup",
    "PluginError",
    "PluginInfo",
    "Provider",
    "RequestError",
    "RequestOutput",
    "RouteProvider",
    "SamplingParams",
    "SpeculativeConfig",
    "hookimpl",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"octavo.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'octavo' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
