"""The device side of a step: tensors from the plan, the model, the sampler, and the way back to the host.

What the device knows of a request lies in its slot: all its tokens, and its block table. A step uploads what is new,
reads the rest where it lies, and writes sampled tokens there, so that the next step need not wait for the host.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from octavo.batch import ForwardBatch, PlannedRow, StepPlan
from octavo.graphs import DecodeGraphs, DecodeOutput, MixedGraphs, MixedInputs, MixedShape, graph_sizes, mixed_shapes
from octavo.interfaces import AttentionBackend, AttentionSpec, LogitsProcessor, Model, Placement, SampleRow
from octavo.layers.attention import ForwardContext
from octavo.messages import TokenLogprobs
from octavo.request import Request
from octavo.sampling import (
    REJECTED,
    LogprobTensors,
    SamplingTable,
    SamplingTensors,
    TorchSample,
    accept,
    apply_penalties,
    gather_logprobs,
)

PROMPT_LOGPROB_ROWS = 256  # logits of this many prompt positions exist at once


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step brought, on the host; lists are parallel to the plan's rows."""

    token_ids: Sequence[Sequence[int]]
    logprobs: Sequence[Sequence[TokenLogprobs] | None]
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)  # row -> from position start + 1 on


class DeviceTable:
    """A matrix of int64 or int32 on the device that the host writes to, a piece of a row at a time.

    On a CPU both sides share the memory. Elsewhere pieces are staged and travel together in ``flush``.
    """

    def __init__(self, num_rows: int, num_columns: int, dtype: torch.dtype, device: torch.device) -> None:
        self.tensor = torch.zeros(num_rows, num_columns, dtype=dtype, device=device)
        self._host = self.tensor.numpy() if device.type == "cpu" else None
        self._staged: list[tuple[int, int, Sequence[int]]] = []

    def write(self, row: int, start: int, values: Sequence[int]) -> None:
        """Put ``values`` at ``[row, start:]``; visible on the device after ``flush``."""
        if self._host is not None:
            self._host[row, start : start + len(values)] = values
        elif len(values):
            self._staged.append((row, start, values))

    def flush(self) -> None:
        """One transfer for everything staged."""
        if not self._staged:
            return
        lengths = np.array([len(values) for _, _, values in self._staged])
        rows = np.repeat([row for row, _, _ in self._staged], lengths)
        columns = np.concatenate([np.arange(start, start + len(values)) for _, start, values in self._staged])
        values = np.concatenate([np.asarray(values, np.int64) for _, _, values in self._staged])
        packed = _to_device(np.stack([rows, columns, values]), self.tensor.device)
        self.tensor[packed[0], packed[1]] = packed[2].to(self.tensor.dtype)
        self._staged.clear()


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A step that was launched: its results may still be on their way to the host."""

    plan: StepPlan
    tokens: Tensor  # [num_sampled] int64, REJECTED where a draft before it was wrong; pinned on a GPU
    sampled: Sequence[int]  # index into the plan's rows of each sampled token
    logprobs: LogprobTensors | None  # for the entries of sampled that are listed in logprob_entries
    logprob_entries: Sequence[int]
    prompt_logprobs: dict[int, tuple[Tensor, LogprobTensors]]
    ready: torch.cuda.Event | None

    def wait(self) -> StepResult:
        """The results; waits for the device if need be."""
        if self.ready is not None:
            self.ready.synchronize()
        rows = self.plan.rows
        token_ids: list[list[int]] = [[] for _ in rows]
        logprobs: list[list[TokenLogprobs] | None] = [None for _ in rows]
        for row, token in zip(self.sampled, self.tokens.tolist(), strict=True):
            if token != REJECTED:
                token_ids[row].append(token)
        if self.logprobs is not None:
            chosen = self.tokens[torch.as_tensor(self.logprob_entries)]
            counts = [rows[self.sampled[entry]].request.params.logprobs or 0 for entry in self.logprob_entries]
            for entry, item in zip(self.logprob_entries, _listed(chosen, self.logprobs, counts), strict=True):
                if item.token_id == REJECTED:
                    continue
                row = self.sampled[entry]
                found = logprobs[row]
                logprobs[row] = [item] if found is None else [*found, item]
        prompts = {
            row: _listed(targets, values, [rows[row].request.params.prompt_logprobs or 0] * len(targets))
            for row, (targets, values) in self.prompt_logprobs.items()
        }
        return StepResult(token_ids, logprobs, prompts)


class Runner:
    """Owns the model, the caches and the slots. One runner, one device, one stream of steps."""

    def __init__(
        self,
        model: Model,
        backend: AttentionBackend,
        specs: Sequence[AttentionSpec],
        placement: Placement,
        *,
        num_blocks: int,
        block_size: int,
        kv_dtype: torch.dtype,
        max_num_seqs: int,
        max_model_len: int,
        vocab_size: int,
        processors: Sequence[LogitsProcessor] = (),
        sample: TorchSample,
        use_graphs: bool = False,
    ) -> None:
        self.model = model
        self.backend = backend
        self.placement = placement
        self.block_size = block_size
        self.processors = processors
        self._sample = sample
        self._max_model_len = max_model_len
        device = placement.device
        # a graph's padding has a slot and a block of its own, the last ones
        spare = int(use_graphs)
        self.kv = [_zeros(backend.kv_shape(spec, num_blocks + spare), kv_dtype, device) for spec in specs]
        # one column more than a sequence can have tokens: the last sampled token of a full one lands there
        self._tokens = DeviceTable(max_num_seqs + spare, max_model_len + 1, torch.int64, device)
        self._blocks = DeviceTable(max_num_seqs + spare, -(-max_model_len // block_size) + 1, torch.int32, device)
        self._sampling = SamplingTable(max_num_seqs, vocab_size)
        self._owner: list[tuple[Request, int] | None] = [None] * max_num_seqs
        self._num_blocks_written = [0] * max_num_seqs
        nothing = torch.zeros(1, device=device)
        self._greedy = SamplingTensors(temperature=nothing, uniform=nothing, all_greedy=True)
        self._plain = np.zeros(max_num_seqs, bool)  # slots whose tokens are the most likely ones, and nothing else
        self.graphs: DecodeGraphs | None = None
        if use_graphs:
            self._blocks.write(max_num_seqs, 0, [num_blocks])
            self._blocks.flush()
            graphs = DecodeGraphs(graph_sizes(max_num_seqs), max_num_seqs, device)
            self.graphs = graphs if graphs.capture(self._decode) else None
        self.mixed_graphs: MixedGraphs | None = None
        if self.graphs is not None:
            self.mixed_graphs = MixedGraphs(mixed_shapes(max_num_seqs), max_num_seqs, device)
            self.mixed_graphs.capture(self._mixed)

    def correct(self, request: Request, start: int) -> None:
        """The host knows the tokens from ``start`` on better than the device: the next step reads them so.

        For who does not keep what the runner sampled; the request must hold its slot.
        """
        self._tokens.write(request.slot, start, request.tokens[start:])

    # --- the step ----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Start a step. On a GPU this returns before the device is done; ``wait`` of the result does not."""
        self._copy_blocks(plan.copies)
        for row in plan.rows:
            self._upload(row)
        self._tokens.flush()
        self._blocks.flush()
        rows = _RowArrays.of(plan.rows)
        if self.graphs is not None and self.graphs.can_serve(len(rows.slots), len(rows.token_slots), len(rows.sampled)):
            return self._launch_graph(self.graphs, plan, rows)
        if self.mixed_graphs is not None and (launched := self._launch_mixed(self.mixed_graphs, plan, rows)):
            return launched
        batch = self._batch(rows)
        context = ForwardContext(batch, self.backend, self.backend.plan(batch), self.kv)
        hidden = self.model.forward(batch.tokens, batch.positions, context)
        prompt_logprobs = self._prompt_logprobs(plan.rows, rows, hidden)
        if not len(rows.logit_tokens):
            return self._launched(plan, rows, torch.empty(0, dtype=torch.int64), None, (), prompt_logprobs)
        if batch.logit_rows.shape[0] != hidden.shape[0]:
            hidden = hidden[batch.logit_rows]
        logits = self.model.logits(hidden)
        tokens, logprobs, entries = self._choose(plan.rows, rows, logits)
        drafts = self._keep(rows, tokens)
        if rows.has_drafts:
            tokens = accept(tokens, drafts, _to_device(rows.first_sampled, self.placement.device))
        return self._launched(plan, rows, tokens, logprobs, entries, prompt_logprobs)

    def _launch_graph(self, graphs: DecodeGraphs, plan: StepPlan, rows: _RowArrays) -> LaunchedStep:
        """A step of decodes only. The graph takes the most likely tokens; others are chosen from its logits."""
        output = graphs.replay(rows.slots, rows.ends)
        if self._is_plain(rows):
            return self._launched(plan, rows, output.tokens, None, (), {})
        tokens, logprobs, entries = self._choose(plan.rows, rows, output.logits)
        self._keep(rows, tokens)
        return self._launched(plan, rows, tokens, logprobs, entries, {})

    def _launch_mixed(self, graphs: MixedGraphs, plan: StepPlan, rows: _RowArrays) -> LaunchedStep | None:
        """A step of decodes and a few prompt tokens that all take the most likely token; None if it is not one."""
        num_decodes = int((rows.query_lens == 1).sum())
        num_rows, num_tokens = len(rows.slots), len(rows.positions)
        shape = graphs.find(num_decodes, num_rows - num_decodes, num_tokens - num_decodes)
        if (
            shape is None
            or not num_decodes
            or not self._is_plain(rows)
            or any(row.drafts or row.request.wants_prompt_logits for row in plan.rows)
        ):
            return None
        output, where = graphs.replay(
            shape,
            rows.token_slots,
            rows.positions,
            rows.query_start,
            rows.slots,
            rows.ends,
            rows.sampled,
            rows.sampled_positions,
        )
        tokens = output.tokens[_to_device(where, self.placement.device)]
        return self._launched(plan, rows, tokens, None, (), {})

    def _keep(self, rows: _RowArrays, tokens: Tensor) -> Tensor:
        """Put sampled tokens where the next step reads them, as it would read some that came from the host; returns
        what was there: the drafts that they confirm or correct."""
        where = _to_device(np.stack([rows.slots[rows.sampled], rows.sampled_positions]), self.placement.device)
        before = self._tokens.tensor[where[0], where[1]]
        self._tokens.tensor[where[0], where[1]] = tokens
        return before

    def _launched(
        self,
        plan: StepPlan,
        rows: _RowArrays,
        tokens: Tensor,
        logprobs: LogprobTensors | None,
        entries: Sequence[int],
        prompt_logprobs: dict[int, tuple[Tensor, LogprobTensors]],
    ) -> LaunchedStep:
        """Send the results to the host; nobody waits for them here."""
        return LaunchedStep(
            plan,
            _to_host(tokens),
            rows.sampled.tolist(),
            None if logprobs is None else _logprobs_to_host(logprobs),
            entries,
            {row: (_to_host(ids), _logprobs_to_host(values)) for row, (ids, values) in prompt_logprobs.items()},
            self._mark(),
        )

    def _mark(self) -> torch.cuda.Event | None:
        if self.placement.device.type != "cuda":
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        if not copies:
            return
        pairs = _to_device(np.array(copies, np.int64), self.placement.device)
        for cache in self.kv:
            cache[pairs[:, 1]] = cache[pairs[:, 0]]

    def _upload(self, row: PlannedRow) -> None:
        """Bring a request's slot up to date: everything when it is new there, else its new blocks and drafts."""
        request, slot = row.request, row.request.slot
        owner = self._owner[slot]
        if owner is None or owner[0] is not request or owner[1] != row.epoch:
            self._owner[slot] = (request, row.epoch)
            self._num_blocks_written[slot] = 0
            self._sampling.set(slot, request)
            self._plain[slot] = self._wants_likeliest(request)
            self._tokens.write(slot, 0, request.tokens)
        written = self._num_blocks_written[slot]
        if len(request.blocks) > written:
            self._blocks.write(slot, written, request.blocks[written:])
            self._num_blocks_written[slot] = len(request.blocks)
        if row.drafts:
            self._tokens.write(slot, row.end - len(row.drafts), row.drafts)

    def _is_plain(self, rows: _RowArrays) -> bool:
        """Whether every row that samples takes the most likely token and asks for nothing else."""
        return bool(self._plain[rows.slots[rows.sampled]].all())

    def _wants_likeliest(self, request: Request) -> bool:
        """Whether the most likely token is all that the request ever asks of the logits."""
        params = request.params
        return (
            params.greedy
            and params.logprobs is None
            and not self._sampling.penalized[request.slot]
            and not any(processor.wants(params) for processor in self.processors)
        )

    @torch.inference_mode()
    def _decode(self, slots: Tensor, seq_lens: Tensor) -> DecodeOutput:
        """One token per row, from numbers on the device alone: what a graph captures.

        slots and seq_lens [num_rows] int64. Lengths are bounded by what the engine serves, not by this step's.
        """
        num_rows = len(slots)
        positions = seq_lens - 1
        block = self._blocks.tensor[slots, torch.div(positions, self.block_size, rounding_mode="floor")]
        batch = ForwardBatch(
            tokens=self._tokens.tensor[slots, positions],
            positions=positions,
            query_start=torch.arange(num_rows + 1, dtype=torch.int32, device=slots.device),
            seq_lens=seq_lens.to(torch.int32),
            block_tables=self._blocks.tensor[slots],
            slots=block.long() * self.block_size + positions % self.block_size,
            logit_rows=torch.arange(num_rows, device=slots.device),
            max_query_len=1,
            max_seq_len=self._max_model_len,
            num_decodes=num_rows,
        )
        context = ForwardContext(batch, self.backend, self.backend.plan(batch), self.kv)
        logits = self.model.logits(self.model.forward(batch.tokens, positions, context))
        tokens = self._sample(logits, self._greedy)
        self._tokens.tensor[slots, seq_lens] = tokens
        return DecodeOutput(tokens, logits)

    @torch.inference_mode()
    def _mixed(self, inputs: MixedInputs, shape: MixedShape) -> DecodeOutput:
        """Decodes and prompts together, from numbers on the device alone."""
        positions, token_slots = inputs.positions, inputs.token_slots
        block = self._blocks.tensor[token_slots, torch.div(positions, self.block_size, rounding_mode="floor")]
        batch = ForwardBatch(
            tokens=self._tokens.tensor[token_slots, positions],
            positions=positions,
            query_start=inputs.query_start.to(torch.int32),
            seq_lens=inputs.seq_lens.to(torch.int32),
            block_tables=self._blocks.tensor[inputs.slots],
            slots=block.long() * self.block_size + positions % self.block_size,
            logit_rows=inputs.logit_rows,
            max_query_len=shape.num_prompt_tokens,
            max_seq_len=self._max_model_len,
            num_decodes=shape.num_decodes,
        )
        context = ForwardContext(batch, self.backend, self.backend.plan(batch), self.kv)
        hidden = self.model.forward(batch.tokens, positions, context)
        logits = self.model.logits(hidden[inputs.logit_rows])
        tokens = self._sample(logits, self._greedy)
        self._tokens.tensor[inputs.target_slots, inputs.target_positions] = tokens
        return DecodeOutput(tokens, logits)

    def _batch(self, rows: _RowArrays) -> ForwardBatch:
        """The step as tensors: one transfer, the rest computed where the slots lie."""
        num_rows, num_tokens = len(rows.slots), len(rows.positions)
        packed = _to_device(
            np.concatenate(
                [rows.slots, rows.query_start, rows.ends, rows.token_slots, rows.positions, rows.logit_tokens]
            ),
            self.placement.device,
        )
        sizes = [num_rows, num_rows + 1, num_rows, num_tokens, num_tokens, len(rows.logit_tokens)]
        slots, query_start, seq_lens, token_slots, positions, logit_rows = torch.split(packed, sizes)
        max_seq_len = int(rows.ends.max())
        tables = self._blocks.tensor
        block = tables[token_slots, torch.div(positions, self.block_size, rounding_mode="floor")]
        return ForwardBatch(
            tokens=self._tokens.tensor[token_slots, positions],
            positions=positions,
            query_start=query_start.to(torch.int32),
            seq_lens=seq_lens.to(torch.int32),
            block_tables=tables[slots, : -(-max_seq_len // self.block_size)],
            slots=block.long() * self.block_size + positions % self.block_size,
            logit_rows=logit_rows,
            max_query_len=int(rows.query_lens.max()),
            max_seq_len=max_seq_len,
            num_decodes=int((rows.query_lens == 1).sum()),
            query_lens=rows.query_lens.tolist(),
            context_lens=rows.ends.tolist(),
        )

    # --- sampling ----------------------------------------------------------------------------------------------------

    def _choose(
        self, planned: Sequence[PlannedRow], rows: _RowArrays, logits: Tensor
    ) -> tuple[Tensor, LogprobTensors | None, list[int]]:
        """Tokens [num_sampled], and log-probabilities of the raw logits for the entries that asked for them."""
        if self._is_plain(rows):
            return self._sample(logits, self._greedy), None, []
        entries = [i for i, row in enumerate(rows.sampled) if planned[row].request.params.logprobs is not None]
        raw = logits[entries] if entries else None
        logits = self._process(planned, rows, logits)
        device = self.placement.device
        tensors = self._sampling.gather(rows.slots[rows.sampled], rows.sampled_positions, device)
        # the largest logit is the same in any dtype: a step that only wants that saves the conversion
        tokens = self._sample(logits if tensors.all_greedy else logits.float(), tensors)
        if raw is None:
            return tokens, None, entries
        num_top = max(planned[rows.sampled[i]].request.params.logprobs or 0 for i in entries)
        return tokens, gather_logprobs(raw, tokens[entries], num_top), entries

    def _process(self, planned: Sequence[PlannedRow], rows: _RowArrays, logits: Tensor) -> Tensor:
        """Run the processors and penalties that rows ask for; logits without any pass through untouched."""
        sampled = [planned[row] for row in rows.sampled]
        for processor in self.processors:
            wanting = [
                (i, SampleRow(row.request, int(rows.sampled_positions[i]), row.drafts[: rows.num_drafts_before(i)]))
                for i, row in enumerate(sampled)
                if processor.wants(row.request.params)
            ]
            if wanting:
                logits = logits.float()
                processor.apply(logits, wanting)
        slots = rows.slots[rows.sampled]
        penalized = np.flatnonzero(self._sampling.penalized[slots])
        if not len(penalized):
            return logits
        device = self.placement.device
        table, where = self._sampling, slots[penalized]
        num_known = rows.sampled_positions[penalized]
        chosen = _to_device(penalized, device)
        logits = logits.float()
        logits[chosen] = apply_penalties(
            logits[chosen],
            self._tokens.tensor[_to_device(where, device), : int(num_known.max())],
            _to_device(table.num_prompt[where], device),
            _to_device(num_known, device),
            _to_device(table.repetition_penalty[where], device),
            _to_device(table.presence_penalty[where], device),
            _to_device(table.frequency_penalty[where], device),
        )
        return logits

    def _prompt_logprobs(
        self, planned: Sequence[PlannedRow], rows: _RowArrays, hidden: Tensor
    ) -> dict[int, tuple[Tensor, LogprobTensors]]:
        """For rows that ask: the log-probability of each prompt token after ``start``, a bounded piece at a time."""
        found: dict[int, tuple[Tensor, LogprobTensors]] = {}
        for index, row in enumerate(planned):
            last = min(row.end, row.request.num_prompt - 1)
            if not row.request.wants_prompt_logits or row.start >= last:
                continue
            begin = int(rows.query_start[index])
            targets = self._tokens.tensor[row.request.slot, row.start + 1 : last + 1]
            num_top = row.request.params.prompt_logprobs or 0
            pieces = []
            for offset in range(0, last - row.start, PROMPT_LOGPROB_ROWS):
                stop = min(offset + PROMPT_LOGPROB_ROWS, last - row.start)
                logits = self.model.logits(hidden[begin + offset : begin + stop])
                pieces.append(gather_logprobs(logits, targets[offset:stop], num_top))
            joined = LogprobTensors(
                *(torch.cat([getattr(piece, name) for piece in pieces]) for name in LogprobTensors.__slots__)
            )
            found[index] = (targets.clone(), joined)
        return found


@dataclass(frozen=True, slots=True)
class _RowArrays:
    """A plan's numbers as arrays; positions are those of tokens within their sequences."""

    slots: np.ndarray  # [num_rows]
    query_lens: np.ndarray  # [num_rows]
    query_start: np.ndarray  # [num_rows + 1]
    ends: np.ndarray  # [num_rows]: context length with this step's tokens
    token_slots: np.ndarray  # [num_tokens]
    positions: np.ndarray  # [num_tokens]
    sampled: np.ndarray  # [num_sampled]: the row of each token to be sampled
    first_sampled: np.ndarray  # [num_sampled]: the index in ``sampled`` of the first token of the same row
    sampled_positions: np.ndarray  # [num_sampled]: where that token will stand
    logit_tokens: np.ndarray  # [num_sampled]: the token of this step whose hidden state decides it

    @classmethod
    def of(cls, planned: Sequence[PlannedRow]) -> _RowArrays:
        slots = np.array([row.request.slot for row in planned], np.int64)
        starts = np.array([row.start for row in planned], np.int64)
        query_lens = np.array([row.num_tokens for row in planned], np.int64)
        # a row that samples decides one token per draft and one more
        num_sampled = np.array([len(row.drafts) + 1 if row.samples else 0 for row in planned], np.int64)
        query_start = np.zeros(len(planned) + 1, np.int64)
        np.cumsum(query_lens, out=query_start[1:])
        ends = starts + query_lens
        row_of_token = np.repeat(np.arange(len(planned)), query_lens)
        positions = np.arange(query_start[-1]) - query_start[row_of_token] + starts[row_of_token]
        sampled = np.repeat(np.arange(len(planned)), num_sampled)
        first = np.cumsum(num_sampled) - num_sampled
        first_sampled = first[sampled]
        offset = np.arange(len(sampled)) - first_sampled - num_sampled[sampled]  # -num_sampled .. -1
        return cls(
            slots=slots,
            query_lens=query_lens,
            query_start=query_start,
            ends=ends,
            token_slots=slots[row_of_token],
            positions=positions,
            sampled=sampled,
            first_sampled=first_sampled,
            sampled_positions=ends[sampled] + offset + 1,
            logit_tokens=query_start[sampled + 1] + offset,
        )

    @property
    def has_drafts(self) -> bool:
        """Whether any row is to sample more than one token."""
        return bool((self.first_sampled != np.arange(len(self.sampled))).any())

    def num_drafts_before(self, entry: int) -> int:
        """How many drafts of its own row a sampled token follows."""
        return entry - int(self.first_sampled[entry])


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU from pages that the system clears when they are first touched: unused ones cost nothing."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


def _to_device(array: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def _to_host(tensor: Tensor) -> Tensor:
    """On its way to the host, into pinned memory; there when an event recorded after this has passed."""
    return tensor if tensor.device.type == "cpu" else tensor.to("cpu", non_blocking=True)


def _logprobs_to_host(values: LogprobTensors) -> LogprobTensors:
    return LogprobTensors(*(_to_host(getattr(values, name)) for name in LogprobTensors.__slots__))


def _listed(chosen: Tensor, values: LogprobTensors, counts: Sequence[int]) -> list[TokenLogprobs]:
    """Rows of tensors as messages, each with as many alternatives as it asked for."""
    return [
        TokenLogprobs(token, logprob, rank, ids[:count], tops[:count])
        for token, logprob, rank, ids, tops, count in zip(
            chosen.tolist(),
            values.logprobs.tolist(),
            values.ranks.tolist(),
            values.top_ids.tolist(),
            values.top_logprobs.tolist(),
            counts,
            strict=True,
        )
    ]
