"""A prefix cache that is a chain of hashes: each full block is known by its tokens and everything before them."""

from __future__ import annotations

import hashlib
import secrets
from array import array
from collections.abc import Iterator, Sequence
from typing import NamedTuple

DIGEST_BYTES = 32
PACKED_BLOCKS = 32  # tokens of this many blocks become bytes at once


class HashChain:
    """An index from content to block; see :class:`octavo.prefix.PrefixCache`.

    The digest of a block is BLAKE2b over its predecessor's digest and its own tokens: 256 bits, so equal digests mean
    equal contents and tokens need not be compared. The chain of a namespace (``salt``) starts at a digest of its own,
    keyed with a secret of this process: namespaces never meet, and nobody can aim at a digest.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._key = secrets.token_bytes(32)
        self._blocks: dict[bytes, int] = {}
        self._digests: dict[int, bytes] = {}
        self._last_found = _Chain(b"", [], [])

    def __len__(self) -> int:
        """How many contents can be found."""
        return len(self._blocks)

    def lookup(self, tokens: Sequence[int], salt: bytes) -> list[int]:
        digests: list[bytes] = []
        found: list[int] = []
        for digest in self._chain(tokens, salt):
            block = self._blocks.get(digest)
            if block is None:
                break
            digests.append(digest)
            found.append(block)
        if found:
            self._last_found = _Chain(salt, tokens[: len(found) * self._block_size], digests)
        return found

    def store(self, tokens: Sequence[int], blocks: Sequence[int], num_stored: int, salt: bytes) -> None:
        # what was stored may have been found under the same content elsewhere, but its digest is kept all the same
        digest = self._digests[blocks[num_stored - 1]] if num_stored else self._root(salt)
        following = self._follow(digest, tokens, num_stored)
        for block, digest in zip(blocks[num_stored:], following, strict=False):
            self._digests[block] = digest
            self._blocks.setdefault(digest, block)

    def forget(self, block: int) -> None:
        digest = self._digests.pop(block, None)
        if digest is not None and self._blocks.get(digest) == block:
            del self._blocks[digest]

    def clear(self) -> None:
        self._blocks.clear()
        self._digests.clear()
        self._last_found = _Chain(b"", [], [])

    def _chain(self, tokens: Sequence[int], salt: bytes) -> Iterator[bytes]:
        """The digests of all full blocks of ``tokens``.

        Requests that share a prefix often come together: what the last lookup found is not hashed again.
        """
        last = self._last_found
        if last.digests and salt == last.salt and tokens[: len(last.tokens)] == last.tokens:
            yield from last.digests
            yield from self._follow(last.digests[-1], tokens, len(last.digests))
        else:
            yield from self._follow(self._root(salt), tokens, 0)

    def _follow(self, digest: bytes, tokens: Sequence[int], num_before: int) -> Iterator[bytes]:
        """The digests of the full blocks after the first ``num_before``, the last of which has ``digest``."""
        size, blake2b = self._block_size, hashlib.blake2b
        step = size * PACKED_BLOCKS
        for start in range(num_before * size, len(tokens) - size + 1, step):
            packed = array("i", tokens[start : start + step])
            num_bytes = size * packed.itemsize
            content = packed.tobytes()
            for end in range(num_bytes, len(content) + 1, num_bytes):
                digest = blake2b(digest + content[end - num_bytes : end], digest_size=DIGEST_BYTES).digest()
                yield digest

    def _root(self, salt: bytes) -> bytes:
        return hashlib.blake2b(salt, key=self._key, digest_size=DIGEST_BYTES).digest()


class _Chain(NamedTuple):
    """The tokens of some full blocks in a namespace, and the digest of each block."""

    salt: bytes
    tokens: Sequence[int]
    digests: Sequence[bytes]
