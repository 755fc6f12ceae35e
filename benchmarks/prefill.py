"""Attention of prompts and chunks of them: the backend ``triton`` beside ``triton-hopper``, at Llama-3.1-8B's heads.

    python benchmarks/prefill.py [--output benchmarks/results/prefill-NAME.json] [--commit HASH]

Needs a Hopper GPU. The two are compared with each other at every size (``tests/gpu`` compares both with float32), then
timed as ``benchmarks/kernels.py`` times.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from kernels import DEVICE, DTYPE, HEADS, SCALE, Batch, add_output, replay_time, save
from torch import Tensor

from octavo.bench.timing import Ceilings, relative_error
from octavo_kernels.hopper_attention import prefill_attention

SIZES = (  # rows, tokens of each, context of each
    (1, 512, 512),
    (1, 1024, 1024),
    (1, 2048, 2048),
    (1, 4096, 4096),
    (1, 8192, 8192),
    (1, 16384, 16384),
    (1, 2048, 8192),
    (2, 4096, 8192),
    (16, 512, 512),
    (37, 220, 220),
    (8, 1024, 4096),
)


@dataclass(frozen=True)
class Result:
    """Times in microseconds; ``difference`` is ‖hopper − triton‖ / ‖triton‖."""

    size: str
    triton: float
    hopper: float
    floor: float
    difference: float


def attend(batch: Batch, kv: Tensor) -> Tensor:
    """The section of whole tiles of queries that such a batch is."""
    [section] = batch.sections
    out = torch.empty(batch.query.shape[0], batch.query[0].numel(), device="cuda", dtype=batch.query.dtype)
    section = replace(section, num_splits=1)
    prefill_attention(out, batch.query, kv, batch.tables, batch.starts, batch.lens, section, scale=SCALE)
    return out


def bench(ceilings: Ceilings, num_rows: int, query_len: int, context: int) -> Result:
    batch = Batch.make(num_rows, query_len, context)

    def time(function: Callable[[Tensor], Tensor]) -> float:
        return replay_time([partial(function, kv) for kv in (batch.kv * 3)[:3]])

    difference = relative_error(attend(batch, batch.kv[0]), batch.attend(batch.kv[0]))
    pairs = num_rows * query_len * (context - query_len / 2)
    floor = ceilings.floor(num_rows * context * 4096, 4 * pairs * HEADS.num_heads * HEADS.head_dim)
    size = f"{num_rows} x {query_len} of {context}"
    return Result(size, time(batch.attend), time(partial(attend, batch)), floor, difference)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_output(parser)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    ceilings = Ceilings.measure(DEVICE, DTYPE)
    print(f"ceilings: {ceilings.bytes_per_us / 1e6:.2f} TB/s, {ceilings.flops_per_us / 1e6:.0f} TFLOP/s")
    print(f"{'size':20}{'triton, µs':>12}{'hopper, µs':>12}{'floor':>10}{'difference':>12}")
    results = []
    for size in SIZES:
        result = bench(ceilings, *size)
        results.append(result)
        print(
            f"{result.size:20}{result.triton:12.1f}{result.hopper:12.1f}{result.floor:10.1f}{result.difference:12.1e}",
            flush=True,
        )
    save(arguments, ceilings, results)


if __name__ == "__main__":
    main()
