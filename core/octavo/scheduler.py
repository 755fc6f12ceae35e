"""Who computes how many tokens in the next step. No torch here.

There is no prefill phase and no decode phase: every request has tokens that are known and tokens that are computed,
and each step lets the second number catch up with the first. A new prompt, a chunk of a long one, the next token of a
running request, drafts to verify, and a preempted request that starts over are all the same thing.
"""

from __future__ import annotations

import bisect
import operator
import time
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from octavo.batch import PlannedRow, StepPlan
from octavo.blocks import BlockManager
from octavo.policies import FirstComeFirstServed, SchedulingPolicy
from octavo.request import FinishReason, Request, RequestState

FEW = 4
"""Prompts that wait for up to this part of a step's tokens are few: who decodes beside them comes first."""

FEW_AT_ONCE = 512
"""Tokens of such prompts that a step computes at most. With 256, on an H200, decodes waited half as long at worst and
first tokens half as long again."""


class SettledRow(msgspec.Struct, frozen=True, gc=False):
    """What a step brought to one request: the tokens that count, and the reason if it ended."""

    row: PlannedRow
    token_ids: list[int]
    finish_reason: FinishReason | None
    index: int  # of the row in the plan


class Scheduler:
    """Owns the requests, the slots and, through the block manager, the blocks.

    A request holds a slot (a row of the runner's device state) and blocks while it is running, and neither while it
    waits. ``schedule`` may be called again before the last plan is settled: what is in flight is counted in the
    requests' ``num_pending``, and whatever a finished or preempted request still has in flight is ignored when it
    arrives.
    """

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_num_partial_prefills: int = 4,
        policy: SchedulingPolicy | None = None,
    ) -> None:
        self.blocks = blocks
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_num_partial_prefills = max_num_partial_prefills
        self.policy = policy or FirstComeFirstServed()
        self.waiting: list[Request] = []  # in the order of admission
        self.running: dict[tuple[str, int], Request] = {}  # in the order they were admitted
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self._num_arrived = 0
        # a few blocks stay free at admission, so that those already running do not give way at once
        self._watermark = blocks.num_blocks // 100

    # --- requests come and go ----------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a new request."""
        request.sequence = self._num_arrived
        self._num_arrived += 1
        self._enqueue(request)

    def find(self, request_id: str, index: int | None = None) -> list[Request]:
        """The unfinished samples of a request, or the one with ``index``."""
        everyone = [*self.running.values(), *self.waiting]
        return [r for r in everyone if r.request_id == request_id and index in (None, r.index)]

    def finish(self, request: Request, reason: FinishReason) -> None:
        """End a request wherever it stands; it holds nothing afterwards."""
        if request.state is RequestState.WAITING:
            self.waiting.remove(request)
        elif request.state is RequestState.RUNNING:
            self._release(request)
        request.state = RequestState.FINISHED
        request.finish_reason = reason

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self.running or self.waiting)

    # --- the step ----------------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan:
        """Decide the next step. Running requests come first; then prompts, under way or new, share what is left.

        Empty when nobody can go on: nothing is left to do, or what is in flight must be settled first.
        """
        draft = _Draft(self.max_num_batched_tokens)
        prompts = self._plan_decodes(draft)
        self._plan_prompts(draft, prompts)
        return draft.plan()

    def settle(self, plan: StepPlan, sampled: Sequence[list[int]]) -> list[SettledRow]:
        """Take in what the step sampled: for each row of the plan its new tokens (none if it did not sample).

        Rows of requests that ended or were preempted meanwhile are handled here and nowhere else: an ended request
        ignores its tokens; a preempted one keeps them, since they are what it would have sampled.
        """
        return [
            self._settle(row, tokens, index)
            for index, (row, tokens) in enumerate(zip(plan.rows, sampled, strict=True))
            if row.request.state is not RequestState.FINISHED
        ]

    def check(self) -> None:
        """Prove that no block or slot is lost and that states agree with places. Called by tests after every step."""
        self.blocks.check([request.blocks for request in self.running.values()])
        slots = [request.slot for request in self.running.values()]
        assert sorted([*slots, *self._free_slots]) == list(range(self.max_num_seqs)), "a slot is lost or held twice"
        for request in self.running.values():
            assert request.state is RequestState.RUNNING, request
            assert request.num_computed <= request.num_known, request
            assert len(request.blocks) >= self.blocks.blocks_for(request.num_computed), request
            computed = request.blocks[: request.num_computed // self.blocks.block_size]
            assert not any(self.blocks.is_promised(block) for block in computed), request
        for request in self.waiting:
            assert request.state is RequestState.WAITING, request
            assert not request.blocks, request
            assert request.slot == -1, request
            assert request.num_computed == 0, request

    # --- planning ----------------------------------------------------------------------------------------------------

    def _plan_decodes(self, draft: _Draft) -> list[Request]:
        """Plan the next token of everyone who has one to compute; returns the prompts that are under way."""
        block_size = self.blocks.block_size
        prompts = []
        for request in tuple(self.running.values()):
            num_known = len(request.tokens) + request.num_pending  # its num_known, without a call for each row
            num_missing = num_known - request.num_computed
            if num_missing == 0 or num_known >= request.max_total_tokens:
                continue
            # Its newest token may be on the device only; and how many drafts were accepted, only their settling tells.
            if request.num_pending and (request.needs_history or request.drafts):
                continue
            if num_missing > 1:
                prompts.append(request)
                continue
            if request.state is not RequestState.RUNNING or draft.budget == 0:
                continue  # it gave way to one before it
            if request.drafts:
                request.drafts = request.drafts[: draft.budget - 1]
            end = num_known + len(request.drafts)
            if end <= len(request.blocks) * block_size or self._make_room(request, end, draft):
                draft.add(request, 1, True, request.drafts)
        return prompts

    def _plan_prompts(self, draft: _Draft, prompts: Sequence[Request]) -> None:
        """Each prompt first gets at most a share of the budget, in order of admission, so that several long prompts
        advance together and short ones pass; what is left then goes to the first that can use it."""
        budget, share = self._prompt_budget(draft, prompts)
        grants: dict[Request, int] = {}
        num_partial = 0

        def grant(request: Request, limit: int) -> None:
            nonlocal budget, num_partial
            granted = grants.get(request, 0)
            more = min(request.num_to_compute - granted, limit, budget)
            begin = request.num_computed + granted
            self.blocks.fill(request.blocks, begin, begin + more)
            grants[request] = granted + more
            budget -= more
            num_partial += grants[request] < request.num_to_compute

        for request in prompts:
            if budget == 0:
                break
            if request.state is RequestState.RUNNING:  # it may have given way meanwhile
                grant(request, share)
        # Who has just given way must not see others walk in: they would take the blocks it is waiting for.
        for request in [] if draft.num_preempted else list(self.waiting):
            if budget == 0 or not self._free_slots:
                break
            if not self._may_start(request):
                continue
            if num_partial >= self.max_num_partial_prefills and request.num_known > share:
                continue
            start = self._find_start(request)
            if start is None:
                continue
            if not self._admit(request, start, draft):
                break
            grant(request, share)
        for request in grants:
            grant(request, budget)
            draft.add(request, grants[request], grants[request] == request.num_to_compute)

    def _prompt_budget(self, draft: _Draft, prompts: Sequence[Request]) -> tuple[int, int]:
        """How many tokens of prompts the step may compute, and of each at first: all that decodes leave, in shares.

        A few prompts are spread evenly over steps instead, one after the other, so that whoever decodes does not wait
        long for a token.
        """
        all_left = draft.budget, max(1, draft.budget // self.max_num_partial_prefills)
        if draft.is_empty:
            return all_left
        backlog = 0
        for request in [*prompts, *self.waiting[: len(self._free_slots)]]:
            backlog += request.num_to_compute
            if backlog * FEW > self.max_num_batched_tokens:
                return all_left
        num_steps = max(1, -(-backlog // FEW_AT_ONCE))
        budget = min(draft.budget, -(-backlog // num_steps))
        return budget, budget

    def _make_room(self, request: Request, num_tokens: int, draft: _Draft) -> bool:
        """Reserve blocks for ``num_tokens`` tokens, preempting others if need be; False if it gave way itself."""
        while not self.blocks.reserve(request.blocks, num_tokens):
            victim = self.policy.victim(list(self.running.values()))
            draft.drop(victim)
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _may_start(self, request: Request) -> bool:
        """A preempted request waits for its last token; whoever begins as another does waits while that is computed."""
        if request.num_pending or self.blocks.is_promised(request.awaited_block):
            return False
        parent = request.fork_of
        if parent is None or parent.num_preemptions or parent.finished:
            return True
        return _can_fork(request)

    def _admit(self, request: Request, start: _Start, draft: _Draft) -> bool:
        """Give a waiting request a slot and blocks for all its tokens; False, and nothing changed, if too few are free.

        All at once rather than chunk by chunk: a prompt that has begun can then always be finished.
        """
        table = start.table
        needed = self.blocks.blocks_for(request.num_known + 1) - len(table)
        reserve = self._watermark if self.running else 0
        if needed + reserve > self.blocks.num_free or not self.blocks.reserve(table, request.num_known + 1):
            self.blocks.release(table)
            return False
        draft.copies.extend(start.copies)
        draft.num_prefix_queries += start.num_queried
        draft.num_prefix_hits += min(start.num_queried, start.num_computed)
        self.waiting.remove(request)
        request.blocks = table
        request.num_computed = start.num_computed
        request.num_stored = self.blocks.promise(
            request.tokens, table, start.num_stored, request.num_known - 1, request.salt
        )
        request.slot = self._free_slots.pop()
        request.state = RequestState.RUNNING
        if not request.scheduled_at:
            request.scheduled_at = time.monotonic()
            request.num_cached = start.num_computed
        self.running[request.key] = request
        return True

    def _find_start(self, request: Request) -> _Start | None:
        """What has been computed already of the request's first tokens.

        None: it must wait, for a block or because the next of those tokens are being computed for another.
        """
        parent = request.fork_of
        if parent is not None and _can_fork(request):
            # all but the last prompt token: that one is computed again, for logits of its own
            forked = self.blocks.fork(parent.blocks, request.num_prompt - 1)
            if forked is None:
                return None
            num_stored = min(parent.num_stored, (request.num_prompt - 1) // self.blocks.block_size)
            return _Start(forked[0], request.num_prompt - 1, num_stored, forked[1])
        if request.wants_prompt_logits:
            return _Start([], 0, 0, [])  # every position must be computed
        found = self.blocks.lookup(request.tokens[:-1], request.salt)
        awaited = self.blocks.last_promised(found)
        if awaited is not None:
            request.awaited_block = awaited
            return None
        num_found = len(found) * self.blocks.block_size
        return _Start(self.blocks.share(found), num_found, len(found), [], num_queried=len(request.tokens))

    # --- settling ----------------------------------------------------------------------------------------------------

    def _settle(self, row: PlannedRow, tokens: list[int], index: int) -> SettledRow:
        request = row.request
        current = row.epoch == request.num_preemptions  # not preempted since the step was launched
        num_computed = row.start + row.num_tokens
        request.num_pending -= row.samples
        if row.drafts:
            num_computed += len(tokens) - 1 - len(row.drafts)
            if current:
                request.drafts = []
                request.num_computed = num_computed
        reason, num_before = None, len(request.tokens)
        for token in tokens:
            reason = request.append(token)
            if reason is not None:
                tokens = tokens[: len(request.tokens) - num_before]
                num_computed = min(num_computed, len(request.tokens))
                break
        if current and num_computed >= (request.num_stored + 1) * self.blocks.block_size:
            request.num_stored = self.blocks.store(
                request.tokens, request.blocks, request.num_stored, num_computed, request.salt
            )
        if not request.first_token_at and tokens:
            request.first_token_at = time.monotonic()
        if reason is not None:
            self.finish(request, reason)
        return SettledRow(row, tokens, reason, index)

    # --- moving requests ---------------------------------------------------------------------------------------------

    def _preempt(self, request: Request) -> None:
        """Back to the queue, all blocks given up; its tokens are kept and computed again later."""
        self._release(request)
        request.num_computed = 0
        request.num_stored = 0
        request.drafts = []
        request.num_preemptions += 1
        self._enqueue(request)

    def _enqueue(self, request: Request) -> None:
        request.state = RequestState.WAITING
        bisect.insort(self.waiting, request, key=lambda r: (*self.policy.key(r), r.sequence))

    def _release(self, request: Request) -> None:
        del self.running[request.key]
        self.blocks.release(request.blocks)
        self._free_slots.append(request.slot)
        request.slot = -1


def _can_fork(request: Request) -> bool:
    """Whether the whole prompt lies computed in the blocks of the sample that this one forks from."""
    parent = request.fork_of
    return (
        parent is not None
        and parent.state is RequestState.RUNNING
        and parent.num_computed >= request.num_prompt
        and request.num_output == 0
    )


class _Start(NamedTuple):
    """Blocks that hold a request's first tokens already."""

    table: list[int]
    num_computed: int
    num_stored: int  # leading blocks of the table that the prefix cache knows
    copies: list[tuple[int, int]]
    num_queried: int = 0  # tokens that the prefix cache was asked for


class _Draft:
    """A plan while it is made."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.copies: list[tuple[int, int]] = []
        self.num_preempted = 0
        self.num_prefix_queries = 0
        self.num_prefix_hits = 0
        self._singles: dict[Request, PlannedRow] = {}
        self._longer: dict[Request, PlannedRow] = {}

    @property
    def is_empty(self) -> bool:
        """Whether nothing is planned yet."""
        return not (self._singles or self._longer)

    def add(self, request: Request, num_tokens: int, samples: bool, drafts: Sequence[int] = ()) -> None:
        """Plan so many tokens and drafts of the request; ``samples``: the last of its tokens are among them."""
        start = request.num_computed
        num_planned = num_tokens + len(drafts)
        rows = self._singles if num_planned == 1 else self._longer
        rows[request] = PlannedRow(request, start, num_planned, samples, tuple(drafts), request.num_preemptions)
        request.num_computed = start + num_tokens
        request.num_pending += samples
        self.budget -= num_planned

    def drop(self, request: Request) -> None:
        """The request gave way: take back what was planned for it in this step."""
        self.num_preempted += 1
        row = self._singles.pop(request, None) or self._longer.pop(request, None)
        if row is not None:
            self.budget += row.num_tokens
            request.num_pending -= row.samples

    def plan(self) -> StepPlan:
        # single tokens first: backends may treat them apart; the longest contexts at the end of them, see ForwardBatch
        singles = sorted(self._singles.values(), key=operator.attrgetter("start"))
        return StepPlan(
            [*singles, *self._longer.values()],
            self.copies,
            self.num_preempted,
            self.num_prefix_queries,
            self.num_prefix_hits,
        )
