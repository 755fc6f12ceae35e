"""``octavo bench serve`` from the command line to its table, its JSON and its picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from octavo.cli import main


def bench(server: Any, *words: str) -> int:
    small = ["--random-input-len", "4", "--random-output-len", "6", "--disable-tqdm"]
    return main(["bench", "serve", "--base-url", server.url, *small, *words])


def test_a_run_is_reported_saved_and_drawn(server: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server.pause = 0.001
    result, picture = tmp_path / "new" / "result.json", tmp_path / "new" / "plot.png"
    words = ["--num-prompts", "12", "--request-rate", "200", "--goodput", "ttft:60000", "--save-detailed"]
    assert bench(server, *words, "--save-result", str(result), "--plot", str(picture), "--api-key", "secret") == 0
    text = capsys.readouterr().out
    assert "12 of 12" in text
    for words_shown in ("TTFT, time to first token", "TPOT", "ITL", "E2EL", "goodput", "output throughput, tok/s"):
        assert words_shown in text
    saved = json.loads(result.read_text())
    assert saved["result"]["num_completed"] == 12
    assert saved["result"]["output_tokens"] == 72
    assert saved["result"]["ttft"].keys() == {
        "mean_ms", "median_ms", "std_ms", "p50_ms", "p90_ms", "p95_ms", "p99_ms",
    }  # fmt: skip
    assert len(saved["result"]["requests"]) == 12
    assert saved["arguments"]["model"] == "tiny"
    assert saved["versions"]["octavo"]
    assert saved["hardware"]["cores"] >= 1
    assert "secret" not in result.read_text()
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_prompts_are_the_same_for_the_same_seed_and_unlike_the_warm_up(server: Any) -> None:
    bench(server, "--num-prompts", "3", "--max-concurrency", "1", "--seed", "4")
    bench(server, "--num-prompts", "3", "--max-concurrency", "1", "--seed", "4")
    prompts = [body["prompt"] for body in server.bodies]
    assert prompts[1:4] == prompts[5:8]
    assert prompts[0] not in prompts[1:4]


def test_failed_requests_are_told_and_change_the_exit_status(server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    bench(server, "--num-prompts", "2", "--num-warmups", "0", "--seed", "1")
    server.behaviour[server.bodies[0]["prompt"][0]] = "refuse"
    capsys.readouterr()
    assert bench(server, "--num-prompts", "2", "--num-warmups", "0", "--seed", "1") == 1
    text = capsys.readouterr().out
    assert "1 of 2" in text
    assert "1 x HTTP 429: queue full" in text


def test_a_run_without_any_answer_still_reports(
    server: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class AllRefused(dict[int, str]):
        def get(self, key: int, default: Any = None) -> str:
            return "refuse"

    server.behaviour = AllRefused()
    assert bench(server, "--num-prompts", "2", "--num-warmups", "0", "--plot", str(tmp_path / "p.png")) == 1
    captured = capsys.readouterr()
    assert "0 of 2" in captured.out
    assert "no request completed" in captured.err


def test_a_failing_warm_up_stops_before_anything_is_measured(server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    class AllRefused(dict[int, str]):
        def get(self, key: int, default: Any = None) -> str:
            return "refuse"

    server.behaviour = AllRefused()
    assert bench(server, "--num-prompts", "50") == 2
    assert "the warm-up request failed, nothing was measured: HTTP 429: queue full" in capsys.readouterr().err
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--goodput itl:5", "goodput objective"),
        ("--metric-percentiles 50,x", "percentile 'x'"),
        ("--percentile-metrics ttft,abc", "'abc' is no latency"),
        ("--request-rate 0", "request rate must be above 0"),
        ("--num-prompts 0", "--num-prompts must be at least 1"),
        ("--max-concurrency 0", "--max-concurrency must be at least 1"),
        ("--num-warmups -1", "--num-warmups must be at least 0"),
        ("--dataset-name trace", "needs --dataset-path"),
        ("--dataset-name sharegpt --dataset-path x", "needs --tokenizer"),
        ("--endpoint /v1/chat/completions", "text prompts need --tokenizer"),
        ("--save-detailed", "--save-detailed needs --save-result"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    server: Any, words: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(server, *words.split()) == 2
    assert reason in capsys.readouterr().err
    assert server.bodies == []
