"""The engine: ask the scheduler, run the model, tell the scheduler.

It knows tokens, not text, and talks to its client in the messages of :mod:`octavo.messages` only.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from octavo.errors import RequestError
from octavo.messages import (
    Abort,
    EngineInfo,
    SequenceOutput,
    StepOutputs,
    StepStats,
    Submit,
    Timing,
    TokenLogprobs,
    samples,
)
from octavo.pace import Pace
from octavo.request import FinishReason, Request
from octavo.runner import LaunchedStep, Runner
from octavo.scheduler import Scheduler, SettledRow
from octavo.speculation import Drafted, NoSpeculation


@dataclass(frozen=True, slots=True)
class InFlight:
    """A step that was launched and not settled yet."""

    launched: LaunchedStep
    started: float  # when its scheduling began, time.perf_counter()
    drafted: Drafted
    launched_at: float = 0.0  # when the device had it


class Engine:
    """Runs requests. Driven by one thread: ``submit`` and ``abort`` between steps, then ``launch`` and ``settle``.

    ``launch`` may be called again before the step that it returned is settled; the loop that drives the engine
    decides (see :func:`octavo.client.drive`).
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        info: EngineInfo,
        *,
        speculation: NoSpeculation | None = None,
        overlap: bool = False,
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.info = info
        self.overlap = overlap
        self._speculation = speculation or NoSpeculation()
        self._busy_since: float | None = None  # the end of the step before, if something was left to do
        self._pace = Pace()
        self._ended: list[SequenceOutput] = []  # ended outside a step: aborted or refused

    # --- requests ----------------------------------------------------------------------------------------------------

    def submit(self, submit: Submit) -> None:
        """Queue a request. One that can never run ends at once with an error.

        The queue has no end here: how many may wait is for whoever takes requests in to decide.
        """
        try:
            self._check(submit)
        except RequestError as error:
            self._ended.extend(
                SequenceOutput(submit.request_id, index, [], finish_reason=FinishReason.ERROR, error=error.message)
                for index, _ in samples(submit)
            )
            return
        params = submit.params
        room = self.info.max_model_len - len(submit.prompt)
        limit = len(submit.prompt) + min(room, params.max_tokens if params.max_tokens is not None else room)
        needs_history = any(p.needs_history and p.wants(params) for p in self.runner.processors)
        first: Request | None = None
        for index, seed in samples(submit):
            request = Request(
                submit.request_id,
                submit.prompt,
                params,
                seed=seed,
                max_total_tokens=limit,
                index=index,
                eos_token_ids=frozenset(submit.eos_token_ids),
                bad_token_ids=submit.bad_token_ids,
                salt=submit.salt,
                priority=submit.priority,
                arrival=submit.arrival,
                fork_of=first,
                needs_history=needs_history,
            )
            if request.wants_prompt_logits:
                request.prompt_logprobs = [None] * request.num_prompt  # the first has none, even if it is the only one
            first = first or request
            self.scheduler.add(request)

    def _check(self, submit: Submit) -> None:
        num_prompt, limit = len(submit.prompt), self.info.max_model_len
        if not 0 < num_prompt < limit:
            raise RequestError(f"the prompt has {num_prompt} tokens; this engine takes 1 to {limit - 1}")

    def abort(self, abort: Abort) -> None:
        """End a request or one sample of it; ids that are unknown or finished already are ignored."""
        for request in self.scheduler.find(abort.request_id, abort.index):
            self._finish(request, FinishReason.ABORT)
            self._ended.append(self._output(request, [], FinishReason.ABORT))

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything, or something is to be reported."""
        return self.scheduler.has_work or bool(self._ended)

    # --- the step ----------------------------------------------------------------------------------------------------

    def launch(self) -> InFlight | None:
        """Schedule and start the next step; None if nobody can go on before the step in flight is settled."""
        started = time.perf_counter()
        drafted = self._speculation.draft()
        if drafted is None:
            return None
        plan = self.scheduler.schedule()
        return InFlight(self.runner.launch(plan), started, drafted, time.perf_counter()) if plan else None

    def patience(self, step: InFlight | None) -> float:
        """Seconds that the next launch may wait for requests while ``step`` is under way: until shortly before the
        device would run dry. There are none to spare when requests wait already."""
        if step is None or self.scheduler.waiting:
            return 0.0
        return self._pace.spare(step.started, step.launched_at, time.perf_counter())

    def settle(self, step: InFlight | None) -> StepOutputs:
        """Take in a launched step's results; with None, only what ended outside a step."""
        sequences, self._ended = self._ended, []
        if step is None:
            return StepOutputs(sequences, self._stats(StepStats()))
        plan, was_done = step.launched.plan, step.launched.is_done()
        result = step.launched.wait()
        ready = time.perf_counter()
        items = self.scheduler.settle(plan, result.token_ids)
        num_output_tokens = 0
        for item in items:
            request, token_ids = item.row.request, item.token_ids
            num_output_tokens += len(token_ids)
            if request.prompt_logprobs is not None:
                self._collect_prompt_logprobs(item, result.prompt_logprobs.get(item.index))
            if item.finish_reason is not None:
                self._speculation.release(request)
            if token_ids:
                sequences.append(self._output(request, token_ids, item.finish_reason, result.logprobs[item.index]))
        now = time.perf_counter()
        stats = StepStats(
            num_prompt_tokens=sum(
                [
                    min(row.end, row.request.num_prompt) - row.start
                    for row in plan.rows
                    if row.start < row.request.num_prompt
                ]
            ),
            num_output_tokens=num_output_tokens,
            num_preemptions=plan.num_preempted,
            num_prefix_queries=plan.num_prefix_queries,
            num_prefix_hits=plan.num_prefix_hits,
            step_seconds=now - step.started,
        )
        self._pace.finished(step.launched_at, ready, was_done=was_done, has_prompts=stats.num_prompt_tokens > 0)
        # each step counts from the end of the one before: two may be in flight, and if not, that is time lost as well
        begun = step.started if self._busy_since is None else self._busy_since
        self._speculation.settled(step.drafted, plan, items, stats, now - begun)
        self._busy_since = now if self.scheduler.has_work else None
        return StepOutputs(sequences, self._stats(stats))

    def check(self) -> None:
        """Prove the scheduler's and the block manager's invariants; for tests and when idle."""
        self.scheduler.check()

    # --- reporting ---------------------------------------------------------------------------------------------------

    def _output(
        self,
        request: Request,
        token_ids: list[int],
        reason: FinishReason | None,
        logprobs: Sequence[TokenLogprobs] | None = None,
    ) -> SequenceOutput:
        output = SequenceOutput(request.request_id, request.index, token_ids)
        if logprobs is not None:
            output.logprobs = list(logprobs[: len(token_ids)])
        first = bool(token_ids) and len(request.tokens) == request.num_prompt + len(token_ids)
        if reason is None and not first:
            return output  # most rows of most steps bring tokens and nothing else
        if request.index == 0:
            output.num_cached_tokens = request.num_cached
        if first:
            output.prompt_logprobs, request.prompt_logprobs = request.prompt_logprobs, None
        if reason is not None:
            output.finish_reason = reason
            output.stop_token_id = request.stop_token_id
        output.timing = Timing(
            request.arrival,
            request.scheduled_at,
            request.first_token_at,
            time.monotonic() if reason is not None else 0.0,
            request.num_preemptions,
        )
        return output

    def _collect_prompt_logprobs(self, item: SettledRow, found: Sequence[TokenLogprobs] | None) -> None:
        """Positions arrive chunk by chunk, and again after a preemption; they leave with the first token."""
        request = item.row.request
        if found is None or request.prompt_logprobs is None:
            return
        start = item.row.start + 1
        request.prompt_logprobs[start : start + len(found)] = found

    def _stats(self, stats: StepStats) -> StepStats:
        scheduler = self.scheduler
        stats.num_running = len(scheduler.running)
        stats.num_waiting = len(scheduler.waiting)
        stats.num_free_blocks = scheduler.blocks.num_free
        stats.num_blocks = scheduler.blocks.num_blocks
        return stats

    def _finish(self, request: Request, reason: FinishReason) -> None:
        self.scheduler.finish(request, reason)
        self._speculation.release(request)
