"""The plugin ``compressed-tensors``: checkpoints made by llm-compressor, integer weights and FP8.

Settings are groups of targets with a scheme each. Integers (``pack-quantized``): ``weight_packed`` int32
[out, in * bits / 32] of signed values plus ``2 ** (bits - 1)``, ``weight_scale`` [out, groups], ``weight_zero_point``
int32 [out * bits / 32, groups] packed along the outputs, ``weight_g_idx`` [in] in older act-order files. FP8
(``float-quantized``): see :mod:`octavo_quant.fp8`, with the scales always called ``weight_scale``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from octavo import PluginInfo, hookimpl
from octavo.errors import CheckpointError
from octavo.hooks import KernelProvider, Provider
from octavo.interfaces import LayerLoader, LinearMethod, LinearPart, LinearSpec, WeightSource
from octavo_quant.fp8_weight import FP8, Activation, Fp8Weight, read_fp8
from octavo_quant.packed import PackedWeight, unpack_bits, word_slice
from octavo_quant.parts import PartTensors, checked_group_size, checked_groups, load_parts, one_of
from octavo_quant.providers import FP8_BENCHMARK, FP8_KERNELS, PACKED_BENCHMARK, PACKED_KERNELS

plugin = PluginInfo(api=(1, 1), summary="compressed-tensors checkpoints")

METHOD = "compressed-tensors"
MODULE_CLASS = "Linear"
"""What a target must name to mean every linear layer."""

ACTIVATIONS: dict[tuple[str, bool], Activation] = {
    ("tensor", False): "tensor",
    ("token", True): "token",
    ("tensor", True): "token",  # finer than asked for, and independent of the other requests in a batch
    ("group", True): "group",
}
"""(strategy, dynamic) of the inputs to the rule that is followed."""


@hookimpl
def octavo_quantizations() -> list[Provider]:
    return [Provider(METHOD, CompressedTensors)]


@hookimpl
def octavo_kernels() -> list[KernelProvider]:
    return [*PACKED_KERNELS, *FP8_KERNELS]


@hookimpl
def octavo_kernel_benchmarks() -> list[Provider]:
    return [PACKED_BENCHMARK, FP8_BENCHMARK]


@dataclass(frozen=True, slots=True)
class Scheme:
    """What one group of settings says about the layers that it targets."""

    targets: tuple[str, ...]
    bits: int
    group_size: int  # of integers; -1: one group
    symmetric: bool
    is_float: bool
    block: tuple[int, int] | None
    activation: Activation

    @classmethod
    def from_group(cls, name: str, group: Mapping[str, Any], default_format: str) -> Scheme:
        """Raises CheckpointError for what is not supported, naming the group and the setting."""
        where = f"config_groups.{name}"
        weights, inputs = group.get("weights") or {}, group.get("input_activations") or {}
        is_float = one_of(f"{where}.weights.type", weights.get("type"), ("int", "float"), METHOD) == "float"
        bits = one_of(f"{where}.weights.num_bits", weights.get("num_bits"), (8,) if is_float else (4, 8), METHOD)
        supported = ("float-quantized", "naive-quantized") if is_float else ("pack-quantized",)
        one_of(f"{where}.format", group.get("format") or default_format, supported, METHOD)
        strategies = ("tensor", "channel", "block") if is_float else ("channel", "group")
        strategy = one_of(f"{where}.weights.strategy", weights.get("strategy"), strategies, METHOD)
        one_of(f"{where}.output_activations", group.get("output_activations") or None, (None,), METHOD)
        activation: Activation = "none"
        if inputs:
            one_of(f"{where}.input_activations.type", inputs.get("type"), ("float",) if is_float else (), METHOD)
            one_of(f"{where}.input_activations.num_bits", inputs.get("num_bits"), (8,), METHOD)
            rule = (str(inputs.get("strategy")), bool(inputs.get("dynamic")))
            activation = ACTIVATIONS[
                one_of(f"{where}.input_activations (strategy, dynamic)", rule, tuple(ACTIVATIONS), METHOD)
            ]
        rows, columns = weights.get("block_structure") or (0, 0)
        return cls(
            targets=tuple(group.get("targets") or ()),
            bits=bits,
            group_size=checked_group_size(weights.get("group_size"), METHOD) if strategy == "group" else -1,
            symmetric=bool(weights.get("symmetric", True)),
            is_float=is_float,
            block=(int(rows), int(columns)) if strategy == "block" else None,
            activation=activation,
        )


def matches(targets: Iterable[str], name: str) -> bool:
    """Whether class names, module names and ``re:`` expressions cover the linear layer ``name``."""
    for target in targets:
        if target.startswith("re:"):
            if re.match(target.removeprefix("re:"), name):
                return True
        elif target in (name, MODULE_CLASS):
            return True
    return False


class CompressedTensors:
    """See :class:`octavo.interfaces.Quantization`."""

    name: ClassVar[str] = METHOD

    def __init__(self, schemes: tuple[Scheme, ...], ignored: tuple[str, ...], weights: WeightSource) -> None:
        self._schemes = schemes
        self._ignored = ignored
        self._weights = weights

    @classmethod
    def from_checkpoint(cls, settings: Mapping[str, Any], weights: WeightSource) -> Self:
        groups = settings.get("config_groups")
        if not groups:
            raise CheckpointError(
                "compressed-tensors needs the checkpoint's config_groups, and there are none: the checkpoint is not "
                "quantized. Quantize it with llm-compressor, or serve a plain one with --quantization fp8"
            )
        sparsity = (settings.get("sparsity_config") or {}).get("format") or "dense"
        one_of("sparsity_config.format", sparsity, ("dense",), METHOD)
        one_of("transform_config", (settings.get("transform_config") or {}).get("config_groups"), (None, {}), METHOD)
        default_format = settings.get("format") or ""
        schemes = tuple(Scheme.from_group(name, group, default_format) for name, group in groups.items())
        return cls(schemes, tuple(settings.get("ignore") or ()), weights)

    def linear(self, spec: LinearSpec, load: LayerLoader) -> LinearMethod | None:
        return load_parts(spec, load, lambda part: self._is_quantized(part, load), lambda p: self._read(p, spec, load))

    def _is_quantized(self, part: LinearPart, load: LayerLoader) -> bool:
        if load.has(f"{part.name}.weight_packed"):
            return True
        if load.has(f"{part.name}.weight"):
            return self._weights.info(f"{part.name}.weight").dtype == FP8
        return not matches(self._ignored, part.name) and self._scheme(part.name) is not None

    def _scheme(self, name: str) -> Scheme | None:
        """The scheme that targets a layer by its name, else by an expression, else by its class."""
        named = [scheme for scheme in self._schemes if name in scheme.targets]
        found = [scheme for scheme in self._schemes if matches((t for t in scheme.targets if t != MODULE_CLASS), name)]
        by_class = [scheme for scheme in self._schemes if MODULE_CLASS in scheme.targets]
        return next(iter([*named, *found, *by_class]), None)

    def _read(self, part: LinearPart, spec: LinearSpec, load: LayerLoader) -> PackedWeight | Fp8Weight:
        scheme = self._scheme(part.name)
        if scheme is None:
            raise CheckpointError(
                f"{part.name} is quantized in the checkpoint, but no target in config_groups names it; add it there"
            )
        tensors = PartTensors(self._weights, load, part)
        if scheme.is_float:
            return read_fp8(tensors, part, spec, "weight_scale", scheme.block, scheme.activation)
        return self._read_packed(tensors, part, spec, load, scheme)

    def _read_packed(
        self, tensors: PartTensors, part: LinearPart, spec: LinearSpec, load: LayerLoader, scheme: Scheme
    ) -> PackedWeight:
        bits, num_in, num_out = scheme.bits, spec.in_features, part.out_features
        per_word = 32 // bits
        group_size = num_in if scheme.group_size == -1 else scheme.group_size
        num_groups, num_words = -(-num_in // group_size), -(-num_in // per_word)
        if tensors.has("weight_shape"):
            stored = tensors.read("weight_shape", (2,), beside="weight_packed", dtype=torch.int64).tolist()
            if stored != [num_out, num_in]:
                raise CheckpointError(
                    f"tensor '{part.name}.weight_shape' in {tensors.file('weight_shape')} says {stored}, but the "
                    f"configuration needs {[num_out, num_in]}; config.json and the weights do not belong together"
                )
        words, columns = word_slice(spec.columns, bits, num_words)
        packed = tensors.read(
            "weight_packed", (num_out, num_words), (part.rows, words), beside="weight_scale", dtype=torch.int32
        )
        values = unpack_bits(packed, bits, packed.shape[1] * per_word)[:, columns]
        scales = tensors.read("weight_scale", (num_out, num_groups), (part.rows,), beside="weight_packed").T
        zeros = None if scheme.symmetric else self._zeros(tensors, part, bits, num_groups)
        groups = torch.arange(num_in, device=load.placement.device) // group_size
        if tensors.has("weight_g_idx"):
            stored_groups = tensors.read("weight_g_idx", (num_in,), beside="weight_packed", dtype=torch.int32)
            file = tensors.file("weight_g_idx")
            groups = checked_groups(stored_groups, num_groups, f"{part.name}.weight_g_idx", file, spec)
        return PackedWeight.pack(values, scales, zeros, groups[spec.columns], bits)

    def _zeros(self, tensors: PartTensors, part: LinearPart, bits: int, num_groups: int) -> Tensor:
        """The zero points of this rank's outputs, uint8 [num_groups, num_rows]."""
        per_word = 32 // bits
        num_words = -(-part.out_features // per_word)  # the last one may be filled up
        words, rows = word_slice(part.rows, bits, num_words)
        packed = tensors.read(
            "weight_zero_point", (num_words, num_groups), (words,), beside="weight_packed", dtype=torch.int32
        )
        return unpack_bits(packed.T, bits, packed.shape[0] * per_word)[:, rows]
