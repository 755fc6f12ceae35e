"""Compiles the kernels that a trial run asks for side by side, where a launch would compile one after another.

Triton asks a hook before it compiles. Ours declines, and has a thread compile the kernel, or find it in Triton's cache
on disk, and load it. Threads are enough: most of a compilation is LLVM and ``ptxas``, which leave Python's lock alone.

Nothing that the trial's thread asks for is launched, not even kernels that are at hand since another engine of the
process compiled them: they would go by numbers that kernels which are missing have not written. Other threads launch as
ever.
"""

from __future__ import annotations

import json
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from threading import get_ident
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
import triton
from triton import knobs
from triton.runtime import JITFunction, driver
from triton.runtime.cache import triton_key


class _Job(NamedTuple):
    """A kernel that is being compiled, and where launches look for it."""

    kernels: dict[str, object]
    key: str
    kernel: Future[object]


class TritonCompiler:
    """See :class:`octavo.interfaces.KernelCompiler`."""

    def __init__(self, device: torch.device, num_workers: int) -> None:
        self._jobs: list[_Job] = []
        self._stack = ExitStack()
        self._num_workers = num_workers
        with_weights = ThreadPoolExecutor(1)  # while they are loaded
        self._target = with_weights.submit(self._prepare)
        with_weights.shutdown(wait=False)
        self.num_compiled = 0

    @classmethod
    def missing(cls, device: torch.device) -> list[str]:
        return [] if device.type == "cuda" else [f"it needs a CUDA device, not '{device.type}'"]

    def __enter__(self) -> Self:
        self._thread = get_ident()
        launch = JITFunction.run

        def run(function: Any, *args: Any, warmup: bool, **kwargs: Any) -> Any:
            return launch(function, *args, warmup=warmup or get_ident() == self._thread, **kwargs)

        self._stack.callback(setattr, JITFunction, "run", launch)
        JITFunction.run = run
        self._stack.enter_context(knobs.runtime.scope())
        self._stack.enter_context(knobs.compilation.scope())
        self._pool = self._stack.enter_context(ThreadPoolExecutor(self._num_workers))
        knobs.runtime.jit_cache_hook = self._note
        knobs.compilation.listener = self._count
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()  # the pool is the last that was entered: it is waited for first
        jobs, self._jobs = self._jobs, []
        for kernels, key, _ in jobs:
            del kernels[key]
        for kernels, key, kernel in jobs:
            kernels[key] = kernel.result()  # raises what compilation raised

    @staticmethod
    def _prepare() -> object:
        """What Triton remembers: its hash of itself, a part of each kernel's key in the cache, and its driver, whose C
        program a first start compiles. Returns what kernels are compiled for."""
        triton_key()
        return driver.active.get_current_target()

    def _note(self, *, key: str, fn: Any, compile: dict[str, Any], **_: object) -> bool:
        """Triton's ``jit_cache_hook``: True keeps it from compiling."""
        if get_ident() != self._thread:
            return False
        function = fn.jit_function
        source = function.ASTSource(function, compile["signature"], compile["constants"], compile["configs"][0])
        listed = json.loads(compile["specialization_data"])["options"]
        # JSON has made lists of tuples, which options are hashed as
        options = {name: tuple(value) if isinstance(value, list) else value for name, value in listed.items()}
        kernels = function.device_caches[compile["device"]][0]
        kernel = self._pool.submit(self._compile, source, options)
        kernels[key] = kernel  # so that nobody asks again: a trial run makes thousands of launches
        self._jobs.append(_Job(kernels, key, kernel))
        return True

    def _compile(self, source: Any, options: dict[str, Any]) -> object:
        """The kernel, ready to be launched: on the device, and with the C program that launches it."""
        kernel = triton.compile(source, target=self._target.result(), options=options)
        kernel._init_handles()
        return kernel

    def _count(self, *, cache_hit: bool, **_: object) -> None:
        """Triton's ``listener``."""
        self.num_compiled += not cache_hit
