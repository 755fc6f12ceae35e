"""Another index through the same interface, a tree of blocks: it finds and evicts the same as the chain of hashes.

It is why there is no second plugin. Eviction is the free list's: whoever holds blocks gives them up last block first,
so leaves go before what they continue, and of those the least recently used, which is what a radix tree would see to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

import hypothesis.strategies as st
from hypothesis import given, settings
from tests.plugins.cache.test_shared_prefixes import BLOCK, Run, drive, random_requests

from octavo.blocks import BlockManager
from octavo.prefix import PrefixCache
from octavo.scheduler import Scheduler
from octavo_cache.hash_chain import HashChain


@dataclass(eq=False)
class Node:
    """The content of a block after that of its parent; ``block`` is None once it is forgotten."""

    parent: Node | None = None
    edge: tuple[int, ...] = ()
    block: int | None = None
    children: dict[tuple[int, ...], Node] = field(default_factory=dict)


class RadixTree:
    """See :class:`octavo.prefix.PrefixCache`. Each edge is a block's tokens, compared as they are."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._roots: dict[bytes, Node] = {}
        self._nodes: dict[int, Node] = {}

    def lookup(self, tokens: Sequence[int], salt: bytes) -> list[int]:
        node, found = self._roots.get(salt), []
        for edge in self._edges(tokens):
            node = node.children.get(edge) if node is not None else None
            if node is None or node.block is None:
                break
            found.append(node.block)
        return found

    def store(self, tokens: Sequence[int], blocks: Sequence[int], num_stored: int, salt: bytes) -> None:
        node = self._roots.setdefault(salt, Node())
        for index, (edge, block) in enumerate(zip(self._edges(tokens), blocks, strict=False)):
            node = node.children.setdefault(edge, Node(node, edge))
            if index >= num_stored and node.block is None:
                node.block = block
                self._nodes[block] = node

    def forget(self, block: int) -> None:
        node = self._nodes.pop(block, None)
        if node is None:
            return
        node.block = None
        while node.parent is not None and node.block is None and not node.children:
            del node.parent.children[node.edge]
            node = node.parent

    def clear(self) -> None:
        self._roots.clear()
        self._nodes.clear()

    def _edges(self, tokens: Sequence[int]) -> list[tuple[int, ...]]:
        size = self._block_size
        return [tuple(tokens[end - size : end]) for end in range(size, len(tokens) + 1, size)]


def computed(cache: PrefixCache, seed: int) -> list[list[tuple[str, int, int, int]]]:
    """What each step of a random workload of branching prompts computes, with too few blocks for all of them."""
    random = Random(seed)
    scheduler = Scheduler(
        BlockManager(random.randint(12, 40), BLOCK, cache),
        max_num_seqs=random.randint(1, 4),
        max_num_batched_tokens=random.randint(8, 40),
    )
    run = Run(scheduler, depth=random.randint(0, 1))
    drive(random, run, random_requests(random, random.randint(4, 14), 48), aborts=True, preemptions=True)
    return [[(r.request.request_id, r.request.index, r.start, r.end) for r in plan.rows] for plan in run.plans]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32))
def test_a_radix_tree_computes_and_evicts_the_same(seed: int) -> None:
    assert computed(RadixTree(BLOCK), seed) == computed(HashChain(BLOCK), seed)
