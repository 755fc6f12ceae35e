"""The kernels of this package and their benchmarks, named so that nothing is imported before it is chosen."""

from __future__ import annotations

from octavo.hooks import KernelProvider, Provider

PACKED_KERNELS = [
    KernelProvider("reference", "octavo_quant.packed_linear:ReferencePacked", -100, operation="linear_packed"),
    KernelProvider("int4-cpu", "octavo_quant.packed_linear:Int4CPU", 10, operation="linear_packed"),
]

FP8_KERNELS = [
    KernelProvider("reference", "octavo_quant.fp8_linear:ReferenceFp8", -100, operation="linear_fp8"),
    KernelProvider("wide-cpu", "octavo_quant.fp8_linear:WideFp8", 10, operation="linear_fp8"),
]

PACKED_BENCHMARK = Provider("linear_packed", "octavo_quant.bench:packed_cases")
FP8_BENCHMARK = Provider("linear_fp8", "octavo_quant.bench:fp8_cases")
