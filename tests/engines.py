"""Engines without a client, for tests: build one, run requests to their ends in the real loop."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from octavo.client import drive
from octavo.config import EngineConfig
from octavo.engine import Engine
from octavo.messages import Command, Shutdown, StepOutputs, StepStats, Submit, TokenLogprobs
from octavo.request import FinishReason, SamplingParams
from octavo.startup import build_engine, resolve

GREEDY = SamplingParams(temperature=0.0, max_tokens=16)


@dataclass
class Sample:
    """All that the engine said about one sample of a request."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None
    num_cached: int = 0
    num_preemptions: int = 0


def make_engine(model: Path | str, **options: Any) -> Engine:
    """A small float32 engine on the CPU."""
    defaults = {"dtype": "float32", "device": "cpu", "num_blocks": 64, "max_num_seqs": 8, "num_threads": 1}
    return build_engine(resolve(EngineConfig(model=str(model), **{**defaults, **options})))


def submit(
    request_id: str, prompt: Sequence[int], params: SamplingParams = GREEDY, seed: int = 0, **more: Any
) -> Submit:
    return Submit(request_id, list(prompt), params, params.seed if params.seed is not None else seed, **more)


def run(
    engine: Engine, submits: Iterable[Command], later: Mapping[int, Sequence[Command]] | None = None
) -> dict[tuple[str, int], Sample]:
    """Run until everybody has ended; ``later`` maps a number of steps to the commands that arrive then.

    The scheduler proves its invariants after every step, and at the end nothing is held any more.
    """
    samples: dict[tuple[str, int], Sample] = {}
    arriving = {step: list(commands) for step, commands in (later or {}).items()}
    arriving[0] = [*submits, *arriving.get(0, [])]
    steps: list[StepStats] = []

    def receive(timeout: float | None) -> list[Command]:
        due = [step for step in sorted(arriving) if step <= len(steps)]
        if not due and timeout is None:  # idle: time passes
            due = sorted(arriving)[:1]
        if not due:
            return [Shutdown()] if timeout is None else []
        return [command for step in due for command in arriving.pop(step)]

    def send(outputs: StepOutputs) -> None:
        steps.append(outputs.stats)
        engine.check()
        for output in outputs.sequences:
            sample = samples.setdefault((output.request_id, output.index), Sample())
            assert sample.finish_reason is None, "said something after its end"
            sample.tokens += output.token_ids
            sample.logprobs += output.logprobs or []
            sample.prompt_logprobs = sample.prompt_logprobs or output.prompt_logprobs
            sample.finish_reason, sample.error = output.finish_reason, output.error
            sample.num_cached = max(sample.num_cached, output.num_cached_tokens)
            if output.timing is not None:
                sample.num_preemptions = output.timing.num_preemptions

    drive(engine, receive, send)
    assert all(sample.finish_reason is not None for sample in samples.values())
    assert engine.scheduler.blocks.num_free == engine.scheduler.blocks.num_blocks
    return samples
