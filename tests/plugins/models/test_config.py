"""What a configuration may say: everything else is refused by name, before any weight is read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.plugins.models.conftest import MAX_MODEL_LEN, PLACEMENT, TINY, operations

from octavo.errors import ConfigError
from octavo.interfaces import AttentionSpec
from octavo.layers.builder import Builder
from octavo.loader import DummyLoader
from octavo_models.llama import LlamaForCausalLM
from octavo_models.mistral import MistralForCausalLM
from octavo_models.plugin import octavo_models, plugin
from octavo_models.qwen2 import Qwen2ForCausalLM
from octavo_models.qwen3 import Qwen3ForCausalLM

MODELS = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)


def attention_of(model: type, **changes: Any) -> list[AttentionSpec]:
    """The attention layers that a model builds from the tiny configuration with changes."""
    config = {name: value for name, value in {**TINY, **changes}.items() if value is not ...}
    build = Builder(DummyLoader(PLACEMENT, operations()), max_model_len=MAX_MODEL_LEN)
    model(config, build)
    return build.attention_specs


def windows_of(model: type, **changes: Any) -> list[int | None]:
    return [spec.window for spec in attention_of(model, **changes)]


def test_every_architecture_resolves_to_a_class_of_the_plugin() -> None:
    for provider in octavo_models():
        assert provider.resolve().__module__.startswith("octavo_models.")
    assert plugin.api == (1, 1)


@pytest.mark.parametrize("model", MODELS)
def test_layers_are_numbered_and_sized_as_configured(model: type) -> None:
    specs = attention_of(model)
    assert [spec.layer for spec in specs] == [0, 1, 2]
    for spec in specs:
        assert (spec.num_heads, spec.num_kv_heads, spec.head_dim) == (4, 2, 8)
        assert spec.scale == pytest.approx(8**-0.5)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' of the model's configuration is not supported; supported: silu"),
        ({"vocab_size": ...}, "needs a whole number above 0 as 'vocab_size', not None"),
        ({"num_hidden_layers": 0}, "needs a whole number above 0 as 'num_hidden_layers', not 0"),
        ({"intermediate_size": "48"}, "needs a whole number above 0 as 'intermediate_size', not '48'"),
        ({"num_key_value_heads": 3}, r"num_attention_heads \(4\) is not a multiple of num_key_value_heads \(3\)"),
        ({"rope_scaling": {"type": "longrope"}}, "rope type 'longrope' is not supported"),
    ],
)
def test_a_setting_that_is_not_supported_is_refused_by_name(model: type, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        attention_of(model, **changes)


def test_heads_that_do_not_share_out_the_hidden_size_need_a_head_dim() -> None:
    with pytest.raises(ConfigError, match=r"hidden_size \(30\) is not a multiple of num_attention_heads \(4\)"):
        attention_of(LlamaForCausalLM, hidden_size=30, head_dim=...)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["full_attention"] * 2}, "layer_types has 2 entries, but num_hidden_layers is 3"),
        ({"layer_types": ["linear_attention"] * 3}, "layer_types 'linear_attention' .* not supported; supported: full"),
        ({"layer_types": ["sliding_attention"] * 3, "sliding_window": None}, "sets no sliding_window"),
        ({"sliding_window": 0, "use_sliding_window": True}, "needs a whole number above 0 as 'sliding_window', not 0"),
    ],
)
@pytest.mark.parametrize("model", [MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM])
def test_windows_that_cannot_be_are_refused(model: type, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        attention_of(model, **changes)


def test_mistral_slides_everywhere_unless_told_otherwise() -> None:
    assert windows_of(MistralForCausalLM) == [4096] * 3
    assert windows_of(MistralForCausalLM, sliding_window=7) == [7] * 3
    assert windows_of(MistralForCausalLM, sliding_window=None) == [None] * 3
    types = ["full_attention", "sliding_attention", "full_attention"]
    assert windows_of(MistralForCausalLM, sliding_window=7, layer_types=types) == [None, 7, None]


@pytest.mark.parametrize("model", [Qwen2ForCausalLM, Qwen3ForCausalLM])
def test_qwen_slides_in_the_upper_layers_if_at_all(model: type) -> None:
    assert windows_of(model) == [None] * 3
    assert windows_of(model, sliding_window=7, max_window_layers=0) == [None] * 3
    assert windows_of(model, use_sliding_window=True, max_window_layers=2) == [None, None, 4096]
    assert windows_of(model, use_sliding_window=True, sliding_window=7) == [None] * 3  # from layer 28 on


def test_the_defaults_that_differ_between_families() -> None:
    assert attention_of(LlamaForCausalLM, num_key_value_heads=...)[0].num_kv_heads == 4
    assert attention_of(MistralForCausalLM, num_attention_heads=16, num_key_value_heads=...)[0].num_kv_heads == 8
    assert attention_of(Qwen3ForCausalLM, head_dim=...)[0].head_dim == 128


def test_the_builder_knows_the_size_of_what_it_built_and_what_steps_read_of_it() -> None:
    def built(**changes: Any) -> Builder:
        build = Builder(DummyLoader(PLACEMENT, operations()), max_model_len=MAX_MODEL_LEN)
        LlamaForCausalLM({**TINY, **changes}, build)
        return build

    hidden, mlp, vocab, layers, queries, keys = 32, 48, 97, 3, 32, 16
    layer = hidden * (queries + 2 * keys) + queries * hidden + 3 * hidden * mlp + 2 * hidden
    rotary = MAX_MODEL_LEN * TINY["head_dim"]
    read, table = layers * layer + hidden + rotary, vocab * hidden
    for build, num_tables in ((built(tie_word_embeddings=True), 1), (built(), 2)):
        assert build.num_bytes() == (read + num_tables * table) * torch.float32.itemsize
        assert build.num_bytes_read(with_head=True) == (read + table) * torch.float32.itemsize
        assert build.num_bytes_read(with_head=False) == read * torch.float32.itemsize
