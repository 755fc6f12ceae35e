"""When the next step is launched: early enough for the device, late enough for whoever arrives meanwhile."""

from __future__ import annotations

import time
from dataclasses import dataclass

from tests.engines import submit

from octavo.batch import StepPlan
from octavo.blocks import BlockManager
from octavo.client import drive
from octavo.engine import Engine, InFlight
from octavo.messages import Command, EngineInfo, Shutdown
from octavo.request import SamplingParams
from octavo.runner import StepResult
from octavo.scheduler import Scheduler


class SlowDevice:
    """A runner whose steps take ``seconds`` each, one after the other, whenever they are launched."""

    processors = ()

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.free_at = 0.0

    def launch(self, plan: StepPlan) -> SlowStep:
        self.free_at = max(self.free_at, time.perf_counter()) + self.seconds
        return SlowStep(plan, self.free_at)


@dataclass
class SlowStep:
    plan: StepPlan
    done_at: float

    def is_done(self) -> bool:
        return time.perf_counter() >= self.done_at

    def wait(self) -> StepResult:
        time.sleep(max(0.0, self.done_at - time.perf_counter()))
        return StepResult([[1] if row.samples else [] for row in self.plan.rows], [None] * len(self.plan.rows))


def slow_engine(seconds: float, max_num_seqs: int = 2) -> Engine:
    scheduler = Scheduler(BlockManager(64, 16), max_num_seqs=max_num_seqs, max_num_batched_tokens=64)
    info = EngineInfo("m", "M", "none", "none", 64, 512, 64, 16, max_num_seqs, 64, "none", 0)
    return Engine(scheduler, SlowDevice(seconds), info, overlap=True)  # type: ignore[arg-type]


def run_steps(engine: Engine, count: int) -> InFlight:
    """The loop with overlap, as far as that many launches; the last is in flight."""
    in_flight = engine.launch()
    for _ in range(count):
        launched = engine.launch()
        engine.settle(in_flight)
        in_flight = launched
    assert in_flight is not None
    return in_flight


def test_the_next_launch_may_wait_until_shortly_before_the_device_runs_dry() -> None:
    engine = slow_engine(0.05)
    engine.submit(submit("r", [1, 2, 3], SamplingParams(max_tokens=100)))
    assert engine.patience(None) == 0.0
    assert engine.patience(run_steps(engine, 1)) == 0.0  # nothing is known of decodes yet
    in_flight = run_steps(engine, 6)
    assert 0.02 < engine.patience(in_flight) < 0.05
    time.sleep(0.05)
    assert engine.patience(in_flight) == 0.0


def test_nobody_is_waited_for_when_others_wait_already_or_the_host_is_behind() -> None:
    engine = slow_engine(0.05, max_num_seqs=1)
    engine.submit(submit("r", [1, 2, 3], SamplingParams(max_tokens=100)))
    in_flight = run_steps(engine, 6)
    engine.submit(submit("s", [1, 2, 3]))
    assert engine.patience(in_flight) == 0.0
    behind = slow_engine(0.0)
    behind.submit(submit("r", [1, 2, 3], SamplingParams(max_tokens=100)))
    assert behind.patience(run_steps(behind, 6)) == 0.0


def test_who_arrives_in_time_joins_the_next_step() -> None:
    engine, steps = slow_engine(0.05), []
    launch = engine.runner.launch
    engine.runner.launch = lambda plan: steps.append([r.request.request_id for r in plan.rows]) or launch(plan)  # type: ignore[method-assign]
    arriving = [[submit("early", [1, 2], SamplingParams(max_tokens=12))], [submit("late", [1, 2])]]

    def receive(timeout: float | None) -> list[Command]:
        if timeout is None:
            return arriving.pop(0) if arriving else [Shutdown()]
        if arriving and len(steps) == 6 and timeout > 0.0:  # in the middle of a step, where the loop waits
            time.sleep(timeout / 2)
            return arriving.pop(0)
        return []

    drive(engine, receive, lambda outputs: None)
    assert steps[5] == ["early"]
    assert steps[6] == ["early", "late"]
