"""Whole models packed by the formats' definitions say what a plain model with the same matrices says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.plugins.quant.conftest import LoadedModel
from tests.plugins.quant.families import FAMILIES, KINDS, checkpoints

from octavo.errors import CheckpointError
from octavo.layers.linear import JoinedLinear, Linear
from octavo_quant.fp8_weight import Rounding

TOKENS = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46]


def num_products(linear: Linear) -> int:
    method = linear.method
    return len(method.parts) if isinstance(method, JoinedLinear) else 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_packed_model_says_what_its_matrices_say(
    tmp_path: Path, kind: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = FAMILIES[name]
    monkeypatch.setattr(Rounding, "__call__", lambda self, x: x)  # a plain model does not round its inputs
    quantized, plain = checkpoints(tmp_path, kind, family, num_files=3 if kind == "qwen2" else 1)
    ours, expected = LoadedModel(quantized), LoadedModel(plain).logits(TOKENS)
    torch.testing.assert_close(ours.logits(TOKENS), expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-4)
    assert [name for name in ours.loader.unread() if not name.endswith(".bias")] == [], "every tensor is used"
    for index, layer in enumerate(ours.model.layers):
        made = {"self_attn.qkv_proj": layer.attention.qkv, "mlp.gate_up_proj": layer.mlp.gate_up}
        for fused, linear in made.items():
            assert num_products(linear) == family.num_products.get(f"model.layers.{index}.{fused}", 1)


def test_settings_that_are_refused_are_named_with_their_folder(tmp_path: Path) -> None:
    family = FAMILIES["gptq"]
    quantized, _ = checkpoints(tmp_path, "llama", replace(family, settings={**family.settings, "bits": 5}))
    with pytest.raises(CheckpointError, match=rf"^{quantized}: bits 5 of the gptq .* or quantize again"):
        LoadedModel(quantized)
