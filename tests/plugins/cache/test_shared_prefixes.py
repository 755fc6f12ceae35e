"""The scheduler with a prefix cache: nothing is computed twice that is known or under way, and nothing leaks."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from tests.memory import PagedMemory

from octavo.batch import StepPlan
from octavo.blocks import BlockManager
from octavo.request import FinishReason, Request, RequestState, SamplingParams
from octavo.scheduler import Scheduler
from octavo_cache.hash_chain import HashChain

BLOCK = 4


def make_scheduler(num_blocks: int = 4096, **options: int) -> Scheduler:
    cache = HashChain(BLOCK)
    limits = {"max_num_seqs": 64, "max_num_batched_tokens": 64, **options}
    return Scheduler(BlockManager(num_blocks, BLOCK, cache), **limits)


def make_request(name: str, prompt: Sequence[int], num_output: int = 1, **more: object) -> Request:
    return Request(name, prompt, SamplingParams(), seed=0, max_total_tokens=len(prompt) + num_output, **more)


class Run:
    """Steps of a scheduler over a memory that checks what is read, with up to ``depth`` steps in flight."""

    def __init__(self, scheduler: Scheduler, depth: int = 0) -> None:
        self.scheduler = scheduler
        self.memory = PagedMemory(BLOCK)
        self.plans: list[StepPlan] = []
        self._depth = depth
        self._in_flight: list[tuple[StepPlan, list[list[int]]]] = []

    @property
    def num_tokens(self) -> int:
        """Computed so far."""
        return sum(plan.num_tokens for plan in self.plans)

    def step(self) -> StepPlan:
        plan = self.scheduler.schedule()
        self.scheduler.check()
        assert plan.num_tokens <= self.scheduler.max_num_batched_tokens
        if plan:
            self.plans.append(plan)
            self._in_flight.append((plan, self.memory.run(plan)))
        while len(self._in_flight) > self._depth or (self._in_flight and not plan):
            self.scheduler.settle(*self._in_flight.pop(0))
            self.scheduler.check()
        return plan

    def finish(self, *requests: Request) -> None:
        """Until everything is done."""
        for request in requests:
            self.scheduler.add(request)
        for _ in range(5000):
            if not self.scheduler.has_work:
                break
            self.step()
        assert not self.scheduler.has_work
        assert self.scheduler.blocks.num_free == self.scheduler.blocks.num_blocks


def rows(plan: StepPlan) -> dict[str, tuple[int, int]]:
    """From where to where each request is computed in the step."""
    return {row.request.request_id: (row.start, row.end) for row in plan.rows}


PREFIX = list(range(40))


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("max_num_batched_tokens", [7, 16, 64, 1024])
def test_a_prefix_that_arrives_many_times_at_once_is_computed_once(max_num_batched_tokens: int, depth: int) -> None:
    run = Run(make_scheduler(max_num_batched_tokens=max_num_batched_tokens), depth)
    run.finish(*(make_request(f"r{i}", [*PREFIX, 100 + i, 200 + i, 300 + i]) for i in range(16)))
    assert run.num_tokens == 40 + 16 * 3


def test_what_a_step_computes_is_shared_in_that_step() -> None:
    run = Run(make_scheduler(max_num_batched_tokens=1024))
    run.finish(*(make_request(f"r{i}", [*PREFIX, 100 + i]) for i in range(8)))
    assert len(run.plans) == 1


def test_who_waits_for_a_prefix_delays_nobody_behind_it() -> None:
    run = Run(make_scheduler(max_num_batched_tokens=16, max_num_partial_prefills=2))
    for request in (make_request("a", [*PREFIX, 1]), make_request("b", [*PREFIX, 2]), make_request("c", [7, 8, 9])):
        run.scheduler.add(request)
    assert rows(run.step()) == {"a": (0, 13), "c": (0, 3)}
    assert [request.request_id for request in run.scheduler.waiting] == ["b"]


def test_who_waits_for_a_prefix_starts_in_the_step_that_completes_it() -> None:
    run = Run(make_scheduler(max_num_batched_tokens=24, max_num_partial_prefills=1))
    for request in (make_request("a", [*PREFIX, 1]), make_request("b", [*PREFIX, 2])):
        run.scheduler.add(request)
    assert rows(run.step()) == {"a": (0, 24)}
    assert rows(run.step()) == {"a": (24, 41), "b": (40, 41)}


def test_a_request_waits_only_for_what_it_has_in_common() -> None:
    run = Run(make_scheduler(max_num_batched_tokens=16, max_num_partial_prefills=2))
    run.scheduler.add(make_request("a", PREFIX))
    run.scheduler.add(make_request("b", [*PREFIX[:16], 50, 51]))
    assert rows(run.step()) == {"a": (0, 16)}
    assert rows(run.step())["b"] == (16, 18)


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("preempted", [False, True])
def test_when_the_first_goes_away_the_next_takes_over_where_it_stood(preempted: bool, depth: int) -> None:
    run = Run(make_scheduler(max_num_batched_tokens=8), depth)
    first, second = make_request("a", [*PREFIX, 1]), make_request("b", [*PREFIX, 2])
    for request in (first, second):
        run.scheduler.add(request)
    run.step()
    run.step()
    assert second.state is RequestState.WAITING
    if preempted:
        run.scheduler._preempt(first)
    else:
        run.scheduler.finish(first, FinishReason.ABORT)
    run.finish()
    assert second.num_output == 1
    assert run.num_tokens == 40 + (2 if preempted else 1)


def test_namespaces_do_not_share_what_is_under_way() -> None:
    run = Run(make_scheduler(max_num_batched_tokens=1024))
    run.finish(*(make_request(f"r{i}", [*PREFIX, i], salt=bytes([i % 2])) for i in range(6)))
    assert run.num_tokens == 2 * 40 + 6
    assert len(run.plans) == 1


def test_samples_of_requests_that_share_a_prefix_share_it_too() -> None:
    run = Run(make_scheduler(max_num_batched_tokens=16))
    requests: list[Request] = []
    for name in "ab":
        first = make_request(name, [*PREFIX, ord(name)], 6)
        requests.append(first)
        requests += [
            Request(name, first.tokens, first.params, seed=i, max_total_tokens=47, index=i, fork_of=first)
            for i in (1, 2)
        ]
    run.finish(*requests)
    assert run.num_tokens == 40 + 6 * 6  # each sample computes the prompt's last token and its own but the last


def test_the_next_turn_of_a_chat_finds_what_was_generated() -> None:
    run = Run(make_scheduler())
    first = make_request("turn 1", PREFIX[:10], 12)
    run.finish(first)
    before = run.num_tokens
    second = make_request("turn 2", [*first.tokens, 90, 91, 92], 1)
    run.finish(second)
    # 22 tokens of which the last was sampled and never computed: 5 full blocks
    assert second.num_cached == 20
    assert run.num_tokens - before == 5


def test_a_preempted_request_comes_back_through_the_cache() -> None:
    run = Run(make_scheduler())
    request = make_request("a", PREFIX[:10], 12)
    run.scheduler.add(request)
    for _ in range(8):
        run.step()
    assert request.num_output == 8
    run.scheduler._preempt(request)
    assert rows(run.step()) == {"a": (16, 18)}  # 17 tokens were computed, 16 of them in full blocks
    run.finish()
    assert request.num_output == 12
    assert request.num_cached == 0  # not found when it first came


def test_lookups_are_counted_once_for_each_admission() -> None:
    run = Run(make_scheduler(max_num_batched_tokens=8))
    run.finish(*(make_request(f"r{i}", [*PREFIX, i]) for i in range(3)))
    assert sum(plan.num_prefix_queries for plan in run.plans) == 3 * 41
    assert sum(plan.num_prefix_hits for plan in run.plans) == 2 * 40


def random_requests(random: Random, count: int, longest: int) -> list[Request]:
    """Prompts that branch from each other, in two namespaces, some with several samples, some that read everything."""
    requests: list[Request] = []
    stem = [random.randint(0, 1) for _ in range(longest)]
    for number in range(count):
        common = random.randint(0, longest - 2)
        own = [random.randint(0, 1) for _ in range(random.randint(1, longest - 1 - common))]
        prompt = [*stem[:common], *own]
        params = SamplingParams(prompt_logprobs=0) if random.randint(0, 9) == 0 else SamplingParams()
        total, salt = random.randint(len(prompt) + 1, longest), random.choice([b"", b"", b"x"])
        first: Request | None = None
        for index in range(random.choice([1, 1, 1, 3])):
            request = Request(
                f"r{number}",
                prompt,
                params,
                seed=index,
                max_total_tokens=total,
                index=index,
                salt=salt,
                fork_of=first,
                needs_history=random.randint(0, 9) == 0,
            )
            first = first or request
            requests.append(request)
    return requests


def drive(random: Random, run: Run, requests: Sequence[Request], *, aborts: bool, preemptions: bool) -> None:
    """Arrivals in the middle; now and then somebody leaves or gives way."""
    arriving, scheduler = list(requests), run.scheduler
    for _ in range(4000):
        if not (arriving or scheduler.has_work):
            break
        for _ in range(min(random.randint(0, 3), len(arriving))):
            scheduler.add(arriving.pop(0))
        unfinished = [*scheduler.running.values(), *scheduler.waiting]
        if aborts and unfinished and random.randint(0, 15) == 0:
            scheduler.finish(random.choice(unfinished), FinishReason.ABORT)
        if preemptions and scheduler.running and random.randint(0, 15) == 0:
            scheduler._preempt(random.choice(list(scheduler.running.values())))
        run.step()
    assert all(request.finished for request in requests)
    assert all(
        len(request.tokens) == request.max_total_tokens
        for request in requests
        if request.finish_reason is FinishReason.LENGTH
    )
    assert scheduler.blocks.num_free == scheduler.blocks.num_blocks


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32))
def test_everyone_reads_its_own_whatever_happens(seed: int) -> None:
    """Few blocks, so that contents are evicted and requests give way."""
    random = Random(seed)
    longest = random.choice([12, 24, 48])
    scheduler = make_scheduler(
        random.randint(longest // BLOCK, 40),
        max_num_seqs=random.randint(1, 6),
        max_num_batched_tokens=random.randint(3, 40),
        max_num_partial_prefills=random.randint(1, 3),
    )
    run = Run(scheduler, depth=random.randint(0, 1))
    drive(random, run, random_requests(random, random.randint(1, 9), longest), aborts=True, preemptions=True)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32))
def test_no_block_of_a_prompt_is_computed_twice(seed: int) -> None:
    """Whoever leaves or gives way, as long as nothing is evicted and nobody asks for logits of the prompt."""
    random = Random(seed)
    scheduler = make_scheduler(
        400,
        max_num_seqs=random.randint(1, 8),
        max_num_batched_tokens=random.randint(3, 60),
        max_num_partial_prefills=random.randint(1, 3),
    )
    run = Run(scheduler, depth=random.randint(0, 1))
    requests = [r for r in random_requests(random, random.randint(2, 9), 48) if r.params.prompt_logprobs is None]
    drive(random, run, requests, aborts=True, preemptions=True)
    # a prompt's last token is computed for each request, whatever is known of it
    last = {run.memory.contents(request, request.num_prompt)[-1] for request in requests}
    for request in requests:
        ends_of_blocks = run.memory.contents(request, request.num_prompt)[BLOCK - 1 :: BLOCK]
        assert all(run.memory.num_computed.get(end, 0) <= 1 for end in ends_of_blocks if end not in last), request
