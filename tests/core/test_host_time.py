"""What a step costs the host grows with the rows and no faster: counted in calls, which no other load disturbs."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import pytest

STEPS = 16  # every row fills a block in one of them


@pytest.fixture(scope="module")
def host() -> ModuleType:
    """The benchmark."""
    path = Path(__file__).parents[2] / "benchmarks" / "host.py"
    spec = importlib.util.spec_from_file_location("benchmark_host", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def calls_in_a_step(host: ModuleType, num_rows: int) -> Counter[str]:
    """Calls of Python and C functions in a decode step, by its part."""
    calls: Counter[str] = Counter()

    def watch(part: str, work: Callable[[], Any]) -> Any:
        def count(frame: FrameType, event: str, argument: object) -> None:
            calls[part] += event in ("call", "c_call")

        sys.setprofile(count)
        try:
            return work()
        finally:
            sys.setprofile(None)

    host.run(num_rows, STEPS, watch)
    return Counter({part: number // STEPS for part, number in calls.items()})


def test_calls_grow_with_rows_and_no_faster(host: ModuleType) -> None:
    few, many = calls_in_a_step(host, 32), calls_in_a_step(host, 128)
    for part in host.PARTS:
        assert many[part] <= 4.1 * few[part], part
    per_row = {part: (many[part] - few[part]) / 96 for part in host.PARTS}
    assert per_row["schedule"] <= 8, per_row
    assert per_row["launch"] <= 4, per_row
    assert per_row["settle"] <= 11, per_row
