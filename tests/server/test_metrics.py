"""What steps report is what ``/metrics`` shows."""

from __future__ import annotations

import pytest

from octavo.messages import StepStats
from octavo.server.metrics import Metrics


def value(metrics: Metrics, name: str, **labels: str) -> float:
    found = metrics.registry.get_sample_value(f"octavo:spec_decode_{name}", {"model_name": "m", **labels})
    assert found is not None, name
    return found


def test_speculation_is_counted() -> None:
    metrics = Metrics("m")
    metrics.step(
        StepStats(
            num_drafts=4, num_draft_tokens=12, num_accepted_tokens=6, accepted_per_position=[3, 2, 1], seconds_saved=0.5
        )
    )
    metrics.step(StepStats(num_output_tokens=4))  # without drafts
    metrics.step(
        StepStats(
            num_drafts=2, num_draft_tokens=6, num_accepted_tokens=0, accepted_per_position=[0, 0, 0], seconds_saved=-0.2
        )
    )
    assert value(metrics, "num_drafts_total") == 6
    assert value(metrics, "num_draft_tokens_total") == 18
    assert value(metrics, "num_accepted_tokens_total") == 6
    accepted = [value(metrics, "num_accepted_tokens_per_pos_total", position=str(place)) for place in range(3)]
    assert accepted == [3, 2, 1]
    assert value(metrics, "acceptance_length") == pytest.approx(2.0)  # six of six sequences, one more token each
    assert value(metrics, "seconds_saved") == pytest.approx(0.3)
