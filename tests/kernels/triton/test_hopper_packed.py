"""Products of 4-bit weights with many tokens, whose Gluon no interpreter runs: its Python is run here with threads for
its warps, and registers are read as PTX describes them.

``tests/gpu`` is for what the compiler makes of layouts, and for the sum of a tile that several programs share.
"""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")

from tests.kernels.triton.test_hopper_attention import Barriers, Pointer, Product, load
from tests.kernels.triton.test_hopper_linear import packed

from octavo_kernels import hopper_packed
from octavo_kernels.hopper_linear import pack_fragments, pack_parameters

STAGES = 3


class Tiles:
    """Shared memory: [number, rows, columns]."""

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory

    @property
    def dtype(self) -> torch.dtype:
        return self.memory.dtype

    def index(self, index: int) -> Tensor:
        return self.memory[int(index)]

    def _reinterpret(self, dtype: torch.dtype, shape: list[int], layout: object) -> Tiles:
        return Tiles(self.memory.view(shape))


class Emulator:
    """The names of Gluon that the kernel uses. Sums go to ``sums`` [tiles, 256, tokens of a tile]."""

    def __init__(self, num_tiles: int, block_m: int) -> None:
        self.sums = torch.zeros(num_tiles, 256, block_m)
        self.finished = torch.zeros(num_tiles, dtype=torch.int64)
        self._program = 0
        self._num_programs = 0
        self._running: list[Product] = []

    def run(self, num_programs: int, *args: object, **constants: object) -> None:
        self._num_programs = num_programs
        for self._program in range(num_programs):
            hopper_packed._multiply_packed.fn(*args, **constants)

    def names(self) -> dict[str, Any]:
        """What to put in place of the module's names."""
        gl = SimpleNamespace(
            float32=torch.float32, int32=torch.int32, int64=torch.int64, load=load, static_range=range,
            where=lambda condition, a, b: a if condition else b, cdiv=lambda x, y: -(-x // y),
            program_id=lambda axis: self._program, num_programs=lambda axis: self._num_programs,
            arange=lambda begin, end, layout: torch.arange(begin, end),
            zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
            minimum=lambda x, y: torch.minimum(x, torch.tensor(y)) if isinstance(x, Tensor) else min(x, y),
            thread_barrier=lambda: None, warp_specialize=self._specialize, allocate_shared_memory=self._allocate,
            SliceLayout=lambda *_: None, DotOperandLayout=lambda *_: None, NVMMASharedLayout=lambda *_: None,
            NVMMADistributedLayout=lambda *_: None, constexpr=int,
        )  # fmt: skip
        return {
            "gl": gl,
            "mbarrier": SimpleNamespace(
                MBarrierLayout=lambda: "barriers",
                init=lambda barrier, count: barrier.init(count),
                wait=lambda barrier, parity, pred=True: barrier.wait(parity) if pred else None,
                expect=lambda barrier, num_bytes: barrier.arrive(num_bytes),
                arrive=lambda barrier, pred=True: barrier.arrive() if pred else None,
            ),
            "tma": SimpleNamespace(async_copy_global_to_shared=self._copy),
            "warpgroup_mma": self._multiply,
            "warpgroup_mma_wait": self._wait,
            "_finish": self._finish,
            "first_unit": hopper_packed.first_unit.fn,
            "following": lambda tile, step, steps: (tile + 1, 0) if step == steps - 1 else (tile, step + 1),
            "operand": lambda weight, *_: weight,
            "_widen": self._widen,
            "_fragment_layout": lambda: None,
            **{
                name: getattr(hopper_packed, name).fn
                for name in ("_run", "_copy_words", "_copy_inputs", "_load", "_parameters", "_multiply")
            },
        }

    def _allocate(self, dtype: torch.dtype, shape: list[int], layout: object) -> Tiles | Barriers:
        return Barriers(shape[0]) if layout == "barriers" else Tiles(torch.zeros(shape, dtype=dtype))

    def _copy(self, source: Tensor, at: list[int], barrier: Any, target: Tensor) -> None:
        """In a thread of its own, some time later; until then the target holds nonsense."""
        target.fill_(-1 if target.dtype == torch.int32 else float("nan"))
        row, column = at

        def arrive() -> None:
            time.sleep(random.random() * 2e-4)
            there = source[row : row + len(target), column : column + target.shape[1]]
            target.zero_()
            target[: len(there)] = there
            barrier.receive(target.numel() * (4 if target.dtype == torch.int32 else 2))  # float32 stands for 16 bits

        threading.Thread(target=arrive).start()

    def _widen(self, words: Tensor, upper: Tensor, lower: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """Registers of ``wgmma`` m64k16 by thread (PTX ISA, figure of matrix A) as [256 rows of fragments, 64]."""
        word = words.view(4, 4, 8, 4, 4).long()  # block, warp, g, t, 16 inputs
        weight = torch.zeros(4, 4, 2, 8, 4, 2, 4, 2)  # block, warp, half of the rows, g, 16 inputs, their half, t, pair
        for register in range(4):
            param = (upper, lower)[register % 2]
            scale, zero = (half.to(torch.int16).view(torch.float16).float() for half in (param, param >> 16))
            for of_pair in range(2):
                value = (word >> (4 * register + 16 * of_pair) & 15) + 1024 - zero[..., None, None]
                value = (value * scale[..., None, None]).permute(0, 1, 2, 4, 3)
                weight[:, :, register % 2, :, :, register // 2, :, of_pair] = value
        return [weight.view(256, 64), None, None, None]

    def _multiply(self, weight: Tensor, x: Tensor, accumulator: Any, is_async: bool) -> Product:
        """Reads its operands when it is waited for."""
        assert is_async
        product = Product(
            lambda: (accumulator.result if isinstance(accumulator, Product) else accumulator) + weight @ x
        )
        self._running.append(product)
        return product

    def _wait(self, num_outstanding: int, deps: list[Any]) -> list[Any]:
        """Sums stay under way where a product is still outstanding."""
        time.sleep(random.random() * 1e-3)
        while len(self._running) > num_outstanding:
            self._running.pop(0).finish()
        sums, weight = deps
        return [sums.result if isinstance(sums, Product) and sums.result is not None else sums, weight]

    def _finish(self, acc: Tensor, tile: int, *_: object) -> None:
        # rows g and g + 8 of a fragment are outputs 2 g and 2 g + 1
        self.sums[tile] += acc.view(16, 2, 8, -1).transpose(1, 2).reshape(256, -1)
        self.finished[tile] += 1

    def _specialize(self, parts: list[tuple[Any, tuple[Any, ...]]], *_: object) -> None:
        with ThreadPoolExecutor(len(parts)) as threads:
            for done in [threads.submit(part, *args) for part, args in parts]:
                done.result()
        assert not self._running, "a product was never waited for"


@pytest.mark.parametrize(("num_in", "num_out", "group_size"), [(256, 72, 64), (768, 640, 128), (512, 264, 256)])
@pytest.mark.parametrize(("num_tokens", "num_programs"), [(40, 1), (130, 3), (64, 4)])
def test_multiplies_with_warps_as_threads(
    monkeypatch: pytest.MonkeyPatch, num_in: int, num_out: int, group_size: int, num_tokens: int, num_programs: int
) -> None:
    random.seed(0)
    block_m = 64
    _, weight = packed(num_in, num_out, group_size)
    words = pack_fragments(weight.unpack()).view(-1, 32)
    params = pack_parameters(weight.scales, weight.zeros, torch.float16)
    x = torch.randn(num_tokens, num_in)
    token_tiles, row_tiles = -(-num_tokens // block_m), -(-num_out // 256)
    num_programs = min(num_programs, row_tiles * token_tiles * num_in // 128)
    emulator = Emulator(row_tiles * token_tiles, block_m)
    for name, value in emulator.names().items():
        monkeypatch.setattr(hopper_packed, name, value)
    none = Pointer(torch.zeros(1))
    emulator.run(
        num_programs, none, none, none, x, words, Pointer(params.view(-1)), none, num_tokens, num_out, token_tiles,
        num_in, group_size, block_m, STAGES, False, 0, False,
    )  # fmt: skip
    assert emulator.finished.min() >= 1
    assert emulator.finished.sum() <= row_tiles * token_tiles + num_programs - 1
    sums = emulator.sums.view(row_tiles, token_tiles, 256, block_m).permute(1, 3, 0, 2)
    y = sums.reshape(token_tiles * block_m, -1)[:num_tokens, :num_out]
    torch.testing.assert_close(y, x @ weight.dequantize(torch.float32).T, atol=1e-2, rtol=1e-2)
