"""Kernels run on the GPU where there is one and in Triton's interpreter elsewhere, with the same tests.

The interpreter must be chosen (``TRITON_INTERPRET=1``) before anything imports Triton, so without a GPU the tests of
this folder run in a process of their own, which ``test_interpreted.py`` starts.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

STARTS_PROCESSES = {"test_interpreted.py", "test_compiled.py", "test_compiled_hopper.py", "test_compiler.py"}

if os.environ.get("TRITON_INTERPRET") == "1":
    collect_ignore = sorted(STARTS_PROCESSES)
elif not torch.cuda.is_available():
    collect_ignore = sorted({file.name for file in Path(__file__).parent.glob("test_*.py")} - STARTS_PROCESSES)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _interpreter_with_numpy_2_4(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6's interpreter turns one-element arrays into integers, which numpy 2.4 refuses."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor: type, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch)


@pytest.fixture(autouse=True)
def _interpreter_of_triton_3_9(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.9's interpreter makes integers of a truth value that is repeated, and then refuses it as a mask."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    create_splat = interpreter.InterpreterBuilder.create_splat

    def keep_truth(self: Any, kind: Any, value: Any) -> Any:
        repeated = create_splat(self, kind, value)
        if value.data.dtype == bool:
            repeated.data = repeated.data.astype(bool)
        return repeated

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_splat", keep_truth)
