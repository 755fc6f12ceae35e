"""The memory budget and the steps that it is measured with."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.errors import ConfigError
from octavo.memory import GIB, Activations, MemoryBudget, decode_step, largest_step, usual_steps

BLOCK_SIZE = 16


def budget(**changes: object) -> MemoryBudget:
    settings: dict[str, object] = {
        "device": "cuda",
        "total": 80 * GIB,
        "limit": 72 * GIB,
        "used_by_others": 1 * GIB,
        "weights": 15 * GIB,
        "activations": Activations(step=2 * GIB, graphs=1 * GIB),
        "block_bytes": 2 * 1024**2,
        "block_size": BLOCK_SIZE,
        "max_model_len": 8192,
        "num_blocks": None,
        "knob": "--gpu-memory-utilization",
        **changes,
    }
    return MemoryBudget.plan(**settings)  # type: ignore[arg-type]


def test_blocks_take_what_everything_else_leaves() -> None:
    assert budget().num_blocks == (72 - 1 - 15 - 2 - 1) * 512


def test_a_given_number_of_blocks_is_kept() -> None:
    assert budget(num_blocks=1000).num_blocks == 1000


def test_the_table_names_every_part() -> None:
    table = budget().table()
    for size in ("80.00", "72.00", "15.00", "2.00", "1.00", "53.00"):
        assert f"{size} GiB" in table
    assert f"room for {53 * 512 * BLOCK_SIZE} tokens" in table


def test_too_little_for_one_request_names_the_length_that_fits() -> None:
    with pytest.raises(ConfigError, match="--max-model-len 4096 or less, or raise --gpu-memory-utilization"):
        budget(num_blocks=256)


def test_nothing_left_names_the_knob() -> None:
    with pytest.raises(ConfigError, match="nothing is left for keys and values; raise --gpu-memory-utilization"):
        budget(weights=80 * GIB)


@given(st.integers(1, 64), st.integers(0, 2000), st.integers(2, 4000))
def test_measured_steps_stay_within_the_limits(max_num_seqs: int, more: int, max_model_len: int) -> None:
    max_num_batched_tokens, num_blocks = max_num_seqs + more, 32
    steps = usual_steps(max_num_seqs, max_num_batched_tokens, max_model_len, BLOCK_SIZE, num_blocks)
    assert all(max(row.request.blocks) < num_blocks for step in steps for row in step.rows)
    largest = largest_step(max_num_seqs, max_num_batched_tokens, max_model_len, BLOCK_SIZE)
    for step in (*steps, largest, decode_step(max_num_seqs, BLOCK_SIZE)):
        assert len({row.request.slot for row in step.rows}) == len(step.rows) <= max_num_seqs
        assert step.num_tokens <= max_num_batched_tokens
        for row in step.rows:
            assert row.end < max_model_len
            assert len(row.request.blocks) * BLOCK_SIZE >= row.end
        lengths = [row.num_tokens for row in step.rows]
        assert lengths == sorted(lengths, key=lambda length: length > 1), "single tokens come first"


def test_usual_steps_mix_short_and_long_queries_with_decodes() -> None:
    steps = usual_steps(256, 8192, 4096, BLOCK_SIZE, num_blocks=32)
    kinds = {(len(step.rows), step.rows[0].num_tokens, step.rows[-1].num_tokens) for step in steps}
    assert {(1, 1, 1), (256, 1, 1), (1, 96, 96), (256, 24, 24), (256, 1, 96), (8, 1, 6)} <= kinds
