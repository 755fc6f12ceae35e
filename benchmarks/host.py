"""What a step costs the host: ``python benchmarks/host.py [--rows 64 256 1024] [--profile PART] [--save FILE]``.

Schedule, launch and settle of decode steps and of one long prompt, with a model, an attention backend and captured
steps that do nothing: what is left is the engine's own Python. Needs no GPU; ``benchmarks/gpu.py host`` measures decode
steps on one, where transfers and the start of a captured step are added.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import pstats
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo.batch import ForwardBatch, StepPlan
from octavo.bench import report
from octavo.blocks import BlockManager
from octavo.engine import Engine, InFlight
from octavo.graphs import StepGraphs, StepInputs, StepShape, StepShapes
from octavo.interfaces import AttentionBackend, AttentionSpec, Placement
from octavo.layers.attention import ForwardContext
from octavo.messages import EngineInfo, StepOutputs, Submit
from octavo.operations import SampleNeed
from octavo.request import SamplingParams
from octavo.runner import LaunchedStep, Runner
from octavo.sampling import TorchLogprobs, TorchSample
from octavo.scheduler import Scheduler
from octavo.speculation import NOTHING_DRAFTED
from octavo_cache.hash_chain import HashChain

CPU = torch.device("cpu")
BLOCK_SIZE = 16
VOCAB_SIZE = 256
PARTS = ("schedule", "launch", "settle")


class NoModel:
    """Hidden states that nobody computed."""

    def __init__(self) -> None:
        self._hidden = torch.zeros(16384, 1)
        self._logits = torch.zeros(16384, 1)

    def forward(self, tokens: Tensor, positions: Tensor, context: ForwardContext) -> Tensor:
        return self._hidden[: len(tokens)]

    def logits(self, hidden: Tensor) -> Tensor:
        return self._logits[: len(hidden)]


class NoAttention(AttentionBackend):
    """Has no cache and plans nothing."""

    name = "none"

    def __init__(self) -> None:
        pass

    @classmethod
    def missing(cls, need: Any) -> list[str]:
        return []

    def kv_shape(self, spec: AttentionSpec, num_blocks: int) -> tuple[int, ...]:
        return (num_blocks, 1)

    def plan(self, batch: ForwardBatch) -> None:
        return None

    def attend(self, query: Tensor, *_: Any) -> Tensor:
        return query


class NoGraphs(StepGraphs):
    """Captured steps that do nothing when they are replayed, and always find token 0."""

    def _can_capture(self, run: Callable[[], object]) -> bool:
        return True

    def _record(self, inputs: StepInputs, shape: StepShape) -> tuple[Callable[[], object], Tensor]:
        return lambda: None, torch.zeros(shape.num_logits, dtype=torch.int64)


def make_engine(num_rows: int, max_model_len: int) -> Engine:
    """An engine around the model that does nothing, with room for everyone and a prefix cache as usual."""
    num_blocks = num_rows * (max_model_len // BLOCK_SIZE + 1)
    runner = Runner(
        NoModel(),  # type: ignore[arg-type]
        NoAttention(),
        [],
        Placement(CPU, torch.float32),
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        kv_dtype=torch.float32,
        max_num_seqs=num_rows,
        max_model_len=max_model_len,
        vocab_size=VOCAB_SIZE,
        sample=TorchSample(SampleNeed(CPU, VOCAB_SIZE)),
        logprobs=TorchLogprobs(SampleNeed(CPU, VOCAB_SIZE)),
    )
    # padding may have the last slot here: nothing is computed
    runner.graphs = NoGraphs(runner._step, StepShapes(num_rows), runner._cache_slots, num_rows - 1, CPU)
    scheduler = Scheduler(
        BlockManager(num_blocks, BLOCK_SIZE, HashChain(BLOCK_SIZE)), max_num_seqs=num_rows, max_num_batched_tokens=8192
    )
    info = EngineInfo(
        "none", "none", "float32", "cpu", VOCAB_SIZE, max_model_len, num_blocks, BLOCK_SIZE, num_rows, 8192, "none", 0
    )
    return Engine(scheduler, runner, info)


class Parts:
    """The three parts of a step, one after the other, with somebody who times them."""

    def __init__(self, engine: Engine, watch: Callable[[str, Callable[[], Any]], Any]) -> None:
        self._engine = engine
        self._watch = watch

    def step(self) -> StepPlan:
        """Run one step; its plan."""
        engine, watch = self._engine, self._watch
        plan: StepPlan = watch("schedule", engine.scheduler.schedule)
        launched: LaunchedStep = watch("launch", lambda: engine.runner.launch(plan))
        outputs: StepOutputs = watch("settle", lambda: engine.settle(InFlight(launched, 0.0, NOTHING_DRAFTED)))
        assert len(outputs.sequences) == len(plan.rows) or any(row.num_tokens > 1 for row in plan.rows)
        return plan


def run(num_rows: int, num_steps: int, watch: Callable[[str, Callable[[], Any]], Any]) -> None:
    """``num_steps`` decode steps of ``num_rows`` greedy requests, watched; the first ones and the prompts are not."""
    engine = make_engine(num_rows, 64 + num_steps + 40)
    params = SamplingParams(temperature=0.0, max_tokens=num_steps + 32, ignore_eos=True)
    for row in range(num_rows):
        # prompts of different lengths: rows fill their blocks in different steps
        engine.submit(Submit(str(row), [row % VOCAB_SIZE] * (32 + row % BLOCK_SIZE), params, seed=row))
    gc.collect()
    gc.freeze()  # as the engine's own process does
    warm = Parts(engine, lambda _, part: part())
    while engine.scheduler.waiting or any(r.is_prefilling for r in engine.scheduler.running.values()):
        warm.step()
    for _ in range(16):
        warm.step()
    watched = Parts(engine, watch)
    for _ in range(num_steps):
        plan = watched.step()
        assert len(plan.rows) == plan.num_tokens == num_rows


def measure(num_rows: int, num_steps: int) -> dict[str, float]:
    """Milliseconds of each part of a step: the lower quartile, so that other load counts little."""
    seconds: dict[str, list[float]] = {part: [] for part in PARTS}

    def watch(part: str, work: Callable[[], Any]) -> Any:
        begin = time.thread_time()
        result = work()
        seconds[part].append(time.thread_time() - begin)
        return result

    run(num_rows, num_steps, watch)
    return {part: statistics.quantiles(times, n=4)[0] * 1e3 for part, times in seconds.items()}


def measure_prompt(num_tokens: int, num_prompts: int) -> dict[str, float]:
    """Milliseconds of each part for a prompt alone, all its chunks together: the lower quartile of so many prompts."""
    prompts: dict[str, list[float]] = {part: [] for part in PARTS}
    seconds = dict.fromkeys(PARTS, 0.0)

    def watch(part: str, work: Callable[[], Any]) -> Any:
        begin = time.thread_time()
        result = work()
        seconds[part] += time.thread_time() - begin
        return result

    engine = make_engine(1, num_tokens + 16)
    parts = Parts(engine, watch)
    draw = random.Random(0)
    gc.collect()
    gc.freeze()
    for index in range(num_prompts):
        seconds.update(dict.fromkeys(PARTS, 0.0))
        tokens = draw.choices(range(VOCAB_SIZE), k=num_tokens)
        engine.submit(Submit(str(index), tokens, SamplingParams(temperature=0.0, max_tokens=1), seed=index))
        while engine.has_work:
            parts.step()
        for part in PARTS:
            prompts[part].append(seconds[part])
    return {part: statistics.quantiles(times, n=4)[0] * 1e3 for part, times in prompts.items()}


def profile(num_rows: int, num_steps: int, wanted: str) -> None:
    """Print where one part's time goes."""
    profiler = cProfile.Profile()

    def watch(part: str, work: Callable[[], Any]) -> Any:
        return profiler.runcall(work) if part == wanted else work()

    run(num_rows, num_steps, watch)
    pstats.Stats(profiler).sort_stats("tottime").print_stats(16)


def main() -> None:
    """Print a row for every number of rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64, 256, 1024])
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=32768, metavar="TOKENS", help="length of the long prompt")
    parser.add_argument("--profile", choices=PARTS, help="show the functions of one part instead")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write every figure as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.profile:
        profile(args.rows[-1], args.steps, args.profile)
        return
    result = {}
    print(f"{'rows':>6}" + "".join(f"{part + ', ms':>14}" for part in PARTS) + f"{'all, ms':>10}{'a row, us':>12}")
    for num_rows in args.rows:
        result[num_rows] = times = measure(num_rows, args.steps)
        whole = sum(times.values())
        print(
            f"{num_rows:>6}"
            + "".join(f"{times[part]:>14.3f}" for part in PARTS)
            + f"{whole:>10.3f}{whole / num_rows * 1e3:>12.2f}",
            flush=True,
        )
    prompt = measure_prompt(args.prompt, 16)
    print(f"a prompt of {args.prompt} tokens: " + ", ".join(f"{part} {prompt[part]:.3f} ms" for part in PARTS))
    if args.save is not None:
        settings = {"rows": args.rows, "steps": args.steps, "prompt": args.prompt}
        report.save(args.save, "benchmarks/host.py", settings, {"ms": result, "prompt_ms": prompt})


if __name__ == "__main__":
    main()
