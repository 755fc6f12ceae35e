"""Compiles the kernels that a trial run asks for side by side, where a launch would compile one after another.

Triton asks a hook before it compiles. Ours notes the request, has a thread compile it into Triton's cache on disk, and
declines the launch. Threads are enough: most of a compilation is LLVM and ``ptxas``, which leave Python's lock alone.
"""

from __future__ import annotations

import json
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from threading import Thread
from types import TracebackType
from typing import Any, Self

import torch
import triton
from triton import knobs
from triton.runtime import driver
from triton.runtime.cache import triton_key


class TritonCompiler:
    """See :class:`octavo.interfaces.KernelCompiler`."""

    def __init__(self, device: torch.device, num_workers: int) -> None:
        self._num_workers = num_workers
        self._jobs: dict[tuple[object, str], Future[object]] = {}
        self._stack = ExitStack()
        self.num_compiled = 0
        # Triton's hash of itself, a part of each kernel's key in the cache: read while the weights are loaded
        self._hash = Thread(target=triton_key)
        self._hash.start()

    @classmethod
    def missing(cls, device: torch.device) -> list[str]:
        return [] if device.type == "cuda" else [f"it needs a CUDA device, not '{device.type}'"]

    def __enter__(self) -> Self:
        self._target = driver.active.get_current_target()
        self._hash.join()  # it is remembered; else every thread of the pool would begin with it
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
        for job in self._jobs.values():
            job.result()  # raises what compilation raised
        self._jobs.clear()

    def _note(self, *, key: str, fn: Any, compile: dict[str, Any], **_: object) -> bool:
        """Triton's ``jit_cache_hook``: True keeps it from compiling, and so from launching."""
        if (fn.jit_function, key) not in self._jobs:
            source = fn.jit_function.ASTSource(
                fn.jit_function, compile["signature"], compile["constants"], compile["configs"][0]
            )
            listed = json.loads(compile["specialization_data"])["options"]
            # JSON has made lists of tuples, which options are hashed as
            options = {name: tuple(value) if isinstance(value, list) else value for name, value in listed.items()}
            self._jobs[fn.jit_function, key] = self._pool.submit(self._compile, source, options)
        return True

    def _compile(self, source: Any, options: dict[str, Any]) -> None:
        """The kernel, and the C program that launches it, which is kept on disk as well."""
        kernel = triton.compile(source, target=self._target, options=options)
        driver.active.launcher_cls(kernel.src, kernel.metadata)

    def _count(self, *, cache_hit: bool, **_: object) -> None:
        """Triton's ``listener``."""
        self.num_compiled += not cache_hit
