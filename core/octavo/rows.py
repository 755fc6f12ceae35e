"""A step's plan as arrays on the host: no loop over tokens, and none over rows but to read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from octavo.batch import PlannedRow


@dataclass(frozen=True, slots=True)
class RowArrays:
    """A plan's numbers as int64 arrays; positions are those of tokens within their sequences."""

    slots: np.ndarray  # [num_rows]
    query_lens: np.ndarray  # [num_rows]
    query_start: np.ndarray  # [num_rows + 1]
    ends: np.ndarray  # [num_rows]: context length with this step's tokens
    token_slots: np.ndarray  # [num_tokens]
    positions: np.ndarray  # [num_tokens]
    sampled: np.ndarray  # [num_sampled]: the row of each token to be sampled
    first_sampled: np.ndarray  # [num_sampled]: the index in ``sampled`` of the first token of the same row
    sampled_positions: np.ndarray  # [num_sampled]: where that token will stand
    logit_tokens: np.ndarray  # [num_sampled]: the token of this step whose hidden state decides it
    num_decodes: int  # leading rows of a single token
    has_drafts: bool  # whether any row is to sample more than one token

    @classmethod
    def of(cls, planned: Sequence[PlannedRow]) -> RowArrays:
        num_rows = len(planned)
        slots = np.array([row.request.slot for row in planned], np.int64)
        ends = np.array([row.start for row in planned], np.int64)
        query_lens = np.array([row.num_tokens for row in planned], np.int64)
        # a row that samples decides one token per draft and one more
        num_sampled = np.array([len(row.drafts) + 1 if row.samples else 0 for row in planned], np.int64)
        ends += query_lens
        query_start = np.zeros(num_rows + 1, np.int64)
        np.cumsum(query_lens, out=query_start[1:])
        num_tokens = int(query_start[-1])
        if num_tokens == num_rows == num_sampled.sum() and num_sampled.all():  # decodes: the same without arithmetic
            every = np.arange(num_rows)
            return cls(
                slots, query_lens, query_start, ends, slots, ends - 1, every, every, ends, every, num_rows, False
            )
        row_of_token = np.repeat(np.arange(num_rows), query_lens)
        sampled = np.repeat(np.arange(num_rows), num_sampled)
        first_sampled = (np.cumsum(num_sampled) - num_sampled)[sampled]
        offset = np.arange(len(sampled)) - first_sampled - num_sampled[sampled]  # -num_sampled .. -1
        return cls(
            slots=slots,
            query_lens=query_lens,
            query_start=query_start,
            ends=ends,
            token_slots=slots[row_of_token],
            positions=np.arange(num_tokens) + (ends - query_start[1:])[row_of_token],
            sampled=sampled,
            first_sampled=first_sampled,
            sampled_positions=ends[sampled] + offset + 1,
            logit_tokens=query_start[sampled + 1] + offset,
            num_decodes=int((query_lens == 1).sum()),
            has_drafts=bool((num_sampled > 1).any()),
        )

    def num_drafts_before(self, entry: int) -> int:
        """How many drafts of its own row a sampled token follows."""
        return entry - int(self.first_sampled[entry])
