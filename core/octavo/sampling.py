"""Logits to tokens: processors, penalties, filters, the random choice, and log-probabilities.

Randomness is a function of the request's seed and of the position of the token that is chosen, and of nothing else:
one uniform number per token, turned into a token by inverting the cumulative distribution. So a sequence is the same
whatever else is in the batch, after preemption, and whichever kernel does the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from octavo.hooks import KernelProvider, Provider
from octavo.interfaces import LogitsProcessor, SampleRow
from octavo.operations import SampleNeed
from octavo.request import Request, SamplingParams

# --- randomness ------------------------------------------------------------------------------------------------------


def uniform(seeds: np.ndarray, positions: np.ndarray, stream: int = 0) -> np.ndarray:
    """One number in [0, 1) for each (seed, position): SplitMix64 (Steele et al. 2014) as a counter-based generator.

    seeds [num_rows] int64, positions [num_rows] int64 -> [num_rows] float64. ``stream`` separates draws that are made
    for the same position.
    """
    with np.errstate(over="ignore"):
        counter = positions.astype(np.uint64) * np.uint64(4) + np.uint64(stream)
        state = _mix(seeds.astype(np.uint64)) + (counter + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        numbers: np.ndarray = (_mix(state) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return numbers


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = x ^ (x >> np.uint64(31))
    return mixed


# --- the choice ------------------------------------------------------------------------------------------------------


MIN_TEMPERATURE = 1e-5  # below it logits overflow when they are divided; the most likely token is taken instead


@dataclass(frozen=True, slots=True)
class SamplingTensors:
    """What decides the choice in each row; a filter that no row uses is None."""

    temperature: Tensor  # [num_rows] float32; 0: the most likely token
    uniform: Tensor  # [num_rows] float32 in [0, 1)
    top_k: Tensor | None = None  # [num_rows] int64; the vocabulary's size where off
    top_p: Tensor | None = None  # [num_rows] float32
    min_p: Tensor | None = None  # [num_rows] float32
    all_greedy: bool = False


class TorchSample:
    """The operation ``sample`` in plain torch."""

    NUM_CANDIDATES: ClassVar[int] = 256  # how many of the most likely tokens are sorted before the whole vocabulary is

    def __init__(self, need: SampleNeed) -> None:
        self._vocab_size = need.vocab_size

    @classmethod
    def missing(cls, need: SampleNeed) -> list[str]:
        return []

    def __call__(self, logits: Tensor, tensors: SamplingTensors) -> Tensor:
        """logits [num_rows, vocab_size] float32, or of any float dtype if all rows are greedy -> token ids [num_rows]
        int64."""
        if tensors.all_greedy:
            return logits.argmax(dim=-1)
        probabilities = self.probabilities(logits, tensors)
        cumulative = probabilities.cumsum(dim=-1)
        # scaled to the total, so that rounding in the sum cannot push the choice past the end
        threshold = tensors.uniform.unsqueeze(1) * cumulative[:, -1:]
        chosen = torch.searchsorted(cumulative, threshold, right=True).squeeze(1).clamp_(max=self._vocab_size - 1)
        return torch.where(tensors.temperature == 0.0, logits.argmax(dim=-1), chosen)

    def probabilities(self, logits: Tensor, tensors: SamplingTensors) -> Tensor:
        """The distribution that tokens are drawn from, not normalized: [num_rows, vocab_size] float32, 0 where cut."""
        temperature = torch.where(tensors.temperature == 0.0, 1.0, tensors.temperature).unsqueeze(1)
        probabilities = (logits / temperature).softmax(dim=-1)
        if tensors.min_p is not None:
            floor = probabilities.amax(dim=-1, keepdim=True) * tensors.min_p.unsqueeze(1)
            probabilities = probabilities.masked_fill(probabilities < floor, 0.0)
        if tensors.top_k is not None or tensors.top_p is not None:
            threshold = self._threshold(probabilities, tensors)
            probabilities = probabilities.masked_fill(probabilities < threshold, 0.0)
        return probabilities

    def _threshold(self, probabilities: Tensor, tensors: SamplingTensors) -> Tensor:
        """The smallest probability that top-k and then top-p keep: [num_rows, 1]. Ties with it are kept."""
        rows = torch.zeros(len(probabilities), 1, device=probabilities.device)
        top_k, top_p = tensors.top_k, tensors.top_p
        for width in (min(self.NUM_CANDIDATES, self._vocab_size), self._vocab_size):
            ordered = probabilities.topk(width, dim=-1).values
            total = probabilities.sum(dim=-1, keepdim=True)
            enough = torch.ones_like(rows, dtype=torch.bool)
            if top_k is not None:
                rank = torch.arange(width, device=ordered.device)
                ordered = ordered.masked_fill(rank >= top_k.unsqueeze(1), 0.0)
                limited = top_k.unsqueeze(1) < self._vocab_size
                enough &= ~limited | (top_k.unsqueeze(1) <= width)
                total = torch.where(limited, ordered.sum(dim=-1, keepdim=True), total)
            if top_p is not None:
                before = ordered.cumsum(dim=-1) - ordered
                beyond = before >= top_p.unsqueeze(1) * total
                unlimited = top_p.unsqueeze(1) >= 1.0
                enough &= unlimited | beyond[:, -1:] | (ordered[:, -1:] == 0.0)
                ordered = ordered.masked_fill(beyond & ~unlimited, 0.0)
            if width == self._vocab_size or bool(enough.all()):
                break
        kept = torch.where(ordered > 0.0, ordered, torch.inf).amin(dim=-1, keepdim=True)
        off = torch.ones_like(enough)
        if top_k is not None:
            off &= top_k.unsqueeze(1) >= self._vocab_size
        if top_p is not None:
            off &= top_p.unsqueeze(1) >= 1.0
        return torch.where(off, rows, kept)


@dataclass(frozen=True, slots=True)
class Draws:
    """What decides the choice of each token of a step, on the host: see :class:`SamplingTensors`."""

    temperature: np.ndarray  # [num_entries] float32
    uniform: np.ndarray  # [num_entries] float32
    top_k: np.ndarray  # [num_entries] int64
    top_p: np.ndarray  # [num_entries] float32
    min_p: np.ndarray  # [num_entries] float32


BUILTIN_SAMPLE = KernelProvider("torch", TorchSample, priority=-100, operation="sample")


class SamplingTable:
    """Each slot's sampling parameters as arrays on the host, gathered for a step without a loop over rows."""

    def __init__(self, num_slots: int, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self.seeds = np.zeros(num_slots, np.int64)
        self.temperature = np.zeros(num_slots, np.float32)
        self.top_k = np.zeros(num_slots, np.int64)
        self.top_p = np.ones(num_slots, np.float32)
        self.min_p = np.zeros(num_slots, np.float32)
        self.penalized = np.zeros(num_slots, bool)
        self.repetition_penalty = np.ones(num_slots, np.float32)
        self.presence_penalty = np.zeros(num_slots, np.float32)
        self.frequency_penalty = np.zeros(num_slots, np.float32)
        self.num_prompt = np.zeros(num_slots, np.int64)

    def set(self, slot: int, request: Request) -> None:
        """A request has taken the slot."""
        params = request.params
        self.seeds[slot] = np.uint64(request.seed % 2**64).astype(np.int64)
        self.temperature[slot] = params.temperature if params.temperature >= MIN_TEMPERATURE else 0.0
        self.top_k[slot] = min(params.top_k, self._vocab_size) or self._vocab_size
        self.top_p[slot] = params.top_p
        self.min_p[slot] = params.min_p
        self.repetition_penalty[slot] = params.repetition_penalty
        self.presence_penalty[slot] = params.presence_penalty
        self.frequency_penalty[slot] = params.frequency_penalty
        self.penalized[slot] = (
            params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
        )
        self.num_prompt[slot] = request.num_prompt

    def draws(self, slots: np.ndarray, positions: np.ndarray) -> Draws:
        """slots [num_entries] and the positions [num_entries] of the tokens to be chosen."""
        numbers = uniform(self.seeds[slots], positions).astype(np.float32)
        return Draws(
            temperature=self.temperature[slots],
            # rounding to float32 must not reach 1
            uniform=np.minimum(numbers, np.float32(1.0 - 2.0**-24)),
            top_k=self.top_k[slots],
            top_p=self.top_p[slots],
            min_p=self.min_p[slots],
        )

    def gather(self, slots: np.ndarray, positions: np.ndarray, device: torch.device) -> SamplingTensors:
        """The same on the device, without what no row uses."""

        def tensor(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(device, non_blocking=True)

        draws = self.draws(slots, positions)
        return SamplingTensors(
            temperature=tensor(draws.temperature),
            uniform=tensor(draws.uniform),
            top_k=tensor(draws.top_k) if (draws.top_k < self._vocab_size).any() else None,
            top_p=tensor(draws.top_p) if (draws.top_p < 1.0).any() else None,
            min_p=tensor(draws.min_p) if (draws.min_p > 0.0).any() else None,
            all_greedy=not draws.temperature.any(),
        )

    def filters(self, slot: int) -> bool:
        """Whether the slot's request leaves out unlikely tokens."""
        return bool(self.top_k[slot] < self._vocab_size or self.top_p[slot] < 1.0 or self.min_p[slot] > 0.0)


def apply_penalties(
    logits: Tensor,
    tokens: Tensor,
    num_prompt: Tensor,
    num_known: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> Tensor:
    """Penalize tokens that occurred: repetition (Keskar et al. 2019) counts prompt and output, presence and frequency
    the output only, as OpenAI defines them.

    logits [num_rows, vocab_size] float32, tokens [num_rows, length] int64, of which the first ``num_known`` [num_rows]
    count and the first ``num_prompt`` are the prompt -> new logits.
    """
    place = torch.arange(tokens.shape[1], device=tokens.device)
    known = place < num_known.unsqueeze(1)
    tokens = tokens.masked_fill(~known, 0)
    seen = torch.zeros_like(logits).scatter_add_(1, tokens, known.to(logits.dtype)) > 0
    output = known & (place >= num_prompt.unsqueeze(1))
    counts = torch.zeros_like(logits).scatter_add_(1, tokens, output.to(logits.dtype))
    factor = repetition.unsqueeze(1)
    repeated = torch.where(logits > 0, logits / factor, logits * factor)
    logits = torch.where(seen, repeated, logits)
    return logits - counts * frequency.unsqueeze(1) - (counts > 0) * presence.unsqueeze(1)


# --- drafts ----------------------------------------------------------------------------------------------------------

REJECTED = -1
"""Stands for a sampled token that does not count, because a draft before it was wrong."""


def accept(tokens: Tensor, drafts: Tensor, first: Tensor) -> Tensor:
    """Of each row's sampled tokens those that count, :data:`REJECTED` for the others.

    A row's entries are consecutive: entry i was sampled after drafts 0 to i - 1 of its row, ``drafts[i]`` is the guess
    for it, and ``first[i]`` the index of the row's first entry; the row's last entry has no draft, and what stands
    there is not read. All are [num_sampled] int64.

    A draft is accepted if it is the token that was sampled in its place. So what counts is exactly what sampling one
    token at a time would have brought, for greedy and random choices alike: each token is drawn from its own
    distribution, given only tokens that count, with the uniform number of its position. For drafts that are single
    guesses this accepts as often as rejection sampling (Leviathan et al. 2023) does: with the draft's probability.
    """
    missed = (tokens != drafts).long()
    missed_before = missed.cumsum(0) - missed
    return torch.where(missed_before == missed_before[first], tokens, REJECTED)


# --- log-probabilities -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LogprobTensors:
    """Log-probabilities of chosen tokens, still on the device."""

    logprobs: Tensor  # [num_rows] float32
    ranks: Tensor  # [num_rows] int64, 1 for the most likely
    top_ids: Tensor  # [num_rows, num_top] int64
    top_logprobs: Tensor  # [num_rows, num_top] float32


def gather_logprobs(logits: Tensor, chosen: Tensor, num_top: int) -> LogprobTensors:
    """Of the raw distribution: logits [num_rows, vocab_size], chosen [num_rows] int64."""
    logprobs = logits.float().log_softmax(dim=-1)
    picked = logprobs.gather(1, chosen.unsqueeze(1))
    ranks = (logprobs > picked).sum(dim=-1) + 1
    top = logprobs.topk(num_top, dim=-1)
    return LogprobTensors(picked.squeeze(1), ranks, top.indices, top.values)


class TorchLogprobs:
    """The operation ``logprobs`` in plain torch."""

    def __init__(self, need: SampleNeed) -> None:
        pass

    @classmethod
    def missing(cls, need: SampleNeed) -> list[str]:
        return []

    def __call__(self, logits: Tensor, chosen: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        values = gather_logprobs(logits, chosen, num_top)
        return values.logprobs, values.ranks, values.top_ids, values.top_logprobs


BUILTIN_LOGPROBS = KernelProvider("torch", TorchLogprobs, priority=-100, operation="logprobs")


# --- processors that come with the core ------------------------------------------------------------------------------


class LogitBias:
    """OpenAI's ``logit_bias``: added to the logits."""

    needs_history: ClassVar[bool] = False
    works_with_speculation: ClassVar[bool] = True

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._device = device

    def wants(self, params: SamplingParams) -> bool:
        return bool(params.logit_bias)

    def apply(self, logits: Tensor, rows: Sequence[tuple[int, SampleRow]]) -> None:
        for index, row in rows:
            bias = row.request.params.logit_bias or {}
            ids = torch.tensor(list(bias.keys()), device=self._device)
            logits[index, ids] += torch.tensor(list(bias.values()), device=self._device, dtype=logits.dtype)


class AllowedTokens:
    """``allowed_token_ids``: everything else is impossible."""

    needs_history: ClassVar[bool] = False
    works_with_speculation: ClassVar[bool] = True

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._device = device

    def wants(self, params: SamplingParams) -> bool:
        return params.allowed_token_ids is not None

    def apply(self, logits: Tensor, rows: Sequence[tuple[int, SampleRow]]) -> None:
        for index, row in rows:
            allowed = torch.tensor(list(row.request.params.allowed_token_ids or ()), device=self._device)
            kept = logits[index, allowed]
            logits[index].fill_(-torch.inf)
            logits[index, allowed] = kept


class MinTokens:
    """``min_tokens``: what would end the sequence is impossible until then."""

    needs_history: ClassVar[bool] = False
    works_with_speculation: ClassVar[bool] = True

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size

    def wants(self, params: SamplingParams) -> bool:
        return params.min_tokens > 0

    def apply(self, logits: Tensor, rows: Sequence[tuple[int, SampleRow]]) -> None:
        for index, row in rows:
            request = row.request
            if row.num_known - request.num_prompt < request.params.min_tokens:
                ending = [token for token in request.stop_token_ids if token < self._vocab_size]
                logits[index, ending] = -torch.inf


class BadWords:
    """``bad_words``: the token that would complete a forbidden sequence is impossible."""

    needs_history: ClassVar[bool] = True
    works_with_speculation: ClassVar[bool] = True

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        pass

    def wants(self, params: SamplingParams) -> bool:
        return bool(params.bad_words)

    def apply(self, logits: Tensor, rows: Sequence[tuple[int, SampleRow]]) -> None:
        for index, row in rows:
            history = row.history()
            for sequence in row.request.bad_token_ids:
                *start, last = sequence
                if not start or history[-len(start) :] == start:
                    logits[index, last] = -torch.inf


BUILTIN_PROCESSORS = (
    Provider("logit-bias", LogitBias, priority=40),
    Provider("allowed-tokens", AllowedTokens, priority=30),
    Provider("min-tokens", MinTokens, priority=20),
    Provider("bad-words", BadWords, priority=10),
)


def make_processors(providers: Sequence[Provider], vocab_size: int, device: torch.device) -> list[LogitsProcessor]:
    """All processors, the core's and the plugins', highest priority first."""
    ordered = sorted([*BUILTIN_PROCESSORS, *providers], key=lambda provider: -provider.priority)
    return [provider.resolve()(vocab_size, device) for provider in ordered]
