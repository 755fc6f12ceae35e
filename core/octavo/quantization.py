"""Which quantization a checkpoint has, and who reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from octavo.errors import CheckpointError, ConfigError
from octavo.hooks import Provider
from octavo.interfaces import Checkpoint, Quantization, WeightSource

# Older repositories keep the settings in a file of their own, whose name says the method.
SETTINGS_FILES = {"quant_config.json": "awq", "quantize_config.json": "gptq"}


def quantization_settings(checkpoint: Checkpoint) -> tuple[str, dict[str, Any]] | None:
    """``(quant_method, settings)`` as the checkpoint states them; None: its weights are plain.

    Raises:
        CheckpointError: settings without a method, or a settings file that cannot be read.
    """
    settings = checkpoint.config().get("quantization_config")
    if settings:
        method = settings.get("quant_method")
        if not method:
            raise CheckpointError(
                f"quantization_config in {checkpoint.path / 'config.json'} has no 'quant_method'; add the method's name"
            )
        return str(method), dict(settings)
    for name, method in SETTINGS_FILES.items():
        file = checkpoint.path / name
        if checkpoint.path.is_dir() and file.is_file():
            try:
                return method, dict(json.loads(file.read_text(encoding="utf-8")))
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{file} cannot be read: {error}") from error
    return None


def needed_plugins(checkpoint: Checkpoint, wanted: str | None) -> dict[str, str]:
    """The plugins that quantized weights need, by entry-point name, each with the reason."""
    found = quantization_settings(checkpoint)
    if found is not None:
        return {found[0]: f"the checkpoint's quant_method is {found[0]}"}
    if wanted is not None:
        return {wanted: f"--quantization {wanted}"}
    return {}


def resolve_quantization(
    checkpoint: Checkpoint, wanted: str | None, providers: Mapping[str, Provider], weights: WeightSource
) -> Quantization | None:
    """The quantization that loads this checkpoint; None: its weights are plain and stay so.

    Raises:
        ConfigError: ``wanted`` contradicts the checkpoint, or no selected plugin reads the method.
    """
    found = quantization_settings(checkpoint)
    if found is not None and wanted is not None and wanted != found[0]:
        raise ConfigError(
            f"--quantization {wanted} contradicts the checkpoint, whose quant_method is {found[0]}; "
            f"leave the option out"
        )
    method, settings = found if found is not None else (wanted, {})
    if method is None:
        return None
    if method not in providers:
        known = ", ".join(sorted(providers)) or "none"
        raise ConfigError(f"no selected plugin provides the quantization '{method}'; provided: {known}")
    quantization: Quantization = providers[method].resolve().from_checkpoint(settings, weights)
    return quantization
