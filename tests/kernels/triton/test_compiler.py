"""Kernels that a trial run asks for are compiled side by side into Triton's cache, and are not launched meanwhile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton")

PROGRAM = r"""
import json, threading
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from octavo_kernels.activation import silu_and_mul
from octavo_kernels.argmax import argmax
from octavo_kernels.compiler import TritonCompiler
from octavo_kernels.norm import rms_norm

class NoDevice:
    "The driver of an H200 that is not there: whatever is launched fails."
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    launcher_cls = staticmethod(lambda source, metadata: launchers.append(source))

launchers = []
driver.set_active(NoDevice())
x = torch.randn(3, 64, dtype=torch.bfloat16)

def trial_run():
    rms_norm(x, x[0], 1e-5)
    rms_norm(x, x[0], 1e-5)
    silu_and_mul(x)
    argmax(x.float())

hits = []
triton.knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
report = {}
for name in ("first", "again"):
    compiler = TritonCompiler(torch.device("cuda"), 2)
    with compiler:
        trial_run()
    report[name] = compiler.num_compiled
    report[name + " launchers"] = len(launchers)
try:
    rms_norm(x, x[0], 1e-5)
except AttributeError:  # loading it onto a device
    report["found by a launch"] = hits
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_each_kernel_is_compiled_once_and_not_launched(report: dict[str, Any]) -> None:
    assert report["first"] == 4  # norm, activation, and the two of argmax
    assert report["first launchers"] == 4


def test_the_next_start_finds_them(report: dict[str, Any]) -> None:
    assert report["again"] == 0


def test_a_launch_finds_what_a_thread_compiled(report: dict[str, Any]) -> None:
    assert report["found by a launch"] == [True]


def test_compiles_for_gpus_only() -> None:
    import torch

    from octavo_kernels.compiler import TritonCompiler

    assert TritonCompiler.missing(torch.device("cuda")) == []
    assert "CUDA device" in TritonCompiler.missing(torch.device("cpu"))[0]
