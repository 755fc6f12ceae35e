"""Pictures of a serving benchmark."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy

from octavo.bench.metrics import LATENCIES, RequestResult, latencies, output_rate
from octavo.errors import ConfigError


def require_matplotlib() -> None:
    """Raises ConfigError when matplotlib is not installed: better before a long run than after it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib; install it with: pip install 'octavo[bench]'")


def plot_serving(path: Path, results: Sequence[RequestResult], title: str) -> None:
    """Write a PNG: the distribution of each latency, output throughput and requests under way over time.

    At least one request must have completed.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    done = [result for result in results if result.completed]
    figure = Figure(figsize=(12, 7), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(2, 3)
    for axes, (name, seconds) in zip(grid.flat, latencies(results).items(), strict=False):
        _cumulative(axes, f"{name.upper()}: {LATENCIES[name]}", seconds)
    _throughput(grid.flat[4], done)
    _under_way(grid.flat[5], results)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(path)


def _cumulative(axes: Any, title: str, seconds: Sequence[float]) -> None:
    """The share of values below each latency, with the median and p99 marked."""
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel("ms")
    axes.set_ylabel("share of values")
    axes.grid(alpha=0.3)
    if not seconds:
        axes.text(0.5, 0.5, "no values", ha="center", transform=axes.transAxes)
        return
    values = numpy.sort(numpy.asarray(seconds) * 1e3)
    axes.step(values, numpy.arange(1, len(values) + 1) / len(values), where="post")
    for percentile, style in ((50, "--"), (99, ":")):
        value = float(numpy.percentile(values, percentile))
        axes.axvline(value, linestyle=style, color="tab:orange", label=f"p{percentile} {value:.4g} ms")
    axes.legend(loc="lower right", fontsize="small")


def _throughput(axes: Any, done: Sequence[RequestResult]) -> None:
    start = min(result.sent_at for result in done)
    duration = max(result.ended_at for result in done) - start
    times, rates = output_rate(done, start, max(duration / 60, 1e-3))
    axes.set_title("output throughput over time", fontsize="medium")
    axes.set_xlabel("s")
    axes.set_ylabel("tok/s")
    axes.grid(alpha=0.3)
    axes.step(times, rates, where="post")
    axes.set_ylim(bottom=0)


def _under_way(axes: Any, results: Sequence[RequestResult]) -> None:
    start = min(result.sent_at for result in results)
    changes = sorted([(r.sent_at - start, 1) for r in results] + [(r.ended_at - start, -1) for r in results])
    axes.set_title("requests under way", fontsize="medium")
    axes.set_xlabel("s")
    axes.set_ylabel("requests")
    axes.grid(alpha=0.3)
    axes.step([time for time, _ in changes], numpy.cumsum([change for _, change in changes]), where="post")
    axes.set_ylim(bottom=0)
