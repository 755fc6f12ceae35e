"""What a forward pass tells those who build on the model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from octavo.layers.attention import ForwardContext


class Keeping:
    """Keeps what goes into layers 0 to 2."""

    layers = (0, 1, 2)

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def record(self, layer: int, hidden: Tensor, batch: object) -> None:
        self.seen.append(hidden)


def test_what_is_recorded_stays_while_the_residual_goes_on() -> None:
    recorder: Any = Keeping()
    nothing: Any = SimpleNamespace()
    context = ForwardContext(nothing, [], nothing, None, recorder=recorder)
    x, residual = torch.ones(2, 3), torch.full((2, 3), 2.0)
    context.record(0, x)
    context.record(1, x, residual)
    context.record(2, None, residual)
    context.record(3, x)
    x += 10
    residual += 10
    assert [float(hidden.mean()) for hidden in recorder.seen] == [1.0, 3.0, 2.0]
