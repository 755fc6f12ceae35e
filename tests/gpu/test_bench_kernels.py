"""``octavo bench kernels`` on a GPU: every kernel that can run there is near float32."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from octavo.cli import main

pytestmark = pytest.mark.gpu


def test_kernels_of_a_gpu_are_near_float32(tiny_llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    words = ["--dtype", "bfloat16", "--num-tokens", "1", "32", "--context-len", "300", "--save-result", str(file)]
    assert main(["bench", "kernels", str(tiny_llama), "--device", "cuda", *words]) == 0
    found = json.loads(file.read_text())["result"]["kernels"]
    assert {"triton", "triton-linear", "triton-rms-norm", "triton-candidates", "torch"} < {
        row["kernel"] for row in found
    }
    # a token that is drawn may be another where the number lies within rounding of two
    assert [row for row in found if not row["error"] < (0.1 if row["operation"] == "sample" else 0.02)] == []
