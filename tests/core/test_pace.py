"""When the next step is launched: early enough for the device, late enough for whoever arrives meanwhile."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from tests.engines import submit

import octavo.engine
from octavo.batch import StepPlan
from octavo.blocks import BlockManager
from octavo.client import drive
from octavo.engine import Engine, InFlight
from octavo.messages import Command, EngineInfo, Shutdown
from octavo.pace import MARGIN, Pace
from octavo.request import SamplingParams
from octavo.runner import StepResult
from octavo.scheduler import Scheduler

FOREVER = SamplingParams(max_tokens=100)


def decoding(*seconds: float) -> Pace:
    """After steps of so many seconds, each launched while the one before it ran."""
    pace, now = Pace(), 0.0
    for each in seconds:
        launched_at, now = now, now + each
        pace.finished(launched_at, now, was_done=False, has_prompts=False)
    return pace


def test_a_launch_waits_until_two_launches_before_the_end_of_the_step_under_way() -> None:
    pace = decoding(0.01, 0.01, 0.01, 0.01)
    assert pace.spare(0.033, 0.034, now=0.04) == pytest.approx(0.01 - 0.002 - MARGIN)
    assert pace.spare(0.033, 0.034, now=0.045) == pytest.approx(0.005 - 0.002 - MARGIN)
    assert pace.spare(0.033, 0.034, now=0.06) == 0.0


def test_the_shortest_of_the_newest_decodes_counts() -> None:
    assert decoding(0.02, 0.01, 0.02, 0.02).spare(0.07, 0.07, now=0.07) == pytest.approx(0.01 - MARGIN)
    assert decoding(0.01, 0.02, 0.02, 0.02, 0.02).spare(0.09, 0.09, now=0.09) == pytest.approx(0.02 - MARGIN)
    assert decoding(0.02).spare(0.02, 0.02, now=0.02) == 0.0, "of too few nothing is known"


def test_steps_with_prompts_say_nothing_of_decodes() -> None:
    pace = decoding(0.01, 0.01, 0.01, 0.01)
    pace.finished(0.04, 0.041, was_done=False, has_prompts=True)
    assert pace.spare(0.041, 0.041, now=0.041) == pytest.approx(0.01 - MARGIN)


def test_a_host_that_is_late_does_not_wait() -> None:
    pace = decoding(0.01, 0.01, 0.01, 0.01)
    pace.finished(0.04, 0.06, was_done=True, has_prompts=False)
    assert pace.spare(0.06, 0.06, now=0.06) == 0.0


@dataclass
class Clock:
    """Time that passes only where it is told to."""

    now: float = 100.0

    def perf_counter(self) -> float:
        return self.now

    monotonic = perf_counter


class SlowDevice:
    """A runner whose steps take ``seconds`` each, one after the other, whenever they are launched."""

    processors = ()

    def __init__(self, clock: Clock, seconds: float) -> None:
        self.clock = clock
        self.seconds = seconds
        self.free_at = 0.0
        self.steps: list[list[str]] = []  # who took part

    def launch(self, plan: StepPlan) -> SlowStep:
        self.steps.append([row.request.request_id for row in plan.rows])
        self.free_at = max(self.free_at, self.clock.now) + self.seconds
        return SlowStep(plan, self.clock, self.free_at)


@dataclass
class SlowStep:
    plan: StepPlan
    clock: Clock
    done_at: float

    def is_done(self) -> bool:
        return self.clock.now >= self.done_at

    def wait(self) -> StepResult:
        self.clock.now = max(self.clock.now, self.done_at)
        return StepResult([[1] if row.samples else [] for row in self.plan.rows], [None] * len(self.plan.rows))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(octavo.engine, "time", clock)
    return clock


def slow_engine(clock: Clock, seconds: float, max_num_seqs: int = 2) -> tuple[Engine, SlowDevice]:
    scheduler = Scheduler(BlockManager(64, 16), max_num_seqs=max_num_seqs, max_num_batched_tokens=64)
    info = EngineInfo("m", "M", "none", "none", 64, 512, 64, 16, max_num_seqs, 64, "none", 0)
    device = SlowDevice(clock, seconds)
    return Engine(scheduler, device, info, overlap=True), device  # type: ignore[arg-type]


def run_steps(engine: Engine, count: int) -> InFlight:
    """The loop with overlap, as far as that many launches; the last is in flight."""
    in_flight = engine.launch()
    for _ in range(count):
        launched = engine.launch()
        engine.settle(in_flight)
        in_flight = launched
    assert in_flight is not None
    return in_flight


def test_the_next_launch_may_wait_until_shortly_before_the_device_runs_dry(clock: Clock) -> None:
    engine, _ = slow_engine(clock, 0.05)
    engine.submit(submit("r", [1, 2, 3], FOREVER))
    assert engine.patience(None) == 0.0
    assert engine.patience(run_steps(engine, 1)) == 0.0  # nothing is known of decodes yet
    in_flight = run_steps(engine, 6)
    assert engine.patience(in_flight) == pytest.approx(0.05 - MARGIN)
    clock.now += 0.05
    assert engine.patience(in_flight) == 0.0


def test_nobody_is_waited_for_when_others_wait_already(clock: Clock) -> None:
    engine, _ = slow_engine(clock, 0.05, max_num_seqs=1)
    engine.submit(submit("r", [1, 2, 3], FOREVER))
    in_flight = run_steps(engine, 6)
    engine.submit(submit("s", [1, 2, 3]))
    assert engine.patience(in_flight) == 0.0


def test_who_arrives_in_time_joins_the_next_step(clock: Clock) -> None:
    engine, device = slow_engine(clock, 0.05)
    arriving = [[submit("early", [1, 2], SamplingParams(max_tokens=12))], [submit("late", [1, 2])]]

    def receive(timeout: float | None) -> list[Command]:
        if timeout is None:
            return list(arriving.pop(0)) if arriving else [Shutdown()]
        if arriving and len(device.steps) == 7 and timeout > 0.0:  # in the middle of a step, where the loop waits
            clock.now += timeout / 2
            return list(arriving.pop(0))
        return []

    drive(engine, receive, lambda outputs: None)
    assert device.steps[6] == ["early"]
    assert device.steps[7] == ["early", "late"]
