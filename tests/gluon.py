"""Runs the Python of Gluon kernels for Hopper, which no interpreter does, with threads for their warps.

What stands in for the language keeps the rules by which such a kernel goes wrong: barriers with phases, copies that
arrive late and in any order over memory that holds no numbers until then, products that read shared memory only when
they are waited for, tiles that lie in shared memory in panels of 64 columns. What the compiler does with layouts is
not covered.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

PATIENCE = 10.0  # seconds until a barrier that nobody completes counts as a deadlock


def _scalar(value: int | float) -> Tensor:
    return torch.tensor(value)


@dataclass(frozen=True)
class Pointer:
    """An address in ``memory`` (flat) with its offsets."""

    memory: Tensor
    offsets: Tensor = field(default_factory=lambda: _scalar(0))

    @property
    def dtype(self) -> Any:
        return SimpleNamespace(element_ty=self.memory.dtype)

    def __add__(self, offsets: Tensor | int) -> Pointer:
        return Pointer(self.memory, self.offsets + offsets)


def load(pointer: Pointer, mask: Tensor | None = None, other: float = 0.0, cache_modifier: str = "") -> Tensor:
    if mask is None:
        assert bool((pointer.offsets >= 0).all())
        return pointer.memory[pointer.offsets]
    offsets, mask = torch.broadcast_tensors(pointer.offsets, mask)
    return torch.where(mask, pointer.memory[torch.where(mask, offsets, 0)], other).to(pointer.memory.dtype)


def store(pointer: Pointer, value: Tensor | int, mask: Tensor | bool = True) -> None:
    values = torch.as_tensor(value, dtype=pointer.memory.dtype)
    offsets, values, there = torch.broadcast_tensors(pointer.offsets, values, torch.as_tensor(mask))
    pointer.memory[offsets[there]] = values[there]


@dataclass(frozen=True)
class Shared:
    """Shared memory: tiles of ``shape`` in ``memory`` (flat), each as panels of 64 columns."""

    memory: Tensor
    shape: tuple[int, ...]
    transposed: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return self.memory.dtype

    def index(self, index: int | Tensor) -> Shared:
        assert 0 <= index < self.shape[0]
        size = self.memory.numel() // self.shape[0]
        return Shared(self.memory[int(index) * size :][:size], self.shape[1:])

    def _reinterpret(self, dtype: torch.dtype, shape: Sequence[int], layout: object) -> Shared:
        assert (dtype, torch.Size(shape).numel()) == (self.dtype, self.memory.numel())
        return Shared(self.memory, tuple(shape))

    def permute(self, order: tuple[int, int]) -> Shared:
        return Shared(self.memory, self.shape, transposed=True)

    @property
    def _panels(self) -> Tensor:
        rows, columns = self.shape
        return self.memory.view(columns // 64, rows, 64)

    def load(self, layout: object = None) -> Tensor:
        tile = self._panels.transpose(0, 1).reshape(self.shape).clone()
        return tile.T if self.transposed else tile

    def store(self, value: Tensor) -> None:
        self._panels.copy_(value.view(self.shape[0], -1, 64).transpose(0, 1))


class Barrier:
    """An mbarrier: a phase ends with the last arrival and the last byte."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._phase = 0

    def init(self, count: int) -> None:
        self._count = self._pending = count
        self._bytes = 0

    def arrive(self, num_bytes: int = 0) -> None:
        with self._changed:
            assert self._pending > 0
            self._pending -= 1
            self._bytes += num_bytes
            self._complete()

    def receive(self, num_bytes: int) -> None:
        with self._changed:
            self._bytes -= num_bytes
            self._complete()

    def _complete(self) -> None:
        if self._pending == 0 and self._bytes == 0:
            self._phase += 1
            self._pending = self._count
            self._changed.notify_all()

    def wait(self, parity: int | Tensor) -> None:
        time.sleep(random.random() * 1e-4)
        with self._changed:
            assert self._changed.wait_for(lambda: self._phase % 2 != int(parity), PATIENCE), "deadlock"


class Barriers:
    def __init__(self, count: int) -> None:
        self._barriers = [Barrier() for _ in range(count)]

    def index(self, index: int | Tensor) -> Barrier:
        return self._barriers[int(index)]


class Product:
    """A matrix product under way: it reads its operands when it is waited for."""

    def __init__(self, left: Shared | Tensor, right: Shared, accumulator: Product | Tensor | None) -> None:
        self._operands = left, right, accumulator
        self._result: Tensor | None = None

    def finish(self) -> None:
        left, right, accumulator = self._operands
        product = (left.load() if isinstance(left, Shared) else left).float() @ right.load().float()
        if accumulator is not None:
            product += accumulator.result if isinstance(accumulator, Product) else accumulator
        self._result = product

    @property
    def result(self) -> Tensor:
        assert self._result is not None, "used before it was waited for"
        return self._result


class Emulator:
    """The names of Gluon that the kernel uses."""

    def __init__(self) -> None:
        self._program = threading.local()
        self._grid: tuple[int, ...] = (1, 1)
        self._atomic = threading.Lock()

    def run(self, kernel: Callable[..., None], grid: tuple[int, int], *args: object) -> None:
        """One program after the other."""
        self._grid = grid
        for x in range(grid[0]):
            for y in range(grid[1]):
                self._run_program(kernel, (x, y), args)

    def run_together(self, kernel: Callable[..., None], num_programs: int, *args: object) -> None:
        """All programs at once: they may wait for each other."""
        self._grid = (num_programs,)
        with ThreadPoolExecutor(num_programs) as threads:
            programs = [threads.submit(self._run_program, kernel, (x,), args) for x in range(num_programs)]
            for done in programs:
                done.result()

    def _run_program(self, kernel: Callable[..., None], ids: tuple[int, ...], args: tuple[object, ...]) -> None:
        self._program.ids = ids
        kernel(*args)

    def replace(self, module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        """Put what stands in for Gluon in place of the names that ``module`` imports, and make its kernels callable."""
        kernels = {name: value.fn for name, value in vars(module).items() if hasattr(value, "fn")}
        for name, value in (self._names() | kernels).items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)

    def _names(self) -> dict[str, Any]:
        layout = SimpleNamespace
        gl = SimpleNamespace(
            float32=torch.float32, int1=torch.bool, int32=torch.int32, int64=torch.int64, load=load,
            store=store, static_range=range, exp2=torch.exp2, where=torch.where, zeros_like=torch.zeros_like,
            program_id=lambda axis: _scalar(self._program.ids[axis]),
            num_programs=lambda axis: _scalar(self._grid[axis]),
            arange=lambda begin, end, layout: torch.arange(begin, end),
            zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
            full=lambda shape, value, dtype, layout: torch.as_tensor(value).to(dtype).expand(shape),
            maximum=lambda x, y: torch.maximum(torch.as_tensor(x), torch.as_tensor(y)),
            minimum=lambda x, y: torch.minimum(torch.as_tensor(x), torch.as_tensor(y)),
            max=lambda x, axis: x.amax(axis), sum=lambda x, axis: x.sum(axis), cdiv=lambda x, y: (x + y - 1) // y,
            convert_layout=lambda x, layout, assert_trivial=False: x, thread_barrier=lambda: None,
            split=lambda x: x.unbind(-1), atomic_add=self._atomic_add,
            inline_asm_elementwise=lambda *_, **__: _scalar(0),
            allocate_shared_memory=self._allocate, warp_specialize=self._specialize,
            SliceLayout=lambda *_: None, DotOperandLayout=lambda *_: None,
            BlockedLayout=lambda *_: None, NVMMASharedLayout=lambda **_: layout(),
            NVMMADistributedLayout=lambda *_, **__: layout(),
        )  # fmt: skip
        return {
            "gl": gl,
            "mbarrier": SimpleNamespace(
                MBarrierLayout=lambda: "barriers",
                init=lambda barrier, count: barrier.init(count),
                wait=lambda barrier, parity: barrier.wait(parity),
                expect=lambda barrier, num_bytes: barrier.arrive(num_bytes),
                arrive=lambda barrier, pred=True: barrier.arrive() if pred else None,
            ),
            "tma": SimpleNamespace(async_copy_global_to_shared=self._copy),
            "warpgroup_mma": self._multiply,
            "warpgroup_mma_wait": self._wait,
            "fence_async_shared": lambda: None,
        }

    def _allocate(self, dtype: torch.dtype, shape: list[int], layout: object) -> Shared | Barriers:
        if layout == "barriers":
            return Barriers(shape[0])
        return Shared(torch.full((torch.Size(shape).numel(),), float("nan"), dtype=dtype), tuple(shape))

    def _copy(self, source: Tensor, at: list[Any], barrier: Barrier, target: Shared) -> None:
        """In a thread of its own, some time later; until then the target holds no numbers. Beyond the source's end
        there are zeros."""
        target.memory.fill_(float("nan"))
        row, column = (int(x) for x in at)
        assert row >= 0
        assert 0 <= column < source.shape[1]

        def arrive() -> None:
            time.sleep(random.random() * 2e-4)
            tile = torch.zeros(target.shape)
            part = source[row : row + target.shape[0], column : column + 64]
            tile[: part.shape[0], : part.shape[1]] = part
            target.store(tile)
            barrier.receive(target.memory.numel() * 2)  # float32 stands for 16 bits

        threading.Thread(target=arrive).start()

    def _multiply(self, a: Any, b: Shared, accumulator: Any, use_acc: bool = True, is_async: bool = False) -> Product:
        assert is_async
        product = Product(a, b, accumulator if use_acc else None)
        self._program.running = [*getattr(self._program, "running", []), product]
        return product

    def _wait(self, num_outstanding: int, deps: list[Product]) -> Product | Tensor:
        """The result, or the product where it is still among those that nobody waited for."""
        running = self._program.running
        num_done = max(0, len(running) - num_outstanding)
        time.sleep(random.random() * 2e-3)
        for product in running[:num_done]:
            product.finish()
        self._program.running = running[num_done:]
        return deps[0] if deps[0] in self._program.running else deps[0].result

    def _atomic_add(self, pointer: Pointer, value: int, sem: str) -> Tensor:
        with self._atomic:
            before = load(pointer).clone()
            store(pointer, before + value)
        return before

    def _specialize(self, parts: list[tuple[Callable[..., None], tuple[Any, ...]]], *_: object) -> None:
        def run(part: Callable[..., None], args: tuple[Any, ...]) -> None:
            part(*args)
            assert not getattr(self._program, "running", []), "a product was never waited for"

        with ThreadPoolExecutor(len(parts)) as threads:
            for done in [threads.submit(run, *part) for part in parts]:
                done.result()
