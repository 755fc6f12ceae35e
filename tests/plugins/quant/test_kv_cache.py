"""An 8-bit cache under whole models, with the scales of the checkpoint and without."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tests.plugins.quant.conftest import FIXTURES, LoadedModel

from octavo.config import EngineConfig
from octavo.errors import CheckpointError
from octavo.messages import Submit
from octavo.request import SamplingParams
from octavo.startup import build_engine, resolve

FP8 = torch.float8_e4m3fn
TOKENS = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46]
LARGE = 4096.0
"""What keys and values are multiplied by: more than 448 without a scale."""

NAMES: dict[str, Callable[[str], dict[str, float]]] = {
    "compressed-tensors and fp8": lambda name: {f"{name}.k_scale": LARGE / 16, f"{name}.v_scale": LARGE / 16},
    "ModelOpt": lambda name: {f"{name}.k_proj.k_scale": LARGE / 16, f"{name}.v_proj.v_scale": LARGE / 16},
    "early compressed-tensors": lambda name: {
        f"{name}.k_proj.output_scale": LARGE / 16,
        f"{name}.v_proj.output_scale": LARGE / 16,
    },
    "early fp8": lambda name: {f"{name}.kv_scale": LARGE / 16},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model with large keys and values: queries and the output projection take the factor back."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=104,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight.mul_(LARGE)
            layer.self_attn.q_proj.weight.div_(LARGE)
            layer.self_attn.v_proj.weight.mul_(LARGE)
            layer.self_attn.o_proj.weight.div_(LARGE)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def add(folder: Path, scales: dict[str, float]) -> None:
    file = folder / "model.safetensors"
    save_file({**load_file(file), **{name: torch.tensor([value]) for name, value in scales.items()}}, file)


@pytest.mark.parametrize("names", NAMES)
def test_an_8_bit_cache_holds_what_the_checkpoint_s_scales_bring_into_range(folder: Path, names: str) -> None:
    exact = LoadedModel(folder).logits(TOKENS)
    saturated = (LoadedModel(folder).logits(TOKENS, FP8) - exact).abs().mean()
    for layer in (0, 1):
        add(folder, NAMES[names](f"model.layers.{layer}.self_attn"))
    model = LoadedModel(folder)
    assert {(spec.key_scale, spec.value_scale) for spec in model.build.attention_specs} == {(LARGE / 16, LARGE / 16)}
    assert model.loader.unread() == []
    torch.testing.assert_close(model.logits(TOKENS), exact)  # a wide cache needs no scales
    rounded = (model.logits(TOKENS, FP8) - exact).abs().mean()
    assert 0 < rounded < 0.1 * exact.std()
    assert rounded < 0.2 * saturated


def test_an_8_bit_cache_without_scales_rounds_what_is_in_range() -> None:
    name = "gptq-asym-actorder-g64"
    tokens = load_file(FIXTURES / name / "reference.safetensors")["input_ids"][0].tolist()
    model = LoadedModel(FIXTURES / name)
    exact, rounded = model.logits(tokens), model.logits(tokens, FP8)
    assert 0 < (rounded - exact).abs().mean() < 0.05 * exact.std()


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_a_scale_that_is_none_is_refused(folder: Path, value: float) -> None:
    add(folder, {"model.layers.1.self_attn.v_scale": value})
    with pytest.raises(CheckpointError, match=r"'model.layers.1.self_attn.v_scale' is .* positive number.*remove"):
        LoadedModel(folder)


def greedy(folder: Path, kv_cache_dtype: str, num_tokens: int) -> list[int]:
    config = EngineConfig(
        model=str(folder), dtype="float32", device="cpu", kv_cache_dtype=kv_cache_dtype, max_model_len=64, num_threads=1
    )
    engine = build_engine(resolve(config))
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    engine.submit(Submit("0", TOKENS, params, seed=0))
    tokens = []
    while engine.has_work:
        for output in engine.settle(engine.launch()).sequences:
            tokens += output.token_ids
    return tokens


def test_an_engine_serves_with_an_8_bit_cache(folder: Path) -> None:
    """Prompt and decoding steps read the same rounded cache as one pass over everything."""
    for layer in (0, 1):
        add(folder, NAMES["early fp8"](f"model.layers.{layer}.self_attn"))
    made = greedy(folder, "fp8", 12)
    logits = LoadedModel(folder).logits(TOKENS + made, FP8)[len(TOKENS) - 1 : -1]
    best = logits.topk(2).values
    clear = best[:, 0] - best[:, 1] > 1e-3
    assert clear.sum() > 8
    assert torch.equal(logits.argmax(-1)[clear], torch.tensor(made)[clear])
    assert made != greedy(folder, "auto", 12) or not torch.equal(logits, LoadedModel(folder).logits(TOKENS + made))


def test_settings_with_a_scheme_for_the_cache_are_read(tmp_path: Path) -> None:
    """``kv_cache_scheme`` says that there are scales; they serve an 8-bit cache and are harmless for another."""
    source = FIXTURES / "ct-fp8-dynamic"
    config = json.loads((source / "config.json").read_text())
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    config["quantization_config"]["kv_cache_scheme"] = scheme
    (tmp_path / "config.json").write_text(json.dumps(config))
    scales = {
        f"model.layers.{layer}.self_attn.{which}_scale": torch.tensor([0.0625]) for layer in (0, 1) for which in "kv"
    }
    save_file({**load_file(source / "model.safetensors"), **scales}, tmp_path / "model.safetensors")
    model, without = LoadedModel(tmp_path), LoadedModel(source)
    assert {spec.key_scale for spec in model.build.attention_specs} == {0.0625}
    assert torch.equal(model.logits(TOKENS), without.logits(TOKENS))
    exact = without.logits(TOKENS)
    assert 0 < (model.logits(TOKENS, FP8) - exact).abs().mean() < 0.1 * exact.std()
