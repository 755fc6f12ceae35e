"""Offline throughput and latency: the arithmetic on an engine with a known pace, and a run on a tiny model."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from octavo import SamplingParams
from octavo.bench import latency, throughput
from octavo.bench.datasets import BenchRequest, random_requests
from octavo.cli import main


class PacedEngine:
    """Takes 20 ms for prompts it has not seen and 2 ms for every step, as many steps as its longest answer."""

    def __init__(self) -> None:
        self.seen: set[tuple[int, ...]] = set()
        self.asked: list[list[SamplingParams]] = []

    def generate(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams], use_tqdm: bool) -> list[Any]:
        self.asked.append(list(params))
        new = {tuple(prompt) for prompt in prompts} - self.seen
        self.seen |= new
        lengths = [one.max_tokens or 0 for one in params]
        time.sleep((0.02 if new else 0.0) + 0.002 * max(lengths))
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[0] * length)]) for length in lengths]


def test_everything_is_queued_at_once_greedily_and_to_its_full_length() -> None:
    engine = PacedEngine()
    requests = [BenchRequest(2, 5, [1, 2]), BenchRequest(2, 3, [3, 4])]
    seconds, num_output = throughput.generate(engine, requests, progress=False)  # type: ignore[arg-type]
    assert num_output == 8
    assert seconds >= 0.03
    assert [(one.max_tokens, one.ignore_eos, one.greedy) for one in engine.asked[0]] == [
        (5, True, True),
        (3, True, True),
    ]


def test_figures_are_rates_over_the_whole_run() -> None:
    figures = throughput.figures([BenchRequest(30, 5), BenchRequest(10, 5)], 10, 2.0)
    assert figures["request_throughput"] == 1.0
    assert figures["output_throughput"] == 5.0
    assert figures["total_throughput"] == 25.0


def test_a_decode_step_is_the_difference_between_a_long_and_a_short_run() -> None:
    engine = PacedEngine()
    prompts = random_requests(2, input_len=4, output_len=41, vocab_size=99, seed=0)
    batch, step = latency._round(engine, prompts, 1)  # type: ignore[arg-type]
    assert batch == pytest.approx(0.102, rel=0.3)  # 41 steps and the new prompts
    assert step == pytest.approx(0.002, rel=0.3)  # without them


TINY = ["--load-format", "dummy", "--num-blocks", "64", "--dtype", "float32", "--disable-tqdm"]


def test_throughput_of_a_tiny_model_beside_transformers(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "result.json"
    words = ["--num-prompts", "5", "--random-input-len", "8", "--random-output-len", "6", "--random-range-ratio", "0.5"]
    hf = ["--hf", "--hf-batch-size", "2"]
    assert main(["bench", "throughput", model, *TINY, *words, *hf, "--save-result", str(file)]) == 0
    text = capsys.readouterr().out
    assert "transformers, batches of 2" in text
    assert "times as many tokens a second" in text
    result = json.loads(file.read_text())["result"]
    assert result["octavo"]["num_requests"] == 5
    assert result["octavo"]["output_tokens"] == result["transformers"]["output_tokens"]
    assert result["ratio"] > 0.0
    assert result["engine"]["vocab_size"] == 256


def test_latency_of_a_tiny_model(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "result.json"
    words = [
        "--batch-size",
        "2",
        "--input-len",
        "8",
        "--output-len",
        "9",
        "--num-iters",
        "3",
        "--num-iters-warmup",
        "1",
    ]
    assert main(["bench", "latency", model, *TINY, *words, "--save-result", str(file)]) == 0
    assert "decode, per step" in capsys.readouterr().out
    result = json.loads(file.read_text())["result"]
    assert result["batch"]["p99_ms"] >= result["batch"]["p50_ms"] > 0.0
    assert result["decode_step"].keys() == result["batch"].keys()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("latency --output-len 5 --short-output-len 5", "--short-output-len must be at least 1 and below --output-len"),
        ("latency --num-iters 0", "--num-iters must be at least 1"),
        ("latency --batch-size 0", "--batch-size must be at least 1"),
        ("throughput --hf-batch-size 0", "--hf-batch-size must be at least 1"),
    ],
)
def test_impossible_shapes_are_refused_before_a_model_is_loaded(
    words: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command, *options = words.split()
    assert main(["bench", command, "no/such/model", *options]) == 2
    assert reason in capsys.readouterr().err
