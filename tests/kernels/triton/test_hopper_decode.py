"""The decode kernel for Hopper: its Python run with threads for its warps, as in ``test_hopper_attention.py``."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")

from tests.kernels.triton.test_hopper_attention import Emulator, Pointer, _scalar
from tests.paging import RaggedQueries

from octavo.interfaces import AttentionNeed
from octavo_kernels import hopper_attention, hopper_backend, hopper_decode
from octavo_kernels.attention import LOG2_E, Heads, Planner, Section, paged_attention_reference
from octavo_kernels.hopper_backend import HopperAttention

EVERY_ROW_SPLIT = [(1, 700), (1, 64), (1, 65), (1, 1), (1, 0), (1, 250)]


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "block_size"), [(4, 1, 16), (2, 2, 32), (7, 1, 8)], ids=str)
@pytest.mark.parametrize(
    "rows",
    [[(1, 1)], [(1, 900)], [(1, 0)], [(3, 200)], EVERY_ROW_SPLIT, [(1, 3), (4, 400), (2, 2), (3, 66), (4, 4)]],
    ids=str,
)
def test_attends_with_warps_as_threads(
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
    rows: list[tuple[int, int]],
    num_heads: int,
    num_kv_heads: int,
    block_size: int,
) -> None:
    """Rows are (query length, context length); whatever no sequence holds is no number."""
    random.seed(0)
    head_dim, group = 128, num_heads // num_kv_heads
    batch = RaggedQueries.make(
        rows,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    planner = Planner(Heads(num_heads, num_kv_heads, head_dim), tiling=hopper_decode.tiling)
    (section,) = planner.plan(batch.seq_lens.to(device), **batch.counts, max_seq_len=1024)
    assert hopper_decode.serves(section)

    emulator = Emulator()
    emulator.stand_in(monkeypatch, hopper_attention, hopper_decode)
    scale = head_dim**-0.5
    expected = paged_attention_reference(batch.query, batch.kv, *batch.rows, scale=scale, value_scale=0.5)
    scratch = _scratch(section)
    for _ in range(2):  # the second finds the counters as the first left them
        out = torch.full((batch.query.numel(),), float("nan"))
        emulator.run(
            hopper_decode._decode_attention, (num_kv_heads, section.num_tiles, section.num_splits), Pointer(out),
            *scratch, Pointer(batch.query.flatten()), batch.spoiled.view(-1, head_dim),
            *(Pointer(part.long().flatten()) for part in batch.rows), batch.block_tables.stride(0), _scalar(0),
            scale * LOG2_E, 0.5, _scalar(section.num_splits), num_kv_heads, group, head_dim, block_size,
            section.tiling.block_m, section.tiling.block_n, section.partial is not None, section.items is not None,
            section.tiling.num_stages, 0, False,
        )  # fmt: skip
        torch.testing.assert_close(out.view_as(expected), expected, atol=1e-5, rtol=1e-5)


def _scratch(section: Section) -> list[Pointer]:
    """Partial results, their statistics, arrivals, the items' rows and each row's first item."""
    items = None if section.items is None else (section.items.rows, section.items.first)
    parts = (section.partial, section.statistics, section.arrivals, *(items or (None, None)))
    return [Pointer(torch.zeros(1) if part is None else part.flatten().cpu()) for part in parts]


def test_each_section_goes_to_its_kernel(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Five decodes beside a row with 9 queries for 4 heads each, and beside one with 100."""
    calls: list[str] = []
    monkeypatch.setattr(hopper_decode, "decode_attention", lambda *_, **__: calls.append("decode"))
    monkeypatch.setattr(hopper_attention, "prefill_attention", lambda *_, **__: calls.append("prefill"))
    monkeypatch.setattr(hopper_backend, "paged_attention", lambda *_, **__: calls.append("triton"))
    backend = HopperAttention(AttentionNeed(device, torch.bfloat16, torch.bfloat16, 16, 128, 32, 8))
    for query_len, kernels in ((9, ["triton"]), (100, ["decode", "prefill"])):
        seq_lens = torch.tensor([100, 200, 300, 400, 500, 1000], dtype=torch.int32, device=device)
        batch: Any = SimpleNamespace(
            block_tables=None,
            query_start=None,
            seq_lens=seq_lens,
            num_rows=6,
            num_tokens=5 + query_len,
            num_decodes=5,
            max_query_len=query_len,
            max_seq_len=1024,
        )
        spec: Any = SimpleNamespace(num_heads=32, head_dim=128, scale=1.0, key_scale=1.0, value_scale=1.0)
        backend._attend(torch.empty(batch.num_tokens, 32, 128), spec, torch.empty(0), batch, backend.plan(batch))
        assert calls == kernels
        calls.clear()


def test_rows_that_are_too_high_are_left_to_others(device: torch.device) -> None:
    planner = Planner(Heads(32, 8, 128), split_prompts=False, tiling=hopper_decode.tiling)

    def plan(num_decodes: int, num_prompts: int, query_len: int) -> list[bool]:
        rows = num_decodes + num_prompts
        sections = planner.plan(
            torch.tensor([500] * rows, dtype=torch.int32, device=device),
            num_rows=rows,
            num_tokens=num_decodes + num_prompts * query_len,
            num_decodes=num_decodes,
            max_query_len=query_len if num_prompts else 1,
            max_seq_len=1024,
        )
        return [hopper_decode.serves(section) for section in sections]

    assert plan(1, 0, 0) == [True]
    assert plan(3, 2, 8) == [True]  # 32 rows of (query, head of the group)
    assert plan(3, 2, 9) == [False]
    assert plan(3, 2, 100) == [True, False]
