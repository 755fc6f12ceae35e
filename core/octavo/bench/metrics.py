"""The arithmetic of a benchmark: pure functions from what was observed to what is reported.

Definitions are those of ``vllm bench serve``:

- TTFT, time to first token: from sending a request until its first piece of output arrives.
- ITL, inter-token latency: the time between two successive pieces of one response; a piece that carries several
  tokens counts once.
- E2EL, end-to-end latency: from sending until the last piece of output.
- TPOT, time per output token: (E2EL - TTFT) / (output tokens - 1); responses of one token have none.
- Throughput counts completed requests only, over the time from the first request sent until the last one ended.
- Goodput: requests a second that meet every objective; a response of one token has a TPOT of 0 here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy

from octavo.errors import ConfigError

LATENCIES = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "inter-token latency",
    "e2el": "end-to-end latency",
}
"""Every latency by its short name."""

OBJECTIVES = ("ttft", "tpot", "e2el")
"""What a goodput objective may be about: one value for each request."""


@dataclass(slots=True)
class RequestResult:
    """What was observed of one request. Times are seconds on the client's monotonic clock.

    ``chunk_times`` are the arrivals of pieces of output. ``num_output_tokens`` is the server's own count where it
    sends one (``counted_by_server``), else the number of pieces. ``error`` is None exactly when the request completed.
    """

    num_prompt_tokens: int
    sent_at: float
    ended_at: float = 0.0
    chunk_times: list[float] = field(default_factory=list)
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    counted_by_server: bool = False
    finish_reason: str | None = None
    text: str = ""
    error: str | None = None

    @property
    def completed(self) -> bool:
        return self.error is None

    @property
    def ttft(self) -> float:
        return self.chunk_times[0] - self.sent_at

    @property
    def e2el(self) -> float:
        return self.chunk_times[-1] - self.sent_at

    @property
    def tpot(self) -> float | None:
        """None for a response of one token."""
        if self.num_output_tokens < 2:
            return None
        return (self.e2el - self.ttft) / (self.num_output_tokens - 1)

    @property
    def itls(self) -> list[float]:
        return [after - before for before, after in zip(self.chunk_times, self.chunk_times[1:], strict=False)]


def latencies(results: Sequence[RequestResult]) -> dict[str, list[float]]:
    """Seconds by short name, of completed requests in order."""
    done = [result for result in results if result.completed]
    return {
        "ttft": [result.ttft for result in done],
        "tpot": [tpot for result in done if (tpot := result.tpot) is not None],
        "itl": [gap for result in done for gap in result.itls],
        "e2el": [result.e2el for result in done],
    }


def distribution(seconds: Sequence[float], percentiles: Sequence[float]) -> dict[str, float]:
    """Mean, median, standard deviation and percentiles in milliseconds; empty for no values."""
    if not seconds:
        return {}
    values = numpy.asarray(seconds, dtype=numpy.float64) * 1e3
    summary = {"mean_ms": float(values.mean()), "median_ms": float(numpy.median(values)), "std_ms": float(values.std())}
    for percentile in percentiles:
        summary[f"p{percentile:g}_ms"] = float(numpy.percentile(values, percentile))
    return summary


def meets(result: RequestResult, objectives: Mapping[str, float]) -> bool:
    """Whether a completed request meets every objective, given in milliseconds."""
    observed = {"ttft": result.ttft, "tpot": result.tpot or 0.0, "e2el": result.e2el}
    return all(observed[name] * 1e3 <= limit for name, limit in objectives.items())


def parse_objectives(words: Sequence[str]) -> dict[str, float]:
    """``["ttft:200", "tpot:50"]`` -> milliseconds by name.

    Raises:
        ConfigError: not of that form, an unknown name, or a limit that is not above 0.
    """
    objectives: dict[str, float] = {}
    for word in words:
        name, colon, limit = word.partition(":")
        if name not in OBJECTIVES:
            raise ConfigError(f"goodput objective '{word}': use NAME:MILLISECONDS with {', '.join(OBJECTIVES)}")
        try:
            objectives[name] = float(limit) if colon else 0.0
        except ValueError:
            objectives[name] = 0.0
        if not objectives[name] > 0.0:
            raise ConfigError(f"goodput objective '{word}': the limit must be a number of milliseconds above 0")
    return objectives


def parse_percentiles(text: str) -> list[float]:
    """``"50,99.9"`` -> ``[50.0, 99.9]``.

    Raises:
        ConfigError: a value is no number between 0 and 100.
    """
    percentiles = []
    for word in text.split(","):
        try:
            percentile = float(word)
        except ValueError:
            percentile = -1.0
        if not 0.0 <= percentile <= 100.0:
            raise ConfigError(f"percentile '{word}' must be a number between 0 and 100")
        percentiles.append(percentile)
    return percentiles


def peak_concurrency(results: Sequence[RequestResult]) -> int:
    """The most requests that were under way at one moment."""
    changes = sorted([(r.sent_at, 1) for r in results] + [(r.ended_at, -1) for r in results])
    running = peak = 0
    for _, change in changes:
        running += change
        peak = max(peak, running)
    return peak


def summarize(
    results: Sequence[RequestResult],
    duration: float,
    *,
    percentiles: Sequence[float] = (50, 90, 95, 99),
    metrics: Sequence[str] = tuple(LATENCIES),
    objectives: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Every figure of a run of ``duration`` seconds. Failed requests are counted by reason and enter nothing else."""
    done = [result for result in results if result.completed]
    num_input = sum(result.num_prompt_tokens for result in done)
    num_output = sum(result.num_output_tokens for result in done)
    observed = latencies(results)
    summary: dict[str, Any] = {
        "duration_s": duration,
        "num_requests": len(results),
        "num_completed": len(done),
        "num_failed": len(results) - len(done),
        "failures": dict(Counter(result.error for result in results if result.error is not None).most_common()),
        "finish_reasons": dict(Counter(str(result.finish_reason) for result in done).most_common()),
        "num_counted_by_client": sum(not result.counted_by_server for result in done),
        "input_tokens": num_input,
        "cached_tokens": sum(result.num_cached_tokens for result in done),
        "output_tokens": num_output,
        "peak_concurrency": peak_concurrency(results),
        "request_throughput": len(done) / duration,
        "output_throughput": num_output / duration,
        "total_throughput": (num_input + num_output) / duration,
    }
    if objectives:
        summary["goodput"] = sum(meets(result, objectives) for result in done) / duration
    for name in metrics:
        summary[name] = distribution(observed[name], percentiles)
    return summary


def output_rate(results: Sequence[RequestResult], start: float, width: float) -> tuple[list[float], list[float]]:
    """Output tokens a second over time: the start of each interval of ``width`` seconds, and its rate.

    A response's tokens are spread evenly over its pieces.
    """
    times = [time - start for result in results for time in result.chunk_times]
    weights = [result.num_output_tokens / len(result.chunk_times) for result in results for _ in result.chunk_times]
    if not times:
        return [], []
    num_bins = max(1, int(max(times) / width) + 1)
    counts, edges = numpy.histogram(times, bins=num_bins, range=(0.0, num_bins * width), weights=weights)
    return [float(edge) for edge in edges[:-1]], [float(count) / width for count in counts]
