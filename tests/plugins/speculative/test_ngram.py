"""Prompt lookup: all sequences at once on the device, and what a search through one text on the host says."""

from __future__ import annotations

from collections.abc import Sequence

import hypothesis.strategies as st
import torch
from hypothesis import given

from octavo_speculative.ngram import propose
from octavo_speculative.settings import NgramSettings


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


def guess(tokens: Sequence[int], shortest: int, longest: int, limit: int) -> list[int]:
    settings = NgramSettings(shortest, longest)
    (found,) = propose(torch.tensor([tokens]), torch.tensor([len(tokens)]), settings, limit).tolist()
    return [] if found[0] < 0 else found


@given(
    texts=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=60), min_size=1, max_size=5),
    rest=st.lists(st.integers(0, 3), max_size=8),
    bounds=st.tuples(st.integers(1, 6), st.integers(1, 6)).map(sorted),
    limit=st.integers(1, 6),
)
def test_all_sequences_get_what_a_search_finds(
    texts: list[list[int]], rest: list[int], bounds: list[int], limit: int
) -> None:
    """Whatever stands behind their ends."""
    width = max(map(len, texts)) + len(rest)
    table = torch.tensor([(text + rest + [0] * width)[:width] for text in texts])
    lengths = torch.tensor([len(text) for text in texts])
    proposed = propose(table, lengths, NgramSettings(*bounds), limit).tolist()
    assert proposed == [search(text, *bounds, limit) or [-1] * limit for text in texts]


def test_the_longest_end_decides() -> None:
    tokens = [1, 2, 3, 7, 9, 2, 3, 8, 1, 2, 3]
    assert guess(tokens, 2, 2, 1) == [8]
    assert guess(tokens, 2, 3, 1) == [7]


def test_a_repetition_goes_on_for_as_long_as_is_asked() -> None:
    assert guess([5, 6, 5, 6], 1, 2, 7) == [5, 6, 5, 6, 5, 6, 5]


def test_nothing_is_guessed_where_nothing_repeats() -> None:
    assert guess([1, 2, 3, 4], 1, 4, 4) == []
    assert guess([1], 1, 4, 4) == []
