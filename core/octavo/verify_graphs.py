"""Steps of a few tokens for each row as CUDA graphs: drafts under verification, beside rows that have none.

Unlike a decode graph's, a row may have any number of tokens up to a bound, and each token has logits. Acceptance is
decided within the graph. What is captured, padded and uploaded is as in :mod:`octavo.graphs`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

logger = logging.getLogger(__name__)

MAX_NUM_TOKENS = 1024  # a step of more takes the device longer than starting its kernels takes the host


class VerifyShape(NamedTuple):
    """What a captured step has room for."""

    num_rows: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class VerifyInputs:
    """A step as arrays (on the host) or tensors (at fixed addresses), int64. A token that samples nothing stores what
    follows it in the spare slot."""

    token_slots: Any  # [num_tokens]
    positions: Any  # [num_tokens]
    target_slots: Any  # [num_tokens]: where the token that follows each one is stored
    target_positions: Any  # [num_tokens]
    first: Any  # [num_tokens]: the first token of the same row that samples
    query_start: Any  # [num_rows + 1]
    slots: Any  # [num_rows]
    seq_lens: Any  # [num_rows]

    @staticmethod
    def lengths(shape: VerifyShape) -> list[int]:
        rows, tokens = shape
        return [tokens] * 5 + [rows + 1, rows, rows]


@dataclass(frozen=True, slots=True)
class VerifyOutput:
    """What a step leaves on the device, for each of its tokens; the next replay overwrites it."""

    tokens: Tensor  # [num_tokens] int64: the most likely ones; REJECTED where a draft before was wrong
    drafts: Tensor  # [num_tokens] int64: what stood where those tokens are stored now
    logits: Tensor  # [num_tokens, vocab_size] in the model's dtype


VerifyStep = Callable[[VerifyInputs, VerifyShape], VerifyOutput]


def verify_shapes(max_num_seqs: int, max_query_len: int) -> list[VerifyShape]:
    """Room for all rows to have the most tokens, or few of them, or something in between."""
    rows = [*(size for size in (1, 2, 4, 8, 16, 32, 64, 96, 128, 192) if size < max_num_seqs), min(max_num_seqs, 256)]
    per_row = sorted({2, (max_query_len + 2) // 2, max_query_len})
    shapes = [VerifyShape(num_rows, num_rows * length) for num_rows in rows for length in per_row]
    return [shape for shape in shapes if shape.num_tokens <= MAX_NUM_TOKENS]


class VerifyGraphs:
    """Captured steps of up to ``max_query_len`` tokens a row. Padding reads and writes ``spare_slot``."""

    def __init__(
        self, shapes: Sequence[VerifyShape], max_query_len: int, spare_slot: int, device: torch.device
    ) -> None:
        self._shapes = sorted(shapes, key=lambda shape: (shape.num_tokens, shape.num_rows))
        self._max_query_len = max_query_len
        self._spare_slot = spare_slot
        self._device = device
        size = max(sum(VerifyInputs.lengths(shape)) for shape in self._shapes)
        self._inputs = torch.zeros(size, dtype=torch.int64, device=device)
        self._captured: dict[VerifyShape, tuple[torch.cuda.CUDAGraph, VerifyOutput]] = {}

    def capture(self, step: VerifyStep) -> None:
        """Capture ``step`` in every shape."""
        started = time.perf_counter()
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        for shape in reversed(self._shapes):  # the smaller ones then find their memory in the pool
            inputs = self._views(shape)
            self._fill_nothing(shape)
            step(inputs, shape)  # compiles and loads what only this shape needs
            torch.cuda.synchronize(self._device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.stream(stream):
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    output = step(inputs, shape)
                finally:
                    graph.capture_end()
            self._captured[shape] = graph, output
        seconds = time.perf_counter() - started
        logger.info(
            "captured %d graphs of up to %d tokens a row in %.2f s", len(self._shapes), self._max_query_len, seconds
        )

    def find(self, query_lens: np.ndarray) -> VerifyShape | None:
        """The smallest shape with room for rows of so many tokens [num_rows]."""
        if query_lens.max() > self._max_query_len:
            return None
        num_rows, num_tokens = len(query_lens), int(query_lens.sum())
        for shape in self._shapes:
            if shape.num_rows >= num_rows and shape.num_tokens >= num_tokens:
                return shape
        return None

    def replay(
        self,
        shape: VerifyShape,
        token_slots: np.ndarray,
        positions: np.ndarray,
        query_start: np.ndarray,
        slots: np.ndarray,
        seq_lens: np.ndarray,
        sampled: np.ndarray,
        sampled_positions: np.ndarray,
        first_sampled: np.ndarray,
        logit_tokens: np.ndarray,
    ) -> VerifyOutput:
        """Start the captured step; does not wait for the device.

        token_slots and positions [num_tokens]; query_start [num_rows + 1], slots and seq_lens [num_rows]; the others
        [num_sampled]: the row, the position and the first entry of the same row of each token to be sampled, and the
        token of this step that decides it.
        """
        self._fill(
            shape,
            token_slots,
            positions,
            query_start,
            slots,
            seq_lens,
            sampled,
            sampled_positions,
            first_sampled,
            logit_tokens,
        )
        graph, output = self._captured[shape]
        graph.replay()
        return output

    def _views(self, shape: VerifyShape) -> VerifyInputs:
        lengths = VerifyInputs.lengths(shape)
        return VerifyInputs(*torch.split(self._inputs[: sum(lengths)], lengths))

    def _fill_nothing(self, shape: VerifyShape) -> None:
        nothing = np.zeros(0, np.int64)
        self._fill(shape, nothing, nothing, np.zeros(1, np.int64), *([nothing] * 6))

    def _fill(
        self,
        shape: VerifyShape,
        token_slots: np.ndarray,
        positions: np.ndarray,
        query_start: np.ndarray,
        slots: np.ndarray,
        seq_lens: np.ndarray,
        sampled: np.ndarray,
        sampled_positions: np.ndarray,
        first_sampled: np.ndarray,
        logit_tokens: np.ndarray,
    ) -> None:
        num_rows, num_tokens = len(slots), len(positions)
        lengths = VerifyInputs.lengths(shape)
        packed = np.empty(sum(lengths), np.int64)
        host = VerifyInputs(*np.split(packed, np.cumsum(lengths)[:-1]))
        host.token_slots[:num_tokens], host.token_slots[num_tokens:] = token_slots, self._spare_slot
        host.positions[:num_tokens], host.positions[num_tokens:] = positions, 0
        host.target_slots[:], host.target_positions[:] = self._spare_slot, 1
        host.target_slots[logit_tokens], host.target_positions[logit_tokens] = slots[sampled], sampled_positions
        host.first[:] = np.arange(shape.num_tokens)
        host.first[logit_tokens] = logit_tokens[first_sampled]
        host.query_start[: num_rows + 1], host.query_start[num_rows + 1 :] = query_start, num_tokens
        host.slots[:num_rows], host.slots[num_rows:] = slots, self._spare_slot
        host.seq_lens[:num_rows], host.seq_lens[num_rows:] = seq_lens, 0  # rows beyond the last are empty
        flat = torch.from_numpy(packed)
        flat = flat.pin_memory() if self._device.type == "cuda" else flat
        self._inputs[: len(packed)].copy_(flat, non_blocking=True)
