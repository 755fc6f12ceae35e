"""Paged attention against float32, on ragged batches of every kind."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from tests.paging import RaggedQueries

from octavo_kernels.attention import Heads, Planner, paged_attention, paged_attention_reference


@dataclass(frozen=True)
class Case:
    """A random batch: (query length, context length) of each row, single queries first."""

    rows: list[tuple[int, int]]
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    block_size: int = 16
    window: int | None = None
    soft_cap: float | None = None
    eight_bit: bool = False
    batch_invariant: bool = False

    def run(self, device: torch.device, dtype: torch.dtype = torch.float16) -> tuple[torch.Tensor, torch.Tensor]:
        """The kernel's output and the reference's."""
        heads = Heads(self.num_heads, self.num_kv_heads, self.head_dim)
        batch = RaggedQueries.make(
            self.rows,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            block_size=self.block_size,
            device=device,
            dtype=dtype,
        )
        inputs = (batch.query, batch.kv.to(torch.float8_e4m3fn) if self.eight_bit else batch.kv, *batch.rows)
        settings = {
            "scale": self.head_dim**-0.5,
            "window": self.window,
            "soft_cap": self.soft_cap,
            "key_scale": 0.5 if self.eight_bit else 1.0,
            "value_scale": 0.25 if self.eight_bit else 1.0,
        }
        planner = Planner(heads, batch_invariant=self.batch_invariant)
        sections = planner.plan(batch.seq_lens, **batch.counts, max_seq_len=max(context for _, context in self.rows))
        out = paged_attention(*inputs, sections, **settings)
        assert all(section.arrivals is None or not section.arrivals.any() for section in sections)
        return out.float(), paged_attention_reference(*inputs, **settings)


DECODES = [(1, 200), (1, 1), (1, 16), (1, 65)]
MIXED = [(1, 130), (1, 7), (70, 70), (33, 161), (2, 2)]
VERIFICATION = [(5, 90), (5, 5), (3, 64)]


@pytest.mark.parametrize(
    "case",
    [
        Case(DECODES),
        Case([(1, 700)]),
        Case(MIXED),
        Case([(90, 190)]),
        Case(VERIFICATION),
        Case([(1, 0), (1, 40)]),
        Case(DECODES, num_heads=9, num_kv_heads=3, head_dim=80),
        Case(MIXED, num_heads=7, num_kv_heads=1, head_dim=96),
        Case(VERIFICATION, num_heads=4, num_kv_heads=4, head_dim=64, block_size=32),
        Case(DECODES, head_dim=128, block_size=64),
        Case([(1, 80), (40, 60)], head_dim=256),
        Case(DECODES, window=50),
        Case(MIXED, window=20),
        Case(MIXED, soft_cap=3.0),
        Case(MIXED, window=70, soft_cap=3.0, block_size=4),
        Case(DECODES, eight_bit=True),
        Case(MIXED, eight_bit=True),
        Case([(1, 1500), *MIXED], batch_invariant=True),
        Case([(1, 1500), *DECODES, (1, 0), (1, 700)]),
        Case([(1, 1)]),
        Case([(1, 900), *MIXED]),
        Case([(5, 1200), *VERIFICATION], num_heads=8, num_kv_heads=1, window=100),
        Case([(1, 1500), *DECODES], eight_bit=True, head_dim=80),
    ],
    ids=str,
)
def test_attends(device: torch.device, case: Case) -> None:
    out, expected = case.run(device)
    torch.testing.assert_close(out, expected, atol=3e-3, rtol=3e-3)


def test_a_long_context_is_split_and_repeats_bit_by_bit(device: torch.device) -> None:
    results = []
    for _ in range(3):
        torch.manual_seed(1)
        results.append(Case([(1, 900), (1, 300)]).run(device)[0])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("lengths", [[1, 1], [0, 5000], [64] * 7, [8000, *[100] * 40], [3000, 1, 64, 65, 129, 2000]])
def test_splits_go_to_the_longest_contexts(device: torch.device, lengths: list[int]) -> None:
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    (section,) = Planner(Heads(4, 2, 32)).plan(
        seq_lens,
        num_rows=len(lengths),
        num_tokens=len(lengths),
        num_decodes=len(lengths),
        max_query_len=1,
        max_seq_len=max(lengths),
    )
    assert section.items is not None
    rows, first = section.items.rows.tolist(), section.items.first.tolist()
    counts = [end - begin for begin, end in itertools.pairwise(first)]
    used = [row for row, count in enumerate(counts) for _ in range(count)]
    assert rows == used + [-1] * (len(rows) - len(used))
    assert min(counts) >= 1
    tiles = [-(-length // section.tiling.block_n) for length in lengths]
    per_split = [-(-number // count) for number, count in zip(tiles, counts, strict=True)]
    assert max(per_split) <= max(1, -(-sum(tiles) // (len(rows) - len(lengths)))), "somebody's splits are too long"


@pytest.mark.parametrize(("num_rows", "batch_invariant"), [(1, False), (3, True)])
def test_splits_are_even_where_a_row_is_alone(num_rows: int, batch_invariant: bool) -> None:
    sections = Planner(Heads(32, 8, 128), batch_invariant=batch_invariant).plan(
        torch.tensor([8000] * num_rows, dtype=torch.int32),
        num_rows=num_rows,
        num_tokens=num_rows,
        num_decodes=num_rows,
        max_query_len=1,
        max_seq_len=8192,
    )
    assert [section.num_tiles for section in sections] == [num_rows]
    assert [section.items for section in sections] == [None]
    assert sections[0].num_splits > 1


@pytest.mark.parametrize("split_prompts", [True, False])
def test_a_short_prompt_is_split_unless_its_kernel_does_without(device: torch.device, split_prompts: bool) -> None:
    decodes, prompts = Planner(Heads(4, 1, 128), split_prompts=split_prompts).plan(
        torch.ones(4, dtype=torch.int32, device=device),
        num_rows=4,
        num_tokens=3 + 40,
        num_decodes=3,
        max_query_len=40,
        max_seq_len=8192,
    )
    assert (decodes.num_rows, prompts.num_rows) == (3, 1)
    assert decodes.items is not None
    assert (prompts.partial is not None) == split_prompts


def test_batch_invariant_rows_do_not_depend_on_their_neighbours(device: torch.device) -> None:
    """The same row alone and in a batch, with splits that depend on nothing but its own context."""
    heads = Heads(4, 2, 32)
    kv = torch.randn(200, 2, 2, 16, 32, device=device).half()
    query = torch.randn(3, 4, 32, device=device).half()
    tables = torch.randperm(200)[:198].view(3, 66).int().to(device)
    lens = torch.tensor([1050, 30, 500], device=device, dtype=torch.int32)

    def run(rows: int) -> torch.Tensor:
        sections = Planner(heads, batch_invariant=True).plan(
            lens[:rows],
            num_rows=rows,
            num_tokens=rows,
            num_decodes=rows,
            max_query_len=1,
            max_seq_len=1050,
        )
        starts = torch.arange(rows + 1, device=device, dtype=torch.int32)
        return paged_attention(query[:rows], kv, tables[:rows], starts, lens[:rows], sections, scale=0.2)

    assert torch.equal(run(1)[0], run(3)[0])
