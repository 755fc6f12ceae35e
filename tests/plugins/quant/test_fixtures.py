"""Checkpoints made by autoawq, auto-gptq, gptqmodel and llm-compressor give the logits that those packages gave."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from tests.plugins.quant.conftest import FIXTURES, LoadedModel

ALL = sorted(path.name for path in FIXTURES.iterdir() if (path / "config.json").exists())
INTEGER_HALF = [name for name in ALL if name.startswith(("awq", "gptq"))]
EXACT = [name for name in ALL if name not in INTEGER_HALF]
INTEGER = [name for name in ALL if name in INTEGER_HALF or "w4a16" in name]


def reference(name: str) -> dict[str, torch.Tensor]:
    return load_file(FIXTURES / name / "reference.safetensors")


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("name", INTEGER_HALF)
def test_awq_and_gptq_in_float32_differ_by_the_library_s_half_precision_only(name, fused):
    stored, model = reference(name), LoadedModel(FIXTURES / name, fused=fused)
    for tokens, logits in zip(stored["input_ids"].tolist(), stored["logits"], strict=True):
        difference = (model.logits(tokens) - logits).abs()
        assert difference.max() < 0.02
        assert difference.mean() < 0.002
    assert set(model.loader.unread()) <= set(stored), "every tensor of the model is used"


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("name", EXACT)
def test_compressed_tensors_and_fp8_in_float32_agree_with_their_rounding_rules(name, fused):
    stored, model = reference(name), LoadedModel(FIXTURES / name, fused=fused)
    for tokens, logits in zip(stored["input_ids"].tolist(), stored["logits_fp32"], strict=True):
        difference = (model.logits(tokens) - logits).abs().amax(dim=1)
        # sums in another order may turn one activation over to its neighbour, which moves the tokens after it a
        # little; inputs that are not rounded at all move every token by 0.26 and more
        assert difference.median() < 5e-5
        assert difference.max() < 0.1


@pytest.mark.parametrize("name", ALL)
def test_bfloat16_keeps_the_mean_and_every_clear_choice(name):
    stored, model = reference(name), LoadedModel(FIXTURES / name, torch.bfloat16)
    for tokens, logits in zip(stored["input_ids"].tolist(), stored["logits"], strict=True):
        ours = model.logits(tokens)
        # 8-bit activations of the library are rounded, ours in bfloat16 are not
        assert (ours - logits).abs().mean() < (0.05 if name in INTEGER else 0.1)
        best = logits.topk(2).values
        clear = best[:, 0] - best[:, 1] > (0.5 if name in INTEGER else 1.8)
        assert clear.any()
        assert torch.equal(ours.argmax(-1)[clear], logits.argmax(-1)[clear])


@pytest.mark.parametrize("name", INTEGER)
def test_integer_weights_in_bfloat16_stay_within_its_rounding(name):
    stored, model = reference(name), LoadedModel(FIXTURES / name, torch.bfloat16)
    for tokens, logits in zip(stored["input_ids"].tolist(), stored["logits"], strict=True):
        assert (model.logits(tokens) - logits).abs().max() < 0.25


@pytest.mark.parametrize("name", ALL)
def test_greedy_continuations_are_the_library_s(name):
    stored, model = reference(name), LoadedModel(FIXTURES / name)
    prompt, greedy = stored["greedy_prompt"][0].tolist(), stored["greedy"][0].tolist()
    whole = greedy if greedy[: len(prompt)] == prompt else prompt + greedy
    logits = model.logits(whole)
    clear = logits.topk(2).values
    for position in range(len(prompt) - 1, len(whole) - 1):
        if clear[position, 0] - clear[position, 1] > 1.2:
            assert logits[position].argmax() == whole[position + 1]
