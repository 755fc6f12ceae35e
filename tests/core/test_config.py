"""What can be configured, and what is refused whatever the model and the machine."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from octavo.config import EngineConfig, SpeculativeConfig
from octavo.errors import ConfigError

AT_LEAST_ONE = (
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_num_partial_prefills",
    "num_blocks",
    "num_threads",
)


@pytest.mark.parametrize("field", AT_LEAST_ONE)
def test_counts_are_at_least_one(field: str) -> None:
    assert getattr(EngineConfig(model="m", **{field: 1}), field) == 1
    for value in (0, -1):
        with pytest.raises(ConfigError, match=f"{field} must be at least 1, not {value}"):
            EngineConfig(model="m", **{field: value})


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("block_size", 0, "block_size must be a power of two, not 0"),
        ("block_size", 24, "block_size must be a power of two, not 24"),
        ("gpu_memory_utilization", 0.0, "above 0 and at most 1, not 0.0"),
        ("gpu_memory_utilization", 1.01, "above 0 and at most 1, not 1.01"),
        ("cpu_kv_cache_gib", 0.0, "cpu_kv_cache_gib must be above 0, not 0.0"),
        ("tensor_parallel_size", 0, "at least 1, not 0"),
        ("tensor_parallel_size", 2, "this version runs on one device only; use 1"),
        ("pipeline_parallel_size", 2, "this version runs on one device only; use 1"),
    ],
)
def test_values_that_can_never_work(field: str, value: Any, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        EngineConfig(model="m", **{field: value})
    assert field in str(refused.value)
    assert said in str(refused.value)


@pytest.mark.parametrize("value", [1, 2, 16, 1024])
def test_block_sizes_are_powers_of_two(value: int) -> None:
    assert EngineConfig(model="m", block_size=value).block_size == value


def test_the_number_of_speculative_tokens_is_bounded() -> None:
    for value in (1, 32):
        assert SpeculativeConfig(num_tokens=value).num_tokens == value
    for value in (0, 33):
        with pytest.raises(ConfigError, match=f"num_speculative_tokens must be between 1 and 32, not {value}"):
            SpeculativeConfig(num_tokens=value)


@pytest.mark.parametrize(
    ("config", "enabled"),
    [
        (SpeculativeConfig(), False),
        (SpeculativeConfig(num_tokens=8), False),
        (SpeculativeConfig(model="draft"), True),
        (SpeculativeConfig(method="ngram"), True),
    ],
)
def test_speculation_is_off_until_something_is_named(config: SpeculativeConfig, enabled: bool) -> None:
    assert config.enabled is enabled


def test_settings_of_what_is_off_are_refused() -> None:
    for off in (SpeculativeConfig(num_tokens=8), SpeculativeConfig(fixed=True), SpeculativeConfig(quantization="fp8")):
        with pytest.raises(ConfigError, match="--speculative-model or --speculative-method"):
            EngineConfig(model="m", speculative=off)
    with pytest.raises(ConfigError, match="prefix_cache chain contradicts enable_prefix_caching"):
        EngineConfig(model="m", prefix_cache="chain", enable_prefix_caching=False)


@pytest.mark.parametrize("config", [EngineConfig(model="m"), SpeculativeConfig()])
def test_a_configuration_is_frozen(config: EngineConfig | SpeculativeConfig) -> None:
    for field in dataclasses.fields(config):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, field.name, None)
