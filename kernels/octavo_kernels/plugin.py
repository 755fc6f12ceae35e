"""The plugin ``triton``: attention and operations as Triton kernels for GPUs."""

from __future__ import annotations

from octavo import KernelProvider, PluginInfo, Provider, hookimpl

plugin = PluginInfo(api=(1, 1), summary="Triton kernels for GPUs")

REQUIRES = ("triton",)
REQUIRES_GLUON = ("triton.experimental.gluon.language.nvidia.hopper",)


@hookimpl
def octavo_attention_backends() -> list[Provider]:
    return [
        Provider("triton-hopper", "octavo_kernels.hopper_backend:HopperAttention", priority=60, requires=REQUIRES),
        Provider("triton", "octavo_kernels.backend:TritonAttention", priority=50, requires=REQUIRES),
    ]


@hookimpl
def octavo_kernel_compilers() -> list[Provider]:
    return [Provider("triton", "octavo_kernels.compiler:TritonCompiler", requires=REQUIRES)]


@hookimpl
def octavo_kernel_benchmarks() -> list[Provider]:
    return [Provider("gated", "octavo_kernels.bench:gated_cases", requires=REQUIRES)]


@hookimpl
def octavo_kernels() -> list[KernelProvider]:
    targets = {
        "rms_norm": "octavo_kernels.norm:TritonRMSNorm",
        "silu_and_mul": "octavo_kernels.activation:TritonSiluAndMul",
        "linear": "octavo_kernels.linear:SkinnyLinear",
        "linear_packed": "octavo_kernels.packed_linear:TritonPacked",
        "linear_fp8": "octavo_kernels.fp8_linear:TritonFp8",
        "sample": "octavo_kernels.sample:TritonSample",
        "ngram": "octavo_kernels.ngram:TritonNgram",
    }
    hopper = {
        "linear": "octavo_kernels.hopper_gated:HopperLinear",
        "linear_packed": "octavo_kernels.hopper_linear:HopperPacked",
        "linear_fp8": "octavo_kernels.hopper_linear:HopperFp8",
    }
    kernels = [
        KernelProvider(f"triton-{operation.replace('_', '-')}", target, 50, REQUIRES, operation=operation)
        for operation, target in targets.items()
    ]
    kernels += [
        KernelProvider(f"hopper-{operation.replace('_', '-')}", target, 60, REQUIRES_GLUON, operation=operation)
        for operation, target in hopper.items()
    ]
    kernels += [
        KernelProvider(
            "triton-candidates", "octavo_kernels.candidate_sample:CandidateSample", 60, REQUIRES, operation="sample"
        ),
        KernelProvider("triton-logprobs", "octavo_kernels.logprobs:TritonLogprobs", 50, REQUIRES, operation="logprobs"),
        # what --batch-invariant needs: the one above refuses it
        KernelProvider(
            "triton-invariant-linear",
            "octavo_kernels.invariant_linear:InvariantLinear",
            40,
            REQUIRES,
            operation="linear",
        ),
    ]
    return kernels
