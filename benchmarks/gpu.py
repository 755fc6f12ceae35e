"""The engine on one GPU against measured anchors: ``python benchmarks/gpu.py [PART ...] [--save FILE]``.

The model has the shape of Llama-3.1-8B and random weights in bfloat16; everything is greedy, prompts are token ids and
nobody detokenizes. The anchors are vLLM 0.26.0 (its defaults) on an H200, measured the same way.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import io
import json
import logging
import os
import pstats
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import soak
import torch

from octavo.batch import StepPlan
from octavo.bench import report
from octavo.bench.datasets import BenchRequest, random_requests, trace_requests
from octavo.client import drive
from octavo.config import EngineConfig
from octavo.engine import InFlight
from octavo.graphs import StepShape
from octavo.messages import Command, Shutdown, StepOutputs, Submit
from octavo.request import SamplingParams
from octavo.runner import LaunchedStep
from octavo.speculation import NOTHING_DRAFTED
from octavo.startup import build_engine, resolve

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}


@dataclass(frozen=True, slots=True)
class Anchor:
    """A row of the table: the floor that bytes set, vLLM's figure, what is to be reached and what is aimed at."""

    floor: float | None
    vllm: float
    must: float
    aim: float | None


DECODE = {  # ms per step, by batch
    1: Anchor(3.42, 4.90, 4.4, 3.8),
    8: Anchor(3.7, 5.21, 4.8, 4.2),
    32: Anchor(4.5, 6.35, 5.8, 5.2),
    64: Anchor(5.5, 7.66, 7.1, 6.4),
    128: Anchor(7.6, 10.82, 9.7, 8.7),
    256: Anchor(11.8, 18.16, 15.9, 14.5),
}
PREFILL = {  # ms to the first token, by prompt
    8192: Anchor(None, 217, 210, 190),
    2048: Anchor(None, 51.8, 50, 45),
    512: Anchor(None, 15.4, 14, 11),
}
LONG_PREFILL = Anchor(None, 38144, 39000, 43000)  # tokens per second
THROUGHPUT = {  # output tokens per second
    "trace": Anchor(None, 9393, 11000, 13500),
    "trace, 1024 rows": Anchor(None, 11624, 13000, 15000),
    "512 in, 128 out": Anchor(None, 6784, 7500, 8500),
    "1024 in, 1024 out": Anchor(None, 9331, 10500, 12500),
}
STARTUP = {"first": Anchor(None, 91.5, 20, 12), "later": Anchor(None, 39, 12, 8)}  # seconds
TRACE = Path(__file__).parent / "traces" / "sharegpt_like.json"


class Octavo:
    """Drives an engine in this process, without text."""

    def __init__(self, model: Path, **options: Any) -> None:
        settings: dict[str, Any] = {"load_format": "dummy", "max_model_len": 16384, "max_num_seqs": 256, **options}
        self.engine = build_engine(resolve(EngineConfig(model=str(model), **settings)))
        self.vocab_size = self.engine.info.vocab_size
        self._name = 0
        gc.collect()
        gc.freeze()  # as the engine's own process does: else the collector stops everything for 80 ms now and then

    def submit(self, request: BenchRequest, num_tokens: int) -> Submit:
        """A request that the engine has not seen yet."""
        self._name += 1
        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        return Submit(str(self._name), list(request.token_ids or ()), params, seed=0)

    def run(self, submits: Sequence[Submit]) -> tuple[float, float, int]:
        """Queue everything at once: seconds until the first token, until the end, and tokens made."""
        first, num_tokens = 0.0, 0
        commands: list[list[Command]] = [list(submits)]

        def receive(timeout: float | None) -> list[Command]:
            if commands:
                return commands.pop()
            return [Shutdown()] if timeout is None else []

        def send(outputs: StepOutputs) -> None:
            nonlocal first, num_tokens
            num_tokens += sum(len(output.token_ids) for output in outputs.sequences)
            if num_tokens and not first:
                first = time.perf_counter() - started

        started = time.perf_counter()
        drive(self.engine, receive, send)
        return first, time.perf_counter() - started, num_tokens

    def prompts(self, count: int, length: int, seed: int) -> list[BenchRequest]:
        """Random tokens."""
        return random_requests(count, input_len=length, output_len=1, vocab_size=self.vocab_size, seed=seed)


def decode(octavo: Octavo, batch: int) -> float:
    """Milliseconds per step with cached prompts: a long run less a short one over the difference in tokens."""
    length, short, long = (128, 1, 257) if batch == 1 else (1024, 32, 160)
    prompts = octavo.prompts(batch, length, seed=batch)
    octavo.run([octavo.submit(prompt, short) for prompt in prompts])  # into the prefix cache
    seconds = [
        min(octavo.run([octavo.submit(prompt, num_tokens) for prompt in prompts])[1] for _ in range(2))
        for num_tokens in (short, long)
    ]
    return (seconds[1] - seconds[0]) / (long - short) * 1e3


def time_to_first_token(octavo: Octavo, length: int) -> float:
    """Milliseconds, the median of five new prompts."""
    runs = [octavo.run([octavo.submit(p, 1)])[0] for p in octavo.prompts(6, length, seed=length)]
    return statistics.median(runs[1:]) * 1e3


def long_prefill(octavo: Octavo) -> float:
    """Prompt tokens per second of 32 prompts of 8192 tokens."""
    submits = [octavo.submit(prompt, 1) for prompt in octavo.prompts(32, 8192, seed=7)]
    return 32 * 8192 / octavo.run(submits)[1]


def throughput(octavo: Octavo, requests: Sequence[BenchRequest]) -> float:
    """Output tokens per second with everything queued at once."""
    _, seconds, num_tokens = octavo.run([octavo.submit(r, r.num_output_tokens) for r in requests])
    return num_tokens / seconds


def host_time(octavo: Octavo, num_rows: int) -> dict[str, float]:
    """Milliseconds of the host's work in a decode step when nothing hides it, the median of 64 steps."""
    engine = octavo.engine
    for prompt in octavo.prompts(num_rows, 64, seed=num_rows):
        engine.submit(octavo.submit(prompt, 100))
    parts: dict[str, list[float]] = {"schedule": [], "launch": [], "settle": []}
    while engine.has_work:
        begin = time.perf_counter()
        plan = engine.scheduler.schedule()
        scheduled = time.perf_counter()
        launched = engine.runner.launch(plan)
        done = time.perf_counter()
        torch.cuda.synchronize()
        ready = time.perf_counter()
        engine.settle(InFlight(launched, begin, NOTHING_DRAFTED))
        if len(plan.rows) == num_rows == plan.num_tokens:
            parts["schedule"].append(scheduled - begin)
            parts["launch"].append(done - scheduled)
            parts["settle"].append(time.perf_counter() - ready)
    return {name: statistics.median(values[16:]) * 1e3 for name, values in parts.items()}


def mixed(octavo: Octavo, num_rows: int = 250, num_steps: int = 40) -> str:
    """Steps of many decodes and one prompt of 220 tokens: the host's time to launch one, and what it takes."""
    engine = octavo.engine
    for prompt in octavo.prompts(num_rows, 220, seed=5):
        engine.submit(octavo.submit(prompt, 200))
    while engine.scheduler.waiting or any(r.is_prefilling for r in engine.scheduler.running.values()):
        engine.settle(engine.launch())
    launches, steps = [], []
    profiler = cProfile.Profile()
    for i, prompt in enumerate(octavo.prompts(num_steps, 220, seed=6)):
        engine.submit(octavo.submit(prompt, 1))
        torch.cuda.synchronize()
        begin = time.perf_counter()
        if i >= num_steps // 2:
            profiler.enable()
        step = engine.launch()
        profiler.disable()
        launches.append(time.perf_counter() - begin)
        torch.cuda.synchronize()
        steps.append(time.perf_counter() - begin)
        engine.settle(step)
    while engine.has_work:
        engine.settle(engine.launch())
    text = io.StringIO()
    pstats.Stats(profiler, stream=text).sort_stats("tottime").print_stats(18)
    half = num_steps // 2
    launch, whole = (statistics.median(times[4:half]) * 1e3 for times in (launches, steps))
    return (
        f"mixed step: {launch:.2f} ms to launch, {whole:.2f} ms until done, longest {max(steps) * 1e3:.0f} ms\n"
        + text.getvalue()
    )


class Watch:
    """Times every step on the device while an engine runs: how long it took, and how long the device waited for it."""

    def __init__(self, octavo: Octavo) -> None:
        self._runner = octavo.engine.runner
        self._launch = self._runner.launch
        self._steps: list[tuple[StepPlan, str, float, torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> Watch:
        graphs, replayed = self._runner.graphs, []
        if graphs is not None:
            replay = graphs.replay

            def note(shape: StepShape, *args: Any) -> Any:
                replayed.append(shape)
                return replay(shape, *args)

            graphs.replay = note  # type: ignore[method-assign]

        def launch(plan: StepPlan) -> LaunchedStep:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            started = time.perf_counter()
            begin.record()
            launched = self._launch(plan)
            end.record()
            shape = replayed.pop() if replayed else None
            kind = "eager" if shape is None else f"graph {shape.num_decodes}+{shape.num_longer_tokens}"
            self._steps.append((plan, kind, time.perf_counter() - started, begin, end))
            return launched

        self._runner.launch = launch  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.launch = self._launch  # type: ignore[method-assign]
        if self._runner.graphs is not None:
            del self._runner.graphs.replay
        torch.cuda.synchronize()

    def table(self) -> str:
        """Steps by kind and number of tokens, those that took the most time first."""
        sums: dict[tuple[str, int], list[float]] = {}
        before = None
        for plan, kind, host, begin, end in self._steps:
            if kind.endswith("+0"):
                kind = "graph, decodes"
            num_tokens = plan.num_tokens
            size = 1 << (num_tokens - 1).bit_length()
            figures = sums.setdefault((kind, size), [0.0] * 5)
            gap = before.elapsed_time(begin) if before is not None else 0.0
            for i, value in enumerate((1, num_tokens, begin.elapsed_time(end), gap, host * 1e3)):
                figures[i] += value
            before = end
        head = f"{'step':<18}{'tokens up to':>13}{'count':>7}{'tokens':>8}"
        lines = [head + f"{'device, ms':>12}{'waits, ms':>11}{'host, ms':>10}{'all, s':>9}"]
        for (kind, size), (count, tokens, busy, idle, host) in sorted(sums.items(), key=lambda item: -item[1][2]):
            lines.append(
                f"{kind:<18}{size:>13}{count:>7.0f}{tokens / count:>8.0f}{busy / count:>12.2f}{idle / count:>11.3f}"
                f"{host / count:>10.2f}{busy / 1e3:>9.3f}"
            )
        busy, idle = (sum(figures[i] for figures in sums.values()) / 1e3 for i in (2, 3))
        lines.append(f"the device was busy for {busy:.2f} s and waited for {idle:.3f} s")
        return "\n".join(lines)


def profile(octavo: Octavo, batch: int) -> str:
    """Where the device's time goes in decode steps."""
    prompts = octavo.prompts(batch, 128 if batch == 1 else 1024, seed=batch)
    octavo.run([octavo.submit(prompt, 21) for prompt in prompts])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        octavo.run([octavo.submit(prompt, 21) for prompt in prompts])
    averages = [event for event in profiler.key_averages() if event.self_device_time_total > 0]
    averages.sort(key=lambda event: -event.self_device_time_total)
    whole = sum(event.self_device_time_total for event in averages) / 21e3
    lines = [f"batch {batch}, 21 steps, the first with the prompts' last blocks: {whole:.3f} ms a step"]
    lines += [f"{e.self_device_time_total / 21e3:8.3f} ms {e.count / 21:7.1f}x  {e.key[:90]}" for e in averages[:22]]
    return "\n".join(lines)


def startup(model: Path, compile_workers: int | None) -> dict[str, float]:
    """Seconds from starting a process until its engine is ready: with empty caches of compiled kernels, and again."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TRITON_CACHE_DIR": cache, "OCTAVO_MODEL": str(model)}
        return {name: _start(environment, compile_workers) for name in STARTUP}


def _start(environment: dict[str, str], compile_workers: int | None) -> float:
    started = time.perf_counter()
    command = [sys.executable, __file__, "ready"]
    if compile_workers is not None:
        command += ["--compile-workers", str(compile_workers)]
    child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    ready = child.stdout.readline()
    seconds = time.perf_counter() - started
    print("  ", ready.strip())
    child.wait()
    return seconds


class Table:
    """Rows as they are measured, beside their anchors."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        print(f"{'':<28}{'unit':>8}{'floor':>9}{'vLLM':>9}{'must':>9}{'aim':>9}{'Octavo':>10}")

    def add(self, name: str, unit: str, anchor: Anchor, value: float) -> None:
        """Print and keep one row."""
        cells = [anchor.floor, anchor.vllm, anchor.must, anchor.aim]
        shown = "".join(f"{'' if cell is None else f'{cell:g}':>9}" for cell in cells)
        good = value <= anchor.must if unit in ("ms", "s", "GiB") else value >= anchor.must
        print(f"{name:<28}{unit:>8}{shown}{value:>10.4g}{'' if good else '  <--'}", flush=True)
        self.rows.append({"name": name, "unit": unit, "octavo": value, "vllm": anchor.vllm, "must": anchor.must})


PARTS = (
    "decode",
    "prefill",
    "throughput",
    "throughput-1024",
    "host",
    "mixed",
    "profile",
    "steps",
    "startup",
    "soak",
    "ready",
)


def main() -> None:
    """Measure the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS[:-1])} (default: all but soak)")
    parser.add_argument("--batches", type=int, nargs="+", default=list(DECODE), help="of decode and profile")
    parser.add_argument("--workloads", nargs="+", default=list(THROUGHPUT), help="of throughput")
    parser.add_argument("--compile-workers", type=int, metavar="N", help="of startup (default: the engine's)")
    parser.add_argument("--enforce-eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--attention-backend", metavar="NAME", help="default: the best that can serve")
    parser.add_argument("--requests", type=int, help="of throughput and steps; default: all")
    parser.add_argument("--minutes", type=float, default=8.0, help="of soak")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write every figure as JSON")
    args = parser.parse_args()
    parts = args.parts or PARTS[:-2]
    if "ready" in parts:
        logging.basicConfig(level="INFO", format="%(message)s")
        octavo = Octavo(Path(os.environ["OCTAVO_MODEL"]), compile_workers=args.compile_workers)
        print(json.dumps(octavo.engine.info.startup_seconds), flush=True)
        return
    logging.basicConfig(level="INFO", format="%(message)s")
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder)
        (model / "config.json").write_text(json.dumps(LLAMA_8B), encoding="utf-8")
        result = measure(model, parts, args)
    if args.save is not None:
        arguments = {
            "parts": list(parts),
            "enforce_eager": args.enforce_eager,
            "attention_backend": args.attention_backend,
        }
        report.save(args.save, "benchmarks/gpu.py", arguments, result)


def measure(model: Path, parts: Sequence[str], args: argparse.Namespace) -> dict[str, Any]:
    """Run the parts; everything that goes into the file."""
    table = Table()
    result: dict[str, Any] = {"rows": table.rows}
    if "startup" in parts:
        for name, seconds in startup(model, args.compile_workers).items():
            table.add(f"start-up, {name}", "s", STARTUP[name], seconds)
    if {"decode", "prefill", "throughput", "host", "mixed", "profile", "steps"} & set(parts):
        octavo = Octavo(model, enforce_eager=args.enforce_eager, attention_backend=args.attention_backend)
        result["startup_seconds"] = octavo.engine.info.startup_seconds
        print("start-up", octavo.engine.info.startup_seconds)
        octavo.run([octavo.submit(prompt, 8) for prompt in octavo.prompts(8, 64, seed=0)])
        run_parts(octavo, parts, args, table, result)
        del octavo
        give_back_memory()
    if "throughput-1024" in parts:
        octavo = Octavo(model, max_num_seqs=1024, attention_backend=args.attention_backend)
        requests = trace_requests(TRACE, None, vocab_size=octavo.vocab_size)
        table.add("trace, 1024 rows", "tok/s", THROUGHPUT["trace, 1024 rows"], throughput(octavo, requests))
        del octavo
        give_back_memory()
    if "soak" in parts:
        # few blocks and long prompts: the cache is full, and requests give way to each other all the time
        octavo = Octavo(model, max_num_seqs=64, max_model_len=4096, num_blocks=1024, max_num_batched_tokens=2048)
        soak.soak(octavo.engine, args.minutes, seed=0)
    return result


def give_back_memory() -> None:
    """What an engine that is gone held; it was kept from the collector while it ran."""
    gc.unfreeze()
    gc.collect()
    torch.cuda.empty_cache()


def run_parts(
    octavo: Octavo, parts: Sequence[str], args: argparse.Namespace, table: Table, result: dict[str, Any]
) -> None:
    """What one engine can measure."""
    if "host" in parts:
        result["host_ms"] = {rows: host_time(octavo, rows) for rows in (64, 256)}
        for rows, times in result["host_ms"].items():
            table.add(f"host, {rows} rows", "ms", Anchor(None, float("nan"), 1.0, None), sum(times.values()))
            print("  ", {name: round(value, 3) for name, value in times.items()})
    if "mixed" in parts:
        print(mixed(octavo), flush=True)
    if "decode" in parts:
        for batch in args.batches:
            table.add(f"decode, batch {batch}", "ms", DECODE[batch], decode(octavo, batch))
    if "profile" in parts:
        for batch in args.batches:
            print(profile(octavo, batch), flush=True)
    if "prefill" in parts:
        for length, anchor in PREFILL.items():
            table.add(f"prefill, {length} tokens", "ms", anchor, time_to_first_token(octavo, length))
        table.add("prefill, 32 x 8192", "tok/s", LONG_PREFILL, long_prefill(octavo))
    if {"throughput", "steps"} & set(parts):
        workloads: dict[str, Callable[[], list[BenchRequest]]] = {
            "trace": lambda: trace_requests(TRACE, None, vocab_size=octavo.vocab_size),
            "512 in, 128 out": lambda: _uniform(octavo, 1000, 512, 128),
            "1024 in, 1024 out": lambda: _uniform(octavo, 256, 1024, 1024),
        }
        for name, make in workloads.items():
            requests = make()[: args.requests] if name in args.workloads else []
            if requests and "throughput" in parts:
                table.add(name, "tok/s", THROUGHPUT[name], throughput(octavo, requests))
            if requests and "steps" in parts:
                with Watch(octavo) as watch:
                    throughput(octavo, requests)
                print(f"{name}:\n{watch.table()}", flush=True)


def _uniform(octavo: Octavo, count: int, num_input: int, num_output: int) -> list[BenchRequest]:
    return random_requests(
        count,
        input_len=num_input,
        output_len=num_output,
        vocab_size=octavo.vocab_size,
        seed=random.Random(num_input).randrange(2**31),
    )


if __name__ == "__main__":
    main()
