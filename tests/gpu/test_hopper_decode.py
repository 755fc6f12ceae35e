"""The decode kernel for Hopper against float32, with no numbers wherever no sequence has tokens."""

from __future__ import annotations

import random

import pytest
import torch

pytest.importorskip("triton")

from tests.paging import RaggedQueries

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
    batch = RaggedQueries.make(
        rows,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        device=device,
        dtype=dtype,
    )
    planner = Planner(Heads(num_heads, num_kv_heads, head_dim), tiling=tiling)
    (section,) = planner.plan(batch.seq_lens, **batch.counts, max_seq_len=4096)
    assert serves(section)
    scales = {"scale": head_dim**-0.5, "value_scale": 0.5}
    expected = paged_attention_reference(batch.query, batch.kv, *batch.rows, **scales)
    for _ in range(3):  # a race would not come out the same
        out = torch.full((len(batch.query), num_heads * head_dim), float("nan"), device=device, dtype=dtype)
        decode_attention(out, batch.query, batch.spoiled, *batch.rows, section, **scales)
        torch.testing.assert_close(out.float(), expected, atol=1e-2, rtol=1e-2)
