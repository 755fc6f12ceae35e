"""Decode attention over contexts of uneven lengths on one GPU: ``python benchmarks/uneven.py``.

Were every context cut into equally many splits, the longest would decide how long a launch takes. Splits are shared out
by length instead; this shows what is left of that, beside the floor, with heads and caches as in Llama-3.1-8B.
"""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path

import torch
from kernels import BLOCK_SIZE, DEVICE, DTYPE, HEADS, ROTATION_BYTES, SCALE, replay_time
from torch import Tensor

from octavo.bench.timing import Ceilings, relative_error
from octavo_kernels.attention import Planner, paged_attention, paged_attention_reference

TRACE = Path(__file__).parent / "traces" / "sharegpt_like.json"
MAX_SEQ_LEN = 16384  # what a captured step is planned for


def trace_contexts(num_rows: int) -> list[int]:
    """Contexts as they are at some moment while the trace is served: long outputs are there more often."""
    trace = json.loads(TRACE.read_text(encoding="utf-8"))
    pick = random.Random(0)
    lengths = list(zip(trace["prompt_len"], trace["output_len"], strict=True))
    chosen = pick.choices(lengths, weights=trace["output_len"], k=num_rows)
    return sorted(prompt + 1 + pick.randrange(output) for prompt, output in chosen)


def compare(ceilings: Ceilings, name: str, lengths: list[int]) -> str:
    """A line of the table for rows of these context lengths, the longest last as in a step."""
    num_rows, device = len(lengths), torch.device("cuda")
    blocks = [-(-length // BLOCK_SIZE) for length in lengths]
    num_bytes = sum(lengths) * 4096
    copies = max(2, min(8, round(ROTATION_BYTES / num_bytes)))
    shape = (sum(blocks), 2, HEADS.num_kv_heads, BLOCK_SIZE, HEADS.head_dim)
    caches = [torch.randn(shape, device=device, dtype=DTYPE) for _ in range(copies)]
    tables = torch.zeros(num_rows, MAX_SEQ_LEN // BLOCK_SIZE, dtype=torch.int32)
    for row, part in enumerate(torch.randperm(sum(blocks)).int().split(blocks)):
        tables[row, : len(part)] = part
    starts = torch.arange(num_rows + 1, device=device, dtype=torch.int32)
    seq_lens = torch.tensor(lengths, device=device, dtype=torch.int32)
    query = torch.randn(num_rows, HEADS.num_heads, HEADS.head_dim, device=device, dtype=DTYPE)
    inputs = (tables.to(device), starts, seq_lens)
    expected = paged_attention_reference(query, caches[0], *inputs, scale=SCALE)
    sections = Planner(HEADS).plan(
        seq_lens,
        num_rows=num_rows,
        num_tokens=num_rows,
        num_decodes=num_rows,
        max_query_len=1,
        max_seq_len=MAX_SEQ_LEN,
    )

    def attend(cache: Tensor) -> Tensor:
        return paged_attention(query, cache, *inputs, sections, scale=SCALE)

    error = relative_error(attend(caches[0]), expected)
    time = replay_time([partial(attend, cache) for cache in (caches * 16)[:16]])
    floor = ceilings.floor(num_bytes)
    return f"{name:<28}{num_rows:>5}{floor:>9.1f}{time:>9.1f}{time / floor:>7.2f}{error:>10.1e}"


def main() -> None:
    """Print the table, in microseconds."""
    ceilings = Ceilings.measure(DEVICE, DTYPE)
    print(f"{'contexts':<28}{'rows':>5}{'floor':>9}{'time':>9}{'ratio':>7}{'error':>10}")
    cases = {f"trace, {rows} rows": trace_contexts(rows) for rows in (19, 64, 128, 256, 512)}
    cases |= {f"equal, {rows} rows": [1100] * rows for rows in (1, 8, 32, 64, 256)}
    cases |= {f"one of 8192, {rows} rows": [*[387] * (rows - 1), 8192] for rows in (1, 16, 64, 256)}
    for name, lengths in cases.items():
        print(compare(ceilings, name, lengths), flush=True)


if __name__ == "__main__":
    main()
