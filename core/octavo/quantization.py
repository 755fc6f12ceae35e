"""Which quantization a checkpoint is in, and whether that agrees with what was asked for."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from octavo.errors import CheckpointError, ConfigError
from octavo.hooks import Provider
from octavo.interfaces import Checkpoint, Quantization, TensorInfo, WeightSource

logger = logging.getLogger(__name__)

CONFIG_KEYS = ("quantization_config", "compression_config")
"""Where ``config.json`` holds the settings; the second is what early compressed-tensors files call it."""

SETTINGS_FILES = {"quant_config.json": "awq", "quantize_config.json": "gptq"}
"""Files of their own that older repositories have instead, and the method of one that names none."""


def quantization_settings(checkpoint: Checkpoint) -> tuple[str, dict[str, Any]] | None:
    """The checkpoint's ``quant_method`` in lower case and its settings as stored; None: it is not quantized.

    Raises:
        CheckpointError: settings that name no method, or cannot be read.
    """
    config = checkpoint.config()
    for key in CONFIG_KEYS:
        settings = config.get(key)
        if settings:
            method = settings.get("quant_method")
            if not method:
                raise CheckpointError(
                    f"{key} in {checkpoint.path}/config.json has no 'quant_method'; add the method that made the "
                    f"checkpoint (such as awq, gptq, fp8 or compressed-tensors)"
                )
            return str(method).lower(), dict(settings)
    for name, default in SETTINGS_FILES.items():
        file = checkpoint.path / name
        if file.is_file():
            try:
                settings = json.loads(file.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{file} cannot be read: {error}; fetch it again") from error
            if not isinstance(settings, dict):
                raise CheckpointError(f"{file} must hold an object of settings; fetch it again")
            # gptqmodel calls it "method" in its own file
            method = settings.get("quant_method") or settings.get("method") or default
            return str(method).lower(), settings
    return None


def needed_plugins(checkpoint: Checkpoint, wanted: str | None, provided: Collection[str] = ()) -> dict[str, str]:
    """The plugin that the weights need, and why: plugins are activated by the name of their method.

    ``provided`` are the methods that the plugins selected so far offer: those need no other.

    Raises:
        ConfigError: ``wanted`` contradicts the checkpoint.
    """
    found = quantization_settings(checkpoint)
    check_wanted(checkpoint, found[0] if found else None, wanted)
    if found is not None:
        return {} if found[0] in provided else {found[0]: f"the checkpoint's quant_method is {found[0]}"}
    if wanted is not None:
        return {} if wanted in provided else {wanted: f"--quantization {wanted}"}
    return {}


def check_wanted(checkpoint: Checkpoint, method: str | None, wanted: str | None) -> None:
    """Refuse ``--quantization`` where the checkpoint is in another method's format.

    Raises:
        ConfigError: names both and what to do.
    """
    if method is not None and wanted is not None and wanted != method:
        raise ConfigError(
            f"--quantization {wanted} contradicts the checkpoint {checkpoint.path}, whose weights are quantized with "
            f"{method}; leave the option out to serve them as they are, or name an unquantized checkpoint"
        )


def resolve_quantization(
    checkpoint: Checkpoint, wanted: str | None, providers: Mapping[str, Provider], weights: WeightSource | None
) -> Quantization | None:
    """The object that loads the model's linear layers; None: they are not quantized.

    Without ``weights`` (random ones are invented) the settings alone decide. ``providers`` are those of the selected
    plugins, by method.

    Raises:
        ConfigError: the method contradicts ``wanted``, is provided by no plugin, or refuses the checkpoint.
    """
    found = quantization_settings(checkpoint)
    check_wanted(checkpoint, found[0] if found else None, wanted)
    if found is None and wanted is None:
        return None
    method, settings = found or (str(wanted), {})
    if method not in providers:
        origin = f"the checkpoint {checkpoint.path}" if found else f"--quantization {method}"
        raise ConfigError(
            f"no selected plugin provides the quantization '{method}' of {origin}; provided: "
            f"{', '.join(sorted(providers)) or 'none'}"
        )
    try:
        made: Quantization = providers[method].resolve().from_checkpoint(settings, weights or NoWeights())
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error
    logger.info("quantization: %s, %s", method, "from the checkpoint" if found else "applied while loading")
    return made


class NoWeights:
    """The tensors of a checkpoint that has none: every one that is read is invented elsewhere."""

    def names(self) -> Collection[str]:
        return ()

    def info(self, name: str) -> TensorInfo:
        raise CheckpointError(f"tensor '{name}' is missing: the checkpoint has no tensors")

    def read(self, name: str, index: tuple[slice, ...] = ()) -> Tensor:
        raise CheckpointError(f"tensor '{name}' is missing: the checkpoint has no tensors")
