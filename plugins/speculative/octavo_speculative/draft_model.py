"""Drafts by a small model with the target's vocabulary (Leviathan et al. 2023, Chen et al. 2023), decoding greedily.

The draft model runs on a runner of its own, so that kernels, attention backends, quantization and whatever else serves
the target serve it as well. Each request has a shadow there: its tokens when it was last drafted for, the drafts that
followed, and blocks of its own. Before it drafts, a shadow is brought in line with its request: what was guessed wrong
is dropped, what is new is computed. That is one mechanism for accepted and rejected drafts, for steps without drafts,
for preemption and for a request's first draft.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from octavo import ConfigError, EngineConfig, SamplingParams
from octavo.batch import PlannedRow, StepPlan
from octavo.blocks import BlockManager
from octavo.interfaces import Checkpoint, DrafterContext
from octavo.request import Request

if TYPE_CHECKING:
    from octavo.runner import LaunchedStep, Runner

GREEDY = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)


class DraftModel:
    """The drafter ``draft-model``; see :class:`octavo.interfaces.Drafter`.

    Its cache has as many blocks as the target's. Where sequences share blocks in the target and not here they can run
    out; those that are not being drafted for give way then, and if that is not enough, some sequences get no drafts.
    """

    def __init__(self, config: EngineConfig, context: DrafterContext) -> None:
        """Loads the weights.

        Raises:
            ConfigError: the model cannot be served, or has another vocabulary than the target.
        """
        speculative = config.speculative
        if speculative.model is None:
            raise ConfigError("speculation by draft-model needs a model; name one with --speculative-model")
        self._model = context.load_model(
            speculative.model, dtype=speculative.dtype, quantization=speculative.quantization
        )
        if config.load_format == "dummy":
            check_sizes(context.vocab_size, self._model.vocab_size)
        else:
            check_vocabulary(context.checkpoint, self._model.checkpoint)
        self.bytes_per_block = self._model.bytes_per_block
        self._vocab_size = min(context.vocab_size, self._model.vocab_size)
        self._block_size = context.block_size
        self._max_model_len = context.max_model_len
        self._max_num_batched_tokens = context.max_num_batched_tokens
        self._shadows: dict[Request, Request] = {}

    def start(self, num_blocks: int) -> None:
        self._runner: Runner = self._model.make_runner(num_blocks)
        self.blocks = BlockManager(num_blocks, self._block_size)

    def draft(self, requests: Sequence[Request], limits: Sequence[int]) -> list[list[int]]:
        wanted = {request: limit for request, limit in zip(requests, limits, strict=True) if limit > 0}
        limit_of = {
            shadow: limit
            for request, limit in wanted.items()
            if (shadow := self._follow(request, limit, wanted)) is not None
        }
        launched = self._catch_up(list(limit_of))
        drafting = [shadow for shadow in limit_of if shadow.num_to_compute == 0]
        for num_drafts in range(1, max((limit_of[shadow] for shadow in drafting), default=0)):
            # each reads on the device what the step before has sampled there
            rows = [
                PlannedRow(shadow, len(shadow.tokens) + num_drafts - 1, 1, samples=True)
                for shadow in drafting
                if limit_of[shadow] > num_drafts
            ]
            launched.append(self._runner.launch(StepPlan(rows)))
        for step in launched:
            for row, tokens in zip(step.plan.rows, step.wait().token_ids, strict=True):
                row.request.drafts.extend(tokens)
        for shadow in drafting:
            shadow.num_computed += len(shadow.drafts) - 1  # all but the last were read as well
        return [self._drafts(request) if request in wanted else [] for request in requests]

    def release(self, request: Request) -> None:
        shadow = self._shadows.pop(request, None)
        if shadow is not None:
            self.blocks.release(shadow.blocks)

    def check(self) -> None:
        """Prove that no block is lost; for tests."""
        self.blocks.check([shadow.blocks for shadow in self._shadows.values()])

    def _follow(self, request: Request, limit: int, wanted: dict[Request, int]) -> Request | None:
        """The request's shadow with the same tokens, and blocks for them and the drafts; None if there are too few."""
        shadow = self._shadows.get(request)
        if shadow is None:
            shadow = Request(
                request.request_id,
                (),
                GREEDY,
                seed=0,
                max_total_tokens=self._max_model_len,
                index=request.index,
            )
            self._shadows[request] = shadow
        shadow.slot = request.slot
        start = len(shadow.tokens)
        added = request.tokens[start:]
        if max(added, default=-1) >= self._vocab_size:  # one of the target's that the draft model does not have
            self.release(request)
            return None
        num_right = _num_equal(shadow.drafts, added)
        shadow.tokens.extend(added)
        shadow.drafts = []
        # the last token is computed in any case, for what follows it
        shadow.num_computed = min(shadow.num_computed, start + num_right, len(shadow.tokens) - 1)
        self._runner.correct(shadow, shadow.num_computed)
        while not self.blocks.reserve(shadow.blocks, len(shadow.tokens) + limit - 1):
            idle = next((other for other in self._shadows if other not in wanted), None)
            if idle is None:
                self.release(request)
                return None
            self.release(idle)
        return shadow

    def _catch_up(self, shadows: Sequence[Request]) -> list[LaunchedStep]:
        """Compute what is new to the draft model, in one step of bounded size; who is done has sampled a draft."""
        rows = []
        budget = self._max_num_batched_tokens
        for shadow in sorted(shadows, key=lambda shadow: shadow.num_to_compute):
            num_tokens = min(shadow.num_to_compute, budget)
            if num_tokens == 0:
                break
            budget -= num_tokens
            done = num_tokens == shadow.num_to_compute
            rows.append(PlannedRow(shadow, shadow.num_computed, num_tokens, samples=done))
            shadow.num_computed += num_tokens
        rows.sort(key=lambda row: row.num_tokens > 1)  # single tokens first: backends may treat them apart
        return [self._runner.launch(StepPlan(rows))] if rows else []

    def _drafts(self, request: Request) -> list[int]:
        """What was sampled now, as far as the target has it: the draft model's vocabulary may be padded further."""
        drafts = self._shadows[request].drafts if request in self._shadows else []
        return list(itertools.takewhile(lambda token: token < self._vocab_size, drafts))


def check_vocabulary(target: Checkpoint, draft: Checkpoint) -> None:
    """Both models must give every token the same id.

    Raises:
        ConfigError: names a token that differs.
    """
    ours, theirs = target.tokenizer().get_vocab(), draft.tokenizer().get_vocab()
    if ours == theirs:
        return
    differing = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
    example = differing[0]
    raise ConfigError(
        f"the draft model {draft.path} has another vocabulary than {target.path}: {len(differing)} tokens differ, such "
        f"as {example!r} with the id {theirs.get(example, 'none')} instead of {ours.get(example, 'none')}; use a draft "
        f"model of the same family, or --speculative-method ngram, which needs none"
    )


def check_sizes(target: int, draft: int) -> None:
    """Without weights there need be no tokenizer, so only the sizes can be compared.

    Raises:
        ConfigError: the sizes differ.
    """
    if target != draft:
        raise ConfigError(f"the draft model's vocabulary has {draft} tokens, but the target's has {target}")


def _num_equal(first: Sequence[int], second: Sequence[int]) -> int:
    """How many leading elements are the same."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
