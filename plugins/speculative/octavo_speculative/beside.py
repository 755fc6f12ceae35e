"""Drafting with a model that runs beside the target: on the same requests, in the same slots and on blocks of the same
numbers, with caches of its own. It reads the target's tokens on the device, and writes its drafts where the target will
verify them.

What its caches hold is followed for each block (:class:`BlockContents`). So whatever a request shares with others
through the prefix cache or by forking is shared here too, and a request is caught up with in one way after its prompt,
accepted and rejected drafts, steps without drafts and preemptions: what is missing is computed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from octavo.batch import PlannedRow, StepPlan
from octavo.interfaces import DrafterContext, LoadedModel
from octavo.request import Request

if TYPE_CHECKING:
    from octavo.runner import LaunchedStep, Runner


class BlockContents:
    """Which tokens a model has computed in each block, as a hash of them and all before them.

    Position i of a sequence stands for its token i + ``shift``. Only full blocks count. A wrong match would cost drafts
    that are wrong, never a wrong token.
    """

    def __init__(self, num_blocks: int, block_size: int, shift: int = 0) -> None:
        self._block_size = block_size
        self._shift = shift
        self._keys: list[int | None] = [None] * num_blocks

    def num_known(self, tokens: Sequence[int], table: Sequence[int]) -> tuple[int, list[int]]:
        """How many leading positions the blocks of ``table`` hold, all but the last at most, and those blocks' keys."""
        keys: list[int] = []
        for block in table[: (len(tokens) - self._shift - 1) // self._block_size]:
            key = self._key(keys, tokens)
            if self._keys[block] != key:
                break
            keys.append(key)
        return len(keys) * self._block_size, keys

    def overwrite(self, table: Sequence[int], start: int, end: int, keys: list[int]) -> None:
        """Positions ``start`` to ``end`` of the sequence are about to be computed; ``keys`` are cut accordingly."""
        del keys[start // self._block_size :]
        for block in table[start // self._block_size : -(-end // self._block_size)]:
            self._keys[block] = None

    def fill(self, tokens: Sequence[int], table: Sequence[int], end: int, keys: list[int]) -> None:
        """The positions before ``end`` are there; ``keys`` of their full blocks are known in part, and extended."""
        while (len(keys) + 1) * self._block_size <= end:
            key = self._key(keys, tokens)
            self._keys[table[len(keys)]] = key
            keys.append(key)

    def _key(self, keys: Sequence[int], tokens: Sequence[int]) -> int:
        """Of the block after those of ``keys``."""
        before = keys[-1] if keys else hash(tuple(tokens[: self._shift]))
        begin = len(keys) * self._block_size + self._shift
        return hash((before, *tokens[begin : begin + self._block_size]))


class _Followed:
    """A request as far as the model has read it."""

    __slots__ = ("drafts", "epoch", "keys", "num_computed", "num_tokens")

    def __init__(self, epoch: int, num_computed: int, keys: list[int]) -> None:
        self.epoch = epoch  # the request's num_preemptions: blocks and slot have not changed since
        self.num_computed = num_computed  # leading positions in the cache, those of right drafts among them
        self.keys = keys  # of its full blocks
        self.num_tokens = 0  # how many there were when the drafts were made
        self.drafts: list[int] = []


class DrafterBeside:
    """What drafters with a model share; see :class:`octavo.interfaces.Drafter`.

    ``vocab_size``: tokens from there on are known to one of the models only. ``shift`` is that of
    :meth:`octavo.interfaces.LoadedModel.make_runner_beside`; with one, what was computed for drafts does not count
    later, since it came from hidden states that were guessed, too.
    """

    def __init__(
        self, model: LoadedModel, context: DrafterContext, *, vocab_size: int, max_row_tokens: int, shift: int = 0
    ) -> None:
        self.bytes_per_block = model.bytes_per_block
        self._model = model
        self._vocab_size = vocab_size
        self._max_row_tokens = max_row_tokens
        self._shift = shift
        self._block_size = context.block_size
        self._max_num_batched_tokens = context.max_num_batched_tokens
        self._followed: dict[Request, _Followed] = {}

    def start(self, target: Runner) -> None:
        self._runner = self._model.make_runner_beside(target, max_row_tokens=self._max_row_tokens, shift=self._shift)
        self._contents = BlockContents(target.num_blocks, self._block_size, self._shift)

    def num_unread(self, requests: Sequence[Request]) -> list[int]:
        return [self._num_unread(request) for request in requests]

    def draft(self, requests: Sequence[Request], limits: Sequence[int]) -> list[list[int] | None]:
        wanted = {
            request: limit
            for request, limit in zip(requests, limits, strict=True)
            if limit > 0 and self._follow(request)
        }
        drafting = self._catch_up(wanted)
        launched = []
        for num_drafts in range(max((wanted[request] for request in drafting), default=0)):
            # each step reads on the device what the one before has sampled there
            rows = [
                _row(request, self._followed[request].num_computed if num_drafts == 0 else end - 1, end)
                for request in drafting
                if wanted[request] > num_drafts and (end := self._length(request) + num_drafts)
            ]
            rows.sort(key=lambda row: row.num_tokens > 1)  # single tokens first: backends may treat them apart
            launched.append(self._runner.launch(StepPlan(rows)))
        self._collect(launched)
        for request in drafting:
            followed, length = self._followed[request], self._length(request)
            followed.num_computed = length
            if not self._shift:
                followed.num_computed += len(followed.drafts) - 1  # the last one was not read
            self._contents.fill(request.tokens, request.blocks, length, followed.keys)
        reading = wanted.keys() - set(drafting)
        return [
            None if request in reading else self._guesses(request) if request in wanted else [] for request in requests
        ]

    def release(self, request: Request) -> None:
        self._followed.pop(request, None)

    def _length(self, request: Request) -> int:
        """How many positions the request has for the model."""
        return len(request.tokens) - self._shift

    def _num_unread(self, request: Request) -> int:
        if self._current(request) is None and not self._follow(request):
            return self._length(request)
        num_missing = self._length(request) - self._followed[request].num_computed
        return num_missing if num_missing > self._max_row_tokens else 0

    def _current(self, request: Request) -> _Followed | None:
        """What is known of the request, if it has kept its blocks since."""
        followed = self._followed.get(request)
        return None if followed is None or followed.epoch != request.num_preemptions else followed

    def _follow(self, request: Request) -> bool:
        """Find out what of the request is computed; False if it has a token that the model does not know."""
        tokens, followed = request.tokens, self._current(request)
        if followed is None:
            followed = _Followed(request.num_preemptions, *self._contents.num_known(tokens, request.blocks))
            self._followed[request] = followed
            added: Sequence[int] = tokens
        else:
            added = tokens[followed.num_tokens :]
            num_right = _num_equal(followed.drafts, added)
            followed.num_computed = min(followed.num_computed, followed.num_tokens + num_right)
        followed.num_tokens, followed.drafts = len(tokens), []
        if max(added, default=-1) >= self._vocab_size:
            del self._followed[request]
            return False
        # the last position is computed in any case, for what follows it
        followed.num_computed = min(followed.num_computed, self._length(request) - 1)
        return True

    def _catch_up(self, wanted: dict[Request, int]) -> list[Request]:
        """Compute what is new to the model but for the last tokens, in one step of bounded size; returns for whom that
        was enough. The first draft comes from a step of few tokens a row, which may be a graph."""
        rows, ready = [], []
        budget = self._max_num_batched_tokens
        for request in sorted(wanted, key=lambda request: len(request.tokens) - self._followed[request].num_computed):
            followed, length = self._followed[request], self._length(request)
            self._contents.overwrite(request.blocks, followed.num_computed, length + wanted[request], followed.keys)
            start, end = followed.num_computed, length - 1
            if length - start > self._max_row_tokens:
                num_granted = min(end - start, budget)
                budget -= num_granted
                if num_granted:
                    rows.append(_row(request, start, start + num_granted, samples=False))
                followed.num_computed += num_granted
                self._contents.fill(request.tokens, request.blocks, followed.num_computed, followed.keys)
            if length - followed.num_computed <= self._max_row_tokens:
                ready.append(request)
        if rows:
            rows.sort(key=lambda row: row.num_tokens > 1)
            self._runner.launch(StepPlan(rows))
        return ready

    def _collect(self, launched: Sequence[LaunchedStep]) -> None:
        for step in launched:
            for row, tokens in zip(step.plan.rows, step.wait().token_ids, strict=True):
                self._followed[row.request].drafts.extend(tokens)

    def _guesses(self, request: Request) -> list[int]:
        """What was drafted now, as far as the target has it: the model's vocabulary may be padded further."""
        return list(itertools.takewhile(lambda token: token < self._vocab_size, self._followed[request].drafts))


def _row(request: Request, start: int, end: int, samples: bool = True) -> PlannedRow:
    return PlannedRow(request, start, end - start, samples, epoch=request.num_preemptions)


def _num_equal(first: Sequence[int], second: Sequence[int]) -> int:
    """How many leading elements are the same."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
