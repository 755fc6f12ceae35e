"""Quantized weights at the sizes of Llama-3.1-8B: products and sampling against the floor, and whole models.

    python benchmarks/quantized.py products [--output benchmarks/results/kernels-quant-NAME.json] [--commit HASH]
    python benchmarks/quantized.py models [--formats awq gptq fp8] [--hopper] [--trace] [--save FILE]

Products are measured as in ``benchmarks/kernels.py``, models (with random weights) as in ``benchmarks/gpu.py``.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gpu
import torch
import torch.nn.functional as F
from gpu import LLAMA_8B, TRACE, Anchor, Octavo, Table, decode, throughput
from kernels import DEVICE, DTYPE, LINEARS, ROTATION_BYTES, VOCAB, Result, add_output, replay_time, save
from torch import Tensor

from octavo.bench import report
from octavo.bench.datasets import trace_requests
from octavo.bench.timing import Ceilings, relative_error
from octavo.operations import SampleNeed
from octavo.sampling import SamplingTensors, TorchSample
from octavo_kernels.activation import silu_and_mul
from octavo_kernels.fp8_linear import TritonFp8
from octavo_kernels.fp8_tokens import TokenRounding, round_tokens
from octavo_kernels.hopper_linear import HopperFp8, HopperPacked
from octavo_kernels.norm import rms_norm
from octavo_kernels.packed_linear import TritonPacked
from octavo_kernels.sample import TritonSample
from octavo_quant.fp8_linear import ReferenceFp8
from octavo_quant.fp8_weight import Fp8Need, Fp8Weight
from octavo_quant.packed import PackedNeed, PackedWeight
from octavo_quant.packed_linear import ReferencePacked

NUM_TOKENS = (1, 2, 8, 16, 32, 64, 128, 256, 512, 2048)
LAYER = [name for name in LINEARS if name != "lm_head"]


def packed(kernel: Any, num_in: int, num_out: int, copies: int) -> tuple[list[Any], ReferencePacked]:
    """Asymmetric 4 bits in groups of 128, as AWQ has them."""
    need = PackedNeed(DEVICE, DTYPE, num_in, num_out, 4, 128, False, False)
    weights = [
        PackedWeight(
            torch.randint(0, 256, (num_out, num_in // 2), device=DEVICE, dtype=torch.uint8),
            ((torch.rand(num_in // 128, num_out, device=DEVICE) + 0.5) / (5 * num_in**0.5)).half(),
            torch.randint(0, 16, (num_in // 128, num_out), device=DEVICE, dtype=torch.uint8),
            128,
            None,
            4,
        )
        for _ in range(copies)
    ]
    return [kernel(need, weight, None) for weight in weights], ReferencePacked(need, weights[0], None)


def fp8(
    kernel: Any, num_in: int, num_out: int, copies: int, block: int | None = None
) -> tuple[list[Any], ReferenceFp8]:
    """A scale for each output and rounding by token, or blocks of 128 x 128."""
    weights = []
    for _ in range(copies):
        weight = Fp8Weight.online(torch.randn(num_out, num_in, device=DEVICE, dtype=DTYPE) * num_in**-0.5)
        if block is not None:
            scales = (torch.rand(num_out // block, num_in // block, device=DEVICE) + 0.5) / 448
            weight = Fp8Weight(weight.values, scales, block, block, "group")
        weights.append(weight)
    first = weights[0]
    need = Fp8Need(DEVICE, DTYPE, num_in, num_out, first.activation, first.row_block, first.column_block)
    return [kernel(need, weight, None) for weight in weights], ReferenceFp8(need, first, None)


FORMATS = {
    "4-bit": partial(packed, TritonPacked),
    "4-bit streamed": partial(packed, HopperPacked),
    "fp8": partial(fp8, TritonFp8),
    "fp8 streamed": partial(fp8, HopperFp8),
    "fp8 blocks": partial(fp8, TritonFp8, block=128),
    "fp8 blocks streamed": partial(fp8, HopperFp8, block=128),
}
HOPPER_KERNELS = {"linear_packed": "hopper-linear-packed", "linear_fp8": "hopper-linear-fp8"}


def bench(ceilings: Ceilings, name: str, plain: dict[int, float], label: str) -> list[Result]:
    num_in, num_out = LINEARS[name]
    num_bytes = num_in * num_out * (0.5 if label.startswith("4") else 1)
    copies = max(2, round(ROTATION_BYTES / num_bytes))
    layers, reference = FORMATS[label](num_in, num_out, min(copies, 24))
    results = []
    for num_tokens in NUM_TOKENS:
        x = torch.randn(num_tokens, num_in, device=DEVICE, dtype=DTYPE)
        floor = ceilings.floor(num_bytes, 2 * num_tokens * num_in * num_out)
        time = replay_time([partial(layer.apply, x) for layer in (layers * 12)[: 8 if num_tokens > 64 else 24]])
        error = relative_error(layers[0].apply(x), reference.apply(x))
        results.append(Result(label, f"{name} {num_tokens}", time, floor, plain.get(num_tokens), error))
    return results


def bench_plain(name: str) -> dict[int, float]:
    num_in, num_out = LINEARS[name]
    copies = max(2, round(ROTATION_BYTES / (2 * num_in * num_out)))
    weights = [torch.randn(num_out, num_in, device=DEVICE, dtype=DTYPE) for _ in range(copies)]
    times = {}
    for num_tokens in NUM_TOKENS:
        x = torch.randn(num_tokens, num_in, device=DEVICE, dtype=DTYPE)
        times[num_tokens] = replay_time([partial(F.linear, x, weight) for weight in (weights * 8)[:8]])
    return times


def bench_sample(ceilings: Ceilings, num_rows: int, filtered: bool) -> Result:
    """``other`` is torch, which asks the host when rows are filtered: measured by events around single calls."""
    logits = torch.randn(num_rows, VOCAB, device=DEVICE) * 3
    limits = torch.full((2, num_rows), 0.9, device=DEVICE)
    tensors = SamplingTensors(
        temperature=torch.ones(num_rows, device=DEVICE),
        uniform=torch.rand(num_rows, device=DEVICE),
        top_k=torch.full((num_rows,), 50, device=DEVICE) if filtered else None,
        top_p=limits[0] if filtered else None,
    )
    need = SampleNeed(DEVICE, VOCAB)
    kernel, reference = TritonSample(need), TorchSample(need)
    error = float((kernel(logits, tensors) != reference(logits, tensors)).float().mean())
    time = replay_time([partial(kernel, logits, tensors)] * 3)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(5):
        reference(logits, tensors)
    end.record()
    torch.cuda.synchronize()
    other = begin.elapsed_time(end) * 200
    label = "sample top-k top-p" if filtered else "sample"
    return Result(label, str(num_rows), time, ceilings.floor(logits.nbytes), other, error)


def bench_rounding(ceilings: Ceilings, num_tokens: int) -> list[Result]:
    """Norm and activation that round to FP8; ``other`` rounds in a launch of its own, ``error`` says how many values
    differ from that."""
    form = TokenRounding(above=0, reordered=True)
    hidden, gate_up = LINEARS["gate_up"]
    copies = max(2, min(16, round(ROTATION_BYTES / (4 * num_tokens * hidden))))
    weight = torch.rand(hidden, device=DEVICE, dtype=DTYPE)

    def inputs(size: int, count: int) -> list[list[Tensor]]:
        return [list(torch.randn(count, num_tokens, size, device=DEVICE, dtype=DTYPE)) for _ in range(copies)]

    def norm(x: Tensor, residual: Tensor, form: TokenRounding | None = form) -> Tensor:
        return rms_norm(x, weight, 1e-5, residual, form)

    def activation(x: Tensor, form: TokenRounding | None = form) -> Tensor:
        return silu_and_mul(x, form)

    results = []
    for label, kernel, tensors, num_bytes in (
        ("add, norm, round", norm, inputs(hidden, 2), 7 * hidden),
        ("silu, multiply, round", activation, inputs(gate_up, 1), 5 * gate_up // 2),
    ):

        def apart(*tensors: Tensor, kernel: Any = kernel) -> Tensor:
            return round_tokens(kernel(*tensors, form=None), reordered=True)

        one, other = (each(*[t.clone() for t in tensors[0]]).view(torch.uint8) for each in (kernel, apart))
        times = [replay_time([partial(each, *ts) for ts in (tensors * 16)[:16]]) for each in (kernel, apart)]
        floor = ceilings.floor(num_tokens * num_bytes)
        results.append(Result(label, str(num_tokens), times[0], floor, times[1], float((one != other).float().mean())))
    return results


INT4_DECODE = {1: (1.07, 2.8, 2.0), 32: (2.1, 4.2, 3.2), 256: (9.5, 16.5, 14.5)}
"""Milliseconds per step by batch: what the bytes need, what must be reached and what is aimed at."""


@dataclass(frozen=True)
class ModelFormat:
    """A quantized model of the shape of Llama-3.1-8B: its settings, options and anchors."""

    settings: dict[str, Any] | None
    options: dict[str, Any]
    decode: dict[int, Anchor]
    trace: Anchor
    weights: Anchor


def _anchors(vllm: tuple[float, float, float], rows: dict[int, tuple[float, float, float]]) -> dict[int, Anchor]:
    return {
        batch: Anchor(floor, other, must, aim)
        for other, (batch, (floor, must, aim)) in zip(vllm, rows.items(), strict=True)
    }


MODELS = {
    "awq": ModelFormat(
        {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
        {},
        _anchors((3.96, 5.49, 18.45), INT4_DECODE),
        Anchor(None, 10072, 11500, 14000),
        Anchor(None, float("nan"), 5.5, None),
    ),
    "gptq": ModelFormat(
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False},
        {},
        _anchors((3.79, 5.34, 18.06), INT4_DECODE),
        Anchor(None, 10329, 11500, 14000),
        Anchor(None, float("nan"), 5.5, None),
    ),
    "fp8": ModelFormat(
        None,
        {"quantization": "fp8"},
        _anchors((3.47, 5.33, 16.08), {1: (1.83, 2.9, 2.3), 32: (2.9, 4.5, 3.9), 256: (10.2, 14.0, 12.5)}),
        Anchor(None, 13007, 15000, 18000),
        Anchor(None, float("nan"), 8.6, None),
    ),
}


def models(args: argparse.Namespace) -> None:
    """Whole models: weights, decode and throughput of the trace."""
    logging.basicConfig(level="INFO", format="%(message)s")
    table = Table()
    for name in args.formats:
        kind = MODELS[name]
        operation = "linear_fp8" if name == "fp8" else "linear_packed"
        kernels = {operation: HOPPER_KERNELS[operation]} if args.hopper else {}
        with tempfile.TemporaryDirectory() as folder:
            config = LLAMA_8B if kind.settings is None else {**LLAMA_8B, "quantization_config": kind.settings}
            (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
            options = {**kind.options, "kernels": kernels, "compile_workers": args.compile_workers}
            octavo = Octavo(Path(folder), **options)
        print(name, octavo.engine.info.startup_seconds)
        table.add(f"{name}, weights", "GiB", kind.weights, octavo.engine.info.weight_bytes / 2**30)
        octavo.run([octavo.submit(prompt, 8) for prompt in octavo.prompts(8, 64, seed=0)])
        for batch in args.batches:
            table.add(f"{name}, decode, batch {batch}", "ms", kind.decode[batch], decode(octavo, batch))
        for batch in args.profile:
            print(gpu.profile(octavo, batch), flush=True)
        if args.trace:
            requests = trace_requests(TRACE, None, vocab_size=octavo.vocab_size)
            table.add(f"{name}, trace", "tok/s", kind.trace, throughput(octavo, requests))
        del octavo
        gc.unfreeze()  # Octavo froze what there was
        gc.collect()
        torch.cuda.empty_cache()
    if args.save is not None:
        report.save(
            args.save,
            "benchmarks/quantized.py models",
            {"formats": args.formats, "hopper": args.hopper},
            {"rows": table.rows},
        )


def products(args: argparse.Namespace) -> None:
    """Products and sampling alone."""
    torch.manual_seed(0)
    ceilings = Ceilings.measure(DEVICE, DTYPE)
    results: list[Result] = []
    for name in LAYER:
        plain = bench_plain(name)
        for label in FORMATS:
            results += bench(ceilings, name, plain, label)
    samples = [bench_sample(ceilings, rows, filtered) for filtered in (False, True) for rows in (1, 32, 256)]
    roundings = [result for num in (128, 256, 2048, 8192) for result in bench_rounding(ceilings, num)]
    print(f"ceilings: {ceilings.bytes_per_us / 1e6:.2f} TB/s, {ceilings.flops_per_us / 1e6:.0f} TFLOP/s; microseconds")
    print(f"{'':26}" + "".join(f"{name:>24}" for name in LAYER) + f"{'error':>10}")
    by_key = {(result.kernel, result.size): result for result in results}
    for label in FORMATS:
        for num_tokens in NUM_TOKENS:
            found = [by_key.get((label, f"{name} {num_tokens}")) for name in LAYER]
            row = [result for result in found if result is not None]
            if row:
                cells = "".join(f"{r.time:10.1f} ({r.floor:.1f}; {r.other or 0:.1f})".rjust(24) for r in row)
                print(f"{label:20}{num_tokens:6}" + cells + f"{max(r.error or 0.0 for r in row):10.1e}")
    for r in samples + roundings:
        print(
            f"{r.kernel:20}{r.size:>6}{r.time:10.1f} ({r.floor:.1f}; {r.other or 0:.1f}){r.error or 0.0:10.1e} differ"
        )
    results += samples + roundings
    save(args, ceilings, results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(required=True)
    part = parts.add_parser("products", help=products.__doc__)
    add_output(part)
    part.set_defaults(run=products)
    part = parts.add_parser("models", help=models.__doc__)
    part.add_argument("--formats", nargs="+", choices=list(MODELS), default=list(MODELS))
    part.add_argument("--hopper", action="store_true", help="with the products that stream weights")
    part.add_argument("--batches", type=int, nargs="*", default=list(INT4_DECODE), help="rows of decode steps")
    part.add_argument("--profile", type=int, nargs="*", default=[], help="rows of decode steps to take apart")
    part.add_argument("--trace", action="store_true", help="and the throughput of the trace")
    part.add_argument("--compile-workers", type=int, default=0, metavar="N", help="at start; 0: one after the other")
    part.add_argument("--save", type=Path, metavar="FILE", help="write every figure as JSON")
    part.set_defaults(run=models)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
