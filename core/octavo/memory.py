"""The memory budget: what there is, what takes it, and how many blocks are left for keys and values."""

from __future__ import annotations

from dataclasses import dataclass

from octavo.errors import ConfigError

GIB = 1024**3


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """All sizes in bytes. ``limit`` is what this engine may use of ``total`` in all."""

    device: str
    total: int
    limit: int
    used_by_others: int
    weights: int
    activations: int
    block_bytes: int
    num_blocks: int
    block_size: int

    @classmethod
    def plan(
        cls,
        *,
        device: str,
        total: int,
        limit: int,
        used_by_others: int,
        weights: int,
        activations: int,
        block_bytes: int,
        block_size: int,
        max_model_len: int,
        num_blocks: int | None,
        knob: str,
    ) -> MemoryBudget:
        """How many blocks fit, unless ``num_blocks`` says how many there are to be.

        Raises:
            ConfigError: not even one request of ``max_model_len`` tokens fits; prints the table, the knob and the
                value that would work.
        """
        left = limit - used_by_others - weights - activations
        if num_blocks is None:
            num_blocks = max(0, left // block_bytes)
        budget = cls(device, total, limit, used_by_others, weights, activations, block_bytes, num_blocks, block_size)
        needed = -(-max_model_len // block_size)
        if num_blocks < needed:
            fits = num_blocks * block_size
            raise ConfigError(
                f"{budget.table()}\none request of {max_model_len} tokens needs {needed} blocks, "
                f"{needed * block_bytes / GIB:.2f} GiB; use --max-model-len {fits} or less, or raise {knob}"
                if fits
                else f"{budget.table()}\nnothing is left for keys and values; raise {knob}"
            )
        return budget

    def table(self) -> str:
        """The budget for people."""
        rows = [
            ("memory of the device", self.total),
            ("this engine may use", self.limit),
            ("in use by others", self.used_by_others),
            ("weights", self.weights),
            ("activations at their peak", self.activations),
            (f"keys and values ({self.num_blocks} blocks)", self.num_blocks * self.block_bytes),
        ]
        width = max(len(name) for name, _ in rows)
        lines = [f"memory budget on {self.device}:"]
        lines += [f"  {name:<{width}}  {size / GIB:8.2f} GiB" for name, size in rows]
        lines.append(f"  room for {self.num_blocks * self.block_size} tokens in blocks of {self.block_size}")
        return "\n".join(lines)
