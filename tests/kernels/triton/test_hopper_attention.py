"""The prefill kernel for Hopper, whose Gluon no interpreter runs: its Python is run with threads for its warps.

What the compiler does with layouts is not covered; ``tests/gpu/test_hopper_attention.py`` is for that.
"""

from __future__ import annotations

import random

import pytest
import torch
from tests.gluon import Emulator, Pointer

from octavo.interfaces import AttentionNeed
from octavo_kernels import hopper_attention
from octavo_kernels.attention import LOG2_E, paged_attention_reference
from octavo_kernels.hopper_backend import HopperAttention


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 1), (2, 2), (7, 1)], ids=str)
@pytest.mark.parametrize(
    "rows",
    [
        [(70, 70)],
        [(40, 300)],
        [(128, 128), (1, 1), (33, 161)],
        [(1, 0), (90, 700), (5, 0), (64, 256)],
        [(32, 544)],
    ],
    ids=str,
)
def test_attends_with_warps_as_threads(
    monkeypatch: pytest.MonkeyPatch, rows: list[tuple[int, int]], num_heads: int, num_kv_heads: int
) -> None:
    """Rows are (query length, context length); whatever no sequence holds is no number."""
    random.seed(0)
    block_size, head_dim = 16, 128
    query_lens, context_lens = zip(*rows, strict=True)
    counts = [-(-length // block_size) for length in context_lens]
    blocks = torch.randperm(sum(counts) + 2)
    kv = torch.randn(len(blocks), 2, num_kv_heads, block_size, head_dim)
    tables = torch.zeros(len(rows), max(counts) + 1, dtype=torch.int32)
    used = torch.zeros(len(blocks), block_size, dtype=torch.bool)
    for row, (count, mine) in enumerate(zip(counts, blocks[: sum(counts)].split(counts), strict=True)):
        tables[row, :count] = mine
        used[mine] = (torch.arange(count * block_size) < context_lens[row]).view(count, block_size)
    clean = kv.clone()
    kv.transpose(1, 3)[~used] = float("nan")
    query = torch.randn(sum(query_lens), num_heads, head_dim)
    starts = torch.tensor([0, *query_lens]).cumsum(0)
    lens = torch.tensor(context_lens)
    out = torch.full((sum(query_lens) * num_heads * head_dim,), float("nan"))

    emulator = Emulator()
    emulator.replace(hopper_attention, monkeypatch)
    group = num_heads // num_kv_heads
    num_tiles = sum(query_lens) // (hopper_attention.BLOCK_M // group) + len(rows)
    scale = head_dim**-0.5
    emulator.run(
        hopper_attention._prefill_attention, (num_kv_heads, num_tiles), Pointer(out), Pointer(query.flatten()),
        kv.view(-1, head_dim), Pointer(tables.long().flatten()), Pointer(starts), Pointer(lens),
        tables.stride(0), torch.tensor(0), len(rows), scale * LOG2_E, 0.5, num_kv_heads, group, head_dim, block_size,
        hopper_attention.BLOCK_M, hopper_attention.BLOCK_N, hopper_attention.STAGES, 0, 0, False,
    )  # fmt: skip
    reference = paged_attention_reference(query, clean, tables, starts, lens, scale=scale, value_scale=0.5)
    torch.testing.assert_close(out.view_as(reference), reference, atol=1e-5, rtol=1e-5)


def test_it_says_what_it_is_missing() -> None:
    need = AttentionNeed(torch.device("cpu"), torch.float32, torch.float32, 4, 64, 4, 2, window=True)
    reasons = "\n".join(HopperAttention.missing(need))
    for reason in ("CUDA", "head_dim must be 128", "blocks must be of", "windows"):
        assert reason in reasons
