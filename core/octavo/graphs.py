"""Whole steps as CUDA graphs: hundreds of kernels start with one call, and nothing waits for Python.

A graph is captured for a shape: so many rows, so many tokens, one way to choose. A step with less is padded with rows
and tokens that belong to nobody. Inputs lie at fixed addresses and arrive in one transfer. All graphs share one memory
pool, so together they take as much as the largest.
"""

from __future__ import annotations

import bisect
import enum
import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from octavo.rows import RowArrays
from octavo.sampling import Draws

logger = logging.getLogger(__name__)


class Choice(enum.IntEnum):
    """How a step ends. A step with several kinds of rows ends as the last of them: it serves the others too."""

    LIKELIEST = 0  # with the most likely tokens
    DRAWN = 1  # with tokens drawn from the whole distribution, or the most likely where the temperature is 0
    FILTERED = 2  # the same after top-k, top-p and min-p
    LOGITS = 3  # with logits: somebody else chooses


class StepShape(NamedTuple):
    """What a captured step has room for: rows of a single token, then longer ones; tokens in the same order."""

    num_decodes: int
    num_longer: int = 0
    num_longer_tokens: int = 0
    max_query_len: int = 1
    every_token: bool = False  # of longer rows every token decides one, as drafts are verified; else the last one does
    choice: Choice = Choice.LIKELIEST

    @property
    def num_rows(self) -> int:
        return self.num_decodes + self.num_longer

    @property
    def num_tokens(self) -> int:
        return self.num_decodes + self.num_longer_tokens

    @property
    def num_logits(self) -> int:
        return self.num_tokens if self.every_token else self.num_rows


class StepInputs(NamedTuple):
    """A captured step's numbers, as arrays on the host or as tensors at fixed addresses. int64 where nothing else is
    noted; float64 is exact for float32."""

    token_slots: Any  # [num_tokens]
    positions: Any  # [num_tokens]
    cache_slots: Any  # [num_tokens]: where keys and values go
    slots: Any  # [num_rows]
    seq_lens: Any  # [num_rows] int32
    query_start: Any  # [num_rows + 1] int32
    logit_rows: Any  # [num_logits]: the token whose hidden state decides
    target_slots: Any  # [num_logits]: where the decided token is stored
    target_positions: Any  # [num_logits]
    first: Any  # [num_logits]: the first entry of the same row
    # what follows is empty where nothing is drawn
    top_k: Any  # [num_logits]
    temperature: Any  # [num_logits] float64
    uniform: Any  # [num_logits] float64
    top_p: Any  # [num_logits] float64
    min_p: Any  # [num_logits] float64

    @staticmethod
    def fields(shape: StepShape) -> list[tuple[str, int]]:
        """Dtype and length of each."""
        rows, tokens, logits = shape.num_rows, shape.num_tokens, shape.num_logits
        draws = logits if shape.choice in (Choice.DRAWN, Choice.FILTERED) else 0
        whole = [("int64", length) for length in (tokens, tokens, tokens, rows)]
        whole += [("int32", rows), ("int32", rows + 1), *[("int64", logits)] * 4]
        return [*whole, ("int64", draws), *[("float64", draws)] * 4]

    @classmethod
    def views(cls, shape: StepShape, flat: np.ndarray | Tensor) -> StepInputs:
        """Pieces of one array or tensor [:meth:`size`] int64."""
        module, start, pieces = torch if isinstance(flat, Tensor) else np, 0, []
        for dtype, length in cls.fields(shape):
            stop = start + cls._num_words(dtype, length)
            pieces.append(flat[start:stop].view(getattr(module, dtype))[:length])
            start = stop
        return cls(*pieces)

    @classmethod
    def size(cls, shape: StepShape) -> int:
        return sum(cls._num_words(*field) for field in cls.fields(shape))

    @staticmethod
    def _num_words(dtype: str, length: int) -> int:
        """Of 64 bits."""
        return -(-length // 2) if dtype == "int32" else length


StepFunction = Callable[[StepInputs, StepShape], Tensor]
"""Runs a step from numbers on the device alone. Returns tokens [num_logits] int64, stored already where the next step
reads them, or logits [num_logits, vocab_size] for :attr:`Choice.LOGITS`."""


class StepShapes:
    """Which shapes there are: close together where padding costs, few where it does not.

    ``max_row_tokens``: rows of up to so many tokens come often, as drafts are verified.
    """

    # Starting the kernels of a step with more of them takes less than running them.
    MAX_SHORT_TOKENS: ClassVar[int] = 1024  # of short rows
    MAX_PROMPT_TOKENS: ClassVar[int] = 512  # of prompts, alone or beside decodes
    # Fill the tiles of matrix products: on an H200 cuBLAS takes for 400 tokens as long as for 512, for 448 even longer.
    WHOLE_TILES: ClassVar[Sequence[int]] = (64, 128, 192, 256, 320, 384, 512, 640, 768)

    def __init__(self, max_num_seqs: int, max_row_tokens: int = 1) -> None:
        sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, 384, 64), *range(384, max_num_seqs, 128)]
        self._rows = [*(size for size in sizes if size < max_num_seqs), max_num_seqs]
        longest = self.MAX_PROMPT_TOKENS
        self._mixed = [
            StepShape(rows, 4, tokens, tokens)
            for rows in (0, *(size for size in (16, 64, 128, 192) if size < max_num_seqs), min(max_num_seqs, 256))
            for tokens in sorted({longest, *(whole - rows for whole in self.WHOLE_TILES)})
            if 32 <= tokens <= longest
        ]
        self._mixed.sort(key=lambda shape: (shape.num_tokens, shape.num_decodes))
        self._max_row_tokens = max_row_tokens
        # room for all rows to have the most tokens, or two, or something in between
        lengths = sorted({2, (max_row_tokens + 2) // 2, max_row_tokens}) if max_row_tokens > 1 else []
        sizes = [*(size for size in (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192) if size < max_num_seqs), self._rows[-1]]
        self._short = [
            StepShape(0, size, size * length, max_row_tokens, every_token=True)
            for size in sizes
            for length in lengths
            if size * length <= self.MAX_SHORT_TOKENS
        ]
        self._short.sort(key=lambda shape: shape.num_tokens)

    def usual(self) -> Iterator[StepShape]:
        """Those that are worth capturing at once, the largest first: the others find their memory in its pool."""
        shapes = [*(StepShape(size) for size in self._rows), *self._mixed, *self._short]
        return iter(sorted(shapes, key=lambda shape: -shape.num_tokens))

    @property
    def max_num_logits(self) -> int:
        """Of a step whose logits somebody else reads."""
        return max(shape.num_logits for shape in self.usual())

    def find(self, rows: RowArrays, choice: Choice) -> StepShape | None:
        """The smallest shape with room for the step; None if there is none."""
        num_rows, num_decodes = len(rows.slots), rows.num_decodes
        num_longer, num_tokens = num_rows - num_decodes, len(rows.positions) - num_decodes
        if num_longer and rows.query_lens.max() <= self._max_row_tokens and len(rows.sampled):
            return self._find_short(num_rows, len(rows.positions), choice)
        if rows.has_drafts:
            return None  # beside prompts
        if not num_longer:
            # every row must decide a token: one that does not is a prompt's, and rare
            if len(rows.sampled) < num_rows or num_rows > self._rows[-1]:
                return None
            return StepShape(self._rows[bisect.bisect_left(self._rows, num_rows)], choice=choice)
        for shape in self._mixed:
            if (
                shape.num_decodes >= num_decodes
                and shape.num_longer >= num_longer
                and shape.num_longer_tokens >= num_tokens
            ):
                return shape._replace(choice=choice)
        return None

    def _find_short(self, num_rows: int, num_tokens: int, choice: Choice) -> StepShape | None:
        for shape in self._short:
            if shape.num_rows >= num_rows and shape.num_tokens >= num_tokens:
                return shape._replace(choice=choice)
        return None


class StepGraphs:
    """Captured steps. Padding reads and writes ``spare_slot``, which no request ever gets."""

    def __init__(
        self,
        step: StepFunction,
        shapes: StepShapes,
        cache_slots: Callable[[np.ndarray, np.ndarray], np.ndarray],
        spare_slot: int,
        device: torch.device,
    ) -> None:
        """``cache_slots`` says where the keys and values of tokens go, from their slots and their positions."""
        self._step = step
        self._shapes = shapes
        self._cache_slots = cache_slots
        self._spare_slot = spare_slot
        self._device = device
        self._captured: dict[StepShape, _Captured] = {}
        self._capturable: dict[tuple[Choice, bool], bool] = {}  # by what a step's kernels depend on
        self._inputs = torch.zeros(0, dtype=torch.int64, device=device)
        self._logits: Tensor | None = None
        self._pool: Any = None
        self._stream: Any = None

    def capture_usual(self) -> bool:
        """Capture what most steps need; False, with a warning, if the model waits for the device within a step."""
        started = time.perf_counter()
        shapes = list(self._shapes.usual())
        for shape in shapes:
            if self._get(shape) is None:
                return False
        logger.info("captured %d CUDA graphs in %.2f s", len(shapes), time.perf_counter() - started)
        return True

    @property
    def captured(self) -> Collection[StepShape]:
        """The shapes that have a graph so far."""
        return self._captured.keys()

    def find(self, rows: RowArrays, choice: Choice) -> StepShape | None:
        """The shape to replay for a step, captured now if it is not yet; None: it has to run without a graph.

        It ends with logits where the choice itself cannot be captured.
        """
        for end in (choice, Choice.LOGITS):
            shape = self._shapes.find(rows, end)
            if shape is not None and self._get(shape) is not None:
                return shape
        return None

    def replay(self, shape: StepShape, rows: RowArrays, draws: Draws | None) -> tuple[Tensor, np.ndarray]:
        """Start the captured step; does not wait for the device.

        Returns what the step ends with, overwritten by the next replay, and its entries [num_sampled] that belong to
        ``rows.sampled``. ``draws`` are for those; None: nothing is drawn.
        """
        captured = self._captured[shape]
        where = self._fill(captured.numbers, shape, rows, draws)
        host = captured.host
        captured.flat.copy_(host.pin_memory() if self._device.type == "cuda" else host, non_blocking=True)
        captured.run()
        return captured.output, where

    # --- inputs ------------------------------------------------------------------------------------------------------

    def _fill(self, host: StepInputs, shape: StepShape, rows: RowArrays, draws: Draws | None) -> np.ndarray:
        """Place the step's rows and tokens in the shape's; returns where the entries of ``rows.sampled`` stand."""
        num_decodes = rows.num_decodes if shape.num_decodes else 0
        shift = shape.num_decodes - num_decodes  # what the longer rows and their tokens move by
        row_places = np.arange(len(rows.slots))
        row_places[num_decodes:] += shift
        token_places = np.arange(len(rows.positions))
        token_places[num_decodes:] += shift

        host.token_slots.fill(self._spare_slot)
        host.positions.fill(0)
        host.token_slots[token_places] = rows.token_slots
        host.positions[token_places] = rows.positions
        host.cache_slots[:] = self._cache_slots(host.token_slots, host.positions)
        host.slots.fill(self._spare_slot)
        host.slots[row_places] = rows.slots
        host.seq_lens[: shape.num_decodes] = 1
        host.seq_lens[shape.num_decodes :] = 0  # longer rows that are not there are empty
        host.seq_lens[row_places] = rows.ends
        host.query_start[: shape.num_decodes] = np.arange(shape.num_decodes)
        host.query_start[shape.num_decodes :] = len(rows.positions) + shift
        host.query_start[row_places[num_decodes:]] = rows.query_start[num_decodes:-1] + shift

        # padding decides tokens too, from the first token's hidden state, and stores them where nobody reads
        where: np.ndarray = token_places[rows.logit_tokens] if shape.every_token else row_places[rows.sampled]
        host.logit_rows.fill(0)
        host.logit_rows[where] = token_places[rows.logit_tokens]
        host.target_slots.fill(self._spare_slot)
        host.target_slots[where] = rows.slots[rows.sampled]
        host.target_positions.fill(1)
        host.target_positions[where] = rows.sampled_positions
        host.first[:] = np.arange(shape.num_logits)
        host.first[where] = where[rows.first_sampled]
        for name, anything in (("top_k", 1), ("temperature", 0), ("uniform", 0), ("top_p", 1), ("min_p", 0)):
            place: np.ndarray = getattr(host, name)
            place.fill(anything)
            if draws is not None:
                place[where] = getattr(draws, name)
        return where

    # --- capture -----------------------------------------------------------------------------------------------------

    def _get(self, shape: StepShape) -> _Captured | None:
        """The captured step, captured now if need be; None: steps of this kind wait for the device."""
        if shape in self._captured:
            return self._captured[shape]
        size = StepInputs.size(shape)
        if len(self._inputs) < size:  # earlier graphs keep the one that they were captured with
            self._inputs = torch.zeros(size, dtype=torch.int64, device=self._device)
        flat = self._inputs[:size]
        host = np.empty(size, np.int64)
        numbers = StepInputs.views(shape, host)
        self._fill(numbers, shape, RowArrays.of(()), None)
        flat.copy_(torch.from_numpy(host))
        inputs = StepInputs.views(shape, flat)
        kind = shape.choice, shape.every_token
        if kind not in self._capturable:
            self._capturable[kind] = self._can_capture(lambda: self._step(inputs, shape))
        if not self._capturable[kind]:
            return None
        try:
            self._captured[shape] = _Captured(flat, torch.from_numpy(host), numbers, *self._capture(inputs, shape))
        except RuntimeError as error:  # what is not allowed in a capture, or no memory left: steps go on without
            logger.warning("no CUDA graph for %s: %s", shape, str(error).splitlines()[0])
            self._capturable[kind] = False
        return self._captured.get(shape)

    def _can_capture(self, run: Callable[[], object]) -> bool:
        """Whether ``run`` never waits for the device; logs it if it does."""
        run()  # compiles and allocates what only the first run does
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        except RuntimeError as error:
            logger.warning("no CUDA graphs: a step waits for the device (%s)", str(error).splitlines()[0])
            return False
        finally:
            torch.cuda.set_sync_debug_mode(before)
        return True

    def _capture(self, inputs: StepInputs, shape: StepShape) -> tuple[Callable[[], object], Tensor]:
        """What starts the step, and where it leaves its result."""
        if shape.choice is Choice.LOGITS and self._logits is None:
            # one buffer for all, or every graph would keep its own
            result = self._step(inputs, shape)
            self._logits = torch.empty(
                self._shapes.max_num_logits, *result.shape[1:], dtype=result.dtype, device=result.device
            )
        try:
            return self._record(inputs, shape)
        except RuntimeError:  # drivers before CUDA 12.3 do not load meanwhile what only this shape needs
            self._step(inputs, shape)
            return self._record(inputs, shape)

    def _record(self, inputs: StepInputs, shape: StepShape) -> tuple[Callable[[], object], Tensor]:
        """The same, if nothing is lacking that a capture does not allow."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            # not torch.cuda.graph(): that collects Python's garbage for each graph, which takes longer than this
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                result = self._step(inputs, shape)
                if self._logits is not None and shape.choice is Choice.LOGITS:
                    result = self._logits[: len(result)].copy_(result)
            finally:
                graph.capture_end()
        return graph.replay, result


class _Captured(NamedTuple):
    """A step that is started with one call."""

    flat: Tensor  # the inputs
    host: Tensor  # the same on the host, for the next replay
    numbers: StepInputs  # pieces of that
    run: Callable[[], object]
    output: Tensor
