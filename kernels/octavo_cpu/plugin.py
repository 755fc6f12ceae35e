"""The plugin ``cpu``: attention and small operations in C, packed matrix products."""

from __future__ import annotations

from octavo import PluginInfo, hookimpl
from octavo.hooks import KernelProvider, Provider

plugin = PluginInfo(api=(1, 1), summary="Fast kernels for CPUs")


@hookimpl
def octavo_attention_backends() -> list[Provider]:
    return [Provider("cpu", "octavo_cpu.attention:CPUAttention", priority=10)]


@hookimpl
def octavo_kernels() -> list[KernelProvider]:
    return [
        KernelProvider("cpu", "octavo_cpu.pointwise:RMSNorm", priority=10, operation="rms_norm"),
        KernelProvider("cpu", "octavo_cpu.pointwise:SiluAndMul", priority=10, operation="silu_and_mul"),
        KernelProvider("cpu", "octavo_cpu.linear:PackedLinear", priority=20, operation="linear"),
        KernelProvider("onednn", "octavo_cpu.linear:OneDNNLinear", priority=10, operation="linear"),
        KernelProvider("cpu", "octavo_cpu.quantized:PackedIntegers", priority=20, operation="linear_packed"),
        KernelProvider("cpu", "octavo_cpu.quantized:Float8", priority=20, operation="linear_fp8"),
    ]
