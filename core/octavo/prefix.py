"""Prefix caching: the interface, and the core's own implementation, which remembers nothing. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class PrefixCache(Protocol):
    """An index from content to block, and nothing more: the block manager owns the blocks.

    Only full blocks are ever known to it. Calls come from the engine's thread only. Made with
    ``(block_size: int)``.
    """

    def lookup(self, tokens: Sequence[int], salt: bytes) -> list[int]:
        """The longest run of blocks that hold the leading tokens; a list that the caller may keep."""
        ...

    def store(self, tokens: Sequence[int], blocks: Sequence[int], num_stored: int, salt: bytes) -> None:
        """``blocks[i]`` holds ``tokens[i * block_size : (i + 1) * block_size]``, or will: blocks are announced before
        they are computed, and forgotten if that does not happen. The first ``num_stored`` blocks were stored by earlier
        calls, for this sequence or one it shares them with. A content already known keeps its first block."""
        ...

    def forget(self, block: int) -> None:
        """The block is about to be overwritten, or was never computed."""
        ...

    def clear(self) -> None:
        """Forget everything."""
        ...


class NoPrefixCache:
    """Finds nothing, keeps nothing."""

    def lookup(self, tokens: Sequence[int], salt: bytes) -> list[int]:
        return []

    def store(self, tokens: Sequence[int], blocks: Sequence[int], num_stored: int, salt: bytes) -> None:
        pass

    def forget(self, block: int) -> None:
        pass

    def clear(self) -> None:
        pass
