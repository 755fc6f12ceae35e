"""Guessing ahead: which running requests get drafts, and how many, so that it never costs more than it brings.

A :class:`~octavo.interfaces.Drafter` guesses; the scheduler and the runner verify guesses like any other tokens; what
stands here decides how many guesses to ask for. No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

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
    num_read: int = 0  # tokens that the drafter had to read first


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
        self._output_length = _Average()  # of finished sequences

    def draft(self) -> Drafted | None:
        running = self._scheduler.running.values()
        decoding = [request for request in running if not request.is_prefilling and request.may_sample]
        room = self._room(len(decoding))
        limits: Sequence[int] = ()
        if room and not self._controller.rests(len(decoding)):
            limits = self._controller.choose(self._prospects(decoding))
        wanted = any(limits)
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
        num_unread = sum(self._drafter.num_unread(list(asked)))
        guesses = self._drafter.draft(decoding, list(asked.values()))
        for (request, limit), drafts in zip(asked.items(), guesses, strict=True):
            request.drafts = drafts or []
            if drafts is not None:
                made[request] = limit
        return Drafted(made, num_unread - sum(self._drafter.num_unread(list(asked))))

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
            if item.finish_reason is not None:
                self._output_length.add(item.row.request.num_output, 0.01)
        stats.accepted_per_position = accepted_at
        if settled and all(row.samples and row.num_tokens == 1 + len(row.drafts) for row in plan.rows):
            num_tokens = sum(len(item.token_ids) for item in settled)
            limits = [drafted.limits.get(row.request, 0) for row in plan.rows]
            stats.seconds_saved = self._controller.measure(limits, seconds, num_tokens, drafted.num_read)
        elif not drafted.limits and not drafted.num_read:
            self._controller.measure_prompts(plan.num_tokens, seconds)

    def release(self, request: Request) -> None:
        self._drafter.release(request)
        self._controller.release(request.key)

    def _prospects(self, requests: Sequence[Request]) -> list[Prospect]:
        """What speaks for and against drafts. A sequence is taken to be half done, or to become as long as others."""
        usual = self._output_length.value
        return [
            Prospect(
                request.key,
                num_unread,
                min(
                    request.max_total_tokens - len(request.tokens), max(request.num_output, usual - request.num_output)
                ),
            )
            for request, num_unread in zip(requests, self._drafter.num_unread(requests), strict=True)
        ]

    def _room(self, num_decoding: int) -> int:
        """Drafts for each sequence that neither keep others out of the step nor take blocks from anybody."""
        if not num_decoding:
            return 0
        scheduler = self._scheduler
        room = min(self.num_tokens, scheduler.max_num_batched_tokens // num_decoding - 1)
        num_blocks = num_decoding * (scheduler.blocks.blocks_for(room) + 1)
        return room if num_blocks <= scheduler.blocks.num_free else 0


# --- how many --------------------------------------------------------------------------------------------------------


class Prospect(NamedTuple):
    """A sequence that may get drafts, and what speaks against it."""

    key: Hashable
    num_unread: int = 0  # tokens that the drafter has to read first
    num_expected: float = math.inf  # tokens that the sequence is likely to bring yet


class Controller(Protocol):
    """Decides how many drafts to ask for. Sequences are told apart by any hashable key."""

    def rests(self, num_sequences: int) -> bool:
        """Whether the next step of so many sequences gets no drafts, whatever they are."""
        ...

    def choose(self, sequences: Sequence[Prospect]) -> Sequence[int]:
        """For the next step of these sequences, the drafts for each. May be asked more than once for a step."""
        ...

    def observe(self, sequence: Hashable, limit: int, num_accepted: int) -> None:
        """Of up to ``limit`` drafts that were asked for, this many became tokens."""
        ...

    def measure(self, limits: Sequence[int], seconds: float, num_tokens: int, num_read: int = 0) -> float:
        """A step for whose sequences so many drafts were asked for took ``seconds`` with everything, and brought
        ``num_tokens`` tokens; the drafter first read ``num_read``. Returns how many seconds drafts have saved by that,
        as far as is known; less than 0 if they have cost more."""
        ...

    def measure_prompts(self, num_tokens: int, seconds: float) -> None:
        """A step without drafts took ``seconds`` to compute so many tokens, of prompts among others."""
        ...

    def release(self, sequence: Hashable) -> None:
        """The sequence is finished."""
        ...


class FixedController:
    """Always the same number, so that what a step takes without drafts is never known."""

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens

    def rests(self, num_sequences: int) -> bool:
        return False

    def choose(self, sequences: Sequence[Prospect]) -> Sequence[int]:
        return [self._num_tokens] * len(sequences)

    def observe(self, sequence: Hashable, limit: int, num_accepted: int) -> None:
        pass

    def measure(self, limits: Sequence[int], seconds: float, num_tokens: int, num_read: int = 0) -> float:
        return 0.0

    def measure_prompts(self, num_tokens: int, seconds: float) -> None:
        pass

    def release(self, sequence: Hashable) -> None:
        pass


class AdaptiveController:
    """Picks the numbers that bring the most tokens per second, 0 when that is best.

    A sequence with k drafts brings ``1 + a + a² + … + aᵏ`` tokens in a step, where a is its rate of acceptance (a draft
    that the drafter did not make counts as wrong). So sequences whose drafts are right get more of them. What drafts
    add to a step is estimated before there were any, from the sizes of the models and the time that prompts took, and
    corrected by every step with drafts (:class:`_AddedTime`).

    The rates must be tried out, and trying costs; so does reading, for a drafter with a model of its own: a sequence's
    whole context before its first draft. The books are kept in seconds: whatever steps with drafts took longer than
    plain steps would have for the same tokens is a debt, which is paid off by ``ALLOWANCE`` of the time that passes and
    by what drafts gain.

    - A trial, of a few sequences, is made when its expected cost leaves a debt of ``TRIAL_DEBT`` plain steps at most;
      twice that, if what was seen so far promises a gain.
    - Reading more is an investment. It is made where a sequence's own drafts are expected to bring it in again, by what
      they gain and the tokens that are still to come; all together may be ``MAX_INVESTED`` plain steps.
    - With a debt of more than ``MAX_DEBT`` plain steps beside that there are no drafts at all.

    So the loss is bounded whatever happens: in the long run by ``ALLOWANCE`` of the time.

    Nothing here is random and no clock is read: the same measurements lead to the same choices.
    """

    ALLOWANCE = 0.01  # of the time may be spent on trying
    TRIAL_DEBT = 0.5  # plain steps that a trial may leave as a debt, and as many again if it is promising
    MAX_DEBT = 3.0
    MAX_CREDIT = 16.0  # what earlier gains allow to be lost
    MAX_INVESTED = 32.0
    MARGIN = 1.02  # the gain that drafts must promise
    RETURN = 2.0  # what reading must promise to bring in, in its own cost
    CAUTION = 1.0  # wrong drafts that are added to what all sequences have shown
    TRIAL_SEQUENCES = 4
    PASSED_OVER = 0.1  # plain steps of reading that are paid to try another sequence, for each draft seen of one
    REFRESH = 128  # steps with drafts after which plain ones are measured again
    NUM_PLAIN = 3  # plain steps at least: the first is not launched ahead, as those that follow may be
    PERIOD, LOOK = 8, 2  # of so many plain steps, only before the first two is looked for something better
    SMOOTHING = 0.1  # weight of a new measurement
    MEMORY = 0.9  # what a sequence's earlier drafts weigh after each step
    PRIOR = 0.7  # the rate of acceptance before anything was seen
    UNHIDDEN = 0.1  # plain steps that a step with drafts takes longer because it is not launched ahead

    def __init__(self, num_tokens: int, draft_cost: float = 0.0) -> None:
        """``draft_cost``: what a token costs the drafter, in what one costs the target: by their weights' bytes."""
        self._num_tokens = num_tokens
        self._draft_cost = draft_cost
        self._plain: dict[int, _Average] = {}  # seconds, by size class
        self._last_plain: dict[int, float] = {}
        self._added: dict[int, _AddedTime] = {}
        self._prompt: tuple[int, float] | None = None  # tokens and seconds of a large step
        self._reading: _Average | None = None  # seconds for a token, once it was measured
        self._rates: dict[Hashable, _Rate] = {}
        self._overall = _Rate()
        self._balance = 0.0  # seconds; a debt if less than 0
        self._invested = 0.0  # seconds of reading that gains have not paid for yet
        self._num_drafting = 0  # steps since the last plain one
        self._num_plain = 0  # steps since the last one with drafts

    def rests(self, num_sequences: int) -> bool:
        plain = self._plain.get(_size_class(num_sequences))
        if plain is None or self._balance < -self.MAX_DEBT * plain.value:
            return True
        if self._num_drafting:
            return self._num_drafting >= self.REFRESH
        since = self._num_plain - self.NUM_PLAIN
        # asked again when the step in flight is settled: so a look takes two steps
        return since < 0 or since % self.PERIOD >= self.LOOK

    def choose(self, sequences: Sequence[Prospect]) -> Sequence[int]:
        if not sequences or self.rests(len(sequences)):
            return [0] * len(sequences)
        view = self._view(sequences)
        chosen = self._invest(view) if self._overall.num_seen else None
        limits: list[int] = (self._trial(view) if chosen is None else chosen).tolist()
        return limits

    def observe(self, sequence: Hashable, limit: int, num_accepted: int) -> None:
        rate = self._rates.setdefault(sequence, _Rate())
        rate.add(num_accepted, num_accepted < limit, self.MEMORY)
        self._overall.add(num_accepted, num_accepted < limit, 0.99)

    def measure(self, limits: Sequence[int], seconds: float, num_tokens: int, num_read: int = 0) -> float:
        size = _size_class(len(limits))
        gain = reading = 0.0
        if not any(limits) and not num_read:
            self._num_plain, self._num_drafting = self._num_plain + 1, 0
            self._last_plain[size] = seconds
            # the first plain step was not launched ahead
            if self._num_plain > 1 or size not in self._plain:
                self._plain.setdefault(size, _Average()).add(seconds, self.SMOOTHING)
        else:
            self._num_plain, self._num_drafting = 0, self._num_drafting + 1
            if size in self._plain:
                # Others may take less of the machine than when plain steps were measured. That is no gain of drafts: a
                # step with them cannot take less than one without.
                plain = min(self._plain[size].value, self._last_plain[size])
                gain = plain * num_tokens / len(limits) - max(seconds, plain)
                reading = self._learn(limits, seconds, num_read, plain)
        self._book(gain + self.ALLOWANCE * seconds, reading, seconds)
        return gain

    def measure_prompts(self, num_tokens: int, seconds: float) -> None:
        if self._prompt is not None:
            known, took = self._prompt
            if 2 * num_tokens < known or (num_tokens < 2 * known and seconds / num_tokens > took / known):
                return
        self._prompt = num_tokens, seconds

    def release(self, sequence: Hashable) -> None:
        self._rates.pop(sequence, None)

    # --- what was measured -------------------------------------------------------------------------------------------

    def _learn(self, limits: Sequence[int], seconds: float, num_read: int, plain: float) -> float:
        """Correct what drafts, or else what reading costs; returns the seconds of the step that were for reading."""
        added, prior = self._added_time(len(limits), plain)
        drafting = plain * added.value(limits, prior)
        expected = num_read * self._reading_time()
        if expected <= drafting:
            if any(limits):
                added.add(limits, (seconds - expected) / plain - 1.0, prior)
            return expected
        reading = min(max(0.0, seconds - plain - drafting), 4.0 * expected)
        if self._reading is None:
            self._reading = _Average(expected / num_read)
        self._reading.add(reading / num_read, self.SMOOTHING)
        return reading

    def _book(self, income: float, reading: float, seconds: float) -> None:
        """Reading is booked apart, and paid for by what is over."""
        self._invested += reading
        self._balance += income + reading
        paid = min(self._invested, max(0.0, self._balance))
        self._invested -= paid
        self._balance = min(self._balance - paid, self.MAX_CREDIT * seconds)

    # --- estimates ---------------------------------------------------------------------------------------------------

    def _prompt_time(self) -> float:
        """Seconds that a token more adds to a large step."""
        if self._prompt is None:
            return 0.0
        num_tokens, seconds = self._prompt
        step = min((average.value for average in self._plain.values()), default=0.0)
        return max(0.0, seconds - step) / num_tokens

    def _reading_time(self) -> float:
        """Seconds that the drafter takes to read a token of many."""
        return self._prompt_time() * self._draft_cost if self._reading is None else self._reading.value

    def _added_time(self, num_sequences: int, plain: float) -> tuple[_AddedTime, np.ndarray]:
        """What drafts add to a step of so many sequences, and what would be expected of that [3]."""
        added = self._added.setdefault(_size_class(num_sequences), _AddedTime())
        verifying = self._prompt_time() * num_sequences / plain
        return added, np.array([self.UNHIDDEN, self._draft_cost, verifying])

    def _view(self, sequences: Sequence[Prospect]) -> _View:
        plain = self._plain[_size_class(len(sequences))].value
        added, prior = self._added_time(len(sequences), plain)
        overall, unknown = self._overall.value(0.0, self.CAUTION), _Rate()
        seen = [self._rates.get(sequence.key, unknown) for sequence in sequences]
        return _View(
            plain=plain,
            added=added.coefficients(prior),
            rates=np.array([rate.value(overall, 2.0) for rate in seen]),
            num_seen=np.array([rate.num_seen for rate in seen]),
            reading=np.array([sequence.num_unread for sequence in sequences]) * self._reading_time(),
            per_token=plain / len(sequences),
            num_expected=np.array([sequence.num_expected for sequence in sequences]),
        )

    # --- the choice --------------------------------------------------------------------------------------------------

    def _invest(self, view: _View) -> np.ndarray | None:
        """Drafts for all for whom it is worth to read what must be read [num_sequences]; None: for nobody."""
        left = self.MAX_INVESTED * view.plain - self._invested
        order = np.argsort(view.reading, kind="stable")
        joins = np.empty(len(order), bool)
        joins[order] = np.cumsum(view.reading[order]) <= left
        joins |= view.reading == 0.0
        while joins.any():
            gain, limits = self._best(view, np.where(joins, view.rates, 0.0), joins)
            if gain <= self.MARGIN:
                # without those who would have to read it may be better
                gain = 1.0
            with np.errstate(invalid="ignore"):
                saving = view.num_expected * view.per_token * (1.0 - 1.0 / gain)
            stays = joins & ((view.reading == 0.0) | (self.RETURN * view.reading < saving))
            if stays.sum() == joins.sum():
                return limits if gain > self.MARGIN else None
            joins = stays
        return None

    def _best(self, view: _View, rates: np.ndarray, joins: np.ndarray) -> tuple[float, np.ndarray]:
        """The drafts for those who join [num_sequences] that bring the most, and how many times what a plain step
        brings in the same time."""
        # powers[s, i - 1]: the probability that the i-th draft of sequence s counts
        powers = rates[:, None] ** np.arange(1, self._num_tokens + 1)
        best, chosen = 0.0, np.zeros(len(rates), np.int64)
        for depth in range(1, self._num_tokens + 1):
            # One draft more of one sequence adds to the step what so many tokens take. At least one for each, or
            # nothing more would be learned of the sequence.
            worth = (powers[:, :depth] >= view.added[2]).sum(axis=1)
            limits = np.where(joins, np.maximum(worth, 1), 0)
            counting = np.arange(depth) < limits[:, None]
            num_tokens = 1.0 + float((powers[:, :depth] * counting).sum(axis=1).mean())
            gain = num_tokens / (1.0 + max(0.0, float(view.added @ _features(limits))))
            if gain > best:
                best, chosen = gain, limits
        return best, chosen

    def _trial(self, view: _View) -> np.ndarray:
        """As many drafts for a few of the sequences as may be lost [num_sequences]."""
        everyone = np.ones(len(view.rates), bool)
        rate = self._overall.value(self.PRIOR, 0.5)
        gain, limits = self._best(view, np.full(len(view.rates), rate), everyone)
        promising = gain > self.MARGIN
        debt = self.TRIAL_DEBT * view.plain * (1 + (promising and self._overall.num_seen > 0))
        room = self._balance - self._invested + debt
        order = np.argsort(view.reading + self.PASSED_OVER * view.plain * view.num_seen, kind="stable")
        reading = np.cumsum(view.reading[order])
        for depth in range(int(limits.max()) if promising else 1, 0, -1):
            for count in range(min(self.TRIAL_SEQUENCES, len(order)), 0, -1):
                tried = np.zeros(len(order), np.int64)
                tried[order[:count]] = depth
                if reading[count - 1] + view.plain * float(view.added @ _features(tried)) <= room:
                    return tried
        return np.zeros(len(order), np.int64)


@dataclass(frozen=True, slots=True)
class _View:
    """What is known when drafts are chosen. Times in seconds."""

    plain: float  # of a step without drafts
    added: np.ndarray  # [3]: coefficients of _features, in plain steps
    rates: np.ndarray  # [num_sequences]: of acceptance, cautiously
    num_seen: np.ndarray  # [num_sequences]: drafts that this rests on
    reading: np.ndarray  # [num_sequences]: what must be read first
    per_token: float  # of plain steps
    num_expected: np.ndarray  # [num_sequences]: tokens to come


def _features(limits: Sequence[int] | np.ndarray) -> np.ndarray:
    """What the time that drafts add depends on: that there are any, the largest number and the mean."""
    numbers = np.asarray(limits)
    return np.array([1.0, numbers.max(), numbers.mean()])


class _AddedTime:
    """What drafts add to a step, in plain steps: linear in :func:`_features`, by least squares drawn to a prior. Later
    measurements count more than earlier ones."""

    FORGETTING = 0.95
    PRIOR_WEIGHT = 8.0  # about that of four measurements of single drafts, or of a quarter of one of four drafts

    def __init__(self) -> None:
        self._products = np.zeros((3, 3))
        self._targets = np.zeros(3)

    def coefficients(self, prior: np.ndarray) -> np.ndarray:
        """[3], where ``prior`` would be expected."""
        weight = self.PRIOR_WEIGHT
        solved = np.linalg.solve(self._products + weight * np.eye(3), self._targets + weight * prior)
        positive: np.ndarray = np.maximum(solved, 0.0)
        return positive

    def value(self, limits: Sequence[int], prior: np.ndarray) -> float:
        return float(self.coefficients(prior) @ _features(limits))

    def add(self, limits: Sequence[int], added: float, prior: np.ndarray) -> None:
        """A step has taken ``added`` plain steps longer; an outlier counts little."""
        features = _features(limits)
        added = min(max(0.0, added), 3.0 * self.value(limits, prior) + 0.5)
        self._products = self.FORGETTING * self._products + np.outer(features, features)
        self._targets = self.FORGETTING * self._targets + features * added


def _size_class(num_sequences: int) -> int:
    """Batches of similar size share their measurements."""
    return (num_sequences - 1).bit_length()


class _Average:
    """A mean at first, then an exponential moving average; a single outlier counts little."""

    __slots__ = ("_count", "value")

    def __init__(self, expected: float | None = None) -> None:
        """``expected`` counts as the first measurement."""
        self.value = expected or 0.0
        self._count = int(expected is not None)

    def add(self, value: float, smoothing: float) -> None:
        self._count += 1
        if self._count > 1:
            value = min(value, 4.0 * self.value)
        self.value += (value - self.value) * max(smoothing, 1.0 / self._count)


class _Rate:
    """How often a draft was right: drafts after the first wrong one were never put to the test."""

    __slots__ = ("_num_right", "_num_wrong")

    def __init__(self) -> None:
        self._num_right = 0.0
        self._num_wrong = 0.0

    @property
    def num_seen(self) -> float:
        """Drafts that were put to the test, of which earlier ones count less."""
        return self._num_right + self._num_wrong

    def add(self, num_right: int, wrong: bool, memory: float) -> None:
        self._num_right = self._num_right * memory + num_right
        self._num_wrong = self._num_wrong * memory + wrong

    def value(self, prior: float, weight: float) -> float:
        """The estimate; ``prior`` counts as ``weight`` drafts."""
        return (self._num_right + prior * weight) / (self.num_seen + weight)
