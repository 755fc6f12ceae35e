"""Rotary embeddings give Transformers' numbers for every kind and both spellings of the configuration."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from octavo.errors import ConfigError
from octavo.layers.rotary import RotaryEmbedding, rope_parameters

CPU = torch.device("cpu")
HEAD_DIM = 16
TRAINED = 64

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
KINDS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {"rope_type": "llama3", **LLAMA3, "original_max_position_embeddings": 16},
    "llama3-whole-context": {"rope_type": "llama3", **LLAMA3},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn-whole-context": {"rope_type": "yarn", "factor": 4.0},
    "yarn-betas": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 3.0, "beta_slow": 0.5},
    "yarn-not-truncated": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 3.0, "truncate": False},
    "yarn-attention-factor": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.7},
    "yarn-mscale": {"rope_type": "yarn", "factor": 4.0, "mscale": 1.3, "mscale_all_dim": 0.6},
    "yarn-mscale-alone": {"rope_type": "yarn", "factor": 4.0, "mscale": 1.3},
    "yarn-shrinking": {"rope_type": "yarn", "factor": 0.5},
}


def config_of(theta: float, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": theta, **parameters}, "max_position_embeddings": TRAINED}


def reference_config(theta: float, parameters: dict[str, Any]) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=2 * HEAD_DIM,
        num_attention_heads=2,
        head_dim=HEAD_DIM,
        max_position_embeddings=TRAINED,
        rope_parameters={"rope_theta": theta, **parameters},
    )


def made(config: dict[str, Any], max_position: int = TRAINED, head_dim: int = HEAD_DIM) -> RotaryEmbedding:
    return RotaryEmbedding.from_config(config, head_dim, max_position, CPU)


@pytest.mark.parametrize("theta", [1000.0, 500000.0])
@pytest.mark.parametrize("kind", KINDS)
def test_the_table_is_transformers_cosines_and_sines(kind: str, theta: float) -> None:
    positions = torch.arange(TRAINED)
    reference = LlamaRotaryEmbedding(reference_config(theta, dict(KINDS[kind])))
    cosine, sine = reference(torch.zeros(1), positions.unsqueeze(0))
    half = HEAD_DIM // 2
    table = made(config_of(theta, **KINDS[kind])).table
    torch.testing.assert_close(table, torch.cat([cosine[0, :, :half], sine[0, :, :half]], dim=-1))


@pytest.mark.parametrize("key", ["type", "rope_type"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_older_spelling_means_the_same(kind: str, key: str) -> None:
    scaling = {key if name == "rope_type" else name: value for name, value in KINDS[kind].items()}
    older = {"rope_theta": 1000.0, "rope_scaling": scaling, "max_position_embeddings": TRAINED}
    assert made(older).table.equal(made(config_of(1000.0, **KINDS[kind])).table)


@pytest.mark.parametrize("longest", [TRAINED // 2, TRAINED, 3 * TRAINED])
def test_dynamic_is_stretched_for_the_longest_context_served(longest: int) -> None:
    reference = reference_config(1000.0, dict(KINDS["dynamic"]))
    frequencies, _ = ROPE_INIT_FUNCTIONS["dynamic"](reference, CPU, seq_len=longest)
    table = made(config_of(1000.0, **KINDS["dynamic"]), max_position=longest).table
    angles = torch.outer(torch.arange(longest).float(), frequencies)
    torch.testing.assert_close(table, torch.cat([angles.cos(), angles.sin()], dim=-1), rtol=1e-4, atol=1e-5)


def test_yarn_without_a_factor_takes_the_ratio_of_the_contexts() -> None:
    parameters = {"rope_type": "yarn", "original_max_position_embeddings": TRAINED // 4}
    assert made(config_of(1000.0, **parameters)).table.equal(made(config_of(1000.0, **parameters, factor=4.0)).table)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])  # we round once less
def test_rotation_is_transformers(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    rotary = made(config_of(1000.0))
    positions = torch.tensor([5, 0, 63, 17, 5])
    query, key = torch.randn(5, 4, HEAD_DIM, dtype=dtype), torch.randn(5, 2, HEAD_DIM, dtype=dtype)
    cosine, sine = LlamaRotaryEmbedding(reference_config(1000.0, {"rope_type": "default"}))(
        query, positions.unsqueeze(0)
    )
    expected = apply_rotary_pos_emb(query.unsqueeze(0), key.unsqueeze(0), cosine, sine, unsqueeze_dim=2)
    torch.testing.assert_close(rotary(query, positions), expected[0][0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(rotary(key, positions), expected[1][0], rtol=tolerance, atol=tolerance)


def test_a_partial_rotation_leaves_the_rest_of_a_head_alone() -> None:
    torch.manual_seed(0)
    x, positions = torch.randn(3, 2, HEAD_DIM), torch.tensor([1, 2, 3])
    for config in ({**config_of(1000.0), "partial_rotary_factor": 0.5}, config_of(1000.0, partial_rotary_factor=0.5)):
        rotated = made(config)(x, positions)
        assert rotated[..., HEAD_DIM // 2 :].equal(x[..., HEAD_DIM // 2 :])
        whole = made(config_of(1000.0), head_dim=HEAD_DIM // 2)(x[..., : HEAD_DIM // 2], positions)
        assert rotated[..., : HEAD_DIM // 2].equal(whole)


def test_rope_scaling_wins_over_rope_parameters_because_users_override_with_it() -> None:
    parameters = rope_parameters({**config_of(1000.0), "rope_scaling": {"rope_type": "linear", "factor": 3.0}})
    assert (parameters["rope_type"], parameters["factor"], parameters["rope_theta"]) == ("linear", 3.0, 1000.0)


def test_a_config_without_any_setting_rotates_plainly() -> None:
    assert made({}).table.equal(made(config_of(10000.0)).table)


def test_settings_by_layer_type() -> None:
    nested = {
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0},
        },
    }
    full = RotaryEmbedding.from_config(nested, HEAD_DIM, 8, CPU, "full_attention")
    assert full.table.equal(made(config_of(1000.0, rope_type="linear", factor=2.0), max_position=8).table)
    for layer_type in (None, "chunked_attention"):
        with pytest.raises(ConfigError, match="layer types sliding_attention, full_attention"):
            RotaryEmbedding.from_config(nested, HEAD_DIM, 8, CPU, layer_type)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "longrope", "factor": 2.0}, "rope type 'longrope' is not supported; supported: default, linear"),
        ({"rope_type": "linear"}, "rope type 'linear' needs a number above 0 as 'factor', not None"),
        ({"rope_type": "dynamic", "factor": "2"}, "'dynamic' needs a number above 0 as 'factor', not '2'"),
        ({"rope_type": "llama3", "factor": 2.0}, "'llama3' needs a number above 0 as 'low_freq_factor', not None"),
        ({"rope_type": "yarn", "factor": 0}, "'yarn' needs a number above 0 as 'factor', not 0"),
    ],
)
def test_what_is_not_supported_is_named(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made(config_of(1000.0, **parameters))
