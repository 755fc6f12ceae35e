"""Steps made by hand: sequences in a shuffled paged cache, continued by any number of tokens each.

What the scheduler, the block manager and the runner do together, in the fewest lines that can be right, so that models
and attention backends can be tested without them.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import torch

from octavo.batch import ForwardBatch


class PagedSequences:
    """Sequences under names of your choice; each gets blocks, in random order, as it grows."""

    def __init__(self, *, num_blocks: int = 64, block_size: int = 4, seed: int = 0) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.lengths: dict[int, int] = {}
        self._free = random.Random(seed).sample(range(num_blocks), num_blocks)
        self._tables: dict[int, list[int]] = {}

    def batch(self, tokens: Mapping[int, Sequence[int]]) -> ForwardBatch:
        """The step that continues each named sequence by its tokens. Rows with one token come first."""
        order = sorted(tokens, key=lambda name: len(tokens[name]) > 1)
        flat, positions, slots, ends = [], [], [], [0]
        for name in order:
            begin = self.lengths.get(name, 0)
            end = begin + len(tokens[name])
            table = self._tables.setdefault(name, [])
            while len(table) * self.block_size < end:
                table.append(self._free.pop())
            self.lengths[name] = end
            flat += tokens[name]
            positions += range(begin, end)
            slots += [
                table[place // self.block_size] * self.block_size + place % self.block_size
                for place in range(begin, end)
            ]
            ends.append(len(flat))
        query_lens = [len(tokens[name]) for name in order]
        context_lens = [self.lengths[name] for name in order]
        tables = [self._tables[name] for name in order]
        width = max(map(len, tables))
        return ForwardBatch(
            tokens=torch.tensor(flat),
            positions=torch.tensor(positions),
            query_start=torch.tensor(ends, dtype=torch.int32),
            seq_lens=torch.tensor(context_lens, dtype=torch.int32),
            block_tables=torch.tensor([table + [0] * (width - len(table)) for table in tables], dtype=torch.int32),
            slots=torch.tensor(slots),
            logit_rows=torch.arange(len(flat)),
            max_query_len=max(query_lens),
            max_seq_len=max(context_lens),
            num_decodes=query_lens.count(1),
            query_lens=query_lens,
            context_lens=context_lens,
        )

    def split(self, tokens: Mapping[int, Sequence[int]], rows: torch.Tensor) -> dict[int, torch.Tensor]:
        """``rows`` [num_tokens, ...] of the step for ``tokens``, by sequence."""
        order = sorted(tokens, key=lambda name: len(tokens[name]) > 1)
        return dict(zip(order, rows.split([len(tokens[name]) for name in order]), strict=True))
