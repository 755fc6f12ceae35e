"""Decode attention over contexts of uneven lengths on a Hopper GPU: ``python benchmarks/uneven.py``.

Were every context cut into equally many splits, the longest would decide how long a launch takes. Splits are shared out
by length instead; this shows what is left of that, beside the floor, with heads and caches as in Llama-3.1-8B, for both
kernels.
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
from octavo_kernels.attention import Planner, Section, paged_attention, paged_attention_reference
from octavo_kernels.hopper_decode import decode_attention, tiling

TRACE = Path(__file__).parent / "traces" / "sharegpt_like.json"
MAX_SEQ_LEN = 16384  # what a captured step is planned for


def trace_contexts(num_rows: int) -> list[int]:
    """Contexts as they are at some moment while the trace is served: long outputs are there more often."""
    trace = json.loads(TRACE.read_text(encoding="utf-8"))
    pick = random.Random(0)
    lengths = list(zip(trace["prompt_len"], trace["output_len"], strict=True))
    chosen = pick.choices(lengths, weights=trace["output_len"], k=num_rows)
    return sorted(prompt + 1 + pick.randrange(output) for prompt, output in chosen)


def compare(ceilings: Ceilings, name: str, lengths: list[int], query_len: int = 1) -> str:
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
    num_tokens = num_rows * query_len
    starts = torch.arange(0, num_tokens + 1, query_len, device=device, dtype=torch.int32)
    seq_lens = torch.tensor(lengths, device=device, dtype=torch.int32)
    query = torch.randn(num_tokens, HEADS.num_heads, HEADS.head_dim, device=device, dtype=DTYPE)
    inputs = (tables.to(device), starts, seq_lens)
    expected = paged_attention_reference(query, caches[0], *inputs, scale=SCALE)
    out = torch.empty(num_tokens, HEADS.num_heads * HEADS.head_dim, device=device, dtype=DTYPE)

    def plan(planner: Planner) -> list[Section]:
        return planner.plan(
            seq_lens,
            num_rows=num_rows,
            num_tokens=num_tokens,
            num_decodes=num_rows if query_len == 1 else 0,
            max_query_len=query_len,
            max_seq_len=MAX_SEQ_LEN,
        )

    sections, (section,) = plan(Planner(HEADS)), plan(Planner(HEADS, tiling=tiling))

    def triton(cache: Tensor) -> None:
        paged_attention(query, cache, *inputs, sections, scale=SCALE, out=out)

    def hopper(cache: Tensor) -> None:
        decode_attention(out, query, cache, *inputs, section, scale=SCALE)

    floor = ceilings.floor(num_bytes)
    line = f"{name:<28}{num_rows:>5}{floor:>9.1f}"
    for attend in (triton, hopper):
        attend(caches[0])
        error = relative_error(out, expected)
        time = replay_time([partial(attend, cache) for cache in (caches * 16)[:16]])
        line += f"{time:>9.1f}{time / floor:>7.2f}{error:>10.1e}"
    return line


def main() -> None:
    """Print the table, in microseconds."""
    ceilings = Ceilings.measure(DEVICE, DTYPE)
    columns = f"{'ratio':>7}{'error':>10}"
    print(f"{'contexts':<28}{'rows':>5}{'floor':>9}{'triton':>9}{columns}{'hopper':>9}{columns}")
    cases = {f"trace, {rows} rows": trace_contexts(rows) for rows in (19, 64, 128, 256, 512)}
    cases |= {f"equal, {rows} rows": [1100] * rows for rows in (1, 8, 32, 64, 256)}
    cases |= {f"one of 8192, {rows} rows": [*[387] * (rows - 1), 8192] for rows in (1, 16, 64, 256)}
    for name, lengths in cases.items():
        print(compare(ceilings, name, lengths), flush=True)
    for rows in (8, 32, 128):
        print(compare(ceilings, "equal, 5 queries each", [1100] * rows, query_len=5), flush=True)


if __name__ == "__main__":
    main()
