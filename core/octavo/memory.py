"""The memory budget: what there is, what takes it, and how many blocks are left for keys and values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import torch

from octavo.batch import PlannedRow, StepPlan
from octavo.errors import ConfigError
from octavo.request import MAX_LOGPROBS, Request, SamplingParams

GIB = 1024**3


@dataclass(frozen=True, slots=True)
class Activations:
    """What steps need beside weights and caches, in bytes."""

    step: int  # at the peak of the largest step
    graphs: int = 0  # set apart for captured steps, whose memory nothing else uses


def largest_step(
    max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int, block_size: int, num_drafts: int = 0
) -> StepPlan:
    """A step that needs as much memory as any can: all rows and tokens that there may be, ``num_drafts`` of a row's
    drafts, all sampled in every way and with log-probabilities. The rows share their blocks, ids 0 and up: the
    contents do not matter."""
    params = SamplingParams(temperature=1.0, top_p=0.9, presence_penalty=1.0, logprobs=MAX_LOGPROBS)
    length = min(max(1, max_num_batched_tokens // max_num_seqs), max_model_len - 1)
    drafts = (0,) * min(num_drafts, length - 1)
    rows = _step(params, max_num_seqs, length, block_size).rows
    return StepPlan([msgspec.structs.replace(row, drafts=drafts) for row in rows])


def decode_step(max_num_seqs: int, block_size: int) -> StepPlan:
    """A step of one token for all rows, the most likely ones: what a graph does."""
    return _step(SamplingParams(temperature=0.0), max_num_seqs, 1, block_size)


def sampling_step(max_num_seqs: int, block_size: int) -> StepPlan:
    """A step of one token for all rows, drawn with filters, with log-probabilities."""
    return _step(SamplingParams(temperature=1.0, top_p=0.9, logprobs=MAX_LOGPROBS), max_num_seqs, 1, block_size)


def usual_steps(
    max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int, block_size: int, num_blocks: int
) -> list[StepPlan]:
    """Steps of every kind that kernels are compiled for, so that no request waits for a compiler: few rows and many,
    short queries and long ones, alone and beside decodes, at the start of a context and far into it."""
    greedy = SamplingParams(temperature=0.0)
    context = min(max_model_len, num_blocks * block_size) - 1
    steps = []
    for num_rows in sorted({1, min(8, max_num_seqs), max_num_seqs}):
        decodes = [_row(greedy, slot, 1, block_size, start=context - 1) for slot in range(num_rows)]
        steps.append(StepPlan(decodes))
        for length in (3, 6, 12, 24, 48, 96):
            if length > context:
                break
            rows = [_row(greedy, slot, length, block_size, start=context - length) for slot in range(num_rows)]
            steps.append(StepPlan(rows))
            if num_rows > 1:
                steps.append(StepPlan([*decodes[:-1], rows[-1]]))
    return [step for step in steps if step.num_tokens <= max_num_batched_tokens]


def _step(params: SamplingParams, num_rows: int, length: int, block_size: int) -> StepPlan:
    return StepPlan([_row(params, slot, length, block_size) for slot in range(num_rows)])


def _row(params: SamplingParams, slot: int, length: int, block_size: int, start: int = 0) -> PlannedRow:
    end = start + length
    request = Request(f"profile-{slot}", [0] * end, params, seed=0, max_total_tokens=end + 1)
    request.slot = slot
    request.blocks = list(range(-(-end // block_size)))
    return PlannedRow(request, start, length, samples=True)


def measure_peak(device: torch.device, run: Callable[[], object]) -> int:
    """Bytes that ``run`` allocates on the GPU at its peak, beyond what is allocated before; waits for the device."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """All sizes in bytes. ``limit`` is what this engine may use of ``total`` in all."""

    device: str
    total: int
    limit: int
    used_by_others: int
    weights: int
    activations: Activations
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
        activations: Activations,
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
        left = limit - used_by_others - weights - activations.step - activations.graphs
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
            ("activations at their peak", self.activations.step),
            ("decode graphs", self.activations.graphs),
            (f"keys and values ({self.num_blocks} blocks)", self.num_blocks * self.block_bytes),
        ]
        width = max(len(name) for name, _ in rows)
        lines = [f"memory budget on {self.device}:"]
        lines += [f"  {name:<{width}}  {size / GIB:8.2f} GiB" for name, size in rows]
        lines.append(f"  room for {self.num_blocks * self.block_size} tokens in blocks of {self.block_size}")
        return "\n".join(lines)
