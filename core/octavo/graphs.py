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
from typing import Any, NamedTuple

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


class MixedShape(NamedTuple):
    """What a captured mixed step has room for. Its rows are the decodes and then the prompts; so are its tokens."""

    num_decodes: int
    num_prompts: int
    num_prompt_tokens: int

    @property
    def num_rows(self) -> int:
        return self.num_decodes + self.num_prompts

    @property
    def num_tokens(self) -> int:
        return self.num_decodes + self.num_prompt_tokens


@dataclass(frozen=True, slots=True)
class MixedInputs:
    """A mixed step as arrays (on the host) or tensors (at fixed addresses), int64. Rows that do not sample store their
    token in the spare slot."""

    token_slots: Any  # [num_tokens]
    positions: Any  # [num_tokens]
    query_start: Any  # [num_rows + 1]
    slots: Any  # [num_rows]
    seq_lens: Any  # [num_rows]
    logit_rows: Any  # [num_rows]
    target_slots: Any  # [num_rows]: where each row's new token is stored
    target_positions: Any  # [num_rows]

    @staticmethod
    def lengths(shape: MixedShape) -> list[int]:
        rows, tokens = shape.num_rows, shape.num_tokens
        return [tokens, tokens, rows + 1, rows, rows, rows, rows, rows]


MixedStep = Callable[[MixedInputs, MixedShape], DecodeOutput]


def mixed_shapes(max_num_seqs: int) -> list[MixedShape]:
    """Many decodes beside a few prompts: what an engine under load does in most steps."""
    decodes = [size for size in (16, 64, 128, 192) if size < max_num_seqs]
    return [
        MixedShape(rows, 4, tokens) for rows in (*decodes, min(max_num_seqs, 256)) for tokens in (64, 128, 256, 512)
    ]


class MixedGraphs:
    """Captured steps of decodes and prompts together. Padding reads and writes ``spare_slot``."""

    def __init__(self, shapes: Sequence[MixedShape], spare_slot: int, device: torch.device) -> None:
        self._shapes = sorted(shapes, key=lambda shape: shape.num_tokens)
        self._spare_slot = spare_slot
        self._device = device
        self._inputs = torch.zeros(sum(MixedInputs.lengths(self._shapes[-1])), dtype=torch.int64, device=device)
        self._captured: dict[MixedShape, tuple[torch.cuda.CUDAGraph, DecodeOutput]] = {}

    def capture(self, step: MixedStep) -> None:
        """Capture ``step`` in every shape."""
        started = time.perf_counter()
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        nothing = np.zeros(0, np.int64)
        for shape in reversed(self._shapes):
            inputs = self._views(shape)
            self._fill(shape, nothing, nothing, np.zeros(1, np.int64), nothing, nothing, nothing, nothing)
            step(inputs, shape)
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
        logger.info("captured %d graphs of mixed steps in %.2f s", len(self._shapes), seconds)

    def find(self, num_decodes: int, num_prompts: int, num_prompt_tokens: int) -> MixedShape | None:
        """The smallest shape with room for so much."""
        for shape in self._shapes:
            if (
                shape.num_decodes >= num_decodes
                and shape.num_prompts >= num_prompts
                and shape.num_prompt_tokens >= num_prompt_tokens
            ):
                return shape
        return None

    def replay(
        self,
        shape: MixedShape,
        token_slots: np.ndarray,
        positions: np.ndarray,
        query_start: np.ndarray,
        slots: np.ndarray,
        seq_lens: np.ndarray,
        sampled: np.ndarray,
        sampled_positions: np.ndarray,
    ) -> tuple[DecodeOutput, np.ndarray]:
        """Start the captured step; the output has the shape's rows, and the array says which are those of ``sampled``.

        token_slots and positions [num_tokens], query_start [num_rows + 1], slots and seq_lens [num_rows], sampled and
        sampled_positions [num_sampled].
        """
        where = self._fill(shape, token_slots, positions, query_start, slots, seq_lens, sampled, sampled_positions)
        graph, output = self._captured[shape]
        graph.replay()
        return output, where

    def _views(self, shape: MixedShape) -> MixedInputs:
        lengths = MixedInputs.lengths(shape)
        return MixedInputs(*torch.split(self._inputs[: sum(lengths)], lengths))

    def _fill(
        self,
        shape: MixedShape,
        token_slots: np.ndarray,
        positions: np.ndarray,
        query_start: np.ndarray,
        slots: np.ndarray,
        seq_lens: np.ndarray,
        sampled: np.ndarray,
        sampled_positions: np.ndarray,
    ) -> np.ndarray:
        query_lens = query_start[1:] - query_start[:-1]
        num_decodes = int((query_lens == 1).sum())  # they come first
        num_rows, num_tokens = len(slots), len(positions)
        shift = shape.num_decodes - num_decodes  # what the prompts' rows and tokens move by
        lengths = MixedInputs.lengths(shape)
        packed = np.empty(sum(lengths), np.int64)
        host = MixedInputs(*np.split(packed, np.cumsum(lengths)[:-1]))
        rows = np.arange(num_rows)
        rows[num_decodes:] += shift
        tokens = np.arange(num_tokens)
        tokens[num_decodes:] += shift
        host.token_slots[:], host.positions[:] = self._spare_slot, 0
        host.token_slots[tokens], host.positions[tokens] = token_slots, positions
        host.query_start[: shape.num_decodes] = np.arange(shape.num_decodes)
        host.query_start[shape.num_decodes :] = num_tokens + shift  # rows beyond the last prompt are empty
        prompts = query_start[num_decodes:-1]
        host.query_start[shape.num_decodes : shape.num_decodes + len(prompts)] = prompts + shift
        host.slots[:], host.seq_lens[:] = self._spare_slot, 0
        host.seq_lens[: shape.num_decodes] = 1
        host.slots[rows], host.seq_lens[rows] = slots, seq_lens
        where: np.ndarray = rows[sampled]
        host.logit_rows[:] = 0
        host.logit_rows[rows] = tokens[query_start[1:] - 1]
        host.target_slots[:], host.target_positions[:] = self._spare_slot, 1
        host.target_slots[where], host.target_positions[where] = slots[sampled], sampled_positions
        flat = torch.from_numpy(packed)
        flat = flat.pin_memory() if self._device.type == "cuda" else flat
        self._inputs[: len(packed)].copy_(flat, non_blocking=True)
        return where


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
