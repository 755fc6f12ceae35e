"""One step's work: the plan on the host (who computes how many tokens) and the same as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from octavo.request import Request

if TYPE_CHECKING:
    from torch import Tensor


class PlannedRow(msgspec.Struct, frozen=True, gc=False):
    """One request's part of a step: tokens ``start`` to ``start + num_tokens`` are computed.

    The last ``len(drafts)`` of them are drafts. ``samples`` says whether the row's last token is the request's newest,
    so that its logits decide the next one (with drafts: one token per draft and one more).
    """

    request: Request
    start: int
    num_tokens: int
    samples: bool
    drafts: Sequence[int] = ()
    epoch: int = 0  # the request's num_preemptions when this was planned

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What the scheduler decided for one step."""

    rows: Sequence[PlannedRow]
    copies: Sequence[tuple[int, int]] = ()  # (source block, target block), before anything is written
    num_preempted: int = 0
    num_prefix_queries: int = 0
    num_prefix_hits: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)

    def __bool__(self) -> bool:
        return bool(self.rows)


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """A step as the model and the attention backend see it. Rows are sequences; tokens of a row are consecutive.

    Rows with a single query token come first (``num_decodes`` of them), so that a backend may treat them apart; among
    them contexts grow longer, so that a kernel may begin with the longest.
    """

    tokens: Tensor  # [num_tokens] int64
    positions: Tensor  # [num_tokens] int64
    query_start: Tensor  # [num_rows + 1] int32: where each row's tokens begin
    seq_lens: Tensor  # [num_rows] int32: context length including this step's tokens
    block_tables: Tensor  # [num_rows, max_num_blocks] int32
    slots: Tensor  # [num_tokens] int64: block * block_size + offset, where keys and values go
    logit_rows: Tensor  # [num_logits] int64: which tokens' hidden states become logits
    max_query_len: int
    max_seq_len: int
    num_decodes: int
    query_lens: Sequence[int] = field(default=())  # on the host, like context_lens: known before the launch
    context_lens: Sequence[int] = field(default=())

    @property
    def num_tokens(self) -> int:
        return self.tokens.shape[0]

    @property
    def num_rows(self) -> int:
        return self.seq_lens.shape[0]

    @property
    def num_logits(self) -> int:
        return self.logit_rows.shape[0]
