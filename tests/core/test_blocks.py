"""Blocks: nothing is lost or held twice, contents stay findable until they are overwritten."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from octavo.blocks import BlockManager
from octavo_cache.hash_chain import HashChain

BLOCK = 4


def test_reserve_extends_a_table_to_hold_the_tokens() -> None:
    manager = BlockManager(4, BLOCK)
    table: list[int] = []
    assert manager.reserve(table, 5)
    assert len(table) == 2
    assert manager.reserve(table, 8)
    assert len(table) == 2
    assert manager.num_free == 2
    manager.check([table])


def test_reserve_changes_nothing_when_blocks_are_lacking() -> None:
    manager = BlockManager(2, BLOCK)
    table: list[int] = []
    assert not manager.reserve(table, 3 * BLOCK)
    assert table == []
    assert manager.num_free == 2


def test_the_last_block_of_a_released_table_is_reused_first() -> None:
    manager = BlockManager(3, BLOCK)
    table: list[int] = []
    manager.reserve(table, 3 * BLOCK)
    first, second, third = table
    manager.release(table)
    again: list[int] = []
    manager.reserve(again, 3 * BLOCK)
    assert again == [third, second, first]


def test_a_fork_shares_full_blocks_and_copies_the_partial_one() -> None:
    manager = BlockManager(4, BLOCK)
    table: list[int] = []
    manager.reserve(table, 6)
    forked = manager.fork(table, 6)
    assert forked is not None
    other, copies = forked
    assert other[0] == table[0]
    assert other[1] != table[1]
    assert copies == [(table[1], other[1])]
    manager.check([table, other])
    manager.release(table)
    manager.check([other])
    manager.release(other)
    assert manager.num_free == 4


def test_a_fork_at_a_block_boundary_copies_nothing() -> None:
    manager = BlockManager(2, BLOCK)
    table: list[int] = []
    manager.reserve(table, 2 * BLOCK)
    forked = manager.fork(table, 2 * BLOCK)
    assert forked == (table, [])
    manager.check([table, forked[0]])


def test_a_fork_without_a_free_block_changes_nothing() -> None:
    manager = BlockManager(2, BLOCK)
    table: list[int] = []
    manager.reserve(table, 2 * BLOCK)
    assert manager.fork(table, 6) is None
    manager.check([table])


def test_freed_contents_are_found_until_they_are_overwritten() -> None:
    manager = BlockManager(3, BLOCK, HashChain(BLOCK))
    tokens = list(range(2 * BLOCK))
    table: list[int] = []
    manager.reserve(table, len(tokens))
    assert manager.store(tokens, table, 0, len(tokens), b"") == 2
    kept = list(table)
    manager.release(table)
    found = manager.lookup(tokens, b"")
    assert found == kept
    assert manager.num_free == 1
    manager.release(found)
    other: list[int] = []
    manager.reserve(other, 2 * BLOCK)  # takes the block that was never used and the last of the two
    assert manager.lookup(tokens, b"") == kept[:1]


def test_check_finds_a_lost_block() -> None:
    manager = BlockManager(2, BLOCK)
    table: list[int] = []
    manager.reserve(table, BLOCK)
    with pytest.raises(AssertionError, match="references"):
        manager.check([])


class BlockMachine(RuleBasedStateMachine):
    """Any order of operations on a few tables; ``check`` after every one, and shared contents stay what they were."""

    def __init__(self) -> None:
        super().__init__()
        self.manager = BlockManager(12, BLOCK, HashChain(BLOCK))
        self.tables: list[tuple[list[int], list[int], int]] = []  # tokens, table, number stored
        self.memory: dict[int, list[int]] = {}  # block -> the tokens written to it

    def _write(self, tokens: list[int], table: list[int], start: int) -> None:
        for position in range(start, len(tokens)):
            cells = self.memory.setdefault(table[position // BLOCK], [])
            del cells[position % BLOCK :]
            cells.append(tokens[position])

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=3 * BLOCK))
    def admit(self, tokens: list[int]) -> None:
        table = self.manager.lookup(tokens[:-1], b"")
        num_found = len(table)
        for index, block in enumerate(table):
            assert self.memory[block] == tokens[index * BLOCK : (index + 1) * BLOCK]
        if not self.manager.reserve(table, len(tokens)):
            self.manager.release(table)
            return
        self._write(tokens, table, num_found * BLOCK)
        self.tables.append((tokens, table, num_found))

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), token=st.integers(0, 1))
    def grow(self, data: st.DataObject, token: int) -> None:
        index = data.draw(st.integers(0, len(self.tables) - 1))
        tokens, table, num_stored = self.tables[index]
        if self.manager.reserve(table, len(tokens) + 1):
            longer = [*tokens, token]
            self._write(longer, table, len(tokens))
            num_stored = self.manager.store(longer, table, num_stored, len(longer), b"")
            self.tables[index] = (longer, table, num_stored)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        tokens, table, _ = data.draw(st.sampled_from(self.tables))
        num_tokens = data.draw(st.integers(0, len(tokens)))
        forked = self.manager.fork(table, num_tokens)
        if forked is not None:
            for source, target in forked[1]:
                self.memory[target] = list(self.memory[source])
            self.tables.append((tokens[:num_tokens], forked[0], 0))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        _, table, _ = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.manager.release(table)

    @invariant()
    def nothing_is_lost(self) -> None:
        self.manager.check([table for _, table, _ in self.tables])

    @invariant()
    def every_table_reads_its_own_tokens(self) -> None:
        for tokens, table, _ in self.tables:
            read = [self.memory[table[position // BLOCK]][position % BLOCK] for position in range(len(tokens))]
            assert read == tokens


BlockMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestBlockMachine = BlockMachine.TestCase
