"""How long a kernel takes, and how long its bytes and operations need at least on the device at hand."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CPU_SECONDS = 0.05  # a measurement on a CPU lasts at least so long


def microseconds(device: torch.device, calls: Sequence[Callable[[], object]], repeats: int = 7) -> float:
    """The time of one of ``calls``, which run one after another: the median of ``repeats`` such rounds.

    On a GPU a CUDA graph replays them, so that launching costs nothing; calls that wait for the device are launched
    one by one.
    """
    if device.type != "cuda":
        return _cpu_time(calls, repeats)
    run = _captured(calls) or _in_turn(calls)
    begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    times: list[float] = []
    for _ in range(repeats + 2):
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize(device)
        times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times[2:])


def _in_turn(calls: Sequence[Callable[[], object]]) -> Callable[[], None]:
    def run() -> None:
        for call in calls:
            call()

    return run


def _captured(calls: Sequence[Callable[[], object]]) -> Callable[[], None] | None:
    """A graph of all calls; None if one of them waits for the device."""
    for call in {id(call): call for call in calls}.values():
        call()  # compiles and allocates what only a first call does
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        calls[0]()
    except RuntimeError:
        return None
    finally:
        torch.cuda.set_sync_debug_mode(before)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def _cpu_time(calls: Sequence[Callable[[], object]], repeats: int) -> float:
    def seconds(rounds: int) -> float:
        started = time.perf_counter()
        for _ in range(rounds):
            for call in calls:
                call()
        return (time.perf_counter() - started) / rounds

    seconds(1)
    rounds = max(1, round(CPU_SECONDS / repeats / seconds(1)))
    return statistics.median(seconds(rounds) for _ in range(repeats)) * 1e6 / len(calls)


def relative_error(value: Tensor, reference: Tensor) -> float:
    """‖value - reference‖ / ‖reference‖, in float32."""
    reference = reference.float()
    return float((value.float() - reference).norm() / reference.norm())


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the device reaches when it only reads, and when it only multiplies. Measured, not from a data sheet."""

    bytes_per_us: float
    flops_per_us: float

    @classmethod
    def measure(cls, device: torch.device, dtype: torch.dtype) -> Ceilings:
        """Sum up far more than any cache holds; multiply square matrices of ``dtype``."""
        on_gpu = device.type == "cuda"
        big = torch.ones(2**30 if on_gpu else 2**26, device=device)
        size = 8192 if on_gpu else 1024
        left, right = torch.randn(2, size, size, device=device, dtype=dtype)
        read = microseconds(device, [big.sum] * 3)
        product = microseconds(device, [lambda: F.linear(left, right)] * 3)
        return cls(big.nbytes / read, 2 * size**3 / product)

    def floor(self, num_bytes: float, num_operations: float = 0.0) -> float:
        """Microseconds that no kernel can undercut which moves so many bytes and does so many operations."""
        return max(num_bytes / self.bytes_per_us, num_operations / self.flops_per_us)
