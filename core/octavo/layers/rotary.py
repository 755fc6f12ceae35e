"""Rotary position embeddings (Su et al. 2021) and the ways to stretch them over longer contexts.

The frequencies follow Transformers' ``modeling_rope_utils`` so that published checkpoints give the same numbers; both
spellings of the configuration are read (``rope_parameters`` of version 5, ``rope_theta`` + ``rope_scaling`` of 4).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from octavo.errors import ConfigError


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rope settings of a ``config.json`` in one flat mapping with ``rope_theta`` and ``rope_type``."""
    parameters: dict[str, Any] = {"rope_theta": 10000.0, "rope_type": "default"}
    if config.get("rope_theta") is not None:
        parameters["rope_theta"] = config["rope_theta"]
    for source in (config.get("rope_scaling"), config.get("rope_parameters")):
        if source:
            parameters.update(source)
            parameters["rope_type"] = source.get("rope_type") or source.get("type") or parameters["rope_type"]
    return parameters


class RotaryEmbedding(torch.nn.Module):
    """A table of cosines and sines for every position below ``max_position``, in float32.

    ``table`` [max_position, rotary_dim]: the first half cosines, the second half sines, one per frequency.
    Rotation is the half-split ("neox") form: element i pairs with i + rotary_dim / 2.
    """

    def __init__(self, table: Tensor, head_dim: int) -> None:
        super().__init__()
        self.table = table
        self.head_dim = head_dim
        self.rotary_dim = table.shape[1]

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], head_dim: int, max_position: int, device: torch.device
    ) -> RotaryEmbedding:
        """From a model's ``config.json``; ``max_position`` is the longest context that will be served."""
        parameters = rope_parameters(config)
        original_max = int(config.get("max_position_embeddings") or max_position)
        rotary_dim = int(head_dim * parameters.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)))
        frequencies, factor = _frequencies(parameters, rotary_dim, original_max, max_position)
        angles = torch.outer(torch.arange(max_position, dtype=torch.float32), frequencies)
        table = torch.cat([angles.cos() * factor, angles.sin() * factor], dim=-1)
        return cls(table.to(device), head_dim)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [num_tokens, num_heads, head_dim], positions [num_tokens] -> rotated, same shape and dtype."""
        half = self.rotary_dim // 2
        cosine, sine = self.table[positions].unsqueeze(1).to(x.dtype).chunk(2, dim=-1)
        first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat([first * cosine - second * sine, second * cosine + first * sine, rest], dim=-1)


def _frequencies(parameters: Mapping[str, Any], dim: int, original_max: int, max_position: int) -> tuple[Tensor, float]:
    """Inverse frequencies [dim / 2] and the factor on cosines and sines."""
    theta = float(parameters["rope_theta"])
    kind = parameters["rope_type"]
    exponents = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
    plain = 1.0 / (theta**exponents)
    if kind == "default":
        return plain, 1.0
    factor = float(parameters.get("factor") or 1.0)
    if kind == "linear":
        return plain / factor, 1.0
    if kind == "dynamic":
        # Stretched once for the longest context served, so that a key does not depend on when it was computed.
        if max_position <= original_max:
            return plain, 1.0
        stretched = theta * ((factor * max_position / original_max) - (factor - 1)) ** (dim / (dim - 2))
        return 1.0 / (stretched**exponents), 1.0
    if kind == "llama3":
        return _llama3(plain, parameters, factor), 1.0
    if kind == "yarn":
        return _yarn(plain, parameters, factor, theta, dim, original_max)
    raise ConfigError(f"rope type '{kind}' is not supported; known: default, linear, dynamic, llama3, yarn")


def _llama3(plain: Tensor, parameters: Mapping[str, Any], factor: float) -> Tensor:
    low_factor, high_factor = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
    context = float(parameters["original_max_position_embeddings"])
    wavelengths = 2 * math.pi / plain
    smooth = ((context / wavelengths - low_factor) / (high_factor - low_factor)).clamp(0.0, 1.0)
    return (1 - smooth) * plain / factor + smooth * plain


def _yarn(
    plain: Tensor, parameters: Mapping[str, Any], factor: float, theta: float, dim: int, original_max: int
) -> tuple[Tensor, float]:
    """YaRN (Peng et al. 2023): low frequencies are interpolated, high ones kept, a ramp between."""
    context = float(parameters.get("original_max_position_embeddings") or original_max)
    beta_fast, beta_slow = float(parameters.get("beta_fast") or 32.0), float(parameters.get("beta_slow") or 1.0)

    def correction_dim(rotations: float) -> float:
        return dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = correction_dim(beta_fast), correction_dim(beta_slow)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0.0, 1.0)
    frequencies = plain / factor * ramp + plain * (1 - ramp)

    def magnitude(scale: float, weight: float = 1.0) -> float:
        return 0.1 * weight * math.log(scale) + 1.0 if scale > 1 else 1.0

    attention = parameters.get("attention_factor")
    if attention is None:
        weight, weight_all = parameters.get("mscale"), parameters.get("mscale_all_dim")
        if weight and weight_all:
            attention = magnitude(factor, float(weight)) / magnitude(factor, float(weight_all))
        else:
            attention = magnitude(factor)
    return frequencies, float(attention)
