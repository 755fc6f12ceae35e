"""Products of 4-bit weights with many tokens, whose Gluon no interpreter runs: its Python is run here with threads for
its warps and programs, and registers are read as PTX describes them.

``tests/gpu`` is for what the compiler makes of layouts.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")

from tests.kernels.triton.test_hopper_attention import MBARRIER, Barriers, Pointer, Product, load, store
from tests.kernels.triton.test_hopper_linear import packed

from octavo_kernels import hopper_packed
from octavo_kernels.hopper_linear import pack_fragments, pack_parameters
from octavo_kernels.hopper_stream import first_unit, program_of

STAGES = 3


@dataclass(frozen=True)
class Shared:
    """Shared memory [number, …]."""

    memory: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.memory.dtype

    @property
    def shape(self) -> torch.Size:
        return self.memory.shape

    def index(self, index: int) -> Shared:
        assert 0 <= index < len(self.memory)
        return Shared(self.memory[int(index)])

    def slice(self, start: int, length: int, dim: int) -> Shared:
        assert start + length <= self.memory.shape[dim]
        return Shared(self.memory.narrow(dim, start, length))

    def permute(self, order: list[int]) -> Shared:
        return Shared(self.memory.permute(order))

    def load(self, layout: object) -> Tensor:
        return self.memory.clone()

    def _reinterpret(self, dtype: torch.dtype, shape: list[int], layout: object) -> Shared:
        assert torch.Size(shape).numel() == self.memory.numel()
        return Shared(self.memory.view(shape))


class Sums(Tensor):
    """Has the type that Gluon's tensors have."""

    type = SimpleNamespace(layout=None)  # type: ignore[assignment]


class Emulator:
    """The names of Gluon that the kernel uses."""

    def __init__(self, num_programs: int) -> None:
        self._num_programs = num_programs
        self._here = threading.local()  # program, products under way, copies that a barrier has not been told of
        self._lock = threading.Lock()

    def run(self, *args: object, **constants: object) -> None:
        def program(index: int) -> None:
            self._here.program = index
            hopper_packed._multiply_packed.fn(*args, **constants)

        with ThreadPoolExecutor(self._num_programs) as threads:
            list(threads.map(program, range(self._num_programs)))

    def names(self) -> dict[str, Any]:
        """What to put in place of the module's names."""
        gl = SimpleNamespace(
            float32=torch.float32, int32=torch.int32, int64=torch.int64, static_range=range, constexpr=int,
            where=lambda condition, a, b: a if condition else b, cdiv=lambda x, y: -(-x // y),
            program_id=lambda axis: self._here.program, num_programs=lambda axis: self._num_programs,
            arange=lambda begin, end, layout: torch.arange(begin, end),
            zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype).as_subclass(Sums),
            minimum=lambda x, y: torch.minimum(x, torch.tensor(y)) if isinstance(x, Tensor) else min(x, y),
            load=lambda *args, cache_modifier="", **kwargs: load(*args, **kwargs),
            store=lambda pointer, value, mask=None: store(
                pointer, torch.as_tensor(value), torch.tensor(True) if mask is None else mask
            ),
            atomic_add=self._atomic_add, inline_asm_elementwise=lambda *_, **__: 0,
            convert_layout=lambda x, layout, assert_trivial=True: x, thread_barrier=lambda: None,
            warp_specialize=self._specialize, allocate_shared_memory=self._allocate,
            SliceLayout=lambda *_: None, DotOperandLayout=lambda *_: None, NVMMASharedLayout=lambda *_: None,
            SwizzledSharedLayout=lambda *_: None, BlockedLayout=lambda *_: None, NVMMADistributedLayout=lambda *_: None,
        )  # fmt: skip
        return {
            "gl": gl,
            "mbarrier": MBARRIER,
            "tma": SimpleNamespace(async_copy_global_to_shared=self._copy_tile),
            "async_copy": SimpleNamespace(
                async_copy_global_to_shared=self._copy, mbarrier_arrive=self._arrive_when_copied
            ),
            "warpgroup_mma": self._multiply,
            "warpgroup_mma_wait": self._wait,
            "first_unit": first_unit.fn,
            "program_of": program_of.fn,
            "following": lambda tile, step, steps: (tile + 1, 0) if step == steps - 1 else (tile, step + 1),
            "operand": lambda weight, *_: weight,
            "int4_factor": lambda dtype: 1.0,
            "parameter": lambda shared, layout: shared.load(layout)[..., None, None],
            "widen_int4": self._widen,
            **dict.fromkeys(("fragment_layout", "output_layout", "_word_layout"), lambda *_: None),
            **{
                name: getattr(hopper_packed, name).fn
                for name in ("_run", "_copy_weights", "_copy_inputs", "_load", "_widen", "_finish", "_multiply")
            },
        }

    def _allocate(self, dtype: torch.dtype, shape: list[int], layout: object) -> Shared | Barriers:
        return Barriers(shape[0]) if layout == "barriers" else Shared(torch.zeros(shape, dtype=dtype))

    def _later(self, target: Tensor, arrive: Callable[[], None]) -> None:
        """In a thread of its own, some time later; until then the target holds nonsense."""
        target.fill_(-1 if target.dtype == torch.int32 else float("nan"))

        def run() -> None:
            time.sleep(random.random() * 2e-4)
            arrive()

        threading.Thread(target=run).start()

    def _copy_tile(self, source: Tensor, at: list[int], barrier: Any, shared: Shared) -> None:
        row, column = at
        target = shared.memory

        def arrive() -> None:
            there = source[row : row + len(target), column : column + target.shape[1]]
            target.zero_()
            target[: len(there)] = there
            barrier.receive(target.numel() * (4 if target.dtype == torch.int32 else 2))  # float32 stands for 16 bits

        self._later(target, arrive)

    def _copy(self, shared: Shared, pointer: Pointer) -> None:
        self._here.copied = (shared.memory, load(pointer))

    def _arrive_when_copied(self, barrier: Any) -> None:
        target, values = self._here.copied
        barrier.receive(-1)  # the phase cannot end before it

        def arrive() -> None:
            target.copy_(values)
            barrier.receive(1)

        self._later(target, arrive)

    def _atomic_add(self, pointer: Pointer, value: int, sem: str) -> int:
        time.sleep(1e-4)
        with self._lock:
            pointer.memory[pointer.offsets] += value
            return int(pointer.memory[pointer.offsets]) - value

    def _widen(self, word: Tensor, upper: Tensor, lower: Tensor, dtype: torch.dtype) -> list[Tensor | None]:
        """Registers of ``wgmma`` m64k16 by thread (PTX ISA, figure of matrix A) as [rows of fragments, 64]."""
        word, blocks = word.long(), len(word)  # block, warp, g, t, 16 inputs
        weight = torch.zeros(blocks, 4, 2, 8, 4, 2, 4, 2)  # block, warp, half of the rows, g, 16 inputs, half, t, pair
        for register in range(4):
            param = (upper, lower)[register % 2]
            scale, zero = (half.to(torch.int16).view(torch.float16).float() for half in (param, param >> 16))
            for of_pair in range(2):
                value = (word >> (4 * register + 16 * of_pair) & 15) + 1024 - zero
                weight[:, :, register % 2, :, :, register // 2, :, of_pair] = (value * scale).transpose(3, 4)
        return [weight.view(64 * blocks, 64), None, None, None]

    def _multiply(self, weight: Tensor, x: Shared, accumulator: Tensor, is_async: bool) -> Product:
        """Reads its operands when it is waited for."""
        assert is_async
        return Product(lambda: accumulator + weight @ x.memory)

    def _wait(self, num_outstanding: int, deps: list[Any]) -> list[Any]:
        assert num_outstanding == 0
        time.sleep(random.random() * 1e-3)
        deps[0].finish()
        return [deps[0].result, deps[1]]

    def _specialize(self, parts: list[tuple[Any, tuple[Any, ...]]], *_: object) -> None:
        program = self._here.program

        def run(part: Any, args: tuple[Any, ...]) -> None:
            self._here.program = program
            part(*args)

        with ThreadPoolExecutor(len(parts)) as threads:
            for done in [threads.submit(run, *part) for part in parts]:
                done.result()


@pytest.mark.parametrize("block_m", [64, 128])
@pytest.mark.parametrize(("num_in", "num_out", "group_size"), [(256, 72, 64), (768, 640, 128), (512, 264, 256)])
@pytest.mark.parametrize(("num_tokens", "num_programs"), [(40, 1), (130, 3), (64, 4)])
def test_multiplies_with_warps_as_threads(
    monkeypatch: pytest.MonkeyPatch, block_m: int, num_in: int, num_out: int, group_size: int, num_tokens: int,
    num_programs: int,
) -> None:  # fmt: skip
    random.seed(0)
    _, weight = packed(num_in, num_out, group_size)
    words = pack_fragments(weight.unpack()).view(-1, 32)
    params = pack_parameters(weight.scales, weight.zeros, torch.float16)
    x, bias = torch.randn(num_tokens, num_in), torch.randn(num_out)
    token_tiles, row_tiles = -(-num_tokens // block_m), -(-num_out // 128)
    num_programs = min(num_programs, row_tiles * token_tiles * num_in // 128)
    emulator = Emulator(num_programs)
    for name, value in emulator.names().items():
        monkeypatch.setattr(hopper_packed, name, value)
    out = torch.full((num_tokens, num_out), float("nan"))
    partial = Pointer(torch.full((num_programs * 128 * block_m,), float("nan")))
    arrivals = Pointer(torch.zeros(2 * row_tiles * token_tiles, dtype=torch.int64))
    emulator.run(
        Pointer(out.view(-1)), partial, arrivals, x, words, Pointer(params.view(-1)), Pointer(bias), num_tokens,
        num_out, token_tiles, num_in, group_size, block_m, STAGES, True, 0, 0, False,
    )  # fmt: skip
    torch.testing.assert_close(out, x @ weight.dequantize(torch.float32).T + bias, atol=1e-2, rtol=1e-2)
    assert not arrivals.memory.any()
