"""Requests arrive at the asked rate, as regularly or in bursts as asked."""

from __future__ import annotations

import numpy
import pytest

from octavo.bench.arrivals import arrival_times
from octavo.errors import ConfigError


def test_an_infinite_rate_sends_all_at_once() -> None:
    assert arrival_times(3, float("inf"), 1.0, seed=0) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(("burstiness", "spread"), [(1.0, 1.0), (0.25, 2.0), (16.0, 0.25)])
def test_the_load_is_exact_and_its_gaps_are_gamma_distributed(burstiness: float, spread: float) -> None:
    times = arrival_times(5000, 20.0, burstiness, seed=3)
    gaps = numpy.diff([0.0, *times])
    assert times[-1] == pytest.approx(250.0)
    assert (gaps >= 0).all()
    assert gaps.std() / gaps.mean() == pytest.approx(spread, rel=0.1)  # a gamma's is 1 / sqrt(shape)


def test_the_seed_decides() -> None:
    assert arrival_times(9, 1.0, 1.0, seed=1) == arrival_times(9, 1.0, 1.0, seed=1)
    assert arrival_times(9, 1.0, 1.0, seed=1) != arrival_times(9, 1.0, 1.0, seed=2)


def test_rates_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="request rate must be above 0"):
        arrival_times(1, 0.0, 1.0, seed=0)
    with pytest.raises(ConfigError, match="burstiness must be above 0"):
        arrival_times(1, 1.0, -1.0, seed=0)
