"""The prefill kernel for Hopper against float32, with no numbers wherever no sequence has tokens."""

from __future__ import annotations

import random

import pytest
import torch

pytest.importorskip("triton")

from tests.paging import RaggedQueries

from octavo_kernels.attention import Section, paged_attention_reference, tiling
from octavo_kernels.hopper_attention import BLOCK_M, prefill_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="made for Hopper"
    ),
]


def _ragged(seed: int) -> list[tuple[int, int]]:
    draw = random.Random(seed)
    lengths = [(draw.randint(1, 400), draw.choice([0, draw.randint(1, 900)])) for _ in range(12)]
    return [(query, query + cached) for query, cached in lengths]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "rows",
    [[(200, 200)], [(128, 128)], [(3000, 3000)], [(600, 5000)], [(1, 0), (90, 700), (5, 0)], _ragged(1), _ragged(2)],
    ids=lambda rows: f"{len(rows)} rows from {rows[0]}",
)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "block_size"), [(32, 8, 16), (28, 4, 32), (4, 4, 16)])
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
    num_tiles = len(batch.query) // (BLOCK_M // (num_heads // num_kv_heads)) + len(rows)
    section = Section(0, len(rows), num_tiles, 1, 0, False, tiling(BLOCK_M, head_dim), None, None, None)
    scales = {"scale": head_dim**-0.5, "value_scale": 0.5}
    expected = paged_attention_reference(batch.query, batch.kv, *batch.rows, **scales)
    for _ in range(3):  # a race would not come out the same
        out = torch.full((len(batch.query), num_heads * head_dim), float("nan"), device=device, dtype=dtype)
        prefill_attention(out, batch.query, batch.spoiled, *batch.rows, section, **scales)
        torch.testing.assert_close(out.float(), expected, atol=1e-2, rtol=1e-2)
