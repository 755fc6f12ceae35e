"""The engine on a GPU says what it says on a CPU; graphs and overlap change nothing, and nothing waits in a step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.client import drive
from octavo.config import EngineConfig, SpeculativeConfig
from octavo.engine import Engine
from octavo.graphs import Choice
from octavo.messages import Command, Shutdown, StepOutputs, Submit
from octavo.request import SamplingParams
from octavo.startup import build_engine, resolve

pytestmark = pytest.mark.gpu

PROMPTS = [[(7 * i + 3 * j) % 256 for j in range(length)] for i, length in enumerate([1, 5, 16, 17, 33, 64, 90, 120])]
GREEDY = SamplingParams(temperature=0.0, max_tokens=24)


def engine(model: Path, **options: Any) -> Engine:
    settings: dict[str, Any] = {"device": "cuda", "dtype": "bfloat16", "num_blocks": 256, "max_num_seqs": 6, **options}
    return build_engine(resolve(EngineConfig(model=str(model), **settings)))


def generate(engine: Engine, params: SamplingParams | Sequence[SamplingParams] = GREEDY) -> list[list[int]]:
    """The tokens for PROMPTS, all queued at once."""
    listed = [params] * len(PROMPTS) if isinstance(params, SamplingParams) else params
    submits = [Submit(str(i), prompt, one, seed=i) for i, (prompt, one) in enumerate(zip(PROMPTS, listed, strict=True))]
    commands: list[list[Command]] = [list(submits)]
    tokens: list[list[int]] = [[] for _ in PROMPTS]

    def receive(timeout: float | None) -> list[Command]:
        if commands:
            return commands.pop()
        return [Shutdown()] if timeout is None else []

    def send(outputs: StepOutputs) -> None:
        for output in outputs.sequences:
            assert output.error is None, output.error
            tokens[int(output.request_id)] += output.token_ids

    drive(engine, receive, send)
    engine.check()
    return tokens


@pytest.mark.parametrize("model", ["tiny_llama", "smollm2"])
def test_float32_tokens_are_those_of_a_cpu(model: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(model)
    on_gpu = engine(path, dtype="float32", max_model_len=256)
    assert on_gpu.info.attention_backend == "torch"
    assert generate(on_gpu) == generate(engine(path, dtype="float32", max_model_len=256, device="cpu"))


def test_graphs_and_overlap_change_nothing(tiny_llama: Path) -> None:
    expected = generate(engine(tiny_llama, enforce_eager=True, overlap=False))
    for enforce_eager, overlap in ((True, True), (False, False), (False, True)):
        other = engine(tiny_llama, enforce_eager=enforce_eager, overlap=overlap)
        assert other.info.attention_backend == "triton"
        assert (other.runner.graphs is None) == enforce_eager
        assert generate(other) == expected, (enforce_eager, overlap)


def test_rows_that_sample_share_a_graph_with_greedy_ones(tiny_llama: Path) -> None:
    kinds = [
        GREEDY,
        SamplingParams(temperature=0.8, max_tokens=24, logprobs=2),
        SamplingParams(temperature=0.0, max_tokens=24, presence_penalty=1.0),
        SamplingParams(temperature=1.0, max_tokens=24, min_p=0.1),
    ]
    params = [kinds[i % len(kinds)] for i in range(len(PROMPTS))]
    assert generate(engine(tiny_llama), params) == generate(engine(tiny_llama, enforce_eager=True), params)


@pytest.mark.parametrize(
    "kind",
    [
        SamplingParams(temperature=0.9, max_tokens=24),
        SamplingParams(temperature=0.9, top_k=30, top_p=0.9, max_tokens=24),
    ],
    ids=["drawn", "filtered"],
)
def test_captured_steps_draw_the_same_tokens(tiny_llama: Path, kind: SamplingParams) -> None:
    params = [kind if i % 3 else GREEDY for i in range(len(PROMPTS))]
    with_graphs = engine(tiny_llama)
    assert generate(with_graphs, params) == generate(engine(tiny_llama, enforce_eager=True), params)
    expected = Choice.FILTERED if kind.top_k else Choice.DRAWN
    assert with_graphs.runner.graphs is not None
    assert expected in {shape.choice for shape in with_graphs.runner.graphs.captured}


def test_drafts_are_verified_in_captured_steps(tiny_llama: Path) -> None:
    """In float16, so that the number of tokens in a step hardly changes a logit."""
    drafting = SpeculativeConfig(method="ngram", num_tokens=3, fixed=True)
    longer = SamplingParams(temperature=0.0, max_tokens=48)
    with_drafts = engine(tiny_llama, dtype="float16", speculative=drafting)
    assert generate(with_drafts, longer) == generate(engine(tiny_llama, dtype="float16"), longer)
    assert with_drafts.runner.graphs is not None
    assert any(shape.every_token for shape in with_drafts.runner.graphs.captured)


def test_a_draft_model_beside_the_target_changes_nothing(tiny_llama: Path) -> None:
    longer = SamplingParams(temperature=0.0, max_tokens=60)
    speculative = SpeculativeConfig(model=str(tiny_llama), dtype="float16", num_tokens=3, fixed=True)
    drafting = engine(tiny_llama, dtype="float16", speculative=speculative)
    assert generate(drafting, longer) == generate(engine(tiny_llama, dtype="float16"), longer)
    runner = drafting._speculation._drafter._runner  # type: ignore[attr-defined]
    assert runner.graphs is not None
    assert any(shape.every_token for shape in runner.graphs.captured)


@pytest.mark.parametrize("enforce_eager", [False, True])
def test_a_launch_never_waits_for_the_device(tiny_llama: Path, enforce_eager: bool) -> None:
    busy = engine(tiny_llama, enforce_eager=enforce_eager)
    generate(busy)
    for i, prompt in enumerate(PROMPTS):
        busy.submit(Submit(f"again-{i}", prompt, GREEDY, seed=0))
    while busy.has_work:
        torch.cuda.set_sync_debug_mode("error")
        step = busy.launch()
        torch.cuda.set_sync_debug_mode("default")
        busy.settle(step)


def test_memory_holds_what_was_planned(tiny_llama: Path) -> None:
    torch.cuda.empty_cache()
    made = engine(tiny_llama, num_blocks=None, gpu_memory_utilization=0.5)
    generate(made)
    free, total = torch.cuda.mem_get_info()
    assert total - free <= 0.5 * total + 64 * 1024**2
