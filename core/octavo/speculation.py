"""Guessing ahead: which running requests get drafts, and how many, so that it never costs more than it brings.

A :class:`~octavo.interfaces.Drafter` guesses; the scheduler and the runner verify guesses like any other tokens; what
stands here decides how many guesses to ask for. No torch here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from statistics import median
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
        self._usual_length = 0.0  # tokens that finished sequences have brought, recent ones above all

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
                self._usual_length += 0.1 * (item.row.request.num_output - self._usual_length)
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
        """What speaks for and against drafts. A sequence that may stop early is taken to be half done, or to become as
        long as others."""
        prospects = []
        for request, num_unread in zip(requests, self._drafter.num_unread(requests), strict=True):
            expected: float = request.max_total_tokens - len(request.tokens)
            if request.stop_token_ids or request.params.stop:
                expected = min(expected, max(request.num_output, self._usual_length - request.num_output))
            prospects.append(Prospect(request.key, num_unread, expected))
        return prospects

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
    num_unread: int  # tokens that the drafter has to read first
    num_expected: float  # tokens that the sequence is likely to bring yet


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
    that the drafter did not make counts as wrong); so sequences whose drafts are right get more of them. What drafts
    add to a step follows from the sizes of the models and the time that prompts took, corrected by what steps with as
    many drafts took.

    The rates must be tried out, and trying costs; so does reading, for a drafter with a model of its own: a sequence's
    whole context before its first draft. One balance is kept, in seconds: whatever a step with drafts took longer than
    plain steps would have for the same tokens is taken from it, what drafts gain and ``ALLOWANCE`` of all time that
    passes is added. Trials are for a few sequences. While most drafts were right, or none were seen, a trial is of as
    many as there may be and may leave a debt of ``PROMISING_DEBT`` plain steps; else it is of one each and may leave
    ``TRIAL_DEBT``. So little can be lost, while one trial often shows enough. What it shows is then taken with
    ``CAUTION``. If drafts promise to gain, reading may leave a debt of ``MAX_DEBT``, where sequences are likely to
    bring it in again. So the loss is bounded whatever happens: in the long run by ``ALLOWANCE`` of the time.

    Nothing here is random and no clock is read: the same measurements lead to the same choices.
    """

    ALLOWANCE = 0.005  # of the time may be spent on trying
    TRIAL_DEBT = 1.5  # plain steps
    PROMISING_DEBT = 3.0
    MAX_DEBT = 64.0
    MAX_CREDIT = 8.0  # plain steps that may be saved up, for trials with much to read
    MARGIN = 1.02  # the gain that drafts must promise
    RETURN = 2.0  # what reading must promise to bring in, in its own cost
    CAUTION = 2.0  # wrong drafts that are added to what all sequences have shown
    PROMISE = 0.5  # the rate of acceptance from which trials are worth more
    TRIAL_SEQUENCES = 4
    PASSED_OVER = 0.1  # plain steps of reading that are paid to try another sequence, for each draft seen of one
    REFRESH = 128  # steps with drafts after which plain ones are measured again
    NUM_PLAIN = 3  # plain steps at least
    PERIOD = 8  # of so many plain steps, one is taken for looking whether drafts are worth it
    MAX_ERROR = 2.0  # plain steps, for each draft
    UNHIDDEN = 0.2  # plain steps that a step with drafts takes longer, as it is not launched ahead (H200: 0.18 to 0.29)
    MEMORY = 0.9  # what a sequence's earlier drafts weigh after each step
    LONG_MEMORY = 0.99  # the same for what is known of all

    def __init__(self, num_tokens: int, draft_cost: float = 0.0, reading_cost: float = 0.0) -> None:
        """What the drafter takes, in what the target takes, by the weights that each reads: ``draft_cost`` for a step
        that drafts, ``reading_cost`` for each token of a prompt."""
        self._num_tokens = num_tokens
        self._draft_cost = draft_cost
        self._reading_cost = reading_cost
        self._plain: dict[int, _Recent] = {}  # seconds, by size class
        self._errors: dict[tuple[int, int], _Recent] = {}  # plain steps, by size class and the most drafts
        self._prompts = np.zeros(3)  # sums for _token_time
        self._reading: _Recent | None = None  # seconds for a token
        self._catching_up = _Recent([0.0])  # seconds, however little is read
        self._rates: dict[Hashable, _Rate] = {}
        self._overall = _Rate()
        self._balance = 0.0  # seconds; a debt if less than 0
        self._num_drafting = 0  # steps since the last plain one
        self._num_plain = 0  # steps since the last one with drafts

    def rests(self, num_sequences: int) -> bool:
        plain = self._plain.get(_size_class(num_sequences))
        if plain is None or self._balance < -self.MAX_DEBT * plain.value:
            return True
        if self._num_drafting:
            return self._num_drafting >= self.REFRESH
        since = self._num_plain - self.NUM_PLAIN
        return since < 0 or since % self.PERIOD > 1  # asked again when the step in flight is settled

    def choose(self, sequences: Sequence[Prospect]) -> Sequence[int]:
        if not sequences or self.rests(len(sequences)):
            return [0] * len(sequences)
        num_unread = np.array([sequence.num_unread for sequence in sequences])
        reading = num_unread * self._reading_time() + (num_unread > 0) * (self._catching_up.value / len(sequences))
        limits = self._best(sequences, reading)
        if limits is None:
            limits = self._trial(sequences, reading)
        chosen: list[int] = limits.tolist()
        return chosen

    def observe(self, sequence: Hashable, limit: int, num_accepted: int) -> None:
        rate = self._rates.setdefault(sequence, _Rate())
        rate.add(num_accepted, num_accepted < limit, self.MEMORY)
        self._overall.add(num_accepted, num_accepted < limit, self.LONG_MEMORY)

    def measure(self, limits: Sequence[int], seconds: float, num_tokens: int, num_read: int = 0) -> float:
        size, gain = _size_class(len(limits)), 0.0
        if not any(limits) and not num_read:
            if self._num_drafting and size in self._plain:
                gain = min(0.0, self._plain[size].value - seconds)  # not launched ahead either: a cost of those before
            else:
                self._plain.setdefault(size, _Recent()).add(seconds)
            self._num_plain, self._num_drafting = self._num_plain + 1, 0
        else:
            self._num_plain, self._num_drafting = 0, self._num_drafting + 1
            if size in self._plain:
                # Others may take less of the machine than when plain steps were measured. That is no gain of drafts: a
                # step with them cannot take less than one without.
                plain = self._plain[size].value
                gain = plain * num_tokens / len(limits) - max(seconds, plain)
                self._learn(limits, seconds, num_read, plain)
        self._balance = min(self._balance + gain + self.ALLOWANCE * seconds, self.MAX_CREDIT * seconds)
        return gain

    def measure_prompts(self, num_tokens: int, seconds: float) -> None:
        self._prompts = self.LONG_MEMORY * self._prompts + num_tokens * np.array([num_tokens, 1.0, seconds])

    def release(self, sequence: Hashable) -> None:
        self._rates.pop(sequence, None)

    # --- what things take --------------------------------------------------------------------------------------------

    def _learn(self, limits: Sequence[int], seconds: float, num_read: int, plain: float) -> None:
        """Correct what is expected: of drafts, from steps without reading; else of reading, for each token where much
        was read and for the whole where little was."""
        added = plain * self._added(limits, plain)
        reading = num_read * self._reading_time()
        if reading > added:
            if self._reading is None:
                self._reading = _Recent([reading / num_read])
            self._reading.add(max(0.0, seconds - plain - added - self._catching_up.value) / num_read)
        elif num_read:
            self._catching_up.add(max(0.0, seconds - plain - added - reading))
        else:
            expected = self._expected(limits, plain)
            deepest = max(limits)
            error = self._errors.setdefault((_size_class(len(limits)), deepest), _Recent([0.0]))
            # one pause says no more than that a draft takes as long as two plain steps, which never pays either
            error.add(min(max(0.0, seconds / plain - 1.0) - expected, self.MAX_ERROR * deepest))

    def _token_time(self) -> float:
        """Seconds that a token more adds to a step of the target, from those with prompts: the slope of a line through
        a plain step, by least squares, so that large steps say the most."""
        squares, num_tokens, seconds = self._prompts
        plain = min((recent.value for recent in self._plain.values()), default=0.0)
        return max(0.0, float(seconds - plain * num_tokens) / squares) if squares else 0.0

    def _reading_time(self) -> float:
        """Seconds that the drafter takes to read a token of many."""
        return self._token_time() * self._reading_cost if self._reading is None else self._reading.value

    def _expected(self, limits: Sequence[int] | np.ndarray, plain: float) -> float:
        """What drafts should add to a step, in plain steps: a step of the drafter for each of the most drafts that a
        sequence gets, a token to be verified for each of all, and that such a step is not launched ahead."""
        return self.UNHIDDEN + self._draft_cost * max(limits) + sum(limits) * self._token_time() / plain

    def _added(self, limits: Sequence[int] | np.ndarray, plain: float) -> float:
        """The same, corrected by what steps with as many drafts, or else with fewer, or else with more, were found to
        take."""
        size, error = _size_class(len(limits)), 0.0
        deepest = max(limits)
        for depth in (*range(deepest, 0, -1), *range(deepest + 1, self._num_tokens + 1)):
            if (size, depth) in self._errors:
                error = self._errors[size, depth].value
                if error > 0.0 and depth < deepest:
                    error *= deepest / depth  # each draft more takes the drafter a step more
                break
        return max(0.0, self._expected(limits, plain) + error)

    # --- the choice --------------------------------------------------------------------------------------------------

    def _best(self, sequences: Sequence[Prospect], reading: np.ndarray) -> np.ndarray | None:
        """The drafts for each [num_sequences] that promise the most tokens for the time; None: no drafts do.

        ``reading``: seconds that the drafter needs first for each sequence [num_sequences]."""
        if not self._overall.num_seen:
            return None
        num_sequences = len(sequences)
        plain = self._plain[_size_class(num_sequences)].value
        num_expected = np.array([sequence.num_expected for sequence in sequences])
        overall, unknown = self._overall.value(0.0, self.CAUTION), _Rate()
        rates = np.array([self._rates.get(sequence.key, unknown).value(overall, 2.0) for sequence in sequences])
        # powers[s, i - 1]: the probability that the i-th draft of sequence s counts
        powers = rates[:, None] ** np.arange(1, self._num_tokens + 1)
        verifying = self._token_time() * num_sequences / plain  # tokens that come in the time that a draft's takes
        worth = np.maximum((powers >= verifying).sum(axis=1), 1)  # with none, no more would be learned of a sequence
        order = np.argsort(reading, kind="stable")
        affordable = np.empty(num_sequences, bool)
        affordable[order] = np.cumsum(reading[order]) <= self._balance + self.MAX_DEBT * plain
        best, chosen = self.MARGIN, None
        for depth in range(1, self._num_tokens + 1):
            limits = np.minimum(worth, depth)
            num_new = 1.0 + np.where(np.arange(depth) < limits[:, None], powers[:, :depth], 0.0).sum(axis=1)
            # what drafts for all bring to a sequence in a step, less the tokens it would have had in the time that its
            # own verification and its part of the rest take
            rest = self._added(limits, plain) - verifying * limits.mean()
            saved = num_new - 1.0 - verifying * limits - rest
            saving = saved / num_new * num_expected * plain / num_sequences
            joins = (reading == 0.0) | (affordable & (self.RETURN * reading < saving))
            limits = np.where(joins, limits, 0)
            if not joins.any():
                continue
            gain = np.where(joins, num_new, 1.0).mean() / (1.0 + self._added(limits, plain))
            if gain > best:
                best, chosen = gain, limits
        return chosen

    def _trial(self, sequences: Sequence[Prospect], reading: np.ndarray) -> np.ndarray:
        """Drafts for as many of a few sequences as may be lost [num_sequences]: for those of whom little was seen and
        little is to be read. As many for each as there may be, and step after step, unless most that were seen have
        been wrong: what a step with drafts costs first of all hardly depends on their number."""
        none = np.zeros(len(sequences), np.int64)
        promising = self._overall.value(1.0, 1.0) >= self.PROMISE
        if self._num_drafting and not promising:
            return none
        plain, unknown = self._plain[_size_class(len(sequences))].value, _Rate()
        num_seen = np.array([self._rates.get(sequence.key, unknown).num_seen for sequence in sequences])
        deepest, debt = (self._num_tokens, self.PROMISING_DEBT) if promising else (1, self.TRIAL_DEBT)
        powers = self._overall.value(0.0, self.CAUTION) ** np.arange(1, deepest + 1)
        order = np.argsort(reading + self.PASSED_OVER * plain * num_seen * (not promising), kind="stable")
        for depth, count in product(range(deepest, 0, -1), range(min(self.TRIAL_SEQUENCES, len(order)), 0, -1)):
            limits = none.copy()
            limits[order[:count]] = depth
            loss = plain * (self._added(limits, plain) - powers[:depth].sum() * count / len(order))
            loss += reading[order[:count]].sum()
            if loss <= debt * plain:  # rather waited for than tried with fewer
                return limits if loss <= self._balance + debt * plain else none
        return none


def _size_class(num_sequences: int) -> int:
    """Batches of similar size share their measurements."""
    return (num_sequences - 1).bit_length()


class _Recent:
    """The median of the last five measurements: to one that is unusual it does not matter how much."""

    __slots__ = ("_values", "value")

    def __init__(self, expected: Sequence[float] = ()) -> None:
        """``expected`` count as the first measurements."""
        self._values = deque(expected, maxlen=5)
        self.value = median(expected) if expected else 0.0

    def add(self, value: float) -> None:
        self._values.append(value)
        self.value = median(self._values)


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
