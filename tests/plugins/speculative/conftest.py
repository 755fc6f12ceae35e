"""Tiny random models as target and draft, and an engine that is driven step by step with its invariants checked."""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from octavo import EngineConfig, SamplingParams, SpeculativeConfig
from octavo.engine import Engine, InFlight
from octavo.messages import SequenceOutput, StepStats, Submit
from octavo.speculation import Prospect
from octavo.startup import build_engine, resolve

VOCAB_SIZE = 40  # small, so that texts repeat and bad drafts are right at times


def tiny_config(**changes: Any) -> LlamaConfig:
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    return LlamaConfig(**{**sizes, **changes})


@dataclass(frozen=True)
class Models:
    """Folders: the target; drafts that are nearly right, often right and rarely right."""

    target: Path
    drafts: dict[str, Path]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("speculative")
    torch.manual_seed(3)
    target = LlamaForCausalLM(tiny_config())

    def save(model: LlamaForCausalLM, name: str) -> Path:
        model.save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
        return folder / name

    noisy = LlamaForCausalLM(tiny_config())
    noisy.load_state_dict(target.state_dict())
    with torch.no_grad():
        for weight in noisy.parameters():
            weight += 0.02 * torch.randn_like(weight)
    other = LlamaForCausalLM(tiny_config(num_hidden_layers=1))
    drafts = {"same": save(target, "same"), "noisy": save(noisy, "noisy"), "other": save(other, "other")}
    return Models(save(target, "target"), drafts)


def make_config(models: Models, speculative: SpeculativeConfig | None = None, **options: Any) -> EngineConfig:
    defaults: dict[str, Any] = {
        "device": "cpu",
        "dtype": "float32",
        "max_model_len": 96,
        "block_size": 4,
        "num_blocks": 200,
        "max_num_seqs": 8,
        "overlap": False,
    }
    return EngineConfig(
        model=str(models.target), speculative=speculative or SpeculativeConfig(), **{**defaults, **options}
    )


def make_engine(config: EngineConfig) -> Engine:
    return build_engine(resolve(config))


@dataclass
class Output:
    """All that was said of one sequence."""

    token_ids: list[int] = field(default_factory=list)
    chosen: list[tuple[int, int]] = field(default_factory=list)  # (token, rank) by the log-probabilities
    logprobs: Any = field(default_factory=list)
    finish_reason: str | None = None
    stop_token_id: int | None = None

    def add(self, output: SequenceOutput) -> None:
        self.token_ids += output.token_ids
        for item in output.logprobs or ():
            self.chosen.append((item.token_id, item.rank))
            self.logprobs.append(item.logprob)
        self.finish_reason = output.finish_reason and output.finish_reason.value
        self.stop_token_id = output.stop_token_id


class Erratic:
    """A controller that asks for any number of drafts for any sequence, a new one after each step."""

    def __init__(self, num_tokens: int, seed: int) -> None:
        self._num_tokens = num_tokens
        self._seed = seed
        self._num_steps = 0

    def rests(self, num_sequences: int) -> bool:
        return False

    def choose(self, sequences: Sequence[Prospect]) -> Sequence[int]:
        source = random.Random(self._seed * 1000 + self._num_steps)
        if source.random() < 0.3:
            return [0] * len(sequences)
        return [source.randint(0, self._num_tokens) for _ in sequences]

    def observe(self, sequence: Hashable, limit: int, num_accepted: int) -> None:
        assert 0 <= num_accepted <= limit <= self._num_tokens

    def measure(self, limits: Sequence[int], seconds: float, num_tokens: int, num_read: int = 0) -> float:
        assert num_read >= 0
        assert 0 < num_tokens <= len(limits) + sum(limits)  # one that has ended meanwhile brings none
        assert seconds > 0.0
        self._num_steps += 1
        return 0.0

    def measure_prompts(self, num_tokens: int, seconds: float) -> None:
        pass

    def release(self, sequence: Hashable) -> None:
        pass


@dataclass
class Run:
    """What came of some requests: the sequences' outputs, and the sums of the steps' counts."""

    outputs: dict[tuple[str, int], Output] = field(default_factory=dict)
    num_steps: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted: int = 0
    num_preemptions: int = 0

    def add(self, sequences: Sequence[SequenceOutput], stats: StepStats) -> None:
        for sequence in sequences:
            assert sequence.error is None, sequence.error
            self.outputs.setdefault((sequence.request_id, sequence.index), Output()).add(sequence)
        self.num_steps += 1
        self.num_drafts += stats.num_drafts
        self.num_draft_tokens += stats.num_draft_tokens
        self.num_accepted += stats.num_accepted_tokens
        self.num_preemptions += stats.num_preemptions
        assert sum(stats.accepted_per_position) == stats.num_accepted_tokens


def run(
    engine: Engine, requests: Sequence[tuple[Sequence[int], SamplingParams]], bad: Sequence[Sequence[int]] = ()
) -> Run:
    """All requests at once until the last is finished, as :func:`octavo.client.drive` would."""
    for number, (prompt, params) in enumerate(requests):
        engine.submit(
            Submit(f"r{number}", list(prompt), params, seed=params.seed or 0, bad_token_ids=[list(w) for w in bad])
        )
    result = Run()
    in_flight: InFlight | None = None
    while engine.has_work or in_flight is not None:
        assert result.num_steps < 3000, "no progress"
        launched = engine.launch()
        engine.check()
        if in_flight is not None or (launched is None and engine.has_work):
            outputs = engine.settle(in_flight)
            result.add(outputs.sequences, outputs.stats)
        in_flight = launched
        if in_flight is not None and not engine.overlap:
            outputs = engine.settle(in_flight)
            result.add(outputs.sequences, outputs.stats)
            in_flight = None
        engine.check()
    blocks = engine.scheduler.blocks
    assert blocks.num_free == blocks.num_blocks
    return result
