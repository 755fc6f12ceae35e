"""When requests are sent."""

from __future__ import annotations

import numpy

from octavo.errors import ConfigError


def arrival_times(num_requests: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """Seconds after the start at which each request is sent; ascending.

    ``rate`` is in requests a second; infinity sends all at once. Gaps follow a gamma distribution of shape
    ``burstiness``: 1 is a Poisson process, less comes in bursts, more is steadier. The times are scaled so that the
    last request is sent at ``num_requests / rate``: runs of one rate offer the same load whatever the seed.

    Raises:
        ConfigError: a rate or burstiness that is not above 0.
    """
    if not rate > 0.0:
        raise ConfigError(f"request rate must be above 0 requests a second, not {rate}")
    if not burstiness > 0.0:
        raise ConfigError(f"burstiness must be above 0, not {burstiness}")
    if rate == float("inf") or num_requests == 0:
        return [0.0] * num_requests
    gaps = numpy.random.default_rng(seed).gamma(burstiness, 1.0 / (rate * burstiness), num_requests)
    times = numpy.cumsum(gaps)
    return [float(time) for time in times * (num_requests / rate / times[-1])]
