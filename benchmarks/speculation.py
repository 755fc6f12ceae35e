"""What speculation brings on one GPU, by acceptance and batch: ``python benchmarks/speculation.py [--save FILE]``.

The target has the shape of Llama-3.1-8B and random weights, but the layers after its first few add nothing: their
output projections are zero, while every kernel does its full work. So a draft of those first layers shares its
distribution, and noise on the draft's output head sets how often its guesses are right. Everything is greedy. Speeds
are those of requests with cached prompts, by the time until their answers are complete, compared with the same engine
without speculation; of small batches, those of several with other prompts, for each of which the engine is new. How
often drafts are right differs from prompt to prompt, so a run ends later than most of its requests: "run" is until the
last is complete.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from gpu import LLAMA_8B

from octavo.bench import report
from octavo.bench.datasets import random_requests
from octavo.client import drive
from octavo.config import EngineConfig, SpeculativeConfig
from octavo.engine import Engine
from octavo.messages import Command, Shutdown, StepOutputs, Submit
from octavo.request import SamplingParams
from octavo.speculation import AdaptiveController, Controller, FixedController, NoSpeculation, Speculation
from octavo.startup import build_engine, resolve
from octavo_speculative.beside import BlockContents

NUM_DRAFT_LAYERS = 3  # 2.4 GB of 15: about the part of a model of a billion parameters
ACCEPTANCES = (0.0, 0.6, 0.8, 1.0)
BATCHES = (1, 8, 32, 128)
MUST_SPEEDUP, MUST_LOSS = 1.6, 0.02
FIXED_TOKENS = 48  # of the runs that say how many drafts are right
NUM_PROMPTS = 4  # at least: smaller batches are measured several times, since how many drafts are right differs


@dataclass
class Counts:
    """What a run brought."""

    seconds: float = 0.0
    request_seconds: float = 0.0  # until each answer was complete, added up
    num_tokens: int = 0
    num_steps: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted: int = 0
    per_position: list[int] = field(default_factory=list)
    seconds_saved: float = 0.0

    def add(self, other: Counts) -> None:
        """Take another run for a part of this one."""
        for item in fields(self):
            mine, others = getattr(self, item.name), getattr(other, item.name)
            is_list = isinstance(mine, list)
            setattr(self, item.name, [a + b for a, b in zip(mine, others, strict=True)] if is_list else mine + others)

    @property
    def acceptance(self) -> float:
        """How often a draft that was put to the test was right, if all rows had as many drafts as they may."""
        num_wrong = self.num_drafts - self.per_position[-1]
        return self.num_accepted / max(1, self.num_accepted + num_wrong)

    @property
    def length(self) -> float:
        """Tokens that a row with drafts brings in a step."""
        return 1.0 + self.num_accepted / max(1, self.num_drafts)


class Bench:
    """One engine with a draft model, whose speculation is switched and whose noise is set between runs."""

    def __init__(self, folder: Path, num_tokens: int) -> None:
        target, draft = folder / "target", folder / "draft"
        for path, num_layers in ((target, LLAMA_8B["num_hidden_layers"]), (draft, NUM_DRAFT_LAYERS)):
            path.mkdir()
            (path / "config.json").write_text(json.dumps({**LLAMA_8B, "num_hidden_layers": num_layers}))
        speculative = SpeculativeConfig(model=str(draft), num_tokens=num_tokens)
        config = EngineConfig(
            model=str(target), load_format="dummy", max_model_len=4096, max_num_seqs=128, speculative=speculative
        )
        self.engine: Engine = build_engine(resolve(config))
        self.num_tokens = num_tokens
        speculation = self.engine._speculation
        assert isinstance(speculation, Speculation)
        assert isinstance(speculation._controller, AdaptiveController)
        estimates = speculation._controller
        self._costs = estimates._draft_cost, estimates._reading_cost
        model: Any = self.engine.runner.model
        for layer in model.layers[NUM_DRAFT_LAYERS:]:
            layer.attention.output.method.weight.zero_()
            layer.mlp.down.method.weight.zero_()
        self._drafter: Any = speculation._drafter
        self._head = self._drafter._runner.model.head.method.weight
        self._exact = model.head.method.weight
        self._noise = torch.randn_like(self._exact) * self._exact.std()
        self._name = 0
        gc.collect()
        gc.freeze()  # as the engine's own process does

    def speculate(self, controller: Controller | None) -> None:
        """From now on with this controller, which knows nothing yet; None: without speculation."""
        self.engine._speculation = (
            NoSpeculation()
            if controller is None
            else Speculation(self._drafter, controller, self.engine.scheduler, self.num_tokens)
        )

    def adapt(self) -> AdaptiveController:
        """The controller of a new engine."""
        return AdaptiveController(self.num_tokens, *self._costs)

    def forget(self) -> None:
        """As in a new engine: the draft model has read nothing yet."""
        self._drafter._contents = BlockContents(self.engine.runner.num_blocks, self.engine.info.block_size)

    def disturb(self, noise: float) -> None:
        """Add noise to the draft's output head, in units of its weights' deviation."""
        self._head.copy_(self._exact)
        self._head.add_(self._noise, alpha=noise)

    def run(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> Counts:
        """All prompts at once until the last token."""
        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        submits: list[Command] = []
        for prompt in prompts:
            self._name += 1
            submits.append(Submit(str(self._name), list(prompt), params, seed=0))
        commands, counts = [submits], Counts(per_position=[0] * self.num_tokens)

        def receive(timeout: float | None) -> list[Command]:
            if commands:
                return commands.pop()
            return [Shutdown()] if timeout is None else []

        def send(outputs: StepOutputs) -> None:
            stats = outputs.stats
            counts.num_steps += 1
            counts.num_tokens += stats.num_output_tokens
            counts.num_drafts += stats.num_drafts
            counts.num_draft_tokens += stats.num_draft_tokens
            counts.num_accepted += stats.num_accepted_tokens
            counts.seconds_saved += stats.seconds_saved
            for position, number in enumerate(stats.accepted_per_position):
                counts.per_position[position] += number
            num_finished = sum(sequence.finish_reason is not None for sequence in outputs.sequences)
            counts.request_seconds += num_finished * (time.perf_counter() - started)

        started = time.perf_counter()
        drive(self.engine, receive, send)
        counts.seconds = time.perf_counter() - started
        return counts

    def calibrate(self, acceptance: float, prompts: Sequence[Sequence[int]], num_runs: int = 6) -> float:
        """The noise at which about so many drafts are right, by bisection."""
        if acceptance in (0.0, 1.0):
            return 0.0 if acceptance else 30.0
        self.speculate(FixedController(self.num_tokens))
        low, high = 0.0, 0.5
        for _ in range(num_runs):
            self.disturb((low + high) / 2)
            if self.run(prompts, FIXED_TOKENS).acceptance > acceptance:
                low = (low + high) / 2
            else:
                high = (low + high) / 2
        return (low + high) / 2


def prompts_of(bench: Bench, count: int, seed: int) -> list[list[int]]:
    """Random tokens, as long as where decoding is measured."""
    length = 128 if count == 1 else 1024
    made = random_requests(count, input_len=length, output_len=1, vocab_size=bench.engine.info.vocab_size, seed=seed)
    return [list(request.token_ids or ()) for request in made]


def groups_of(bench: Bench, batch: int) -> list[list[list[int]]]:
    """Batches of so many prompts, each of which is measured by itself."""
    return [prompts_of(bench, batch, seed=batch + 10_000 * group) for group in range(-(-NUM_PROMPTS // batch))]


def measure_group(bench: Bench, prompts: Sequence[Sequence[int]], num_tokens: int, seed: int) -> list[Counts]:
    """Three runs of an engine that is new to the first, one between them without drafts, as the device's speed changes
    with its temperature, and one with as many drafts as there may be: plain, first, second, third, fixed."""
    controller = bench.adapt()
    bench.speculate(controller)
    bench.forget()
    bench.run(prompts_of(bench, 2, seed), 1)  # what a token of a prompt takes
    first, second = bench.run(prompts, num_tokens), bench.run(prompts, num_tokens)
    bench.speculate(None)
    plain = bench.run(prompts, num_tokens)
    bench.speculate(controller)
    third = bench.run(prompts, num_tokens)
    bench.speculate(FixedController(bench.num_tokens))
    return [plain, first, second, third, bench.run(prompts, FIXED_TOKENS)]


def measure(args: argparse.Namespace, folder: Path) -> None:
    """Every row, printed and saved as soon as it is there."""
    bench = Bench(folder, args.num_tokens)
    arguments = {"num_tokens": args.num_tokens, "output_tokens": args.output_tokens}
    print("start-up", bench.engine.info.startup_seconds, flush=True)
    groups = {batch: groups_of(bench, batch) for batch in args.batches}
    rows: list[dict[str, float]] = []
    bench.speculate(None)
    for prompts in chain.from_iterable(groups.values()):
        bench.run(prompts, 4)  # into the prefix cache
    print("acceptance batch measured  length plain ms drafted   first    then     run")
    calibration = prompts_of(bench, 16, seed=99)
    for acceptance in args.acceptances:
        noise = bench.calibrate(acceptance, calibration)
        bench.disturb(noise)
        for batch, batch_groups in groups.items():
            totals = [Counts(per_position=[0] * args.num_tokens) for _ in range(5)]
            for group, prompts in enumerate(batch_groups):
                seed = 1000 + len(rows) * NUM_PROMPTS + group
                for total, counts in zip(totals, measure_group(bench, prompts, args.output_tokens, seed), strict=True):
                    total.add(counts)
            plain, first, then, third, fixed = totals
            then.add(third)
            speedups = [plain.request_seconds / first.request_seconds, 2 * plain.request_seconds / then.request_seconds]
            plain_ms = plain.seconds / len(batch_groups) / args.output_tokens * 1e3
            row = {
                "acceptance": acceptance,
                "batch": batch,
                "noise": noise,
                "measured_acceptance": fixed.acceptance,
                "acceptance_length": fixed.length,
                "drafts_per_token": then.num_draft_tokens / then.num_tokens,
                "num_groups": len(batch_groups),
                "plain_ms": plain_ms,
                "seconds": then.seconds / 2,
                "seconds_saved_estimate": then.seconds_saved / 2,
                "first_speedup": speedups[0],
                "speedup": speedups[1],
                "run_speedup": 2 * plain.seconds / then.seconds,
            }
            rows.append(row)
            lowest = min(*speedups, row["run_speedup"])
            bad = lowest < 1.0 - MUST_LOSS or (batch == 1 and acceptance == 0.8 and speedups[1] < MUST_SPEEDUP)
            print(
                f"{acceptance:>10}{batch:>6}{fixed.acceptance:>9.3f}{fixed.length:>8.2f}{plain_ms:>9.3f}"
                f"{row['drafts_per_token']:>8.2f}"
                f"{speedups[0]:>8.3f}{speedups[1]:>8.3f}{row['run_speedup']:>8.3f}{'  <--' if bad else ''}",
                flush=True,
            )
            if args.save is not None:
                report.save(args.save, "benchmarks/speculation.py", arguments, {"rows": rows})


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--num-tokens", type=int, default=4, help="drafts at most (default: %(default)s)")
    parser.add_argument("--output-tokens", type=int, default=256, help="tokens for each prompt (default: %(default)s)")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--acceptances", type=float, nargs="+", default=ACCEPTANCES)
    parser.add_argument("--save", type=Path, metavar="FILE", help="write every figure as JSON")
    args = parser.parse_args()
    logging.basicConfig(level="INFO", format="%(message)s")
    with tempfile.TemporaryDirectory() as folder:
        measure(args, Path(folder))


if __name__ == "__main__":
    main()
