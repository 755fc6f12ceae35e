"""The prefill kernel for Hopper, whose Gluon no interpreter runs: its Python is run here with threads for its warps.

What stands in for the language keeps the rules by which such a kernel goes wrong: barriers with phases, copies that
arrive late and in any order over memory that holds no numbers until then, products that read shared memory only when
they are waited for, tiles that lie in shared memory in two halves. What the compiler does with layouts is not covered;
``tests/gpu/test_hopper_attention.py`` is for that.
"""

from __future__ import annotations

import itertools
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
from tests.paging import RaggedQueries
from torch import Tensor

from octavo.interfaces import AttentionNeed
from octavo_kernels import hopper_attention
from octavo_kernels.attention import LOG2_E, paged_attention_reference
from octavo_kernels.hopper_backend import HopperAttention

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

    def __add__(self, offsets: Tensor) -> Pointer:
        return Pointer(self.memory, self.offsets + offsets)


def load(pointer: Pointer, mask: Tensor | None = None, other: float = 0.0, cache_modifier: str | None = None) -> Tensor:
    if mask is None:
        assert bool((pointer.offsets >= 0).all())
        return pointer.memory[pointer.offsets]
    offsets, mask = torch.broadcast_tensors(pointer.offsets, mask)
    return torch.where(mask, pointer.memory[torch.where(mask, offsets, 0)], other).to(pointer.memory.dtype)


def store(pointer: Pointer, value: Any, mask: Tensor | None = None) -> None:
    value = torch.as_tensor(value, dtype=pointer.memory.dtype)
    mask = torch.ones_like(pointer.offsets, dtype=torch.bool) if mask is None else mask
    offsets, mask, value = torch.broadcast_tensors(pointer.offsets, mask, value)
    pointer.memory[offsets[mask]] = value[mask]


def atomic_add(pointer: Pointer, value: int, sem: str) -> Tensor:
    before = pointer.memory[pointer.offsets].clone()
    pointer.memory[pointer.offsets] += value
    return before


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
        value = value.T if self.transposed else value
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


MBARRIER = SimpleNamespace(
    MBarrierLayout=lambda: "barriers",
    init=lambda barrier, count: barrier.init(count),
    wait=lambda barrier, parity: barrier.wait(parity),
    expect=lambda barrier, num_bytes: barrier.arrive(num_bytes),
    arrive=lambda barrier, pred=True: barrier.arrive() if pred else None,
)
"""What kernels call on them, in place of Gluon's module."""


@dataclass
class Product:
    """A matrix product under way: it reads its operands when it is waited for."""

    compute: Callable[[], Tensor]
    result: Tensor | None = None

    def finish(self) -> None:
        if self.result is None:
            self.result = self.compute()


class Emulator:
    """The names of Gluon that the kernel uses."""

    def __init__(self) -> None:
        self._program = threading.local()
        self._grid: tuple[int, ...] = (1, 1)

    def run(self, kernel: Callable[..., None], grid: tuple[int, ...], *args: object, **constants: object) -> None:
        """Programs run one after the other, in any order."""
        self._grid = grid
        programs = list(itertools.product(*map(range, grid)))
        random.shuffle(programs)
        for self._program.ids in programs:
            kernel(*args, **constants)

    def stand_in(self, monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> None:
        """Put itself in place of Gluon in these modules, whose functions lose their compiler."""
        for module in modules:
            functions = {
                name: value.fn
                for name, value in vars(module).items()
                if isinstance(value, hopper_attention.gluon._runtime.GluonJITFunction)
            }
            for name, value in {**self.names(), **functions}.items():
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, value)

    def names(self) -> dict[str, Any]:
        """What to put in place of the module's names."""
        layout = SimpleNamespace
        gl = SimpleNamespace(
            float32=torch.float32, int32=torch.int32, int64=torch.int64, load=load, store=store, atomic_add=atomic_add,
            static_range=range,
            exp2=torch.exp2, where=torch.where, zeros_like=torch.zeros_like,
            program_id=lambda axis: _scalar(self._program.ids[axis]),
            num_programs=lambda axis: _scalar(self._grid[axis]),
            arange=lambda begin, end, layout: torch.arange(begin, end),
            zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
            full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
            maximum=lambda x, y: torch.maximum(torch.as_tensor(x), torch.as_tensor(y)),
            minimum=lambda x, y: torch.minimum(torch.as_tensor(x), torch.as_tensor(y)),
            max=lambda x, axis: x.amax(axis), sum=lambda x, axis: x.sum(axis), cdiv=lambda x, y: (x + y - 1) // y,
            convert_layout=lambda x, layout: x, thread_barrier=lambda: None,
            allocate_shared_memory=self._allocate, warp_specialize=self._specialize,
            SliceLayout=lambda *_: None, DotOperandLayout=lambda *_: None,
            BlockedLayout=lambda *_: None, NVMMASharedLayout=lambda **_: layout(),
            NVMMADistributedLayout=lambda **_: layout(),
        )  # fmt: skip
        return {
            "gl": gl,
            "mbarrier": MBARRIER,
            "tma": SimpleNamespace(async_copy_global_to_shared=self._copy),
            "warpgroup_mma": self._multiply,
            "warpgroup_mma_init": lambda value: value,
            "warpgroup_mma_wait": self._wait,
            "fence_async_shared": lambda: None,
        }

    def _allocate(self, dtype: torch.dtype, shape: list[int], layout: object) -> Shared | Barriers:
        if layout == "barriers":
            return Barriers(shape[0])
        return Shared(torch.full((torch.Size(shape).numel(),), float("nan"), dtype=dtype), tuple(shape))

    def _copy(self, source: Tensor, at: list[Any], barrier: Barrier, target: Shared) -> None:
        """In a thread of its own, some time later; until then the target holds no numbers."""
        target.memory.fill_(float("nan"))
        row, column = (int(x) for x in at)
        assert 0 <= row <= source.shape[0] - target.shape[0]

        def arrive() -> None:
            time.sleep(random.random() * 2e-4)
            target.store(source[row : row + target.shape[0], column : column + 64])
            barrier.receive(target.memory.numel() * 2)  # float32 stands for 16 bits

        threading.Thread(target=arrive).start()

    def _multiply(self, a: Any, b: Shared, accumulator: Any, use_acc: bool = True, is_async: bool = False) -> Product:
        assert is_async

        def compute() -> Tensor:
            left = a.load() if isinstance(a, Shared) else a
            product = left.float() @ b.load().float()
            return accumulator + product if use_acc else product

        product = Product(compute)
        self._program.running = [*getattr(self._program, "running", []), product]
        return product

    def _wait(self, num_outstanding: int, deps: list[Any]) -> Any:
        running = self._program.running
        done, self._program.running = (
            running[: len(running) - num_outstanding],
            running[len(running) - num_outstanding :],
        )
        time.sleep(random.random() * 2e-3)
        for product in done:
            product.finish()
        results = [dep.result if isinstance(dep, Product) else dep for dep in deps]
        assert not any(result is None for result in results), "used before it was waited for"
        return results[0] if len(results) == 1 else tuple(results)

    def _specialize(self, parts: list[tuple[Callable[..., None], tuple[Any, ...]]], *_: object) -> None:
        def run(part: Callable[..., None], args: tuple[Any, ...]) -> None:
            part(*args)
            assert not getattr(self._program, "running", []), "a product was never waited for"

        with ThreadPoolExecutor(len(parts)) as threads:
            for done in [threads.submit(run, *part) for part in parts]:
                done.result()


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 1), (2, 2), (7, 1)], ids=str)
@pytest.mark.parametrize(
    "rows",
    [
        [(70, 70)],
        [(40, 300)],
        [(128, 128), (1, 1), (33, 161)],
        [(1, 0), (90, 700), (5, 0), (64, 256)],
        [(32, 544)],
    ],
    ids=str,
)
def test_attends_with_warps_as_threads(
    monkeypatch: pytest.MonkeyPatch, rows: list[tuple[int, int]], num_heads: int, num_kv_heads: int
) -> None:
    """Rows are (query length, context length); whatever no sequence holds is no number."""
    random.seed(0)
    block_size, head_dim = 16, 128
    batch = RaggedQueries.make(
        rows,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    out = torch.full((batch.query.numel(),), float("nan"))

    emulator = Emulator()
    emulator.stand_in(monkeypatch, hopper_attention)
    group = num_heads // num_kv_heads
    num_tiles = len(batch.query) // (hopper_attention.BLOCK_M // group) + len(rows)
    scale = head_dim**-0.5
    emulator.run(
        hopper_attention._prefill_attention, (num_kv_heads, num_tiles), Pointer(out), Pointer(batch.query.flatten()),
        batch.spoiled.view(-1, head_dim), *(Pointer(part.long().flatten()) for part in batch.rows),
        batch.block_tables.stride(0), _scalar(0), len(rows), scale * LOG2_E, 0.5, num_kv_heads, group, head_dim,
        block_size, hopper_attention.BLOCK_M, hopper_attention.BLOCK_N, hopper_attention.STAGES, 0, 0, False,
    )  # fmt: skip
    reference = paged_attention_reference(batch.query, batch.kv, *batch.rows, scale=scale, value_scale=0.5)
    torch.testing.assert_close(out.view_as(reference), reference, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_rows", [1, 3, 128, 129, 300])
def test_each_tile_finds_its_row(monkeypatch: pytest.MonkeyPatch, num_rows: int) -> None:
    Emulator().stand_in(monkeypatch, hopper_attention)
    pick, first_row, tokens = random.Random(0), 2, 32
    starts = torch.tensor([0] + [pick.choice([1, 31, 32, 33, 100]) for _ in range(first_row + num_rows)]).cumsum(0)
    mine = starts[first_row:]
    begins = [int(start - mine[0]) // tokens + row for row, start in enumerate(mine[:-1])]
    for tile in range(begins[-1] + 2):
        expected = first_row + sum(begin <= tile for begin in begins) - 1
        found = hopper_attention._find_row(tile, mine[0], Pointer(starts), first_row, num_rows, tokens)
        assert int(found) == expected


def test_it_says_what_it_is_missing() -> None:
    need = AttentionNeed(torch.device("cpu"), torch.float32, torch.float32, 4, 64, 4, 2, window=True)
    reasons = "\n".join(HopperAttention.missing(need))
    for reason in ("CUDA", "head_dim must be 128", "blocks must be of", "windows"):
        assert reason in reasons
