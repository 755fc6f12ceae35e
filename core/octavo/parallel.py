"""Shard arithmetic: which part of a matrix or of a set of heads belongs to which rank. World size 1 today."""

from __future__ import annotations

from dataclasses import dataclass

from octavo.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Shard:
    """This process's place among the ``size`` ranks that hold one model together."""

    rank: int = 0
    size: int = 1

    def divide(self, total: int, what: str) -> int:
        """The part of ``total`` that every rank holds; ``what`` names it in the error when it cannot be shared out."""
        if total % self.size:
            raise ConfigError(
                f"{what} ({total}) cannot be divided over {self.size} ranks; "
                f"choose a --tensor-parallel-size that divides it"
            )
        return total // self.size

    def rows(self, total: int, what: str, unit: int = 1) -> slice:
        """The rank's contiguous part of ``total`` rows, made of whole units (heads, blocks)."""
        count = self.divide(total // unit, what) * unit
        return slice(self.rank * count, (self.rank + 1) * count)

    def kv_heads(self, num_kv_heads: int) -> slice:
        """The rank's key and value heads; with fewer heads than ranks, neighbours hold the same one."""
        if num_kv_heads >= self.size:
            return self.rows(num_kv_heads, "number of key/value heads")
        if self.size % num_kv_heads:
            raise ConfigError(f"{num_kv_heads} key/value heads cannot be replicated evenly over {self.size} ranks")
        head = self.rank * num_kv_heads // self.size
        return slice(head, head + 1)
