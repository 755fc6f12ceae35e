"""The plugin ``awq``: AWQ checkpoints in 4 bit (Lin et al. 2023), gemm layout, as autoawq and gptqmodel write them.

A projection has ``qweight`` int32 [in, out / 8], ``qzeros`` int32 [groups, out / 8] and ``scales`` [groups, out], and
``W[n, k] = (q - z) * s``. A word holds eight outputs in the order that ``NIBBLES`` gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from octavo import PluginInfo, hookimpl
from octavo.hooks import KernelProvider, Provider
from octavo.interfaces import LayerLoader, LinearMethod, LinearPart, LinearSpec, WeightSource
from octavo_quant.packed import PackedWeight, unpack_bits
from octavo_quant.parts import PartTensors, checked_group_size, load_parts, multiple, one_of, require_settings
from octavo_quant.providers import PACKED_BENCHMARK, PACKED_KERNELS

plugin = PluginInfo(api=(1, 1), summary="AWQ checkpoints")

NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in its word (nibble 0 is the lowest) each of eight neighbouring outputs lies."""

VERSIONS = ("gemm", "exllama", "exllamav2", "ipex")
"""Versions that store gemm tensors: all but the first name a kernel."""


@hookimpl
def octavo_quantizations() -> list[Provider]:
    return [Provider("awq", AWQ)]


@hookimpl
def octavo_kernels() -> list[KernelProvider]:
    return PACKED_KERNELS


@hookimpl
def octavo_kernel_benchmarks() -> list[Provider]:
    return [PACKED_BENCHMARK]


def unpack_interleaved(words: Tensor) -> Tensor:
    """int32 [rows, out / 8] -> uint8 [rows, out] in the order of the outputs."""
    values = unpack_bits(words, 4, words.shape[1] * 8)
    return values.reshape(len(words), -1, 8)[..., list(NIBBLES)].flatten(1)


class AWQ:
    """See :class:`octavo.interfaces.Quantization`."""

    name: ClassVar[str] = "awq"

    def __init__(self, weights: WeightSource, group_size: int, zero_point: bool, plain: tuple[str, ...]) -> None:
        self._weights = weights
        self._group_size = group_size
        self._zero_point = zero_point
        self._plain = plain

    @classmethod
    def from_checkpoint(cls, settings: Mapping[str, Any], weights: WeightSource) -> Self:
        require_settings(settings, cls.name)
        one_of("bits", settings.get("bits", settings.get("w_bit", 4)), (4,), cls.name)
        version = settings.get("version") or settings.get("checkpoint_format") or settings.get("format") or "gemm"
        one_of("version", str(version).lower(), VERSIONS, cls.name)
        group_size = checked_group_size(settings.get("group_size", settings.get("q_group_size", 128)), cls.name)
        plain = tuple(settings.get("modules_to_not_convert") or ())
        return cls(weights, group_size, bool(settings.get("zero_point", True)), plain)

    def linear(self, spec: LinearSpec, load: LayerLoader) -> LinearMethod | None:
        return load_parts(spec, load, lambda part: self._is_quantized(part, load), lambda p: self._read(p, spec, load))

    def _is_quantized(self, part: LinearPart, load: LayerLoader) -> bool:
        if load.has(f"{part.name}.qweight"):
            return True
        # autoawq matches these names anywhere in a module's path
        listed = part.name != "lm_head" and not any(name in part.name for name in self._plain)
        return not load.has(f"{part.name}.weight") and listed

    def _read(self, part: LinearPart, spec: LinearSpec, load: LayerLoader) -> PackedWeight:
        num_in, num_out = spec.in_features, part.out_features
        group_size = num_in if self._group_size == -1 else self._group_size
        multiple(num_out, 8, "the number of outputs", part, "awq")
        multiple(num_in, group_size, "the number of inputs", part, "awq")
        num_groups = num_in // group_size
        tensors = PartTensors(self._weights, load, part)
        words = slice(part.rows.start // 8, -(-part.rows.stop // 8))
        rows = slice(part.rows.start - words.start * 8, part.rows.stop - words.start * 8)
        groups = torch.arange(num_in, device=load.placement.device)[spec.columns] // group_size

        packed = tensors.read(
            "qweight", (num_in, num_out // 8), (spec.columns, words), beside="scales", dtype=torch.int32
        )
        scales = tensors.read("scales", (num_groups, num_out), (slice(0, num_groups), part.rows), beside="qweight")
        zeros = None
        if self._zero_point or tensors.has("qzeros"):
            packed_zeros = tensors.read(
                "qzeros", (num_groups, num_out // 8), (slice(0, num_groups), words), beside="qweight", dtype=torch.int32
            )
            zeros = unpack_interleaved(packed_zeros)[:, rows]
        return PackedWeight.pack(unpack_interleaved(packed)[:, rows].T, scales, zeros, groups, 4)
