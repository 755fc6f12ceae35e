"""What a device would have in its blocks, for tests of who reads what: contents instead of numbers."""

from __future__ import annotations

from octavo.batch import StepPlan
from octavo.request import Request


class PagedMemory:
    """Runs plans in the order of their launch and proves that every row reads what its own tokens left.

    The content of a token is the token with everything before it and the namespace; the next token of a sequence
    follows from its prompt and its place, as with a model that is greedy.
    """

    def __init__(self, block_size: int) -> None:
        self.num_computed: dict[int, int] = {}  # content -> how many times it was computed
        self._block_size = block_size
        self._cells: dict[int, int] = {}
        self._contents: dict[Request, list[int]] = {}

    def token(self, request: Request, position: int) -> int:
        """The token that stands there, whether it has been sampled or not."""
        if position < request.num_prompt:
            return request.tokens[position]
        return 1000 + (sum(request.tokens[: request.num_prompt]) * 31 + position * 7 + position // 3) % 2

    def contents(self, request: Request, num_tokens: int) -> list[int]:
        """What the request's first tokens leave."""
        known = self._contents.setdefault(request, [])
        while len(known) < num_tokens:
            before = known[-1] if known else hash(request.salt)
            known.append(hash((before, self.token(request, len(known)))))
        return known[:num_tokens]

    def run(self, plan: StepPlan) -> list[list[int]]:
        """Write everything, then read everything; returns the sampled tokens of each row."""
        for source, target in plan.copies:
            for offset in range(self._block_size):
                self._cells[self._cell(target, offset)] = self._cells.get(self._cell(source, offset), 0)
        for row in plan.rows:
            contents = self.contents(row.request, row.end)
            for position in range(row.start, row.end):
                self._cells[self._slot(row.request, position)] = contents[position]
                self.num_computed[contents[position]] = self.num_computed.get(contents[position], 0) + 1
        for row in plan.rows:
            read = [self._cells.get(self._slot(row.request, position)) for position in range(row.end)]
            assert read == self.contents(row.request, row.end), row
        return [[self.token(row.request, row.end)] if row.samples else [] for row in plan.rows]

    def _slot(self, request: Request, position: int) -> int:
        return self._cell(request.blocks[position // self._block_size], position % self._block_size)

    def _cell(self, block: int, offset: int) -> int:
        return block * self._block_size + offset
