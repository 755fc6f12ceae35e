"""A prefix cache that is a chain of hashes: each full block is known by its tokens and everything before them."""

from __future__ import annotations

import hashlib
import secrets
from array import array
from collections.abc import Sequence

DIGEST_BYTES = 32


class HashChain:
    """An index from content to block; see :class:`octavo.prefix.PrefixCache`.

    The digest of a block is BLAKE2b over its predecessor's digest and its own tokens, keyed with a secret of this
    process: 256 bits that nobody can aim at, so equal digests mean equal contents and tokens need not be compared.
    The chain of a namespace (``salt``) starts at a digest of its own, so namespaces never meet.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._key = secrets.token_bytes(32)
        self._blocks: dict[bytes, int] = {}
        self._digests: dict[int, bytes] = {}

    def __len__(self) -> int:
        """How many contents can be found."""
        return len(self._blocks)

    def lookup(self, tokens: Sequence[int], salt: bytes) -> list[int]:
        found: list[int] = []
        digest = self._root(salt)
        for start in range(0, len(tokens) - self._block_size + 1, self._block_size):
            digest = self._next(digest, tokens[start : start + self._block_size])
            block = self._blocks.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def store(self, tokens: Sequence[int], blocks: Sequence[int], num_stored: int, salt: bytes) -> None:
        # what was stored may have been found under the same content elsewhere, but its digest is kept all the same
        digest = self._digests[blocks[num_stored - 1]] if num_stored else self._root(salt)
        for index in range(num_stored, len(blocks)):
            start = index * self._block_size
            digest = self._next(digest, tokens[start : start + self._block_size])
            self._digests[blocks[index]] = digest
            self._blocks.setdefault(digest, blocks[index])

    def forget(self, block: int) -> None:
        digest = self._digests.pop(block, None)
        if digest is not None and self._blocks.get(digest) == block:
            del self._blocks[digest]

    def clear(self) -> None:
        self._blocks.clear()
        self._digests.clear()

    def _root(self, salt: bytes) -> bytes:
        return hashlib.blake2b(salt, key=self._key, digest_size=DIGEST_BYTES).digest()

    def _next(self, digest: bytes, tokens: Sequence[int]) -> bytes:
        return hashlib.blake2b(digest + array("q", tokens).tobytes(), key=self._key, digest_size=DIGEST_BYTES).digest()
