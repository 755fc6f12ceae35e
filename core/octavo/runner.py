"""The device side of a step: tensors from the plan, the model, the sampler, and the way back to the host.

What the device knows of a request lies in its slot: all its tokens, and its block table. A step uploads what is new,
reads the rest where it lies, and writes sampled tokens there, so that the next step need not wait for the host.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from octavo.batch import ForwardBatch, PlannedRow, StepPlan
from octavo.graphs import Choice, StepGraphs, StepInputs, StepShape, StepShapes
from octavo.interfaces import (
    AttentionBackend,
    AttentionSpec,
    HiddenStateRecorder,
    LogitsProcessor,
    Model,
    Placement,
    SampleRow,
)
from octavo.layers.attention import ForwardContext
from octavo.messages import TokenLogprobs
from octavo.request import Request
from octavo.rows import RowArrays
from octavo.sampling import (
    REJECTED,
    LogprobTensors,
    SamplingTable,
    SamplingTensors,
    TorchLogprobs,
    TorchSample,
    accept,
    apply_penalties,
)

PROMPT_LOGPROB_ROWS = 256  # logits of this many prompt positions exist at once


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step brought, on the host; lists are parallel to the plan's rows."""

    token_ids: Sequence[list[int]]
    logprobs: Sequence[Sequence[TokenLogprobs] | None]
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)  # row -> from position start + 1 on


class DeviceTable:
    """A matrix of int64 or int32 on the device that the host writes to, a piece of a row at a time.

    On a CPU both sides share the memory. Elsewhere pieces are staged and travel together in ``flush``; with
    ``readable`` the host has them as well.
    """

    def __init__(
        self, num_rows: int, num_columns: int, dtype: torch.dtype, device: torch.device, *, readable: bool = False
    ) -> None:
        self.tensor = torch.zeros(num_rows, num_columns, dtype=dtype, device=device)
        self._shared = device.type == "cpu"
        self._host: np.ndarray | None = None
        if self._shared:
            self._host = self.tensor.numpy()
        elif readable:
            self._host = torch.zeros_like(self.tensor, device="cpu").numpy()
        self._staged: list[tuple[int, int, Sequence[int]]] = []

    def write(self, row: int, start: int, values: Sequence[int]) -> None:
        """Put ``values`` at ``[row, start:]``; visible on the device after ``flush``."""
        if self._host is not None:
            self._host[row, start : start + len(values)] = values
        if len(values) and not self._shared:
            self._staged.append((row, start, values))

    def read(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """What the host wrote last at these places. Only of a readable table."""
        assert self._host is not None
        found: np.ndarray = self._host[rows, columns]
        return found

    def shifted(self, num_columns: int) -> DeviceTable:
        """The same memory without the first columns, to be read and written on the device only."""
        table = copy.copy(self)
        table.tensor = self.tensor[:, num_columns:]
        return table

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
    sampled: list[int]  # index into the plan's rows of each sampled token
    logprobs: LogprobTensors | None  # for the entries of sampled that are listed in logprob_entries
    logprob_entries: Sequence[int]
    prompt_logprobs: dict[int, tuple[Tensor, LogprobTensors]]
    ready: torch.cuda.Event | None

    def is_done(self) -> bool:
        """Whether the results are on the host."""
        return self.ready is None or bool(self.ready.query())  # type: ignore[no-untyped-call]

    def wait(self) -> StepResult:
        """The results; waits for the device if need be."""
        if self.ready is not None:
            self.ready.synchronize()
        rows = self.plan.rows
        logprobs: list[list[TokenLogprobs] | None] = [None] * len(rows)
        tokens = self.tokens.tolist()
        if self.sampled == list(range(len(rows))):  # one token each, and a row's first is never rejected
            token_ids = [[token] for token in tokens]
        else:
            token_ids = [[] for _ in rows]
            for row, token in zip(self.sampled, tokens, strict=True):
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
        logprobs: TorchLogprobs,
        use_graphs: bool = False,
        num_drafts: int = 0,
        recorder: HiddenStateRecorder | None = None,
        beside: Runner | None = None,
        shift: int = 0,
    ) -> None:
        """Of a row's tokens ``num_drafts`` are drafts at most. ``recorder`` sees the model's hidden states.

        A runner ``beside`` another shares its slots, and so its requests, their tokens and block tables; it always
        takes the most likely token. With a ``shift`` it reads at each position the token so many places later.
        """
        self.model = model
        self.backend = backend
        self.placement = placement
        self.block_size = block_size
        self.processors = processors
        self.num_blocks = num_blocks
        self._beside = beside
        self._sample = sample
        self._logprobs = logprobs
        self._max_model_len = max_model_len
        device = placement.device
        # a graph's padding has a slot and a block of its own, the last ones
        spare = int(use_graphs)
        self.kv = [_zeros(backend.kv_shape(spec, num_blocks + spare), kv_dtype, device) for spec in specs]
        self._recorder = recorder
        self._paged = self.kv if recorder is None else [*self.kv, recorder.start(num_blocks + spare)]
        if beside is None:
            # one column more than a sequence can have tokens: the last sampled token of a full one lands there
            self._tokens = DeviceTable(max_num_seqs + spare, max_model_len + 1, torch.int64, device)
            max_num_blocks = -(-max_model_len // block_size) + 1
            self._blocks = DeviceTable(max_num_seqs + spare, max_num_blocks, torch.int32, device, readable=True)
        else:
            self._tokens, self._blocks = beside._tokens.shifted(shift), beside._blocks
        self._sampling = SamplingTable(max_num_seqs, vocab_size)
        self._owners: list[Request | None] = [None] * max_num_seqs
        self._epochs = [0] * max_num_seqs
        self._num_blocks_written = [0] * max_num_seqs
        self._choices = np.zeros(max_num_seqs, np.int8)  # how a step must end for each slot's sake
        self._prompt_logits = np.zeros(max_num_seqs, bool)  # slots whose prompts' logits are asked for
        nothing = torch.zeros(1, device=device)
        self._greedy = SamplingTensors(temperature=nothing, uniform=nothing, all_greedy=True)
        self.graphs: StepGraphs | None = None
        if use_graphs:
            self._blocks.write(max_num_seqs, 0, [num_blocks])
            self._blocks.flush()
            shapes = StepShapes(max_num_seqs, 1 + num_drafts)
            graphs = StepGraphs(self._step, shapes, self._cache_slots, max_num_seqs, device)
            self.graphs = graphs if graphs.capture_usual() else None

    @property
    def tokens(self) -> Tensor:
        """The tokens of each slot's request, as far as steps were launched [num_slots, max_model_len + 1], int64;
        anything may stand behind them. On the device, to be read only."""
        return self._tokens.tensor

    # --- the step ----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Start a step. On a GPU this returns before the device is done; ``wait`` of the result does not."""
        self._copy_blocks(plan.copies)
        (self._beside or self)._upload(plan.rows)
        rows = RowArrays.of(plan.rows)
        choice = Choice(int(self._choices[rows.slots[rows.sampled]].max(initial=Choice.LIKELIEST)))
        wants_prompt = self._wants_prompt_logprobs(rows)
        if self.graphs is not None and not wants_prompt:
            shape = self.graphs.find(rows, choice)
            if shape is not None:
                return self._replay(self.graphs, shape, plan, rows)
        batch = self._batch(rows)
        hidden = self._forward(batch, whole=wants_prompt)
        prompt_logprobs = self._prompt_logprobs(plan.rows, rows, hidden) if wants_prompt else {}
        if not len(rows.logit_tokens):
            return self._launched(plan, rows, torch.empty(0, dtype=torch.int64), None, (), prompt_logprobs)
        logits = self.model.logits(_deciding(hidden, batch))
        tokens, logprobs, entries = self._choose(plan.rows, rows, logits, choice)
        drafts = self._keep(rows, tokens)
        if rows.has_drafts:
            tokens = accept(tokens, drafts, _to_device(rows.first_sampled, self.placement.device))
        return self._launched(plan, rows, tokens, logprobs, entries, prompt_logprobs)

    def _replay(self, graphs: StepGraphs, shape: StepShape, plan: StepPlan, rows: RowArrays) -> LaunchedStep:
        """The step as a graph has it; what the graph leaves undone follows it."""
        drawn = shape.choice in (Choice.DRAWN, Choice.FILTERED)
        draws = self._sampling.draws(rows.slots[rows.sampled], rows.sampled_positions) if drawn else None
        output, where = graphs.replay(shape, rows, draws)
        if not len(where) or where[-1] == len(where) - 1:  # the padding follows
            output = output[: len(where)]
        else:
            output = output[_to_device(where, self.placement.device)]
        if shape.choice is not Choice.LOGITS:
            return self._launched(plan, rows, output, None, (), {})
        tokens, logprobs, entries = self._choose(plan.rows, rows, output, shape.choice)
        drafts = self._keep(rows, tokens)
        if rows.has_drafts:
            tokens = accept(tokens, drafts, _to_device(rows.first_sampled, self.placement.device))
        return self._launched(plan, rows, tokens, logprobs, entries, {})

    def _keep(self, rows: RowArrays, tokens: Tensor) -> Tensor:
        """Put sampled tokens where the next step reads them, as it would read some that came from the host; returns
        what was there: the drafts that they confirm or correct."""
        where = _to_device(np.stack([rows.slots[rows.sampled], rows.sampled_positions]), self.placement.device)
        before = self._tokens.tensor[where[0], where[1]]
        self._tokens.tensor[where[0], where[1]] = tokens
        return before

    def _launched(
        self,
        plan: StepPlan,
        rows: RowArrays,
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
        for cache in self._paged:
            cache[pairs[:, 1]] = cache[pairs[:, 0]]

    def _upload(self, rows: Sequence[PlannedRow]) -> None:
        """Bring the rows' slots up to date: everything when a request is new there, else its new blocks and drafts."""
        owners, epochs, num_written = self._owners, self._epochs, self._num_blocks_written
        for row in rows:
            request = row.request
            slot, blocks = request.slot, request.blocks
            if owners[slot] is not request or epochs[slot] != row.epoch:
                owners[slot], epochs[slot], num_written[slot] = request, row.epoch, 0
                self._sampling.set(slot, request)
                self._choices[slot] = self._choice(request)
                self._prompt_logits[slot] = request.wants_prompt_logits
                self._tokens.write(slot, 0, request.tokens)
            if len(blocks) > num_written[slot]:
                self._blocks.write(slot, num_written[slot], blocks[num_written[slot] :])
                num_written[slot] = len(blocks)
            if row.drafts:
                self._tokens.write(slot, row.end - len(row.drafts), row.drafts)
        self._tokens.flush()
        self._blocks.flush()

    def _choice(self, request: Request) -> Choice:
        """How a step must end to choose the request's tokens."""
        params, table = request.params, self._sampling
        if (
            params.logprobs is not None
            or table.penalized[request.slot]
            or any(processor.wants(params) for processor in self.processors)
        ):
            return Choice.LOGITS
        if table.temperature[request.slot] == 0.0:
            return Choice.LIKELIEST
        return Choice.FILTERED if table.filters(request.slot) else Choice.DRAWN

    def _wants_prompt_logprobs(self, rows: RowArrays) -> bool:
        """Whether the step computes prompt positions whose logits are asked for."""
        wanting = self._prompt_logits[rows.slots]
        in_prompt = rows.ends - rows.query_lens < self._sampling.num_prompt[rows.slots] - 1
        return bool((wanting & in_prompt).any())

    @torch.inference_mode()
    def _step(self, inputs: StepInputs, shape: StepShape) -> Tensor:
        """A step from numbers on the device alone: what a graph captures; see :data:`octavo.graphs.StepFunction`.

        Lengths are bounded by what the engine serves, not by this step's.
        """
        positions = inputs.positions
        batch = ForwardBatch(
            tokens=self._tokens.tensor[inputs.token_slots, positions],
            positions=positions,
            query_start=inputs.query_start,
            seq_lens=inputs.seq_lens,
            block_tables=self._blocks.tensor[inputs.slots],
            slots=inputs.cache_slots,
            logit_rows=inputs.logit_rows,
            max_query_len=shape.max_query_len,
            max_seq_len=self._max_model_len,
            num_decodes=shape.num_decodes,
        )
        logits = self.model.logits(_deciding(self._forward(batch), batch))
        if shape.choice is Choice.LOGITS:
            return logits
        if shape.choice is Choice.LIKELIEST:
            tokens = self._sample(logits, self._greedy)
        else:
            filtered = shape.choice is Choice.FILTERED
            draws = SamplingTensors(
                temperature=inputs.temperature.float(),
                uniform=inputs.uniform.float(),
                top_k=inputs.top_k if filtered else None,
                top_p=inputs.top_p.float() if filtered else None,
                min_p=inputs.min_p.float() if filtered else None,
            )
            tokens = self._sample(logits.float(), draws)
        before = self._tokens.tensor[inputs.target_slots, inputs.target_positions] if shape.every_token else None
        self._tokens.tensor[inputs.target_slots, inputs.target_positions] = tokens
        return tokens if before is None else accept(tokens, before, inputs.first)

    def _forward(self, batch: ForwardBatch, *, whole: bool = False) -> Tensor:
        """Hidden states [num_kept, hidden_size]: of all tokens if ``whole``, else at least of those that decide."""
        kept = None
        if not whole and self._recorder is None and batch.num_logits < batch.num_tokens:
            kept = batch.logit_rows if batch.num_logits else batch.query_start[:1]  # kernels take no empty batch
        context = ForwardContext(batch, self.backend, self.backend.plan(batch), self.kv, self._recorder, kept)
        return self.model.forward(batch.tokens, batch.positions, context)

    def _cache_slots(self, token_slots: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Where the keys and values of the tokens at ``positions`` go, int64."""
        blocks = self._blocks.read(token_slots, positions // self.block_size).astype(np.int64)
        found: np.ndarray = blocks * self.block_size + positions % self.block_size
        return found

    def _batch(self, rows: RowArrays) -> ForwardBatch:
        """The step as tensors: one transfer, the rest read where the slots lie."""
        num_rows, num_tokens = len(rows.slots), len(rows.positions)
        cache_slots = self._cache_slots(rows.token_slots, rows.positions)
        packed = _to_device(
            np.concatenate(
                [
                    rows.slots,
                    rows.query_start,
                    rows.ends,
                    rows.token_slots,
                    rows.positions,
                    cache_slots,
                    rows.logit_tokens,
                ]
            ),
            self.placement.device,
        )
        sizes = [num_rows, num_rows + 1, num_rows, num_tokens, num_tokens, num_tokens, len(rows.logit_tokens)]
        slots, query_start, seq_lens, token_slots, positions, places, logit_rows = torch.split(packed, sizes)
        max_seq_len = int(rows.ends.max())
        return ForwardBatch(
            tokens=self._tokens.tensor[token_slots, positions],
            positions=positions,
            query_start=query_start.to(torch.int32),
            seq_lens=seq_lens.to(torch.int32),
            block_tables=self._blocks.tensor[slots, : max_seq_len // self.block_size + 1],  # the next token's is there
            slots=places,
            logit_rows=logit_rows,
            max_query_len=int(rows.query_lens.max()),
            max_seq_len=max_seq_len,
            num_decodes=rows.num_decodes,
            query_lens=rows.query_lens.tolist(),
            context_lens=rows.ends.tolist(),
        )

    # --- sampling ----------------------------------------------------------------------------------------------------

    def _choose(
        self, planned: Sequence[PlannedRow], rows: RowArrays, logits: Tensor, choice: Choice
    ) -> tuple[Tensor, LogprobTensors | None, list[int]]:
        """Tokens [num_sampled], and log-probabilities of the raw logits for the entries that asked for them."""
        if choice is Choice.LIKELIEST:
            return self._sample(logits, self._greedy), None, []
        entries = [i for i, row in enumerate(rows.sampled) if planned[row].request.params.logprobs is not None]
        raw = logits[entries] if entries else None
        logits = self._process(planned, rows, logits)
        tensors = self._sampling.gather(rows.slots[rows.sampled], rows.sampled_positions, self.placement.device)
        # the largest logit is the same in any dtype: a step that only wants that saves the conversion
        tokens = self._sample(logits if tensors.all_greedy else logits.float(), tensors)
        if raw is None:
            return tokens, None, entries
        num_top = max(planned[rows.sampled[i]].request.params.logprobs or 0 for i in entries)
        return tokens, LogprobTensors(*self._logprobs(raw, tokens[entries], num_top)), entries

    def _process(self, planned: Sequence[PlannedRow], rows: RowArrays, logits: Tensor) -> Tensor:
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
        self, planned: Sequence[PlannedRow], rows: RowArrays, hidden: Tensor
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
                pieces.append(LogprobTensors(*self._logprobs(logits, targets[offset:stop], num_top)))
            joined = LogprobTensors(
                *(torch.cat([getattr(piece, name) for piece in pieces]) for name in LogprobTensors.__slots__)
            )
            found[index] = (targets.clone(), joined)
        return found


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU from pages that the system clears when they are first touched: unused ones cost nothing."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


def _deciding(hidden: Tensor, batch: ForwardBatch) -> Tensor:
    """The states that become logits [num_logits, hidden_size], where a model has not kept just those."""
    return hidden if hidden.shape[0] == batch.num_logits else hidden[batch.logit_rows]


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
