"""Prompt lookup: the index says what a search through the whole text says."""

from __future__ import annotations

from collections.abc import Sequence

import hypothesis.strategies as st
from hypothesis import given

from octavo_speculative.ngram import NgramIndex


def search(tokens: Sequence[int], shortest: int, longest: int, limit: int) -> list[int]:
    """The latest earlier occurrence of the longest end, by looking everywhere; what follows repeats itself."""
    for length in range(min(longest, len(tokens) - 1), shortest - 1, -1):
        for start in range(len(tokens) - length - 1, -1, -1):
            if list(tokens[start : start + length]) == list(tokens[-length:]):
                text = list(tokens)
                for position in range(limit):
                    text.append(text[start + length + position])
                return text[len(tokens) :]
    return []


@given(
    tokens=st.lists(st.integers(0, 3), min_size=1, max_size=60),
    bounds=st.tuples(st.integers(1, 4), st.integers(1, 4)).map(sorted),
    limit=st.integers(1, 6),
    step=st.integers(1, 7),
)
def test_the_index_finds_what_a_search_finds(tokens: list[int], bounds: list[int], limit: int, step: int) -> None:
    index = NgramIndex(*bounds)
    for length in range(1, len(tokens) + 1, step):
        assert index.guess(tokens[:length], limit) == search(tokens[:length], *bounds, limit)


def test_the_longest_end_decides() -> None:
    tokens = [1, 2, 3, 7, 9, 2, 3, 8, 1, 2, 3]
    assert NgramIndex(2, 2).guess(tokens, 1) == [8]
    assert NgramIndex(2, 3).guess(tokens, 1) == [7]


def test_a_repetition_goes_on_for_as_long_as_is_asked() -> None:
    assert NgramIndex(1, 2).guess([5, 6, 5, 6], 7) == [5, 6, 5, 6, 5, 6, 5]


def test_nothing_is_guessed_where_nothing_repeats() -> None:
    assert NgramIndex(1, 4).guess([1, 2, 3, 4], 4) == []


def test_each_token_is_entered_once() -> None:
    index = NgramIndex(1, 1)
    tokens = list(range(100))
    for length in range(1, 101):
        index.guess(tokens[:length], 2)
    assert len(index._followers) == 99
