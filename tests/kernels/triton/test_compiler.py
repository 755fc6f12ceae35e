"""Kernels that a trial run asks for are compiled side by side into Triton's cache, and are not launched meanwhile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

PROGRAM = r"""
import json, threading
import torch, triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from octavo_kernels.activation import silu_and_mul
from octavo_kernels.argmax import argmax
from octavo_kernels.compiler import TritonCompiler
from octavo_kernels.norm import rms_norm

class Utils:
    get_device_properties = staticmethod(lambda device: {"max_shared_mem": 232448})
    load_binary = staticmethod(lambda name, *_: loaded.append(name) or (0, 0, 0, 0, 1024))

class NoDevice:
    "The driver of an H200 that is not there: it keeps account of what is loaded and launched."
    utils = Utils
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    launcher_cls = staticmethod(lambda source, metadata: lambda *_: launched.append(metadata.name))

@triton.jit
def broken(x_ptr):
    tl.store(x_ptr, no_such_value)

def trial_run():
    rms_norm(x, x[0], 1e-5)
    rms_norm(x, x[0], 1e-5)
    silu_and_mul(x)
    argmax(x.float())

loaded, launched = [], []
driver.set_active(NoDevice())
x = torch.randn(3, 64, dtype=torch.bfloat16)
wide = torch.randn(3, 100_000)
compiler = TritonCompiler(torch.device("cuda"), 2)
with compiler:
    trial_run()
report = {"compiled": compiler.num_compiled, "loaded": sorted(loaded), "launched": list(launched)}

asked = []
triton.knobs.runtime.jit_cache_hook = lambda *, fn, **_: asked.append(fn.name)
trial_run()
report["launched later"] = list(launched)
report["compiled by launches"] = asked

triton.knobs.runtime.jit_cache_hook = None
launched.clear()
with compiler:  # as another engine of the process starts
    trial_run()
    argmax(wide)
    report["launched by a second trial"] = list(launched)
    other = threading.Thread(target=lambda: [trial_run(), argmax(wide)])
    other.start()
    other.join()
    report["launched by another thread"] = list(launched)
launched.clear()
argmax(wide)
report["launched after it"] = list(launched)

for _ in range(2):
    try:
        with compiler:
            broken[(1,)](x)
    except triton.CompilationError as error:
        report["error"] = str(error)
        report["launchable"] = any(kernels for kernels, *_ in broken.device_caches.values())
print(json.dumps(report))
"""
KERNELS = ["_argmax_join", "_argmax_part", "_rms_norm", "_silu_and_mul"]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compiler") / "program.py"
    path.write_text(PROGRAM)
    return path


@pytest.fixture(scope="module")
def first(program: Path) -> dict[str, Any]:
    return _start(program)


@pytest.fixture(scope="module")
def later(first: dict[str, Any], program: Path) -> dict[str, Any]:
    return _start(program)


def _start(program: Path) -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(program.parent / "cache")
    done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_each_kernel_is_compiled_and_loaded_once_and_not_launched(first: dict[str, Any]) -> None:
    assert first["compiled"] == len(KERNELS)
    assert first["loaded"] == KERNELS
    assert first["launched"] == []


def test_the_next_start_finds_them_on_disk(later: dict[str, Any]) -> None:
    assert later["compiled"] == 0
    assert later["loaded"] == KERNELS
    assert later["launched"] == []


def test_launches_find_them_in_memory(first: dict[str, Any], later: dict[str, Any]) -> None:
    for start in (first, later):
        assert start["launched later"] == ["_rms_norm", "_rms_norm", "_silu_and_mul", "_argmax_part", "_argmax_join"]
        assert start["compiled by launches"] == []


def test_a_second_trial_launches_nothing_while_other_threads_do(first: dict[str, Any]) -> None:
    argmax = ["_argmax_part", "_argmax_join"]
    trial = ["_rms_norm", "_rms_norm", "_silu_and_mul", *argmax]
    assert first["launched by a second trial"] == []
    assert first["launched by another thread"] == [*trial, *argmax]
    assert first["launched after it"] == argmax


def test_a_kernel_that_cannot_be_compiled_says_why_each_time(first: dict[str, Any]) -> None:
    assert "no_such_value" in first["error"]
    assert not first["launchable"]


def test_compiles_for_gpus_only() -> None:
    import torch

    from octavo_kernels.compiler import TritonCompiler

    assert TritonCompiler.missing(torch.device("cuda")) == []
    assert "CUDA device" in TritonCompiler.missing(torch.device("cpu"))[0]
