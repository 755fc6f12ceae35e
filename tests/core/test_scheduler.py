"""The scheduler: everyone gets everything in the end, whatever the sizes, and nobody starves."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from tests.memory import PagedMemory

from octavo.batch import StepPlan
from octavo.blocks import BlockManager
from octavo.policies import Priority
from octavo.request import FinishReason, Request, RequestState, SamplingParams
from octavo.scheduler import Scheduler
from octavo_cache.hash_chain import HashChain


def make_scheduler(num_blocks: int = 64, block_size: int = 4, **options: int) -> Scheduler:
    return Scheduler(
        BlockManager(num_blocks, block_size),
        **{"max_num_seqs": 8, "max_num_batched_tokens": 16, **options},
    )


def make_request(name: str, num_prompt: int, num_output: int = 4, **options: object) -> Request:
    prompt = [hash((name, i)) % 97 for i in range(num_prompt)]
    return Request(name, prompt, SamplingParams(), seed=0, max_total_tokens=num_prompt + num_output, **options)


def next_token(request: Request) -> int:
    """Depends on the request and on how far it is, as a model's would."""
    return (len(request.tokens) * 31 + len(request.request_id)) % 89


def settle(scheduler: Scheduler, plan: StepPlan) -> None:
    scheduler.settle(plan, [[next_token(row.request)] if row.samples else [] for row in plan.rows])


def run(scheduler: Scheduler, depth: int = 0, each: Callable[[StepPlan], None] = lambda plan: None) -> int:
    """Step until everything is done, with up to ``depth`` plans in flight; the number of steps."""
    in_flight: list[StepPlan] = []
    num_steps = 0
    while scheduler.has_work:
        num_steps += 1
        assert num_steps < 5000, "no progress"
        plan = scheduler.schedule()
        scheduler.check()
        each(plan)
        if plan:
            in_flight.append(plan)
        while len(in_flight) > depth or (in_flight and not plan):
            settle(scheduler, in_flight.pop(0))
            scheduler.check()
    return num_steps


def test_a_prompt_and_its_tokens_take_one_step_each() -> None:
    scheduler = make_scheduler()
    request = make_request("a", 6, 3)
    scheduler.add(request)
    assert run(scheduler) == 3
    assert request.num_output == 3
    assert request.finish_reason is FinishReason.LENGTH


def decoding_beside(*lengths: int, running: bool = True) -> list[int]:
    """Tokens of each step until prompts of these ``lengths`` are computed, beside one that decodes if ``running``."""
    scheduler = make_scheduler(num_blocks=4096, max_num_batched_tokens=4096)
    if running:
        scheduler.add(make_request("running", 3, 50))
        settle(scheduler, scheduler.schedule())
    for index, length in enumerate(lengths):
        scheduler.add(make_request(str(index), length))
    num_tokens = []
    while scheduler.waiting or any(request.is_prefilling for request in scheduler.running.values()):
        plan = scheduler.schedule()
        num_tokens.append(plan.num_tokens)
        settle(scheduler, plan)
    return num_tokens


def test_few_prompts_are_spread_over_steps_so_that_others_wait_less_for_their_tokens() -> None:
    assert decoding_beside(300) == [301]
    assert decoding_beside(512) == [513]
    assert decoding_beside(1000) == [501, 501]
    assert decoding_beside(300, 300) == [301, 302], "the first has its first token, and decodes beside the second"
    assert decoding_beside(1024) == [513, 513]


def test_many_prompts_take_all_that_a_step_has() -> None:
    assert decoding_beside(1025) == [1026]
    assert decoding_beside(600, 600) == [1201]


def test_where_nobody_decodes_nothing_is_spread() -> None:
    assert decoding_beside(1000, running=False) == [1000]


def test_a_long_prompt_is_computed_in_chunks_of_the_budget() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8)
    scheduler.add(make_request("a", 20, 1))
    chunks: list[int] = []
    run(scheduler, each=lambda plan: chunks.append(plan.num_tokens))
    assert chunks == [8, 8, 4]


def test_running_requests_go_on_while_a_long_prompt_is_computed() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8)
    short = make_request("short", 2, 10)
    scheduler.add(short)
    settle(scheduler, scheduler.schedule())
    scheduler.add(make_request("long", 40, 1))
    plan = scheduler.schedule()
    assert [(row.request.request_id, row.num_tokens) for row in plan.rows] == [("short", 1), ("long", 7)]


def test_long_prompts_share_the_budget_and_short_ones_pass() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=16, max_num_partial_prefills=2)
    for name, size in (("long", 100), ("longer", 120), ("longest", 200), ("short", 3)):
        scheduler.add(make_request(name, size, 1))
    rows = {row.request.request_id: row.num_tokens for row in scheduler.schedule().rows}
    assert rows == {"long": 8, "longer": 8}
    settled = scheduler.schedule()
    assert {row.request.request_id for row in settled.rows} == {"long", "longer"}


def test_a_short_prompt_passes_long_ones_under_way() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=16, max_num_partial_prefills=4)
    for name in ("one", "two", "three"):
        scheduler.add(make_request(name, 60, 1))
    scheduler.add(make_request("short", 4, 1))
    rows = {row.request.request_id: row.num_tokens for row in scheduler.schedule().rows}
    assert rows == {"one": 4, "two": 4, "three": 4, "short": 4}


def test_single_tokens_come_first_and_the_longest_contexts_last_among_them() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=64)
    for name, size in (("longest", 20), ("short", 2), ("long", 9)):
        scheduler.add(make_request(name, size))
    settle(scheduler, scheduler.schedule())
    scheduler.add(make_request("new", 5))
    rows = [(row.request.request_id, row.num_tokens) for row in scheduler.schedule().rows]
    assert rows == [("short", 1), ("long", 1), ("longest", 1), ("new", 5)]


def test_at_most_max_num_seqs_run() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    for name in "abcd":
        scheduler.add(make_request(name, 2, 2))
    assert len(scheduler.schedule().rows) == 2
    assert len(scheduler.waiting) == 2


def test_the_last_admitted_gives_way_and_comes_back_first() -> None:
    scheduler = make_scheduler(num_blocks=4, block_size=4)
    first, second, third = (make_request(name, 4, 8) for name in ("first", "second", "third"))
    for request in (first, second, third):
        scheduler.add(request)
    preempted: list[str] = []

    def note(plan: StepPlan) -> None:
        preempted.extend(["x"] * plan.num_preempted)

    run(scheduler, each=note)
    assert preempted
    assert first.num_preemptions == 0
    assert all(request.num_output == 8 for request in (first, second, third))


def test_a_preempted_request_keeps_its_tokens() -> None:
    roomy, tight = make_scheduler(num_blocks=64), make_scheduler(num_blocks=5)
    outputs = []
    for scheduler in (roomy, tight):
        requests = [make_request(name, 5, 9) for name in "abc"]
        for request in requests:
            scheduler.add(request)
        run(scheduler)
        outputs.append([request.tokens for request in requests])
    assert outputs[0] == outputs[1]


def test_the_least_urgent_gives_way_under_the_priority_policy() -> None:
    scheduler = Scheduler(BlockManager(5, 4), max_num_seqs=8, max_num_batched_tokens=32, policy=Priority())
    casual, urgent = make_request("casual", 6, 8, priority=5), make_request("urgent", 6, 8, priority=-5)
    scheduler.add(casual)
    settle(scheduler, scheduler.schedule())
    scheduler.add(urgent)
    run(scheduler)
    assert urgent.num_preemptions == 0
    assert casual.num_preemptions > 0


def test_an_aborted_request_holds_nothing_even_with_a_step_in_flight() -> None:
    scheduler = make_scheduler()
    request = make_request("a", 6)
    scheduler.add(request)
    plan = scheduler.schedule()
    scheduler.finish(request, FinishReason.ABORT)
    scheduler.check()
    assert scheduler.blocks.num_free == scheduler.blocks.num_blocks
    assert scheduler.settle(plan, [[1]]) == []
    assert request.num_output == 0


def test_samples_of_one_request_share_its_prompt() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=64)
    first = make_request("a", 10, 4)
    scheduler.add(first)
    for index in (1, 2):
        scheduler.add(
            Request("a", first.tokens, first.params, seed=index, max_total_tokens=14, index=index, fork_of=first)
        )
    plans: list[list[tuple[int, int]]] = []
    run(scheduler, each=lambda plan: plans.append([(row.request.index, row.num_tokens) for row in plan.rows]))
    assert plans[0] == [(0, 10)]
    assert sorted(plans[1]) == [(0, 1), (1, 1), (2, 1)]


def test_a_request_that_reads_its_history_is_not_in_flight_twice() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 4, 4, needs_history=True))
    assert scheduler.schedule()
    assert not scheduler.schedule()


def random_workload(random: Random) -> tuple[Scheduler, list[Request], int]:
    """Any sizes that can work at all: the pool holds at least the longest request."""
    block_size, longest = random.choice([1, 2, 4]), 24
    scheduler = Scheduler(
        BlockManager(
            random.randint(-(-longest // block_size), 60), block_size, random.choice([None, HashChain(block_size)])
        ),
        max_num_seqs=random.randint(1, 5),
        max_num_batched_tokens=random.randint(5, 20),
        max_num_partial_prefills=random.randint(1, 3),
    )
    requests: list[Request] = []
    for number in range(random.randint(1, 7)):
        num_prompt = random.randint(1, longest - 1)
        total = random.randint(num_prompt + 1, longest)
        prompt = [random.randint(0, 1) for _ in range(num_prompt)]
        first: Request | None = None
        for index in range(random.randint(1, 3)):
            request = Request(
                f"r{number}", prompt, SamplingParams(), seed=index, max_total_tokens=total, index=index, fork_of=first
            )
            first = first or request
            requests.append(request)
    return scheduler, requests, random.randint(0, 1)


@settings(max_examples=400, deadline=None)
@given(st.integers(0, 2**32))
def test_every_request_ends_whatever_the_sizes(seed: int) -> None:
    """Arrivals in the middle, aborts, preemptions, forks and steps in flight: invariants hold, every row reads what
    was computed from its own tokens, and nothing is left."""
    random = Random(seed)  # not drawn step by step: runs are long, and hypothesis pays for every single draw
    scheduler, requests, depth = random_workload(random)
    arriving, memory = list(requests), PagedMemory(scheduler.blocks.block_size)
    in_flight: list[tuple[StepPlan, list[list[int]]]] = []
    for _ in range(3000):
        if not (arriving or scheduler.has_work or in_flight):
            break
        for _ in range(min(random.randint(0, 3), len(arriving))):
            scheduler.add(arriving.pop(0))
        unfinished = [request for request in requests if request.sequence >= 0 and not request.finished]
        if unfinished and random.randint(0, 30) == 0:
            scheduler.finish(random.choice(unfinished), FinishReason.ABORT)
        plan = scheduler.schedule()
        scheduler.check()
        assert plan.num_tokens <= scheduler.max_num_batched_tokens
        assert len({row.request.slot for row in plan.rows}) == len(plan.rows)
        if plan:
            in_flight.append((plan, memory.run(plan)))
        while len(in_flight) > depth or (in_flight and not plan):
            scheduler.settle(*in_flight.pop(0))
            scheduler.check()
    assert all(request.state is RequestState.FINISHED for request in requests)
    assert all(
        len(request.tokens) == request.max_total_tokens
        for request in requests
        if request.finish_reason is FinishReason.LENGTH
    )
    assert scheduler.blocks.num_free == scheduler.blocks.num_blocks


@pytest.mark.parametrize("depth", [0, 1])
def test_drafts_advance_a_request_by_what_was_accepted(depth: int) -> None:
    scheduler = make_scheduler()
    request = make_request("a", 4, 10)
    scheduler.add(request)
    settle(scheduler, scheduler.schedule())
    request.drafts = [7, 8, 9]
    plan = scheduler.schedule()
    (row,) = plan.rows
    assert (row.start, row.num_tokens, tuple(row.drafts)) == (4, 4, (7, 8, 9))
    if depth:
        assert not scheduler.schedule()  # how many were accepted is not known yet
    scheduler.settle(plan, [[7, 8, 50]])
    scheduler.check()
    assert request.tokens[-3:] == [7, 8, 50]
    assert request.num_computed == 7
    assert request.num_to_compute == 1
