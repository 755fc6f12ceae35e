"""The arithmetic, on examples that can be checked by hand."""

from __future__ import annotations

import pytest

from octavo.bench.metrics import (
    RequestResult,
    distribution,
    meets,
    output_rate,
    parse_objectives,
    parse_percentiles,
    peak_concurrency,
    summarize,
)
from octavo.errors import ConfigError


def result(sent: float, chunks: list[float], num_tokens: int, *, error: str | None = None) -> RequestResult:
    ended = chunks[-1] if chunks else sent
    return RequestResult(
        10, sent, ended, chunks, num_tokens, counted_by_server=True, finish_reason="length", error=error
    )


ONE = result(0.0, [0.1, 0.2, 0.4], 5)  # three pieces, five tokens
TWO = result(1.0, [1.5], 1)
FAILED = result(1.0, [], 0, error="HTTP 500: no")


def test_the_four_latencies_of_one_request() -> None:
    assert ONE.ttft == pytest.approx(0.1)
    assert ONE.e2el == pytest.approx(0.4)
    assert ONE.tpot == pytest.approx((0.4 - 0.1) / 4)
    assert ONE.itls == pytest.approx([0.1, 0.2])


def test_one_token_has_no_time_per_output_token() -> None:
    assert TWO.tpot is None
    assert TWO.itls == []


def test_a_run_is_summed_up_over_completed_requests() -> None:
    summary = summarize([ONE, TWO, FAILED], 2.0, percentiles=(50, 99))
    assert (summary["num_requests"], summary["num_completed"], summary["num_failed"]) == (3, 2, 1)
    assert summary["failures"] == {"HTTP 500: no": 1}
    assert (summary["input_tokens"], summary["output_tokens"]) == (20, 6)
    assert summary["request_throughput"] == 1.0
    assert summary["output_throughput"] == 3.0
    assert summary["total_throughput"] == 13.0
    assert summary["ttft"] == pytest.approx(
        {"mean_ms": 300, "median_ms": 300, "std_ms": 200, "p50_ms": 300, "p99_ms": 496}
    )
    assert summary["tpot"]["mean_ms"] == pytest.approx(75)
    assert summary["itl"]["mean_ms"] == pytest.approx(150)
    assert summary["e2el"]["mean_ms"] == pytest.approx(450)


def test_only_the_chosen_latencies_are_reported() -> None:
    summary = summarize([ONE], 1.0, metrics=["itl"])
    assert "itl" in summary
    assert "ttft" not in summary


def test_a_run_in_which_all_failed_has_counts_and_no_latencies() -> None:
    summary = summarize([FAILED], 1.0)
    assert summary["num_failed"] == 1
    assert summary["output_throughput"] == 0.0
    assert summary["ttft"] == {}


def test_goodput_counts_requests_that_meet_every_objective() -> None:
    assert summarize([ONE, TWO], 2.0, objectives={"ttft": 200.0})["goodput"] == 0.5
    assert summarize([ONE, TWO], 2.0, objectives={"ttft": 600.0, "tpot": 80.0})["goodput"] == 1.0
    assert summarize([ONE, TWO], 2.0, objectives={"ttft": 600.0, "tpot": 70.0})["goodput"] == 0.5
    assert "goodput" not in summarize([ONE], 1.0)


def test_an_objective_includes_its_limit_and_one_token_meets_any_time_per_token() -> None:
    assert meets(TWO, {"ttft": 500.0, "tpot": 0.001})
    assert not meets(TWO, {"ttft": 499.9})


def test_objectives_are_read_from_words() -> None:
    assert parse_objectives(["ttft:200", "tpot:50.5"]) == {"ttft": 200.0, "tpot": 50.5}
    for words in (["itl:5"], ["ttft"], ["ttft:"], ["ttft:x"], ["ttft:0"], ["ttft:-3"], ["ttft:nan"]):
        with pytest.raises(ConfigError, match="goodput objective"):
            parse_objectives(words)


def test_percentiles_are_read_from_text() -> None:
    assert parse_percentiles("50,99.9") == [50.0, 99.9]
    for text in ("", "x", "101", "-1", "50,"):
        with pytest.raises(ConfigError, match="between 0 and 100"):
            parse_percentiles(text)


def test_percentiles_are_interpolated() -> None:
    assert distribution([0.001 * value for value in range(1, 102)], [90, 99.5]) == pytest.approx(
        {"mean_ms": 51, "median_ms": 51, "std_ms": 29.154759, "p90_ms": 91, "p99.5_ms": 100.5}
    )


def test_peak_concurrency_counts_overlaps_and_not_neighbours() -> None:
    assert peak_concurrency([result(0.0, [1.0], 1), result(1.0, [2.0], 1)]) == 1
    assert peak_concurrency([result(0.0, [1.0], 1), result(0.5, [2.0], 1), result(0.9, [0.95], 1)]) == 3


def test_output_rate_spreads_a_requests_tokens_over_its_pieces() -> None:
    times, rates = output_rate([result(0.0, [0.1, 0.6], 4)], 0.0, 0.5)
    assert times == [0.0, 0.5]
    assert rates == [4.0, 4.0]  # two tokens in each half second
    assert output_rate([], 0.0, 1.0) == ([], [])
