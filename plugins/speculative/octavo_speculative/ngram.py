"""Drafts from the sequence itself: what followed the last time when it ended like this (Saxena 2023).

Costs no memory and little time, and is right wherever text is copied: editing, summaries, code. The search goes through
the tokens that lie on the device, for all sequences at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo import EngineConfig
from octavo.interfaces import DrafterContext
from octavo.request import Request
from octavo_speculative.settings import NgramSettings

if TYPE_CHECKING:
    from octavo.runner import Runner


def propose(tokens: Tensor, lengths: Tensor, settings: NgramSettings, limit: int) -> Tensor:
    """What followed the latest earlier occurrence of the longest end of each sequence [num_sequences, limit], int64; -1
    where no end has occurred before. A guess that reaches the sequence's end goes on with itself, so that a repetition
    is continued for as long as is asked.

    ``tokens`` [num_sequences, max_length] int64, whatever stands behind a sequence's end; ``lengths`` [num_sequences]
    int64, at least 1. Nothing here waits for the device.
    """
    max_length, longest = tokens.shape[1], settings.longest
    places = torch.arange(max_length, device=tokens.device)
    padded = F.pad(tokens, (longest, 0), value=-1)  # no end reaches beyond the beginning
    ends = padded.gather(1, lengths[:, None] + torch.arange(longest, device=tokens.device))
    # num_same[s, p]: tokens of sequence s before place p that are those at its end
    num_same = torch.zeros_like(tokens)
    is_same = places < lengths[:, None]
    for back in range(longest - 1, -1, -1):
        is_same = is_same & (padded[:, back : back + max_length] == ends[:, back, None])
        num_same += is_same
    rank = torch.where(
        num_same >= settings.shortest, num_same * max_length + places, -1
    )  # the longest, then the latest
    best = rank.amax(dim=1, keepdim=True)
    follower = best % max_length
    ahead = torch.arange(limit, device=tokens.device) % (lengths[:, None] - follower).clamp(min=1)
    return torch.where(best >= 0, tokens.gather(1, follower + ahead), -1)


@dataclass(frozen=True, slots=True)
class NgramNeed:
    """The operation ``ngram``: called with ``(table [num_slots, num_columns] int64, slots, lengths)``, the rows of some
    sequences and how long they are, it returns what :func:`propose` says of them, with ``limit`` guesses for each."""

    device: torch.device
    settings: NgramSettings
    limit: int


class TorchNgram:
    """The operation ``ngram`` anywhere."""

    def __init__(self, need: NgramNeed) -> None:
        self._need = need

    @classmethod
    def missing(cls, need: NgramNeed) -> list[str]:
        return []

    def __call__(self, table: Tensor, slots: Sequence[int], lengths: Sequence[int]) -> Tensor:
        rows, ends = torch.tensor([slots, lengths], device=table.device)
        return propose(table[:, : max(lengths)][rows], ends, self._need.settings, self._need.limit)


class Ngram:
    """The drafter ``ngram``; see :class:`octavo.interfaces.Drafter`."""

    bytes_per_block = 0

    def __init__(self, config: EngineConfig, context: DrafterContext) -> None:
        need = NgramNeed(context.device, NgramSettings.of(config), config.speculative.num_tokens)
        self._propose = context.choose_kernel("ngram", need)(need)

    def start(self, target: Runner) -> None:
        self._tokens = target.tokens
        self._propose(self._tokens, [0], [1])  # compiled now rather than when there are requests

    def num_unread(self, requests: Sequence[Request]) -> list[int]:
        return [0] * len(requests)

    @torch.inference_mode()
    def draft(self, requests: Sequence[Request], limits: Sequence[int]) -> list[list[int]]:
        wanted = [request for request, limit in zip(requests, limits, strict=True) if limit > 0]
        if not wanted:
            return [[] for _ in requests]
        slots, lengths = [request.slot for request in wanted], [len(request.tokens) for request in wanted]
        proposed = self._propose(self._tokens, slots, lengths)
        found = iter(proposed.tolist())  # the one wait, for all
        guesses = (next(found) if limit > 0 else [] for limit in limits)
        return [guess[:limit] if guess and guess[0] >= 0 else [] for guess, limit in zip(guesses, limits, strict=True)]

    def release(self, request: Request) -> None:
        pass
