"""The plugin ``fp8``: checkpoints with ``quant_method: fp8``, and quantization of plain ones while they are loaded.

A projection has ``weight`` float8_e4m3fn [out, in] and ``weight_scale`` (one number, or one per output) or, in blocks,
``weight_scale_inv`` [ceil(out / rows), ceil(in / columns)], which is multiplied in spite of its name. A static scheme
adds ``input_scale``. Without settings each plain weight gets one scale per output as it is read (``--quantization
fp8``), and inputs are rounded per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from octavo import PluginInfo, hookimpl
from octavo.errors import CheckpointError
from octavo.hooks import KernelProvider, Provider
from octavo.interfaces import LayerLoader, LinearMethod, LinearPart, LinearSpec, WeightSource
from octavo_quant.fp8_weight import FP8, Fp8Weight, read_fp8
from octavo_quant.parts import PartTensors, load_parts, one_of
from octavo_quant.providers import FP8_BENCHMARK, FP8_KERNELS

plugin = PluginInfo(api=(1, 1), summary="FP8 checkpoints and online quantization")

KEPT = ("lm_head", "router", "gate")
"""Layers that are not quantized while loading: what they decide is worth their few bytes."""


@hookimpl
def octavo_quantizations() -> list[Provider]:
    return [Provider("fp8", FP8Quantization)]


@hookimpl
def octavo_kernels() -> list[KernelProvider]:
    return FP8_KERNELS


@hookimpl
def octavo_kernel_benchmarks() -> list[Provider]:
    return [FP8_BENCHMARK]


class FP8Quantization:
    """See :class:`octavo.interfaces.Quantization`."""

    name: ClassVar[str] = "fp8"

    def __init__(self, settings: Mapping[str, Any], weights: WeightSource) -> None:
        self._online = not settings
        self._weights = weights
        self._plain = tuple(settings.get("ignored_layers") or settings.get("modules_to_not_convert") or ())
        self._static = settings.get("activation_scheme", "dynamic") == "static"
        block = settings.get("weight_block_size")
        self._block: tuple[int, int] | None = (int(block[0]), int(block[1])) if block else None

    @classmethod
    def from_checkpoint(cls, settings: Mapping[str, Any], weights: WeightSource) -> Self:
        if settings:
            scheme = one_of("activation_scheme", settings.get("activation_scheme"), ("static", "dynamic"), cls.name)
            one_of("fmt", settings.get("fmt") or "e4m3", ("e4m3", "float8_e4m3fn"), cls.name)
            block = settings.get("weight_block_size")
            if block and (len(block) != 2 or any(not isinstance(size, int) or size < 1 for size in block)):
                raise CheckpointError(
                    f"weight_block_size {block!r} of the fp8 checkpoint must be two sizes; correct it"
                )
            if block and scheme == "static":
                raise CheckpointError(
                    "the fp8 checkpoint has weight_block_size, which goes with activation_scheme dynamic, not static; "
                    "correct its settings"
                )
        return cls(settings, weights)

    def linear(self, spec: LinearSpec, load: LayerLoader) -> LinearMethod | None:
        if not self._online:
            return load_parts(spec, load, lambda p: self._is_quantized(p, load), lambda p: self._read(p, spec, load))
        if spec.name.rpartition(".")[2] in KEPT:
            return None
        return load_parts(spec, load, lambda part: True, lambda part: read_online(part, spec, load))

    def _is_quantized(self, part: LinearPart, load: LayerLoader) -> bool:
        if load.has(f"{part.name}.weight"):
            return self._weights.info(f"{part.name}.weight").dtype == FP8
        listed = any(part.name == name or part.name.endswith(f".{name}") for name in self._plain)
        return part.name != "lm_head" and not listed

    def _read(self, part: LinearPart, spec: LinearSpec, load: LayerLoader) -> Fp8Weight:
        tensors = PartTensors(self._weights, load, part)
        if self._block is None:
            return read_fp8(tensors, part, spec, "weight_scale", None, "tensor" if self._static else "token")
        # both names are in use
        old = tensors.has("weight_scale") and not tensors.has("weight_scale_inv")
        return read_fp8(tensors, part, spec, "weight_scale" if old else "weight_scale_inv", self._block, "group")


def read_online(part: LinearPart, spec: LinearSpec, load: LayerLoader) -> Fp8Weight:
    """A plain weight, rounded as soon as it is read, by the largest value of each output in this rank's inputs."""
    shape = (part.out_features, spec.in_features)
    return Fp8Weight.online(load.tensor(f"{part.name}.weight", shape, (part.rows, spec.columns)))
