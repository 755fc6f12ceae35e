"""What prefix caching brings and costs: ``python benchmarks/prefix.py [PART ...] [--cpu] [--save FILE]``.

Parts: ``together`` (requests that share a long prefix and arrive at once), ``shared`` (throughput by the share of the
prompts that is common, with and without the cache), ``cost`` (throughput when nothing is ever found).

On a GPU the model has the shape of Llama-3.1-8B and times are wall clock; with ``--cpu`` it has that of SmolLM2-135M,
everything is smaller and times are CPU seconds of one thread. Weights are random, everything is greedy.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpu import SMOLLM2_135M
from gpu import LLAMA_8B, TRACE, Anchor, Octavo, Table

from octavo.bench import report
from octavo.bench.datasets import BenchRequest, random_requests, trace_requests
from octavo.messages import Submit
from octavo.prefix import NoPrefixCache
from octavo_cache.hash_chain import HashChain

TOGETHER = {  # seconds
    "cold": Anchor(None, 0.48, 0.45, None),
    "warm": Anchor(None, 0.41, 0.38, None),
    "nothing shared": Anchor(None, 6.77, 6.7, None),
}
PARTS = ("together", "shared", "cost")


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of everything; lengths in tokens."""

    num_together: int
    prefix_len: int
    own_len: int
    output_len: int
    num_shared: int
    shared_prompt_len: int
    shared_output_len: int
    num_trace: int
    repeats: int


GPU = Sizes(64, 4096, 64, 16, 128, 1024, 64, 256, 3)
CPU = Sizes(16, 512, 16, 4, 16, 256, 16, 12, 3)


class Bench:
    """An engine whose prefix cache can be taken out and put back empty."""

    def __init__(self, octavo: Octavo, sizes: Sizes, clock: Callable[[], float]) -> None:
        self.sizes = sizes
        self._octavo = octavo
        self._clock = clock
        self._seed = 0

    def caching(self, on: bool) -> None:
        """Begin anew, with an empty cache or without one."""
        blocks = self._octavo.engine.scheduler.blocks
        blocks.prefix_cache = HashChain(blocks.block_size) if on else NoPrefixCache()

    def seconds(self, requests: Sequence[BenchRequest]) -> float:
        """All at once, until the end."""
        submits: list[Submit] = [self._octavo.submit(request, request.num_output_tokens) for request in requests]
        begin = self._clock()
        self._octavo.run(submits)
        return self._clock() - begin

    def requests(self, count: int, prefix: Sequence[int], own_len: int, output_len: int) -> list[BenchRequest]:
        """Prompts that nobody has seen, after a prefix that somebody may have."""
        prompts = [[*prefix, *self.tokens(own_len)] for _ in range(count)]
        return [BenchRequest(len(prompt), output_len, prompt) for prompt in prompts]

    def tokens(self, count: int) -> list[int]:
        """Others each time."""
        self._seed += 1
        (request,) = random_requests(
            1, input_len=max(1, count), output_len=1, vocab_size=self._octavo.vocab_size, seed=self._seed
        )
        return list(request.token_ids or ())[:count]

    def trace(self, count: int) -> list[BenchRequest]:
        """The lengths of a trace, other tokens each time."""
        self._seed += 1
        return trace_requests(TRACE, count, vocab_size=self._octavo.vocab_size, salt=self._seed)


def together(bench: Bench) -> dict[str, float]:
    """Seconds for requests that arrive at once: with a new prefix, with one that is known, with one of their own."""
    sizes = bench.sizes
    shape = (sizes.num_together, sizes.own_len, sizes.output_len)

    def run(prefix: Sequence[int]) -> float:
        return bench.seconds(bench.requests(shape[0], prefix, *shape[1:]))

    prefixes = [bench.tokens(sizes.prefix_len) for _ in range(sizes.repeats)]
    cold = min(run(prefix) for prefix in prefixes)
    warm = min(run(prefix) for prefix in prefixes)
    own = bench.requests(sizes.num_together, [], sizes.prefix_len + sizes.own_len, sizes.output_len)
    return {"cold": cold, "warm": warm, "nothing shared": bench.seconds(own)}


def shared(bench: Bench) -> list[dict[str, Any]]:
    """Output tokens per second by the percentage of each prompt that is common to all."""
    sizes, rows = bench.sizes, []
    for percentage in (0, 50, 90):
        row: dict[str, Any] = {"shared_percent": percentage}
        for name, on in (("with", True), ("without", False)):
            bench.caching(on)
            prefix = bench.tokens(sizes.shared_prompt_len * percentage // 100)
            requests = bench.requests(
                sizes.num_shared, prefix, sizes.shared_prompt_len - len(prefix), sizes.shared_output_len
            )
            row[f"{name}_tokens_per_second"] = sizes.num_shared * sizes.shared_output_len / bench.seconds(requests)
        rows.append(row)
        gain = row["with_tokens_per_second"] / row["without_tokens_per_second"]
        print(
            f"{percentage:>3} % shared: {row['with_tokens_per_second']:8.0f} tok/s with the cache, "
            f"{row['without_tokens_per_second']:8.0f} without, {gain:.2f} x",
            flush=True,
        )
    return rows


def cost(bench: Bench) -> dict[str, float]:
    """Seconds for a trace of which nothing is ever found, with and without the cache, the best of some in turn."""
    best = {"with": float("inf"), "without": float("inf")}
    for _ in range(bench.sizes.repeats):
        for name, on in (("without", False), ("with", True)):
            bench.caching(on)
            best[name] = min(best[name], bench.seconds(bench.trace(bench.sizes.num_trace)))
    slower = best["with"] / best["without"] - 1
    print(
        f"nothing found: {best['with']:.3f} s with the cache, {best['without']:.3f} s without, {slower:+.2%}",
        flush=True,
    )
    return {**best, "slower": slower}


def main() -> None:
    """Measure the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--cpu", action="store_true", help="a small model on one thread of the CPU")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write every figure as JSON")
    args = parser.parse_args()
    parts = args.parts or PARTS
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SMOLLM2_135M if args.cpu else LLAMA_8B))
        options = {"device": "cpu", "num_threads": 1, "max_model_len": 2048, "max_num_seqs": 32} if args.cpu else {}
        octavo = Octavo(Path(folder), **options)
    bench = Bench(octavo, *((CPU, time.process_time) if args.cpu else (GPU, time.perf_counter)))
    bench.seconds(bench.requests(8, [], 300, 8))  # whatever is slow the first time
    result: dict[str, Any] = {"sizes": {name: getattr(bench.sizes, name) for name in bench.sizes.__slots__}}

    def save() -> None:
        if args.save is not None:
            report.save(args.save, "benchmarks/prefix.py", {"parts": list(parts), "cpu": args.cpu}, result)

    if "together" in parts:
        table = Table()
        result["together_seconds"] = together(bench)
        for name, seconds in result["together_seconds"].items():
            none = Anchor(None, float("nan"), float("inf"), None)
            table.add(f"shared prefix, {name}", "s", none if args.cpu else TOGETHER[name], seconds)
        save()
    if "shared" in parts:
        result["shared"] = shared(bench)
        save()
    if "cost" in parts:
        result["cost_seconds"] = cost(bench)
        save()


if __name__ == "__main__":
    main()
