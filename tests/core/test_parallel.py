"""Shard arithmetic: the ranks' parts together are the whole, without a gap and without an overlap."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from octavo.errors import ConfigError
from octavo.parallel import Shard

SIZES = st.integers(1, 16)
COUNTS = st.integers(1, 64)


def ranks(size: int) -> list[Shard]:
    return [Shard(rank, size) for rank in range(size)]


@given(SIZES, COUNTS, st.integers(1, 128))
def test_rows_are_shared_out_in_whole_units(size: int, per_rank: int, unit: int) -> None:
    total = per_rank * size * unit
    parts = [shard.rows(total, "rows", unit) for shard in ranks(size)]
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(total))
    assert all(part.start % unit == 0 for part in parts)


@given(SIZES, COUNTS)
def test_key_value_heads_are_shared_out_or_repeated_so_that_every_query_head_finds_its_own(
    size: int, num_kv_heads: int
) -> None:
    assume(num_kv_heads % size == 0 or size % num_kv_heads == 0)
    group = 4 * size  # query heads for each key/value head, so that query heads can be shared out
    num_heads = group * num_kv_heads
    for shard in ranks(size):
        heads, queries = shard.kv_heads(num_kv_heads), shard.rows(num_heads, "heads")
        assert {query // group for query in range(queries.start, queries.stop)} == set(range(heads.start, heads.stop))


def test_one_rank_holds_everything() -> None:
    assert Shard().rows(10, "rows", 3) == slice(0, 9)
    assert Shard().kv_heads(3) == slice(0, 3)
    assert Shard().divide(7, "heads") == 7


@given(st.integers(2, 16), st.integers(1, 1000))
def test_what_cannot_be_shared_out_is_refused_by_name(size: int, total: int) -> None:
    assume(total % size)
    with pytest.raises(ConfigError, match=rf"number of heads \({total}\) cannot be divided over {size} ranks; choose"):
        Shard(0, size).divide(total, "number of heads")


def test_key_value_heads_that_cannot_be_repeated_evenly_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 key/value heads cannot be replicated evenly over 4 ranks"):
        Shard(0, 4).kv_heads(3)
