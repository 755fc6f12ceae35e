"""Hours of everything at once, for leaks: ``python benchmarks/soak.py MODEL --minutes 60``.

Requests of all kinds arrive at random while others are aborted; the cache is small, so that it is full and requests
are preempted all the time. The engine proves its invariants again and again; at the end no block may be held, and
the memory of the process (and the GPU's) is printed over time. ``benchmarks/gpu.py soak`` does the same with a large
model on a GPU.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter
from pathlib import Path

import torch

from octavo.config import EngineConfig
from octavo.engine import Engine
from octavo.messages import Abort, Submit
from octavo.request import SamplingParams
from octavo.startup import build_engine, resolve

GRAPHS_BYTES = 512 * 2**20  # what steps captured under way may keep on a GPU


def random_submit(name: str, engine: Engine, pick: random.Random) -> Submit:
    """Any prompt that fits, often one that shares its beginning with others; any sampling parameters."""
    limit, vocab_size = engine.info.max_model_len, engine.info.vocab_size
    size = pick.choice([1, 5, 20, limit // 4, limit - 2])
    beginning = [pick.randrange(4)] * min(size, pick.choice([0, 16, 40]))
    prompt = [*beginning, *(pick.randrange(vocab_size) for _ in range(size - len(beginning)))]
    params = SamplingParams(
        n=pick.choice([1, 1, 1, 4]),
        temperature=pick.choice([0.0, 0.7, 1.5]),
        top_p=pick.choice([1.0, 0.8]),
        top_k=pick.choice([0, 20]),
        min_p=pick.choice([0.0, 0.05]),
        repetition_penalty=pick.choice([1.0, 1.2]),
        frequency_penalty=pick.choice([0.0, 0.5]),
        max_tokens=pick.choice([1, 8, 64, None]),
        min_tokens=pick.choice([0, 1]),
        logprobs=pick.choice([None, None, 3]),
        prompt_logprobs=pick.choice([None, None, None, 2]),
        logit_bias=pick.choice([None, {3: 1.0}]),
        bad_words=pick.choice([(), ("x",)]),
        stop_token_ids=pick.choice([(), (7, 8)]),
    )
    return Submit(name, prompt, params, seed=pick.randrange(2**62), bad_token_ids=[[5, 6]] if params.bad_words else [])


def device_memory(engine: Engine) -> int:
    """Bytes that torch has allocated on the engine's GPU; 0 on a CPU."""
    return torch.cuda.memory_allocated() if engine.info.device.startswith("cuda") else 0


def memory(engine: Engine) -> str:
    """What the process holds of the machine's memory, after Linux, and of the GPU's."""
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    return f"{resident / 2**20:8.1f} MiB, GPU {device_memory(engine) / 2**20:8.1f} MiB"


def soak(engine: Engine, minutes: float, seed: int) -> None:
    """Load for the given time, a line per tenth of it, then the rest; raises AssertionError on a broken invariant."""
    pick = random.Random(seed)
    open_samples: dict[str, int] = {}
    counts: Counter[str] = Counter()
    end = time.monotonic() + minutes * 60
    next_line = 0.0
    num_submitted = num_steps = 0
    in_flight = None
    before = device_memory(engine)
    while time.monotonic() < end or open_samples:
        arriving = time.monotonic() < end
        if arriving and len(open_samples) < 4 * engine.info.max_num_seqs and pick.random() < 0.3:
            submit = random_submit(str(num_submitted), engine, pick)
            num_submitted += 1
            open_samples[submit.request_id] = submit.params.n
            engine.submit(submit)
        if open_samples and pick.random() < (0.01 if arriving else 0.2):  # in the end most of what is left
            engine.abort(Abort(pick.choice(list(open_samples)), pick.choice([None, 0])))
        launched = engine.launch()
        outputs = engine.settle(in_flight) if in_flight or not launched else None
        in_flight = launched
        if in_flight and not engine.overlap:
            outputs, in_flight = engine.settle(in_flight), None
        num_steps += 1
        if num_steps % 50 == 0:
            engine.check()
        for output in outputs.sequences if outputs else ():
            counts["tokens"] += len(output.token_ids)
            assert output.error is None, output.error
            if output.finish_reason is not None:
                counts[str(output.finish_reason)] += 1
                open_samples[output.request_id] -= 1
                if not open_samples[output.request_id]:
                    del open_samples[output.request_id]
        counts["preemptions"] += outputs.stats.num_preemptions if outputs else 0
        counts["prefix hits"] += outputs.stats.num_prefix_hits if outputs else 0
        if time.monotonic() >= next_line:
            next_line = time.monotonic() + minutes * 6
            print(f"{num_steps:9} steps  {memory(engine)}  {dict(counts)}", flush=True)
    if in_flight is not None:
        engine.settle(in_flight)  # of requests that ended meanwhile
    engine.check()
    kept = device_memory(engine) - before
    assert kept < GRAPHS_BYTES, f"{kept / 2**20:.0f} MiB more than before are allocated on the GPU"
    blocks = engine.scheduler.blocks
    assert blocks.num_free == blocks.num_blocks, f"{blocks.num_blocks - blocks.num_free} blocks are lost"
    print(f"{num_steps:9} steps  {memory(engine)}  {dict(counts)}; every block is free")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--overlap", action="store_true")
    parser.add_argument("--max-model-len", type=int, default=256)
    parser.add_argument("--num-blocks", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    config = EngineConfig(
        model=args.model,
        device=args.device,
        overlap=args.overlap or None,
        max_model_len=args.max_model_len,
        num_blocks=args.num_blocks,
        max_num_seqs=16,
        max_num_batched_tokens=64,
    )
    soak(build_engine(resolve(config)), args.minutes, args.seed)


if __name__ == "__main__":
    main()
