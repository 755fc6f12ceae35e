"""Drafting and verifying as CUDA graphs take them: padding and rows of different lengths change nothing.

There is no device here: what would be captured is run again, with inputs in the same buffers.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings
from tests.core.test_runner import DeviceLengths, Rerun
from tests.plugins.speculative.conftest import Erratic, Models, make_config, make_engine, run
from tests.plugins.speculative.test_eagle import save_head
from tests.plugins.speculative.test_equivalence import make_requests, sampling

import octavo.runner
import octavo.startup
from octavo import SpeculativeConfig
from octavo.runner import Runner
from octavo.speculation import Speculation


@pytest.fixture(scope="module")
def graphs() -> Iterator[None]:
    def runner(model: Any, backend: Any, *args: Any, **options: Any) -> Runner:
        backend.__class__ = DeviceLengths
        return Runner(model, backend, *args, **{**options, "use_graphs": True})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(octavo.runner, "StepGraphs", Rerun)
        patch.setattr(octavo.startup, "Runner", runner)
        yield


@pytest.fixture(scope="module")
def eagle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_head(tmp_path_factory.mktemp("head"), "eagle")


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    drafter=st.sampled_from(["same", "noisy", "ngram", "eagle"]),
    seed=st.integers(0, 1000),
    num_requests=st.integers(1, 6),
    num_tokens=st.integers(1, 4),
    overlap=st.booleans(),
    params=sampling,
)
def test_graphs_change_nothing(
    graphs: None,
    models: Models,
    eagle: Path,
    drafter: str,
    seed: int,
    num_requests: int,
    num_tokens: int,
    overlap: bool,
    params: dict[str, Any],
) -> None:
    speculative = SpeculativeConfig(
        method=drafter if drafter in ("ngram", "eagle") else "draft-model",
        model=None if drafter == "ngram" else str(eagle if drafter == "eagle" else models.drafts[drafter]),
        num_tokens=num_tokens,
        fixed=True,
    )
    requests = make_requests(seed, num_requests, **params)
    bad = [[5], [7, 9]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(octavo.startup, "Runner", Runner)
        plain = run(make_engine(make_config(models)), requests, bad)
    for output in plain.outputs.values():
        output.logprobs = pytest.approx(output.logprobs, abs=1e-3)
    engine = make_engine(make_config(models, speculative, overlap=overlap))
    assert isinstance(engine._speculation, Speculation)
    engine._speculation._controller = Erratic(num_tokens, seed)
    assert run(engine, requests, bad).outputs == plain.outputs


@pytest.mark.parametrize("drafter", ["same", "eagle"])
def test_every_draft_but_the_first_of_a_prompt_comes_from_a_graph(
    graphs: None, models: Models, eagle: Path, drafter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    speculative = SpeculativeConfig(
        method="eagle" if drafter == "eagle" else "draft-model",
        model=str(eagle if drafter == "eagle" else models.drafts[drafter]),
        num_tokens=3,
        fixed=True,
    )
    engine = make_engine(make_config(models, speculative))
    runner = engine._speculation._drafter._runner  # type: ignore[attr-defined]
    eager: list[int] = []
    batch = runner._batch
    monkeypatch.setattr(runner, "_batch", lambda rows: eager.append(len(rows.slots)) or batch(rows))
    requests = make_requests(3, 4, temperature=0.0, max_tokens=30, ignore_eos=True)
    guessed = run(engine, requests)
    assert guessed.num_draft_tokens > 60
    assert sum(eager) <= len(requests)
