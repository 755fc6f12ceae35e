"""The product for Hopper, whose Gluon no interpreter runs: its Python is run with threads for its warps and programs.

What the compiler does with layouts is not covered; ``tests/gpu/test_hopper_dense.py`` is for that.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from tests.gluon import Emulator, Pointer

pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")

from octavo_kernels import hopper_dense
from octavo_kernels.hopper_dense import STEP, DenseTiling


@pytest.mark.parametrize(
    ("tile", "num_tokens", "in_features", "out_features", "num_programs"),
    [
        (DenseTiling(64, 2, 16, 2), 9, 192, 128, 1),  # one program and more steps than stages
        (DenseTiling(64, 2, 64, 3), 50, 640, 300, 4),  # tiles of two programs; rows beyond the end
        (DenseTiling(128, 2, 128, 3), 130, 1000, 200, 5),  # two tiles of tokens; inputs beyond the end
        (DenseTiling(64, 2, 256, 3), 250, 640, 300, 9),  # every tile of several programs
        (DenseTiling(64, 3, 256, 2), 256, 640, 500, 7),  # three groups
    ],
    ids=str,
)
@pytest.mark.parametrize("with_bias", [False, True])
def test_multiplies_with_warps_and_programs_as_threads(
    monkeypatch: pytest.MonkeyPatch,
    tile: DenseTiling,
    num_tokens: int,
    in_features: int,
    out_features: int,
    num_programs: int,
    with_bias: bool,
) -> None:
    random.seed(0)
    x, weight, bias = (
        torch.randn(num_tokens, in_features),
        torch.randn(out_features, in_features),
        torch.randn(out_features),
    )
    num_steps = -(-in_features // STEP)
    num_tiles = tile.num_tiles(num_tokens, out_features)
    out = torch.full((num_tokens * out_features,), float("nan"))
    parts = torch.full((num_programs * tile.num_groups * tile.rows * tile.block_m,), float("nan"))
    arrivals = torch.zeros(num_tiles * tile.num_groups, dtype=torch.int32)
    emulator = Emulator()
    emulator.replace(hopper_dense, monkeypatch)
    kernel: Any = hopper_dense._product
    emulator.run_together(
        kernel, num_programs, Pointer(out), Pointer(parts), Pointer(arrivals), x, weight, Pointer(bias), num_tokens,
        out_features, num_tiles * num_steps, num_steps, -(-num_tokens // tile.block_m), tile.rows, tile.num_groups,
        tile.block_m, tile.num_stages, 0, 0, with_bias, False, False,
    )  # fmt: skip
    expected = x @ weight.T + (bias if with_bias else 0.0)
    torch.testing.assert_close(out.view_as(expected), expected, atol=1e-4, rtol=1e-4)
    assert not arrivals.any()  # as the next call wants them
