"""Decode steps as CUDA graphs: hundreds of kernels start with one call, and nothing waits for Python.

A graph is captured for a few numbers of rows; a step with fewer is padded with rows that belong to nobody. Inputs lie
at fixed addresses and arrive in one transfer. All graphs share one memory pool, so they take as much as the largest.
"""

from __future__ import annotations

import bisect
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DecodeOutput:
    """What a decode step leaves on the device; a captured step's is overwritten by the next replay."""

    tokens: Tensor  # [num_rows] int64: the most likely ones, stored already where the next step reads them
    logits: Tensor  # [num_rows, vocab_size] in the model's dtype

    def first(self, num_rows: int) -> DecodeOutput:
        """Without the padding."""
        return DecodeOutput(self.tokens[:num_rows], self.logits[:num_rows])


DecodeStep = Callable[[Tensor, Tensor], DecodeOutput]
"""``(slots [num_rows] int64, seq_lens [num_rows] int64)``: one token per row; ``seq_lens`` count that token."""


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Numbers of rows that get a graph, ascending: close together where few rows make a step short."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_num_seqs, 64)]
    return [*(size for size in sizes if size < max_num_seqs), max_num_seqs]


class DecodeGraphs:
    """Captured decode steps. A padded row reads and writes ``spare_slot``, which no request ever gets."""

    def __init__(self, sizes: Sequence[int], spare_slot: int, device: torch.device) -> None:
        self._sizes = sorted(sizes)
        self._spare_slot = spare_slot
        self._device = device
        self._inputs = torch.zeros(2 * self._sizes[-1], dtype=torch.int64, device=device)
        self._captured: dict[int, tuple[torch.cuda.CUDAGraph, DecodeOutput]] = {}

    def capture(self, step: DecodeStep) -> bool:
        """Capture ``step`` at every size; False, with a warning, if it waits for the device and so cannot be."""
        started = time.perf_counter()
        sizes = sorted(self._sizes, reverse=True)  # the smaller ones then find their memory in the pool
        self._fill(np.zeros(0, np.int64), np.zeros(0, np.int64), sizes[0])
        step(*self._views(sizes[0]))  # compiles and allocates what only the first run does
        waits = _waits_for_device(lambda: step(*self._views(sizes[0])))
        if waits is not None:
            logger.warning("no CUDA graphs: the model waits for the device within a step (%s)", waits)
            return False
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        for size in sizes:
            inputs = self._views(size)
            step(*inputs)  # kernels that only this size needs must be loaded before the capture
            torch.cuda.synchronize(self._device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.stream(stream):
                # not torch.cuda.graph(): that collects Python's garbage for each graph, which takes longer than this
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    output = step(*inputs)
                finally:
                    graph.capture_end()
            self._captured[size] = graph, output
        seconds = time.perf_counter() - started
        logger.info("captured %d decode graphs, up to %d rows, in %.2f s", len(sizes), sizes[0], seconds)
        return True

    def can_serve(self, num_rows: int, num_tokens: int, num_sampled: int) -> bool:
        """Whether a step of so many rows is one of plain decodes (each row computes one token and samples the next)
        and there is a graph for it."""
        return num_rows == num_tokens == num_sampled and bool(self._captured) and num_rows <= self._sizes[-1]

    def replay(self, slots: np.ndarray, seq_lens: np.ndarray) -> DecodeOutput:
        """Start the captured step for ``slots`` and ``seq_lens`` [num_rows] int64; does not wait for the device."""
        num_rows = len(slots)
        size = self._sizes[bisect.bisect_left(self._sizes, num_rows)]
        self._fill(slots, seq_lens, size)
        graph, output = self._captured[size]
        graph.replay()
        return output.first(num_rows)

    def _views(self, size: int) -> tuple[Tensor, Tensor]:
        return self._inputs[:size], self._inputs[size : 2 * size]

    def _fill(self, slots: np.ndarray, seq_lens: np.ndarray, size: int) -> None:
        packed = np.empty((2, size), np.int64)
        packed[0, : len(slots)], packed[0, len(slots) :] = slots, self._spare_slot
        packed[1, : len(slots)], packed[1, len(slots) :] = seq_lens, 1
        flat = torch.from_numpy(packed.reshape(-1))
        self._inputs[: 2 * size].copy_(flat.pin_memory() if self._device.type == "cuda" else flat, non_blocking=True)


def _waits_for_device(run: Callable[[], object]) -> str | None:
    """What torch says of the first wait of the host for the device in ``run``; None if it never waits."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return None
