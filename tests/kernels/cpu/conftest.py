"""The C kernels under test: skipped, with the reason, where they were not compiled."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from octavo_cpu.library import library_missing


@pytest.fixture(autouse=True)
def _compiled() -> None:
    if reasons := library_missing():
        pytest.skip(reasons[0])


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Runs a test with so many threads of torch's, which the kernels take over."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
