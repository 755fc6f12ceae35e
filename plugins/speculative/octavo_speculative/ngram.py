"""Drafts from the sequence itself: what followed the last time when it ended like this (Saxena 2023).

Costs no memory on the device and almost no time, and is right wherever text is copied: editing, summaries, code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from octavo import EngineConfig
from octavo.interfaces import DrafterContext
from octavo.request import Request
from octavo_speculative.settings import NgramSettings

if TYPE_CHECKING:
    from octavo.runner import Runner


class NgramIndex:
    """Where each run of ``shortest`` to ``longest`` tokens of one growing sequence was last followed by another token.

    Each token is looked at once: a lookup costs as much as there are new tokens, however long the sequence is.
    """

    def __init__(self, shortest: int, longest: int) -> None:
        self._lengths = range(longest, shortest - 1, -1)
        self._followers: dict[tuple[int, ...], int] = {}  # run -> position of the token after it
        self._num_indexed = 0  # positions that were entered as followers

    def guess(self, tokens: Sequence[int], limit: int) -> list[int]:
        """Up to ``limit`` tokens that followed the latest earlier occurrence of the longest end of ``tokens``.

        ``tokens`` must begin with those of the call before. A guess that reaches the sequence's end goes on with
        itself, so that a repetition is continued for as long as was asked.
        """
        self._extend(tokens)
        for length in self._lengths:
            if length >= len(tokens):
                continue
            position = self._followers.get(tuple(tokens[-length:]))
            if position is not None:
                distance = len(tokens) - position
                guess = list(tokens[position : position + limit])
                while len(guess) < limit:
                    guess.append(guess[-distance])
                return guess
        return []

    def _extend(self, tokens: Sequence[int]) -> None:
        for position in range(self._num_indexed, len(tokens)):
            for length in self._lengths:
                if length <= position:
                    self._followers[tuple(tokens[position - length : position])] = position
        self._num_indexed = len(tokens)


class Ngram:
    """The drafter ``ngram``; see :class:`octavo.interfaces.Drafter`."""

    bytes_per_block = 0

    def __init__(self, config: EngineConfig, context: DrafterContext) -> None:
        self._settings = NgramSettings.of(config)
        self._indexes: dict[Request, NgramIndex] = {}

    def start(self, target: Runner) -> None:
        pass

    def num_unread(self, requests: Sequence[Request]) -> list[int]:
        return [0] * len(requests)

    def draft(self, requests: Sequence[Request], limits: Sequence[int]) -> list[list[int]]:
        return [
            self._index(request).guess(request.tokens, limit) if limit > 0 else []
            for request, limit in zip(requests, limits, strict=True)
        ]

    def release(self, request: Request) -> None:
        self._indexes.pop(request, None)

    def _index(self, request: Request) -> NgramIndex:
        index = self._indexes.get(request)
        if index is None:
            index = self._indexes[request] = NgramIndex(self._settings.shortest, self._settings.longest)
        return index
