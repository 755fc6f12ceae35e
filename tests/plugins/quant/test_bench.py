"""``octavo bench kernels`` runs the products with quantized weights, when a plugin that has them takes part."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from octavo.cli import main


@pytest.mark.parametrize(
    ("plugin", "operations"),
    [
        ("awq", {"linear_packed"}),
        ("gptq", {"linear_packed"}),
        ("fp8", {"linear_fp8"}),
        ("compressed-tensors", {"linear_packed", "linear_fp8"}),
    ],
)
def test_products_are_measured_against_their_references(
    plugin: str, operations: set[str], tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("octavo.bench.timing.CPU_SECONDS", 0.0)
    monkeypatch.setattr("octavo.bench.kernel_cases.ROTATION_BYTES", {"cpu": 1})
    file = tmp_path / "result.json"
    words = ["--device", "cpu", "--dtype", "float32", "--num-tokens", "3", "--plugins", plugin]
    words += ["--operations", *sorted(operations), "--save-result", str(file)]
    assert main(["bench", "kernels", str(tiny_llama), *words]) == 0
    found = json.loads(file.read_text())["result"]["kernels"]
    assert {row["operation"] for row in found} == operations
    assert {row["size"] for row in found} == {"qkv, 3", "o, 3", "gate_up, 3", "down, 3"}
    for operation in operations:
        errors = {row["kernel"]: row["error"] for row in found if row["operation"] == operation}
        assert errors["reference"] < 1e-5
        assert all(error < 0.05 for error in errors.values()), errors
        assert len(errors) > 1


def test_they_are_unknown_where_no_plugin_has_them(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", str(tiny_llama), "--operations", "linear_packed"]) == 2
    assert "--operations linear_packed: there is no such benchmark; there are: rms_norm," in capsys.readouterr().err
