"""Decodes as a graph takes them are the same step: padding, sampling rows and prompts beside them change nothing.

There is no device here: what would be captured is run again instead, with inputs in the same buffers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import octavo.runner
import octavo.startup
from octavo.attention.torch_backend import TorchAttention
from octavo.batch import ForwardBatch
from octavo.config import EngineConfig
from octavo.engine import Engine
from octavo.graphs import DecodeGraphs, DecodeOutput, DecodeStep, MixedGraphs, MixedShape, MixedStep, graph_sizes
from octavo.messages import Submit
from octavo.request import SamplingParams
from octavo.runner import Runner
from octavo.startup import build_engine, resolve

PROMPTS = [[(5 * i + 7 * j) % 256 for j in range(length)] for i, length in enumerate([3, 16, 17, 40, 1, 70])]
GREEDY = SamplingParams(temperature=0.0, max_tokens=20)


class Rerun(DecodeGraphs):
    """Runs the step where a graph would be replayed."""

    num_replays = 0

    def capture(self, step: DecodeStep) -> bool:
        self._step = step
        return True

    def can_serve(self, num_rows: int, num_tokens: int, num_sampled: int) -> bool:
        return num_rows == num_tokens == num_sampled

    def replay(self, slots: np.ndarray, seq_lens: np.ndarray) -> DecodeOutput:
        type(self).num_replays += 1
        size = next(size for size in self._sizes if size >= len(slots))
        self._fill(slots, seq_lens, size)
        return self._step(*self._views(size)).first(len(slots))


class RerunMixed(MixedGraphs):
    """The same for steps with prompts."""

    num_replays = 0

    def capture(self, step: MixedStep) -> None:
        self._step = step

    def replay(self, shape: MixedShape, *arrays: np.ndarray) -> tuple[DecodeOutput, np.ndarray]:
        type(self).num_replays += 1
        where = self._fill(shape, *arrays)
        return self._step(self._views(shape), shape), where


class DeviceLengths(TorchAttention):
    """Asks the tensors for the lengths, as kernels do."""

    capturable = True

    def plan(self, batch: ForwardBatch) -> Any:
        starts = batch.query_start
        return super().plan(
            replace(batch, query_lens=(starts[1:] - starts[:-1]).tolist(), context_lens=batch.seq_lens.tolist())
        )


@pytest.fixture
def make_engine(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], Engine]:
    def make(use_graphs: bool) -> Engine:
        def runner(model: Any, backend: Any, *args: Any, **options: Any) -> Runner:
            backend.__class__ = DeviceLengths
            return Runner(model, backend, *args, **{**options, "use_graphs": use_graphs})

        monkeypatch.setattr(octavo.runner, "DecodeGraphs", Rerun)
        monkeypatch.setattr(octavo.runner, "MixedGraphs", RerunMixed)
        monkeypatch.setattr(octavo.startup, "Runner", runner)
        config = EngineConfig(
            model=str(tiny_llama), device="cpu", attention_backend="torch", num_blocks=64, max_num_seqs=6, overlap=False
        )
        return build_engine(resolve(config))

    return make


def generate(engine: Engine, params: list[SamplingParams]) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {str(i): [] for i in range(len(PROMPTS))}
    for i, (prompt, one) in enumerate(zip(PROMPTS, params, strict=True)):
        engine.submit(Submit(str(i), prompt, one, seed=i))
        if i == 3:  # the others come while these decode
            for _ in range(4):
                _step(engine, tokens)
    while engine.has_work:
        _step(engine, tokens)
    return tokens


def _step(engine: Engine, tokens: dict[str, list[int]]) -> None:
    for output in engine.settle(engine.launch()).sequences:
        assert output.error is None, output.error
        tokens[output.request_id] += output.token_ids
    engine.check()


@pytest.mark.parametrize(
    "kinds",
    [
        [GREEDY],
        [
            GREEDY,
            SamplingParams(temperature=0.9, max_tokens=20, logprobs=1),
            SamplingParams(temperature=0.0, max_tokens=9, frequency_penalty=1.0),
        ],
    ],
    ids=["greedy", "mixed"],
)
def test_graph_steps_generate_what_eager_ones_do(
    make_engine: Callable[[bool], Engine], kinds: list[SamplingParams]
) -> None:
    params = [kinds[i % len(kinds)] for i in range(len(PROMPTS))]
    before = Rerun.num_replays
    eager = generate(make_engine(False), params)
    assert Rerun.num_replays == before
    assert generate(make_engine(True), params) == eager
    assert Rerun.num_replays > before + 10
    assert RerunMixed.num_replays > 0


def test_padding_writes_to_the_spare_block_only(make_engine: Callable[[bool], Engine]) -> None:
    engine = make_engine(True)
    for i in range(3):  # padded to four rows
        engine.submit(Submit(str(i), PROMPTS[3], GREEDY, seed=0))
    engine.settle(engine.launch())
    used = {block for request in engine.scheduler.running.values() for block in request.blocks}
    before = [cache.clone() for cache in engine.runner.kv]
    engine.settle(engine.launch())
    changed = {
        int(block)
        for old, new in zip(before, engine.runner.kv, strict=True)
        for block in (old != new).flatten(1).any(dim=1).nonzero()
    }
    spare = engine.info.num_blocks
    assert changed <= used | {spare}
    assert spare in changed


def test_sizes_cover_every_number_of_rows_without_much_padding() -> None:
    for limit in (1, 3, 16, 100, 256, 1000):
        sizes = graph_sizes(limit)
        assert sizes == sorted(set(sizes))
        assert sizes[-1] == limit
        for num_rows in range(1, limit + 1):
            size = next(size for size in sizes if size >= num_rows)
            assert size - num_rows <= max(7, num_rows // 4)


def test_a_graph_serves_plain_decodes_it_was_captured_for() -> None:
    graphs = DecodeGraphs([1, 2, 4], spare_slot=4, device=torch.device("cpu"))
    assert not graphs.can_serve(2, 2, 2), "nothing is captured yet"
