"""A step as a graph takes it is the same step: padding, rows that draw and prompts beside decodes change nothing.

There is no device here: what would be captured is run again instead, with inputs in the same buffers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import octavo.runner
import octavo.startup
from octavo.attention.torch_backend import TorchAttention
from octavo.batch import ForwardBatch, PlannedRow, StepPlan
from octavo.config import EngineConfig
from octavo.engine import Engine
from octavo.graphs import Choice, StepGraphs, StepInputs, StepShape, StepShapes
from octavo.messages import Abort, Submit
from octavo.request import Request, SamplingParams
from octavo.rows import RowArrays
from octavo.runner import DeviceTable, LaunchedStep, Runner
from octavo.sampling import REJECTED
from octavo.speculation import FixedController, Speculation
from octavo.startup import build_engine, resolve

PROMPTS = [[(5 * i + 7 * j) % 256 for j in range(length)] for i, length in enumerate([3, 16, 17, 40, 1, 70])]
GREEDY = SamplingParams(temperature=0.0, max_tokens=20)


class Rerun(StepGraphs):
    """Runs the step where a graph would be replayed; counts the shapes."""

    replayed: ClassVar[Counter[StepShape]] = Counter()

    def _can_capture(self, run: Callable[[], object]) -> bool:
        return True

    def _record(self, inputs: StepInputs, shape: StepShape) -> tuple[Callable[[], object], Tensor]:
        result = self._step(inputs, shape)

        def run() -> None:
            self.replayed[shape] += 1
            result.copy_(self._step(inputs, shape))

        return run, result

    def replay(self, *args: Any) -> tuple[Tensor, np.ndarray]:
        """A GPU copies to the host in the order of the stream; here the next step would overwrite what nobody read."""
        output, where = super().replay(*args)
        return output.clone(), where


class DeviceLengths(TorchAttention):
    """Asks the tensors for the lengths, as kernels do."""

    capturable = True

    def plan(self, batch: ForwardBatch) -> Any:
        starts = batch.query_start
        return super().plan(
            replace(batch, query_lens=(starts[1:] - starts[:-1]).tolist(), context_lens=batch.seq_lens.tolist())
        )


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_host_reads_what_it_wrote_to_a_readable_table(device: str) -> None:
    table = DeviceTable(3, 5, torch.int32, torch.device(device), readable=True)
    table.write(1, 2, [7, 8])
    table.write(0, 0, [9])
    assert table.read(np.array([1, 1, 0, 2]), np.array([3, 2, 0, 4])).tolist() == [8, 7, 9, 0]


@pytest.fixture
def make_engine(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Engine]:
    return engine_maker(tiny_llama, monkeypatch)


def engine_maker(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Engine]:
    def make(use_graphs: bool, **options: Any) -> Engine:
        def runner(model: Any, backend: Any, *args: Any, **options: Any) -> Runner:
            backend.__class__ = DeviceLengths
            return Runner(model, backend, *args, **{**options, "use_graphs": use_graphs, "num_drafts": 3})

        monkeypatch.setattr(octavo.runner, "StepGraphs", Rerun)
        Rerun.replayed.clear()
        monkeypatch.setattr(octavo.startup, "Runner", runner)
        options = {"num_blocks": 64, "max_num_seqs": 6, "overlap": False, **options}
        config = EngineConfig(model=str(tiny_llama), device="cpu", attention_backend="torch", **options)
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


DRAWN = SamplingParams(temperature=0.9, max_tokens=20)
KINDS = {
    Choice.LIKELIEST: [GREEDY],
    Choice.DRAWN: [GREEDY, DRAWN],
    Choice.FILTERED: [GREEDY, DRAWN, SamplingParams(temperature=1.5, top_k=20, top_p=0.9, min_p=0.01, max_tokens=20)],
    Choice.LOGITS: [
        DRAWN,
        SamplingParams(temperature=0.9, max_tokens=20, logprobs=1),
        SamplingParams(temperature=0.0, max_tokens=9, frequency_penalty=1.0),
    ],
}


@pytest.mark.parametrize("choice", KINDS, ids=lambda choice: choice.name.lower())
def test_graph_steps_generate_what_eager_ones_do(make_engine: Callable[..., Engine], choice: Choice) -> None:
    kinds = KINDS[choice]
    params = [kinds[i % len(kinds)] for i in range(len(PROMPTS))]
    eager = generate(make_engine(False), params)
    assert not Rerun.replayed
    assert generate(make_engine(True), params) == eager
    assert sum(count for shape, count in Rerun.replayed.items() if shape.choice is choice) > 5
    assert any(shape.num_longer and shape.num_decodes for shape in Rerun.replayed), "no prompt beside decodes"
    assert any(not shape.num_decodes for shape in Rerun.replayed), "no prompt alone"


class Guesser:
    """Knows what will come, and now and then says something else."""

    bytes_per_block = 0

    def __init__(self, outputs: dict[str, list[int]]) -> None:
        self._outputs = outputs

    def start(self, target: Runner) -> None:
        pass

    def num_unread(self, requests: Sequence[Request]) -> list[int]:
        return [0] * len(requests)

    def draft(self, requests: Sequence[Request], limits: Sequence[int]) -> list[list[int]]:
        guesses = []
        for request, limit in zip(requests, limits, strict=True):
            start = request.num_output
            coming = self._outputs[request.request_id][start : start + limit]
            guesses.append([(token + (start + i) % 4 // 3) % 256 for i, token in enumerate(coming)])
        return guesses

    def release(self, request: Request) -> None:
        pass


@pytest.mark.parametrize("choice", KINDS, ids=lambda choice: choice.name.lower())
def test_drafts_are_verified_in_graphs_as_without(make_engine: Callable[..., Engine], choice: Choice) -> None:
    kinds = KINDS[choice]
    params = [kinds[i % len(kinds)] for i in range(len(PROMPTS))]
    plain = generate(make_engine(False), params)
    made = make_engine(True)
    speculation = Speculation(Guesser(plain), FixedController(3), made.scheduler, 3)
    engine = Engine(made.scheduler, made.runner, made.info, speculation=speculation)
    assert generate(engine, params) == plain
    assert sum(shape.every_token for shape in Rerun.replayed.elements()) > 3
    assert any(shape.choice is choice for shape in Rerun.replayed if shape.every_token)


@pytest.fixture(scope="module")
def engines(tiny_llama: Path) -> Iterator[tuple[Engine, Engine]]:
    """One that captures and one that does not, both with few blocks."""
    with pytest.MonkeyPatch.context() as patch:
        make = engine_maker(tiny_llama, patch)
        yield make(True, num_blocks=24), make(False, num_blocks=24)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32))
def test_whatever_comes_graphs_change_nothing(engines: tuple[Engine, Engine], seed: int) -> None:
    """Arrivals at any time, aborts, preemptions, samples of one prompt, all ways to choose in one batch, and a step in
    flight while the next is launched."""
    outputs = [run_random_load(engine, Random(seed)) for engine in engines]
    assert outputs[0] == outputs[1]


def run_random_load(engine: Engine, random: Random) -> dict[tuple[str, int], list[int]]:
    """The tokens of every sample that was not aborted."""
    kinds = [params for kind in KINDS.values() for params in kind]
    arriving = [
        Submit(
            str(number),
            [random.randrange(256) for _ in range(random.choice([1, 2, 15, 16, 33, 90]))],
            random.choice(kinds).replace(n=random.choice([1, 1, 2]), max_tokens=random.randint(1, 25)),
            seed=random.randrange(2**62),
        )
        for number in range(random.randint(1, 10))
    ]
    aborted = {submit.request_id for submit in arriving if random.random() < 0.1}
    tokens: dict[tuple[str, int], list[int]] = {}
    in_flight = None
    while arriving or engine.has_work or in_flight:
        for _ in range(min(random.randint(0, 2), len(arriving))):
            engine.submit(arriving.pop(0))
        if aborted and random.random() < 0.1:
            engine.abort(Abort(min(aborted)))
        launched = engine.launch()
        outputs = engine.settle(in_flight)
        in_flight = launched
        engine.check()
        for output in outputs.sequences:
            assert output.error is None, output.error
            if output.request_id not in aborted:
                tokens.setdefault((output.request_id, output.index), []).extend(output.token_ids)
    return tokens


@pytest.mark.parametrize("failing", [{Choice.DRAWN}, {Choice.DRAWN, Choice.LOGITS}], ids=["choice", "step"])
def test_what_cannot_be_captured_runs_without_a_graph(
    make_engine: Callable[..., Engine],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    failing: set[Choice],
) -> None:
    params = [DRAWN] * len(PROMPTS)
    expected = generate(make_engine(False), params)
    record = Rerun._record

    def fail(self: Rerun, inputs: StepInputs, shape: StepShape) -> tuple[Callable[[], object], Tensor]:
        if shape.choice in failing:
            raise RuntimeError("operation not permitted when stream is capturing")
        return record(self, inputs, shape)

    monkeypatch.setattr(Rerun, "_record", fail)
    assert generate(make_engine(True), params) == expected
    assert {shape.choice for shape in Rerun.replayed} == {Choice.LOGITS} - failing
    warnings = [record.message for record in caplog.records if "not permitted" in record.message]
    assert len(warnings) == len(failing)


def test_a_capture_that_fails_is_repeated_once_the_step_has_run(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = generate(make_engine(False), [GREEDY] * len(PROMPTS))
    record = Rerun._record
    failed: set[StepShape] = set()

    def fail_once(self: Rerun, inputs: StepInputs, shape: StepShape) -> tuple[Callable[[], object], Tensor]:
        if shape not in failed:
            failed.add(shape)
            raise RuntimeError("operation not permitted when stream is capturing")
        return record(self, inputs, shape)

    monkeypatch.setattr(Rerun, "_record", fail_once)
    assert generate(make_engine(True), [GREEDY] * len(PROMPTS)) == expected
    assert Rerun.replayed.keys() <= failed
    assert Rerun.replayed
    assert "not permitted" not in caplog.text


def test_prompts_in_chunks_are_the_same_in_graphs(make_engine: Callable[..., Engine]) -> None:
    """Several prompts under way at once: some rows of a step decide a token and others do not."""
    chunks = {"max_num_batched_tokens": 24, "max_num_partial_prefills": 3}
    params = [GREEDY] * len(PROMPTS)
    eager = generate(make_engine(False, **chunks), params)
    assert generate(make_engine(True, **chunks), params) == eager
    assert sum(shape.num_longer > 0 for shape in Rerun.replayed.elements()) > 3


def test_the_last_layer_computes_only_what_decides(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(False, max_num_batched_tokens=48, enable_prefix_caching=False)
    model = engine.runner.model
    forward, num_kept = model.forward, list[int]()

    def counted(*args: Any) -> Tensor:
        hidden = forward(*args)
        num_kept.append(hidden.shape[0])
        return hidden

    monkeypatch.setattr(model, "forward", counted)

    def counts(**options: Any) -> list[int]:
        num_kept.clear()
        engine.submit(Submit("long", PROMPTS[5], SamplingParams(temperature=0.0, max_tokens=2, **options), seed=0))
        while engine.has_work:
            _step(engine, {"long": []})
        return list(num_kept)

    assert counts() == [1, 1, 1]  # a chunk of 48 that decides nothing, the prompt's last 22 tokens, a decode
    assert counts(prompt_logprobs=1) == [48, 22, 1]


def test_only_what_a_step_leaves_to_others_gets_a_graph_with_logits(make_engine: Callable[..., Engine]) -> None:
    generate(make_engine(True), [GREEDY] * len(PROMPTS))
    assert {shape.choice for shape in Rerun.replayed} == {Choice.LIKELIEST}


def test_padding_writes_to_the_spare_block_only(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(True)
    for i in range(3):  # padded to four rows
        engine.submit(Submit(str(i), PROMPTS[3], GREEDY, seed=0))
    engine.settle(engine.launch())
    used = {block for request in engine.scheduler.running.values() for block in request.blocks}
    spare = engine.info.num_blocks
    for cache in engine.runner.kv:
        cache[spare] = 0.0
    before = [cache.clone() for cache in engine.runner.kv]
    engine.settle(engine.launch())
    changed = {
        int(block)
        for old, new in zip(before, engine.runner.kv, strict=True)
        for block in (old != new).flatten(1).any(dim=1).nonzero()
    }
    assert changed <= used | {spare}
    assert spare in changed


@pytest.mark.parametrize(
    ("sampled", "tokens", "expected"),
    [
        ([0, 1, 2], [7, 8, 9], [[7], [8], [9]]),  # decodes alone
        ([0, 2], [7, 9], [[7], [], [9]]),  # beside a prompt's chunk
        ([0, 1, 1, 1, 2], [7, 8, 5, REJECTED, 9], [[7], [8, 5], [9]]),  # beside drafts
        ([1, 1, 2], [8, REJECTED, 9], [[], [8], [9]]),  # as many tokens as rows, and not one each
    ],
)
def test_sampled_tokens_go_to_their_rows(sampled: list[int], tokens: list[int], expected: list[list[int]]) -> None:
    rows = [PlannedRow(Request(str(i), [0], GREEDY, seed=0, max_total_tokens=9), 0, 1, True) for i in range(3)]
    step = LaunchedStep(StepPlan(rows), torch.tensor(tokens), sampled, None, (), {}, None)
    assert step.wait().token_ids == expected


def arrays(*query_lens: int, samples: bool = True, num_drafts: int = 0) -> RowArrays:
    """Rows of so many tokens."""
    rows = []
    for slot, length in enumerate(sorted(query_lens)):
        request = Request(str(slot), [0] * length, GREEDY, seed=0, max_total_tokens=length + 1)
        request.slot = slot
        rows.append(PlannedRow(request, 5, length, samples, (0,) * min(num_drafts, length - 1)))
    return RowArrays.of(rows)


@pytest.mark.parametrize("limit", [1, 3, 16, 100, 300])
def test_there_is_a_shape_for_every_number_of_decodes_without_much_padding(limit: int) -> None:
    shapes = StepShapes(limit)
    for num_rows in range(1, limit + 1):
        shape = shapes.find(arrays(*[1] * num_rows), Choice.LIKELIEST)
        assert shape is not None
        assert shape.num_rows == shape.num_tokens == shape.num_logits <= limit
        assert 0 <= shape.num_rows - num_rows <= max(7, num_rows // 4)
    assert shapes.find(arrays(*[1] * (limit + 1)), Choice.LIKELIEST) is None


def test_there_is_a_shape_for_a_few_prompts_beside_decodes() -> None:
    shapes = StepShapes(256)
    shape = shapes.find(arrays(*[1] * 100, 30, 50), Choice.DRAWN)
    assert shape is not None
    assert (shape.num_decodes, shape.num_longer, shape.num_longer_tokens) == (128, 4, 128)
    assert shape.choice is Choice.DRAWN
    assert shapes.find(arrays(*[1] * 100, 600), Choice.LIKELIEST) is None, "large steps need no graph"
    assert shapes.find(arrays(*[1] * 100, 2, 2, 2, 2, 2), Choice.LIKELIEST) is None
    assert shapes.find(arrays(*[1] * 257, 2), Choice.LIKELIEST) is None


def test_there_is_a_shape_for_a_few_prompts_alone() -> None:
    shape = StepShapes(256).find(arrays(200, 56), Choice.LIKELIEST)
    assert shape is not None
    assert (shape.num_decodes, shape.num_longer, shape.num_tokens) == (0, 4, 256)


def test_prompts_beside_decodes_fill_whole_tiles() -> None:
    shapes = StepShapes(256)
    for num_decodes in (0, 8, 60, 100, 250):
        for num_tokens in range(2, StepShapes.MAX_PROMPT_TOKENS + 1, 10):
            shape = shapes.find(arrays(*[1] * num_decodes, num_tokens), Choice.LIKELIEST)
            assert shape is not None
            assert shape.num_tokens in StepShapes.WHOLE_TILES or shape.num_longer_tokens == StepShapes.MAX_PROMPT_TOKENS
            assert shape.num_tokens - num_decodes - num_tokens < 192


def test_there_is_a_shape_for_any_number_of_drafts_a_row() -> None:
    shapes = StepShapes(256, max_row_tokens=5)
    for query_lens, expected in (
        ([2], (1, 2)),
        ([5], (1, 5)),
        ([1, 2, 4], (4, 8)),
        ([5] * 4 + [1] * 28, (32, 64)),  # few sequences with drafts beside many without: no room for all to have some
        ([1] * 100 + [5] * 4, (128, 256)),
        ([5] * 128, (128, 640)),
    ):
        shape = shapes.find(arrays(*query_lens, num_drafts=4), Choice.DRAWN)
        assert shape is not None
        assert (shape.num_rows, shape.num_tokens) == expected
        assert shape.num_logits == shape.num_tokens
        assert (shape.max_query_len, shape.choice) == (5, Choice.DRAWN)
    assert shapes.find(arrays(*[5] * 256, num_drafts=4), Choice.LIKELIEST) is None, "large steps need no graph"
    assert shapes.find(arrays(1, 2, 9, num_drafts=3), Choice.LIKELIEST) is None, "not beside a prompt"


def test_short_rows_need_no_drafts() -> None:
    shape = StepShapes(8, max_row_tokens=2).find(arrays(1, 2, 2), Choice.LIKELIEST)
    assert shape is not None
    assert (shape.num_rows, shape.num_tokens) == (4, 8)


def test_rows_that_decide_no_token_are_no_decodes() -> None:
    assert StepShapes(8).find(arrays(1, 1, samples=False), Choice.LIKELIEST) is None


def test_the_usual_shapes_come_largest_first() -> None:
    sizes = [shape.num_tokens for shape in StepShapes(256).usual()]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) == 256 + 512
