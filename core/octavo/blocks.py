"""Paged memory for keys and values: which block belongs to whom. Numbers only; no torch, no configuration.

A block is free or used. Used blocks have a reference count: the number of tables that hold them. Freed blocks keep
their contents and queue up at the tail of one ordered free list; a block that is taken from its head is overwritten,
so the prefix cache is told to forget it just then. That order is least-recently-used eviction, with no eviction code.

The prefix cache learns of a prompt's blocks before they are computed: they are *promised* until then, and whoever
finds one knows that it need only wait. A promised block has a single holder. If that one gives it up, it is forgotten.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from octavo.prefix import NoPrefixCache, PrefixCache


class BlockManager:
    """Hands out blocks of ``block_size`` tokens, ids 0 to ``num_blocks`` - 1. A table is a request's list of them."""

    def __init__(self, num_blocks: int, block_size: int, prefix_cache: PrefixCache | None = None) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_cache = NoPrefixCache() if prefix_cache is None else prefix_cache
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._references = [0] * num_blocks
        self._promised: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.block_size)

    def reserve(self, table: list[int], num_tokens: int) -> bool:
        """Extend ``table`` to hold ``num_tokens`` tokens; False, and nothing changed, if blocks are lacking."""
        missing = self.blocks_for(num_tokens) - len(table)
        if missing <= 0:
            return True
        if missing > len(self._free):
            return False
        table.extend([self._take() for _ in range(missing)])
        return True

    def lookup(self, tokens: Sequence[int], salt: bytes) -> list[int]:
        """The blocks that hold the leading full blocks of ``tokens``, or are promised to; no reference changes."""
        return self.prefix_cache.lookup(tokens, salt)

    def share(self, found: Sequence[int]) -> list[int]:
        """A new table that begins with blocks which :meth:`lookup` has just found; none of them may be promised."""
        for block in found:
            self._add_reference(block)
        return list(found)

    def is_promised(self, block: int) -> bool:
        """Whether the block's content is known and still to be computed by the request that holds it."""
        return block in self._promised

    def last_promised(self, found: Sequence[int]) -> int | None:
        """The last of the blocks that is promised."""
        if self._promised.isdisjoint(found):
            return None
        return next(block for block in reversed(found) if block in self._promised)

    def fork(self, table: Sequence[int], num_tokens: int) -> tuple[list[int], list[tuple[int, int]]] | None:
        """A second table for the first ``num_tokens`` tokens of ``table``.

        Full blocks are shared: nobody writes to them any more. A partly filled last block is written by both owners,
        so the new table gets a block of its own, and the copy ``(source, target)`` to make before the next write.
        None, and nothing changed, if that block is lacking.
        """
        num_full = num_tokens // self.block_size
        if num_tokens % self.block_size == 0:
            copies: list[tuple[int, int]] = []
            own: list[int] = []
        elif self._free:
            own = [self._take()]
            copies = [(table[num_full], own[0])]
        else:
            return None
        return [*self.share(table[:num_full]), *own], copies

    def release(self, table: list[int]) -> None:
        """Give up every block of ``table`` and empty it; the last block is the first to be reused."""
        for block in reversed(table):
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
            if block in self._promised:
                self._promised.remove(block)
                self.prefix_cache.forget(block)
        table.clear()

    def promise(
        self, tokens: Sequence[int], table: Sequence[int], num_stored: int, num_tokens: int, salt: bytes
    ) -> int:
        """Like :meth:`store`, before the ``num_tokens`` tokens are computed: :meth:`fill` says when they are."""
        self._promised.update(table[num_stored : num_tokens // self.block_size])
        return self.store(tokens, table, num_stored, num_tokens, salt)

    def fill(self, table: Sequence[int], start: int, end: int) -> None:
        """The tokens from ``start`` to ``end`` are computed in the next step.

        Blocks that are full then may be shared at once: in a step all keys and values are written before any are read.
        """
        self._promised.difference_update(table[start // self.block_size : end // self.block_size])

    def store(self, tokens: Sequence[int], table: Sequence[int], num_stored: int, num_tokens: int, salt: bytes) -> int:
        """Tell the prefix cache of the blocks that the first ``num_tokens`` computed tokens have filled.

        ``num_stored`` of them are known from earlier calls; returns the new number.
        """
        num_full = num_tokens // self.block_size
        if num_full > num_stored:
            self.prefix_cache.store(tokens, table[:num_full], num_stored, salt)
            return num_full
        return num_stored

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Prove that nothing is lost or held twice; ``tables`` are all tables in use.

        Raises:
            AssertionError: says which block is wrong.
        """
        counts = Counter(block for table in tables for block in table)
        for block in range(self.num_blocks):
            held, free = self._references[block], block in self._free
            assert held == counts[block], f"block {block} has {held} references but stands in {counts[block]} tables"
            assert free == (held == 0), f"block {block} has {held} references and is {'free' if free else 'not free'}"
        assert len(self._free) + sum(count > 0 for count in self._references) == self.num_blocks
        for block in self._promised:
            assert counts[block] == 1, f"block {block} is promised by {counts[block]} tables"

    def _take(self) -> int:
        block, _ = self._free.popitem(last=False)
        self.prefix_cache.forget(block)
        self._references[block] = 1
        return block

    def _add_reference(self, block: int) -> None:
        if self._references[block] == 0:
            del self._free[block]
        self._references[block] += 1
