"""Checkpoints made by autoawq, auto-gptq, gptqmodel and llm-compressor give the logits that those packages gave."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from tests.plugins.quant.conftest import FIXTURES, LoadedModel
from torch import Tensor

from octavo.attention import torch_backend
from octavo.interfaces import AttentionSpec
from octavo_cpu.library import library_missing
from octavo_cpu.plugin import octavo_kernels

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


@pytest.fixture
def _library_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that adds up in the order of the library's.

    A sum in another order may end on the other side of where FP8 rounds: in ct-fp8-static one of 12288 inputs of the
    first output projection does, by 3 units in the last place of float32 (108.0 instead of 107.99996, a tie), and turns
    logits of the tokens after it by up to 0.07.
    """

    def attend(query: Tensor, keys: Tensor, values: Tensor, spec: AttentionSpec) -> Tensor:
        heads = [tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, keys, values)]
        group = spec.num_heads // spec.num_kv_heads
        repeated = [heads[0], *(tensor.repeat_interleave(group, dim=1) for tensor in heads[1:])]
        attended = torch.nn.functional.scaled_dot_product_attention(*repeated, is_causal=True, scale=spec.scale)
        return attended[0].transpose(0, 1)

    monkeypatch.setattr(torch_backend, "attend_one", attend)


@pytest.mark.usefixtures("_library_attention")
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("name", EXACT)
def test_compressed_tensors_and_fp8_in_float32_agree_with_their_rounding_rules(name, fused):
    stored, model = reference(name), LoadedModel(FIXTURES / name, fused=fused)
    for tokens, logits in zip(stored["input_ids"].tolist(), stored["logits_fp32"], strict=True):
        assert (model.logits(tokens) - logits).abs().max() < 5e-5


@pytest.mark.parametrize("name", EXACT)
def test_our_own_attention_rounds_nearly_every_input_alike(name):
    stored, model = reference(name), LoadedModel(FIXTURES / name)
    for tokens, logits in zip(stored["input_ids"].tolist(), stored["logits_fp32"], strict=True):
        difference = (model.logits(tokens) - logits).abs().amax(dim=1)
        assert difference.median() < 5e-5
        assert difference.max() < 0.1  # inputs that are not rounded at all move every token by 0.26 and more


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ALL)
def test_the_compiled_kernels_say_the_same_as_the_reference(name, dtype):
    if reasons := library_missing():
        pytest.skip(reasons[0])
    tokens = reference(name)["input_ids"][0].tolist()
    in_c = octavo_kernels()
    fast, slow = (LoadedModel(FIXTURES / name, dtype, kernels=kernels) for kernels in (in_c, []))
    used = {name for operation in ("linear_packed", "linear_fp8") for name in fast.operations.log.get(operation, ())}
    assert used == {"cpu"} or dtype == torch.bfloat16  # which needs AVX512_BF16
    difference = (fast.logits(tokens) - slow.logits(tokens)).abs()
    if dtype == torch.bfloat16:
        assert difference.mean() < 0.05
    else:
        assert difference.median() < 1e-4
        assert difference.max() < (1e-3 if name in INTEGER else 0.3)  # another order of sums, as above


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
