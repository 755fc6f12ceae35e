"""The prefix cache finds exactly what was stored and not forgotten, and never crosses a namespace."""

from __future__ import annotations

import random

import hypothesis.strategies as st
from hypothesis import given
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from octavo_cache.hash_chain import PACKED_BLOCKS, HashChain

BLOCK = 4


def test_finds_the_leading_full_blocks_only() -> None:
    cache = HashChain(BLOCK)
    cache.store(list(range(8)), [5, 9], 0, b"")
    assert cache.lookup(list(range(8)), b"") == [5, 9]
    assert cache.lookup(list(range(7)), b"") == [5]
    assert cache.lookup([0, 1, 2, 3, 4, 5, 6, 99], b"") == [5]
    assert cache.lookup([99, *range(1, 8)], b"") == []


def test_a_block_is_known_with_everything_before_it() -> None:
    cache = HashChain(BLOCK)
    cache.store([1] * 4 + [2] * 4, [0, 1], 0, b"")
    assert cache.lookup([3] * 4 + [2] * 4, b"") == []


def test_namespaces_do_not_meet() -> None:
    cache = HashChain(BLOCK)
    cache.store([1] * 4, [0], 0, b"alice")
    assert cache.lookup([1] * 4, b"bob") == []
    assert cache.lookup([1] * 4, b"alice") == [0]


def test_storing_goes_on_where_it_stopped() -> None:
    cache = HashChain(BLOCK)
    tokens = list(range(12))
    cache.store(tokens, [0], 0, b"")
    cache.store(tokens, [0, 1, 2], 1, b"")
    assert cache.lookup(tokens, b"") == [0, 1, 2]


def test_the_first_block_of_a_content_is_kept_and_its_double_can_still_be_extended() -> None:
    cache = HashChain(BLOCK)
    tokens = list(range(8))
    cache.store(tokens[:4], [0], 0, b"")
    cache.store(tokens[:4], [1], 0, b"")
    cache.store(tokens, [1, 2], 1, b"")
    assert cache.lookup(tokens, b"") == [0, 2]
    cache.forget(1)
    assert cache.lookup(tokens, b"") == [0, 2]
    cache.forget(0)
    assert cache.lookup(tokens, b"") == []


@given(
    num_blocks=st.integers(2 * PACKED_BLOCKS - 2, 2 * PACKED_BLOCKS + 2),
    num_more=st.integers(0, BLOCK - 1),
    cut=st.integers(0, 2 * PACKED_BLOCKS + 2),
    seed=st.integers(0, 2**32),
)
def test_blocks_packed_together_are_found_as_blocks_stored_one_by_one(
    num_blocks: int, num_more: int, cut: int, seed: int
) -> None:
    tokens = random.Random(seed).choices(range(2**31), k=num_blocks * BLOCK + num_more)
    blocks = list(range(num_blocks))
    one_by_one, together = HashChain(BLOCK), HashChain(BLOCK)
    for index in blocks:
        one_by_one.store(tokens[: (index + 1) * BLOCK], blocks[: index + 1], index, b"")
    cut = min(cut, num_blocks)
    together.store(tokens[: cut * BLOCK], blocks[:cut], 0, b"")
    together.store(tokens, blocks, cut, b"")
    for cache in (one_by_one, together):
        assert cache.lookup(tokens[: cut * BLOCK], b"") == blocks[:cut]
        assert cache.lookup(tokens, b"") == blocks
        changed = [*tokens[: cut * BLOCK], *(token ^ 1 for token in tokens[cut * BLOCK :])]
        assert cache.lookup(changed, b"") == blocks[:cut]


@given(st.lists(st.integers(0, 2**31 - 1), min_size=BLOCK, max_size=4 * BLOCK))
def test_clear_forgets_everything(tokens: list[int]) -> None:
    cache = HashChain(BLOCK)
    cache.store(tokens, list(range(len(tokens) // BLOCK)), 0, b"")
    cache.clear()
    assert cache.lookup(tokens, b"") == []
    assert len(cache) == 0


class AgainstADictionary(RuleBasedStateMachine):
    """Tokens of two kinds and few blocks, so that contents repeat; the oracle compares whole prefixes."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = HashChain(BLOCK)
        self.contents: dict[int, tuple[bytes, tuple[int, ...]]] = {}
        self.first: dict[tuple[bytes, tuple[int, ...]], int] = {}

    @rule(kinds=st.lists(st.integers(0, 1), min_size=1, max_size=3), salt=st.sampled_from([b"", b"x"]), data=st.data())
    def store(self, kinds: list[int], salt: bytes, data: st.DataObject) -> None:
        blocks = data.draw(st.permutations(range(12)))[: len(kinds)]
        for block in blocks:
            self.forget(block)
        tokens = [kind for kind in kinds for _ in range(BLOCK)]
        self.cache.store(tokens, blocks, 0, salt)
        for index, block in enumerate(blocks):
            content = (salt, tuple(tokens[: (index + 1) * BLOCK]))
            self.contents[block] = content
            self.first.setdefault(content, block)

    @rule(block=st.integers(0, 11))
    def forget(self, block: int) -> None:
        self.cache.forget(block)
        content = self.contents.pop(block, None)
        if content is not None and self.first.get(content) == block:
            del self.first[content]

    @invariant()
    def finds_what_the_dictionary_holds(self) -> None:
        for (salt, tokens), _ in list(self.first.items()):
            expected = []
            for stop in range(BLOCK, len(tokens) + 1, BLOCK):
                block = self.first.get((salt, tokens[:stop]))
                if block is None:
                    break
                expected.append(block)
            assert self.cache.lookup(tokens, salt) == expected


TestAgainstADictionary = AgainstADictionary.TestCase
