"""Products that gate their own output, whose Gluon no interpreter runs: its Python is run here with threads for warps.

``tests/gpu`` is for what the compiler makes of layouts.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")

from tests.kernels.triton import test_hopper_attention as emulation

from octavo.operations import LinearNeed
from octavo_kernels import hopper_gated
from octavo_kernels.activation import silu_and_mul_reference
from octavo_kernels.hopper_gated import HopperLinear

NUM_PROGRAMS = 3


class Emulator(emulation.Emulator):
    """The names of Gluon that the kernel uses; programs run one after the other."""

    def names(self) -> dict[str, Any]:
        names = super().names()
        gl = names["gl"]
        gl.program_id, gl.num_programs = lambda axis: self._grid_index, lambda axis: NUM_PROGRAMS
        gl.where = lambda condition, a, b: a if condition else b
        gl.minimum = min
        gl.exp = torch.exp
        gl.split = lambda x: (x[..., 0], x[..., 1])
        gl.NVMMASharedLayout = gl.NVMMADistributedLayout = lambda *_: None
        return names

    def run_all(self, kernel: Callable[..., None], *args: object, **constants: object) -> None:
        for self._grid_index in range(NUM_PROGRAMS):
            kernel(*args, **constants)

    def _multiply(
        self, a: Any, b: Any, accumulator: Any, use_acc: bool = True, is_async: bool = False
    ) -> emulation.Product:
        """Onto sums that may still be under way."""
        product = super()._multiply(a, b, 0.0, is_async=is_async)
        compute = product.compute

        def onto() -> Tensor:
            sums = accumulator.result if isinstance(accumulator, emulation.Product) else accumulator
            return sums + compute() if use_acc else compute()

        product.compute = onto
        return product

    def _wait(self, num_outstanding: int, deps: list[Any]) -> Any:
        if num_outstanding == 0:
            return super()._wait(0, deps)
        running = self._program.running
        for product in running[:-num_outstanding]:
            product.finish()
        self._program.running = running[-num_outstanding:]
        return deps[0]

    def _copy(self, source: Tensor, at: list[Any], barrier: Any, target: Any) -> None:
        """Late; rows beyond the end are zeros."""
        target.memory.fill_(float("nan"))
        row, column = (int(x) for x in at)

        def arrive() -> None:
            time.sleep(random.random() * 2e-4)
            tile = torch.zeros(target.shape)
            there = source[row : row + target.shape[0], column : column + 64]
            tile[: len(there)] = there
            target.store(tile)
            barrier.receive(target.memory.numel() * 2)  # float32 stands for 16 bits

        threading.Thread(target=arrive).start()


@pytest.mark.parametrize(
    ("num_tokens", "size", "num_in", "num_parts"),
    [(300, 256, 128, 2), (128, 384, 192, 2), (17, 128, 640, 2), (400, 256, 128, 3), (17, 128, 320, 3)],
)
def test_multiplies_and_gates_with_warps_as_threads(
    monkeypatch: pytest.MonkeyPatch, num_tokens: int, size: int, num_in: int, num_parts: int
) -> None:
    random.seed(0)
    x, weight = torch.randn(num_tokens, num_in), torch.randn(2 * size, num_in) * num_in**-0.5
    out = torch.full((num_tokens * size,), float("nan"))
    emulator = Emulator()
    emulator.stand_in(monkeypatch, hopper_gated)
    emulator.run_all(
        hopper_gated._multiply_gated, emulation.Pointer(out), x, weight, num_tokens, size,
        -(-num_tokens // (num_parts * 64)), num_parts, 64, hopper_gated.BLOCK_N, hopper_gated.STEP,
        num_in // hopper_gated.STEP, 3, 2, 0, 0, 0,
    )  # fmt: skip
    torch.testing.assert_close(out.view(num_tokens, size), silu_and_mul_reference(x @ weight.T), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("token_tiles", "output_tiles", "neighbours"), [(1, 5, 8), (7, 3, 2), (16, 9, 8)])
def test_every_tile_has_its_place(
    monkeypatch: pytest.MonkeyPatch, token_tiles: int, output_tiles: int, neighbours: int
) -> None:
    monkeypatch.setattr(hopper_gated, "gl", SimpleNamespace(minimum=min))
    count = token_tiles * output_tiles
    places = [hopper_gated._place.fn(tile, token_tiles, output_tiles, neighbours) for tile in range(count)]
    assert set(places) == {(m, n) for m in range(token_tiles) for n in range(output_tiles)}
    assert len({n for _, n in places[: min(neighbours, token_tiles)]}) == 1  # neighbours share their weights


class Recording(HopperLinear):
    """Says which way a product took."""

    def __init__(self, num_in: int, num_out: int, bias: bool = False) -> None:
        need = LinearNeed(torch.device("cpu"), torch.float32, num_in, num_out)
        super().__init__(need, torch.randn(num_out, num_in), torch.randn(num_out) if bias else None)


def test_only_many_tokens_are_gated_by_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper_gated, "multiply_gated", lambda x, weight, tile: silu_and_mul_reference(x @ weight.T))
    layer = Recording(64, 512)
    num_processors = layer._device.num_processors
    least = (HopperLinear.MIN_ROUNDS * num_processors // 2 - 1) * 128 + 1  # two tiles for each 128 tokens
    assert layer.apply_gated(torch.randn(least - 1, 64)) is None
    x = torch.randn(least, 64)
    gated = layer.apply_gated(x)
    assert gated is not None
    torch.testing.assert_close(gated, silu_and_mul_reference(layer.apply(x)))


@pytest.mark.parametrize(("num_in", "num_out", "bias"), [(64, 512, True), (72, 512, False), (64, 400, False)])
def test_what_does_not_fit_its_tiles_is_left_to_two_kernels(num_in: int, num_out: int, bias: bool) -> None:
    layer = Recording(num_in, num_out, bias)
    assert layer.apply_gated(torch.randn(10_000, num_in)) is None


def test_many_tokens_are_added_to_the_residual_by_the_product() -> None:
    layer = Recording(64, 32)
    for num_tokens, added in ((HopperLinear.MIN_ADDED - 1, False), (HopperLinear.MIN_ADDED, True)):
        x, residual = torch.randn(num_tokens, 64), torch.randn(num_tokens, 32)
        expected = residual + x @ layer.weight.T
        output = layer.apply_onto(x, residual)
        assert (output is None) == added
        torch.testing.assert_close(residual if output is None else residual + output, expected)


def test_a_bias_is_not_forgotten_beside_a_residual() -> None:
    layer = Recording(64, 32, bias=True)
    x, residual = torch.randn(HopperLinear.MIN_ADDED, 64), torch.zeros(HopperLinear.MIN_ADDED, 32)
    output = layer.apply_onto(x, residual)
    assert output is not None
    torch.testing.assert_close(output, layer.apply(x))
    assert not residual.any()


def test_it_says_what_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    need = LinearNeed(torch.device("cpu"), torch.float32, 64, 512, batch_invariant=True)
    reasons = "\n".join(HopperLinear.missing(need))
    assert "CUDA" in reasons
    assert "batch-invariant" in reasons
    monkeypatch.setattr("octavo_kernels.launch.triton.__version__", "3.9.0")
    assert "written for Triton 3.6, and this is 3.9.0" in "\n".join(HopperLinear.missing(need))
