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

KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


def rope_parameters(config: Mapping[str, Any], layer_type: str | None = None) -> dict[str, Any]:
    """The rope settings of a ``config.json`` in one flat mapping, its defaults filled in.

    ``rope_scaling``, the older spelling, wins over ``rope_parameters``: where both are, it is what a user overrides
    with. ``layer_type`` chooses among the settings of a model whose layers rotate differently.

    Raises:
        ConfigError: the settings differ by layer type and none, or an unknown one, is named.
    """
    own = config.get("rope_parameters") or {}
    if any(isinstance(value, Mapping) for value in own.values()):
        if layer_type not in own:
            raise ConfigError(
                f"rope_parameters has settings for the layer types {', '.join(own)}, but none for '{layer_type}'"
            )
        own = own[layer_type]
    scaling = config.get("rope_scaling") or {}
    kinds = [source.get("rope_type") or source.get("type") for source in (scaling, own)]
    defaults = {
        "rope_theta": config.get("rope_theta") or 10000.0,
        "partial_rotary_factor": config.get("partial_rotary_factor") or 1.0,
        "max_position_embeddings": config.get("max_position_embeddings"),
        "original_max_position_embeddings": config.get("max_position_embeddings"),
    }
    given = {key: value for key, value in {**own, **scaling}.items() if value is not None}
    parameters = {**defaults, **given, "rope_type": kinds[0] or kinds[1] or "default"}
    if config.get("original_max_position_embeddings") is not None:
        parameters["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    return parameters


def longest_context(config: Mapping[str, Any], num_positions: int) -> int:
    """How far the rope settings stretch a model that was trained on ``num_positions``.

    Llama 3's settings are part of the training and stretch no further; settings that differ by layer type are the
    model's own matter.
    """
    layered = any(isinstance(value, Mapping) for value in (config.get("rope_parameters") or {}).values())
    parameters = {} if layered else rope_parameters(config)
    factor = parameters.get("factor")
    if not isinstance(factor, int | float) or parameters["rope_type"] not in ("linear", "dynamic", "yarn"):
        return num_positions
    trained = parameters["original_max_position_embeddings"] if parameters["rope_type"] == "yarn" else num_positions
    return max(num_positions, int(trained * factor))


class RotaryEmbedding:
    """A table of cosines and sines for every position below ``max_position``, in float32.

    ``table`` [max_position, rotary_dim]: the first half cosines, the second half sines, one per frequency.
    Rotation is the half-split ("neox") form: element i pairs with i + rotary_dim / 2. Elements of a head beyond
    ``rotary_dim`` stay as they are.
    """

    def __init__(self, table: Tensor, head_dim: int) -> None:
        self.table = table
        self.head_dim = head_dim
        self.rotary_dim = table.shape[1]

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        head_dim: int,
        max_position: int,
        device: torch.device,
        layer_type: str | None = None,
    ) -> RotaryEmbedding:
        """From a model's ``config.json``; ``max_position`` is the longest context that will be served.

        Raises:
            ConfigError: names the setting that is missing or not supported.
        """
        parameters = rope_parameters(config, layer_type)
        rotary_dim = int(head_dim * parameters["partial_rotary_factor"])
        frequencies, factor = _frequencies(parameters, rotary_dim, max_position)
        angles = torch.outer(torch.arange(max_position, dtype=torch.float32), frequencies)
        table = torch.cat([angles.cos() * factor, angles.sin() * factor], dim=-1)
        return cls(table.to(device), head_dim)

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [num_tokens, num_heads, head_dim], positions [num_tokens] -> rotated, same shape and dtype."""
        return self.rotate(x, *self.factors(positions, x.dtype))

    def factors(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What ``rotate`` multiplies with at ``positions`` [num_tokens]: two tensors [num_tokens, 1, rotary_dim]."""
        cosine, sine = self.table.index_select(0, positions).to(dtype).unsqueeze(1).chunk(2, dim=-1)
        return torch.cat([cosine, cosine], dim=-1), torch.cat([-sine, sine], dim=-1)

    def rotate(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """x [num_tokens, num_heads, head_dim] -> rotated, contiguous."""
        if self.rotary_dim == self.head_dim:
            return torch.addcmul(x * cosine, x.roll(self.rotary_dim // 2, dims=-1), sine)
        turned, rest = x[..., : self.rotary_dim], x[..., self.rotary_dim :]
        turned = torch.addcmul(turned * cosine, turned.roll(self.rotary_dim // 2, dims=-1), sine)
        return torch.cat([turned, rest], dim=-1)


def _frequencies(parameters: Mapping[str, Any], dim: int, max_position: int) -> tuple[Tensor, float]:
    """Inverse frequencies [dim / 2] and the factor on cosines and sines."""
    kind = parameters["rope_type"]
    theta = float(parameters["rope_theta"])
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    plain = 1.0 / (theta**exponents)
    match kind:
        case "default":
            return plain, 1.0
        case "linear":
            return plain / _number(parameters, "factor"), 1.0
        case "dynamic":
            # Stretched once for the longest context served, so that a key does not depend on when it was computed.
            longer = max(1.0, max_position / _number(parameters, "max_position_embeddings"))
            factor = _number(parameters, "factor")
            stretched = theta * (factor * longer - (factor - 1)) ** (dim / (dim - 2))
            return 1.0 / (stretched**exponents), 1.0
        case "llama3":
            return _llama3(plain, parameters), 1.0
        case "yarn":
            return _yarn(plain, parameters, theta, dim)
        case _:
            raise ConfigError(f"rope type '{kind}' is not supported; supported: {', '.join(KINDS)}")


def _number(parameters: Mapping[str, Any], name: str) -> float:
    value = parameters.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ConfigError(f"rope type '{parameters['rope_type']}' needs a number above 0 as '{name}', not {value!r}")
    return float(value)


def _llama3(plain: Tensor, parameters: Mapping[str, Any]) -> Tensor:
    """Llama 3.1: wavelengths beyond the trained context are interpolated, short ones kept, a ramp between."""
    low, high = _number(parameters, "low_freq_factor"), _number(parameters, "high_freq_factor")
    turns = _number(parameters, "original_max_position_embeddings") * plain / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - smooth) * plain / _number(parameters, "factor") + smooth * plain


def _yarn(plain: Tensor, parameters: Mapping[str, Any], theta: float, dim: int) -> tuple[Tensor, float]:
    """YaRN (Peng et al. 2023): low frequencies are interpolated, high ones kept, a ramp between."""
    context = _number(parameters, "original_max_position_embeddings")
    if "factor" in parameters:
        factor = _number(parameters, "factor")
    else:  # DeepSeek's way to say it
        factor = _number(parameters, "max_position_embeddings") / context

    def dimension(turns: float) -> float:
        """The dimension that turns so many times within the trained context."""
        return dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(parameters.get("beta_fast") or 32.0), dimension(parameters.get("beta_slow") or 1.0)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0.0, 1.0)
    frequencies = plain / factor * ramp + plain * (1 - ramp)

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if "attention_factor" in parameters:
        return frequencies, _number(parameters, "attention_factor")
    weight, weight_all = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if weight and weight_all:
        return frequencies, magnitude(weight) / magnitude(weight_all)
    return frequencies, magnitude(1.0)
