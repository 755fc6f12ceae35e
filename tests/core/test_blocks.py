"""Blocks: nothing is lost or held twice, contents stay findable until they are overwritten."""

from __future__ import annotations

from dataclasses import dataclass

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
    found = manager.share(manager.lookup(tokens, b""))
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


def test_a_promised_block_is_found_and_may_be_shared_when_it_is_filled() -> None:
    manager = BlockManager(4, BLOCK, HashChain(BLOCK))
    tokens = list(range(3 * BLOCK))
    table: list[int] = []
    manager.reserve(table, len(tokens))
    assert manager.promise(tokens, table, 0, len(tokens), b"") == 3
    assert manager.lookup(tokens, b"") == table
    manager.fill(table, 0, 2 * BLOCK + 1)
    assert [manager.is_promised(block) for block in table] == [False, False, True]
    assert manager.last_promised(table) == table[2]
    assert manager.last_promised(table[:2]) is None
    manager.check([table, manager.share(table[:2])])


def test_a_promised_block_that_is_given_up_is_forgotten() -> None:
    manager = BlockManager(4, BLOCK, HashChain(BLOCK))
    tokens = list(range(3 * BLOCK))
    table: list[int] = []
    manager.reserve(table, len(tokens))
    manager.promise(tokens, table, 0, len(tokens), b"")
    manager.fill(table, 0, BLOCK)
    first = table[0]
    manager.release(table)
    assert manager.lookup(tokens, b"") == [first]
    assert manager.last_promised([first]) is None
    manager.check([])


def test_check_finds_a_promised_block_that_is_shared() -> None:
    manager = BlockManager(2, BLOCK, HashChain(BLOCK))
    table: list[int] = []
    manager.reserve(table, BLOCK)
    manager.promise(list(range(BLOCK)), table, 0, BLOCK, b"")
    with pytest.raises(AssertionError, match="promised by 2 tables"):
        manager.check([table, manager.share(table)])


@dataclass
class Sequence:
    """A table in use, with its tokens: ``num_computed`` of them are written, ``num_stored`` blocks are known."""

    tokens: list[int]
    table: list[int]
    num_stored: int
    num_computed: int


class BlockMachine(RuleBasedStateMachine):
    """Any order of operations on a few tables; ``check`` after every one, and shared contents stay what they were."""

    def __init__(self) -> None:
        super().__init__()
        self.manager = BlockManager(12, BLOCK, HashChain(BLOCK))
        self.sequences: list[Sequence] = []
        self.memory: dict[int, list[int]] = {}  # block -> the tokens written to it

    def _write(self, sequence: Sequence, end: int) -> None:
        for position in range(sequence.num_computed, end):
            cells = self.memory.setdefault(sequence.table[position // BLOCK], [])
            del cells[position % BLOCK :]
            cells.append(sequence.tokens[position])
        sequence.num_computed = end

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=3 * BLOCK))
    def admit(self, tokens: list[int]) -> None:
        found = self.manager.lookup(tokens[:-1], b"")
        if self.manager.last_promised(found) is not None:
            return
        for index, block in enumerate(found):
            assert self.memory[block] == tokens[index * BLOCK : (index + 1) * BLOCK]
        table = self.manager.share(found)
        if not self.manager.reserve(table, len(tokens)):
            self.manager.release(table)
            return
        num_stored = self.manager.promise(tokens, table, len(found), len(tokens) - 1, b"")
        self.sequences.append(Sequence(tokens, table, num_stored, len(found) * BLOCK))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), num_tokens=st.integers(1, 2 * BLOCK))
    def compute(self, data: st.DataObject, num_tokens: int) -> None:
        sequence = data.draw(st.sampled_from(self.sequences))
        end = min(sequence.num_computed + num_tokens, len(sequence.tokens))
        self.manager.fill(sequence.table, sequence.num_computed, end)
        self._write(sequence, end)
        sequence.num_stored = self.manager.store(sequence.tokens, sequence.table, sequence.num_stored, end, b"")

    @precondition(lambda self: self._computed())
    @rule(data=st.data(), token=st.integers(0, 1))
    def grow(self, data: st.DataObject, token: int) -> None:
        sequence = data.draw(st.sampled_from(self._computed()))
        if self.manager.reserve(sequence.table, len(sequence.tokens) + 1):
            sequence.tokens = [*sequence.tokens, token]
            self._write(sequence, len(sequence.tokens))
            sequence.num_stored = self.manager.store(
                sequence.tokens, sequence.table, sequence.num_stored, sequence.num_computed, b""
            )

    @precondition(lambda self: self._computed())
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self._computed()))
        num_tokens = data.draw(st.integers(0, len(sequence.tokens)))
        forked = self.manager.fork(sequence.table, num_tokens)
        if forked is not None:
            table, copies = forked
            for source, target in copies:
                self.memory[target] = list(self.memory[source])
            num_stored = min(sequence.num_stored, num_tokens // BLOCK)
            self.sequences.append(Sequence(sequence.tokens[:num_tokens], table, num_stored, num_tokens))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        sequence = self.sequences.pop(data.draw(st.integers(0, len(self.sequences) - 1)))
        self.manager.release(sequence.table)

    def _computed(self) -> list[Sequence]:
        return [sequence for sequence in self.sequences if sequence.num_computed == len(sequence.tokens)]

    @invariant()
    def nothing_is_lost(self) -> None:
        self.manager.check([sequence.table for sequence in self.sequences])

    @invariant()
    def every_table_reads_its_own_tokens(self) -> None:
        for sequence in self.sequences:
            places = [divmod(position, BLOCK) for position in range(sequence.num_computed)]
            read = [self.memory[sequence.table[block]][offset] for block, offset in places]
            assert read == sequence.tokens[: sequence.num_computed]


BlockMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestBlockMachine = BlockMachine.TestCase
