"""The decode kernel for Hopper against float32, with no numbers wherever no sequence has tokens."""

from __future__ import annotations

import random

import pytest
import torch

pytest.importorskip("triton")

from octavo_kernels.attention import Heads, Planner, paged_attention_reference
from octavo_kernels.hopper_decode import decode_attention, serves, tiling

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="made for Hopper"
    ),
]


def _ragged(seed: int, num_rows: int, max_query_len: int) -> list[tuple[int, int]]:
    draw = random.Random(seed)
    query_lens = [draw.randint(1, max_query_len) for _ in range(num_rows)]
    return [(query, query + draw.choice([0, draw.randint(1, 60), draw.randint(1, 2000)])) for query in query_lens]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "rows",
    [
        [(1, 1)],
        [(1, 3000)],
        [(4, 700)],
        [(1, 0), (1, 90), (1, 64), (1, 65), (1, 15)],
        _ragged(1, 12, 1),
        _ragged(2, 300, 1),
        _ragged(3, 12, 4),
        _ragged(4, 100, 3),
    ],
    ids=lambda rows: f"{len(rows)} rows from {rows[0]}",
)
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "block_size"), [(32, 8, 16), (28, 4, 32), (4, 4, 8), (16, 2, 64)]
)
def test_attends(
    dtype: torch.dtype, rows: list[tuple[int, int]], num_heads: int, num_kv_heads: int, block_size: int
) -> None:
    """Rows are (query length, context length)."""
    device, head_dim = torch.device("cuda"), 128
    torch.manual_seed(0)
    query_lens, context_lens = zip(*rows, strict=True)
    counts = [-(-length // block_size) for length in context_lens]
    blocks = torch.randperm(sum(counts) + 2)
    tables = torch.zeros(len(rows), max(counts) + 1, dtype=torch.int32)
    used = torch.zeros(len(blocks), block_size, dtype=torch.bool)
    for row, (count, mine) in enumerate(zip(counts, blocks[: sum(counts)].split(counts), strict=True)):
        tables[row, :count] = mine
        used[mine] = (torch.arange(count * block_size) < context_lens[row]).view(count, block_size)
    clean = torch.randn(len(blocks), 2, num_kv_heads, block_size, head_dim, device=device, dtype=dtype)
    kv = clean.clone()
    kv.transpose(1, 3)[~used.to(device)] = float("nan")
    query = torch.randn(sum(query_lens), num_heads, head_dim, device=device, dtype=dtype)
    inputs = (
        tables.to(device),
        torch.tensor([0, *query_lens], device=device).cumsum(0).int(),
        torch.tensor(context_lens, device=device, dtype=torch.int32),
    )
    (section,) = Planner(Heads(num_heads, num_kv_heads, head_dim), tiling=tiling).plan(
        inputs[2],
        num_rows=len(rows),
        num_tokens=sum(query_lens),
        num_decodes=len(rows) if max(query_lens) == 1 else 0,
        max_query_len=max(query_lens),
        max_seq_len=4096,
    )
    assert serves(section)
    scales = {"scale": head_dim**-0.5, "value_scale": 0.5}
    expected = paged_attention_reference(query, clean, *inputs, **scales)
    for _ in range(3):  # a race would not come out the same
        out = torch.full((sum(query_lens), num_heads * head_dim), float("nan"), device=device, dtype=dtype)
        decode_attention(out, query, kv, *inputs, section, **scales)
        torch.testing.assert_close(out.float(), expected, atol=1e-2, rtol=1e-2)
