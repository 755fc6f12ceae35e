"""Every Triton kernel against its float32 reference and against the floor, at the sizes of Llama-3.1-8B.

    python benchmarks/kernels.py [--output benchmarks/results/kernels-NAME.json] [--commit HASH]

Times are medians of CUDA-graph replays over buffers that together exceed the L2 cache. The floor is the larger of the
bytes that must move over the measured read bandwidth and the operations over the measured matrix rate. Errors are
‖out − reference‖ / ‖reference‖ on fresh random inputs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from octavo_kernels import launch
from octavo_kernels.activation import silu_and_mul, silu_and_mul_reference
from octavo_kernels.argmax import argmax, argmax_reference
from octavo_kernels.attention import Heads, Section, paged_attention, paged_attention_reference, plan_sections
from octavo_kernels.linear import SkinnyLinear, linear_reference
from octavo_kernels.norm import rms_norm, rms_norm_reference
from octavo_kernels.rotary import Rotation, rotate_and_store, rotate_reference

HIDDEN, LAYERS, HEADS, INTERMEDIATE, VOCAB = 4096, 32, Heads(32, 8, 128), 14336, 128256
QKV = (HEADS.num_heads + 2 * HEADS.num_kv_heads) * HEADS.head_dim
LINEARS = {
    "qkv": (HIDDEN, QKV),
    "o": (HIDDEN, HIDDEN),
    "gate_up": (HIDDEN, 2 * INTERMEDIATE),
    "down": (INTERMEDIATE, HIDDEN),
    "lm_head": (HIDDEN, VOCAB),
}
BLOCK_SIZE, DTYPE, SCALE = 16, torch.bfloat16, 128**-0.5
ROTATION_BYTES = 400e6  # more than any L2


@dataclass(frozen=True)
class Result:
    """One kernel at one size; times in microseconds."""

    kernel: str
    size: str
    time: float
    floor: float
    other: float | None  # the usual implementation: cuBLAS, torch or SDPA
    error: float | None  # none: not compared at this size


def replay_time(calls: Sequence[Callable[[], object]], repeats: int = 7) -> float:
    """Microseconds per call of ``calls``, captured in one graph."""
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(repeats + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return sorted(times[2:])[repeats // 2]


def relative_error(out: Tensor, reference: Tensor) -> float:
    return float((out.float() - reference.float()).norm() / reference.float().norm())


@dataclass(frozen=True)
class Ceilings:
    """Measured on the device at hand."""

    bytes_per_us: float
    flops_per_us: float

    @classmethod
    def measure(cls) -> Ceilings:
        big = torch.randn(2**31, device="cuda", dtype=DTYPE)
        read = replay_time([lambda: big.sum()] * 3)
        left, right = torch.randn(2, 8192, 8192, device="cuda", dtype=DTYPE)
        product = replay_time([lambda: left @ right] * 3)
        return cls(big.nbytes / read, 2 * 8192**3 / product)

    def floor(self, num_bytes: float, flops: float = 0.0) -> float:
        return max(num_bytes / self.bytes_per_us, flops / self.flops_per_us)


@dataclass(frozen=True)
class Batch:
    """Rows of equal lengths in a paged cache."""

    kv: list[Tensor]
    tables: Tensor
    starts: Tensor
    lens: Tensor
    query: Tensor
    sections: list[Section]

    @classmethod
    def make(cls, num_rows: int, query_len: int, context: int) -> Batch:
        blocks = -(-context // BLOCK_SIZE)
        shape = (num_rows * blocks, 2, HEADS.num_kv_heads, BLOCK_SIZE, HEADS.head_dim)
        num_bytes = num_rows * blocks * BLOCK_SIZE * 4096
        copies = max(1, min(8, round(ROTATION_BYTES / num_bytes)))
        return cls(
            [torch.randn(shape, device="cuda", dtype=DTYPE) for _ in range(copies)],
            torch.randperm(shape[0], device="cuda").view(num_rows, blocks).int(),
            torch.arange(0, num_rows * query_len + 1, query_len, device="cuda", dtype=torch.int32),
            torch.full((num_rows,), context, device="cuda", dtype=torch.int32),
            torch.randn(num_rows * query_len, HEADS.num_heads, HEADS.head_dim, device="cuda", dtype=DTYPE),
            plan_sections(
                HEADS,
                torch.device("cuda"),
                num_rows=num_rows,
                num_tokens=num_rows * query_len,
                num_decodes=num_rows if query_len == 1 else 0,
                max_query_len=query_len,
                max_seq_len=context,
            ),
        )

    def attend(self, kv: Tensor, query: Tensor | None = None) -> Tensor:
        query = self.query if query is None else query
        return paged_attention(query, kv, self.tables, self.starts, self.lens, self.sections, scale=SCALE)

    def reference(self) -> Tensor:
        return paged_attention_reference(self.query, self.kv[0], self.tables, self.starts, self.lens, scale=SCALE)


ATTENTION_SIZES = (
    (1, 1, 384),
    (1, 1, 16384),
    (8, 1, 1100),
    (32, 1, 1100),
    (64, 1, 1100),
    (128, 1, 1100),
    (256, 1, 1100),
    (8, 5, 1100),
    (64, 5, 1100),
    (1, 2048, 2048),
    (1, 8192, 8192),
    (1, 2048, 8192),
    (8, 512, 512),
)


def bench_attention(ceilings: Ceilings, num_rows: int, query_len: int, context: int) -> Result:
    batch = Batch.make(num_rows, query_len, context)
    time = replay_time([partial(batch.attend, kv) for kv in (batch.kv * 8)[: 3 if query_len > 16 else 8]])
    pairs = num_rows * query_len * (context - query_len / 2)
    floor = ceilings.floor(num_rows * context * 4096, 4 * pairs * HEADS.num_heads * HEADS.head_dim)
    other = None
    if query_len == context:
        shape = (3, num_rows, HEADS.num_heads, context, HEADS.head_dim)
        query, key, value = torch.randn(shape, device="cuda", dtype=DTYPE)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            other = replay_time([lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True)] * 3)
    wide = query_len * context * HEADS.num_heads * 4 > 3e9  # the reference's scores would fill the device
    error = None if wide else relative_error(batch.attend(batch.kv[0]), batch.reference())
    return Result("attention", f"{num_rows} x {query_len} of {context}", time, floor, other, error)


def bench_linear(ceilings: Ceilings, name: str) -> list[Result]:
    in_features, out_features = LINEARS[name]
    copies = max(2, round(ROTATION_BYTES / (2 * in_features * out_features)))
    scale = in_features**-0.5
    weights = [torch.randn(out_features, in_features, device="cuda", dtype=DTYPE) * scale for _ in range(copies)]
    layers = [SkinnyLinear(None, weight, None) for weight in weights]
    floor = ceilings.floor(2 * in_features * out_features)
    results = []
    for num_tokens in (1, 2, 8, 16):
        x = torch.randn(num_tokens, in_features, device="cuda", dtype=DTYPE)
        time = replay_time([partial(layer.apply, x) for layer in (layers * 8)[:16]])
        other = replay_time([partial(F.linear, x, weight) for weight in (weights * 8)[:16]])
        error = relative_error(layers[0].apply(x), linear_reference(x, weights[0]))
        results.append(Result("linear", f"{name} {num_tokens}", time, floor, other, error))
    return results


def bench_norm(ceilings: Ceilings, rows: int) -> Result:
    weight = torch.rand(HIDDEN, device="cuda", dtype=DTYPE)
    x, residual = torch.randn(2, rows, HIDDEN, device="cuda", dtype=DTYPE)
    error = relative_error(rms_norm(x, weight, 1e-5), rms_norm_reference(x, weight, 1e-5))
    time = replay_time([lambda: rms_norm(x, weight, 1e-5, residual)] * 16)
    other = replay_time([lambda: F.rms_norm(x + residual, (HIDDEN,), weight, 1e-5)] * 16)
    return Result("add and rms_norm", str(rows), time, ceilings.floor(4 * x.nbytes), other, error)


def bench_activation(ceilings: Ceilings, rows: int) -> Result:
    gate_up = torch.randn(rows, 2 * INTERMEDIATE, device="cuda", dtype=DTYPE)
    error = relative_error(silu_and_mul(gate_up), silu_and_mul_reference(gate_up))
    time = replay_time([lambda: silu_and_mul(gate_up)] * 16)
    other = replay_time([lambda: F.silu(gate_up[:, :INTERMEDIATE]) * gate_up[:, INTERMEDIATE:]] * 16)
    return Result("silu_and_mul", str(rows), time, ceilings.floor(1.5 * gate_up.nbytes), other, error)


def bench_rotary(ceilings: Ceilings, rows: int) -> Result:
    table = torch.rand(16384, HEADS.head_dim, device="cuda")
    qkv = torch.randn(rows, QKV // HEADS.head_dim, HEADS.head_dim, device="cuda", dtype=DTYPE)
    query, key, value = qkv.split((HEADS.num_heads, HEADS.num_kv_heads, HEADS.num_kv_heads), dim=1)
    kv = torch.empty(rows + 1, 2, HEADS.num_kv_heads, BLOCK_SIZE, HEADS.head_dim, device="cuda", dtype=DTYPE)
    positions = torch.randint(0, 16384, (rows,), device="cuda")
    slots = torch.randperm(kv.shape[0] * BLOCK_SIZE, device="cuda")[:rows]

    def rotate() -> Tensor | None:
        return rotate_and_store(query, key, value, kv, positions, slots, rotation=Rotation(table))

    rotated = rotate()
    assert rotated is not None
    error = relative_error(rotated, rotate_reference(query, table, positions, None, 0.0))
    return Result(
        "rotate and store", str(rows), replay_time([rotate] * 16), ceilings.floor(2 * qkv.nbytes), None, error
    )


def bench_argmax(ceilings: Ceilings, rows: int) -> Result:
    logits = torch.randn(rows, VOCAB, device="cuda")
    error = float((argmax(logits) != argmax_reference(logits)).sum())
    time = replay_time([lambda: argmax(logits)] * 8)
    other = replay_time([lambda: logits.argmax(-1)] * 8)
    return Result("argmax", str(rows), time, ceilings.floor(logits.nbytes), other, error)


class DecodeStep:
    """The kernels of one decode step of an 8B model, in order, with random weights."""

    def __init__(self) -> None:
        def layer(shape: tuple[int, int]) -> SkinnyLinear:
            weight = torch.randn(shape[1], shape[0], device="cuda", dtype=DTYPE) * shape[0] ** -0.5
            return SkinnyLinear(None, weight, None)

        self.layers = [
            {name: layer(shape) for name, shape in LINEARS.items() if name != "lm_head"} for _ in range(LAYERS)
        ]
        self.head = layer(LINEARS["lm_head"])
        self.norm = torch.ones(HIDDEN, device="cuda", dtype=DTYPE)
        self.table = torch.rand(16384, HEADS.head_dim, device="cuda")
        num_weights = LAYERS * sum(a * b for name, (a, b) in LINEARS.items() if name != "lm_head") + HIDDEN * VOCAB
        self.num_bytes = 2 * num_weights

    def run(self, batch: Batch, caches: list[Tensor], embedded: Tensor, positions: Tensor, slots: Tensor) -> Tensor:
        num_rows = embedded.shape[0]
        residual = embedded.clone()
        x = rms_norm(residual, self.norm, 1e-5)
        for layer, kv in zip(self.layers, caches, strict=True):
            heads = layer["qkv"].apply(x).view(num_rows, -1, HEADS.head_dim)
            query, key, value = heads.split((HEADS.num_heads, HEADS.num_kv_heads, HEADS.num_kv_heads), dim=1)
            rotation = Rotation(self.table)
            query = rotate_and_store(query, key, value, kv, positions, slots, rotation=rotation)
            x = rms_norm(layer["o"].apply(batch.attend(kv, query)), self.norm, 1e-5, residual)
            x = layer["down"].apply(silu_and_mul(layer["gate_up"].apply(x)))
            x = rms_norm(x, self.norm, 1e-5, residual)
        return argmax(self.head.apply(x))


def bench_step(ceilings: Ceilings, step: DecodeStep, num_rows: int, context: int) -> Result:
    batch = Batch.make(num_rows, 1, context)
    caches = [torch.randn_like(batch.kv[0]) for _ in range(LAYERS)]
    embedded = torch.randn(num_rows, HIDDEN, device="cuda", dtype=DTYPE)
    positions = torch.full((num_rows,), context - 1, device="cuda")
    slots = batch.tables[:, -1].long() * BLOCK_SIZE + (context - 1) % BLOCK_SIZE
    time = replay_time([partial(step.run, batch, caches, embedded, positions, slots)])
    floor = ceilings.floor(step.num_bytes + LAYERS * num_rows * context * 4096)
    return Result("decode step", f"{num_rows} x {context}", time, floor, None, None)


def bench_all(ceilings: Ceilings) -> list[Result]:
    step = DecodeStep()
    results = [
        bench_step(ceilings, step, num_rows, context)
        for num_rows, context in ((1, 256), (8, 1100), (32, 1100), (64, 1100), (128, 1100), (256, 1100))
    ]
    del step
    torch.cuda.empty_cache()
    results += [bench_attention(ceilings, *size) for size in ATTENTION_SIZES]
    for name in LINEARS:
        results += bench_linear(ceilings, name)
    for bench in (bench_norm, bench_activation, bench_rotary):
        results += [bench(ceilings, rows) for rows in (1, 32, 256, 8192)]
    return results + [bench_argmax(ceilings, rows) for rows in (1, 32, 256)]


def commit() -> str:
    try:
        return subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--commit", default=None, help="what to record where git is not at hand")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    ceilings = Ceilings.measure()
    results = bench_all(ceilings)
    print(f"ceilings: {ceilings.bytes_per_us / 1e6:.2f} TB/s, {ceilings.flops_per_us / 1e6:.0f} TFLOP/s")
    print(f"{'kernel':18}{'size':18}{'µs':>10}{'floor':>10}{'of floor':>10}{'other':>10}{'error':>10}")
    for result in results:
        other = "" if result.other is None else f"{result.other:.1f}"
        error = "" if result.error is None else f"{result.error:.1e}"
        print(
            f"{result.kernel:18}{result.size:18}{result.time:10.1f}{result.floor:10.1f}"
            f"{result.floor / result.time:10.0%}{other:>10}{error:>10}"
        )
    if arguments.output is not None:
        record = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "commit": arguments.commit or commit(),
            "hardware": torch.cuda.get_device_name(),
            "versions": {"torch": torch.__version__, "cuda": torch.version.cuda, "triton": triton.__version__},
            "dependent_launch": launch.describe(torch.device("cuda", 0)).dependent_launch,
            "ceilings": asdict(ceilings),
            "unit": "microseconds",
            "results": [asdict(result) for result in results],
        }
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
