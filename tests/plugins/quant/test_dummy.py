"""Benchmarks need no weights: the settings of any quantized checkpoint are enough to make random ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.plugins.quant.conftest import FIXTURES

from octavo.client import drive
from octavo.config import EngineConfig
from octavo.messages import Command, Shutdown, StepOutputs, Submit
from octavo.request import SamplingParams
from octavo.startup import build_engine, resolve


@pytest.mark.parametrize("name", ["awq-gemm-g64-skip-oproj", "gptq-8bit-sym-g128", "ct-w4a16-g128", "fp8-block-native"])
def test_a_configuration_alone_makes_a_quantized_model_that_answers(name: str, tmp_path: Path) -> None:
    config = (FIXTURES / name / "config.json").read_text(encoding="utf-8")
    (tmp_path / "config.json").write_text(config, encoding="utf-8")
    engine = build_engine(
        resolve(EngineConfig(model=str(tmp_path), load_format="dummy", device="cpu", max_model_len=64))
    )
    values = json.loads(config)
    plain = 2 * values["vocab_size"] * values["hidden_size"]
    assert engine.info.weight_bytes > 2 * plain  # more than the embedding and the head
    commands: list[list[Command]] = [[Submit("0", [1, 2, 3], SamplingParams(max_tokens=4, ignore_eos=True), seed=0)]]
    tokens: list[int] = []

    def receive(timeout: float | None) -> list[Command]:
        return commands.pop() if commands else ([Shutdown()] if timeout is None else [])

    def send(outputs: StepOutputs) -> None:
        tokens.extend(token for output in outputs.sequences for token in output.token_ids)

    drive(engine, receive, send)
    assert len(tokens) == 4
