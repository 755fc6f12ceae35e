"""Steps made by hand: sequences in a shuffled paged cache, continued by any number of tokens each.

What the scheduler, the block manager and the runner do together, in the fewest lines that can be right, so that models
and attention backends can be tested without them; and for attention kernels, random queries over such a cache.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class RaggedQueries:
    """What an attention kernel is given, at random, for rows of any lengths."""

    query: torch.Tensor  # [num_tokens, num_heads, head_dim]
    kv: torch.Tensor  # [num_blocks, 2, num_kv_heads, block_size, head_dim], some of the blocks nobody's
    spoiled: torch.Tensor  # the same, but no number wherever no row has a token
    block_tables: torch.Tensor  # [num_rows, max_num_blocks] int32
    query_start: torch.Tensor  # [num_rows + 1] int32
    seq_lens: torch.Tensor  # [num_rows] int32
    num_decodes: int  # leading rows with one query
    max_query_len: int

    @classmethod
    def make(
        cls,
        rows: Sequence[tuple[int, int]],
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> RaggedQueries:
        """Rows are (query length, context length)."""
        query_lens, context_lens = zip(*rows, strict=True)
        counts = [-(-length // block_size) for length in context_lens]
        blocks = torch.randperm(sum(counts) + 3)
        tables = torch.zeros(len(rows), max(counts) + 1, dtype=torch.int32)
        used = torch.zeros(len(blocks), block_size, dtype=torch.bool)
        for row, (count, mine) in enumerate(zip(counts, blocks[: sum(counts)].split(counts), strict=True)):
            tables[row, :count] = mine
            used[mine] = (torch.arange(count * block_size) < context_lens[row]).view(count, block_size)
        kv = torch.randn(len(blocks), 2, num_kv_heads, block_size, head_dim, device=device, dtype=dtype)
        spoiled = kv.clone()
        spoiled.transpose(1, 3)[~used.to(device)] = float("nan")
        return cls(
            torch.randn(sum(query_lens), num_heads, head_dim, device=device, dtype=dtype),
            kv,
            spoiled,
            tables.to(device),
            torch.tensor([0, *query_lens], device=device).cumsum(0).int(),
            torch.tensor(context_lens, device=device, dtype=torch.int32),
            next((row for row, length in enumerate(query_lens) if length != 1), len(rows)),
            max(query_lens),
        )

    @property
    def rows(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Block tables, where queries start, and the contexts' lengths, as kernels take them."""
        return self.block_tables, self.query_start, self.seq_lens

    @property
    def counts(self) -> dict[str, int]:
        """What a plan is made from, but for the longest context."""
        return {
            "num_rows": len(self.seq_lens),
            "num_tokens": len(self.query),
            "num_decodes": self.num_decodes,
            "max_query_len": self.max_query_len,
        }
