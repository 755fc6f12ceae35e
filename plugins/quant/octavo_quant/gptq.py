"""The plugin ``gptq``: GPTQ checkpoints (Frantar et al. 2022) as auto-gptq and gptqmodel write them.

A projection has ``qweight`` int32 [in * bits / 32, out] (values along the inputs, lowest bits first), ``qzeros`` int32
[groups, out * bits / 32] (along the outputs), ``scales`` [groups, out] and, when act-order is used, ``g_idx`` int32
[in], the group of each input. ``W[n, k] = (q - z) * s``. Version 1 stores ``z - 1``.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from octavo import PluginInfo, hookimpl
from octavo.errors import CheckpointError
from octavo.hooks import KernelProvider, Provider
from octavo.interfaces import LayerLoader, LinearMethod, LinearPart, LinearSpec, WeightSource
from octavo_quant.packed import PackedWeight, unpack_bits, word_slice
from octavo_quant.parts import (
    PartTensors,
    checked_group_size,
    checked_groups,
    load_parts,
    multiple,
    one_of,
    require_settings,
)
from octavo_quant.providers import PACKED_BENCHMARK, PACKED_KERNELS

logger = logging.getLogger(__name__)

plugin = PluginInfo(api=(1, 1), summary="GPTQ checkpoints")

BITS = (2, 3, 4, 8)


@hookimpl
def octavo_quantizations() -> list[Provider]:
    return [Provider("gptq", GPTQ)]


@hookimpl
def octavo_kernels() -> list[KernelProvider]:
    return PACKED_KERNELS


@hookimpl
def octavo_kernel_benchmarks() -> list[Provider]:
    return [PACKED_BENCHMARK]


@dataclass(frozen=True, slots=True)
class Scheme:
    """How one projection is packed; ``group_size`` -1: one group."""

    bits: int
    group_size: int
    symmetric: bool

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Scheme:
        bits = one_of("bits", settings.get("bits"), BITS, "gptq")
        return cls(bits, checked_group_size(settings.get("group_size", -1), "gptq"), bool(settings.get("sym", True)))


class GPTQ:
    """See :class:`octavo.interfaces.Quantization`."""

    name: ClassVar[str] = "gptq"

    def __init__(self, settings: Mapping[str, Any], weights: WeightSource, zero_offset: int) -> None:
        self._settings = settings
        self._weights = weights
        self._zero_offset = zero_offset
        self._scheme = Scheme.from_settings(settings)
        self._dynamic: list[tuple[bool, re.Pattern[str], Mapping[str, Any]]] = []
        for pattern, changes in (settings.get("dynamic") or {}).items():
            try:
                compiled = re.compile(pattern.removeprefix("-:").removeprefix("+:"))
            except re.error as error:
                raise CheckpointError(
                    f"'dynamic' of the gptq checkpoint's settings holds {pattern!r}, which is no regular expression: "
                    f"{error}; correct it"
                ) from error
            self._dynamic.append((pattern.startswith("-:"), compiled, changes or {}))
        self._warned = False

    @classmethod
    def from_checkpoint(cls, settings: Mapping[str, Any], weights: WeightSource) -> Self:
        require_settings(settings, cls.name)
        stored = settings.get("checkpoint_format") or settings.get("format") or "gptq"
        version = "marlin" if settings.get("is_marlin_format") else str(stored).lower()
        one_of("checkpoint_format", version, ("gptq", "gptq_v2"), cls.name)
        one_of("pack_dtype", settings.get("pack_dtype") or "int32", ("int32",), cls.name)
        return cls(settings, weights, 1 if version == "gptq" else 0)

    def linear(self, spec: LinearSpec, load: LayerLoader) -> LinearMethod | None:
        return load_parts(spec, load, lambda part: self._is_quantized(part, load), lambda p: self._read(p, spec, load))

    def _scheme_of(self, name: str) -> Scheme | None:
        """None: listed as not quantized."""
        for skipped, pattern, changes in self._dynamic:
            if pattern.match(name):
                return None if skipped else Scheme.from_settings({**self._settings, **changes})
        return self._scheme

    def _is_quantized(self, part: LinearPart, load: LayerLoader) -> bool:
        if load.has(f"{part.name}.qweight"):
            return True
        listed = part.name != "lm_head" or bool(self._settings.get("lm_head"))
        return not load.has(f"{part.name}.weight") and listed and self._scheme_of(part.name) is not None

    def _read(self, part: LinearPart, spec: LinearSpec, load: LayerLoader) -> PackedWeight:
        scheme = self._scheme_of(part.name) or self._scheme
        bits, num_in, num_out = scheme.bits, spec.in_features, part.out_features
        unit = 32 if 32 % bits else 32 // bits
        multiple(num_in, unit, "the number of inputs", part, f"gptq with {bits} bits")
        multiple(num_out, unit, "the number of outputs", part, f"gptq with {bits} bits")
        num_groups = 1 if scheme.group_size == -1 else -(-num_in // scheme.group_size)
        tensors = PartTensors(self._weights, load, part)

        num_words = num_in * bits // 32
        words, columns = word_slice(spec.columns, bits, num_words)
        packed = tensors.read("qweight", (num_words, num_out), (words, part.rows), beside="scales", dtype=torch.int32)
        values = unpack_bits(packed.T, bits, packed.shape[0] * 32 // bits)[:, columns]
        zeros = self._zeros(tensors, part, scheme, num_groups)
        scales = tensors.read("scales", (num_groups, num_out), (slice(0, num_groups), part.rows), beside="qweight")
        if tensors.has("g_idx"):
            stored = tensors.read("g_idx", (num_in,), beside="qweight", dtype=torch.int32)
            groups = checked_groups(stored, num_groups, f"{part.name}.g_idx", tensors.file("g_idx"), spec)
        else:
            size = num_in if scheme.group_size == -1 else scheme.group_size
            groups = torch.arange(num_in, device=load.placement.device) // size
        return PackedWeight.pack(values, scales, zeros, groups[spec.columns], bits)

    def _zeros(self, tensors: PartTensors, part: LinearPart, scheme: Scheme, num_groups: int) -> Tensor:
        """The zero points of this rank's outputs, uint8 [num_groups, num_rows]."""
        bits, largest = scheme.bits, (1 << scheme.bits) - 1
        num_words = part.out_features * bits // 32
        words, rows = word_slice(part.rows, bits, num_words)
        index = (slice(0, num_groups), words)
        stored = tensors.read("qzeros", (num_groups, num_words), index, beside="qweight", dtype=torch.int32)
        zeros = unpack_bits(stored, bits, stored.shape[1] * 32 // bits)[:, rows]
        doubtful = self._zero_offset and not scheme.symmetric and not self._warned
        if doubtful and bool((zeros == largest).any()):
            self._warned = True
            logger.warning(
                "%s: an asymmetric version 1 file stores a zero point of %d, which stands for 0 here; programs "
                "disagree on it, and auto-gptq damages its neighbours",
                part.name,
                largest,
            )
        return zeros + self._zero_offset & largest
