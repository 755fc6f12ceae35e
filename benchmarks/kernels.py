"""The kernels of whole decode steps of Llama-3.1-8B, one CUDA graph for each, against the floor.

    python benchmarks/kernels.py [--output benchmarks/results/kernels-NAME.json] [--commit HASH]

``octavo bench kernels`` measures them one by one. What other benchmarks on a GPU share is here as well: the sizes of
that model, batches with a paged cache, and the form of their files.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from octavo.bench import report
from octavo.bench.timing import Ceilings, microseconds
from octavo_kernels import launch
from octavo_kernels.activation import silu_and_mul
from octavo_kernels.argmax import argmax
from octavo_kernels.attention import Heads, Planner, Section, paged_attention, paged_attention_reference
from octavo_kernels.linear import SkinnyLinear
from octavo_kernels.norm import rms_norm
from octavo_kernels.rotary import Rotation, rotate_and_store

DEVICE = torch.device("cuda")
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
    other: float | None  # another implementation
    error: float | None  # none: not compared at this size


def replay_time(calls: Sequence[Callable[[], object]]) -> float:
    """Microseconds per call of ``calls``, captured in one graph."""
    return microseconds(DEVICE, calls)


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
        seq_lens = torch.full((num_rows,), context, device="cuda", dtype=torch.int32)
        return cls(
            [torch.randn(shape, device="cuda", dtype=DTYPE) for _ in range(copies)],
            torch.randperm(shape[0], device="cuda").view(num_rows, blocks).int(),
            torch.arange(0, num_rows * query_len + 1, query_len, device="cuda", dtype=torch.int32),
            seq_lens,
            torch.randn(num_rows * query_len, HEADS.num_heads, HEADS.head_dim, device="cuda", dtype=DTYPE),
            Planner(HEADS).plan(
                seq_lens,
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


def add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path)
    parser.add_argument("--commit", default=None, help="what to record where git is not at hand")


def save(args: argparse.Namespace, ceilings: Ceilings, results: Sequence[Any]) -> None:
    """Write the results, which are dataclasses, to ``--output``, if that was given."""
    if args.output is None:
        return
    record = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": args.commit or report.commit(Path(__file__).parent) or "unknown",
        "hardware": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda, "triton": triton.__version__},
        "dependent_launch": launch.describe(torch.device("cuda", 0)).dependent_launch,
        "ceilings": asdict(ceilings),
        "unit": "microseconds",
        "results": [asdict(result) for result in results],
    }
    args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_output(parser)
    args = parser.parse_args()
    torch.manual_seed(0)
    ceilings = Ceilings.measure(DEVICE, DTYPE)
    step = DecodeStep()
    print(f"ceilings: {ceilings.bytes_per_us / 1e6:.2f} TB/s, {ceilings.flops_per_us / 1e6:.0f} TFLOP/s")
    print(f"{'rows x context':18}{'µs':>10}{'floor':>10}{'of floor':>10}")
    results = []
    for num_rows, context in ((1, 256), (8, 1100), (32, 1100), (64, 1100), (128, 1100), (256, 1100)):
        result = bench_step(ceilings, step, num_rows, context)
        results.append(result)
        print(f"{result.size:18}{result.time:10.1f}{result.floor:10.1f}{result.floor / result.time:10.0%}", flush=True)
    save(args, ceilings, results)


if __name__ == "__main__":
    main()
