"""Guessing ahead: which running requests get drafts, and how many, so that it never costs more than it brings.

A :class:`~octavo.interfaces.Drafter` guesses; the scheduler and the runner verify guesses like any other tokens; what
stands here decides how many guesses to ask for. No torch here.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from octavo.batch import StepPlan
from octavo.messages import StepStats
from octavo.request import Request
from octavo.scheduler import Scheduler, SettledRow

if TYPE_CHECKING:
    from octavo.interfaces import Drafter


@dataclass(frozen=True, slots=True)
class Drafted:
    """How many guesses were asked of the drafter for a step."""

    limits: Mapping[Request, int] = field(default_factory=dict)


NOTHING_DRAFTED = Drafted()


class NoSpeculation:
    """What the engine does without a drafter."""

    num_tokens: int = 0  # drafts for one sequence at most

    def draft(self) -> Drafted | None:
        """Put guesses on running requests before they are scheduled. None: the step in flight must be settled first,
        since only then it is known which tokens the guesses follow."""
        return NOTHING_DRAFTED

    def settled(
        self, drafted: Drafted, plan: StepPlan, settled: Sequence[SettledRow], stats: StepStats, seconds: float
    ) -> None:
        """A step was settled that took ``seconds`` of the engine's time; writes its counts into ``stats``."""

    def release(self, request: Request) -> None:
        """The request is finished."""


class Speculation(NoSpeculation):
    """Asks a drafter for as many guesses as a controller finds worth it."""

    def __init__(self, drafter: Drafter, controller: Controller, scheduler: Scheduler, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self._drafter = drafter
        self._controller = controller
        self._scheduler = scheduler

    def draft(self) -> Drafted | None:
        running = self._scheduler.running.values()
        decoding = [request for request in running if not request.is_prefilling and request.may_sample]
        limits = self._controller.choose([request.key for request in decoding])
        room = self._room(len(decoding))
        wanted = room > 0 and any(limits)
        if wanted and any(request.num_pending for request in running):
            return None
        for request in decoding:
            if not request.num_pending:  # guesses that did not get into a step
                request.drafts = []
        if not wanted:
            return NOTHING_DRAFTED
        # the verified token takes one place, so a draft for the last place could never count
        asked = {
            request: min(limit, room, request.max_total_tokens - len(request.tokens) - 1)
            for request, limit in zip(decoding, limits, strict=True)
        }
        for request, limit in asked.items():
            reserved = self._scheduler.blocks.reserve(request.blocks, len(request.tokens) + limit)
            assert reserved, request  # there was room for all
        made: dict[Request, int] = {}
        guesses = self._drafter.draft(decoding, list(asked.values()))
        for (request, limit), drafts in zip(asked.items(), guesses, strict=True):
            request.drafts = drafts or []
            if drafts is not None:
                made[request] = limit
        return Drafted(made)

    def settled(
        self, drafted: Drafted, plan: StepPlan, settled: Sequence[SettledRow], stats: StepStats, seconds: float
    ) -> None:
        accepted_at = [0] * self.num_tokens
        for item in settled:
            num_accepted = max(0, len(item.token_ids) - 1)
            if item.row.drafts:
                stats.num_drafts += 1
                stats.num_draft_tokens += len(item.row.drafts)
                stats.num_accepted_tokens += num_accepted
                for position in range(num_accepted):
                    accepted_at[position] += 1
            limit = drafted.limits.get(item.row.request, 0)
            if limit and item.finish_reason is None:
                self._controller.observe(item.row.request.key, limit, num_accepted)
        stats.accepted_per_position = accepted_at
        # a step that also computes prompts says nothing about what guesses cost
        if settled and all(row.samples and row.num_tokens == 1 + len(row.drafts) for row in plan.rows):
            num_tokens = sum(len(item.token_ids) for item in settled)
            limits = [drafted.limits.get(row.request, 0) for row in plan.rows]
            stats.seconds_saved = self._controller.measure(limits, seconds, num_tokens)

    def release(self, request: Request) -> None:
        self._drafter.release(request)
        self._controller.release(request.key)

    def _room(self, num_decoding: int) -> int:
        """Drafts for each sequence that neither keep others out of the step nor take blocks from anybody."""
        if not num_decoding:
            return 0
        scheduler = self._scheduler
        room = min(self.num_tokens, scheduler.max_num_batched_tokens // num_decoding - 1)
        num_blocks = num_decoding * (scheduler.blocks.blocks_for(room) + 1)
        return room if num_blocks <= scheduler.blocks.num_free else 0


# --- how many --------------------------------------------------------------------------------------------------------


class Controller(Protocol):
    """Decides how many drafts to ask for. Sequences are told apart by any hashable key."""

    def choose(self, sequences: Sequence[Hashable]) -> Sequence[int]:
        """For the next step of these sequences, the drafts for each. May be asked more than once for a step."""
        ...

    def observe(self, sequence: Hashable, limit: int, num_accepted: int) -> None:
        """Of up to ``limit`` drafts that were asked for, this many became tokens."""
        ...

    def measure(self, limits: Sequence[int], seconds: float, num_tokens: int) -> float:
        """A step for whose sequences so many drafts were asked for took ``seconds`` with everything, and brought
        ``num_tokens`` tokens. Returns how many seconds drafts have saved by that, as far as is known; less than 0 if
        they have cost more."""
        ...

    def release(self, sequence: Hashable) -> None:
        """The sequence is finished."""
        ...


class FixedController:
    """Always the same number, so that what a step takes without drafts is never known."""

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens

    def choose(self, sequences: Sequence[Hashable]) -> Sequence[int]:
        return [self._num_tokens] * len(sequences)

    def observe(self, sequence: Hashable, limit: int, num_accepted: int) -> None:
        pass

    def measure(self, limits: Sequence[int], seconds: float, num_tokens: int) -> float:
        return 0.0

    def release(self, sequence: Hashable) -> None:
        pass


class AdaptiveController:
    """Picks the numbers that bring the most tokens per second by what was measured, 0 when that is best.

    A sequence with k drafts brings ``1 + a + a² + … + aᵏ`` tokens in a step, where a is its rate of acceptance (a draft
    that the drafter did not make counts as wrong). So sequences whose drafts are right get more of them. What a step
    takes, drafting included, is measured for each power of two of sequences and each number of drafts, and interpolated
    between those.

    What is not known must be tried, and trying costs: with a few sequences first, to learn the rate of acceptance;
    then, if that promises anything, with all, to learn what it takes. The books are kept in seconds: whatever steps
    with drafts took longer than plain steps would have for the same tokens is a debt, which is paid off by
    ``ALLOWANCE`` of the time that passes and by what drafts gain. Trying waits until there is no debt, and with a debt
    of more than ``MAX_DEBT`` plain steps there are no drafts at all. So the loss is bounded whatever happens: by
    ``ALLOWANCE`` of the time in the long run.

    Nothing here is random and no clock is read: the same measurements lead to the same choices.
    """

    ALLOWANCE = 0.01  # of the time may be spent on trying
    MAX_DEBT = 64.0  # plain steps: a drafter may first have to read everybody's context
    MARGIN = 1.02  # the gain that drafts must promise
    TRIAL = 4  # steps that drafts last at least once they begin: the first pays for what the drafter has missed
    TRIAL_SEQUENCES = 4
    PROMISE = 0.1  # the rate of acceptance of a few sequences at which drafts are tried with all of them …
    MAX_TRIALS = 8  # … or after so many trials with a few
    REFRESH = 64  # steps with drafts after which plain ones are measured again
    NUM_PLAIN = 3  # plain steps at least: the first is not launched ahead, as those that follow may be
    SMOOTHING = 0.1  # weight of a new measurement
    MEMORY = 0.9  # what a sequence's earlier drafts weigh after each step
    WEIGHT = 0.5  # between the mean and the largest number of drafts, before anything was measured
    PRIOR = 0.7  # the rate of acceptance before anything was seen

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens
        self._seconds: dict[tuple[int, int], _Average] = {}
        self._last_plain: dict[int, float] = {}
        # where sequences have different numbers: what the largest counts for, beside the mean
        self._weights: dict[int, _Average] = {}
        self._rates: dict[Hashable, _Rate] = {}
        self._overall = _Rate(0.5 * self.PRIOR, 0.5 * (1.0 - self.PRIOR))
        self._seen = False  # whether any draft was put to the test
        self._debt = 0.0
        self._num_drafting = 0  # steps since the last plain one
        self._num_plain = 0  # steps since the last one with drafts
        self._num_trials = 0

    def choose(self, sequences: Sequence[Hashable]) -> Sequence[int]:
        if not sequences:
            return []
        limits: list[int] = self._choose(sequences).tolist()
        return limits

    def observe(self, sequence: Hashable, limit: int, num_accepted: int) -> None:
        rate = self._rates.setdefault(sequence, _Rate())
        rate.add(num_accepted, num_accepted < limit, self.MEMORY)
        self._overall.add(num_accepted, num_accepted < limit, 0.99)
        self._seen = True

    def measure(self, limits: Sequence[int], seconds: float, num_tokens: int) -> float:
        depth, plain, size = max(limits), self._time(len(limits), 0), _size_class(len(limits))
        gain = 0.0
        if not depth:
            self._last_plain[size] = seconds
        elif plain is not None:
            # Others may take less of the machine than when plain steps were measured. That is no gain of drafts: a step
            # with them cannot take less than one without.
            plain = min(plain, self._last_plain[size])
            gain = plain * num_tokens / len(limits) - max(seconds, plain)
        self._debt = max(0.0, self._debt - gain - self.ALLOWANCE * seconds)
        self._num_trials += bool(self._num_drafting) and not depth
        self._num_drafting = self._num_drafting + 1 if depth else 0
        self._num_plain = 0 if depth else self._num_plain + 1
        self._learn(limits, seconds)
        return gain

    def _learn(self, limits: Sequence[int], seconds: float) -> None:
        """Remember what the step took, unless it was an unusual one."""
        depth, mean, size = max(limits), sum(limits) / len(limits), _size_class(len(limits))
        if not depth:
            # the first plain step was not launched ahead
            if self._num_plain > 1 or (size, 0) not in self._seconds:
                self._seconds.setdefault((size, 0), _Average()).add(seconds, self.SMOOTHING)
        elif self._num_drafting == 1 or limits.count(0) > len(limits) // 2:
            pass  # the first with drafts paid for what the drafter had missed, or they were for a few sequences only
        elif mean > depth - 0.5:
            self._seconds.setdefault((size, depth), _Average()).add(seconds, self.SMOOTHING)
        else:
            low, high = self._time(len(limits), mean), self._time(len(limits), depth)
            if low is not None and high is not None and high > low:
                weight = min(1.0, max(0.0, (seconds - low) / (high - low)))
                self._weights.setdefault(size, _Average()).add(weight, self.SMOOTHING)

    def release(self, sequence: Hashable) -> None:
        self._rates.pop(sequence, None)

    # --- estimates ---------------------------------------------------------------------------------------------------

    def _acceptance(self, sequences: Sequence[Hashable]) -> np.ndarray:
        """Each sequence's rate of acceptance [num_sequences], drawn to what all had while it has shown little."""
        overall = self._overall.value(0.0, 0.0)
        nothing = _Rate()
        return np.array([self._rates.get(sequence, nothing).value(overall, 2.0) for sequence in sequences])

    def _time(self, num_sequences: int, depth: float) -> float | None:
        """Seconds that a step takes with ``depth`` drafts for each sequence; None: too little is known."""
        size = _size_class(num_sequences)
        known = [k for k in range(self._num_tokens + 1) if (size, k) in self._seconds]
        if depth in known:
            return self._seconds[size, int(depth)].value
        if len(known) < 2 or known[0] != 0:
            return None
        if depth > known[-1]:  # along the line from the first
            known = [0, known[-1]]
            seconds = [self._seconds[size, k].value for k in known]
            return seconds[0] + (seconds[1] - seconds[0]) * depth / known[1]
        return float(np.interp(depth, known, [self._seconds[size, k].value for k in known]))

    # --- the choice --------------------------------------------------------------------------------------------------

    def _choose(self, sequences: Sequence[Hashable]) -> np.ndarray:
        """Drafts for each sequence [num_sequences]."""
        num_sequences = len(sequences)
        nothing = np.zeros(num_sequences, np.int64)
        plain, most = self._time(num_sequences, 0), self._time(num_sequences, self._num_tokens)
        if (
            plain is None
            or self._debt > self.MAX_DEBT * plain
            or self._num_drafting >= self.REFRESH
            or 0 < self._num_plain < self.NUM_PLAIN
        ):
            return nothing
        may_try = 0 < self._num_drafting < self.TRIAL or (not self._num_drafting and not self._debt)
        few = self._few(num_sequences) if may_try else nothing
        if not self._seen:
            return few * self._num_tokens
        if most is None:
            # what it takes must be known sometime, since a few sequences may be better than the others
            promising = self._overall.value(0.0, 0.0) > self.PROMISE or self._num_trials > self.MAX_TRIALS
            return np.full(num_sequences, self._num_tokens) if may_try and promising else few
        rates = self._acceptance(sequences)
        # powers[s, i - 1]: the probability that the i-th draft of sequence s counts
        powers = rates[:, None] ** np.arange(1, self._num_tokens + 1)
        num_tokens = 1.0 + powers.cumsum(axis=1)
        size = _size_class(num_sequences)
        weight = self._weights[size].value if size in self._weights else self.WEIGHT
        best, chosen = self.MARGIN, few
        for depth in range(1, self._num_tokens + 1):
            seconds = self._time(num_sequences, depth)
            assert seconds is not None  # since that of the most drafts is known
            limits = _worth(powers[:, :depth], (seconds - plain) / (plain * depth))
            mean = self._time(num_sequences, float(limits.mean()))
            assert mean is not None
            seconds = max(plain, mean + (seconds - mean) * weight)
            gain = float(num_tokens[np.arange(num_sequences), limits - 1].mean()) * plain / seconds
            if gain > best:
                best, chosen = gain, limits
        return chosen

    def _few(self, num_sequences: int) -> np.ndarray:
        """One draft for a few of the sequences, others than the last time."""
        few = np.zeros(num_sequences, np.int64)
        first = self._num_trials * self.TRIAL_SEQUENCES
        few[(first + np.arange(min(self.TRIAL_SEQUENCES, num_sequences))) % num_sequences] = 1
        return few


def _worth(powers: np.ndarray, cost: float) -> np.ndarray:
    """How many drafts of each sequence bring more than they cost, where one costs as much as ``cost`` tokens.

    At least one, or nothing more would be learned of the sequence.
    """
    limits: np.ndarray = np.maximum((powers >= cost).sum(axis=1), 1)
    return limits


def _size_class(num_sequences: int) -> int:
    """Batches of similar size share their measurements."""
    return (num_sequences - 1).bit_length()


class _Average:
    """A mean at first, then an exponential moving average; a single outlier counts little."""

    __slots__ = ("_count", "value")

    def __init__(self) -> None:
        self.value = 0.0
        self._count = 0

    def add(self, value: float, smoothing: float) -> None:
        self._count += 1
        if self._count > 1:
            value = min(value, 4.0 * self.value)
        self.value += (value - self.value) * max(smoothing, 1.0 / self._count)


class _Rate:
    """How often a draft was right: drafts after the first wrong one were never put to the test."""

    __slots__ = ("_num_right", "_num_wrong")

    def __init__(self, num_right: float = 0.0, num_wrong: float = 0.0) -> None:
        self._num_right = num_right
        self._num_wrong = num_wrong

    def add(self, num_right: int, wrong: bool, memory: float) -> None:
        self._num_right = self._num_right * memory + num_right
        self._num_wrong = self._num_wrong * memory + wrong

    def value(self, prior: float, weight: float) -> float:
        """The estimate; ``prior`` counts as ``weight`` drafts."""
        return (self._num_right + prior * weight) / (self._num_right + self._num_wrong + weight)
